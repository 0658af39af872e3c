"""What every importer makes of an annotation file: drafts of pairs, and a tally of what gave none.

A draft has labels in the package's codes (0 tie, 1 video 1, 2 video 2) and clips as the set spells them:
`importing.py` turns drafts into the lines of a pairs file. Invariant: each row ends in exactly one of three
ways: as a draft, as a dropped row with a reason, or as a problem with its field.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from vrthinker.data.datasets.rows import BadField, Caption, Row, RowDropped
from vrthinker.episode.dimensions import Dimension

MAJORITY = (
    "the sign of the sum over TA, VQ and MQ, where video 1 counts +1, video 2 counts -1 and a tie 0; none if "
    "one of the three is missing"
)
"""How OA is derived where a set has no overall label."""


@dataclass(frozen=True)
class Clip:
    """A clip as a set names it.

    Attributes:
        path: The file or folder; None if the clip is given as its frames.
        frames: The picture files of the frames, in order.
    """

    path: str | None
    frames: tuple[str, ...] = ()


@dataclass(frozen=True)
class Draft:
    """A pair as it was read.

    Attributes:
        number: The number of the row that it comes from.
        id: The set's id; None if it has none.
        prompt: The caption.
        video_1: The first clip.
        video_2: The second clip.
        labels: Dimension code -> label, for the labels that are known.
        dataset: The dataset that the row itself names, empty for none; None for the importer's.
        derived: The codes whose labels nobody gave: they follow from other labels.
        tie: The set's own word for the kind of an overall tie, if it has several kinds.
        frames: The numbers of frames of both clips, if the set says them.
    """

    number: int
    id: str | None
    prompt: Caption
    video_1: Clip
    video_2: Clip
    labels: Mapping[str, int]
    dataset: str | None = None
    derived: frozenset[str] = frozenset()
    tie: str | None = None
    frames: tuple[int, ...] = ()


@dataclass(frozen=True)
class ImportOptions:
    """What a user may decide about an import.

    Attributes:
        margin: How far two scores or shares of votes must differ to be a preference; None for the format's
            own default.
        pairs_per_prompt: The most pairs that are made of the single clips of one prompt.
        ignore_assets: Whether pairs that were made from a picture beside the caption are kept.
    """

    margin: float | None = None
    pairs_per_prompt: int = 10
    ignore_assets: bool = False


@dataclass
class Tally:
    """What was read besides the drafts.

    Attributes:
        rows: The number of rows.
        problems: (row, field, got, allowed) of rows that are not what the layout says.
        dropped: (row, reason) of rows that give no pair.
        notes: What else a reader should know -> how often it was seen.
    """

    rows: int = 0
    problems: list[tuple[int, str, str, str]] = field(default_factory=list)
    dropped: list[tuple[int, str]] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)

    def drop(self, number: int, reason: str) -> None:
        """Adds a row that gives no pair."""
        self.dropped.append((number, reason))


@dataclass(frozen=True)
class LabelRule:
    """Where the labels of a dimension come from.

    Attributes:
        source: The columns and the rule, in words.
        derived: Whether nobody gave any of these labels: they were computed from other labels or from scores.
    """

    source: str
    derived: bool = False


Reader = Callable[[Iterator[Row], ImportOptions, Tally], Iterator[Draft]]
"""A function that makes drafts of the rows of a file."""


@dataclass(frozen=True)
class Format:
    """A layout in which preference data is published.

    Attributes:
        name: The name on the command line.
        about: The layout in a line, for the help and the docs.
        dataset: The dataset whose wording of the dimensions its pairs get; None for the default wording.
        read: The reader of its rows.
        rules: Dimension code -> where its labels come from; options fill in `{margin}`.
        margin: The default margin; None if the layout has no scores.
        columns: The columns that are read of a Parquet file; None for all.
    """

    name: str
    about: str
    dataset: str | None
    read: Reader
    rules: Mapping[str, LabelRule]
    margin: float | None = None
    columns: tuple[str, ...] | None = None


def each(read_row: Callable[[Row, ImportOptions, Tally], Draft]) -> Reader:
    """A reader of a layout in which each row is a pair of its own."""

    def read(rows: Iterator[Row], options: ImportOptions, tally: Tally) -> Iterator[Draft]:
        for row in rows:
            draft = attempt(row, tally, partial(read_row, row, options, tally))
            if draft is not None:
                yield draft

    return read


Result = TypeVar("Result")


def attempt(row: Row, tally: Tally, read_row: Callable[[], Result]) -> Result | None:
    """What a function makes of a row; None if the row is a problem or dropped, which the tally then says."""
    tally.rows += 1
    try:
        return read_row()
    except BadField as bad:
        tally.problems.append((row.number, bad.field, bad.got, bad.allowed))
    except RowDropped as dropped:
        tally.drop(row.number, str(dropped))
    return None


_ROUNDING = 1e-9
"""What rounding may add to a difference: in floating point, 0.55 - 0.45 is more than 0.1."""


def by_margin(first: float, second: float, margin: float) -> int:
    """The label of two scores: a tie if they differ by no more than the margin."""
    if abs(first - second) <= margin + _ROUNDING:
        return 0
    return 1 if first > second else 2


def majority(labels: Mapping[str, int]) -> int | None:
    """The overall label that follows from the three others (`MAJORITY`); None if one of them is missing."""
    three = [labels.get(code) for code in (Dimension.TA, Dimension.VQ, Dimension.MQ)]
    if None in three:
        return None
    balance = three.count(1) - three.count(2)
    return 0 if balance == 0 else 1 if balance > 0 else 2


def known(labels: Mapping[str, int | None]) -> dict[str, int]:
    """The labels that are known.

    Raises:
        RowDropped: There is none.
    """
    found = {str(code): label for code, label in labels.items() if label is not None}
    if not found:
        raise RowDropped("no label is left")
    return found
