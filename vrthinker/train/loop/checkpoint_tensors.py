"""Conversion of a model and its optimizer to the tensors of a checkpoint's files, and back.

Tensors are identified by the name of their parameter, never by position. Invariant: `put_back` compares all
names, shapes and types before it changes the first value.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from vrthinker.errors import InputError

_ADAMW, _ORTHOGONAL = ("exp_avg", "exp_avg_sq", "step"), ("exp_avg",)


def model_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that training changes: trainable parameters and persistent buffers. Tied ones appear once.

    Returns:
        Contiguous tensors by name, with a separate storage each. Tensors of the model that are so already are
        not copied.
    """
    return _apart({name: tensor.detach() for name, tensor in _changing(model).items()})


def optimizer_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state as `exp_avg/NAME`, and AdamW's `exp_avg_sq/NAME` and `step/NAME`.

    Returns:
        The tensors by name; empty before the first step.

    Raises:
        ValueError: The optimizer's state has other entries.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    kept = _moments(optimizer)
    tensors: dict[str, torch.Tensor] = {}
    for parameter, state in optimizer.state.items():
        if state.keys() != set(kept[parameter]):
            raise ValueError(
                f"optimizer: got the state {sorted(state)}, allowed: {', '.join(kept[parameter])} "
                "(AdamW's, or Muon's)"
            )
        for moment, value in state.items():
            tensors[f"{moment}/{names[id(parameter)]}"] = value.detach()
    return _apart(tensors)


def put_back(
    model_file: Path, optimizer_file: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Loads both files.

    Raises:
        InputError: Something does not fit (the message has both sides), or a file cannot be read.
    """
    changing = _changing(model)
    with _opened(model_file) as weights, _opened(optimizer_file) as moments:
        _check(model_file, weights, changing)
        _check(optimizer_file, moments, _wanted_moments(moments, changing, optimizer))
        with torch.no_grad():
            for name, tensor in changing.items():
                tensor.copy_(weights.get_tensor(name))
        optimizer.state.clear()
        # The counter of steps goes to the device on which AdamW would have made it.
        on_device = bool(optimizer.defaults.get("fused") or optimizer.defaults.get("capturable"))
        for key in sorted(moments.keys()):
            moment, _, name = key.partition("/")
            parameter, saved = changing[name], moments.get_tensor(key)
            if moment == "step":
                value = saved.to(parameter.device if on_device else "cpu", copy=True)
            else:
                value = torch.empty_like(parameter, requires_grad=False).copy_(saved)
            optimizer.state[parameter][moment] = value


def _changing(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    persistent = model.state_dict(keep_vars=True)
    buffers = {name: b for name, b in model.named_buffers() if name in persistent}
    return {**parameters, **buffers}


def _apart(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same values as contiguous tensors without shared storage, which safetensors requires."""
    seen: set[tuple[torch.device, int]] = set()
    apart = {}
    for name, tensor in tensors.items():
        storage = (tensor.device, tensor.untyped_storage().data_ptr())
        shared = storage in seen
        seen.add(storage)
        apart[name] = tensor.clone(memory_format=torch.contiguous_format) if shared else tensor.contiguous()
    return apart


def _wanted_moments(
    file: Any, changing: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    """The moments that the file should hold: for each parameter of the optimizer all, or none."""
    names = {id(tensor): name for name, tensor in changing.items()}
    kept = {names[id(p)]: (p, moments) for p, moments in _moments(optimizer).items()}
    stored_names = {key.partition("/")[2] for key in file.keys()}  # noqa: SIM118 (it is no dict)
    return {
        f"{moment}/{name}": torch.zeros((), dtype=torch.float32) if moment == "step" else parameter
        for name, (parameter, moments) in kept.items()
        if name in stored_names
        for moment in moments
    }


def _moments(optimizer: torch.optim.Optimizer) -> dict[torch.Tensor, tuple[str, ...]]:
    """The names of each parameter's state: a single mean for Muon's parameters, more for AdamW's."""
    return {
        parameter: _ORTHOGONAL if group.get("orthogonal") else _ADAMW
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        file = safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read ({error}); resume from another checkpoint") from None
    with file as opened:
        yield opened


def _check(path: Path, file: Any, wanted: Mapping[str, torch.Tensor]) -> None:
    """Compares names, shapes and types with those of the tensors that the values go to."""
    advice = "resume with the model and settings it was saved with, or choose another run folder"
    stored_names = set(file.keys())
    missing = [name for name in wanted if name not in stored_names]
    strange = sorted(stored_names - wanted.keys())
    if missing or strange:
        raise InputError(
            f"{path}: does not fit this model: lacks {_some(missing)}, and has {_some(strange)} that is not "
            f"trained here; {advice}"
        )
    for name in sorted(stored_names):
        tensor, like = file.get_tensor(name), wanted[name]
        if tensor.shape != like.shape or tensor.dtype != like.dtype:
            raise InputError(
                f"{path}: does not fit this model: got {name} as {_kind(tensor)}, wanted: {_kind(like)}; "
                f"{advice}"
            )


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _some(names: list[str]) -> str:
    if len(names) < 2:
        return names[0] if names else "nothing"
    return f"{names[0]} and {len(names) - 1} more"
