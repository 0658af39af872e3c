"""A phase in which the vision tower alone learns what single frames of the synthetic world show.

Each question about a frame (`frame_questions.py`) is answered by the mean of the frame's features: each
answer has a direction, and the answer whose direction is closest wins. An answer that a phrase says has the
direction of that phrase's embedding, so that the text model, whose embeddings are also its output weights,
can write what a frame shows by copying it. All other directions are fixed random ones. Nothing but the tower
is trained, and nothing has to be thrown away afterwards.

This is ours; the paper starts from a model that sees.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch.nn.functional import cross_entropy

from vrthinker.engine.base import FrameKey
from vrthinker.engine.hf.model import VisionLanguageModel
from vrthinker.episode.trajectory import Trajectory
from vrthinker.errors import InputError
from vrthinker.policy.batches import FrameLoader
from vrthinker.train.loop.loop import MicroLoss
from vrthinker.train.loop.schedule import LearningRate
from vrthinker.train.model import TrainedPolicy
from vrthinker.train.phases import PhaseRun
from vrthinker.train.settings import MAX_STEPS, StageSettings
from vrthinker.train.trace_sources import MAX_SEED, MAX_TRACE_PAIRS
from vrthinker.train.world_traces import world_folder
from vrthinker.video.frame_cache import file_state
from vrthinker.video.resize import ResizeSettings
from vrthinker.world.files import clip_paths, load_truths
from vrthinker.world.frame_questions import QUESTIONS, frame_answers
from vrthinker.world.world import ClipTruth, PairTruth, WorldConfig, first_indices

_SHARPNESS = 4.0
"""The length of an answer's direction: features need not be long to be sure of an answer."""
_TELLING = 0.5
"""The share of frames that are drawn among those with a defect or a hint, and the first-input frames."""
_READ_AHEAD = 3


class FrameWorld(StageSettings):
    """A synthetic world whose frames are learned."""

    world: WorldConfig = WorldConfig()
    pairs: int = Field(ge=1, le=MAX_TRACE_PAIRS)
    seed: int = Field(0, ge=0, le=MAX_SEED)
    """Seed of the pairs, added to the run's seed."""


class FramePhase(StageSettings):
    """How long and how fast the tower learns what single frames show."""

    kind: Literal["frames"] = "frames"
    name: str = Field("frames", pattern=r"^[a-z0-9][a-z0-9-]*$")
    steps: int = Field(ge=1, le=MAX_STEPS)
    """Number of optimizer steps."""
    clips_per_step: int = Field(16, ge=1)
    frames_per_clip: int = Field(8, ge=1, le=64)
    learning_rate: LearningRate
    worlds: tuple[FrameWorld, ...] = Field(min_length=1)


@dataclasses.dataclass(frozen=True)
class FrameLessons:
    """The clips of a phase.

    Attributes:
        phase: How long and how fast.
        clips: The path, the pair and the truth of each clip.
        digest: What is learned, as a SHA-256 in hexadecimal digits.
    """

    phase: FramePhase
    clips: tuple[tuple[Path, PairTruth, ClipTruth], ...]
    digest: str

    @property
    def traces(self) -> Sequence[Trajectory]:
        """No traces are learned."""
        return ()

    def begin(
        self, trained: TrainedPolicy, loader: FrameLoader, resize: ResizeSettings, seed: int
    ) -> PhaseRun:
        """Makes the answers' directions.

        Raises:
            InputError: The tower is not trained in this run, or there are fewer clips than processes.
        """
        if not trained.settings.train_vision or trained.settings.lora is not None:
            raise InputError(
                f"phase {self.phase.name}: trains the vision tower, allowed: with train_vision and "
                "without lora"
            )
        if trained.ranks.size > self.phase.clips_per_step:
            raise InputError(
                f"phase {self.phase.name}: clips_per_step: got {self.phase.clips_per_step}, wanted at least "
                f"one for each of {trained.ranks.size} processes"
            )
        return _FrameRun(self, trained, loader, resize, seed)


def make_frame_lessons(phase: FramePhase, folder: Path, *, seed: int) -> FrameLessons:
    """Makes the worlds of a phase in a folder. What is there is kept.

    Raises:
        InputError: The folder holds another world.
        VRThinkerError: A clip could not be written.
    """
    digest, clips = hashlib.sha256(), []
    for source in phase.worlds:
        made = world_folder(folder, source.world, source.pairs, source.seed, seed=seed)
        for pair in load_truths(made):
            digest.update(pair.model_dump_json().encode())
            clips += [(path, pair, c) for path, c in zip(clip_paths(made, pair), pair.clips, strict=True)]
    return FrameLessons(phase, tuple(clips), digest.hexdigest())


class _FrameRun:
    """The phase's steps."""

    def __init__(
        self,
        lessons: FrameLessons,
        trained: TrainedPolicy,
        loader: FrameLoader,
        resize: ResizeSettings,
        seed: int,
    ) -> None:
        self._lessons, self._loader, self._resize, self._seed = lessons, loader, resize, seed
        self._phase = lessons.phase
        self.name, self.steps, self.rate = self._phase.name, self._phase.steps, self._phase.learning_rate
        self._ranks = trained.ranks
        with trained.whole():
            self._directions = answer_directions(trained.policy)
        self._ahead: dict[int, Future[tuple[list[np.ndarray], np.ndarray]]] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="vrthinker-lessons")

    def micro_losses(self, trained: TrainedPolicy, step: int) -> Iterator[MicroLoss]:
        """The loss of this process's frames: the mean over all frames, summed over the questions."""
        frames, answers = self._ranks.together(lambda: self._batch(step))
        total = self._phase.clips_per_step * self._phase.frames_per_clip
        loss, right = trained.forward(frame_loss, trained.policy, frames, answers, self._directions)
        share = right.sum() / (total * len(QUESTIONS))
        sums = {"frames/accuracy": share, "frames/all_right": (right == len(QUESTIONS)).sum() / total}
        yield MicroLoss(loss / total, len(frames), sums)

    def record(self) -> dict[str, Any]:
        """Which frames are learned."""
        n_clips = len(self._lessons.clips)
        return {
            "phase": self.name,
            "steps": self.steps,
            "traces": {"kind": "frames"},
            "checked": "nothing",
            "read": n_clips,
            "kept": n_clips,
            "kept_sha256": self._lessons.digest,
            "dropped": {},
            "dropped_traces": [],
        }

    def close(self) -> None:
        """Stops reading ahead."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _batch(self, step: int) -> tuple[list[np.ndarray], np.ndarray]:
        future = self._ahead.pop(step, None)
        for ahead in range(step + 1, min(step + 1 + _READ_AHEAD, self.steps)):
            if ahead not in self._ahead:
                self._ahead[ahead] = self._pool.submit(self._read, ahead)
        return self._read(step) if future is None else future.result()

    def _read(self, step: int) -> tuple[list[np.ndarray], np.ndarray]:
        """The frames and answers of this process in a step, a pure function of the seed and the step."""
        rng = np.random.default_rng([self._seed, step])
        drawn = rng.integers(len(self._lessons.clips), size=self._phase.clips_per_step)
        keys, answers = [], []
        for place, number in enumerate(drawn):
            path, pair, clip = self._lessons.clips[number]
            indices = _drawn_indices(clip, self._phase.frames_per_clip, rng)
            if place % self._ranks.size != self._ranks.rank:
                continue
            height, width = self._resize.grid_size(pair.size, pair.size)
            state = file_state(str(path))
            keys += [FrameKey(str(path), i, height, width, None, state) for i in indices]
            answers += [frame_answers(pair, clip, i) for i in indices]
        return self._loader.load(keys), np.array(answers, np.int64)


def _drawn_indices(clip: ClipTruth, count: int, rng: np.random.Generator) -> list[int]:
    """Frames of a clip, those that show something more often than others."""
    first = set(first_indices(clip.n_frames))
    telling = [i for i in range(clip.n_frames) if i in first or clip.defects_at(i) or clip.hints_at(i)]
    return [
        int(rng.choice(telling)) if rng.random() < _TELLING else int(rng.integers(clip.n_frames))
        for _ in range(count)
    ]


def answer_directions(policy: VisionLanguageModel) -> torch.Tensor:
    """The direction of every answer to every question, one question after the other, `[answers, hidden]`."""
    table = policy.model.get_input_embeddings().weight.detach().float()
    generator = torch.Generator().manual_seed(0)
    rows = []
    for question in QUESTIONS:
        for answer in question.answers:
            random = torch.randn(table.shape[1], generator=generator)
            if answer is not None:
                ids = policy.tokenizer.encode(answer, add_special_tokens=False)
                random = table[ids].mean(0).cpu()
            rows.append(random / random.norm() * _SHARPNESS)
    return torch.stack(rows)


def frame_loss(
    policy: VisionLanguageModel, frames: Sequence[np.ndarray], answers: np.ndarray, directions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The cross-entropy of the right answers, summed over frames and questions.

    Args:
        policy: The model, of which only the vision tower is used.
        frames: The pixels of each frame, uint8 `[height, width, 3]`.
        answers: The number of the right answer to each question, int64 `[frames, questions]`.
        directions: The answers' directions, `[answers, hidden]`.

    Returns:
        The loss, a scalar with gradient, and the number of questions that each frame is right in, `[frames]`.
    """
    features = torch.stack([encoded.embeds.mean(0) for encoded in policy.encode(frames)])
    logits = features @ directions.to(features).T
    wanted = torch.from_numpy(answers).to(logits.device)
    sizes = [len(question.answers) for question in QUESTIONS]
    parts = torch.functional.split(logits, sizes, dim=1)
    losses = [cross_entropy(part, wanted[:, i], reduction="sum") for i, part in enumerate(parts)]
    right = torch.stack([part.argmax(1) == wanted[:, i] for i, part in enumerate(parts)]).sum(0)
    return torch.stack(losses).sum(), right
