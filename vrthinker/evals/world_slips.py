"""What went wrong in episodes on the synthetic world: every slip, in the order in which they were made.

A *slip* is a place where a round departs from what it should say. What a frame shows is compared with the
truth. Everything else is compared with what the judge itself had written before, so that one mistake is
counted once and not again in all that follows from it. The *first slip that matters* of an episode with a
wrong overall verdict is taken for its cause.

Slips are told with frame numbers, since people look frames up by them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from vrthinker.episode.dimensions import Judgments
from vrthinker.episode.trajectory import WRITTEN_STOPS, RoundRecord, Trajectory
from vrthinker.evals.world_gaps import SeenFrames
from vrthinker.evals.world_slip_kinds import HARMLESS, INVENTED, MISSED, Slip, SlipKind
from vrthinker.progress import counted
from vrthinker.world.reading import (
    ReadDecision,
    ReadFrame,
    ReadRound,
    Tally,
    read_round,
    read_snapshot,
)
from vrthinker.world.words import (
    HINT_WORDS,
    Found,
    defect_counts,
    defect_words,
    first_frame_words,
    frame_words,
)
from vrthinker.world.world import DEFECTS, Defect, Hint, PairTruth, judgments_from_counts


@dataclass(frozen=True)
class Dialect:
    """Which optional words a judge uses. What it never says is not missed.

    Attributes:
        places: Whether it says where the objects are.
        left: Whether it says which marked gaps are left for later.
    """

    places: bool = True
    left: bool = True


def dialect_of(trajectories: Iterable[Trajectory]) -> Dialect:
    """The dialect of a judge, from all its episodes: what it has had occasion to say and never said."""
    frames: list[bool] = []
    checks: list[bool] = []
    for trajectory in trajectories:
        for record in trajectory.rounds:
            words = read_round(record.text)
            if record.round_number == 1:
                frames += [frame.place is not None for frame in words.frames]
            if words.decision is not None and words.decision.checked:
                checks.append(words.decision.left is not None)
    return Dialect(places=any(frames) or not frames, left=any(checks) or not checks)


def is_judged(trajectory: Trajectory) -> bool:
    """Whether the episode ended by what the judge wrote, and not by an error."""
    return trajectory.outcome.judgments is not None or trajectory.outcome.stop_reason in WRITTEN_STOPS


def slips_of(
    trajectory: Trajectory, truth: PairTruth, *, span: float, dialect: Dialect | None = None
) -> list[Slip]:
    """The slips of an episode, in the order in which they were made.

    Args:
        trajectory: The episode. Its calls showed the frames that it asked for.
        truth: The truth about its pair, with the clips in the order in which they were judged.
        span: The value of `WorldConfig.span[0]`, which says how densely to look into a gap.
        dialect: The optional words that the judge uses; those of this episode by default.
    """
    walk = _Walk(trajectory, truth, span, dialect or dialect_of([trajectory]))
    for record in trajectory.rounds:
        walk.round(record)
    walk.end()
    return walk.slips


@dataclass
class _Walk:
    """Goes through an episode and remembers what the judge has written so far."""

    trajectory: Trajectory
    truth: PairTruth
    span: float
    dialect: Dialect
    slips: list[Slip] = field(default_factory=list)
    number: int = 0
    """The round that is read, from 1."""
    seen: SeenFrames = field(init=False)
    marks: set[int] = field(default_factory=set)
    """The gaps that the judge itself has read as marked, each by the number of the frame in front of it."""
    asked: set[int] = field(default_factory=set)
    """The gaps that it has named in a round with a call."""
    to_do: list[int] = field(default_factory=list)
    """The gaps that are left, each by the name that the judge has for it."""
    counted: set[int] = field(default_factory=set)
    """The gaps with an event that it has counted."""
    tallies: list[Tally | None] = field(default_factory=lambda: [(0, 0, 0), (0, 0, 0)])

    def __post_init__(self) -> None:
        self.seen = SeenFrames(self.trajectory, self.span)

    def round(self, record: RoundRecord) -> None:
        """Adds the slips of the next round."""
        words = read_round(record.text)
        self.number = record.round_number
        self.seen.enter(record)
        self._form(record, words)
        if words.frames or not words.unread:
            self._snapshot(words.frames)
        self._findings(words)
        self._decision(record, words.decision)
        self._answer(record, words)
        self._call(record, words.decision)

    def end(self) -> None:
        """Adds the slip of an episode without a verdict."""
        outcome = self.trajectory.outcome
        known = any(slip.kind is SlipKind.FORM and slip.round_number == self.number for slip in self.slips)
        if outcome.judgments is None and is_judged(self.trajectory) and not known:
            self._add(SlipKind.FORM, f"no verdict: {outcome.reason}")

    def _add(self, kind: SlipKind, detail: str, *, matters: bool = True) -> None:
        self.slips.append(Slip(self.number, kind, detail, matters and kind not in HARMLESS))

    # Form and snapshot

    def _form(self, record: RoundRecord, words: ReadRound) -> None:
        reasons = [failure.reason.value.replace("_", " ") for failure in record.failures]
        reasons += [f"repaired: {repair.kind.value.replace('_', ' ')}" for repair in record.repairs]
        reasons += [f"cannot be read: {part[:60]}" for part in words.unread]
        if reasons:
            more = f" and {len(reasons) - 3} more" if len(reasons) > 3 else ""
            self._add(SlipKind.FORM, "; ".join(dict.fromkeys(reasons[:3])) + more)

    def _snapshot(self, frames: Sequence[ReadFrame]) -> None:
        truths = {name: self._true_frame(name, number) for name, number in enumerate(self.seen.new, start=1)}
        true_marks, own_marks = self.seen.marks(truths.values()), self.seen.marks(frames)
        left_out = sorted(truths.keys() - {frame.name for frame in frames})
        read: set[int] = set()
        for frame in frames:
            true = truths.get(frame.name)
            if true is None or frame.name in read:
                again = "" if true is None else " a second time"
                says_something = bool(frame.defects or frame.hints)
                self._add(
                    SlipKind.FRAMES_LISTED,
                    f"lists {self.seen.told(frame.name)}{again}",
                    matters=says_something,
                )
                continue
            while left_out and left_out[0] < frame.name:
                self._leave_out(truths[left_out.pop(0)])
            if frame.video != true.video:
                told = self.seen.told(frame.name)
                self._add(SlipKind.FRAMES_LISTED, f"lists {told} under video {frame.video}")
            read.add(frame.name)
            self._frame(frame, true)
            self._hints(frame.name, own_marks, true_marks)
        for name in left_out:
            self._leave_out(truths[name])
        if self.number == 1:
            self.marks = set(own_marks)
            # A hint on a frame that there is not marks no gap, but stays on the judge's own list.
            strange = {
                gap
                for frame in frames
                for _, gap in frame.hints
                if gap is not None and (frame.name not in truths or gap not in self.seen.gaps)
            }
            self.to_do = sorted(strange | {self.seen.gap_name(gap) for gap in own_marks})

    def _leave_out(self, true: ReadFrame) -> None:
        shown = " and ".join(
            filter(None, [defect_words(true.defects).strip(), *(_named(hint) for hint, _ in true.hints)])
        )
        self._add(
            SlipKind.FRAMES_LISTED,
            f"leaves out {self.seen.told(true.name)}, which shows {shown or 'nothing'}",
            matters=bool(shown),
        )

    def _true_frame(self, name: int, number: int) -> ReadFrame:
        if self.number == 1:
            span = self.span if self.trajectory.settings.max_rounds > 1 else None
            words = first_frame_words(self.truth, number, name, self.seen.new, span)
        else:
            words = frame_words(self.truth, number, name)
        return read_snapshot(f"video {self.seen.video(number)}: {words}")[0]

    def _frame(self, read: ReadFrame, true: ReadFrame) -> None:
        told = self.seen.told(true.name)
        for defect in DEFECTS:
            if (defect in read.defects) != (defect in true.defects):
                kind = (MISSED if defect in true.defects else INVENTED)[defect]
                self._add(kind, f"{told} shows {_said(true)}, read as {_said(read)}")
        flag_is_right = (Defect.COLOR in read.defects) == (Defect.COLOR in true.defects)
        if flag_is_right and read.colors != true.colors:
            said = " ".join(read.colors) or "no color"
            self._add(SlipKind.COLOR_WORD, f"{told} is {' '.join(true.colors)}, read as {said}")
        if self.dialect.places and true.place is not None and read.place != true.place:
            self._add(SlipKind.PLACE, f"{told} is at {true.place}, read as {read.place or 'none'}")
        elif read.come is not None and read.come != true.come:
            before = (
                "is the first of its clip" if true.come is None else f"has come {counted(true.come, 'place')}"
            )
            self._add(SlipKind.PLACE, f"{told} {before}, read as {read.come}")

    def _hints(
        self, name: int, own: Mapping[int, tuple[int, Hint]], true: Mapping[int, tuple[int, Hint]]
    ) -> None:
        """Compares the gaps that a frame of the first input marks."""
        told = self.seen.told(name)
        for gap, (frame, hint) in sorted(true.items()):
            if frame != name:
                continue
            if gap not in own:
                marked = f"which marks the gap behind {self.seen.told_gap(gap)}"
                self._add(SlipKind.HINT_MISSED, f"{told} shows {_named(hint)}, {marked}")
            elif own[gap] != (frame, hint):
                other = f"{_named(own[gap][1])} on {self.seen.told(own[gap][0])}"
                self._add(SlipKind.HINT_WORD, f"{told} shows {_named(hint)}, read as {other}")
        for gap, (frame, hint) in sorted(own.items()):
            if frame == name and gap not in true:
                self._add(SlipKind.HINT_INVENTED, f"{told} does not show {_named(hint)}")

    # Thinking

    def _findings(self, words: ReadRound) -> None:
        expected = self._own_events(words.frames)
        for video, findings in enumerate(words.findings, start=1):
            events = findings.events
            wanted = expected[video]
            if events is not None:
                if {(n, frozenset(d)) for n, d in events} != {(n, frozenset(d)) for n, d in wanted.values()}:
                    self._add(
                        SlipKind.EVENTS,
                        f"video {video}: lists {self.seen.listed(events)}, its snapshot says "
                        f"{self.seen.listed(wanted.values())}",
                    )
                numbers = (self.seen.number(name) for name, _ in events)
                self.counted.update(self.seen.gap_of(number) for number in numbers if number is not None)
            earlier = self.tallies[video - 1]
            if findings.before is not None and earlier not in (None, findings.before):
                self._add(
                    SlipKind.SUM,
                    f"video {video}: begins with {_spelled(findings.before)}, "
                    f"the tally was {_spelled(earlier)}",
                )
            if findings.before is not None and findings.after is not None and events is not None:
                counts = defect_counts(events)
                a, b, c = (x + y for x, y in zip(findings.before, counts, strict=True))
                if findings.after != (a, b, c):
                    self._add(
                        SlipKind.SUM,
                        f"video {video}: {_spelled(findings.before)} + {self.seen.listed(events)} is "
                        f"{_spelled((a, b, c))}, written as {_spelled(findings.after)}",
                    )
            if findings.after is not None and findings.total != sum(findings.after):
                self._add(
                    SlipKind.SUM,
                    f"video {video}: the sum of {_spelled(findings.after)} is {sum(findings.after)}, "
                    f"written as {findings.total}",
                )
            self.tallies[video - 1] = findings.after
        totals = [findings.total for findings in words.findings]
        if words.sums is not None and None not in totals and list(words.sums) != totals:
            written = " to ".join(map(str, words.sums))
            self._add(SlipKind.SUM, f"the sums are {totals[0]} to {totals[1]}, written as {written}")

    def _own_events(self, frames: Sequence[ReadFrame]) -> dict[int, dict[int, Found]]:
        """Video -> gap -> the event that the snapshot says is there and that was not counted before.

        A frame that there is not is taken for a gap of its own.
        """
        events: dict[int, dict[int, Found]] = {1: {}, 2: {}}
        for frame in sorted(frames, key=lambda frame: frame.name):
            number = self.seen.number(frame.name)
            video = frame.video if number is None else self.seen.video(number)
            gap = -frame.name if number is None else self.seen.gap_of(number)
            if frame.defects and gap not in self.counted:
                events[video].setdefault(gap, (frame.name, frame.defects))
        return events

    def _decision(self, record: RoundRecord, decision: ReadDecision | None) -> None:
        if decision is not None and decision.checked:
            for gap, told in (
                (self.seen.gaps.get(name), self.seen.told_gaps([name])) for name in decision.checked
            ):
                if gap is None:
                    self._add(SlipKind.UNMARKED_GAP, f"names the gap behind {told}, which is no gap")
                elif gap in self.asked:
                    self._add(SlipKind.UNMARKED_GAP, f"names the gap behind {told} a second time")
                elif gap not in self.marks:
                    self._add(SlipKind.UNMARKED_GAP, f"names the gap behind {told}, where it read no hint")
            left = [name for name in self.to_do if name not in decision.checked]
            if decision.left is None and self.dialect.left:
                self._add(SlipKind.TO_DO, f"does not say that {self.seen.told_gaps(left)} is left")
            elif decision.left is not None and list(decision.left) != left:
                said = self.seen.told_gaps(decision.left)
                self._add(
                    SlipKind.TO_DO, f"says that {said} is left, its own list has {self.seen.told_gaps(left)}"
                )
            self.to_do = left if decision.left is None else list(decision.left)
            if record.tools:
                self.asked.update(self.seen.starts_of(decision.checked))
        is_last = record is self.trajectory.rounds[-1]
        calls_left = self.trajectory.settings.max_rounds - self.number
        if is_last and self.trajectory.outcome.judgments is not None and calls_left > 0:
            for gap in sorted(self.marks - self.asked):
                if not self._resolved(gap):
                    self._add(
                        SlipKind.GAP_LEFT,
                        f"read a hint to the gap behind {self.seen.told_gap(gap)} and answers, with "
                        f"{counted(calls_left, 'call')} left",
                    )

    def _resolved(self, gap: int) -> bool:
        """Whether other frames than those that looked into the gap have shown all that is in it."""
        return gap in self.counted or set(self.seen.probes(gap)) <= self.seen.shown

    # Ending

    def _answer(self, record: RoundRecord, words: ReadRound) -> None:
        final = record is self.trajectory.rounds[-1] and not record.tools
        if final:
            given: Judgments | None = self.trajectory.outcome.judgments
        else:
            given = None if record.recommendation is None else record.recommendation.judgments
        if given is None:
            return
        wrong: dict[str, str] = {}
        first, second = self.tallies
        if first is not None and second is not None:
            due = judgments_from_counts(first, second)
            tallies = f"{_spelled(first)} to {_spelled(second)}"
            wrong = {
                code: f"{code}={value} does not follow from {tallies}"
                for code, value in given.as_dict().items()
                if code != "OA" and value != due.as_dict()[code]
            }
        if words.sums is not None:
            a, b = words.sums
            if given.OA != judgments_from_counts((a, 0, 0), (b, 0, 0)).OA:
                wrong["OA"] = f"OA={given.OA.value} does not follow from the sums {a} to {b}"
        if wrong:
            where = "" if final else "recommended: "
            # Only the overall judgment of the last round can make the overall verdict wrong.
            self._add(SlipKind.ANSWER, where + "; ".join(wrong.values()), matters=final and "OA" in wrong)

    def _call(self, record: RoundRecord, decision: ReadDecision | None) -> None:
        if not record.tools or decision is None or decision.looks_around:
            return
        errors = [tool.error for tool in record.tools if tool.error is not None]
        if errors:
            if not record.failures:
                self._add(SlipKind.FRAMES_ASKED, f"its call fails: {errors[0]}")
            return
        asked = sorted({number for tool in record.tools for number in tool.frame_numbers})
        gaps = self.seen.starts_of(decision.checked)
        wanted = sorted(number for gap in set(gaps) for number in self.seen.probes(gap))
        notes = [tool.note for tool in record.tools if tool.note is not None]
        if not decision.checked:
            self._add(SlipKind.FRAMES_ASKED, f"says done and asks for {_numbers(asked)}")
        elif notes:
            self._add(SlipKind.FRAMES_ASKED, f"its call is cut: {notes[0]}")
        elif gaps and asked != wanted:
            looks = self.seen.told_gaps(decision.checked)
            self._add(
                SlipKind.FRAMES_ASKED,
                f"looks behind {looks} and asks for {_numbers(asked)}, wanted {_numbers(wanted)}",
            )


def _named(hint: Hint) -> str:
    return HINT_WORDS[hint].strip()


def _said(frame: ReadFrame) -> str:
    return defect_words(frame.defects).strip() or "nothing"


def _spelled(tally: Tally | None) -> str:
    return "nothing" if tally is None else "/".join(map(str, tally))


def _numbers(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers)) or "nothing"
