"""The measures of a judge's evaluation (method section 6), with confidence intervals.

A `ScoredPair` is one pair's prediction and label. Every measure is a ratio of two sums over pairs, so that
one bootstrap over pairs serves them all (`intervals.py`).

Invariants:

- Whether a pair is in a measure's denominator depends on its label, or on what was recorded of its episode,
  but not on what was answered. An episode without a verdict, and a verdict without a judgment for a labelled
  dimension, count as wrong. A judge gains nothing by not answering.
- A pair without a label for a dimension is in no accuracy of that dimension.
- A measure without any pair is None, not 0.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

import numpy as np
from rich.table import Table
from rich.text import Text

from vrthinker.engine.base import FinishReason
from vrthinker.episode.dimensions import Dimension, Judgments, Preference
from vrthinker.episode.trajectory import Trajectory
from vrthinker.errors import InputError
from vrthinker.evals.intervals import (
    CONFIDENCE,
    RESAMPLES,
    Estimate,
    FloatArray,
    ratio_difference,
    ratio_estimates,
)
from vrthinker.report.terminal import plain

NO_GROUP = "-"
"""The group of pairs that have no group."""

_CODES = tuple(dimension.value for dimension in Dimension)
_VALUES = tuple(preference.value for preference in Preference)
_SHOWN_IDS = 3


@dataclass(frozen=True)
class ScoredPair:
    """One pair's prediction and label.

    Attributes:
        id: The id of the pair, unique in a list that is measured.
        label: Dimension code -> 0 (tie), 1 or 2, for the dimensions that are known.
        prediction: The judge's preference per dimension code; None without a verdict.
        well_formed: Whether every round had the right form; None for a judge that does not answer in rounds.
        tool_calls: The number of tool calls that showed frames; None if there are no tools.
        hidden_events: The number of planted events that the first frames do not show.
        hidden_events_seen: The number of those that at least one live frame showed.
        group: The group for tables by group, for instance the number of hidden events.
        retrieved_frames: The number of frames that the tool calls showed; None if there are no tools.
        cluster: What pairs are resampled by, such as the prompt; None for a cluster of its own.

    Raises:
        InputError: A code or a preference is unknown, or a count is impossible.
    """

    id: str
    label: Mapping[str, int]
    prediction: Mapping[str, int] | None
    well_formed: bool | None = None
    tool_calls: int | None = None
    hidden_events: int = 0
    hidden_events_seen: int = 0
    group: str | None = None
    retrieved_frames: int | None = None
    cluster: str | None = None

    def __post_init__(self) -> None:
        _check_judgments(self.id, "label", self.label)
        if self.prediction is not None:
            _check_judgments(self.id, "prediction", self.prediction)
            if not self.prediction:
                raise InputError(
                    f"pair {reprlib.repr(self.id)}: prediction: got no judgment, allowed: at least one, "
                    "or None for no verdict"
                )
        for name in ("tool_calls", "retrieved_frames"):
            number = getattr(self, name)
            if number is not None and number < 0:
                raise InputError(f"pair {reprlib.repr(self.id)}: {name}: got {number}, allowed: 0 and more")
        if not 0 <= self.hidden_events_seen <= self.hidden_events:
            raise InputError(
                f"pair {reprlib.repr(self.id)}: hidden_events_seen: got {self.hidden_events_seen}, "
                f"allowed: 0 to {self.hidden_events}, the number of hidden events"
            )


_Arrays: TypeAlias = Callable[[Sequence[ScoredPair]], tuple[FloatArray, FloatArray]]


class Measure(NamedTuple):
    """A ratio of sums over pairs.

    Attributes:
        description: The description in one line, for the docs.
        arrays: A function from pairs to their numerators and denominators, each float64 `[pairs]`.
    """

    description: str
    arrays: _Arrays


def per_pair(term: Callable[[ScoredPair], tuple[float, float]]) -> _Arrays:
    """Makes the function of `Measure.arrays` from a function of one pair's numerator and denominator."""

    def arrays(pairs: Sequence[ScoredPair]) -> tuple[FloatArray, FloatArray]:
        terms = np.array([term(pair) for pair in pairs], dtype=np.float64).reshape(-1, 2)
        return terms[:, 0], terms[:, 1]

    return arrays


def _is_right(pair: ScoredPair, code: str) -> bool:
    return pair.prediction is not None and pair.prediction.get(code) == pair.label[code]


def accuracy(*codes: str, ties: bool = True) -> _Arrays:
    """The share of pairs with these labels whose judgments are all right; without `ties`, of untied pairs."""

    def term(pair: ScoredPair) -> tuple[float, float]:
        if any(code not in pair.label for code in codes):
            return 0.0, 0.0
        if not ties and any(pair.label[code] == Preference.TIE for code in codes):
            return 0.0, 0.0
        return float(all(_is_right(pair, code) for code in codes)), 1.0

    return per_pair(term)


def _optional(value: float | None) -> tuple[float, float]:
    return (0.0, 0.0) if value is None else (float(value), 1.0)


MEASURES: Mapping[str, Measure] = MappingProxyType(
    {
        "oa/tau": Measure("overall accuracy, ties being a class", accuracy("OA")),
        "oa/diff": Measure(
            "overall accuracy over the pairs that people did not tie; a predicted tie is wrong",
            accuracy("OA", ties=False),
        ),
        "all_four": Measure("share of pairs with all four judgments right", accuracy(*_CODES)),
        "ta/accuracy": Measure("accuracy of TA, ties being a class", accuracy("TA")),
        "vq/accuracy": Measure("accuracy of VQ, ties being a class", accuracy("VQ")),
        "mq/accuracy": Measure("accuracy of MQ, ties being a class", accuracy("MQ")),
        "hidden_events/seen": Measure(
            "share of the planted events outside the first frames that were looked at",
            per_pair(lambda pair: (float(pair.hidden_events_seen), float(pair.hidden_events))),
        ),
        "tool_calls/mean": Measure(
            "tool calls that showed frames, per episode", per_pair(lambda pair: _optional(pair.tool_calls))
        ),
        "retrieved_frames/mean": Measure(
            "frames that tool calls showed, per episode",
            per_pair(lambda pair: _optional(pair.retrieved_frames)),
        ),
        "format/well_formed": Measure(
            "share of episodes whose every round has the right form",
            per_pair(lambda pair: _optional(pair.well_formed)),
        ),
        "verdicts/share": Measure(
            "share of pairs with a verdict", per_pair(lambda pair: (float(pair.prediction is not None), 1.0))
        ),
    }
)
"""Name -> measure, in the order of tables. Pairs without the labels that a measure needs are not in it."""


def measure(
    pairs: Iterable[ScoredPair],
    *,
    measures: Mapping[str, Measure] = MEASURES,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Every measure with its interval, from the same resamples of the pairs.

    A resample in which no pair counts for a measure is not used in that measure's interval.

    Args:
        pairs: The pairs. Each id may appear once. Pairs of one `cluster` are resampled together.
        measures: The measures.
        resamples: The number of resamples.
        confidence: The share of the resamples that the intervals hold.
        seed: The seed of the resamples. The same seed and pairs, in the same order, give the same intervals.

    Returns:
        All of `measures`, in its order. The values are None if no pair counts.

    Raises:
        InputError: An id appears twice, or a setting is out of its range.
    """
    unique_pairs = list(_by_id("pairs", pairs).values())
    terms = [entry.arrays(unique_pairs) for entry in measures.values()]
    estimates = ratio_estimates(
        np.stack([numerators for numerators, _ in terms], axis=1),
        np.stack([denominators for _, denominators in terms], axis=1),
        clusters=_clusters(unique_pairs),
        resamples=resamples,
        confidence=confidence,
        seed=seed,
    )
    return dict(zip(measures, estimates, strict=True))


def difference(
    a: Iterable[ScoredPair],
    b: Iterable[ScoredPair],
    name: str,
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Estimate:
    """One measure of `a` minus that of `b`, over the same pairs (paired bootstrap).

    Args:
        a: One judge's pairs, each id once.
        b: The other judge's pairs, with the same ids in any order.
        name: A key of `MEASURES`.
        resamples: The number of resamples. Each draws the same ids on both sides.
        confidence: The share of the resamples that the interval holds.
        seed: The seed of the resamples.

    Returns:
        The difference. Its `n` is the number of pairs that count on at least one side.

    Raises:
        InputError: The name is unknown, the ids differ, or a setting is out of its range.
    """
    if name not in MEASURES:
        raise InputError(f"measure: got {name!r}, allowed: {', '.join(MEASURES)}")
    first, second = _by_id("the first pairs", a), _by_id("the second pairs", b)
    if first.keys() != second.keys():
        only = {
            "first": [key for key in first if key not in second],
            "second": [key for key in second if key not in first],
        }
        named = "; ".join(f"only in the {side}: {_listed(ids)}" for side, ids in only.items() if ids)
        raise InputError(f"difference: got pairs that differ ({named}), allowed: the same ids on both sides")
    arrays = MEASURES[name].arrays
    return ratio_difference(
        arrays(list(first.values())),
        arrays([second[key] for key in first]),
        clusters=_clusters(list(first.values())),
        resamples=resamples,
        confidence=confidence,
        seed=seed,
    )


def from_trajectory(
    trajectory: Trajectory,
    label: Mapping[str, int] | None,
    *,
    first_round: bool = False,
    hidden_frames: Iterable[Collection[int]] = (),
    group: str | None = None,
) -> ScoredPair:
    """Scores an episode against its label.

    Args:
        trajectory: The trajectory of the episode.
        label: The pair's labels, for the dimensions that are known.
        first_round: Whether to score the episode as if it had ended with its first round (no retrieval): with
            that round's recommended answer (or final answer, if it ended the episode) and form, no tool
            calls, and only what it saw.
        hidden_frames: For each planted event that the first frames do not show, the frame numbers that show
            it.
        group: The group for tables by group.

    Raises:
        InputError: A label is unknown, or an event has no frame or a frame that the workspace does not have.
    """
    rounds = trajectory.rounds[:1] if first_round else trajectory.rounds
    judgments = _first_judgments(trajectory) if first_round else trajectory.outcome.judgments
    live = {shown.frame_number for entry in rounds for shown in entry.live}
    retrieved = sum(len(tool.frame_numbers) for entry in rounds for tool in entry.tools)
    events = [frozenset(frames) for frames in hidden_frames]
    for frames in events:
        if not frames or not 1 <= min(frames) <= max(frames) <= trajectory.n_frames:
            raise InputError(
                f"pair {reprlib.repr(trajectory.id)}: hidden_frames: got {reprlib.repr(sorted(frames))}, "
                f"allowed: at least one frame number, each from 1 to {trajectory.n_frames}"
            )
    return ScoredPair(
        id=trajectory.id,
        label=dict(label or {}),
        prediction=None if judgments is None else judgments.as_dict(),
        well_formed=bool(rounds) and all(entry.well_formed for entry in rounds),
        tool_calls=0 if first_round else trajectory.tool_calls,
        hidden_events=len(events),
        hidden_events_seen=sum(not live.isdisjoint(frames) for frames in events),
        group=group,
        retrieved_frames=0 if first_round else retrieved,
    )


def by_group(pairs: Iterable[ScoredPair]) -> dict[str, list[ScoredPair]]:
    """The pairs of each group, in the given order.

    Groups whose names are whole numbers come first, by value, then the others by name. Pairs without a group
    come last, under `NO_GROUP`.
    """
    groups: dict[str, list[ScoredPair]] = {}
    for pair in pairs:
        groups.setdefault(NO_GROUP if pair.group is None else pair.group, []).append(pair)

    def order(name: str) -> tuple[bool, bool, int, str]:
        is_number = name.isascii() and name.isdecimal()
        return name == NO_GROUP, not is_number, int(name) if is_number else 0, name

    return {name: groups[name] for name in sorted(groups, key=order)}


def table(columns: Mapping[str, Mapping[str, Estimate]]) -> Table:
    """A table with a row per measure and a column per judge or retrieval, of cells `0.912 [0.886, 0.935]`.

    Args:
        columns: Column name -> estimates by measure, as `measure` returns them. A measure that a column
            lacks, or whose value is None, is shown as `-`.
    """
    shown = Table(show_edge=False, pad_edge=False)
    shown.add_column("")
    for name in columns:
        shown.add_column(Text(plain(name)), justify="right", no_wrap=True)
    named = {name for estimates in columns.values() for name in estimates}
    for name in [*(key for key in MEASURES if key in named), *sorted(named - MEASURES.keys())]:
        cells = [estimates.get(name, _NOTHING) for estimates in columns.values()]
        shown.add_row(Text(plain(name)), *(Text(str(cell)) for cell in cells))
    return shown


def as_json(
    columns: Mapping[str, Mapping[str, Estimate]],
) -> dict[str, dict[str, dict[str, float | int | None]]]:
    """The same as JSON values: column -> measure -> `value`, `low`, `high`, `n`."""
    return {
        column: {name: asdict(estimate) for name, estimate in estimates.items()}
        for column, estimates in columns.items()
    }


_NOTHING = Estimate(None, None, None, 0)


def _first_judgments(trajectory: Trajectory) -> Judgments | None:
    """The first round's final or recommended answer."""
    if not trajectory.rounds or trajectory.rounds[0].finish_reason is FinishReason.ERROR:
        return None
    recommendation = trajectory.rounds[0].recommendation
    if recommendation is not None:
        return recommendation.judgments
    return trajectory.outcome.judgments if len(trajectory.rounds) == 1 else None


def _clusters(pairs: Sequence[ScoredPair]) -> list[tuple[str, str]] | None:
    """The cluster of each pair; None if every pair is its own."""
    if all(pair.cluster is None for pair in pairs):
        return None
    return [("pair", pair.id) if pair.cluster is None else ("cluster", pair.cluster) for pair in pairs]


def _check_judgments(pair_id: str, what: str, judgments: Mapping[str, int]) -> None:
    for code, value in judgments.items():
        if code not in _CODES:
            got, allowed = f"the code {reprlib.repr(code)}", ", ".join(_CODES)
        elif value not in _VALUES:
            got, allowed = f"{code}={reprlib.repr(value)}", "0 (tie), 1 or 2"
        else:
            continue
        raise InputError(f"pair {reprlib.repr(pair_id)}: {what}: got {got}, allowed: {allowed}")


def _by_id(what: str, pairs: Iterable[ScoredPair]) -> dict[str, ScoredPair]:
    by_id: dict[str, ScoredPair] = {}
    repeated: dict[str, None] = {}
    for pair in pairs:
        if pair.id in by_id:
            repeated[pair.id] = None
        by_id[pair.id] = pair
    if repeated:
        raise InputError(f"{what}: got ids more than once ({_listed(list(repeated))}), allowed: each id once")
    return by_id


def _listed(ids: Sequence[str]) -> str:
    more = f" and {len(ids) - _SHOWN_IDS} more" if len(ids) > _SHOWN_IDS else ""
    return ", ".join(map(reprlib.repr, ids[:_SHOWN_IDS])) + more
