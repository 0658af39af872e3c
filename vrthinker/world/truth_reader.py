"""Perfect readers of the synthetic world: what could be known from given frames, and with what accuracy.

A perfect reader makes no mistake in reading or counting. It either judges by the events that it has seen
(`count`), or it makes the *best guess*: the most probable judgments, given what it saw and the world's
probabilities of what lies behind every hint that it has not resolved. The accuracy of these readers is the
upper limit for any judge that sees the same frames.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise, product

import numpy as np

from vrthinker.episode.dimensions import Judgments, Preference
from vrthinker.episode.prompts import spread
from vrthinker.errors import InputError
from vrthinker.world.world import (
    DEFECT_SHARE,
    DEFECTS,
    DIMENSION_OF,
    ClipTruth,
    Event,
    PairTruth,
    WorldConfig,
    first_indices,
    judgments_from_counts,
    span_limits,
)

CALL_FRAMES = 8
"""The number of frames that one call shows (`EpisodeSettings.retrieved_frames`)."""
Seen = Sequence[frozenset[int]]
"""For each of the two clips, the frame indices that were looked at."""


def seen_indices(pair: PairTruth, frame_numbers: Iterable[int]) -> Seen:
    """Converts frame numbers of the workspace to frame indices of each clip."""
    seen: tuple[set[int], set[int]] = (set(), set())
    for number in frame_numbers:
        clip, index = pair.locate(number)
        seen[clip].add(index)
    return [frozenset(indices) for indices in seen]


def first_seen(pair: PairTruth) -> Seen:
    """The frames that the first input shows."""
    return [frozenset(first_indices(clip.n_frames)) for clip in pair.clips]


def events_seen(clip: ClipTruth, indices: Iterable[int]) -> list[Event]:
    """The events with a defect that at least one of the frames shows."""
    indices = list(indices)
    return [event for event in clip.events if event.defects and any(map(event.covers, indices))]


def hidden_events_seen(pair: PairTruth, frame_numbers: Iterable[int]) -> int:
    """The number of hidden events with a defect that the frames show, over both clips."""
    seen = seen_indices(pair, frame_numbers)
    return sum(
        e.hidden for clip, known in zip(pair.clips, seen, strict=True) for e in events_seen(clip, known)
    )


def _has_seen_the_first_input(pair: PairTruth, seen: Seen) -> bool:
    return all(first <= known for first, known in zip(first_seen(pair), seen, strict=True))


def count(pair: PairTruth, seen: Seen) -> Judgments:
    """The judgments of a reader who counts the defects that it has seen."""
    counts = [
        [sum(defect in event.defects for event in events_seen(clip, known)) for defect in DEFECTS]
        for clip, known in zip(pair.clips, seen, strict=True)
    ]
    return judgments_from_counts(*counts)


def best_guess(pair: PairTruth, seen: Seen, config: WorldConfig) -> Judgments:
    """The most probable judgments, dimension by dimension, given what was seen.

    Raises:
        InputError: Not all first-input frames were seen. Their hints are needed to know where events may be.
    """
    if not _has_seen_the_first_input(pair, seen):
        raise InputError("best guess: got views without the first-input frames, wanted all of them")
    known = [events_seen(clip, indices) for clip, indices in zip(pair.clips, seen, strict=True)]
    odds = [
        [_odds(event, indices, config) for event in clip.events if event.hidden and event not in found]
        for clip, indices, found in zip(pair.clips, seen, known, strict=True)
    ]
    result = {}
    for number, defect in enumerate(DEFECTS):
        totals = []
        for found, unknown in zip(known, odds, strict=True):
            certain = sum(defect in event.defects for event in found)
            shares = [float(o[_BITS[:, number] == 1].sum()) for o in unknown]
            totals.append(_total(certain, [np.array([1 - share, share]) for share in shares]))
        result[DIMENSION_OF[defect].value] = _likeliest(*totals)
    sums = []
    for found, unknown in zip(known, odds, strict=True):
        certain = sum(len(event.defects) for event in found)
        sums.append(_total(certain, [np.bincount(_BITS.sum(1), o, 4) for o in unknown]))
    return Judgments(**result, OA=_likeliest(*sums))


_ROUNDING = 1e-9
_BITS = np.array(list(product((0, 1), repeat=len(DEFECTS))))


def _odds(event: Event, indices: frozenset[int], config: WorldConfig) -> np.ndarray:
    """The probability of each set of defects behind a hint, if the seen frames show none of them; `[8]`."""
    odds = np.where(_BITS == 1, DEFECT_SHARE, 1 - DEFECT_SHARE).prod(1) * (1 - config.decoys)
    start, end = event.gap
    shortest, longest = span_limits(config, end - start)
    missed = [
        float(
            np.mean(
                [not any(a <= i < a + length for i in indices) for a in range(start + 1, end - length + 1)]
            )
        )
        for length in range(shortest, longest + 1)
    ]
    odds[_BITS.any(1)] *= np.mean(missed)
    odds[~_BITS.any(1)] += config.decoys
    normalised: np.ndarray = odds / odds.sum()
    return normalised


def _total(certain: int, parts: Sequence[np.ndarray]) -> np.ndarray:
    """The distribution of the sum of a known number and independent unknown numbers."""
    distribution: np.ndarray = np.eye(1, certain + 1, certain)[0]
    for part in parts:
        distribution = np.convolve(distribution, part)
    return distribution


def _likeliest(first: np.ndarray, second: np.ndarray) -> Preference:
    joint = np.outer(first, second)
    fewer_first = float(np.triu(joint, 1).sum())
    fewer_second = float(np.tril(joint, -1).sum())
    tie = float(np.trace(joint[: min(joint.shape), : min(joint.shape)]))
    # Among equally probable judgments (up to rounding), the tie comes first, then video 1.
    if tie >= max(fewer_first, fewer_second) - _ROUNDING:
        return Preference.TIE
    return Preference.VIDEO_1 if fewer_first >= fewer_second - _ROUNDING else Preference.VIDEO_2


def probes(gap: tuple[int, int], config_span: float) -> tuple[int, ...]:
    """Frame indices inside a gap: 4 if those hit every event that may be there, else 8 (or all)."""
    start, end = gap
    shortest = max(2, int(np.ceil(config_span * (end - start))))
    for number in (4, 8):
        indices = spread(start, end, number)
        edges = (start, *indices, end)
        if all(b - a - 1 < shortest for a, b in pairwise(edges)):
            break
    return indices


def hinted_gaps(clip: ClipTruth) -> list[tuple[int, int]]:
    """The gaps that a hint marks, in order."""
    return [event.gap for event in clip.events if event.hidden]


def hinted_call(
    pending: Sequence[Sequence[tuple[int, int]]], span: float
) -> list[tuple[int, tuple[int, int]]]:
    """The gaps that one call looks into: the first ones (clip, gap), as many as 8 frames suffice for.

    Args:
        pending: The marked gaps of each clip that were not looked into yet, in order.
        span: The value of `WorldConfig.span[0]`.
    """
    chosen: list[tuple[int, tuple[int, int]]] = []
    left = CALL_FRAMES
    for clip, gap in ((clip, gap) for clip, gaps in enumerate(pending) for gap in gaps):
        left -= len(probes(gap, span))
        if left < 0:
            break
        chosen.append((clip, gap))
    return chosen


def look_at_hints(pair: PairTruth, config: WorldConfig, calls: int) -> Seen:
    """The frames that a reader has seen after `calls` calls into marked gaps."""
    seen = [set(indices) for indices in first_seen(pair)]
    pending = [hinted_gaps(clip) for clip in pair.clips]
    for _ in range(calls):
        for clip, gap in hinted_call(pending, config.span[0]):
            seen[clip].update(probes(gap, config.span[0]))
            pending[clip].remove(gap)
    return [frozenset(indices) for indices in seen]


def look_at_random(pair: PairTruth, rng: np.random.Generator, calls: int) -> Seen:
    """The frames that a reader has seen after `calls` calls, each for 4 random new frames of each clip."""
    seen = [set(indices) for indices in first_seen(pair)]
    for _ in range(calls):
        for clip, known in zip(pair.clips, seen, strict=True):
            new = sorted(set(range(clip.n_frames)) - known)
            known.update(int(i) for i in rng.choice(new, min(4, len(new)), replace=False))
    return [frozenset(indices) for indices in seen]


def look_evenly(pair: PairTruth, per_clip: int) -> Seen:
    """The frames of a reader who was shown `per_clip` evenly spaced frames of each clip at once."""
    return [
        frozenset(round(i * (clip.n_frames - 1) / (per_clip - 1)) for i in range(per_clip))
        for clip in pair.clips
    ]


def ceilings(config: WorldConfig, truths: Sequence[PairTruth], seed: int = 0) -> list[dict[str, float | str]]:
    """The accuracies of perfect readers who look in different ways, as table rows.

    Each row has `looks`, `calls`, then `oa_tau`, `oa_diff` and `all_four` of the counting reader, and
    `oa_tau_best_guess`. A value is NaN if there is nothing to measure: every pair is a tie, or there is no
    best guess because some first-input frame with its hint was not seen.
    """
    rng = np.random.default_rng(seed)
    calls = max(1, len(config.hidden_events) - 1)
    ways: list[tuple[str, int, Callable[[PairTruth], Seen]]] = [
        ("first frames only", 0, first_seen),
        ("random frames", calls, lambda pair: look_at_random(pair, rng, calls)),
        ("marked gaps", calls, lambda pair: look_at_hints(pair, config, calls)),
        ("marked gaps, 6 calls", 6, lambda pair: look_at_hints(pair, config, 6)),
        ("16 frames, even", 0, lambda pair: look_evenly(pair, 8)),
        ("24 frames, even", 0, lambda pair: look_evenly(pair, 12)),
        ("32 frames, even", 0, lambda pair: look_evenly(pair, 16)),
    ]
    rows: list[dict[str, float | str]] = []
    for name, number, look in ways:
        views = [look(pair) for pair in truths]
        counted = [count(pair, seen) for pair, seen in zip(truths, views, strict=True)]
        guessed: list[Judgments] = []
        if all(_has_seen_the_first_input(pair, seen) for pair, seen in zip(truths, views, strict=True)):
            guessed = [best_guess(pair, seen, config) for pair, seen in zip(truths, views, strict=True)]
        right = [pair.judgments for pair in truths]
        untied = [(c, r) for c, r in zip(counted, right, strict=True) if r.OA is not Preference.TIE]
        rows.append(
            {
                "looks": name,
                "calls": number,
                "oa_tau": _share([c.OA == r.OA for c, r in zip(counted, right, strict=True)]),
                "oa_diff": _share([c.OA == r.OA for c, r in untied]),
                "all_four": _share([c == r for c, r in zip(counted, right, strict=True)]),
                "oa_tau_best_guess": _share([g.OA == r.OA for g, r in zip(guessed, right, strict=False)]),
            }
        )
    return rows


def _share(right: Sequence[bool]) -> float:
    return sum(right) / len(right) if right else float("nan")
