"""The `vrthinker` command: collects the subcommands, runs one, and turns errors into one line and exit code.

The result goes to stdout, the log to stderr. Exit code 0: done; 1: something failed (a judgment without a
verdict too); 2: bad input. Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any, get_args

import tyro

from vrthinker.commands.bench import BenchCommand
from vrthinker.commands.compare import CompareCommand
from vrthinker.commands.data import DataCommand
from vrthinker.commands.demo import DemoCommand
from vrthinker.commands.doctor import DoctorCommand
from vrthinker.commands.evaluate import EvalCommand
from vrthinker.commands.judge import JudgeCommand
from vrthinker.commands.make_tiny import MakeTinyCommand
from vrthinker.commands.output import safe_output
from vrthinker.commands.rank import RankCommand
from vrthinker.commands.report import ReportCommand
from vrthinker.commands.train import TrainCommand
from vrthinker.commands.world import WorldCommand
from vrthinker.errors import InputError, UnexpectedError, VRThinkerError, as_reason


def _group(name: str, description: str) -> Any:
    """A command that has subcommands."""
    return tyro.conf.subcommand(name, description=description, prefix_name=False)


Command = (
    Annotated[JudgeCommand, tyro.conf.subcommand("judge", prefix_name=False)]
    | Annotated[RankCommand, tyro.conf.subcommand("rank", prefix_name=False)]
    | Annotated[CompareCommand, tyro.conf.subcommand("compare", prefix_name=False)]
    | Annotated[DemoCommand, tyro.conf.subcommand("demo", prefix_name=False)]
    | Annotated[WorldCommand, _group("world", "The synthetic world: clips with planted defects.")]
    | Annotated[EvalCommand, _group("eval", "Say how good a judge is, with intervals.")]
    | Annotated[TrainCommand, _group("train", "Train a judge.")]
    | Annotated[ReportCommand, tyro.conf.subcommand("report", prefix_name=False)]
    | Annotated[BenchCommand, tyro.conf.subcommand("bench", prefix_name=False)]
    | Annotated[DataCommand, _group("data", "Preference data and thinking traces of yours and of others.")]
    | Annotated[DoctorCommand, tyro.conf.subcommand("doctor", prefix_name=False)]
    | Annotated[MakeTinyCommand, tyro.conf.subcommand("make-tiny", prefix_name=False)]
)

_DESCRIPTION = "A video reward model that thinks with images: which of two clips is better, and why."


def main(args: list[str] | None = None) -> None:
    """The `vrthinker` command."""
    import logging
    import os

    # Torch reads this when it loads. OpenMP threads that spin while they wait slow down other processes.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with safe_output() as output:
        logging.basicConfig(level=logging.WARNING, format="vrthinker: %(message)s")
        try:
            code = _run(sys.argv[1:] if args is None else args)
            if not output.deliver():
                code = code or 1
        except BrokenPipeError:  # the reader of stdout is gone (`| head`)
            code = 1
    sys.exit(code)


def _run(arguments: list[str]) -> int:
    """Runs the command; returns the exit code."""
    try:
        if arguments == ["--version"]:
            from vrthinker._version import __version__

            sys.stdout.write(f"vrthinker {__version__}\n")
            return 0
        _check_names(arguments)
        command: Any = tyro.cli(Command, prog="vrthinker", description=_DESCRIPTION, args=arguments)
        code: int = command.run()
        return code
    except SystemExit as left:  # tyro has printed help or what is wrong
        return left.code if isinstance(left.code, int) else 0
    except VRThinkerError as error:
        return _refuse(error)
    except Exception as error:
        reason = as_reason(error)
        if isinstance(error, BrokenPipeError) or isinstance(reason, UnexpectedError):
            raise  # the traceback helps to mend it
        return _refuse(reason)
    except KeyboardInterrupt:
        sys.stderr.write("vrthinker: interrupted; what was recorded is kept\n")
        return 130


def _check_names(arguments: list[str]) -> None:
    """Refuses a command that does not exist, also beside `--help`, which would show another command's help.

    Raises:
        InputError: There is no such command.
    """
    commands, said = Command, "vrthinker"
    for argument in arguments:
        if argument.startswith("-"):
            return
        names = {annotated.__metadata__[0].name: annotated.__origin__ for annotated in get_args(commands)}
        if argument not in names:
            allowed = ", ".join(names)
            raise InputError(f"{said}: got {argument!r}, allowed: {allowed}; `{said} --help` tells more")
        commands, said = names[argument], f"{said} {argument}"
        if not get_args(commands):  # a command without subcommands: the rest are its own arguments
            return


def _refuse(error: VRThinkerError) -> int:
    """Writes an error's line; returns its exit code."""
    # The message may quote a file name or a hostile file, but has to stay one line.
    line = "".join(c if c.isprintable() else " " for c in str(error))
    sys.stderr.write(f"vrthinker: {line}\n")
    return error.exit_code


if __name__ == "__main__":
    main()
