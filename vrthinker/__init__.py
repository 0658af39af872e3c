"""vrthinker: a video reward model that thinks with images.

    from vrthinker import Judge

    judge = Judge.from_pretrained("path/or/hub-id")
    verdict = judge("a dog runs on the beach", "a.mp4", "b.mp4")
    print(verdict.overall, verdict.judgments, verdict.frames_seen)

Importing the package loads neither torch nor a video library. Each name below loads what it needs on first
use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vrthinker._version import __version__ as __version__

if TYPE_CHECKING:
    from vrthinker.episode.dimensions import Dimension, Judgments, Preference
    from vrthinker.episode.probabilities import LabelProbabilities, Probabilities
    from vrthinker.episode.settings import EpisodeSettings, JudgeSettings
    from vrthinker.episode.trajectory import StopReason, Trajectory, load_trajectories
    from vrthinker.errors import EngineError, InputError, VideoError, VRThinkerError
    from vrthinker.judge import Judge
    from vrthinker.verdict import Verdict
    from vrthinker.video.clips import Clip

_HOMES = {
    "Dimension": "episode.dimensions",
    "Judgments": "episode.dimensions",
    "Preference": "episode.dimensions",
    "LabelProbabilities": "episode.probabilities",
    "Probabilities": "episode.probabilities",
    "EpisodeSettings": "episode.settings",
    "JudgeSettings": "episode.settings",
    "StopReason": "episode.trajectory",
    "Trajectory": "episode.trajectory",
    "load_trajectories": "episode.trajectory",
    "EngineError": "errors",
    "InputError": "errors",
    "VideoError": "errors",
    "VRThinkerError": "errors",
    "Clip": "video.clips",
    "Judge": "judge",
    "Verdict": "verdict",
}

__all__ = [  # noqa: RUF022 - grouped by what they are for
    "Judge",
    "Verdict",
    "Clip",
    "Dimension",
    "Judgments",
    "Preference",
    "LabelProbabilities",
    "Probabilities",
    "EpisodeSettings",
    "JudgeSettings",
    "StopReason",
    "Trajectory",
    "load_trajectories",
    "EngineError",
    "InputError",
    "VideoError",
    "VRThinkerError",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vrthinker' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"vrthinker.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
