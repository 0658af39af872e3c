"""How options look in the commands' help."""

from __future__ import annotations

from typing import Annotated, Any

import tyro

Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help_behavior_hint="")]


def option(metavar: str) -> Any:
    """An option with a name for its value, and without a default in the help."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="")
