"""Episodes on pairs of the synthetic world, by the oracle or from given texts, on the real runner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vrthinker.engine.base import Engine
from vrthinker.engine.scripted import ScriptedEngine
from vrthinker.episode.episode import EpisodeItem
from vrthinker.episode.runner import EpisodeRunner
from vrthinker.episode.trajectory import Trajectory
from vrthinker.video.frame_cache import FrameCache
from vrthinker.video.open import open_reader
from vrthinker.video.resize import ResizeSettings
from vrthinker.video.workspace import Workspace
from vrthinker.world.files import clip_paths
from vrthinker.world.nano import nano_settings, nano_templates
from vrthinker.world.oracle import BehaviorMix, OracleEngine, truths_by_clip
from vrthinker.world.world import COLORS, PRESETS, Defect, Event, Hint, PairTruth, sample_pair

SPAN = PRESETS["medium"].span[0]


def known_pair() -> PairTruth:
    """A pair with events of which everything is known: a yellow object, four hints, and two rounds of calls.

    Video 1 has the frames 1 to 47, of which 1, 12, 24 and 36 are shown first; video 2 has the frames 48 to
    77, of which 48, 55, 63 and 70 are shown first.
    """
    base = sample_pair(PRESETS["medium"], 0, 0, "known")

    def event(first: int, end: int, gap: tuple[int, int], hint: Hint | None, *defects: Defect) -> Event:
        return Event(first_index=first, end_index=end, defects=defects, gap=gap, hint=hint)

    color, noise, jump = Defect.COLOR, Defect.NOISE, Defect.JUMP
    first = {
        "n_frames": 47,
        "wrong_color": COLORS.index("blue"),
        "events": (
            event(24, 27, (23, 35), Hint.FADE, color, noise),
            event(41, 45, (35, 47), Hint.FADE, color, jump),
        ),
    }
    second = {
        "n_frames": 30,
        "wrong_color": COLORS.index("red"),
        "events": (
            event(3, 5, (0, 7), Hint.BARS, color, jump),
            event(19, 21, (15, 22), Hint.SPEED, color),
            event(22, 24, (22, 30), None, color, jump),
        ),
    }
    clips = tuple(clip.model_copy(update=new) for clip, new in zip(base.clips, (first, second), strict=True))
    objects = ((COLORS.index("yellow"), 0),)
    return checked(base.model_copy(update={"clips": clips, "objects": objects}))


def checked(pair: PairTruth) -> PairTruth:
    """The pair, if it is a possible one."""
    return PairTruth.model_validate(pair.model_dump())


@dataclass
class Stage:
    """Plays episodes on pairs whose clips lie in a world folder."""

    folder: Path
    cache: FrameCache = field(default_factory=lambda: FrameCache(1 << 24))

    def oracle(self, pair: PairTruth, *, calls: int = 7, mix: BehaviorMix | None = None) -> Trajectory:
        """The episode of an oracle that takes this for the truth about the clips of that id."""
        engine = OracleEngine(truths_by_clip(self.folder, [pair]), mix, calls=calls, span=SPAN)
        return self.run(engine, pair)

    def texts(self, texts: Sequence[str], pair: PairTruth) -> Trajectory:
        """The episode of a judge that writes these texts."""
        return self.run(ScriptedEngine([texts]), pair)

    def run(self, engine: Engine, pair: PairTruth) -> Trajectory:
        """The episode of an engine."""
        files = clip_paths(self.folder, pair)
        item = EpisodeItem(
            pair.id,
            pair.caption,
            lambda: Workspace.open(*files, reader=open_reader(), resize=ResizeSettings(), cache=self.cache),
        )
        # Nobody looks at a pixel here, so none is decoded.
        runner = EpisodeRunner(
            engine, nano_settings().episode, templates=nano_templates(), decode_ahead=False
        )
        (finished,) = runner.run([item])
        assert finished.trajectory is not None, finished.error
        return finished.trajectory
