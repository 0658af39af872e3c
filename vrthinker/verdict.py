"""`Verdict`: which video is better per dimension, and why there is none if there is none.

It is made of the trajectories of its episodes alone; a judgment is never made up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from vrthinker.episode.dimensions import Confidence, Dimension, Judgments, Preference
from vrthinker.episode.orders import MergedOrders, merged_orders, turned_back
from vrthinker.episode.probabilities import Probabilities
from vrthinker.episode.runner import Finished
from vrthinker.episode.trajectory import StopReason, Trajectory, sum_or_none
from vrthinker.records.verdicts import OrderRecord, VerdictRecord
from vrthinker.video.clips import ClipSource, reader_of_clips


@dataclass(frozen=True, repr=False)
class Verdict:
    """The outcome of one judgment.

    Attributes:
        judgments: A preference per dimension, or None if the episode ended without a readable answer.
        overall: The preference of `judgments.OA`, or None.
        confidence: The confidence that the model stated, if it stated one.
        rounds: The number of rounds written.
        tool_calls: The number of tool calls that showed frames.
        frames_seen: The distinct frame numbers that the model saw, ascending.
        stop_reason: The reason why the episode ended.
        reason: The reason why there are no judgments; None if there are.
        notes: What a reader of the verdict should know (a truncated clip, random weights).
        trajectory: The full record of the episode.
        probabilities: How likely the model finds each label of its final answer; None if the engine cannot
            tell.
        probabilities_reason: The reason why some or all probabilities are not known; None if all are.
        other_order: The record of the second episode, in which the clips changed places, if both orders were
            judged. Then `judgments` and `probabilities` are those of both (`merge_orders`), and counts are
            sums.
    """

    judgments: Judgments | None
    overall: Preference | None
    confidence: Confidence | None
    rounds: int
    tool_calls: int
    frames_seen: tuple[int, ...]
    stop_reason: StopReason
    reason: str | None
    notes: tuple[str, ...]
    trajectory: Trajectory
    probabilities: Probabilities | None = None
    probabilities_reason: str | None = None
    other_order: Trajectory | None = None

    def __repr__(self) -> str:
        """One line, without the trajectory."""
        told: dict[str, object] = {"overall": self.overall}
        if self.judgments is None:
            told["reason"] = repr(self.reason)
        else:
            told |= {name: getattr(self.judgments, name) for name in ("TA", "VQ", "MQ")}
        told |= {
            "stop_reason": self.stop_reason,
            "rounds": self.rounds,
            "tool_calls": self.tool_calls,
            "frames_seen": f"{len(self.frames_seen)} frames",
            "notes": f"{len(self.notes)} notes",
        }
        return f"Verdict({', '.join(f'{name}={value}' for name, value in told.items())})"

    def _repr_html_(self) -> str:
        """A small table, for notebooks."""
        from vrthinker.report.verdict_html import verdict_html

        return verdict_html(self.trajectory, self.shown_notes, both=self.merged)

    @property
    def story(self) -> str:
        """The episode in a few sentences, made from its record alone.

        If both orders of the clips were judged, it is the episode in the pair's own order, and says so.
        """
        from vrthinker.report.story import told_story

        return told_story(self.trajectory, both=self.merged)

    def explain(self) -> dict[str, Any]:
        """Why the verdict is what it is, made of its record alone, as plain values that JSON can hold.

        Returns:
            `story`, in a few sentences, and `rounds`: what each saw, thought, leaned to and asked for
            (`vrthinker.report.story.explanation`). Of both orders of the clips they are those of the pair's
            own order. `found` is empty: what a judge's words mean is known of the synthetic world only, and
            `judge --json` has it.
        """
        from vrthinker.report.story import explanation

        return explanation(self.trajectory, both=self.merged)

    def report(self, path: str | PathLike[str], *, clips: Sequence[ClipSource] = ()) -> Path:
        """Writes the evidence page of the episode: both clips, and what each round saw and said.

        If both orders of the clips were judged, its rounds are those in the pair's own order, and its verdict
        is that of both.

        Args:
            path: The HTML file. An older page is replaced.
            clips: The clips that were judged, if they were in memory: a verdict does not keep them. Without
                them the page has no pictures, and says so. Files are read again by themselves.

        Raises:
            InputError: The path cannot be used, or a clip in memory is none of those that were judged.
            VRThinkerError: The file cannot be written.
        """
        from vrthinker.report.page.page import write_page

        reader = None
        if len(clips):
            from vrthinker.video.open import open_reader

            videos = self.trajectory.videos
            rates = [video.fps for video in videos if video.codec == "images"]
            files = open_reader(image_fps=rates[0]) if rates else open_reader()
            reader = reader_of_clips(clips, [video.path for video in videos], files)
        return write_page(path, self.trajectory, notes=self.shown_notes, both=self.merged, reader=reader)

    @classmethod
    def of(cls, trajectory: Trajectory, note: str | None = None) -> Verdict:
        """The verdict that a finished trajectory holds."""
        judgments = trajectory.outcome.judgments
        return cls(
            judgments=judgments,
            overall=judgments.OA if judgments is not None else None,
            confidence=trajectory.outcome.confidence,
            rounds=len(trajectory.rounds),
            tool_calls=trajectory.tool_calls,
            frames_seen=trajectory.frames_seen,
            stop_reason=trajectory.outcome.stop_reason,
            reason=trajectory.outcome.reason,
            notes=(*trajectory.notes, *((note,) if note else ())),
            trajectory=trajectory,
            probabilities=trajectory.outcome.probabilities,
            probabilities_reason=trajectory.outcome.probabilities_reason,
        )

    @classmethod
    def of_orders(cls, first: Trajectory, second: Trajectory, note: str | None = None) -> Verdict:
        """The verdict of two episodes about one pair, in the second of which the clips changed places."""
        merged = merged_orders(first, second)
        return replace(
            cls.of(first),
            **vars(merged) | {"notes": (*merged.notes, *((note,) if note else ()))},
            overall=None if merged.judgments is None else merged.judgments.OA,
            other_order=second,
        )

    @property
    def merged(self) -> MergedOrders | None:
        """What both orders of the clips say together; None if only one order was judged."""
        return None if self.other_order is None else merged_orders(self.trajectory, self.other_order)

    @property
    def shown_notes(self) -> tuple[str, ...]:
        """The notes, and a line about what each order of the clips gave, if both were judged."""
        if self.orders is None:
            return self.notes
        given = [order.judgment and Preference(order.judgment["OA"]) for order in self.orders]
        first, second = ("no verdict" if label is None else str(label) for label in given)
        agree = {True: "they agree", False: "they differ", None: "so there is none"}[self.consistent]
        both = "" if self.overall is None else f"; the verdict of both is {self.overall}"
        told = f"judged in both orders of the clips: overall {first} and {second}, {agree}{both}"
        return (*self.notes, told)

    @property
    def orders(self) -> list[OrderRecord] | None:
        """What each order gave, as of the pair's own order; None if only one order was judged."""
        both = (self.trajectory, self.other_order)
        return (
            None
            if self.other_order is None
            else [
                OrderRecord(judgment=None if j is None else j.as_dict(), probabilities=p)
                for j, p in (turned_back(t, i == 1) for i, t in enumerate(both) if t is not None)
            ]
        )

    @property
    def consistent(self) -> bool | None:
        """Whether both orders gave the same overall verdict; None unless both gave one."""
        return self.record(self.trajectory.id).consistent

    def score(self, dimension: Dimension | str = Dimension.OA) -> float | None:
        """How far video 1 wins in a dimension: 1 wholly, 0.5 no better than video 2, 0 not at all.

        P(video 1) + P(tie) / 2. Where probabilities are not known, the label is taken as certain.

        Returns:
            The score; None without a verdict.
        """
        if self.judgments is None:
            return None
        known = None if self.probabilities is None else self.probabilities[dimension]
        if known is not None:
            return known.video_1 + known.tie / 2
        return (0.5, 1.0, 0.0)[getattr(self.judgments, Dimension(dimension).value)]

    def to_dict(self) -> dict[str, Any]:
        """The verdict as plain values that JSON can hold: its record, without the trajectory."""
        return self.record(self.trajectory.id).model_dump(mode="json")

    def record(self, pair_id: str) -> VerdictRecord:
        """The verdict as a line of a results file."""
        both = [trajectory for trajectory in (self.trajectory, self.other_order) if trajectory is not None]
        trajectory = self.trajectory
        judgment = None
        if self.judgments is not None:
            judgment = self.judgments.as_dict()
        return VerdictRecord.model_validate(
            {
                "id": pair_id,
                "judgment": judgment,
                "confidence": None if self.confidence is None else int(self.confidence),
                "rounds": self.rounds,
                "tool_calls": self.tool_calls,
                "frames_seen": list(self.frames_seen),
                "stop_reason": self.stop_reason.value,
                "reason": self.reason,
                "notes": list(self.notes),
                "well_formed": all(t.well_formed for t in both) if all(t.rounds for t in both) else None,
                "repairs": sum(t.repairs for t in both),
                "latency_seconds": sum(t.latency_seconds for t in both),
                "prompt_tokens": sum_or_none([t.prompt_tokens for t in both]),
                "sampled_tokens": sum_or_none([t.sampled_tokens for t in both]),
                "seed": trajectory.seed,
                "model": trajectory.engine,
                "probabilities": self.probabilities,
                "probabilities_reason": self.probabilities_reason,
                "orders": self.orders,
                "readers": [video.reader or "memory" for video in trajectory.videos]
                if any(video.reader is not None for video in trajectory.videos)
                else [],
            }
        )


@dataclass(frozen=True)
class Judged(Finished):
    """One of many pairs as `Judge.judge_pairs` yields it.

    Attributes:
        verdict: The verdict, which may be one without judgments; None if the pair could not start, and
            `error` says why.
    """

    verdict: Verdict | None = None

    @property
    def id(self) -> str:
        """The id of the pair."""
        return self.item.id
