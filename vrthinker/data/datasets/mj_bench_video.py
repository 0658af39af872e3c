"""MJ-Bench-Video's JSON: preferences per category and overall, of which most are `Same`.

Source: aiming-lab/MJ-Video. The labels are its preferences and never its scores: the totals often contradict
them, which the import counts. The words come in two cases ("Video 1 better", "Video 1 Better"). Where nobody
could judge a category ("Hard to judge"), the pair has no label for it.
"""

from __future__ import annotations

from typing import Any

from vrthinker.data.datasets.draft import (
    Clip,
    Draft,
    Format,
    ImportOptions,
    LabelRule,
    Tally,
    by_margin,
    each,
    known,
)
from vrthinker.data.datasets.rows import BadField, Row, RowDropped, shown
from vrthinker.episode.dimensions import Dimension

_WORDS = {"same": 0, "video 1 better": 1, "video 2 better": 2, "hard to judge": None}
_ALLOWED = "Same, Video 1 better, Video 2 better or Hard to judge"
_CATEGORIES = {Dimension.TA: "Alignment", Dimension.VQ: "Fineness", Dimension.MQ: "Coherence & Consistency"}
_UNJUDGED = "labels left out, because their annotators found them hard to judge"


def _read_pair(row: Row, options: ImportOptions, tally: Tally) -> Draft:
    discard = row.values.get("discard", False)
    if type(discard) is not bool:
        raise BadField("discard", shown(discard), "true or false")
    if discard:
        raise RowDropped("its annotators discarded it")
    labels: dict[str, int | None] = {Dimension.OA: row.choice("overall_preference", _WORDS, _ALLOWED)}
    categories: Any = row.values.get("category_preference")
    if not isinstance(categories, dict):
        raise BadField("category_preference", shown(categories), "an object of preferences by category")
    for code, category in _CATEGORIES.items():
        inner = Row(row.number, categories)
        try:
            labels[code] = inner.choice(category, _WORDS, _ALLOWED)
        except BadField as bad:
            raise BadField(f"category_preference.{bad.field}", bad.got, bad.allowed) from None
    draft = Draft(
        number=row.number,
        id=row.identity(),
        prompt=row.caption("caption"),
        video_1=Clip(row.path("video_0_path")),
        video_2=Clip(row.path("video_1_path")),
        labels=known(labels),
    )
    unjudged = sum(label is None for label in labels.values())
    if unjudged:
        tally.notes[_UNJUDGED] += unjudged
    totals = [
        row.number_of(name) if name in row.values else None
        for name in ("video_0_total_score", "video_1_total_score")
    ]
    first, second = totals
    if first is not None and second is not None and labels[Dimension.OA] is not None:
        opposite = {by_margin(first, second, 0), labels[Dimension.OA]} == {1, 2}
        tally.notes["overall preferences that the total scores contradict"] += opposite
    return draft


MJ_BENCH_VIDEO = Format(
    name="mj-bench-video",
    about="JSON video_0_path, video_1_path, category_preference, overall_preference, discard",
    dataset="mj-bench-video",
    read=each(_read_pair),
    rules={
        "TA": LabelRule("category_preference.Alignment"),
        "VQ": LabelRule("category_preference.Fineness"),
        "MQ": LabelRule("category_preference.Coherence & Consistency"),
        "OA": LabelRule("overall_preference"),
    },
)
