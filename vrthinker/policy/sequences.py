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
    only_snapshots: bool = False,
    resize: ResizeSettings | None = None,
    tools: ToolRegistry | None = None,
) -> list[TrainingSequence]:
    """The sequences of one trajectory. Every round's tokens are learned in exactly one of them.

    Args:
        trajectory: The trajectory of an episode under `rerender` memory.
        markup: The token ids of markers, and the encoding of text.
        frame_factor: The (height, width) of one merged patch in pixels.
        only_snapshots: Whether a round is learned only up to the end of its snapshot, as in reading lessons.
            There may be only one round, and it must be a text.
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
        raise InputError(f"memory: got {got!r}, allowed here: rerender; `pack_group` takes evict too")
    ids_of = snapshot_ids if only_snapshots else round_ids
    paths = replayed_paths(0, trajectory, markup, frame_factor, resize=resize, ids_of=ids_of, tools=tools)
    return [_sequence(trajectory.id, path) for path in paths]


def snapshot_ids(record: RoundRecord, markup: Markup) -> list[int]:
    """The tokens of a round's text up to the end of its snapshot."""
    snapshot = parse_round(record.text).snapshot
    if record.token_ids is not None or snapshot is None or record.tool is not None:
        raise InputError("reading lessons: got a round that is sampled, goes on, or has no snapshot")
    return markup.encode(record.text[: snapshot.span.end])


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
