"""Conversations of other trainers, made into trajectories again.

A conversation has texts and pictures, and a trajectory also says which frames the pictures are, what was
visible in each round, and how the answers are read. All of that follows from the clips and the texts: the
episode is played again on its clips with the given texts as its rounds, and the given messages as its prompts
and outcomes. Invariant: a trajectory is made only if everything that the conversation says agrees with what
the replay gives; otherwise the error says what does not.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vrthinker.data.pairs import Pair
from vrthinker.engine.base import (
    FinishReason,
    FrameSegment,
    Message,
    Role,
    RoundResult,
    Segment,
    Session,
    TextSegment,
)
from vrthinker.episode.episode import Episode, EpisodeItem
from vrthinker.episode.prompts import PromptTemplates, clean
from vrthinker.episode.settings import EpisodeSettings
from vrthinker.episode.tools.base import FramesShown
from vrthinker.episode.tools.registry import ToolRegistry
from vrthinker.episode.trajectory import Trajectory
from vrthinker.errors import InputError, VideoError, one_line
from vrthinker.exchange.sharegpt import Conversation, read_conversations
from vrthinker.video.frame_cache import FrameCache
from vrthinker.video.open import open_reader
from vrthinker.video.resize import ResizeSettings
from vrthinker.video.workspace import Workspace

ENGINE = "import:sharegpt"
"""The name of the engine in the records of imported traces."""
_LABEL = re.compile(r"\bframe (\d{1,9})\b[^\n]{0,80}\Z", re.IGNORECASE)
"""The label of a frame, right before its picture."""


@dataclass(frozen=True)
class Retelling:
    """Everything that is said about one episode.

    Attributes:
        last: The conversation with all rounds.
        asked: The task and each tool outcome, as they were when they were new: no frame had expired.
    """

    last: Conversation
    asked: tuple[tuple[str, ...], ...]


def import_traces(
    source: Path,
    pairs: Sequence[Pair],
    *,
    window: int | None = None,
    resize: ResizeSettings | None = None,
) -> Iterator[Trajectory | InputError]:
    """The trajectories of a sharegpt file. A trace that cannot be one gives the error that says why.

    Args:
        source: The file.
        pairs: The pairs that the traces are about, whose clips are opened.
        window: The window of traces that do not say it; None if all their frames stayed visible.
        resize: The frame sizes of the model that is to learn from the trajectories.

    Raises:
        InputError: The file cannot be read.
    """
    by_id = {pair.id: pair for pair in pairs}
    cache = FrameCache(0)  # no pixel is read
    for told in _retellings(source):
        if isinstance(told, InputError):
            yield told
            continue
        try:
            pair = _pair_of(told, by_id, pairs)
            yield _trajectory(told, pair, window, resize or ResizeSettings(), cache)
        except InputError as error:
            place = "" if str(error).startswith(told.last.place) else f"{told.last.place}: "
            yield InputError(f"{place}{error}")


def _retellings(source: Path) -> Iterator[Retelling | InputError]:
    """Conversations, with those that tell the rounds of one episode put together, wherever they stand."""
    groups: dict[object, list[tuple[int, Conversation]]] = {}
    for read in read_conversations(source):
        if isinstance(read, InputError):
            yield read
        elif read.record is None or read.record.round is None:
            yield Retelling(read, read.asked)
        else:
            key = (read.record.id, read.record.seed, read.record.rounds, read.asked[0], read.system)
            groups.setdefault(key, []).append((read.record.round, read))
    for group in groups.values():
        try:
            yield _joined(sorted(group, key=lambda told: told[0]))
        except InputError as error:
            yield error


def _joined(told: Sequence[tuple[int, Conversation]]) -> Retelling:
    conversations = [conversation for _, conversation in told]
    last, got = conversations[-1], [number for number, _ in told]
    assert last.record is not None
    if got != list(range(1, last.record.rounds + 1)):
        raise InputError(
            f"{last.place}: got rounds {one_line(', '.join(map(str, got)))} of trace "
            f"{one_line(repr(last.record.id))}, wanted a sample for each of 1 to {last.record.rounds}"
        )
    for number, one in enumerate(conversations, start=1):
        if one.rounds != last.rounds[:number] or len(one.asked) != number:
            raise InputError(
                f"{one.place}: tells the rounds before it otherwise than the trace's last sample"
            )
    return Retelling(last, tuple(one.asked[-1] for one in conversations))


def _pair_of(told: Retelling, by_id: Mapping[str, Pair], pairs: Sequence[Pair]) -> Pair:
    name, task = told.last.id, "".join(told.asked[0])
    if name is not None and name in by_id:
        pair = by_id[name]
        if clean(pair.prompt) not in task:
            raise InputError(f"its task has another caption than pair {one_line(repr(name))}")
        return pair
    if name is not None and told.last.record is not None:
        raise InputError(f"got a trace of pair {one_line(repr(name))}, which the pairs file lacks")
    found = [pair for pair in pairs if pair.prompt.strip() and clean(pair.prompt) in task]
    # A caption may be a part of another one.
    longest = max((len(pair.prompt) for pair in found), default=0)
    found = [pair for pair in found if len(pair.prompt) == longest]
    if len(found) != 1:
        raise InputError(
            f"got no id of a pair, and the captions of {len(found)} pairs in its task, wanted one: give the "
            "trace an id from the pairs file"
        )
    return found[0]


@dataclass
class _Retold(Episode):
    """An episode whose prompts and outcomes are given."""

    task: tuple[tuple[str, ...], ...] = ()
    system: str = ""
    _outcomes_told: int = field(default=0)

    def first_input(self, *, decode: bool = True) -> tuple[Message, ...]:
        numbers = self.item.first_frames or ()
        shown = self._visibility.show(0, numbers)
        segments = self._segments(shown)
        opening = [Message("system", (TextSegment(self.system),))] if self.system else []
        task = _filled("user", self.task[0], [segments[number] for number in numbers], "the task")
        self._first = (*opening, task)
        return self._first

    def show_outcome(self) -> None:
        assert self._received is not None
        round_number = len(self._visibility.rounds)
        segments: list[FrameSegment] = []
        for outcome in self._received.tool_outcomes:
            numbers = outcome.frame_numbers if isinstance(outcome, FramesShown) else ()
            view = outcome.view if isinstance(outcome, FramesShown) else None
            visible = self._visibility.show(round_number, numbers, view)
            segments += [self._segment(showing) for showing in visible]
        where = f"the outcome of round {round_number}"
        self._pending = (_filled("user", self.task[round_number], segments, where),)
        self._record(self._pending)


def _filled(role: Role, parts: Sequence[str], frames: Sequence[FrameSegment], where: str) -> Message:
    """A told message with its frames at the placeholders."""
    if len(parts) - 1 != len(frames):
        numbers = ", ".join(str(frame.shown.frame_number) for frame in frames) or "none"
        raise InputError(
            f"{where} has {len(parts) - 1} pictures, but {len(frames)} frames are shown there ({numbers}), "
            "as the clips, the calls and the window say"
        )
    segments: list[Segment] = []
    for position, part in enumerate(parts):
        if position:
            segments.append(frames[position - 1])
        if part:
            segments.append(TextSegment(clean(part)))
        label = _LABEL.search(part)
        if label is not None and position < len(frames):
            number = frames[position].shown.frame_number
            if int(label[1]) != number:
                raise InputError(
                    f"{where} labels a picture as frame {int(label[1])}, but frame {number} is shown there"
                )
    return Message(role, tuple(segments))


def _trajectory(
    told: Retelling, pair: Pair, window: int | None, resize: ResizeSettings, cache: FrameCache
) -> Trajectory:
    texts, record = told.last.rounds, told.last.record
    settings = _settings(told, window) if record is None else record.settings
    workspace = Workspace.open(
        pair.video_1,
        pair.video_2,
        reader=open_reader(),
        resize=resize,
        cache=cache,
        max_fps=settings.max_fps,
        frames_per_video=settings.frames_per_video,
        tolerate_truncation=settings.tolerate_truncation,
    )
    pictures = len(told.asked[0]) - 1
    if record is None:
        if pictures < 2:
            raise InputError(f"its task shows {pictures} pictures, wanted at least one frame of each clip")
        first = workspace.initial_frames(pictures)
    else:
        first = record.first_frames
        if (record.n_frames, record.n_frames_1) != (workspace.n_frames, workspace.n_frames_1):
            raise VideoError(
                pair.video_1,
                f"the clips of pair {one_line(repr(pair.id))} have {workspace.n_frames} frames, those of the "
                f"trace had {record.n_frames}",
            )
    if not first or not all(1 <= number <= workspace.n_frames for number in first):
        raise InputError(f"its first frames are {list(first)[:8]}, allowed: 1 to {workspace.n_frames}")
    episode = _Retold(
        EpisodeItem(
            pair.id,
            pair.prompt,
            lambda: workspace,
            pair.dataset,
            seed=0 if record is None else record.seed,
            first_frames=tuple(first),
        ),
        workspace,
        settings,
        _templates(),
        ToolRegistry(),
        ENGINE,
        task=told.asked,
        system=told.last.system,
    )
    _play(episode, texts)
    # How long the replay took says nothing about the trace.
    return episode.trajectory().model_copy(update={"latency_seconds": 0.0})


@functools.cache
def _templates() -> PromptTemplates:
    """Templates that an episode needs and a told one never renders."""
    return PromptTemplates.load()


def _play(episode: _Retold, texts: Sequence[str]) -> None:
    """Plays the episode with given texts to its verdict.

    Raises:
        InputError: The texts do not make an episode with a verdict.
    """
    try:
        episode.first_input(decode=False)
        for number, text in enumerate(texts, start=1):
            episode.enter_round()
            episode.receive(RoundResult(Session(0), text, FinishReason.STOP))
            if episode.outcome is not None:
                if episode.outcome.judgments is None:
                    raise InputError(f"gives no verdict: {episode.outcome.reason}")
                if number < len(texts):
                    raise InputError(
                        f"round {number} gives the final answer, but {len(texts)} rounds are there"
                    )
                return
            if number == len(texts):
                raise InputError(f"its last round ({number}) asks for frames instead of answering")
            episode.show_outcome()
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot be played again: {one_line(str(error))}") from None


def _settings(told: Retelling, window: int | None) -> EpisodeSettings:
    """The settings of a trace of others: what its texts and pictures need, and otherwise the defaults."""
    pictures = [len(parts) - 1 for parts in told.asked]
    default = EpisodeSettings()
    try:
        return EpisodeSettings(
            initial_frames=max(2, min(256, pictures[0])),
            retrieved_frames=max([default.retrieved_frames, *pictures[1:]]),
            window=window,
            max_rounds=max(default.max_rounds, len(told.last.rounds)),
        )
    except ValueError:
        raise InputError(
            f"has {len(told.last.rounds)} rounds of up to {max(pictures)} pictures, allowed: up to 64 rounds "
            "of 256 pictures"
        ) from None
