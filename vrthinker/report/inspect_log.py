"""Exports an evaluation as a log of inspect_ai (`.eval`), so that `inspect view` opens the run.

An item becomes a sample: its caption and clips are the input, people's overall label is the target, the
rounds of its episode are the messages, and each dimension that people judged is a score. An item without a
verdict has the score "N" (no answer), which inspect_ai counts as 0, as the run's own tables do. The log's
results are the run's own numbers and are not computed again.

Invariant: the file is complete or unchanged. Texts are data: the viewer shows them, and nothing runs them.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import os
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import ValidationError

from vrthinker._version import __version__
from vrthinker.episode.dimensions import Dimension, Preference
from vrthinker.episode.trajectory import FrameSegmentRecord, MessageRecord, Trajectory
from vrthinker.errors import InputError, UnexpectedError, first_problem, unwritable
from vrthinker.records.eval_items import EvalItem, ItemStatus
from vrthinker.report.eval_page.errors import recorded_episodes, surest_errors, tie_threshold, verdict_in
from vrthinker.report.names import distinct_names
from vrthinker.report.page.clips import load_stills
from vrthinker.report.story import story
from vrthinker.video.open import open_reader
from vrthinker.video.virtual import VirtualReader
from vrthinker.visibility import Region

ENDING = ".eval"
_WORDS = {preference.value: str(preference) for preference in Preference}
_CODES = ("OA", *(code.value for code in Dimension if code.value != "OA"))
"""The overall judgment first: the viewer's list shows the first score's answer."""
_RIGHT, _WRONG, _NO_ANSWER = "C", "I", "N"
_REASONS = {ItemStatus.UNPARSED: "invalid_response_format", ItemStatus.MISSING: "no_response"}
_MEASURES = {"OA": "oa/tau", "TA": "ta/accuracy", "VQ": "vq/accuracy", "MQ": "mq/accuracy"}
_LONGEST_NAME = 200
_ZIP_START = b"PK\x03\x04"
_INSTALL = "inspect_ai is not installed: pip install 'vrthinker[view]'"

Pictures = Mapping[tuple[int, Region | None], str]
"""(frame number, region) -> its picture as a data URI."""


@dataclass(frozen=True)
class _Inspect:
    """The modules of inspect_ai that a log is made of. It is an extra, and imported when it is needed."""

    log: ModuleType
    model: ModuleType
    scorer: ModuleType

    @classmethod
    def load(cls) -> _Inspect:
        try:
            return cls(
                *(importlib.import_module(f"inspect_ai.{name}") for name in ("log", "model", "scorer"))
            )
        except ImportError as error:
            if (error.name or "").partition(".")[0] == "inspect_ai":
                raise InputError(_INSTALL) from None
            raise InputError(f"inspect_ai cannot be imported ({error}); install it again") from None


def write_inspect_log(
    out: Path,
    items: Sequence[EvalItem],
    about: Mapping[str, Any],
    *,
    trajectories: Path | None = None,
    pictures: int = 20,
    on_episode: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Writes the log of a run.

    Args:
        out: The file, which ends in `.eval`. An older log is replaced.
        items: The run's items.
        about: The content of its `eval.json`.
        trajectories: The file of its episodes, for the messages. Without it, samples have no messages.
        pictures: The most items whose frames are in the log, as small pictures: the surest errors come first,
            then the other items in order. The frames of the rest are named by their numbers.
        on_episode: A function that is called with (exported episodes, items).

    Returns:
        `out`.

    Raises:
        InputError: inspect_ai is not installed, the path cannot be used, or `about` is not that of a run.
        VRThinkerError: The file cannot be written.
    """
    check_log_path(out)
    export = _Export(_Inspect.load(), about)
    try:
        log = export.log(items)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        said = first_problem(error, "") if isinstance(error, ValidationError) else str(error)
        what = f"{type(error).__name__}: {said}"
        raise InputError(f"{out}: the run's eval.json is not what `vrthinker eval` writes ({what})") from None
    shown = _first(items, pictures, export.thresholds["OA"])
    messages: dict[str, tuple[list[Any], str]] = {}
    if trajectories is not None:
        for episode in recorded_episodes(trajectories, {item.id for item in items}):
            images = _pictures(episode) if episode.id in shown else {}
            messages[episode.id] = export.messages(episode, images), story(episode)
            on_episode(len(messages), len(items))
    log.samples = [export.sample(item, *messages.pop(item.id, ([], ""))) for item in items]
    _write(export.inspect, log, out)
    return out


def _write(inspect: _Inspect, log: Any, out: Path) -> None:
    """Writes a log in one step: the file is either complete, or unchanged."""
    try:
        with tempfile.TemporaryDirectory(
            dir=out.parent, prefix=".vrthinker-", ignore_cleanup_errors=True
        ) as spare:
            made = Path(spare) / f"log{ENDING}"
            inspect.log.write_eval_log(log, str(made), format="eval")
            os.replace(made, out)
    except OSError as error:
        raise unwritable(out, error, "give another file") from None
    except Exception as error:
        raise UnexpectedError(f"{out}: inspect_ai could not write the log ({error})") from error


def check_log_path(path: Path) -> None:
    """Refuses a path that a log must not or cannot be written to, before any work is done.

    Raises:
        InputError: The name does not end in `.eval`, or the path is a folder or something else than a log.
    """
    if path.suffix != ENDING:
        raise InputError(f"{path}: got a name that ends in {path.suffix or 'nothing'}, allowed: {ENDING}")
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: not a file; give another name")
        if path.is_file():
            with path.open("rb") as stream:
                start = stream.read(len(_ZIP_START))
            if start != _ZIP_START[: len(start)]:
                raise InputError(f"{path}: holds something else than a log; give another file")
        if not os.access(path.parent, os.W_OK):
            raise InputError(f"{path.parent}: no folder that can be written to; give another file")
    except OSError as error:
        raise unwritable(path, error, "give another file") from None


def _first(items: Sequence[EvalItem], most: int, threshold: float) -> Collection[str]:
    """The ids of the items that are shown with pictures."""
    surest = [item.id for item in surest_errors(items, most, tie_threshold=threshold)]
    return set(list(dict.fromkeys([*surest, *(item.id for item in items)]))[: max(most, 0)])


def _pictures(episode: Trajectory) -> Pictures:
    """The pictures of an episode's frames; those of a clip that is gone or has changed are left out."""
    found: dict[tuple[int, Region | None], str] = {}
    for number, video in enumerate(episode.videos, start=1):
        frames = [frame for frame in episode.frames if frame.video == number]
        try:
            files = open_reader(image_fps=video.fps) if video.codec == "images" else open_reader()
        except InputError:  # a record with a frame rate that no clip has
            continue
        stills, _ = load_stills(
            video,
            frames,
            reader=VirtualReader(files),
            tolerate_truncation=episode.settings.tolerate_truncation,
        )
        for frame in frames:
            jpeg = stills.get((frame.frame_index, frame.view))
            if jpeg is not None:
                found[frame.frame_number, frame.view] = _data_uri(jpeg)
    return found


def _data_uri(jpeg: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"


class _Export:
    """Turns a run into the objects of inspect_ai.

    Args:
        inspect: The library.
        about: The content of the run's `eval.json`.
    """

    def __init__(self, inspect: _Inspect, about: Mapping[str, Any]) -> None:
        self.inspect, self.about = inspect, about
        self.judge = str(about.get("judge") or "judge")
        self.thresholds = {code: tie_threshold(about, code) for code in _CODES}

    def log(self, items: Sequence[EvalItem]) -> Any:
        """The log without its samples."""
        made, about, summary = self.inspect.log, self.about, self.about["summary"]
        origin: Mapping[str, Any] = about.get("provenance") or {}
        created = _moment(origin.get("date"))
        identity = _digest(self.judge, about.get("data"), created, *(item.id for item in items))
        measured = summary["measures"]["all"]
        scores = [
            made.EvalScore(
                name=code,
                scorer=code,
                scored_samples=sum(code in item.labels for item in items),
                metrics={metric.name: metric for metric in self._metrics(code, measured)},
            )
            for code in _CODES
            if any(code in item.labels for item in items)
        ]
        return made.EvalLog(
            status="success",
            eval=made.EvalSpec(
                eval_id=identity,
                run_id=identity,
                task_id=identity,
                created=created,
                task=str(about.get("evaluation") or "vrthinker eval"),
                task_version=summary["protocol_version"],
                dataset=made.EvalDataset(
                    name=str(about.get("data")),
                    samples=len(items),
                    sample_ids=[_member(item.id) for item in items],
                ),
                model=self.judge,
                config=made.EvalConfig(),
                packages={"vrthinker": __version__},
                metadata={
                    name: about[name]
                    for name in ("protocol", "settings", "provenance")
                    if about.get(name) is not None
                }
                | {"left_out": summary.get("left_out"), "baselines": summary.get("baselines")},
            ),
            results=made.EvalResults(
                total_samples=len(items),
                completed_samples=sum(item.status is ItemStatus.JUDGED for item in items),
                scores=scores,
            ),
            stats=made.EvalStats(started_at=created, completed_at=created),
        )

    def _metrics(self, code: str, measured: Mapping[str, Any]) -> Iterable[Any]:
        """The run's own accuracy of a dimension, with the ends of its 95 % interval."""
        estimate = measured[_MEASURES[code]]
        for name, key in (("accuracy", "value"), ("low", "low"), ("high", "high")):
            if estimate.get(key) is not None:
                yield self.inspect.log.EvalMetric(name=name, value=estimate[key])

    def sample(self, item: EvalItem, messages: Sequence[Any], told: str) -> Any:
        """The sample of an item.

        Args:
            item: The item.
            messages: The rounds of its episode.
            told: What happened in it, in words.
        """
        usage, names = self._usage(item), distinct_names([item.video_1, item.video_2])
        return self.inspect.log.EvalSample(
            id=_member(item.id),
            epoch=1,
            input=f"{item.prompt}\n\nvideo 1: {names[0]}\nvideo 2: {names[1]}",
            target=_WORDS[item.labels["OA"]] if "OA" in item.labels else "",
            messages=list(messages),
            output=self._output(messages),
            scores={code: self._score(item, code, told) for code in _CODES if code in item.labels},
            metadata=item.model_dump(
                mode="json",
                exclude={"prompt", "schema_version"},
                exclude_none=True,
            ),
            model_usage={} if usage is None else {self.judge: usage},
            total_time=item.cost.latency_seconds,
            uuid=_digest("sample", item.id),
        )

    def _output(self, messages: Sequence[Any]) -> Any:
        """What the model wrote last."""
        model = self.inspect.model
        last = next((turn for turn in reversed(messages) if turn.role == "assistant"), None)
        choices = [] if last is None else [model.ChatCompletionChoice(message=last)]
        return model.ModelOutput(model=self.judge, choices=choices)

    def _score(self, item: EvalItem, code: str, told: str) -> Any:
        verdict = verdict_in(item, code, self.thresholds[code])
        if verdict is None:
            return self.inspect.scorer.Score(
                value=_NO_ANSWER,
                explanation=item.reason or f"the verdict has no {code}",
                reason=_REASONS.get(item.status, "scoring_failed"),
            )
        return self.inspect.scorer.Score(
            value=_RIGHT if verdict == item.labels[code] else _WRONG,
            answer=_WORDS[verdict],
            explanation=told or None,
        )

    def _usage(self, item: EvalItem) -> Any:
        read, written = item.cost.prompt_tokens, item.cost.sampled_tokens
        if read is None or written is None:
            return None
        return self.inspect.model.ModelUsage(
            input_tokens=read, output_tokens=written, total_tokens=read + written
        )

    def messages(self, episode: Trajectory, pictures: Pictures) -> list[Any]:
        """The turns of an episode: what the model was shown and told, and what it wrote."""
        model = self.inspect.model
        given = [self._turn(episode, message, pictures) for message in episode.first_input]
        for record in episode.rounds:
            given.append(model.ChatMessageAssistant(content=record.text, model=self.judge))
            given += [self._turn(episode, message, pictures) for message in record.outcome_messages]
        for place, message in enumerate(given):
            message.id = _digest(episode.id, place)
        return given

    def _turn(self, episode: Trajectory, message: MessageRecord, pictures: Pictures) -> Any:
        model, content = self.inspect.model, []
        frames = {(frame.frame_number, frame.view): frame for frame in episode.frames}
        for segment in message.segments:
            if not isinstance(segment, FrameSegmentRecord):
                content.append(model.ContentText(text=segment.text))
                continue
            place = segment.frame_number, segment.view
            if place in pictures:
                content.append(model.ContentImage(image=pictures[place]))
            elif place in frames:
                frame = frames[place]
                content.append(
                    model.ContentText(
                        text=f"[frame {frame.label}: video {frame.video}, {frame.pts_seconds:.3f} s]"
                    )
                )
        kind = model.ChatMessageSystem if message.role == "system" else model.ChatMessageUser
        return kind(content=content)


def _moment(date: object) -> str:
    """The moment of a run with its time zone; the beginning of 1970 if the run does not say when it was."""
    try:
        found = datetime.fromisoformat(str(date))
        return (found if found.tzinfo is not None else found.replace(tzinfo=UTC)).astimezone(UTC).isoformat()
    except (ValueError, OverflowError):
        return datetime.fromtimestamp(0, UTC).isoformat()


def _member(name: str) -> str:
    """An item's id as the name of a member of the log, or a digest in its place.

    The log is an archive with a file for each item, which somebody may unpack.
    """
    is_short = len(name.encode("utf-8", "backslashreplace")) <= _LONGEST_NAME
    is_plain = name.isprintable() and not any(part in name for part in ("/", "\\", ".."))
    return name if is_short and is_plain else _digest("id", name)


def _digest(*parts: object) -> str:
    """A name of 22 letters that is always the same for the same parts."""
    return hashlib.sha256(repr(parts).encode("utf-8", "backslashreplace")).hexdigest()[:22]
