"""Checkpoints to resume from, without pickle.

    RUN/checkpoints/step-00000123/
        model.safetensors       trainable parameters and persistent buffers, by name
        optimizer.safetensors   `exp_avg/NAME`, and AdamW's `exp_avg_sq/NAME` and `step/NAME`
        state.json              schema_version, step, state (the stage's own JSON), files (size, SHA-256)

Invariant: a folder named `step-...` was complete when it got that name. It is written under another name,
synced and renamed, so that a process killed at any moment does not damage the last complete checkpoint. Later
damage (an interrupted copy) is found by size and hash before anything is loaded.

There may be one writer at a time, which holds the run folder (`run_lock`). Readers need no lock.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import save_file

from vrthinker.bounded_files import read_json
from vrthinker.errors import InputError, VRThinkerError, first_problem
from vrthinker.records.files import sync_folder
from vrthinker.train.loop.checkpoint_tensors import model_tensors, optimizer_tensors, put_back

CHECKPOINTS_FOLDER = "checkpoints"
MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
SCHEMA_VERSION: Literal[1] = 1

_logger = logging.getLogger(__name__)
_NAME = re.compile(r"step-(\d{8,})")
_WRITING, _REMOVING = ".writing-", ".removing-"
_READ_BYTES = 4 << 20


class _FileRecord(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    size_bytes: int
    sha256: str


class _Record(BaseModel):
    """The content of state.json."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    schema_version: Literal[1]
    step: int = Field(ge=0)
    state: dict[str, Any]
    files: dict[str, _FileRecord]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found complete.

    Attributes:
        path: The checkpoint's folder.
        step: The number of finished steps.
        state: The state that the stage gave to `save_checkpoint`.
    """

    path: Path
    step: int
    state: dict[str, Any]


def save_checkpoint(
    run: Path,
    *,
    step: int,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """Writes a checkpoint, then removes older ones. A damaged one of the same step is replaced.

    Args:
        run: The run folder, which the caller holds.
        step: The number of finished steps.
        model: The model, whose trainable parameters and persistent buffers are saved.
        optimizer: The optimizer of the model's trainable parameters (`make_optimizer`).
        state: The stage's state, as JSON values.
        keep: The number of complete checkpoints to keep, with this one; at least 1.

    Returns:
        The checkpoint's folder.

    Raises:
        ValueError: `keep` is below 1, or `state` holds NaN or an infinity.
        TypeError: `state` is not JSON.
        VRThinkerError: The checkpoint could not be written, or a complete one of this step exists. The other
            checkpoints are kept.
    """
    if keep < 1:
        raise ValueError(f"keep: got {keep}, allowed: 1 or more")
    folder = run / CHECKPOINTS_FOLDER
    target = folder / _folder_name(step)
    spare = folder / f"{_WRITING}{target.name}"
    tensors = {MODEL_FILE: model_tensors(model), OPTIMIZER_FILE: optimizer_tensors(model, optimizer)}
    json_state = json.loads(json.dumps(dict(state), allow_nan=False))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(run)
        if target.exists():
            _refuse_whole(target)
            _remove(target)
        spare.mkdir()
        _write(spare, step, tensors, json_state)
        spare.rename(target)
        sync_folder(folder)
    except (OSError, SafetensorError, InputError) as error:
        with contextlib.suppress(OSError):
            shutil.rmtree(spare)
        raise VRThinkerError(
            f"{target}: cannot be written ({error}); earlier checkpoints stay; make room, then resume"
        ) from None
    _prune(folder, step, keep)
    return target


def latest_checkpoint(run: Path) -> Checkpoint | None:
    """The complete checkpoint with the most steps. Damaged checkpoints are logged with the reason.

    The files are read once, for their hashes.
    """
    folder = run / CHECKPOINTS_FOLDER
    while True:
        named = _by_step(folder)
        for _, path in named:
            try:
                return open_checkpoint(path)
            except InputError as error:
                _logger.warning("%s; passed over", error)
        # Between listing and reading, a writer may have added a new checkpoint and removed old ones.
        if _by_step(folder) == named:
            return None


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a checkpoint and checks that it is complete.

    Raises:
        InputError: The checkpoint is damaged; the message says how.
    """
    record = _record(path)
    for name, wanted in record.files.items():
        if (digest := _sha256(path / name)) != wanted.sha256:
            raise InputError(
                f"{path}: {name} is damaged (SHA-256 is {digest[:12]}…, was {wanted.sha256[:12]}…)"
            )
    return Checkpoint(path, record.step, record.state)


def load_checkpoint(checkpoint: Checkpoint, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restores weights and optimizer state. Nothing is changed unless everything fits.

    Args:
        checkpoint: The checkpoint, from `latest_checkpoint` or `open_checkpoint`.
        model: The model, with the same trainable names, shapes and types as the saved one.
        optimizer: The optimizer of the model. Its learning rate, betas and decay are not changed.

    Raises:
        InputError: Names, shapes or types differ (the message has both), or a file cannot be read.
    """
    put_back(checkpoint.path / MODEL_FILE, checkpoint.path / OPTIMIZER_FILE, model, optimizer)


def remove_leftovers(run: Path) -> None:
    """Removes unfinished files of killed processes. Call this only while holding the run folder."""
    folder = run / CHECKPOINTS_FOLDER
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if path.name.startswith((_WRITING, _REMOVING)):
            if path.name.startswith(_WRITING):
                _logger.warning("%s: unfinished, its writer was killed; removed", path)
            try:
                shutil.rmtree(path)
            except OSError as error:
                _logger.warning("%s: cannot be removed (%s)", path, error)


def _write(
    folder: Path, step: int, tensors: Mapping[str, dict[str, torch.Tensor]], state: dict[str, Any]
) -> None:
    files = {}
    with (folder / STATE_FILE).open("xb") as stream:
        mode = stat.S_IMODE(os.fstat(stream.fileno()).st_mode)
        for name, named in tensors.items():
            path = folder / name
            save_file(named, path, metadata={"format": "pt"})
            path.chmod(mode)  # safetensors makes files that only the owner may read
            _sync(path)
            files[name] = _FileRecord(size_bytes=path.stat().st_size, sha256=_sha256(path))
        record = _Record(schema_version=SCHEMA_VERSION, step=step, state=state, files=files)
        stream.write(json.dumps(record.model_dump(), indent=2, allow_nan=False).encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())
    sync_folder(folder)


def _record(path: Path) -> _Record:
    """Reads state.json, and checks that the checkpoint's files exist with the right sizes."""
    if not os.path.lexists(path / STATE_FILE):
        raise InputError(f"{path}: unfinished, it has no {STATE_FILE}")
    try:
        record = _Record.model_validate(read_json(path / STATE_FILE))
    except InputError as error:
        raise InputError(f"{path}: {STATE_FILE} is damaged ({error})") from None
    except ValidationError as error:
        raise InputError(f"{path}: {STATE_FILE} is damaged ({first_problem(error, '')})") from None
    if _folder_name(record.step) != path.name or record.files.keys() != {MODEL_FILE, OPTIMIZER_FILE}:
        raise InputError(f"{path}: {STATE_FILE} is that of step {record.step} with {sorted(record.files)}")
    for name, wanted in record.files.items():
        try:
            size = (path / name).stat().st_size
        except OSError as error:
            raise InputError(f"{path}: {name} cannot be read ({error.strerror})") from None
        if size != wanted.size_bytes:
            raise InputError(f"{path}: {name} has {size} bytes, wanted: {wanted.size_bytes}")
    return record


def _folder_name(step: int) -> str:
    return f"step-{step:08d}"


def _by_step(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoint folders, sorted by the number of steps, largest first."""
    if not folder.is_dir():
        return []
    named = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted(((int(match[1]), path) for match, path in named if match), reverse=True)


def _prune(folder: Path, step: int, keep: int) -> None:
    """Removes checkpoints older than the newest `keep` complete ones of at most `step` steps."""
    kept = 0
    for _, path in (found for found in _by_step(folder) if found[0] <= step):
        try:
            if kept == keep:
                _remove(path)
            else:
                _record(path)
                kept += 1
        except InputError:
            continue  # damaged, or unreadable for the moment: it is neither counted nor removed
        except OSError as error:
            _logger.warning("%s: cannot be removed (%s)", path, error)


def _remove(path: Path) -> None:
    """Renames a checkpoint before removing it, so that a half-removed folder is not named as a checkpoint."""
    going = path.with_name(f"{_REMOVING}{path.name}")
    path.rename(going)
    shutil.rmtree(going)


def _refuse_whole(path: Path) -> None:
    try:
        open_checkpoint(path)
    except InputError:
        return
    raise VRThinkerError(f"{path}: is there already and whole; resume from it, or choose another run folder")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as stream:
            while block := stream.read(_READ_BYTES):
                digest.update(block)
    except OSError as error:
        raise InputError(f"{path.parent}: {path.name} cannot be read ({error.strerror})") from None
    return digest.hexdigest()
