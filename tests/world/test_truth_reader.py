"""Perfect readers of the synthetic world, against naive counting and brute force."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from vrthinker.errors import InputError
from vrthinker.world.files import sample_world
from vrthinker.world.truth_reader import (
    Seen,
    best_guess,
    ceilings,
    count,
    first_seen,
    hidden_events_seen,
    hinted_call,
    hinted_gaps,
    look_at_hints,
    look_at_random,
    look_evenly,
    probes,
    seen_indices,
)
from vrthinker.world.world import (
    DEFECTS,
    PRESETS,
    ClipTruth,
    Defect,
    Difficulty,
    PairTruth,
    WorldConfig,
    first_indices,
    sample_pair,
)

PRESET_NAMES: tuple[Difficulty, ...] = ("easy", "medium", "hard")
ODD = WorldConfig(frames=(16, 23), span=(0.3, 0.5), decoys=0.4, hidden_events=(0.0, 0.3, 0.4, 0.3))
CONFIGS = [*(PRESETS[name] for name in PRESET_NAMES), ODD]


def naive_counts(clip: ClipTruth, indices: frozenset[int]) -> dict[Defect, int]:
    """Walks over the events frame by frame."""
    counts = dict.fromkeys(DEFECTS, 0)
    for event in clip.events:
        looked = False
        for frame in range(event.first_index, event.end_index):
            if frame in indices:
                looked = True
        for defect in event.defects:
            counts[defect] += looked
    return counts


def compared(first: int, second: int) -> int:
    return 0 if first == second else 1 if first < second else 2


def some_seen(pair: PairTruth, seed: int, share: float) -> Seen:
    """The first frames, and others with this probability each."""
    rng = np.random.default_rng(seed)
    return [
        frozenset(first) | {i for i in range(clip.n_frames) if rng.random() < share}
        for clip, first in zip(pair.clips, first_seen(pair), strict=True)
    ]


@given(st.sampled_from(CONFIGS), st.integers(0, 10**6), st.floats(0, 1))
def test_counting_is_what_a_naive_loop_counts(config: WorldConfig, seed: int, share: float) -> None:
    pair = sample_pair(config, seed, 0)
    rng = np.random.default_rng(seed)
    seen = [frozenset(i for i in range(c.n_frames) if rng.random() < share) for c in pair.clips]
    first, second = (naive_counts(clip, known) for clip, known in zip(pair.clips, seen, strict=True))
    assert count(pair, seen).as_dict() == {
        "TA": compared(first[Defect.COLOR], second[Defect.COLOR]),
        "VQ": compared(first[Defect.NOISE], second[Defect.NOISE]),
        "MQ": compared(first[Defect.JUMP], second[Defect.JUMP]),
        "OA": compared(sum(first.values()), sum(second.values())),
    }
    everything = [frozenset(range(clip.n_frames)) for clip in pair.clips]
    assert count(pair, everything) == pair.judgments
    numbers = [
        number
        for number in range(1, sum(clip.n_frames for clip in pair.clips) + 1)
        if pair.locate(number)[1] in seen[pair.locate(number)[0]]
    ]
    assert list(seen_indices(pair, numbers)) == seen
    found = 0
    for clip, known in zip(pair.clips, seen, strict=True):
        for event in clip.events:
            hit = any(i in known for i in range(event.first_index, event.end_index))
            found += event.hint is not None and event.defects != () and hit
    assert hidden_events_seen(pair, numbers) == found


# The best guess, by brute force


def behind(
    gap: tuple[int, int], indices: frozenset[int], config: WorldConfig
) -> dict[tuple[int, ...], float]:
    """Every way in which the world can fill a marked gap, weighed, if it agrees with what was seen.

    Returns:
        (colour, noise, jump) to probability.
    """
    start, end = gap
    size = end - start
    lengths = range(
        max(2, math.ceil(config.span[0] * size)),
        max(2, math.ceil(config.span[0] * size), math.floor(config.span[1] * size)) + 1,
    )
    ways: defaultdict[tuple[int, ...], float] = defaultdict(float)
    for length in lengths:
        starts = [a for a in range(start + 1, end) if a + length <= end]
        for first in starts:
            weight = 1 / len(lengths) / len(starts)
            hit = any(first <= i < first + length for i in indices)
            ways[0, 0, 0] += weight * config.decoys
            for bits in product((0, 1), repeat=3):
                if not (hit and any(bits)):  # it would have been seen
                    ways[bits] += weight * (1 - config.decoys) / 8
    total = sum(ways.values())
    return {bits: weight / total for bits, weight in ways.items()}


def posterior(pair: PairTruth, seen: Seen, config: WorldConfig) -> list[dict[int, float]]:
    """For TA, VQ, MQ, OA: probabilities of 0, 1 and 2, from all that may lie behind hints."""
    sums: list[list[dict[int, float]]] = []
    for clip, indices in zip(pair.clips, seen, strict=True):
        found = naive_counts(clip, indices)
        known = (*found.values(), sum(found.values()))
        clip_sums = [{number: 1.0} for number in known]
        for event in clip.events:
            hit = any(i in indices for i in range(event.first_index, event.end_index))
            if event.hint is None or (hit and event.defects):
                continue
            ways = behind(event.gap, indices, config)
            for slot in range(4):
                grown: defaultdict[int, float] = defaultdict(float)
                for number, p in clip_sums[slot].items():
                    for bits, weight in ways.items():
                        grown[number + (bits[slot] if slot < 3 else sum(bits))] += p * weight
                clip_sums[slot] = dict(grown)
        sums.append(clip_sums)
    odds = []
    for slot in range(4):
        outcome = {0: 0.0, 1: 0.0, 2: 0.0}
        for (a, p), (b, q) in product(sums[0][slot].items(), sums[1][slot].items()):
            outcome[compared(a, b)] += p * q
        odds.append(outcome)
    return odds


@given(st.sampled_from(CONFIGS), st.integers(0, 10**6), st.floats(0, 0.5))
def test_the_best_guess_is_the_most_probable_one(config: WorldConfig, seed: int, share: float) -> None:
    pair = sample_pair(config, seed, 1)
    seen = some_seen(pair, seed, share)
    guess = list(best_guess(pair, seen, config).as_dict().values())
    for slot, odds in enumerate(posterior(pair, seen, config)):
        assert sum(odds.values()) == pytest.approx(1)
        best = max(odds.values())
        likeliest = [outcome for outcome, p in odds.items() if p > best - 1e-9]
        assert guess[slot] == likeliest[0], (slot, odds)


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_a_best_guess_is_right_as_often_as_it_thinks(name: Difficulty) -> None:
    config, pairs = PRESETS[name], 300 if name != "hard" else 100
    believed = right = variance = 0.0
    for pair in sample_world(config, pairs, 23):
        seen = some_seen(pair, pair.clips[0].seed, 0.12 if name != "hard" else 0.03)
        odds = posterior(pair, seen, config)[3]
        guess = best_guess(pair, seen, config).OA
        believed += odds[guess]
        variance += odds[guess] * (1 - odds[guess])
        right += guess == pair.judgments.OA
    assert abs(right - believed) <= 4 * math.sqrt(variance), (right, believed)
    assert 0.5 * pairs < right < 0.99 * pairs


def test_a_best_guess_needs_the_frames_that_hints_are_on() -> None:
    pair = sample_pair(PRESETS["easy"], 0, 0)
    with pytest.raises(InputError, match="first-input frames"):
        best_guess(pair, [frozenset({0, 8, 16, 24}), frozenset({0, 8, 16})], PRESETS["easy"])


def test_a_best_guess_that_knows_everything_is_right() -> None:
    for name in PRESET_NAMES:
        for pair in sample_world(PRESETS[name], 30, 4):
            seen = [frozenset(range(clip.n_frames)) for clip in pair.clips]
            assert best_guess(pair, seen, PRESETS[name]) == pair.judgments


# Where readers look


def all_events(gap: tuple[int, int], shortest: int) -> list[range]:
    start, end = gap
    return [range(a, a + shortest) for a in range(start + 1, end - shortest + 1)]


def test_probes_hit_whatever_a_preset_can_hide() -> None:
    for name in PRESET_NAMES:
        config = PRESETS[name]
        for n_frames in range(config.frames[0], config.frames[1] + 1):
            for gap in pairwise((*first_indices(n_frames), n_frames)):
                shortest = max(2, math.ceil(config.span[0] * (gap[1] - gap[0])))
                found = set(probes(gap, config.span[0]))
                assert all(found & set(event) for event in all_events(gap, shortest)), (name, gap)


@given(st.integers(0, 3000), st.integers(4, 1025), st.floats(1e-6, 0.5))
def test_probes_lie_inside_their_gap_and_are_as_few_as_are_enough(start: int, size: int, span: float) -> None:
    gap = (start, start + size)
    found = probes(gap, span)
    assert list(found) == sorted(set(found))
    assert set(found) <= set(range(start + 1, start + size))
    shortest = max(2, math.ceil(span * size))
    assume(shortest < size)
    every = all(set(found) & set(event) for event in all_events(gap, shortest))
    assert len(found) == min(8, size - 1) or (every and len(found) == min(4, size - 1))


gap_lists = st.lists(
    st.tuples(st.integers(0, 5), st.integers(6, 70)).map(lambda t: (t[0] * 100, t[0] * 100 + t[1])),
    max_size=4,
    unique=True,
)


@given(gap_lists, gap_lists, st.sampled_from([0.05, 0.125, 0.25, 0.5]))
def test_a_call_looks_into_the_first_gaps_as_far_as_eight_frames_suffice(
    first: list[tuple[int, int]], second: list[tuple[int, int]], span: float
) -> None:
    pending = [sorted(first), sorted(second)]
    before = [list(gaps) for gaps in pending]
    chosen = hinted_call(pending, span)
    assert pending == before, "looking changes nothing"
    assert bool(chosen) == bool(first or second), "it gets on as long as there is something to look into"
    in_order = [(clip, gap) for clip, gaps in enumerate(pending) for gap in gaps]
    assert chosen == in_order[: len(chosen)], "in the order of their frame numbers"
    frames = [len(probes(gap, span)) for _, gap in in_order[: len(chosen) + 1]]
    assert sum(frames[: len(chosen)]) <= 8
    assert len(chosen) == len(in_order) or sum(frames) > 8, "the next one would not fit"


def test_looks_see_what_they_say() -> None:
    for name in PRESET_NAMES:
        config = PRESETS[name]
        for pair in sample_world(config, 20, 8):
            first = first_seen(pair)
            for calls in range(4):
                hinted = look_at_hints(pair, config, calls)
                drawn = look_at_random(pair, np.random.default_rng(1), calls)
                for clip, at_first, by_hint, by_chance in zip(pair.clips, first, hinted, drawn, strict=True):
                    assert set(at_first) == set(first_indices(clip.n_frames))
                    assert at_first <= by_hint
                    assert at_first <= by_chance <= set(range(clip.n_frames))
                    assert len(by_chance) == 4 + 4 * calls
                    allowed = {i for start, end in hinted_gaps(clip) for i in range(start + 1, end)}
                    assert by_hint - at_first <= allowed
                assert sum(map(len, hinted)) <= 8 + 8 * calls
            even = look_evenly(pair, 12)
            for clip, known in zip(pair.clips, even, strict=True):
                assert {0, clip.n_frames - 1} <= known
                steps = [b - a for a, b in pairwise(sorted(known))]
                assert max(steps) - min(steps) <= 1


# Ceilings


def row(rows: Sequence[dict[str, float | str]], looks: str) -> dict[str, float]:
    (found,) = [r for r in rows if r["looks"] == looks]
    return {key: float(value) for key, value in found.items() if key != "looks"}


def test_ceilings_of_easy_are_near_the_published_ones() -> None:
    rows = ceilings(PRESETS["easy"], sample_world(PRESETS["easy"], 800, 5))
    first, drawn, marked = (row(rows, n) for n in ("first frames only", "random frames", "marked gaps"))
    assert 0.58 <= first["oa_tau"] <= 0.66
    assert 0.26 <= first["all_four"] <= 0.36
    assert 0.67 <= drawn["oa_tau"] <= 0.76
    assert 0.44 <= drawn["all_four"] <= 0.54
    assert (first["calls"], drawn["calls"], marked["calls"]) == (0, 2, 2)
    for measure in ("oa_tau", "oa_diff", "all_four", "oa_tau_best_guess"):
        assert marked[measure] == 1.0
    for frames, tau in ((16, 0.58), (24, 0.85), (32, 1.0)):
        assert row(rows, f"{frames} frames, even")["oa_tau"] == pytest.approx(tau, abs=0.05)


def test_few_calls_are_not_enough_for_hard_and_many_are() -> None:
    rows = ceilings(PRESETS["hard"], sample_world(PRESETS["hard"], 80, 5))
    assert row(rows, "marked gaps")["oa_tau"] < 0.95
    assert row(rows, "first frames only")["oa_tau"] < 0.5
    assert row(rows, "marked gaps, 6 calls")["all_four"] == 1.0


def test_a_best_guess_is_never_worse_than_counting_and_left_out_where_hints_are_not_seen() -> None:
    for name in PRESET_NAMES:
        rows = ceilings(PRESETS[name], sample_world(PRESETS[name], 120 if name != "hard" else 40, 6))
        for looks in ("first frames only", "random frames", "marked gaps", "marked gaps, 6 calls"):
            found = row(rows, looks)
            # It is the most probable guess, so it may lose by chance only.
            assert found["oa_tau_best_guess"] >= found["oa_tau"] - 0.03, (name, looks)
        assert math.isnan(row(rows, "16 frames, even")["oa_tau_best_guess"])


def test_ties_alone_leave_nothing_to_measure_a_difference_on() -> None:
    tied = [pair for pair in sample_world(PRESETS["easy"], 40, 0) if pair.judgments.OA == 0]
    for found in ceilings(PRESETS["easy"], tied):
        assert math.isnan(float(found["oa_diff"]))


@pytest.mark.slow
@pytest.mark.parametrize("column", [1, 2, 3])
def test_the_documented_table_is_what_the_command_prints(column: int) -> None:
    text = (Path(__file__).parents[2] / "docs" / "world.md").read_text()
    table = text[text.index("| it sees |") :].split("\n\n")[0].splitlines()[2:]
    documented = []
    for line in table:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        documented += [float(value) for value in re.findall(r"\d*\.\d+", cells[column])]
    config = PRESETS[PRESET_NAMES[column - 1]]
    rows = ceilings(config, sample_world(config, 2000, 1), 1)
    assert documented == [round(float(found["oa_tau"]), 3) for found in rows]
