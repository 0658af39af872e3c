"""Episodes that a real engine sampled on real clips, with what each round was sampled from kept beside them.

The engine is the transformers engine; only the forms of its rounds are the test's, so that random weights
look again, make bad calls, run into their token limit and answer. The runner, the tools and the memory are
the package's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from vrthinker.engine.base import (
    Choice,
    FinishReason,
    Form,
    FrameKey,
    Free,
    Message,
    RoundLimits,
    RoundRequest,
    RoundResult,
    Session,
)
from vrthinker.engine.hf.engine import HFEngine
from vrthinker.engine.hf.markup import Markup
from vrthinker.episode.episode import EpisodeItem
from vrthinker.episode.runner import EpisodeRunner
from vrthinker.episode.settings import EpisodeSettings
from vrthinker.episode.trajectory import MessageRecord, RoundRecord, TextRecord, Trajectory
from vrthinker.video.frame_cache import FrameCache, file_state
from vrthinker.video.open import open_reader
from vrthinker.video.resize import ResizeSettings
from vrthinker.video.workspace import Workspace
from vrthinker.visibility import MemoryMode, ShownFrame
from vrthinker.world.nano import nano_templates

Ending = Literal["look", "unknown frame", "not json", "cut", "answer"]
"""How a round ends; `cut`: a call, and then text up to the token limit."""

EPISODES: tuple[tuple[Ending, ...], ...] = (
    ("answer",),
    ("look", "answer"),
    ("look", "unknown frame", "cut", "answer"),
    ("not json", "look", "look", "cut", "look", "answer"),
)
"""One to six rounds, with every ending."""

_CALL = '<tool_call>{"name": "select_frames", "arguments": {"target_frames": ['


@dataclass(frozen=True)
class Sampled:
    """One round as the engine saw it.

    Attributes:
        ids: Token ids that the context had when the round began, `[context]`.
        positions: Their positions, `[3, context]`.
        frames: Live frames: where each one's placeholders begin, and its key.
        logits: What the round's tokens were drawn from, `[tokens, vocabulary]`.
    """

    ids: np.ndarray
    positions: np.ndarray
    frames: tuple[tuple[int, FrameKey], ...]
    logits: torch.Tensor | None


class Recorder(HFEngine):
    """The transformers engine, in forms of the test's own.

    Args:
        folder: The checkpoint.
        endings: By the session's seed, how each round ends. A session without writes freely.
        n_frames: N.
        most_context: As `max_context_tokens`.
    """

    def __init__(
        self, folder: Path, endings: Mapping[int, Sequence[Ending]], *, n_frames: int, most_context: int
    ) -> None:
        super().__init__(folder, device="cpu", keep_logits=True, max_context_tokens=most_context)
        self._endings, self._n_frames = endings, n_frames
        self._seeds: dict[int, int] = {}
        self._begun: dict[int, tuple[np.ndarray, np.ndarray, tuple[tuple[int, FrameKey], ...]]] = {}
        self.rounds: dict[int, list[Sampled]] = defaultdict(list)
        """By the session's seed."""

    def open(self, messages: Sequence[Message], *, seed: int = 0, memory: MemoryMode = "rerender") -> Session:
        session = super().open(messages, seed=seed, memory=memory)
        self._seeds[session.id] = seed
        return session

    def submit(self, request: RoundRequest) -> None:
        limits = request.limits
        seed = self._seeds[request.session.id]
        if seed in self._endings:
            limits = self._limits(self._endings[seed][len(self.rounds[seed])])
        super().submit(RoundRequest(request.session, request.new, request.expired, limits))
        context = self._sessions[request.session].context
        frames = []
        for first, piece in context.frames():
            key = piece.segment.key
            assert isinstance(key, FrameKey)
            frames.append((first, key))
        self._begun[request.session.id] = (context.token_ids(), context.positions(), tuple(frames))

    def collect(self, timeout_seconds: float | None = None) -> list[RoundResult]:
        results = super().collect(timeout_seconds)
        for result in results:
            begun = self._begun.pop(result.session.id)
            self.rounds[self._seeds[result.session.id]].append(Sampled(*begun, result.logits))
        return results

    def _limits(self, ending: Ending) -> RoundLimits:
        # Every token takes its time, so rounds have little more than what decides their ending.
        if ending == "answer":
            form: Form = (Free(5), Choice(("<answer>TA=1, VQ=0, MQ=2, OA=1</answer>",)))
        elif ending == "not json":
            form = (Free(5), Choice(("<tool_call>look</tool_call>",)))
        elif ending == "unknown frame":
            form = (Free(5), Choice((_CALL + "9999]}}</tool_call>",)))
        elif ending == "look":
            numbers = range(1, self._n_frames + 1)
            picks = (Choice(tuple(f"{n}, " for n in numbers)), Choice(tuple(f"{n}]" for n in numbers)))
            form = (Free(5), Choice((_CALL,)), *picks, Choice(("}}</tool_call>",)))
        else:
            text = _CALL + "3]}}</tool_call>"
            limit = len(self.markup.encode_option(text)) + 4
            return RoundLimits(limit, temperature=1.0, form=(Choice((text,)), Free(60)))
        return RoundLimits(200, temperature=1.0, form=form)


class Stage:
    """Two clips, and episodes about them.

    Args:
        clips: Two files.
        resize: The checkpoint's frame sizes.
    """

    def __init__(self, clips: tuple[Path, Path], resize: ResizeSettings) -> None:
        self._clips, self._resize = clips, resize
        self._reader, self._cache = open_reader(), FrameCache(64 << 20)

    def open(self) -> Workspace:
        """The clips' workspace."""
        return Workspace.open(*self._clips, reader=self._reader, resize=self._resize, cache=self._cache)

    def sample(
        self,
        folder: Path,
        episodes: Sequence[Sequence[Ending] | None],
        *,
        window: int | None,
        memory: MemoryMode = "rerender",
        most_context: int = 32_768,
    ) -> list[tuple[Trajectory, list[Sampled]]]:
        """Runs episodes in one batch, at temperature 1; each is shown other first frames.

        Args:
            folder: The checkpoint.
            episodes: How the rounds of each end; None lets the model write freely.
            window: p.
            memory: How expired frames leave.
            most_context: The engine's limit.
        """
        workspace = self.open()
        endings = {seed: kinds for seed, kinds in enumerate(episodes) if kinds is not None}
        engine = Recorder(folder, endings, n_frames=workspace.n_frames, most_context=most_context)
        settings = EpisodeSettings(
            window=window, memory=memory, temperature=1.0, max_rounds=8, max_round_tokens=20
        )
        items = []
        for seed in range(len(episodes)):
            first = (1 + seed % 3, 5, workspace.n_frames_1 + 2 + seed % 2)
            items.append(EpisodeItem(f"e{seed}", f"a dog {seed}", self.open, seed=seed, first_frames=first))
        found = {}
        # Short prompts: what is tested here does not depend on their wording, and forwards take their time.
        for finished in EpisodeRunner(engine, settings, templates=nano_templates()).run(items):
            assert finished.trajectory is not None, finished.error
            found[finished.item.seed] = finished.trajectory
        engine.shutdown()
        return [(found[seed], engine.rounds[seed]) for seed in range(len(episodes))]


@dataclass(frozen=True)
class RoundContext:
    """A round's context, rendered the slow, obvious way from what a trajectory says was live.

    Attributes:
        prompt: Its token ids.
        frames: Its live frames, in order.
        written: The ids of the round.
    """

    prompt: list[int]
    frames: list[FrameKey]
    written: list[int]


def round_contexts(trajectory: Trajectory, markup: Markup, factor: int) -> list[RoundContext]:
    """Every round's context."""
    found = []
    for number, record in enumerate(trajectory.rounds):
        context = RoundContext([], [], written_ids(record, markup))
        live = set(record.live)
        for message in trajectory.first_input:
            _render(message, live, trajectory, context, markup, factor)
        context.prompt.extend([markup.turn_start, *markup.encode("assistant\n")])
        for earlier in trajectory.rounds[:number]:
            context.prompt.extend(written_ids(earlier, markup))
            if context.prompt[-1] != markup.turn_end:
                context.prompt.append(markup.turn_end)
            context.prompt.extend(markup.encode("\n"))
            for message in earlier.outcome_messages:
                _render(message, live, trajectory, context, markup, factor)
            context.prompt.extend([markup.turn_start, *markup.encode("assistant\n")])
        found.append(context)
    return found


def _render(
    message: MessageRecord,
    live: set[ShownFrame],
    trajectory: Trajectory,
    context: RoundContext,
    markup: Markup,
    factor: int,
) -> None:
    frames = {frame.frame_number: frame for frame in trajectory.frames}
    ids = [markup.turn_start, *markup.encode(f"{message.role}\n")]
    for segment in message.segments:
        if isinstance(segment, TextRecord):
            ids += markup.encode(segment.text)
        elif ShownFrame(segment.outcome, segment.frame_number) in live:
            frame = frames[segment.frame_number]
            path = trajectory.videos[frame.video - 1].path
            size = (frame.height, frame.width)
            context.frames.append(FrameKey(path, frame.frame_index, *size, None, file_state(path)))
            pads = (frame.height // factor) * (frame.width // factor)
            ids += [markup.vision_start, *[markup.image_pad] * pads, markup.vision_end]
    context.prompt.extend([*ids, markup.turn_end, *markup.encode("\n")])


def written_ids(record: RoundRecord, markup: Markup) -> list[int]:
    """What a round's author wrote, as ids."""
    if record.token_ids is not None:
        return list(record.token_ids)
    return markup.encode(record.text) + [markup.turn_end] * (record.finish_reason is FinishReason.STOP)


def without_ids(trajectory: Trajectory) -> Trajectory:
    """The trajectory as a teacher's: texts, and no ids."""
    rounds = tuple(
        record.model_copy(update={"token_ids": None, "logprobs": None}) for record in trajectory.rounds
    )
    return trajectory.model_copy(update={"rounds": rounds})


def with_ids(trajectory: Trajectory, markup: Markup) -> Trajectory:
    """The trajectory of a script as if its texts had been sampled: every round with its ids."""
    rounds = tuple(
        record.model_copy(update={"token_ids": tuple(written_ids(record, markup))})
        for record in trajectory.rounds
    )
    return trajectory.model_copy(update={"rounds": rounds})
