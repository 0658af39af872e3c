"""What a single frame of the synthetic world shows, as questions with a few possible answers each.

A small vision tower learns these answers in a minute, if it is asked for them directly. If it has to learn
them from the texts of episodes, the text model must first find out which word is about which frame, and that
takes it a long time (docs/log.md).

A frame shows the objects' lanes, and so in which of the two directions places count, and whether the first
object is off its lane.
"""

from __future__ import annotations

from dataclasses import dataclass

from vrthinker.world.words import DEFECT_WORDS, HINT_WORDS, PLACES, place_letter
from vrthinker.world.world import COLORS, ClipTruth, Defect, Hint, PairTruth


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
    Question("place", tuple("".join(PLACES))),
    Question("off_lane", (None, DEFECT_WORDS[Defect.JUMP])),
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
    letter = place_letter(pair.centres(clip, frame_index)[-1][pair.vertical], vertical=pair.vertical)
    return (
        colors[0],
        colors[1] if len(colors) > 1 else len(COLORS),
        "".join(PLACES).index(letter),
        int(Defect.JUMP in defects),
        int(Defect.NOISE in defects),
        int(Hint.BARS in hints),
        int(Hint.FADE in hints),
    )
