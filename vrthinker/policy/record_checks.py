"""Checks that a trajectory says what its own texts say, before anything is learned from it.

Trajectories are files, and files are edited: judgments are corrected by hand, calls are renumbered, frames
are cut out. A model that is trained on such a record learns a round in a context in which nobody wrote it.
So a record is only replayed if its texts, parsed again, give its judgments and recommended answers, if its
tool calls, run again, show the frames that it says were shown, if the visibility record that follows from
them is the record's, and if its frame numbers stand for frames of its clips.

A record may show less than its calls would show today, because version 0.1.0 showed nothing where today a
part is shown or a call is repaired. It may never show more, or other frames.

Source: method section 2.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence

from vrthinker.engine.hf.markup import Markup
from vrthinker.episode.dimensions import Confidence, Judgments
from vrthinker.episode.grammar import FinalAnswer, ParsedRound, ToolRequest, parse_round
from vrthinker.episode.prompts import clean
from vrthinker.episode.settings import EpisodeSettings
from vrthinker.episode.tools.base import FramesShown, ToolContext, ToolErrorKind, ToolOutcome
from vrthinker.episode.tools.registry import ToolRegistry
from vrthinker.episode.trajectory import (
    FrameRecord,
    FrameSegmentRecord,
    MessageRecord,
    RoundRecord,
    ToolRecord,
    Trajectory,
)
from vrthinker.errors import InputError, one_line
from vrthinker.video.workspace import evenly_spaced
from vrthinker.visibility import ShownFrame, VisibilityRecord, WindowMemory

_ENDS = re.compile(r"(?:<\|im_end\|>|<\|endoftext\|>|\s|\ufffd)+\Z")
"""What the end of a text may lack or have, compared with the ids that spell it."""
_NAMED = 4
"""The most showings that a message names."""
_EARLIER_NOTHING = (ToolErrorKind.UNKNOWN_FRAME, ToolErrorKind.TOO_MANY_FRAMES)
"""Kinds of errors for which version 0.1.0 showed nothing, where today a part of the frames is shown."""


def check_record(trajectory: Trajectory, tools: ToolRegistry | None = None) -> None:
    """Refuses a trajectory that contradicts itself.

    Args:
        trajectory: The trajectory. Its clips are not read.
        tools: The tools that its rounds could call; `select_frames` by default.

    Raises:
        InputError: The record and its texts disagree; the message names the trajectory, the round, and both
            sides.
    """
    try:
        _check_frames(trajectory)
        parsed = [parse_round(record.text) for record in trajectory.rounds]
        _check_rounds(trajectory, parsed, tools or ToolRegistry())
        _check_answers(trajectory, parsed)
    except _Contradiction as problem:
        raise InputError(
            f"trajectory {one_line(repr(trajectory.id))}{problem}; the record was edited, or another version "
            "made it: judge the pair again"
        ) from None


def check_ids(name: str, record: RoundRecord, markup: Markup) -> None:
    """Refuses a sampled round whose token ids do not spell its text.

    The text may lack what some servers leave out: special tokens, blanks and unfinished characters at its
    end. A round without ids is a text, and nothing is checked.

    Args:
        name: The trajectory's id, for the message.
        record: The round.
        markup: The encoding of the model to be trained.

    Raises:
        InputError: An id stands for no token of the model, or for a marker that no round can have; or the
            ids spell another text; or the log-probabilities are not one finite number per id.
    """
    place = f"trajectory {one_line(repr(name))}, round {record.round_number}"
    ids = record.token_ids
    if record.logprobs is not None and (
        ids is None or len(ids) != len(record.logprobs) or not all(map(math.isfinite, record.logprobs))
    ):
        raise InputError(
            f"{place}: logprobs: got {len(record.logprobs)} numbers for {len(ids or ())} token ids, wanted: "
            "a finite number for each; judge the pair again"
        )
    if ids is None:
        return
    strange = markup.unusable_id(ids)
    if strange is not None:
        raise InputError(
            f"{place}: token_ids: got {strange if abs(strange) < 1 << 64 else 'a huge number'}, allowed: ids "
            "of the model's tokens except turn and frame markers; train the model that wrote them, or judge "
            "the pair again"
        )
    wanted = _comparable(record.text)
    for spelled in (ids, markup.without_special(ids)):
        if _comparable(clean(markup.decode(list(spelled)))) == wanted:
            return
    raise InputError(
        f"{place}: token_ids do not spell its text with this model's tokenizer; train the model that wrote "
        "them, or judge the pair again"
    )


def _comparable(text: str) -> str:
    return _ENDS.sub("", unicodedata.normalize("NFC", text))


class _Contradiction(Exception):
    """A disagreement: the place in the trajectory, and both sides."""


def _in_round(number: int, problem: str) -> _Contradiction:
    return _Contradiction(f", round {number}: {problem}")


# Frames


def _check_frames(trajectory: Trajectory) -> None:
    """Checks that frame numbers stand for frames of the clips, and are where the numbering puts them."""
    lengths = [video.n_frames for video in trajectory.videos]
    numbered = (trajectory.n_frames_1, trajectory.n_frames - trajectory.n_frames_1)
    known = _known_places(trajectory.settings, lengths)
    for video, (n_frames, n_numbered) in enumerate(zip(lengths, numbered, strict=True), start=1):
        fits = 1 <= n_numbered <= n_frames if known is None else n_numbered == len(known[video - 1])
        if not fits:
            raise _Contradiction(f": video {video} has {n_frames} frames, the record numbers {n_numbered}")
    before = (0, 0, -1)
    for frame in sorted(trajectory.frames, key=lambda frame: frame.frame_number):
        first = trajectory.n_frames_1 if frame.frame_number > trajectory.n_frames_1 else 0
        position = frame.frame_number - first - 1
        here = (frame.video, frame.frame_number, frame.frame_index)
        fits = (
            1 <= frame.frame_number <= trajectory.n_frames
            and frame.video == (2 if first else 1)
            and (
                frame.frame_index == known[frame.video - 1][position]
                if known is not None
                else position <= frame.frame_index < lengths[frame.video - 1]
                # Frames that are skipped never change the order.
                and (here[0] != before[0] or (here[1] - before[1] <= here[2] - before[2]))
            )
            and (here[:2] != before[:2] or here == before)
        )
        if not fits:
            raise _Contradiction(
                f": frame {frame.frame_number} is given as video {frame.video}, frame index "
                f"{frame.frame_index}; frames are numbered 1 to {trajectory.n_frames}, video 1's up to "
                f"{trajectory.n_frames_1}, and the videos have {lengths[0]} and {lengths[1]} frames"
            )
        _check_view(trajectory, frame)
        before = here


def _known_places(settings: EpisodeSettings, lengths: Sequence[int]) -> list[Sequence[int]] | None:
    """The frame index of every numbered frame of each video; None if it depends on times (`max_fps`)."""
    if settings.max_fps is not None:
        return None
    picks = settings.frames_per_video
    return [range(n) if picks is None else evenly_spaced(n, picks) for n in lengths]


def _check_view(trajectory: Trajectory, frame: FrameRecord) -> None:
    if frame.view is None:
        return
    video, view = trajectory.videos[frame.video - 1], frame.view
    if not (0 <= view.top < view.bottom <= video.height and 0 <= view.left < view.right <= video.width):
        raise _Contradiction(
            f": frame {frame.frame_number} shows the region {tuple(view)}, the video has "
            f"{video.height} x {video.width} pixels"
        )


# Calls and what they show


def _check_rounds(trajectory: Trajectory, parsed: Sequence[ParsedRound], tools: ToolRegistry) -> None:
    """Plays the episode again: what its calls show, and what is live in each round."""
    visibility = VisibilityRecord(WindowMemory(trajectory.settings.window))
    if trajectory.rounds:
        first = trajectory.rounds[0].live
        try:
            given = set(visibility.show(0, [shown.frame_number for shown in first]))
        except ValueError as error:
            raise _in_round(1, str(error)) from None
        _check_messages(1, trajectory.first_input, given)
    called = 0
    for number, (record, read) in enumerate(zip(trajectory.rounds, parsed, strict=True), start=1):
        if record.round_number != number or number > trajectory.settings.max_rounds:
            allowed = f"{number}" if number <= trajectory.settings.max_rounds else "none"
            raise _in_round(record.round_number, f"wanted as round number: {allowed}")
        entry = visibility.enter()
        _compare(number, "live", record.live, entry.live)
        _compare(number, "expired", record.expired, entry.expired)
        if number == len(trajectory.rounds) and not record.tools:
            _check_messages(number, record.outcome_messages, set())
            return
        if not isinstance(read.ending, ToolRequest):
            raise _in_round(number, "its text calls no tool, the record says that it did")
        context = ToolContext(
            trajectory.n_frames,
            trajectory.settings.retrieved_frames,
            trajectory.n_frames_1,
            frozenset(shown.frame_number for earlier in visibility.rounds for shown in earlier.live),
            trajectory.seed,
            1 + called,
        )
        outcomes = tools.execute_all(read.ending.calls, context)
        called += len(record.tools)
        given = set()
        _check_outcomes(number, record.tools, outcomes, read)
        for tool in record.tools:
            given |= set(visibility.show(number, tool.frame_numbers, tool.view))
        _check_messages(number, record.outcome_messages, given)


def _check_outcomes(
    number: int, recorded: Sequence[ToolRecord], outcomes: Sequence[ToolOutcome], read: ParsedRound
) -> None:
    if len(recorded) != len(outcomes):
        raise _in_round(number, f"its text makes {len(outcomes)} calls, the record has {len(recorded)}")
    for tool, outcome in zip(recorded, outcomes, strict=True):
        said = (tool.error_kind, tool.frame_numbers, tool.view)
        if not isinstance(outcome, FramesShown):
            same = said == (outcome.kind, (), None)
            wanted = f"no frames ({outcome.kind})"
        else:
            showed_nothing = tool.error_kind is not None and not tool.frame_numbers and tool.view is None
            same = said == (None, outcome.frame_numbers, outcome.view) or (
                showed_nothing and (bool(read.repairs) or _showed_nothing_earlier(tool, outcome))
            )
            wanted = _spelled_frames(outcome.frame_numbers)
        if not same:
            got = (
                _spelled_frames(tool.frame_numbers)
                if tool.frame_numbers
                else f"no frames ({tool.error_kind})"
            )
            raise _in_round(number, f"its call shows {wanted}, the record says {got}")


def _showed_nothing_earlier(tool: ToolRecord, outcome: FramesShown) -> bool:
    return tool.error_kind in _EARLIER_NOTHING and outcome.note is not None


def _check_messages(number: int, messages: Sequence[MessageRecord], given: set[ShownFrame]) -> None:
    """Checks that messages contain no frames but those that were given to the next round."""
    shown = {
        segment.shown
        for message in messages
        for segment in message.segments
        if isinstance(segment, FrameSegmentRecord)
    }
    if strange := sorted(shown - given, key=lambda showing: showing.order):
        raise _in_round(number, f"its messages show {_spelled(strange)}, which no call gives")


def _compare(number: int, name: str, got: Sequence[ShownFrame], wanted: Sequence[ShownFrame]) -> None:
    # Which order they were written in has no meaning.
    if sorted(got, key=lambda s: s.order) != sorted(wanted, key=lambda s: s.order):
        raise _in_round(number, f"{name}: got {_spelled(got)}, the window says {_spelled(wanted)}")


def _spelled(showings: Sequence[ShownFrame]) -> str:
    named = [f"{shown.frame_number} of outcome {shown.outcome}" for shown in showings[:_NAMED]]
    return _listed(named, len(showings) - _NAMED)


def _spelled_frames(numbers: Sequence[int]) -> str:
    return f"frames {_listed([str(number) for number in numbers[:_NAMED]], len(numbers) - _NAMED)}"


def _listed(named: Sequence[str], more: int) -> str:
    return one_line(", ".join(named) + (f" and {more} more" if more > 0 else "")) if named else "nothing"


# Answers


def _check_answers(trajectory: Trajectory, parsed: Sequence[ParsedRound]) -> None:
    """Checks the recommended answers, the judgments and the confidence."""
    confidence: Confidence | None = None
    for number, (record, read) in enumerate(zip(trajectory.rounds, parsed, strict=True), start=1):
        ending = read.ending
        recommended = ending.recommendation if isinstance(ending, ToolRequest) else None
        said = record.recommendation
        if said is None:
            # Version 0.1.0 did not read answers that are repaired today.
            if recommended is not None and not read.repairs:
                raise _in_round(number, "its text recommends an answer, the record has none")
            continue
        if recommended is None:
            raise _in_round(number, "its text recommends no answer, the record has one")
        _compare_judgments(number, said.judgments, recommended.judgments)
        if said.confidence != recommended.confidence:
            raise _in_round(number, f"CF: got {said.confidence}, its text says {recommended.confidence}")
        confidence = recommended.confidence or confidence
    if trajectory.outcome.judgments is None:
        return
    final = parsed[-1].ending if parsed else None
    if not isinstance(final, FinalAnswer):
        raise _Contradiction(": its last text gives no answer, the record has judgments")
    _compare_judgments(len(parsed), trajectory.outcome.judgments, final.answer.judgments)
    confidence = final.answer.confidence or confidence
    if trajectory.outcome.confidence != confidence:
        raise _in_round(len(parsed), f"CF: got {trajectory.outcome.confidence}, its text says {confidence}")


def _compare_judgments(number: int, got: Judgments, wanted: Judgments) -> None:
    said, text = got.as_dict(), wanted.as_dict()
    for code, value in text.items():
        if said[code] != value:
            raise _in_round(number, f"{code}: got {said[code]}, its text says {value}")
