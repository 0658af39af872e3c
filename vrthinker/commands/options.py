"""What the commands' options share: how they look in the help, files that are checked before the work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import tyro

from vrthinker.errors import InputError

Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help_behavior_hint="")]


def option(metavar: str) -> Any:
    """An option with a name for its value, and without a default in the help."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="")


def check_writable(name: str, path: Path) -> None:
    """Hours of work should not end in a file that cannot be written: opens it for appending, changes nothing.

    Args:
        name: The option, for the message.
        path: The file; its folder is made when missing.

    Raises:
        InputError: It cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as error:
        raise InputError(f"{name}: {path}: cannot be written ({error.strerror}); give another file") from None
