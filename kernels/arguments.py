"""Checks of arguments by type, for all ops: what is no tensor and no number is refused before it is compared.

Without them a comparison raises a TypeError that names neither the op nor the argument. Every function raises
`InputError`, with the op, the argument, what was got and what is wanted.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any, NoReturn

import torch

from vrthinker.errors import InputError


def require_tensors(op: str, **values: object) -> None:
    """Refuses what is no tensor. The arguments are given by their names."""
    for name, value in values.items():
        if not isinstance(value, torch.Tensor):
            raise InputError(f"{op}: {name}: got {type(value).__name__}, wanted a torch tensor")


def require_whole(op: str, name: str, value: object, wanted: str = "a whole number") -> None:
    """Refuses what is no whole number. numpy's integers are whole numbers."""
    if not isinstance(value, (int, Integral)):
        _refuse(op, name, value, wanted)


def require_number(op: str, name: str, value: object, wanted: str = "a number") -> None:
    """Refuses what is no real number. NaN and infinity are numbers."""
    if not isinstance(value, (int, float, Real)):
        _refuse(op, name, value, wanted)


def items_of(op: str, name: str, value: Any, wanted: str) -> list[Any]:
    """The items of a sequence, an array or a tensor; a text is none of them."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        _refuse(op, name, value, wanted)
    try:
        return list(value)
    except TypeError:  # an array of no dimension
        _refuse(op, name, value, wanted)


def whole_numbers(op: str, name: str, value: object, wanted: str) -> list[int]:
    """The items of a sequence of whole numbers."""
    items = items_of(op, name, value, wanted)
    items = [item.item() if isinstance(item, torch.Tensor) and item.ndim == 0 else item for item in items]
    if not all(isinstance(item, Integral) for item in items):
        _refuse(op, name, value, wanted)
    return [int(item) for item in items]


def _refuse(op: str, name: str, value: object, wanted: str) -> NoReturn:
    raise InputError(f"{op}: {name}: got {reprlib.repr(value)}, wanted {wanted}")
