"""Trajectories as training sequences, with exactly the token ids, positions and frames of their rounds.

A sequence is a path of the replay (`replay.py`) with a loss mask. The loss falls on a round's tokens once, in
the context in which they were written. Tool outcomes, prompts and frames carry no loss (eq. 1 of the paper).
While no frame expires, consecutive rounds form one sequence. When a frame expires (`rerender`), a new
sequence starts. It repeats the earlier rounds as context, without a loss on them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vrthinker.engine.base import FrameKey
from vrthinker.engine.hf.markup import Markup
from vrthinker.episode.grammar import parse_round
from vrthinker.episode.tools.registry import ToolRegistry
from vrthinker.episode.trajectory import RoundRecord, Trajectory
from vrthinker.errors import InputError
from vrthinker.policy.parts import LearnedPart
from vrthinker.policy.replay import Path, replayed_paths, round_ids
from vrthinker.video.resize import ResizeSettings


@dataclass(frozen=True)
class TrainingSequence:
    """One context with the rounds that are learned in it.

    Attributes:
        id: The id of the trajectory.
        token_ids: The token ids, int64 `[tokens]`.
        positions: The M-RoPE positions as the engine would pass them, int64 `[3, tokens]`.
        loss_mask: True at the tokens to be predicted, bool `[tokens]`.
        frames: The index of the first placeholder and the key of each live frame, in order.
    """

    id: str
    token_ids: np.ndarray
    positions: np.ndarray
    loss_mask: np.ndarray
    frames: tuple[tuple[int, FrameKey], ...]

    def __len__(self) -> int:
        return len(self.token_ids)


def training_sequences(
    trajectory: Trajectory,
    markup: Markup,
    frame_factor: tuple[int, int],
    *,
    learned: LearnedPart = "rounds",
    resize: ResizeSettings | None = None,
    tools: ToolRegistry | None = None,
) -> list[TrainingSequence]:
    """The sequences of one trajectory. Every round's tokens are learned in exactly one of them.

    Args:
        trajectory: The trajectory of an episode under `rerender` memory.
        markup: The token ids of markers, and the encoding of text.
        frame_factor: The (height, width) of one merged patch in pixels.
        learned: The part of each round that is learned. For parts, rounds must be texts; for `snapshots`
            there may be only one.
        resize: The resizing of frames for the model to be trained, for a trajectory whose rounds are texts.
            By default frames have the recorded sizes.
        tools: The tools that the rounds could call; `select_frames` by default.

    Raises:
        InputError: The trajectory uses another memory mode, contradicts itself (`record_checks.py`), or
            shows a frame that is not on the model's grid.
        VideoError: A clip is not the one that was judged.
    """
    if trajectory.settings.memory != "rerender":
        got = trajectory.settings.memory
        raise InputError(f"memory: got {got!r}, allowed here: rerender; packs (packed: true) learn evict too")
    paths = learned_paths(trajectory, markup, frame_factor, learned=learned, resize=resize, tools=tools)
    return [_sequence(trajectory.id, path) for path in paths]


def learned_paths(
    trajectory: Trajectory,
    markup: Markup,
    frame_factor: tuple[int, int],
    *,
    learned: LearnedPart = "rounds",
    resize: ResizeSettings | None = None,
    tools: ToolRegistry | None = None,
) -> list[Path]:
    """The contexts of a trajectory's rounds in which something is learned, each up to the last such token.

    The arguments are those of `training_sequences`; the memory mode may be `evict` too.

    Raises:
        InputError: The trajectory contradicts itself (`record_checks.py`), or shows a frame that is not on
            the model's grid.
        VideoError: A clip is not the one that was judged.
    """
    ids_of = snapshot_ids if learned == "snapshots" else round_ids
    paths = replayed_paths(0, trajectory, markup, frame_factor, resize=resize, ids_of=ids_of, tools=tools)
    if learned == "calls":
        skipped = [_tokens_before_asking(record, markup) for record in trajectory.rounds]
        paths = [path.without([skipped[number] for number, _, _ in path.learned]) for path in paths]
    return [path for path in paths if path.learned]


def snapshot_ids(record: RoundRecord, markup: Markup) -> list[int]:
    """The tokens of a round's text up to the end of its snapshot."""
    snapshot = parse_round(record.text).snapshot
    if record.token_ids is not None or snapshot is None or record.tool is not None:
        raise InputError("reading lessons: got a round that is sampled, goes on, or has no snapshot")
    return markup.encode(record.text[: snapshot.span.end])


def _tokens_before_asking(record: RoundRecord, markup: Markup) -> int:
    """The number of a round's tokens before the last line of its thinking; all if it asks for nothing."""
    if record.token_ids is not None:
        raise InputError("learned calls: got a round that is sampled, allowed: rounds that are texts")
    think = parse_round(record.text).think
    if record.tool is None or think is None:
        return len(round_ids(record, markup))
    last_line = record.text.rfind("\n", think.content.start, think.content.end)
    before = markup.encode(record.text[: last_line if last_line >= 0 else think.content.start])
    if markup.encode(record.text)[: len(before)] != before:
        raise InputError("learned calls: got a tokenizer that joins the last line to the one before it")
    return len(before)


def _sequence(name: str, path: Path) -> TrainingSequence:
    mask = np.zeros(len(path.tokens), dtype=bool)
    for _, start, end in path.learned:
        mask[start:end] = True
    positions = [stretch.positions for stretch in path.stretches]
    positions.append(np.full((3, 1), path.next_position - 1, dtype=np.int64))
    frames, offset = [], 0
    for stretch in path.stretches:
        if stretch.frame is not None:
            frames.append((offset + 1, stretch.frame))
        offset += len(stretch)
    return TrainingSequence(name, path.tokens, np.concatenate(positions, axis=1), mask, tuple(frames))
