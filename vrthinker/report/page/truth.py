"""The truth about a pair, for the evidence page: labels, and planted events."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from vrthinker.episode.dimensions import Dimension
from vrthinker.errors import InputError


@dataclass(frozen=True)
class PlantedEvent:
    """A defect that was put into a clip on purpose.

    Attributes:
        video: The number of the video, 1 or 2.
        first_index: The 0-based index in its file of the first frame that shows it.
        end_index: The index after the last such frame.
        text: The description.
        hidden: Whether no frame of the first input shows it.

    Raises:
        InputError: The video is not 1 or 2, or the range is empty or negative.
    """

    video: Literal[1, 2]
    first_index: int
    end_index: int
    text: str
    hidden: bool

    def __post_init__(self) -> None:
        if self.video not in (1, 2):
            raise InputError(f"planted event: got video {self.video!r}, allowed: 1 and 2")
        if not 0 <= self.first_index < self.end_index:
            raise InputError(
                f"planted event: got frames {self.first_index} to {self.end_index} (half-open), "
                "allowed: 0 and above, ascending"
            )

    def covers(self, video: int, frame_index: int) -> bool:
        """Whether the frame at this index of this video shows the event."""
        return video == self.video and self.first_index <= frame_index < self.end_index


@dataclass(frozen=True)
class Truth:
    """The labels and the planted events of a pair.

    Attributes:
        judgments: Dimension code -> 0 (tie), 1 or 2, for the dimensions that have a label.
        events: The planted events.

    Raises:
        InputError: A code or a label is unknown.
    """

    judgments: Mapping[str, int] = field(default_factory=dict)
    events: tuple[PlantedEvent, ...] = ()

    def __post_init__(self) -> None:
        for code, label in self.judgments.items():
            if code not in Dimension.__members__:
                raise InputError(f"truth: got code {code!r}, allowed: {', '.join(Dimension)}")
            if label not in (0, 1, 2):
                raise InputError(f"truth: {code}: got {label!r}, allowed: 0, 1, 2")
