"""`python -m vrthinker` is the `vrthinker` command."""

from vrthinker.cli import main

if __name__ == "__main__":
    main()
