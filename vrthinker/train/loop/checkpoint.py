"""Checkpoints to resume from, without pickle.

    RUN/checkpoints/step-00000123/
        model.safetensors       trainable parameters and persistent buffers, by name
        optimizer.safetensors   `exp_avg/NAME`, and AdamW's `exp_avg_sq/NAME` and `step/NAME`
        state.json              schema_version, step, state (the stage's own JSON), files (size, SHA-256)

Of a run of N processes, each writes the shards that it holds, as `model-1-of-N.safetensors` and so on. A
shard is a range of a tensor's rows (its first dimension), and the ranges of the processes follow each other.
What is not sharded is in the first process's files. Any number of processes can load such a checkpoint,
because each reads the rows that it needs.

Invariant: a folder named `step-...` was complete when it got that name, with the files of all processes. It
is written under another name, synced and renamed, so that a process killed at any moment does not damage the
last complete checkpoint. Later damage (an interrupted copy) is found by size and hash before anything is
loaded.

There may be one run at a time that writes, and it holds the run folder (`run_lock`). Readers need no lock.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
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
from vrthinker.train.loop.ranks import ALONE, Ranks

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
        writers: The number of processes that wrote it.
    """

    path: Path
    step: int
    state: dict[str, Any]
    writers: int = 1


def save_checkpoint(
    run: Path,
    *,
    step: int,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    keep: int = 2,
    ranks: Ranks = ALONE,
) -> Path:
    """Writes a checkpoint, then removes older ones. A damaged one of the same step is replaced.

    All processes of a run call this. If one of them cannot write, none has written a checkpoint.

    Args:
        run: The run folder, which the caller holds, and which all processes see.
        step: The number of finished steps.
        model: The model, whose trainable parameters and persistent buffers are saved.
        optimizer: The optimizer of the model's trainable parameters (`make_optimizer`).
        state: The stage's state, as JSON values.
        keep: The number of complete checkpoints to keep, with this one; at least 1.
        ranks: The processes of the run. The state is that of the first.

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
    json_state = json.loads(json.dumps(dict(state), allow_nan=False))
    # The name is drawn, so that a process of an earlier run that is still about never writes into this one.
    spare = folder / ranks.first(lambda: f"{_WRITING}{target.name}-{uuid.uuid4().hex[:12]}")
    try:
        ranks.first(lambda: _make_spare(run, target, spare))
        files = ranks.together(lambda: _write_tensors(target, spare, model, optimizer, ranks))
        written = {name: record for part in ranks.gather(files) for name, record in part.items()}
        ranks.first(
            lambda: _complete(
                target,
                spare,
                _Record.model_validate(
                    {"schema_version": SCHEMA_VERSION, "step": step, "state": json_state, "files": written}
                ),
            )
        )
    except VRThinkerError:
        if ranks.is_first:
            with contextlib.suppress(OSError):
                shutil.rmtree(spare)
        raise
    ranks.first(lambda: _prune(folder, step, keep))
    return target


def _make_spare(run: Path, target: Path, spare: Path) -> None:
    with _told(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(run)
        if target.exists():
            _refuse_whole(target)
            _remove(target)
        spare.mkdir()


def _write_tensors(
    target: Path, spare: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks
) -> dict[str, dict[str, Any]]:
    """Writes the files of this process. Returns their sizes and hashes."""
    is_first = ranks.is_first
    parts = {
        MODEL_FILE: model_tensors(model, only_shards=not is_first),
        OPTIMIZER_FILE: optimizer_tensors(model, optimizer, only_shards=not is_first),
    }
    files: dict[str, dict[str, Any]] = {}
    with _told(target):
        mode = spare.stat().st_mode & 0o666
        for kind, tensors in parts.items():
            path = spare / _part_name(kind, ranks.rank, ranks.size)
            save_file(tensors, path, metadata={"format": "pt"})
            path.chmod(mode)  # safetensors makes files that only the owner may read
            _sync(path)
            files[path.name] = {"size_bytes": path.stat().st_size, "sha256": _sha256(path)}
    return files


def _complete(target: Path, spare: Path, record: _Record) -> None:
    with _told(target):
        content = json.dumps(record.model_dump(), indent=2, allow_nan=False).encode() + b"\n"
        with (spare / STATE_FILE).open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        sync_folder(spare)
        spare.rename(target)
        sync_folder(target.parent)


@contextlib.contextmanager
def _told(target: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, InputError) as error:
        raise VRThinkerError(
            f"{target}: cannot be written ({error}); earlier checkpoints stay; make room, then resume"
        ) from None


def latest_checkpoint(run: Path, ranks: Ranks = ALONE) -> Checkpoint | None:
    """The complete checkpoint with the most steps. Damaged checkpoints are logged with the reason.

    The files are read once, for their hashes. The processes of a run share that work.
    """
    folder = run / CHECKPOINTS_FOLDER
    while True:
        named = ranks.first(lambda: [path.name for _, path in _by_step(folder)])
        for name in named:
            try:
                return open_checkpoint(folder / name, ranks)
            except InputError as error:
                if ranks.is_first:
                    _logger.warning("%s; passed over", error)
        # Between listing and reading, a writer may have added a new checkpoint and removed old ones.
        if ranks.first(lambda: [path.name for _, path in _by_step(folder)]) == named:
            return None


def open_checkpoint(path: Path, ranks: Ranks = ALONE) -> Checkpoint:
    """Opens a checkpoint and checks that it is complete.

    Raises:
        InputError: The checkpoint is damaged; the message says how.
    """
    record = ranks.together(lambda: _record(path))
    own = sorted(record.files)[ranks.rank :: ranks.size]
    ranks.together(lambda: _check_hashes(path, {name: record.files[name] for name in own}))
    return Checkpoint(path, record.step, record.state, len(record.files) // 2)


def _check_hashes(path: Path, files: Mapping[str, _FileRecord]) -> None:
    for name, wanted in files.items():
        if (digest := _sha256(path / name)) != wanted.sha256:
            raise InputError(
                f"{path}: {name} is damaged (SHA-256 is {digest[:12]}…, was {wanted.sha256[:12]}…)"
            )


def load_checkpoint(checkpoint: Checkpoint, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restores weights and optimizer state. Nothing is changed unless everything fits.

    Args:
        checkpoint: The checkpoint, from `latest_checkpoint` or `open_checkpoint`.
        model: The model, with the same trainable names, shapes and types as the saved one.
        optimizer: The optimizer of the model. Its learning rate, betas and decay are not changed.

    Raises:
        InputError: Names, shapes or types differ (the message has both), or a file cannot be read.
    """
    weights, moments = (
        [checkpoint.path / _part_name(kind, rank, checkpoint.writers) for rank in range(checkpoint.writers)]
        for kind in (MODEL_FILE, OPTIMIZER_FILE)
    )
    put_back(weights, moments, model, optimizer)


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
    if _folder_name(record.step) != path.name or record.files.keys() != _part_names(record):
        raise InputError(f"{path}: {STATE_FILE} is that of step {record.step} with {sorted(record.files)}")
    for name, wanted in record.files.items():
        try:
            size = (path / name).stat().st_size
        except OSError as error:
            raise InputError(f"{path}: {name} cannot be read ({error.strerror})") from None
        if size != wanted.size_bytes:
            raise InputError(f"{path}: {name} has {size} bytes, wanted: {wanted.size_bytes}")
    return record


def _part_name(kind: str, rank: int, size: int) -> str:
    """The name of a process's file: `model.safetensors` of one alone, `model-1-of-2.safetensors` of two."""
    stem, _, suffix = kind.partition(".")
    return kind if size == 1 else f"{stem}-{rank + 1}-of-{size}.{suffix}"


def _part_names(record: _Record) -> set[str]:
    """The files that a checkpoint with as many files has to have."""
    size = max(1, len(record.files) // 2)
    return {_part_name(kind, rank, size) for kind in (MODEL_FILE, OPTIMIZER_FILE) for rank in range(size)}


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
