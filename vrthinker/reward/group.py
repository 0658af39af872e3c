"""What terms read: the truth about an episode, the accuracy of an answer, and the judged episodes of a group.

A *failed* episode ended by an error and not by what the model wrote. It says nothing about the policy, so it
has no reward and leaves its group. An episode that the model ended without a verdict (by a token limit, an
unreadable ending, the round limit) is not failed: it is judged like the others and earns little.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vrthinker.episode.dimensions import Dimension, Judgments, Preference
from vrthinker.episode.trajectory import WRITTEN_STOPS, Trajectory
from vrthinker.errors import InputError
from vrthinker.reward.captions import answers_in

_PARTS = tuple(dimension.value for dimension in Dimension if dimension is not Dimension.OA)


@dataclass(frozen=True)
class EpisodeTruth:
    """What is known about the pair of one episode, in the order in which the episode saw the clips.

    Attributes:
        labels: The preferences by dimension (`TA`, `VQ`, `MQ`, `OA`): 0 for a tie, 1 or 2 for the better
            video. A dimension without a label is not checked. There is at least one.
        evidence: The frames that show what matters (hidden or marked events), as half-open ranges of frame
            numbers of the workspace, from 1. None if they are unknown; empty if there are none.

    Raises:
        InputError: A label or a range is not as described.
    """

    labels: Mapping[str, int]
    evidence: tuple[tuple[int, int], ...] | None = None

    def __post_init__(self) -> None:
        if not self.labels:
            raise InputError(
                "labels: got none, wanted at least one of TA, VQ, MQ and OA; leave the pair out of training"
            )
        for code, value in self.labels.items():
            if code not in Dimension.__members__ or value not in (0, 1, 2):
                raise InputError(f"labels: got {code}={value}, allowed: TA, VQ, MQ and OA with 0, 1 or 2")
        for first, end in self.evidence or ():
            if not 1 <= first < end:
                raise InputError(
                    f"evidence: got frames {first} to {end} (half-open), allowed: ranges of at least one "
                    "frame; frame numbers begin at 1"
                )


def is_failed(trajectory: Trajectory) -> bool:
    """Whether the episode ended by an error, and not by what the model wrote."""
    outcome = trajectory.outcome
    return outcome.judgments is None and outcome.stop_reason not in WRITTEN_STOPS


def answer_accuracy(judgments: Judgments, labels: Mapping[str, int], alpha: float) -> float:
    """r_acc of one answer, from 0 to 1.

    With all four labels this is the paper's alpha * [OA right] + (1 - alpha) * (share of TA, VQ and MQ that
    are right). Ours: the share is over the dimensions that have labels. If only OA or only dimensions have
    labels, that part alone is the accuracy, with all of the weight.

    Args:
        judgments: The answer's judgments.
        labels: The labels, in the same order of the clips.
        alpha: The weight of the overall judgment.

    Source: method section 4, accuracy of one answer.
    """
    answer = judgments.as_dict()
    right = {code: answer[code] == label for code, label in labels.items()}
    parts = [right[code] for code in _PARTS if code in right]
    if not parts:
        return float(right["OA"])
    share = sum(parts) / len(parts)
    return alpha * right["OA"] + (1 - alpha) * share if "OA" in right else share


@dataclass(frozen=True)
class JudgedGroup:
    """The episodes of a group that are not failed, with what several terms need to know about them.

    Attributes:
        trajectories: The episodes, of one pair. The order of the clips may differ between them.
        truths: The truth for each episode.
        alpha: The alpha of r_acc.
        repeats_caption: Whether each episode's verdict stands in its caption already.
        accuracy: r_acc of each episode's final answer; 0 without a verdict, and for a verdict that only
            repeats the caption.
        overall: Each episode's overall judgment in the order of the first episode's clips; None without a
            verdict.
    """

    trajectories: tuple[Trajectory, ...]
    truths: tuple[EpisodeTruth, ...]
    alpha: float
    repeats_caption: tuple[bool, ...]
    accuracy: tuple[float, ...]
    overall: tuple[Preference | None, ...]

    @classmethod
    def of(
        cls, trajectories: Sequence[Trajectory], truths: Sequence[EpisodeTruth], alpha: float
    ) -> JudgedGroup:
        """The group of episodes, none of them failed.

        Raises:
            InputError: The episodes are of different clips, or evidence lies outside an episode's workspace.
        """
        standing = {caption: answers_in(caption) for caption in {t.prompt for t in trajectories}}
        repeats, accuracy = [], []
        for trajectory, truth in zip(trajectories, truths, strict=True):
            _check_evidence(trajectory, truth)
            judgments = trajectory.outcome.judgments
            repeats.append(judgments in standing[trajectory.prompt])
            earns = judgments is not None and not repeats[-1]
            accuracy.append(
                answer_accuracy(judgments, truth.labels, alpha) if earns and judgments is not None else 0.0
            )
        return cls(
            tuple(trajectories),
            tuple(truths),
            alpha,
            tuple(repeats),
            tuple(accuracy),
            tuple(_overall(trajectory, trajectories[0]) for trajectory in trajectories),
        )


def _check_evidence(trajectory: Trajectory, truth: EpisodeTruth) -> None:
    for first, end in truth.evidence or ():
        if end > trajectory.n_frames + 1:
            raise InputError(
                f"evidence: got frames {first} to {end} (half-open), allowed: frames 1 to "
                f"{trajectory.n_frames} of episode {trajectory.id!r}; give the numbers of its workspace"
            )


def _overall(trajectory: Trajectory, first: Trajectory) -> Preference | None:
    """The overall judgment in the order of the first episode's clips."""
    clips, wanted = ([video.path for video in episode.videos] for episode in (trajectory, first))
    if clips not in (wanted, wanted[::-1]):
        raise InputError(
            f"group: got episode {trajectory.id!r} of other clips than episode {first.id!r}, wanted episodes "
            "of one pair, in any order of its clips"
        )
    judgments = trajectory.outcome.judgments
    if judgments is None:
        return None
    return judgments.OA if clips == wanted else judgments.OA.swapped()
