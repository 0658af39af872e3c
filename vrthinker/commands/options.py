"""Common parts of the commands' options: their look in the help, and early checks of files."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import tyro

from vrthinker.errors import InputError, unwritable

Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help_behavior_hint="")]


def option(metavar: str) -> Any:
    """An option whose value has this name in the help, without a default there."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="")


def check_writable(name: str, path: Path) -> None:
    """Checks that a file of JSON lines can be written, by opening it for appending. It is not changed.

    Args:
        name: The name of the option, for the message.
        path: The file. Its folder is made if it is missing.

    Raises:
        InputError: The file cannot be written, is a pipe or a device, or has a name like a table's.
        MachineError: The disk is full.
    """
    from vrthinker.data.tables import refuse_table_ending

    refuse_table_ending(name, path)
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{name}: {path}: got a folder, a pipe or a device, allowed: a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as error:
        raise unwritable(f"{name}: {path}", error, "give another file") from None


def check_device(device: str | None) -> None:
    """Refuses a device that torch cannot know, before torch is loaded.

    Raises:
        InputError: The name is no device's.
    """
    if device is not None and re.fullmatch(r"(cpu|cuda|mps|xpu)(:\d{1,3})?", device) is None:
        raise InputError(f"--device: got {device!r}, allowed: cpu, cuda, cuda:1")


def is_first_process() -> bool:
    """Whether this is the process that prints, of those that torchrun may have started for one command."""
    return os.environ.get("RANK", "0") == "0"


def announce(text: str) -> None:
    """Writes a line to stderr before something that takes long, so that nobody waits in silence."""
    if not is_first_process():
        return
    sys.stderr.write("".join(c if c.isprintable() else " " for c in text) + "\n")
    sys.stderr.flush()
