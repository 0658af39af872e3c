"""What a single frame of the synthetic world shows, as questions with a few possible answers each.

A small vision tower learns these answers in a minute, if it is asked for them directly. If it has to learn
them from the texts of episodes, the text model must first find out which word is about which frame, and that
takes it a long time (docs/log.md).

A frame does not show which way the objects move. For that reason places are asked for in both directions, and
so is whether the first object is off its lane.
"""

from __future__ import annotations

from dataclasses import dataclass

from vrthinker.world.words import DEFECT_WORDS, HINT_WORDS, PLACES, place_letter
from vrthinker.world.world import COLORS, LANES, ClipTruth, Defect, Hint, PairTruth

_OFF_LANE = 8.5
"""Distance in units from the middle of all lanes, above which a single object is off its lane."""
_CLOSE = 17.0
"""Distance in units between two objects, below which the first one is off its lane."""


@dataclass(frozen=True)
class Question:
    """A question about a frame.

    Attributes:
        name: Its name in metrics.
        answers: The phrase that says each answer; None if no phrase of the world says it.
    """

    name: str
    answers: tuple[str | None, ...]


QUESTIONS = (
    Question("first_color", tuple(f" {color}" for color in COLORS)),
    Question("second_color", (None,) * (len(COLORS) + 1)),
    Question("place_across", tuple(PLACES[0])),
    Question("place_down", tuple(PLACES[1])),
    Question("off_lane_across", (None, None)),
    Question("off_lane_down", (None, None)),
    Question("noise", (None, DEFECT_WORDS[Defect.NOISE])),
    Question("bars", (None, HINT_WORDS[Hint.BARS])),
    Question("fade", (None, HINT_WORDS[Hint.FADE])),
)
"""The questions. The second object's colour has no phrase, because the same words name the first one's."""


def frame_answers(pair: PairTruth, clip: ClipTruth, frame_index: int) -> tuple[int, ...]:
    """The number of the right answer to each question about a frame of one of the pair's clips."""
    defects, hints = clip.defects_at(frame_index), clip.hints_at(frame_index)
    colors = [color for color, _ in pair.objects]
    if Defect.COLOR in defects:
        colors[0] = clip.wrong_color
    centres = pair.centres(clip, frame_index)
    if len(centres) == 1:
        middle = LANES[1][0]
        off = [abs(centres[0][1] - middle) > _OFF_LANE, abs(centres[0][0] - middle) > _OFF_LANE]
    else:
        apart = max(abs(a - b) for a, b in zip(*centres, strict=True))
        off = [apart < _CLOSE] * 2
    places = [
        PLACES[vertical].index(place_letter(centres[-1][vertical], vertical=bool(vertical)))
        for vertical in (0, 1)
    ]
    return (
        colors[0],
        colors[1] if len(colors) > 1 else len(COLORS),
        *places,
        *map(int, off),
        int(Defect.NOISE in defects),
        int(Hint.BARS in hints),
        int(Hint.FADE in hints),
    )
