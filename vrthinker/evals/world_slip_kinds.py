"""The kinds of slips that an episode on the synthetic world can have, and what is told of one."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from vrthinker.world.world import Defect


class SlipKind(enum.StrEnum):
    """The kinds of slips, in the order in which a round can make them."""

    FORM = "form_broken"
    """A round is not well formed, parts of it are not in the world's words, or it ends without a verdict."""
    FRAMES_LISTED = "frames_listed_wrong"
    """The snapshot leaves out a frame, lists one that there is not, one twice, or one under the other video.
    Frames about which there is nothing to say, or nothing is said, do no harm by this."""
    COLOR_MISSED = "wrong_color_missed"
    COLOR_INVENTED = "wrong_color_invented"
    NOISE_MISSED = "noise_missed"
    NOISE_INVENTED = "noise_invented"
    JUMP_MISSED = "off_lane_missed"
    JUMP_INVENTED = "off_lane_invented"
    COLOR_WORD = "color_word_wrong"
    """The colours of a frame are named wrong, although it says rightly whether there is a wrong one."""
    PLACE = "place_misread"
    """The place where the objects are is wrong, or how far they have come. This does no harm by itself."""
    HINT_MISSED = "hint_missed"
    HINT_INVENTED = "hint_invented"
    HINT_WORD = "hint_word_wrong"
    """Another hint is named than there is, which marks the same gap. This does no harm by itself."""
    EVENTS = "event_list_wrong"
    """The findings list other events than the judge's own snapshots say."""
    SUM = "sum_wrong"
    """A tally or a sum does not follow from the numbers that it is made of."""
    UNMARKED_GAP = "gap_without_hint_asked_for"
    TO_DO = "to_do_list_wrong"
    """The list of what is left is not the previous list without what is checked."""
    GAP_LEFT = "marked_gap_never_asked_for"
    """It answers although it has read a hint, has not looked there, and could have."""
    ANSWER = "answer_wrong"
    """A judgment of an answer does not follow from the judge's own tallies and sums."""
    FRAMES_ASKED = "frames_not_of_the_named_gap"
    """A call asks for other frames than those that look into the gaps that the decision names."""

    @property
    def words(self) -> str:
        """The kind in words."""
        return self.value.replace("_", " ")


MISSED = {
    Defect.COLOR: SlipKind.COLOR_MISSED,
    Defect.NOISE: SlipKind.NOISE_MISSED,
    Defect.JUMP: SlipKind.JUMP_MISSED,
}
INVENTED = {
    Defect.COLOR: SlipKind.COLOR_INVENTED,
    Defect.NOISE: SlipKind.NOISE_INVENTED,
    Defect.JUMP: SlipKind.JUMP_INVENTED,
}
READING = frozenset(
    {
        SlipKind.FRAMES_LISTED,
        *MISSED.values(),
        *INVENTED.values(),
        SlipKind.COLOR_WORD,
        SlipKind.PLACE,
        SlipKind.HINT_MISSED,
        SlipKind.HINT_INVENTED,
        SlipKind.HINT_WORD,
    }
)
"""The kinds that are counted per frame; the others are counted per round."""
HARMLESS = frozenset({SlipKind.PLACE, SlipKind.HINT_WORD})
"""The kinds that cannot make a verdict wrong by themselves."""


@dataclass(frozen=True)
class Slip:
    """One slip.

    Attributes:
        round_number: The round in which it was made, from 1.
        kind: Its kind.
        detail: What happened, in plain English.
        matters: Whether it can make the overall verdict wrong by itself.
    """

    round_number: int
    kind: SlipKind
    detail: str
    matters: bool = True
