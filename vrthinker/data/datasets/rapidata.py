"""Rapidata's human preferences of generated videos: Parquet with the shares of votes of both clips.

`prompt, file_name1, file_name2, weighted_results1_Preference, weighted_results2_Preference`, and the same for
Coherence and Alignment. Two shares are hardly ever equal, so strict comparison has no ties: shares that
differ by no more than a margin (0.1 by default) are a tie. Image-to-video sets add the picture that the clips
were made from (`prompt_asset`). A pair has no place for it, so such rows are dropped, or kept without a label
for the alignment with the prompt (`ignore_assets`).
"""

from __future__ import annotations

from vrthinker.data.datasets.draft import (
    MAJORITY,
    Clip,
    Draft,
    Format,
    ImportOptions,
    LabelRule,
    Tally,
    by_margin,
    each,
    known,
    majority,
)
from vrthinker.data.datasets.rows import BadField, Row, RowDropped
from vrthinker.episode.dimensions import Dimension

MARGIN = 0.1
_ASPECTS = {Dimension.TA: "Alignment", Dimension.VQ: "Preference", Dimension.MQ: "Coherence"}
_ASSET = "prompt_asset"


def _columns(aspect: str) -> tuple[str, str]:
    return f"weighted_results1_{aspect}", f"weighted_results2_{aspect}"


def _read_pair(row: Row, options: ImportOptions, tally: Tally) -> Draft:
    has_asset = row.values.get(_ASSET) is not None
    if has_asset and not options.ignore_assets:
        raise RowDropped("made from a picture beside the caption, which a pair cannot hold (--ignore-assets)")
    labels: dict[str, int | None] = {}
    margin = MARGIN if options.margin is None else options.margin
    for code, aspect in _ASPECTS.items():
        columns = _columns(aspect)
        if not any(column in row.values for column in columns):
            continue
        first, second = (row.number_of(column) for column in columns)
        if (first is None) != (second is None):
            raise BadField(columns[first is not None], "nothing", "a number, as for the other clip")
        for column, share in zip(columns, (first, second), strict=True):
            if share is not None and share < 0:
                raise BadField(column, f"{share}", "a share of votes from 0 on")
        if first is not None and second is not None:
            labels[code.value] = by_margin(first, second, margin)
    if has_asset:
        labels.pop(Dimension.TA, None)
    labels[Dimension.OA] = majority(known(labels))
    draft = Draft(
        number=row.number,
        id=row.identity(),
        prompt=row.caption("prompt"),
        video_1=Clip(row.path("file_name1")),
        video_2=Clip(row.path("file_name2")),
        labels=known(labels),
    )
    if has_asset:
        tally.notes["pairs kept without the picture that they were made from, and without TA"] += 1
    return draft


_RULE = "weighted_results1_{0} and weighted_results2_{0}: a tie if they differ by no more than {{margin}}"

RAPIDATA = Format(
    name="rapidata",
    about="Parquet file_name1, file_name2, weighted_results1_Preference, ...; ties by margin",
    dataset="rapidata",
    read=each(_read_pair),
    rules={
        **{code.value: LabelRule(_RULE.format(aspect)) for code, aspect in _ASPECTS.items()},
        "OA": LabelRule(MAJORITY, derived=True),
    },
    margin=MARGIN,
    columns=(
        *("id", "prompt", "file_name1", "file_name2", _ASSET),
        *(column for aspect in _ASPECTS.values() for column in _columns(aspect)),
    ),
)
