"""Reading lessons: episodes of one round about a few chosen frames, for a curriculum.

An untrained model does not learn from eight frames at once which frame shows what. It does learn it from one,
then two, then four frames a clip (docs/log.md). A lesson is an episode of a single round, whose first input
has frames from different parts of the clips, often frames that show something.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from vrthinker.world.world import FIRST_FRAMES, ClipTruth, PairTruth, first_indices

_INTERESTING = 0.6


def lesson_frames(pair: PairTruth, frames_per_clip: int, rng: np.random.Generator) -> tuple[int, ...]:
    """Draws the frames of a lesson: at most one between every two neighbouring first-input frames.

    Args:
        pair: The pair whose clips the lesson shows.
        frames_per_clip: The number of frames of each clip, 1 to 4.
        rng: The random number generator.

    Returns:
        The frame numbers, ascending. A clip's frames are from neighbouring parts, so that a leap is seen on
        a later one.

    Raises:
        ValueError: `frames_per_clip` is not in 1 to 4.
    """
    if not 1 <= frames_per_clip <= FIRST_FRAMES:
        raise ValueError(f"frames_per_clip: got {frames_per_clip}, allowed: 1 to {FIRST_FRAMES}")
    numbers: list[int] = []
    offset = 1
    for clip in pair.clips:
        bounds = (*first_indices(clip.n_frames), clip.n_frames)
        part = int(rng.integers(FIRST_FRAMES - frames_per_clip + 1))
        parts = pairwise(bounds[part : part + frames_per_clip + 1])
        numbers += [offset + _pick(clip, start, end, rng) for start, end in parts]
        offset += clip.n_frames
    return tuple(numbers)


def _pick(clip: ClipTruth, start: int, end: int, rng: np.random.Generator) -> int:
    interesting = [i for i in range(start, end) if clip.defects_at(i) or clip.hints_at(i)]
    if interesting and rng.random() < _INTERESTING:
        return int(rng.choice(interesting))
    return int(rng.integers(start, end))
