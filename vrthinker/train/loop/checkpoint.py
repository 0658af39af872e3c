"""Checkpoints to resume from, without pickle.

    RUN/checkpoints/step-00000123/
        model.safetensors       what training changes: trainable parameters and persistent buffers, by name
        optimizer.safetensors   `exp_avg/NAME`, and AdamW's `exp_avg_sq/NAME` and `step/NAME`
        state.json              schema_version, step, state (the stage's own JSON), files (size, SHA-256)

Invariant: a folder named `step-...` was whole when it got that name. It is written under another name, synced
and renamed; a process killed at any moment leaves the last whole checkpoint where it was. What was damaged
later (a copy that broke off) is found by size and hash before anything is loaded.

One writer at a time: hold the run folder (`run_lock`). Readers need no lock.
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
    """state.json."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    schema_version: Literal[1]
    step: int = Field(ge=0)
    state: dict[str, Any]
    files: dict[str, _FileRecord]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found whole.

    Attributes:
        path: Its folder.
        step: Finished steps.
        state: What the stage gave to `save_checkpoint`.
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
        run: The run folder, held by the caller.
        step: Finished steps.
        model: Its trainable parameters and persistent buffers are saved.
        optimizer: Over the model's trainable parameters (`make_optimizer`).
        state: JSON values.
        keep: Whole checkpoints that stay, this one included; at least 1.

    Returns:
        The checkpoint's folder.

    Raises:
        ValueError: `keep` is below 1, or `state` holds NaN or an infinity.
        TypeError: `state` is not JSON.
        VRThinkerError: It could not be written, or a whole one of this step is there. The others stay.
    """
    if keep < 1:
        raise ValueError(f"keep: got {keep}, allowed: 1 or more")
    folder = run / CHECKPOINTS_FOLDER
    target = folder / _folder_name(step)
    spare = folder / f"{_WRITING}{target.name}"
    tensors = {MODEL_FILE: model_tensors(model), OPTIMIZER_FILE: optimizer_tensors(model, optimizer)}
    own = json.loads(json.dumps(dict(state), allow_nan=False))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(run)
        if target.exists():
            _refuse_whole(target)
            _remove(target)
        spare.mkdir()
        _write(spare, step, tensors, own)
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
    """The whole checkpoint with the most steps; each damaged one passed over is logged with the reason.

    Reads the files once, for their hashes.
    """
    folder = run / CHECKPOINTS_FOLDER
    while True:
        named = _by_step(folder)
        for _, path in named:
            try:
                return open_checkpoint(path)
            except InputError as error:
                _logger.warning("%s; passed over", error)
        # A writer may have put a new one there and removed the old ones between the listing and the reading.
        if _by_step(folder) == named:
            return None


def open_checkpoint(path: Path) -> Checkpoint:
    """Checks that a checkpoint is whole.

    Raises:
        InputError: It is not; the message says what is wrong with it.
    """
    record = _record(path)
    for name, wanted in record.files.items():
        if (digest := _sha256(path / name)) != wanted.sha256:
            raise InputError(
                f"{path}: {name} is damaged (SHA-256 is {digest[:12]}…, was {wanted.sha256[:12]}…)"
            )
    return Checkpoint(path, record.step, record.state)


def load_checkpoint(checkpoint: Checkpoint, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Puts weights and optimizer state back. Nothing is changed unless all of it fits.

    Args:
        checkpoint: From `latest_checkpoint` or `open_checkpoint`.
        model: Same trainable names, shapes and types as the one that was saved.
        optimizer: Over it. Its learning rate, betas and decay stay as they are.

    Raises:
        InputError: Names, shapes or types differ, or a file cannot be read; got and wanted are named.
    """
    put_back(checkpoint.path / MODEL_FILE, checkpoint.path / OPTIMIZER_FILE, model, optimizer)


def remove_leftovers(run: Path) -> None:
    """Removes what killed processes left unfinished. Call it only while holding the run folder."""
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
            path.chmod(mode)  # safetensors makes files that only their owner may read
            _sync(path)
            files[name] = _FileRecord(size_bytes=path.stat().st_size, sha256=_sha256(path))
        record = _Record(schema_version=SCHEMA_VERSION, step=step, state=state, files=files)
        stream.write(json.dumps(record.model_dump(), indent=2, allow_nan=False).encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())
    sync_folder(folder)


def _record(path: Path) -> _Record:
    """state.json, once the checkpoint has its files at their sizes."""
    try:
        record = _Record.model_validate_json((path / STATE_FILE).read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path}: unfinished, it has no {STATE_FILE}") from None
    except OSError as error:
        raise InputError(f"{path}: {STATE_FILE} cannot be read ({error.strerror})") from None
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
    """Checkpoint folders, most steps first."""
    if not folder.is_dir():
        return []
    named = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted(((int(match[1]), path) for match, path in named if match), reverse=True)


def _prune(folder: Path, step: int, keep: int) -> None:
    """Removes what is older than the newest `keep` whole checkpoints of up to `step` steps."""
    kept = 0
    for _, path in (found for found in _by_step(folder) if found[0] <= step):
        try:
            if kept == keep:
                _remove(path)
            else:
                _record(path)
                kept += 1
        except InputError:
            continue  # damaged, or unreadable for the moment: it neither counts nor goes
        except OSError as error:
            _logger.warning("%s: cannot be removed (%s)", path, error)


def _remove(path: Path) -> None:
    """Takes the name away first: what is half removed is not called a checkpoint."""
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
