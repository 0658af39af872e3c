"""World folders: `clips/*.mp4`, `pairs.jsonl`, `truth.jsonl`, `world.json`.

A world is deterministic per seed, whatever the number of processes. Invariant: `pairs.jsonl` is written last,
so a folder that has one is complete. To continue after a killed run, give the same command again: existing
clips are kept, because each is renamed into place only when it is complete. (Incomplete ones end in `.new`.)
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vrthinker.bounded_files import read_lines
from vrthinker.data.pairs import Pair, load_pairs
from vrthinker.errors import InputError, VRThinkerError, first_problem, unwritable
from vrthinker.records.files import replace_file
from vrthinker.records.run_folder import adopt_run
from vrthinker.world.pixels import DRAWING, write_clip
from vrthinker.world.world import ID_PATTERN, PairTruth, WorldConfig, sample_pair

PAIRS_FILE, TRUTH_FILE, WORLD_FILE = "pairs.jsonl", "truth.jsonl", "world.json"
MAX_LINE_BYTES = 1 << 20
MAX_PAIRS = 1_000_000
"""The most pairs of a world: ids have six digits for a pair's number."""
_PAIRS_PER_TASK = 16
_MAX_PREFIX_CHARS = 60


def sample_world(config: WorldConfig, pairs: int, seed: int, prefix: str = "world") -> list[PairTruth]:
    """The truths of a world, without its pixels."""
    return [sample_pair(config, seed, index, prefix) for index in range(pairs)]


def make_world(
    out: Path,
    config: WorldConfig,
    *,
    pairs: int,
    seed: int,
    prefix: str = "world",
    workers: int | None = None,
) -> list[PairTruth]:
    """Writes a world folder.

    Args:
        out: The folder to write. If it holds a part of the same world, it is completed.
        config: The difficulty.
        pairs: The number of pairs.
        seed: The seed of the world. Equal seeds give equal files.
        prefix: The beginning of every pair's id.
        workers: The number of processes; by default the number of cores.

    Returns:
        The truths, in the order of `pairs.jsonl`.

    Raises:
        InputError: A number is out of range, or the folder holds another world.
        VRThinkerError: A clip could not be written.
    """
    check_size(pairs, seed)
    if workers is not None and workers < 1:
        raise InputError(f"world: got {workers} workers, allowed: at least 1")
    if not re.fullmatch(ID_PATTERN, prefix) or len(prefix) > _MAX_PREFIX_CHARS:
        raise InputError(
            f"world: got prefix {prefix[:60]!r}, allowed: up to {_MAX_PREFIX_CHARS} of A-Z a-z 0-9 . _ -"
        )
    _make_folder(out / "clips")
    about = {"pairs": pairs, "seed": seed, "prefix": prefix, "drawing": DRAWING}
    run = {"world": config.model_dump(mode="json"), **about}
    adopt_run(out / WORLD_FILE, run, (), out)
    truths = sample_world(config, pairs, seed, prefix)
    todo = [truth for truth in truths if not all(path.exists() for path in clip_paths(out, truth))]
    if not todo and all((out / name).is_file() for name in (TRUTH_FILE, PAIRS_FILE)):
        return truths
    for _ in _write_clips(out, todo, workers or len(os.sched_getaffinity(0))):
        pass
    _write_index(out, truths)
    return truths


def check_size(pairs: int, seed: int) -> None:
    """Refuses a number of pairs or a seed that no world can have.

    Raises:
        InputError: The number or the seed is out of range.
    """
    if not 1 <= pairs <= MAX_PAIRS:
        raise InputError(f"world: got {pairs} pairs, allowed: 1 to {MAX_PAIRS}")
    if not 0 <= seed < 1 << 64:
        raise InputError(f"world: got seed {str(seed)[:60]}, allowed: 0 to 2^64 - 1")


def write_pairs(out: Path, truths: Sequence[PairTruth]) -> None:
    """Writes given pairs as a world folder, in this process.

    Raises:
        InputError: The folder cannot be made.
        VRThinkerError: A clip could not be written.
    """
    _make_folder(out / "clips")
    _write_some((out, truths))
    _write_index(out, truths)


def _write_index(out: Path, truths: Sequence[PairTruth]) -> None:
    _write_lines(out / TRUTH_FILE, [truth.model_dump(mode="json") for truth in truths])
    _write_lines(out / PAIRS_FILE, [_pair_line(out, truth) for truth in truths])


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error, "name another", failed="the folder cannot be made") from None


def clip_paths(folder: Path, truth: PairTruth) -> tuple[Path, Path]:
    """The paths of a pair's two clips."""
    return folder / "clips" / f"{truth.id}-1.mp4", folder / "clips" / f"{truth.id}-2.mp4"


def load_truths(folder: Path) -> list[PairTruth]:
    """Reads a world folder's truths.

    Raises:
        InputError: There is no truth file, it is empty, or one of its lines is not a truth or repeats a pair.
    """
    path = folder / TRUTH_FILE
    truths: dict[str, PairTruth] = {}
    if not path.exists():
        raise InputError(f"{path}: No such file or directory; `vrthinker world make` writes it")
    try:
        for number, line in read_lines(path, MAX_LINE_BYTES):
            truth = PairTruth.model_validate_json(line)
            if truths.setdefault(truth.id, truth) is not truth:
                raise InputError(f"{path}:{number}: got {truth.id} again, allowed: each pair once")
    except ValidationError as error:
        raise InputError(
            f"{path}:{number}: {first_problem(error, '(line)')}; remove the file and make the world again"
        ) from None
    if not truths:
        raise InputError(f"{path}: got no line; remove the file and make the world again")
    return list(truths.values())


def load_pairs_of(folder: Path) -> list[Pair]:
    """Reads the pairs of a world folder from its `pairs.jsonl`."""
    return load_pairs(folder / PAIRS_FILE)


def _pair_line(folder: Path, truth: PairTruth) -> dict[str, Any]:
    first, second = (path.relative_to(folder).as_posix() for path in clip_paths(folder, truth))
    return {
        "id": truth.id,
        "prompt": truth.caption,
        "video_1": first,
        "video_2": second,
        "labels": truth.judgments.as_dict(),
    }


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    replace_file(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def _write_clips(out: Path, truths: Sequence[PairTruth], workers: int) -> Iterator[None]:
    """Writes the clips of each pair, in several processes if there are enough pairs."""
    tasks = [(out, truths[i : i + _PAIRS_PER_TASK]) for i in range(0, len(truths), _PAIRS_PER_TASK)]
    if workers == 1 or len(tasks) < 2:
        yield from map(_write_some, tasks)
        return
    # The pool must not fork, because the caller may have threads and locks.
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(min(workers, len(tasks)), context, end_with_parent) as pool:
            yield from pool.map(_write_some, tasks)
    except BrokenProcessPool:
        raise VRThinkerError(f"{out}: a worker process died; give the same command again") from None


def end_with_parent() -> None:
    """Makes a pool's worker end when its parent is killed. Otherwise it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _write_some(task: tuple[Path, Sequence[PairTruth]]) -> None:
    import av

    folder, truths = task
    for truth in truths:
        for path, clip in zip(clip_paths(folder, truth), truth.clips, strict=True):
            spare = path.with_suffix(f".{os.getpid()}.new")
            try:
                write_clip(spare, truth, clip)
                spare.replace(path)
            except (OSError, av.FFmpegError) as error:
                with contextlib.suppress(OSError):
                    spare.unlink()
                reason = f"cannot be written ({error.strerror}); make room or grant writing, then run again"
                raise VRThinkerError(f"{path}: {reason}") from None
