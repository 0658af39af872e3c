"""The live context of a session, for engines that keep it as messages.

Invariant: the turns are all messages and round texts so far, in order, without the frames that expired. Text
is never removed, and nothing replaces a removed frame. A context is an immutable value: `entered` checks a
request and returns a new context, so a refused request does not change the session.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vrthinker.engine.base import FrameSegment, Message, RoundRequest, TextSegment
from vrthinker.errors import EngineError
from vrthinker.visibility import ShownFrame

Turn = Message | str
"""A message, or a text that the session wrote."""


@dataclass(frozen=True)
class LiveContext:
    """The context that the next round would be written from.

    Attributes:
        turns: The messages and the session's own texts, in order.
    """

    turns: tuple[Turn, ...] = ()

    @property
    def messages(self) -> tuple[Message, ...]:
        """The messages, without the session's own texts."""
        return tuple(turn for turn in self.turns if isinstance(turn, Message))

    @property
    def frames(self) -> tuple[FrameSegment, ...]:
        """The live frames, in order."""
        return tuple(frame for message in self.messages for frame in message.frames)

    @property
    def live(self) -> tuple[ShownFrame, ...]:
        """The live showings, in order."""
        return tuple(frame.shown for frame in self.frames)

    def extended(self, messages: Iterable[Message]) -> LiveContext:
        """The context with new messages at its end.

        Raises:
            EngineError: A segment is of an unknown type, or a showing is live already.
        """
        messages = tuple(messages)
        live = set(self.live)
        for message in messages:
            for segment in message.segments:
                if isinstance(segment, TextSegment):
                    continue
                if not isinstance(segment, FrameSegment):
                    raise EngineError(f"a message holds {type(segment).__name__}, allowed: texts and frames")
                if segment.shown in live:
                    raise EngineError(f"{segment.shown} is shown, but it is live already")
                live.add(segment.shown)
        return LiveContext(self.turns + messages)

    def without(self, expired: Iterable[ShownFrame]) -> LiveContext:
        """The context without the frames that expired. Their messages and labels stay.

        Raises:
            EngineError: A showing is not live, or it is named twice.
        """
        gone: set[ShownFrame] = set()
        live = set(self.live)
        for shown in expired:
            if shown not in live - gone:
                raise EngineError(f"{shown} expires, but it is not live")
            gone.add(shown)
        if not gone:
            return self
        return LiveContext(
            tuple(_without(turn, gone) if isinstance(turn, Message) else turn for turn in self.turns)
        )

    def entered(self, request: RoundRequest) -> LiveContext:
        """The context that the requested round is written from: expired frames removed, new messages added.

        Raises:
            EngineError: An expired showing is not live, a new showing is live already, or a segment is of an
                unknown type.
        """
        return self.without(request.expired).extended(request.new)

    def written(self, text: str) -> LiveContext:
        """The context with a round's text at its end."""
        return LiveContext((*self.turns, text))


def _without(message: Message, gone: set[ShownFrame]) -> Message:
    kept = tuple(s for s in message.segments if not (isinstance(s, FrameSegment) and s.shown in gone))
    return message if len(kept) == len(message.segments) else Message(message.role, kept)
