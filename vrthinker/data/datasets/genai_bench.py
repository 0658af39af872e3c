"""GenAI-Bench's pairs of videos, in both layouts: the JSON file and the hub's table.

JSON: `id, prompt, video_left, video_right, vote_type` with leftvote, rightvote, tievote, bothbad_vote. Hub:
`prompt, left_video, right_video, vote_type`, with the same words or `A>B`, `B>A`, `A=B=Good`, `A=B=Bad`.
There is an overall label only, and its ties are of two kinds.
"""

from __future__ import annotations

from vrthinker.data.datasets.draft import (
    Clip,
    Draft,
    Format,
    ImportOptions,
    LabelRule,
    Tally,
    each,
    known,
)
from vrthinker.data.datasets.rows import Row
from vrthinker.episode.dimensions import Dimension

VOTES = {1: "leftvote", 2: "rightvote", 0: "tievote"}
"""Label -> the word of the JSON layout."""
_GOOD, _BAD = "both equally good", "both bad"
_WORDS = {
    **{word: label for label, word in VOTES.items()},
    **{"bothbad_vote": 0, "a>b": 1, "b>a": 2, "a=b=good": 0, "a=b=bad": 0},
}
_TIES = {"tievote": _GOOD, "a=b=good": _GOOD, "bothbad_vote": _BAD, "a=b=bad": _BAD}
_ALLOWED = "leftvote, rightvote, tievote, bothbad_vote, A>B, B>A, A=B=Good or A=B=Bad"


def _read_pair(row: Row, options: ImportOptions, tally: Tally) -> Draft:
    label = row.choice("vote_type", _WORDS, _ALLOWED)
    word = str(row.values["vote_type"]).strip().lower()
    return Draft(
        number=row.number,
        id=row.identity(),
        prompt=row.caption("prompt"),
        video_1=Clip(row.path(row.any_of("video_left", "left_video"))),
        video_2=Clip(row.path(row.any_of("video_right", "right_video"))),
        labels=known({Dimension.OA: label}),
        dataset=row.dataset(),
        tie=_TIES.get(word),
    )


GENAI_BENCH = Format(
    name="genai-bench",
    about="JSON video_left, video_right, vote_type, or the hub's left_video, right_video; overall only",
    dataset="genai-bench",
    read=each(_read_pair),
    rules={"OA": LabelRule("vote_type; both kinds of ties are ties")},
)
