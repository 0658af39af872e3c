"""Groups of clips of one caption, for rankings: as pairs have a planted truth, so has a group.

Every two clips of a group are a pair of the same world, with its judgments. `GroupOracle` judges them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vrthinker.engine.base import FrameSegment
from vrthinker.errors import EngineError, InputError
from vrthinker.world.oracle import BehaviorMix, OracleEngine, are_where_they_belong, file_of
from vrthinker.world.pixels import write_clip
from vrthinker.world.world import ClipTruth, PairTruth, WorldConfig, sample_clip, sample_pair

MAX_CLIPS = 256
"""The most clips of a group."""
_STREAM = 20261130  # separates the clips of groups from those of pairs


@dataclass(frozen=True)
class GroupTruth:
    """The planted truth of several clips of one caption.

    Attributes:
        look: A pair that has the caption and the look of the group.
        clips: The clips.
    """

    look: PairTruth
    clips: tuple[ClipTruth, ...]

    @property
    def caption(self) -> str:
        """The caption of all clips."""
        return self.look.caption

    @property
    def defects(self) -> tuple[int, ...]:
        """The number of planted defects of each clip. The best clips have the fewest."""
        return tuple(sum(clip.counts) for clip in self.clips)

    @property
    def best(self) -> tuple[int, ...]:
        """The clips with the fewest defects."""
        return tuple(clip for clip, count in enumerate(self.defects) if count == min(self.defects))

    def pair(self, first: int, second: int) -> PairTruth:
        """The truth of two clips, in the order in which they are shown."""
        name = f"{self.look.id}-{first + 1}-{second + 1}"
        return self.look.model_copy(update={"id": name, "clips": (self.clips[first], self.clips[second])})


def sample_group(config: WorldConfig, seed: int, index: int, clips: int) -> GroupTruth:
    """Draws group number `index` of a seed.

    Args:
        config: The difficulty. Each clip has its own number of hidden events.
        seed: The seed.
        index: The number of the group.
        clips: The number of clips, 2 to `MAX_CLIPS`.

    Raises:
        InputError: The number of clips is out of range.
    """
    if not 2 <= clips <= MAX_CLIPS:
        raise InputError(f"group: got {clips} clips, allowed: 2 to {MAX_CLIPS}")
    look = sample_pair(config, seed, index, "group")
    rng = np.random.default_rng([_STREAM, seed, index])
    used = {color for color, _ in look.objects}
    others = [color for color in range(config.colors) if color not in used]
    drawn = tuple(
        sample_clip(
            config,
            rng,
            int(rng.choice(len(config.hidden_events), p=config.hidden_events)),
            int(rng.choice(others)),
        )
        for _ in range(clips)
    )
    return GroupTruth(look, drawn)


def write_group(folder: Path, group: GroupTruth) -> list[Path]:
    """Writes the clips of a group as `1.mp4`, `2.mp4`, … and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, clip in enumerate(group.clips, start=1):
        path = folder / f"{number}.mp4"
        write_clip(path, group.look, clip)
        paths.append(path)
    return paths


class GroupOracle(OracleEngine):
    """An oracle over the clips of groups: any two clips of a group are a pair.

    Args:
        groups: The groups, each with the files of its clips.
        mix: The behaviours, and how often each is drawn.
        calls: The most tool calls of a session.
        span: The value of `WorldConfig.span[0]`.
        max_sessions: The number of sessions that may be open at once.
    """

    def __init__(
        self,
        groups: Iterable[tuple[GroupTruth, Sequence[Path]]],
        mix: BehaviorMix | None = None,
        *,
        calls: int = 2,
        span: float = 0.25,
        max_sessions: int = 64,
    ) -> None:
        super().__init__({}, mix, calls=calls, span=span, max_sessions=max_sessions)
        self._clips = {
            os.path.abspath(path): (group, clip) for group, paths in groups for clip, path in enumerate(paths)
        }

    def _pair(self, frames: Sequence[FrameSegment]) -> tuple[PairTruth, tuple[str, str]]:
        files = list(dict.fromkeys(file_of(frame) for frame in frames))
        known = [self._clips[file] for file in files if file in self._clips]
        if len(files) != 2 or len(known) != 2 or known[0][0] is not known[1][0]:
            raise EngineError(f"oracle: got frames of {files}, allowed: those of two clips of one group")
        pair = known[0][0].pair(known[0][1], known[1][1])
        if not are_where_they_belong(frames, pair, (files[0], files[1])):
            raise EngineError("oracle: the frames are not numbered without gaps; judge without max_fps")
        return pair, (files[0], files[1])
