"""An episode in a few sentences, made from its record alone.

An example: "First a tie. It asked for 8 frames, found noise in 14 of video 1, and changed to video 2."
Frames have their numbers in the workspace. What was found is told where a reader of the judge's words is
given, or where the judge itself names a frame that it has just been shown: then its words are quoted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from vrthinker.episode.dimensions import Judgments, Preference
from vrthinker.episode.grammar import Element, parse_round
from vrthinker.episode.orders import MergedOrders
from vrthinker.episode.trajectory import RoundRecord, Trajectory
from vrthinker.progress import counted

Findings = Mapping[int, str]
"""Frame number -> what was found in that frame, in a few words."""

_MAX_QUOTE = 90
_SENTENCE = re.compile(r"[^.;!?\n]+")
_NAMED_FRAME = re.compile(r"\bframe (\d{1,6})\b", re.IGNORECASE | re.ASCII)


def story(trajectory: Trajectory, findings: Sequence[Findings] = ()) -> str:
    """The episode in words.

    Args:
        trajectory: The record.
        findings: For each round, what it found in the frames that it was just shown. Without them, a
            sentence that names such a frame is quoted.
    """
    rounds = trajectory.rounds
    if not rounds:
        return f"It wrote nothing: {_short(trajectory.outcome.reason or 'the episode ended')}."
    answers = [_answer(trajectory, number) for number in range(len(rounds))]
    n_first = len(rounds[0].live)
    if len(rounds) == 1 and answers[0] is not None and trajectory.outcome.judgments is not None:
        return f"It answered from the first {counted(n_first, 'frame')}: {_verdict(answers[0])}."
    sentences = ["First no answer." if answers[0] is None else f"First {_named(answers[0].OA)}."]
    known = answers[0]
    for number in range(1, len(rounds)):
        steps = [_asked(rounds[number - 1])]
        found = findings[number] if number < len(findings) else {}
        steps += _found(trajectory, found) or _quoted(rounds[number - 1], rounds[number])
        now = answers[number]
        if now is not None:
            steps.append(_changed(known, now, is_last=number == len(rounds) - 1))
        known = now or known
        sentences.append(
            ("It " if number == 1 else "Then it ") + _listed([step for step in steps if step]) + "."
        )
    if trajectory.outcome.judgments is None:
        sentences.append(f"It ended without a verdict: {_short(trajectory.outcome.reason or '')}.")
    return " ".join(sentences)


def told_story(
    trajectory: Trajectory, findings: Sequence[Findings] = (), *, both: MergedOrders | None = None
) -> str:
    """The story as it stands beside a verdict.

    Args:
        trajectory: The record; that of the first episode, if both orders of the clips were judged.
        findings: What each round found, as `story` takes it.
        both: What both orders say together, if both were judged. Then the story says which order it tells of.
    """
    told = story(trajectory, findings)
    return told if both is None else f"In the pair's own order: {told}"


def explanation(
    trajectory: Trajectory, findings: Sequence[Findings] = (), *, both: MergedOrders | None = None
) -> dict[str, Any]:
    """Why the verdict is what it is, as values that JSON can hold: the story, and what it is made of.

    Args:
        trajectory: The record; that of the first episode, if both orders of the clips were judged.
        findings: What each round found, as `story` takes it.
        both: What both orders say together, if both were judged.

    Returns:
        `story`, and `rounds`: for each its `round` from 1, the frame numbers it could see (`frames`), its
        `snapshot` and `thinking` (null where it has none), the judgments that it leaned to or gave
        (`judgment`, null without any), the frame numbers that its calls showed (`shown`) and what they
        refused, in words (`refused`), and what was `found` in the frames that it was just shown, by frame
        number, where that is known.
    """
    rounds = []
    for number, record in enumerate(trajectory.rounds):
        read, answer = parse_round(record.text), _answer(trajectory, number)
        rounds.append(
            {
                "round": number + 1,
                "frames": sorted({shown.frame_number for shown in record.live}),
                "snapshot": _content(record.text, read.snapshot),
                "thinking": _content(record.text, read.think),
                "judgment": None if answer is None else answer.as_dict(),
                "shown": sorted({frame for tool in record.tools for frame in tool.frame_numbers}),
                "refused": [text for tool in record.tools for text in (tool.error, tool.note) if text],
                "found": {str(f): what for f, what in findings[number].items()}
                if number < len(findings)
                else {},
            }
        )
    return {"story": told_story(trajectory, findings, both=both), "rounds": rounds}


def _content(text: str, element: Element | None) -> str | None:
    return None if element is None else text[element.content.start : element.content.end].strip()


def first_overall(trajectory: Trajectory) -> Preference | None:
    """The overall preference of the first round; None if it has none."""
    answer = _answer(trajectory, 0) if trajectory.rounds else None
    return None if answer is None else answer.OA


def _answer(trajectory: Trajectory, number: int) -> Judgments | None:
    record = trajectory.rounds[number]
    if record.recommendation is not None:
        return record.recommendation.judgments
    return trajectory.outcome.judgments if number == len(trajectory.rounds) - 1 else None


def _named(preference: Preference) -> str:
    return "a tie" if preference is Preference.TIE else str(preference)


def _verdict(judgments: Judgments) -> str:
    return "a tie" if judgments.OA is Preference.TIE else f"{judgments.OA} is better"


def _asked(record: RoundRecord) -> str:
    """What a round asked for, and what it got."""
    shown = sum(len(tool.frame_numbers) for tool in record.tools)
    if shown:
        return f"asked for {counted(shown, 'frame')}"
    return "asked for frames and got none" if record.tools else "went on"


def _changed(before: Judgments | None, now: Judgments, *, is_last: bool) -> str:
    if before is None:
        return f"{'answered' if is_last else 'leaned to'} {_named(now.OA)}"
    if before.OA is not now.OA:
        return f"changed to {_named(now.OA)}"
    earlier = before.as_dict()
    others = [code for code, value in now.as_dict().items() if earlier[code] != value]
    if others:
        return f"stayed with {_named(now.OA)} but changed {_and(others)}"
    return f"stayed with {_named(now.OA)}"


def _found(trajectory: Trajectory, findings: Findings) -> list[str]:
    if not findings:
        return []
    told = [
        f"{what} in {number} of video {1 if number <= trajectory.n_frames_1 else 2}"
        for number, what in sorted(findings.items())
    ]
    shown = told[:3] + ([f"{len(told) - 3} more"] if len(told) > 3 else [])
    return [f"found {_and(shown)}"]


def _quoted(asking: RoundRecord, record: RoundRecord) -> list[str]:
    """The first sentence of the thinking that names a frame which the round was just shown."""
    shown = {number for tool in asking.tools for number in tool.frame_numbers}
    thinking = parse_round(record.text).think
    if thinking is None or not shown:
        return []
    for match in _SENTENCE.finditer(record.text, thinking.content.start, thinking.content.end):
        if any(int(name) in shown for name in _NAMED_FRAME.findall(match[0])):
            return [f"wrote “{_short(match[0])}”"]
    return []


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _MAX_QUOTE else line[: _MAX_QUOTE - 1].rstrip() + "…"


def _listed(steps: Sequence[str]) -> str:
    return steps[0] if len(steps) == 1 else f"{', '.join(steps[:-1])}, and {steps[-1]}"


def _and(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
