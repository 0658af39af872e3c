"""What went wrong in episodes on the synthetic world: every slip, in the order in which they were made.

A *slip* is a place where a round departs from what it should say. What a frame shows is compared with the
truth. Everything else is compared with what the judge itself had written before, so that one mistake is
counted once and not again in all that follows from it. The *first slip that matters* of an episode with a
wrong overall verdict is taken for its cause.

A judge names a frame by its place among those that its message showed, and a gap by the number of the first
frame that looks into it. Slips are told with frame numbers, since people look frames up by them.
"""

from __future__ import annotations

import enum
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from vrthinker.episode.dimensions import Judgments
from vrthinker.episode.trajectory import WRITTEN_STOPS, RoundRecord, Trajectory
from vrthinker.progress import counted
from vrthinker.world.reading import (
    ReadDecision,
    ReadFrame,
    ReadRound,
    Tally,
    read_round,
    read_snapshot,
)
from vrthinker.world.truth_reader import probes
from vrthinker.world.words import (
    HINT_WORDS,
    Found,
    defect_counts,
    defect_words,
    first_frame_words,
    frame_words,
)
from vrthinker.world.world import DEFECTS, Defect, Hint, PairTruth, judgments_from_counts


class SlipKind(enum.StrEnum):
    """The kinds of slips, in the order in which a round can make them."""

    FORM = "form_broken"
    """A round is not well formed, parts of it are not in the world's words, or it ends without a verdict."""
    FRAMES_LISTED = "frames_listed_wrong"
    """The snapshot leaves out a frame, lists one that there is not, one twice, or one under the other video.
    Frames about which there is nothing to say, or nothing is said, do no harm by this."""
    COLOR_MISSED = "wrong_color_missed"
    COLOR_INVENTED = "wrong_color_invented"
    NOISE_MISSED = "noise_missed"
    NOISE_INVENTED = "noise_invented"
    JUMP_MISSED = "off_lane_missed"
    JUMP_INVENTED = "off_lane_invented"
    COLOR_WORD = "color_word_wrong"
    """The colours of a frame are named wrong, although it says rightly whether there is a wrong one."""
    PLACE = "place_misread"
    """The place where the objects are is wrong, or how far they have come. This does no harm by itself."""
    HINT_MISSED = "hint_missed"
    HINT_INVENTED = "hint_invented"
    HINT_WORD = "hint_word_wrong"
    """Another hint is named than there is, which marks the same gap. This does no harm by itself."""
    EVENTS = "event_list_wrong"
    """The findings list other events than the judge's own snapshots say."""
    SUM = "sum_wrong"
    """A tally or a sum does not follow from the numbers that it is made of."""
    UNMARKED_GAP = "gap_without_hint_asked_for"
    TO_DO = "to_do_list_wrong"
    """The list of what is left is not the previous list without what is checked."""
    GAP_LEFT = "marked_gap_never_asked_for"
    """It answers although it has read a hint, has not looked there, and could have."""
    ANSWER = "answer_wrong"
    """A judgment of an answer does not follow from the judge's own tallies and sums."""
    FRAMES_ASKED = "frames_not_of_the_named_gap"
    """A call asks for other frames than those that look into the gaps that the decision names."""

    @property
    def words(self) -> str:
        """The kind in words."""
        return self.value.replace("_", " ")


MISSED = {
    Defect.COLOR: SlipKind.COLOR_MISSED,
    Defect.NOISE: SlipKind.NOISE_MISSED,
    Defect.JUMP: SlipKind.JUMP_MISSED,
}
INVENTED = {
    Defect.COLOR: SlipKind.COLOR_INVENTED,
    Defect.NOISE: SlipKind.NOISE_INVENTED,
    Defect.JUMP: SlipKind.JUMP_INVENTED,
}
READING = frozenset(
    {
        SlipKind.FRAMES_LISTED,
        *MISSED.values(),
        *INVENTED.values(),
        SlipKind.COLOR_WORD,
        SlipKind.PLACE,
        SlipKind.HINT_MISSED,
        SlipKind.HINT_INVENTED,
        SlipKind.HINT_WORD,
    }
)
"""The kinds that are counted per frame; the others are counted per round."""
_HARMLESS = frozenset({SlipKind.PLACE, SlipKind.HINT_WORD})


@dataclass(frozen=True)
class Slip:
    """One slip.

    Attributes:
        round_number: The round in which it was made, from 1.
        kind: Its kind.
        detail: What happened, in plain English.
        matters: Whether it can make the overall verdict wrong by itself.
    """

    round_number: int
    kind: SlipKind
    detail: str
    matters: bool = True


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


def new_frames(record: RoundRecord) -> list[int]:
    """The numbers of the frames that a round was the first to see, as the call before it showed them."""
    return [shown.frame_number for shown in record.live if shown.outcome == record.round_number - 1]


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
    new: list[int] = field(default_factory=list)
    """The frames that the round was the first to see, in the order in which they were shown."""
    first: list[int] = field(default_factory=list)
    """The frames of the first input, in the order in which they were shown."""
    starts: list[int] = field(default_factory=list)
    """The frames of the first input, ascending."""
    gaps: dict[int, int] = field(default_factory=dict)
    """The name of each gap -> the frame in front of it."""
    shown: set[int] = field(default_factory=set)
    marks: set[int] = field(default_factory=set)
    """The gaps that the judge itself has read as marked, each by the number of the frame in front of it."""
    asked: set[int] = field(default_factory=set)
    """The gaps that it has named in a round with a call."""
    to_do: list[int] = field(default_factory=list)
    """The gaps that are left, each by the name that the judge has for it."""
    counted: set[int] = field(default_factory=set)
    """The gaps with an event that it has counted."""
    tallies: list[Tally | None] = field(default_factory=lambda: [(0, 0, 0), (0, 0, 0)])

    def round(self, record: RoundRecord) -> None:
        """Adds the slips of the next round."""
        words = read_round(record.text)
        self.number = record.round_number
        self.new = new_frames(record)
        self.shown.update(self.new)
        if self.number == 1:
            self.first, self.starts = self.new, sorted(self.new)
            self.gaps = {self._gap_name(start): start for start in self.starts}
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
        self.slips.append(Slip(self.number, kind, detail, matters and kind not in _HARMLESS))

    # Form and snapshot

    def _form(self, record: RoundRecord, words: ReadRound) -> None:
        reasons = [failure.reason.value.replace("_", " ") for failure in record.failures]
        reasons += [f"repaired: {repair.kind.value.replace('_', ' ')}" for repair in record.repairs]
        reasons += [f"cannot be read: {part[:60]}" for part in words.unread]
        if reasons:
            more = f" and {len(reasons) - 3} more" if len(reasons) > 3 else ""
            self._add(SlipKind.FORM, "; ".join(dict.fromkeys(reasons[:3])) + more)

    def _snapshot(self, frames: Sequence[ReadFrame]) -> None:
        truths = {name: self._true_frame(name, number) for name, number in enumerate(self.new, start=1)}
        true_marks, own_marks = self._marks(truths.values()), self._marks(frames)
        left_out = sorted(truths.keys() - {frame.name for frame in frames})
        read: set[int] = set()
        for frame in frames:
            true = truths.get(frame.name)
            if true is None or frame.name in read:
                again = "" if true is None else " a second time"
                says_something = bool(frame.defects or frame.hints)
                self._add(
                    SlipKind.FRAMES_LISTED, f"lists {self._told(frame.name)}{again}", matters=says_something
                )
                continue
            while left_out and left_out[0] < frame.name:
                self._leave_out(truths[left_out.pop(0)])
            if frame.video != true.video:
                told = self._told(frame.name)
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
                if gap is not None and (frame.name not in truths or gap not in self.gaps)
            }
            self.to_do = sorted(strange | {self._gap_name(gap) for gap in own_marks})

    def _leave_out(self, true: ReadFrame) -> None:
        shown = " and ".join(
            filter(None, [defect_words(true.defects).strip(), *(_named(hint) for hint, _ in true.hints)])
        )
        self._add(
            SlipKind.FRAMES_LISTED,
            f"leaves out {self._told(true.name)}, which shows {shown or 'nothing'}",
            matters=bool(shown),
        )

    def _number(self, name: int) -> int | None:
        """The frame that has this name in the round; None if none has it."""
        return self.new[name - 1] if 0 < name <= len(self.new) else None

    def _gap_name(self, start: int) -> int:
        """The name of the gap behind a frame of the first input; the frame's own number if it is empty."""
        return min(self._probes(start), default=start)

    def _told(self, name: int) -> str:
        """A frame of the round for people."""
        shown_by = "first input" if self.number == 1 else "call"
        number = self._number(name)
        if number is None:
            return f"a frame no. {name} of the {shown_by}, which has {len(self.new)}"
        return f"frame {number} ({_ordinal(name)} of the {shown_by})"

    def _told_gap(self, gap: int) -> str:
        """A frame in front of a gap for people."""
        return f"{gap} ({_ordinal(self.first.index(gap) + 1)})"

    def _told_gaps(self, names: Iterable[int]) -> str:
        starts = [(name, self.gaps.get(name)) for name in names]
        told = [f"no. {name}" if start is None else self._told_gap(start) for name, start in starts]
        return ", ".join(told) or "nothing"

    def _marks(self, frames: Iterable[ReadFrame]) -> dict[int, tuple[int, Hint]]:
        """The gaps that hints mark: the frame in front of each -> the hint, behind its frame's name."""
        marks: dict[int, tuple[int, Hint]] = {}
        for frame in frames:
            number = self._number(frame.name)
            if number is None:
                continue
            before = [n for n in self.starts if n < number and self._video(n) == self._video(number)]
            for hint, named in frame.hints:
                by_place = before[-1] if hint is Hint.SPEED and before else number
                gap = by_place if named is None else self.gaps.get(named)
                if gap is not None:
                    marks.setdefault(gap, (frame.name, hint))
        return marks

    def _video(self, number: int) -> int:
        return 1 if number <= self.trajectory.n_frames_1 else 2

    def _true_frame(self, name: int, number: int) -> ReadFrame:
        if self.number == 1:
            span = self.span if self.trajectory.settings.max_rounds > 1 else None
            words = first_frame_words(self.truth, number, name, self.new, span)
        else:
            words = frame_words(self.truth, number, name)
        return read_snapshot(f"video {self._video(number)}: {words}")[0]

    def _frame(self, read: ReadFrame, true: ReadFrame) -> None:
        told = self._told(true.name)
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
        told = self._told(name)
        for gap, (frame, hint) in sorted(true.items()):
            if frame != name:
                continue
            if gap not in own:
                marked = f"which marks the gap behind {self._told_gap(gap)}"
                self._add(SlipKind.HINT_MISSED, f"{told} shows {_named(hint)}, {marked}")
            elif own[gap] != (frame, hint):
                other = f"{_named(own[gap][1])} on {self._told(own[gap][0])}"
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
                        f"video {video}: lists {self._listed(events)}, its snapshot says "
                        f"{self._listed(wanted.values())}",
                    )
                numbers = (self._number(name) for name, _ in events)
                self.counted.update(self._gap_of(number) for number in numbers if number is not None)
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
                        f"video {video}: {_spelled(findings.before)} + {self._listed(events)} is "
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
            number = self._number(frame.name)
            video = frame.video if number is None else self._video(number)
            gap = -frame.name if number is None else self._gap_of(number)
            if frame.defects and gap not in self.counted:
                events[video].setdefault(gap, (frame.name, frame.defects))
        return events

    def _listed(self, events: Iterable[Found]) -> str:
        told = []
        for name, defects in events:
            number = self._number(name)
            frame = f"no. {name}" if number is None else f"{number} ({_ordinal(name)})"
            told.append(frame + defect_words(defects))
        return "; ".join(told) or "nothing"

    def _gap_of(self, number: int) -> int:
        """The first-input frame at or before a frame; events of one gap are one event."""
        before = bisect_right(self.starts, number)
        return self.starts[before - 1] if before else number

    def _decision(self, record: RoundRecord, decision: ReadDecision | None) -> None:
        if decision is not None and decision.checked:
            for gap, told in ((self.gaps.get(name), self._told_gaps([name])) for name in decision.checked):
                if gap is None:
                    self._add(SlipKind.UNMARKED_GAP, f"names the gap behind {told}, which is no gap")
                elif gap in self.asked:
                    self._add(SlipKind.UNMARKED_GAP, f"names the gap behind {told} a second time")
                elif gap not in self.marks:
                    self._add(SlipKind.UNMARKED_GAP, f"names the gap behind {told}, where it read no hint")
            left = [name for name in self.to_do if name not in decision.checked]
            if decision.left is None and self.dialect.left:
                self._add(SlipKind.TO_DO, f"does not say that {self._told_gaps(left)} is left")
            elif decision.left is not None and list(decision.left) != left:
                said = self._told_gaps(decision.left)
                self._add(
                    SlipKind.TO_DO, f"says that {said} is left, its own list has {self._told_gaps(left)}"
                )
            self.to_do = left if decision.left is None else list(decision.left)
            if record.tools:
                self.asked.update(self._starts_of(decision.checked))
        is_last = record is self.trajectory.rounds[-1]
        calls_left = self.trajectory.settings.max_rounds - self.number
        if is_last and self.trajectory.outcome.judgments is not None and calls_left > 0:
            for gap in sorted(self.marks - self.asked):
                if not self._resolved(gap):
                    self._add(
                        SlipKind.GAP_LEFT,
                        f"read a hint to the gap behind {self._told_gap(gap)} and answers, with "
                        f"{counted(calls_left, 'call')} left",
                    )

    def _starts_of(self, names: Iterable[int]) -> list[int]:
        return [start for start in map(self.gaps.get, names) if start is not None]

    def _resolved(self, gap: int) -> bool:
        """Whether other frames than those that looked into the gap have shown all that is in it."""
        return gap in self.counted or set(self._probes(gap)) <= self.shown

    def _probes(self, gap: int) -> list[int]:
        """The frame numbers that look into the gap behind a frame of the first input."""
        ends = (self.trajectory.n_frames_1 + 1, self.trajectory.n_frames + 1)
        following = bisect_right(self.starts, gap)
        next_start = self.starts[following] if following < len(self.starts) else ends[1]
        end = min(next_start, ends[gap > self.trajectory.n_frames_1])
        return list(probes((gap, end), self.span))

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
        gaps = self._starts_of(decision.checked)
        wanted = sorted(number for gap in set(gaps) for number in self._probes(gap))
        notes = [tool.note for tool in record.tools if tool.note is not None]
        if not decision.checked:
            self._add(SlipKind.FRAMES_ASKED, f"says done and asks for {_numbers(asked)}")
        elif notes:
            self._add(SlipKind.FRAMES_ASKED, f"its call is cut: {notes[0]}")
        elif gaps and asked != wanted:
            looks = self._told_gaps(decision.checked)
            self._add(
                SlipKind.FRAMES_ASKED,
                f"looks behind {looks} and asks for {_numbers(asked)}, wanted {_numbers(wanted)}",
            )


def _ordinal(name: int) -> str:
    ending = "th" if 10 < name % 100 < 14 else {1: "st", 2: "nd", 3: "rd"}.get(name % 10, "th")
    return f"{name}{ending}"


def _named(hint: Hint) -> str:
    return HINT_WORDS[hint].strip()


def _said(frame: ReadFrame) -> str:
    return defect_words(frame.defects).strip() or "nothing"


def _spelled(tally: Tally | None) -> str:
    return "nothing" if tally is None else "/".join(map(str, tally))


def _numbers(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers)) or "nothing"
