"""The commands that `vrthinker.cli` gathers, one file each. They load nothing heavy until they run."""
