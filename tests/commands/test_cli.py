"""The command itself: what it loads, how it ends, in processes of its own; and that `cli_run` is like one."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import NoReturn

import pytest
from cli_run import vrthinker

from vrthinker import __version__
from vrthinker.commands import demo
from vrthinker.errors import InputError, VRThinkerError

LOADED = """
import json, sys
before = set(sys.modules)
{code}
print(json.dumps(sorted(set(sys.modules) - before)), file=sys.stderr)
"""
HELPED = """
from vrthinker.cli import main
try:
    main({arguments!r})
except SystemExit as left:
    assert left.code == {exit_code}
"""
FORMS = {"tyro", "docstring_parser", "typing_extensions", "typeguard"}
"""What reads command lines; older versions of tyro also show helps with rich."""
FORMS |= {"rich", "pygments", "markdown_it", "mdurl", "shtab", "eval_type_backport", "colorama"}


def loaded_by(code: str) -> list[str]:
    """The modules that are loaded by a program, those of a bare interpreter left out."""
    program = LOADED.format(code=code)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    found: list[str] = json.loads(done.stderr.splitlines()[-1])
    return found


@pytest.mark.multi_process
@pytest.mark.parametrize(
    ("code", "allowed", "most"),
    [
        ("import vrthinker", set(), 70),
        (HELPED.format(arguments=["--help"], exit_code=0), FORMS, 400),
        (HELPED.format(arguments=["judge"], exit_code=2), FORMS, 500),
    ],
    ids=["import", "help", "refusal"],
)
def test_importing_and_helping_and_refusing_load_nothing_heavy(
    code: str, allowed: set[str], most: int
) -> None:
    found = loaded_by(code)
    packages = {name.partition(".")[0] for name in found} - sys.stdlib_module_names
    assert packages - allowed == {"vrthinker"}
    # What importing costs is the number of modules: twice today's is too much, on any machine.
    assert len(found) < most


@pytest.mark.multi_process
def test_a_closed_pipe_is_no_traceback() -> None:
    command = f"{sys.executable} -m vrthinker judge --help | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.multi_process
@pytest.mark.parametrize(
    ("arguments", "code", "out", "err"),
    [
        (["--version"], 0, f"vrthinker {__version__}\n", ""),
        (["judge"], 2, "", "vrthinker: --model: missing"),
        (["no-such-command"], 2, "", "vrthinker: got 'no-such-command', allowed: judge, rank, compare, "),
    ],
)
def test_a_process_ends_as_a_command_in_this_one(arguments: list[str], code: int, out: str, err: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vrthinker", *arguments], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (code, out)
    assert err in done.stderr
    here = vrthinker(*arguments)
    assert (here.code, here.out) == (code, out)
    assert "".join(here.err.split()) == "".join(done.stderr.split())


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["train", "dpo", "--help"],
            "vrthinker train: got 'dpo', allowed: traces, cold-start, rejection, ",
        ),
        (["train", "dpo"], "vrthinker train: got 'dpo', allowed: traces, cold-start, rejection, "),
        (["jugde", "--help"], "vrthinker: got 'jugde', allowed: judge, rank, compare, "),
        (["eval", "wrold"], "vrthinker eval: got 'wrold', allowed: world, pairs, "),
    ],
)
def test_a_command_that_does_not_exist_is_refused_also_beside_help(arguments: list[str], line: str) -> None:
    done = vrthinker(*arguments)
    assert (done.code, done.out) == (2, "")
    assert done.line.startswith(f"vrthinker: {line}")


@pytest.mark.parametrize("command", [[], ["train"], ["train", "show"], ["judge"], ["doctor"], ["bench"]])
def test_each_command_has_its_own_help(command: list[str]) -> None:
    done = vrthinker(*command, "--help")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"usage: {' '.join(['vrthinker', *command])} ")


def test_examples_in_a_help_stand_on_lines_of_their_own() -> None:
    lines = [line.strip() for line in vrthinker("doctor", "--help").out.splitlines()]
    assert {"vrthinker doctor", "vrthinker doctor --numerics nano"} <= set(lines)


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_is_printed(shell: str) -> None:
    done = vrthinker("--tyro-print-completion", shell)
    assert (done.code, done.err) == (0, "")
    assert "cold-start" in done.out or "cold_start" in done.out


# What becomes of what a command does, and that running one here leaves nothing behind


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("a file\nnamed \x1b[31m"), 2, "vrthinker: a file named  [31m"),
        (VRThinkerError("no"), 1, "vrthinker: no"),
        (
            OSError(28, "No space left on device", "x"),
            1,
            "vrthinker: x: cannot be written (No space left on device); make room, then run again",
        ),
        (
            MemoryError(),
            1,
            "vrthinker: out of memory; run it again with less beside it, or with a smaller batch",
        ),
        (KeyboardInterrupt(), 130, "vrthinker: interrupted; what was recorded is kept"),
        (BrokenPipeError(), 1, None),
    ],
)
def test_errors_are_a_line_and_an_exit_code(
    error: BaseException, code: int, line: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(self: demo.DemoCommand) -> NoReturn:
        raise error

    monkeypatch.setattr(demo.DemoCommand, "run", run)
    done = vrthinker("demo")
    assert (done.code, done.out) == (code, "")
    assert done.err == ("" if line is None else f"{line}\n")


def test_a_command_here_is_like_one_in_a_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def run(self: demo.DemoCommand) -> int:
        print(sys.argv, Path.cwd() == tmp_path)  # noqa: T201
        sys.stdout.flush()
        os.write(1, b"from C\n")
        logging.getLogger("vrthinker.any").warning("careful")
        logging.getLogger("vrthinker.any").info("chatter")
        warnings.warn("odd", UserWarning, stacklevel=1)
        os.environ["LEFT_BEHIND"] = "1"
        if self.seed == 1:
            os.kill(os.getpid(), signal.SIGINT)
        if self.seed == 2:
            raise ZeroDivisionError
        return 7

    monkeypatch.setattr(demo.DemoCommand, "run", run)
    monkeypatch.chdir(tmp_path)
    state = (sys.argv, sys.stdout, sys.stderr, logging.root.handlers[:], signal.getsignal(signal.SIGINT))
    done = vrthinker("demo")
    assert done.code == 7
    assert done.out == "['vrthinker', 'demo'] True\nfrom C\n"
    first, second, _ = done.err.splitlines()
    assert first == "vrthinker: careful"
    assert second.endswith("UserWarning: odd")
    assert vrthinker("demo", "--seed", 1).code == 130
    crashed = vrthinker("demo", "--seed", 2)
    assert crashed.code == 1
    assert crashed.err.splitlines()[-1] == "ZeroDivisionError"
    assert state == (
        sys.argv,
        sys.stdout,
        sys.stderr,
        logging.root.handlers[:],
        signal.getsignal(signal.SIGINT),
    )
    assert "LEFT_BEHIND" not in os.environ
    assert capfd.readouterr() == ("", "")
