"""Common parts of the commands' options: their look in the help, and early checks of files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import tyro

from vrthinker.errors import InputError, unwritable

Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help_behavior_hint="")]


def option(metavar: str) -> Any:
    """An option whose value has this name in the help, without a default there."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="")


def check_writable(name: str, path: Path) -> None:
    """Checks before the work that a file can be written, by opening it for appending. It is not changed.

    Args:
        name: The name of the option, for the message.
        path: The file. Its folder is made if it is missing.

    Raises:
        InputError: The file cannot be written, or is a pipe or a device.
        MachineError: The disk is full.
    """
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{name}: {path}: got a folder, a pipe or a device, allowed: a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as error:
        raise unwritable(f"{name}: {path}", error, "give another file") from None
