"""VideoDPO's `pair.json`: two indices into winning and losing clips.

`video1` and `video2` are global indices: an even one is a file of `winvideos`, an odd one of `losevideos`,
and the file is the index divided by two, as `%06d.mp4`. The preference is the ranking of a scoring model, so
its labels are derived. The winner often stands first in every pair: `vrthinker data import --swap-seed` mixes
the sides.
"""

from __future__ import annotations

from vrthinker.data.datasets.draft import Clip, Draft, Format, ImportOptions, LabelRule, Tally, each
from vrthinker.data.datasets.rows import Row, RowDropped
from vrthinker.episode.dimensions import Dimension

_CAPTIONS = ("frame_caption", "prompt", "caption")


def _clip(index: int) -> Clip:
    return Clip(f"{'losevideos' if index % 2 else 'winvideos'}/{index // 2:06d}.mp4")


def _read_pair(row: Row, options: ImportOptions, tally: Tally) -> Draft:
    first, second = row.whole("video1"), row.whole("video2")
    if first % 2 == second % 2:
        kind = "losing" if first % 2 else "winning"
        raise RowDropped(f"both are {kind} clips, so that neither is known to be better")
    return Draft(
        number=row.number,
        id=row.identity(),
        prompt=row.caption(row.any_of(*_CAPTIONS)),
        video_1=_clip(first),
        video_2=_clip(second),
        labels={Dimension.OA.value: 2 if first % 2 else 1},
    )


VIDEODPO = Format(
    name="videodpo",
    about="pair.json with video1, video2 as indices: even wins, odd loses",
    dataset=None,
    read=each(_read_pair),
    rules={"OA": LabelRule("the ranking of a scoring model: even indices beat odd ones", derived=True)},
)
