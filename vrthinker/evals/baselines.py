"""Judges that are no models, to stand beside those that are: `--model baseline:NAME`.

Some look at nothing (one answer to everything, a coin), one knows the truth of the synthetic world, and the
others compare a number of each clip (`pixel_statistics.py`). What a judge gains over them is what it is
worth.
"""

from __future__ import annotations

import enum
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from vrthinker.data.pairs import Pair
from vrthinker.episode.dimensions import Dimension
from vrthinker.errors import InputError, VRThinkerError
from vrthinker.records.verdicts import VerdictRecord
from vrthinker.video.open import open_reader
from vrthinker.video.reader import VideoReader
from vrthinker.video.virtual import VirtualReader, is_virtual, source_places
from vrthinker.world.files import TRUTH_FILE, load_truths
from vrthinker.world.oracle import truths_by_clip
from vrthinker.world.truth_reader import count
from vrthinker.world.world import PairTruth

PREFIX = "baseline:"


class Baseline(enum.StrEnum):
    """The judges that are no models."""

    ALWAYS_1 = "always-1"
    """Video 1 is better, in every dimension of every pair."""
    ALWAYS_2 = "always-2"
    """Video 2 is better, in every dimension of every pair."""
    ALWAYS_TIE = "always-tie"
    """Everything is a tie."""
    COMMONEST = "commonest"
    """In each dimension the label that is the commonest on these very pairs."""
    COIN = "coin"
    """Video 1 or video 2, by a fair coin of the seed and the pair for each dimension."""
    ORACLE = "oracle"
    """The truth about the frames that the clips hold; for pairs of the synthetic world."""
    SHARPNESS = "sharpness"
    """The clip whose pictures are sharper."""
    STEADINESS = "steadiness"
    """The clip whose brightness flickers less."""
    MOTION = "motion"
    """The clip in which more moves."""


SCORERS = (Baseline.SHARPNESS, Baseline.STEADINESS, Baseline.MOTION)
"""Those that give scores, and no verdicts."""
Verdicts = Callable[[Pair], dict[str, int]]


def baseline_of(model: str) -> Baseline | None:
    """The baseline that a model's name means; None for a model.

    Raises:
        InputError: The name begins as a baseline's does, and is none.
    """
    if not model.startswith(PREFIX):
        return None
    try:
        return Baseline(model.removeprefix(PREFIX))
    except ValueError:
        allowed = ", ".join(PREFIX + name.value for name in Baseline)
        raise InputError(f"--model: got {model[:60]!r}, allowed: a model, or {allowed}") from None


def verdicts_of(baseline: Baseline, pairs: Sequence[Pair], seed: int) -> Verdicts:
    """The verdicts of a baseline that gives some, as a function of a pair as it is presented.

    Args:
        baseline: The baseline.
        pairs: The pairs with their labels, which `COMMONEST` counts.
        seed: The seed of the coin.

    Raises:
        InputError: It gives scores and no verdicts.
    """
    codes = tuple(code.value for code in Dimension)
    always = {Baseline.ALWAYS_1: 1, Baseline.ALWAYS_2: 2, Baseline.ALWAYS_TIE: 0}
    if baseline in always:
        return lambda pair: dict.fromkeys(codes, always[baseline])
    if baseline is Baseline.COMMONEST:
        answer = {code: _commonest(code, pairs) for code in codes}
        return lambda pair: dict(answer)
    if baseline is Baseline.COIN:
        return lambda pair: {code: _coin(seed, pair.id, code) for code in codes}
    if baseline is Baseline.ORACLE:
        return _Oracle(VirtualReader(open_reader()))
    raise InputError(f"{PREFIX}{baseline}: gives scores, allowed: a judge that gives verdicts")


def record_of_baseline(baseline: Baseline, pair: Pair, verdicts: Verdicts, seed: int) -> VerdictRecord:
    """The record of a pair that a baseline judged. If something keeps it from judging, that is the reason."""
    fields: dict[str, object] = {
        "id": pair.id,
        "confidence": None,
        "rounds": 0,
        "tool_calls": 0,
        "frames_seen": [],
        "well_formed": None,
        "latency_seconds": None,
        "prompt_tokens": None,
        "sampled_tokens": None,
        "seed": seed,
        "model": PREFIX + baseline.value,
    }
    try:
        answer = {"judgment": verdicts(pair), "stop_reason": "answered", "reason": None}
    except VRThinkerError as error:
        answer = {"judgment": None, "stop_reason": "bad_input", "reason": str(error)}
    return VerdictRecord.model_validate({**fields, **answer})


def _commonest(code: str, pairs: Sequence[Pair]) -> int:
    counts = Counter(pair.labels[code] for pair in pairs if pair.labels and code in pair.labels)
    return min(counts, key=lambda label: (-counts[label], label)) if counts else 0


def _coin(seed: int, pair_id: str, code: str) -> int:
    thrown = hashlib.sha256(f"coin:{seed}:{code}:{pair_id}".encode("utf-8", "surrogatepass")).digest()
    return 1 + (thrown[0] & 1)


class _Oracle:
    """A perfect reader of every frame that the two clips hold, virtual or not."""

    def __init__(self, reader: VideoReader) -> None:
        self._reader = reader
        self._worlds: dict[Path, Mapping[str, PairTruth]] = {}

    def __call__(self, pair: Pair) -> dict[str, int]:
        (first, first_frames), (second, second_frames) = map(self._held, (pair.video_1, pair.video_2))
        truth, other = self._truth(first), self._truth(second)
        if truth.id != other.id:
            raise InputError(f"{pair.id}: {first} and {second} are clips of two pairs, allowed: of one")
        shown = tuple(truth.clips[clip.endswith("-2.mp4")] for clip in (first, second))
        seen = (first_frames, second_frames)
        return count(truth.model_copy(update={"clips": shown}), seen).as_dict()

    def _held(self, path: Path) -> tuple[str, frozenset[int]]:
        """The real clip, and the frames of it that are shown."""
        if is_virtual(path):
            source, places = source_places(path, self._reader)
            return os.path.abspath(source), frozenset(places)
        return os.path.abspath(path), frozenset(range(self._reader.probe(path).n_frames))

    def _truth(self, clip: str) -> PairTruth:
        folder = Path(clip).parents[1]
        if folder not in self._worlds:
            if not (folder / TRUTH_FILE).is_file():
                raise InputError(f"{clip}: no clip of the synthetic world, whose truth the oracle reads")
            self._worlds[folder] = truths_by_clip(folder, load_truths(folder))
        truth = self._worlds[folder].get(clip)
        if truth is None:
            raise InputError(f"{clip}: no clip of the world {folder}")
        return truth
