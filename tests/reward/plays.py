"""Episodes on real clips whose rounds are written down, and groups of them drawn by chance.

A `Play` says what an episode answers, asks for and how it ends. The texts are made from it, the runner plays
them, and the tests compute what the play should earn from the play itself, not from the trajectory.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pytest

from vrthinker.engine.base import FinishReason, RoundResult
from vrthinker.engine.scripted import ScriptedEngine
from vrthinker.episode.episode import EpisodeItem
from vrthinker.episode.runner import EpisodeRunner
from vrthinker.episode.settings import EpisodeSettings
from vrthinker.episode.trajectory import Trajectory
from vrthinker.video.frame_cache import FrameCache
from vrthinker.video.open import open_reader
from vrthinker.video.resize import ResizeSettings
from vrthinker.video.workspace import Workspace

Four = tuple[int, int, int, int]
"""The values of TA, VQ, MQ and OA."""
HEAD = "<snapshot>1 red, 9 blue</snapshot><think>so far</think>"
N_FRAMES = 22
"""The frames of the workspace: 12 of the first clip and 10 of the second."""
MAX_ROUNDS = 4

Ending = Literal["answer", "error", "token_limit", "unparseable", "round_limit"]


def close(wanted: Iterable[float | None]) -> list[object]:
    """Numbers to compare a list with, up to the rounding of double precision; None only equals None."""
    return [None if value is None else pytest.approx(value, rel=1e-12, abs=1e-12) for value in wanted]


def values(four: Four) -> str:
    return ", ".join(f"{code}={value}" for code, value in zip(("TA", "VQ", "MQ", "OA"), four, strict=True))


@dataclass(frozen=True)
class Look:
    """A round that calls; `answer` is its recommended answer, if it has one, `frames` None for a bad call."""

    answer: Four | None
    frames: tuple[int, ...] | None = (3,)

    @property
    def text(self) -> str:
        recommended = (
            f"<recommend answer>{values(self.answer)}, CF=2</recommend answer>" if self.answer else ""
        )
        frames = [999] if self.frames is None else list(self.frames)
        call = f'{{"name": "select_frames", "arguments": {{"target_frames": {frames}}}}}'
        return f"{HEAD}{recommended}<tool_call>{call}</tool_call>"


@dataclass(frozen=True)
class Play:
    """One episode: rounds that look, and then how it ends."""

    looks: tuple[Look, ...] = ()
    final: Four | None = None
    ending: Ending = "answer"
    spoiled: Literal["", "failure", "repair"] = ""
    """What is wrong with the form of the last round."""

    @property
    def texts(self) -> list[str]:
        texts = [look.text for look in self.looks]
        if self.ending == "answer":
            assert self.final is not None
            line = values(self.final).replace(",", ";" if self.spoiled == "repair" else ",")
            texts.append(f"{'' if self.spoiled == 'failure' else HEAD}<answer>{line}</answer>")
        elif self.ending in ("token_limit", "unparseable"):
            texts.append(HEAD if self.ending == "unparseable" else "<snapshot>and so on")
        return texts

    @property
    def failed(self) -> bool:
        return self.ending == "error"

    @property
    def calls(self) -> int:
        """Calls that show frames. At the round limit the last one is not executed."""
        executed = self.looks[:-1] if self.ending == "round_limit" else self.looks
        return sum(look.frames is not None for look in executed)


class _Engine(ScriptedEngine):
    """Writes the plays of the sessions; an episode that has no text left has an error."""

    def __init__(self, plays: Sequence[Play]) -> None:
        super().__init__([play.texts for play in plays])
        self._plays = plays

    def collect(self, timeout_seconds: float | None = None) -> list[RoundResult]:
        cut = FinishReason.LENGTH
        return [
            replace(result, finish_reason=cut) if result.text == "<snapshot>and so on" else result
            for result in super().collect(timeout_seconds)
        ]


class Stage:
    """Two clips, and groups of episodes about them."""

    def __init__(self, clips: tuple[Path, Path]) -> None:
        self._clips = clips
        self._reader, self._cache = open_reader(), FrameCache(1 << 24)

    def play(
        self, plays: Sequence[Play], *, caption: str = "a dog", swapped: bool = False
    ) -> list[Trajectory]:
        """The episodes of a group, in order; with `swapped` all of them see the clips in the other order."""
        clips = self._clips[::-1] if swapped else self._clips

        def open_workspace() -> Workspace:
            return Workspace.open(*clips, reader=self._reader, resize=ResizeSettings(), cache=self._cache)

        item = EpisodeItem("pair", caption, open_workspace, group_seeds=tuple(range(len(plays))))
        # Nobody looks at a pixel here, so none is decoded.
        settings = EpisodeSettings(max_rounds=MAX_ROUNDS)
        runner = EpisodeRunner(_Engine(plays), settings, decode_ahead=False)
        by_seed = {}
        for finished in runner.run([item]):
            assert finished.trajectory is not None, finished.error
            by_seed[finished.item.seed] = finished.trajectory
        found = [by_seed[seed] for seed in range(len(plays))]
        for play, trajectory in zip(plays, found, strict=True):
            stop = {"answer": "answered", "error": "engine_error"}.get(play.ending, play.ending)
            assert trajectory.outcome.stop_reason == stop, trajectory.outcome.reason
        return found


def random_four(draw: random.Random) -> Four:
    return draw.randrange(3), draw.randrange(3), draw.randrange(3), draw.randrange(3)


def random_play(draw: random.Random, ending: Ending | None = None) -> Play:
    """A play of up to four rounds, with every kind of round and ending."""
    ending = ending or draw.choice(
        ("answer", "answer", "answer", "token_limit", "unparseable", "round_limit")
    )
    number = MAX_ROUNDS if ending == "round_limit" else draw.randrange(MAX_ROUNDS)
    looks = []
    for _ in range(number):
        frames = tuple(sorted(draw.sample(range(1, N_FRAMES + 1), draw.randint(1, 3))))
        looks.append(
            Look(
                random_four(draw) if draw.random() < 0.8 else None,
                frames if draw.random() < 0.7 else None,
            )
        )
    if ending != "answer":
        return Play(tuple(looks), ending=ending)
    spoiled: Literal["", "failure", "repair"] = draw.choice(("", "", "failure", "repair"))
    return Play(tuple(looks), random_four(draw), spoiled=spoiled)
