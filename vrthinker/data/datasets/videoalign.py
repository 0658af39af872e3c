"""The CSV of VideoAlign's training data, and that of VideoGen-RewardBench, which has an overall label too.

Source: KwaiVGI/VideoAlign. Columns `path_A, path_B, prompt, VQ, MQ, TA` with `A`, `B` or `same`, and
`fps_A, num_frames_A, fps_B, num_frames_B`; VideoGen-RewardBench adds `A_model, B_model, Overall`. Exports of
this package add `id`, `Overall` and `vrthinker_dataset`, which other readers pass over.
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
    each,
    known,
    majority,
)
from vrthinker.data.datasets.rows import Row
from vrthinker.episode.dimensions import Dimension

WORDS = {"a": 1, "b": 2, "same": 0, "0": 0, "1": 1, "2": 2}
ALLOWED = "A, B or same, or nothing"
OVERALL = "Overall"
COUNTS = ("num_frames_A", "num_frames_B")


def _read_pair(row: Row, options: ImportOptions, tally: Tally) -> Draft:
    labels = {code: row.choice(code, WORDS, ALLOWED) for code in (Dimension.TA, Dimension.VQ, Dimension.MQ)}
    found: dict[str, int | None] = {code.value: label for code, label in labels.items()}
    derived: frozenset[str] = frozenset()
    if OVERALL in row.values:
        found[Dimension.OA] = row.choice(OVERALL, WORDS, ALLOWED)
    else:
        found[Dimension.OA] = majority({code: label for code, label in found.items() if label is not None})
        derived = frozenset((Dimension.OA.value,))
    frames = tuple(row.whole(name) for name in COUNTS if row.values.get(name) not in (None, ""))
    return Draft(
        number=row.number,
        id=row.identity(),
        prompt=row.caption("prompt"),
        video_1=Clip(row.path("path_A")),
        video_2=Clip(row.path("path_B")),
        labels=known(found),
        dataset=row.dataset(),
        derived=derived,
        frames=frames,
    )


_RULES = {
    **{code: LabelRule(f"column {code}") for code in ("TA", "VQ", "MQ")},
    "OA": LabelRule(f"column {OVERALL}; derived where there is no such column: {MAJORITY}"),
}

VIDEOALIGN = Format(
    name="videoalign",
    about="CSV path_A, path_B, prompt, VQ, MQ, TA (A, B, same), no overall label",
    dataset="videogen-reward",
    read=each(_read_pair),
    rules=_RULES,
)
VIDEOGEN_REWARDBENCH = Format(
    name="videogen-rewardbench",
    about="the same CSV with A_model, B_model and Overall",
    dataset="videogen-reward",
    read=each(_read_pair),
    rules=_RULES,
)
