"""VideoFeedback: scores of single clips, from which pairs of the same prompt are made.

`id, images, "text prompt", "visual quality", "temporal consistency", "dynamic degree",
"text-to-video alignment", "factual consistency"`. A clip is the list of its frames as picture files. Nobody
compared two clips: every label is derived, by comparing two scores with a margin.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from vrthinker.data.datasets.draft import (
    Clip,
    Draft,
    Format,
    ImportOptions,
    LabelRule,
    Tally,
    attempt,
    by_margin,
)
from vrthinker.data.datasets.rows import BadField, Caption, Row, RowDropped

MARGIN = 0.0
_CAPTION = "text prompt"
_SCORES = (
    "visual quality",
    "temporal consistency",
    "dynamic degree",
    "text-to-video alignment",
    "factual consistency",
)
_BY_CODE = {"TA": "text-to-video alignment", "VQ": "visual quality", "MQ": "temporal consistency"}


@dataclass(frozen=True)
class _Scored:
    """One clip with its scores."""

    number: int
    id: str | None
    prompt: Caption
    clip: Clip
    scores: dict[str, float]

    @property
    def mean(self) -> float:
        return sum(self.scores.values()) / len(self.scores)


def _read_clip(row: Row) -> _Scored:
    frames = row.paths("images")
    if not frames:
        raise BadField("images", "[]", "at least one picture")
    scores: dict[str, float] = {}
    for name in _SCORES:
        score = row.number_of(name)
        if score is None:
            raise RowDropped(f"without a score of {name}")
        scores[name] = score
    prompt = row.caption(_CAPTION)
    if prompt.missing:
        raise RowDropped("without a caption to pair it by")
    return _Scored(row.number, row.identity(), prompt, Clip(None, frames), scores)


def _read(rows: Iterator[Row], options: ImportOptions, tally: Tally) -> Iterator[Draft]:
    by_prompt: dict[str, list[_Scored]] = {}
    for row in rows:
        scored = attempt(row, tally, partial(_read_clip, row))
        if scored is not None:
            by_prompt.setdefault(" ".join(scored.prompt.text.split()), []).append(scored)
    for clips in by_prompt.values():
        if len(clips) == 1:
            tally.drop(clips[0].number, "the only clip of its prompt")
        possible = len(clips) * (len(clips) - 1) // 2
        if possible > options.pairs_per_prompt:
            left_out = possible - options.pairs_per_prompt
            tally.notes["possible pairs left out by --pairs-per-prompt"] += left_out
        made = 0
        # Neighbours first, so that a small limit uses every clip about equally often.
        for gap in range(1, len(clips)):
            for first, second in zip(clips, clips[gap:], strict=False):
                if made >= options.pairs_per_prompt:
                    break
                made += 1
                yield _pair(first, second, options)
            if made >= options.pairs_per_prompt:
                break


def _pair(first: _Scored, second: _Scored, options: ImportOptions) -> Draft:
    margin = MARGIN if options.margin is None else options.margin
    labels = {
        code: by_margin(first.scores[name], second.scores[name], margin) for code, name in _BY_CODE.items()
    }
    labels["OA"] = by_margin(first.mean, second.mean, margin)
    names = [scored.id or f"{scored.number:06d}" for scored in (first, second)]
    return Draft(
        number=first.number,
        id="-vs-".join(names),
        prompt=first.prompt,
        video_1=first.clip,
        video_2=second.clip,
        labels=labels,
        frames=(len(first.clip.frames), len(second.clip.frames)),
    )


VIDEOFEEDBACK = Format(
    name="videofeedback",
    about="scores of single clips with frames as pictures; pairs of the same prompt, ties by margin",
    dataset=None,
    read=_read,
    rules={
        **{
            code: LabelRule(f"the scores {name}: a tie within {{margin}}", derived=True)
            for code, name in _BY_CODE.items()
        },
        "OA": LabelRule("the means of the five scores: a tie within {margin}", derived=True),
    },
    margin=MARGIN,
)
