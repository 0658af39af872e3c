"""Conversion of a model and its optimizer to the tensors of a checkpoint's files, and back.

Tensors are identified by the name of their parameter, never by position. Invariant: `put_back` compares all
names, shapes and types before it changes the first value.

Of a sharded model (FSDP2), each process has a range of every tensor's rows and writes it to a file of its
own. A tensor is then the concatenation of its shards along the first dimension, in the order of the files.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.tensor import DTensor

from vrthinker.errors import InputError

_ADAMW, _ORTHOGONAL = ("exp_avg", "exp_avg_sq", "step"), ("exp_avg",)
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The types of a model's tensors, as safetensors spells them."""


def model_tensors(model: torch.nn.Module, *, only_shards: bool = False) -> dict[str, torch.Tensor]:
    """The tensors that training changes: trainable parameters and persistent buffers. Tied ones appear once.

    Args:
        model: The model.
        only_shards: Whether tensors that are not sharded are left out; another process writes them.

    Returns:
        Contiguous tensors by name, with a separate storage each; of sharded ones this process's rows. Tensors
        of the model that are so already are not copied.
    """
    return _apart({name: tensor.detach() for name, tensor in _changing(model).items()}, only_shards)


def optimizer_tensors(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, *, only_shards: bool = False
) -> dict[str, torch.Tensor]:
    """The optimizer's state as `exp_avg/NAME`, and AdamW's `exp_avg_sq/NAME` and `step/NAME`.

    Args:
        model: The model.
        optimizer: The optimizer of its trainable parameters.
        only_shards: Whether tensors that are not sharded are left out; another process writes them.

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
    return _apart(tensors, only_shards)


def put_back(
    model_files: Sequence[Path],
    optimizer_files: Sequence[Path],
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Loads all files of a checkpoint, each kind in the order of the processes that wrote it.

    Raises:
        InputError: Something does not fit (the message has both sides), or a file cannot be read.
    """
    changing = _changing(model)
    with _opened(model_files) as weights, _opened(optimizer_files) as moments:
        _check(weights, changing)
        _check(moments, _wanted_moments(moments, changing, optimizer))
        with torch.no_grad():
            for name, tensor in changing.items():
                _local(tensor).copy_(weights.rows(name, *_rows(tensor)))
        optimizer.state.clear()
        # The counter of steps goes to the device on which AdamW would have made it.
        on_device = bool(optimizer.defaults.get("fused") or optimizer.defaults.get("capturable"))
        for key in sorted(moments.parts):
            moment, _, name = key.partition("/")
            parameter = changing[name]
            if moment == "step":
                device = _local(parameter).device if on_device else "cpu"
                value = moments.rows(key, None, None).to(device, copy=True)
            else:
                value = torch.empty_like(parameter, requires_grad=False)
                _local(value).copy_(moments.rows(key, *_rows(parameter)))
            optimizer.state[parameter][moment] = value


@dataclasses.dataclass(frozen=True)
class _Files:
    """The tensors of one kind in a checkpoint's files.

    Attributes:
        path: The first file, for messages.
        parts: The files that have a part of each tensor, in order.
    """

    path: Path
    parts: Mapping[str, list[Any]]

    def shape(self, name: str) -> list[int]:
        """The shape of a whole tensor."""
        shapes = [part.get_slice(name).get_shape() for part in self.parts[name]]
        if len(shapes) == 1:
            return list(shapes[0])
        if any(shape[1:] != shapes[0][1:] or not shape for shape in shapes):
            raise InputError(f"{self.path}: the shards of {name} do not fit together; resume from another")
        return [sum(shape[0] for shape in shapes), *shapes[0][1:]]

    def dtype(self, name: str) -> str:
        """The type of a tensor, as safetensors spells it."""
        return str(self.parts[name][0].get_slice(name).get_dtype())

    def rows(self, name: str, start: int | None, end: int | None) -> torch.Tensor:
        """The rows `start` to `end` of a tensor; all of it for None."""
        parts = self.parts[name]
        if start is None or end is None:
            whole = [part.get_tensor(name) for part in parts]
            return whole[0] if len(whole) == 1 else torch.cat(whole)
        found, offset = [], 0
        for part in parts:
            shard = part.get_slice(name)
            length = shard.get_shape()[0]
            low, high = max(start - offset, 0), min(end - offset, length)
            if low < high:
                found.append(shard[low:high])
            offset += length
        return torch.cat(found) if found else parts[0].get_slice(name)[0:0]


def _rows(tensor: torch.Tensor) -> tuple[int, int] | tuple[None, None]:
    """The range of rows of a sharded tensor that this process has; (None, None) if it has all."""
    if not isinstance(tensor, DTensor):
        return None, None
    # Rows are dealt as `torch.chunk` does it: equally many, and fewer or none to the last processes.
    most = -(-tensor.shape[0] // tensor.device_mesh.size())
    start = min(tensor.shape[0], most * tensor.device_mesh.get_local_rank())
    return start, start + _local(tensor).shape[0]


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _changing(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    persistent = model.state_dict(keep_vars=True)
    buffers = {name: b for name, b in model.named_buffers() if name in persistent}
    return {**parameters, **buffers}


def _apart(tensors: Mapping[str, torch.Tensor], only_shards: bool) -> dict[str, torch.Tensor]:
    """The same values as contiguous tensors without shared storage, which safetensors requires."""
    seen: set[tuple[torch.device, int]] = set()
    apart = {}
    for name, maybe_sharded in tensors.items():
        if only_shards and not isinstance(maybe_sharded, DTensor):
            continue
        tensor = _local(maybe_sharded)
        storage = (tensor.device, tensor.untyped_storage().data_ptr())
        shared = storage in seen
        seen.add(storage)
        apart[name] = tensor.clone(memory_format=torch.contiguous_format) if shared else tensor.contiguous()
    return apart


def _wanted_moments(
    moments: _Files, changing: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    """The moments that the file should hold: for each parameter of the optimizer all, or none."""
    names = {id(tensor): name for name, tensor in changing.items()}
    kept = {names[id(p)]: (p, wanted) for p, wanted in _moments(optimizer).items()}
    stored_names = {key.partition("/")[2] for key in moments.parts}
    return {
        f"{moment}/{name}": torch.zeros((), dtype=torch.float32) if moment == "step" else parameter
        for name, (parameter, wanted) in kept.items()
        if name in stored_names
        for moment in wanted
    }


def _moments(optimizer: torch.optim.Optimizer) -> dict[torch.Tensor, tuple[str, ...]]:
    """The names of each parameter's state: a single mean for Muon's parameters, more for AdamW's."""
    return {
        parameter: _ORTHOGONAL if group.get("orthogonal") else _ADAMW
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


@contextlib.contextmanager
def _opened(paths: Sequence[Path]) -> Iterator[_Files]:
    with contextlib.ExitStack() as stack:
        parts: dict[str, list[Any]] = {}
        for path in paths:
            try:
                file = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise InputError(
                    f"{path}: cannot be read ({error}); resume from another checkpoint"
                ) from None
            opened = stack.enter_context(file)
            for name in opened.keys():  # noqa: SIM118 (it is no dict)
                parts.setdefault(name, []).append(opened)
        yield _Files(paths[0], parts)


def _check(files: _Files, wanted: Mapping[str, torch.Tensor]) -> None:
    """Compares names, shapes and types with those of the tensors that the values go to."""
    advice = "resume with the model and settings it was saved with, or choose another run folder"
    missing = [name for name in wanted if name not in files.parts]
    strange = sorted(files.parts.keys() - wanted.keys())
    if missing or strange:
        raise InputError(
            f"{files.path}: does not fit this model: lacks {_some(missing)}, and has {_some(strange)} that "
            f"is not trained here; {advice}"
        )
    for name in sorted(files.parts):
        got, like = (files.dtype(name), files.shape(name)), wanted[name]
        if got != (_DTYPES.get(like.dtype), list(like.shape)):
            spelled = {code: _spelled(dtype) for dtype, code in _DTYPES.items()}.get(got[0], got[0])
            raise InputError(
                f"{files.path}: does not fit this model: got {name} as {spelled} {got[1]}, wanted: "
                f"{_spelled(like.dtype)} {list(like.shape)}; {advice}"
            )


def _spelled(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _some(names: list[str]) -> str:
    if len(names) < 2:
        return names[0] if names else "nothing"
    return f"{names[0]} and {len(names) - 1} more"
