"""The evidence page: one HTML file that shows what a verdict is based on.

The page shows both clips, a film strip for each round with the frames that were live and those that had
expired, what the model wrote and requested, the verdict, and the truth, if it is known. Invariant: the file
is self-contained (it works without a network and loads nothing). No text of a model, a caption or a file name
can run as code: every text is escaped, and the page's content security policy allows only its own script and
styles.
"""

from __future__ import annotations

import base64
import hashlib
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from markupsafe import Markup

from vrthinker._version import __version__
from vrthinker.episode.dimensions import DimensionText, Judgments, Preference, dimension_texts
from vrthinker.episode.orders import MergedOrders
from vrthinker.episode.settings import EpisodeSettings
from vrthinker.episode.trajectory import FrameSegmentRecord, StopReason, Trajectory, VideoRecord
from vrthinker.errors import InputError, unwritable
from vrthinker.records.files import replace_file
from vrthinker.report.names import distinct_names
from vrthinker.report.page.clips import MAX_CLIP_BYTES, PageClip, load_clip
from vrthinker.report.page.rounds import round_views
from vrthinker.report.page.templating import asset, page_template
from vrthinker.report.page.timeline import EventView, Mark, event_views, marks
from vrthinker.report.page.truth import PlantedEvent, Truth
from vrthinker.report.story import Findings, told_story
from vrthinker.video.reader import VideoReader

__all__ = [
    "MAX_CLIP_BYTES",
    "PlantedEvent",
    "Truth",
    "check_page_path",
    "content_policy",
    "render_page",
    "write_page",
]

_TEMPLATES = Path(__file__).parent / "templates"
_PAGE_START = b"<!doctype html>"
_WORDS = {preference.value: str(preference) for preference in Preference}
_HEADLINES = {0: "A tie", 1: "Video 1 is better", 2: "Video 2 is better"}
_STOPS = {
    StopReason.ANSWERED: "a round gave a final answer",
    StopReason.ROUND_LIMIT: "the last allowed round asked for frames instead of answering",
    StopReason.TOKEN_LIMIT: "a round reached its token limit before its ending",
    StopReason.UNPARSEABLE: "a round has no readable answer or tool call, or more than one answer",
    StopReason.CONTEXT_LIMIT: "the context would have outgrown the model",
    StopReason.REFUSED: "the model refused to answer",
    StopReason.VIDEO_ERROR: "a frame does not decode",
    StopReason.ENGINE_ERROR: "the engine failed",
    StopReason.MACHINE_ERROR: "the machine ran out of something, such as memory",
    StopReason.INTERNAL_ERROR: "something failed that nobody foresaw",
    StopReason.BAD_INPUT: "the item could not be judged",
}
_TILE_AREA = 10_500.0
"""The area in square pixels of a frame in a film strip, whatever its shape."""
_LONG_TEXT = 1500


def write_page(
    path: str | PathLike[str],
    trajectory: Trajectory,
    *,
    notes: Sequence[str] = (),
    both: MergedOrders | None = None,
    truth: Truth | None = None,
    findings: Sequence[Findings] = (),
    reader: VideoReader | None = None,
    max_clip_bytes: int = MAX_CLIP_BYTES,
) -> Path:
    """Writes the page atomically: the file is either complete, or unchanged.

    Args:
        path: The HTML file. An existing page is replaced.
        trajectory: The episode to show. Its clips are read again. If they are missing or have changed, the
            page says so and shows the rest.
        notes: Notes to show besides the trajectory's own.
        both: What both orders of the clips say together, if both were judged and `trajectory` is the first
            episode. The headline and the table are theirs, the rounds and the story those of the episode.
        truth: The truth, if it is known. Without it, the page does not mention any.
        findings: What each round found, for the story (`report.story`).
        reader: The video reader; PyAV's on the CPU by default.
        max_clip_bytes: The most bytes of an embedded clip. A larger clip is shown as a small copy, or as
            stills.

    Returns:
        `path`.

    Raises:
        InputError: The path cannot be used, or the record is inconsistent.
        VRThinkerError: The file cannot be written.
    """
    path = Path(path)
    check_page_path(path, *(Path(video.path) for video in trajectory.videos))
    page = render_page(
        trajectory,
        notes=notes,
        both=both,
        truth=truth,
        findings=findings,
        reader=reader,
        max_clip_bytes=max_clip_bytes,
    )
    replace_file(path, page.encode("utf-8"))
    return path


def check_page_path(path: Path, *others: Path) -> None:
    """Refuses a path that a page must not or cannot be written to, before any work is done.

    Args:
        path: The file that the page will be written to.
        others: Other files of the same command (clips, trajectories).

    Raises:
        InputError: The path is a folder, is one of `others`, has content that is not a page, or its folder is
            missing or not writable.
    """
    try:
        if path.is_dir():
            raise InputError(f"{path}: a folder; give the page a file name, like page.html")
        same = any(other.exists() and path.exists() and path.samefile(other) for other in others)
        if same or path.resolve() in {other.resolve() for other in others}:
            raise InputError(f"{path}: got the same file twice; give the page a file of its own")
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: not a file; give the page a file name, like page.html")
        if path.is_file():
            with path.open("rb") as stream:
                start = stream.read(len(_PAGE_START))
            if start.lower() != _PAGE_START[: len(start)]:
                raise InputError(f"{path}: holds something else than a page; give another file")
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise unwritable(path, error, "give another file") from None


def render_page(
    trajectory: Trajectory,
    *,
    notes: Sequence[str] = (),
    both: MergedOrders | None = None,
    truth: Truth | None = None,
    findings: Sequence[Findings] = (),
    reader: VideoReader | None = None,
    max_clip_bytes: int = MAX_CLIP_BYTES,
) -> str:
    """The page as a string that can be encoded as UTF-8. The arguments are those of `write_page`.

    Raises:
        InputError: The record is inconsistent.
    """
    events = truth.events if truth is not None else ()
    dimensions = dimension_texts(trajectory.dataset)
    rounds = round_views(trajectory, events)
    clips = [_clip_view(trajectory, video, events, reader, max_clip_bytes) for video in (1, 2)]
    style, script = asset(_TEMPLATES / "page.css"), asset(_TEMPLATES / "page.js")
    stills = _stills_style(trajectory, clips)
    outcome = trajectory.outcome if both is None else both
    page: str = page_template(_TEMPLATES / "page.html.jinja").render(
        policy=content_policy(styles=(style, stills), script=script),
        style=style,
        stills_style=stills,
        script=script,
        clip_data=[_script_data(trajectory, clip) for clip in clips],
        trajectory=trajectory,
        outcome=outcome,
        headline="No verdict" if outcome.judgments is None else _HEADLINES[outcome.judgments.OA],
        dimensions=dimensions,
        verdict=[_verdict_row(text, outcome.judgments, truth) for text in dimensions],
        has_truth=truth is not None and bool(truth.judgments),
        story=told_story(trajectory, findings, both=both),
        stop=_STOPS[outcome.stop_reason],
        notes=tuple(dict.fromkeys((*trajectory.notes, *notes))),
        clips=clips,
        rounds=rounds,
        words=_WORDS,
        prompt=_prompt_texts(trajectory),
        facts=_facts(trajectory),
        long_text=_LONG_TEXT,
    )
    return page


@dataclass(frozen=True)
class _ClipView:
    """One clip, ready for the template."""

    video: int
    record: VideoRecord
    name: str
    first_number: int
    last_number: int
    clip: PageClip
    source: Markup | None
    marks: tuple[Mark, ...]
    events: tuple[EventView, ...]


def _clip_view(
    trajectory: Trajectory,
    video: int,
    events: Sequence[PlantedEvent],
    reader: VideoReader | None,
    max_clip_bytes: int,
) -> _ClipView:
    record = trajectory.videos[video - 1]
    clip = load_clip(
        record,
        [frame for frame in trajectory.frames if frame.video == video],
        reader=reader,
        tolerate_truncation=trajectory.settings.tolerate_truncation,
        max_clip_bytes=max_clip_bytes,
    )
    return _ClipView(
        video=video,
        record=record,
        name=distinct_names([one.path for one in trajectory.videos])[video - 1],
        first_number=1 if video == 1 else trajectory.n_frames_1 + 1,
        last_number=trajectory.n_frames_1 if video == 1 else trajectory.n_frames,
        clip=clip,
        source=None if clip.media is None else _data_uri(clip.media.mime, clip.media.content),
        marks=marks(trajectory, video, events),
        events=event_views(trajectory, video, events, clip.times),
    )


def _data_uri(mime: str, content: bytes) -> Markup:
    # Base64 needs no escaping, which would be slow for megabytes.
    return Markup(f"data:{mime};base64,{base64.b64encode(content).decode('ascii')}")


def _stills_style(trajectory: Trajectory, clips: Sequence[_ClipView]) -> Markup:
    """The CSS with each clip's shape and each frame's picture, which is there once for all rounds."""
    rules = []
    for clip in clips:
        aspect = min(max(clip.record.width / max(clip.record.height, 1), 1 / 3), 3.0)
        rules.append(
            f".video-{clip.video}{{--aspect:{aspect:.4f};--tile:{math.sqrt(_TILE_AREA * aspect):.0f}px}}"
        )
    for frame in trajectory.frames:
        still = clips[frame.video - 1].clip.stills.get((frame.frame_index, frame.view))
        if still is not None:
            picture = _data_uri("image/jpeg", still)
            rules.append(f".still-{frame.picture_id}{{background-image:url({picture})}}")
    return Markup("\n".join(rules))


def _script_data(trajectory: Trajectory, view: _ClipView) -> dict[str, Any]:
    """What the script has to know about a clip: the times at which frames begin, and their numbers."""
    data: dict[str, Any] = {"video": view.video, "times": [round(t, 6) for t in view.clip.times]}
    if trajectory.settings.numbers_all_frames:
        return {**data, "first": view.first_number}
    clip_frames = [frame for frame in trajectory.frames if frame.video == view.video]
    return {**data, "numbers": {frame.frame_index: frame.frame_number for frame in clip_frames}}


def _verdict_row(text: DimensionText, judgments: Judgments | None, truth: Truth | None) -> dict[str, Any]:
    verdict = None if judgments is None else int(getattr(judgments, text.code))
    label = None if truth is None else truth.judgments.get(text.code)
    right = None if verdict is None or label is None else verdict == label
    return {"dimension": text, "verdict": verdict, "truth": label, "right": right}


def _prompt_texts(trajectory: Trajectory) -> list[tuple[str, str]]:
    """The first input's messages as (role, text), with frames as their numbers."""
    return [
        (
            message.role,
            "".join(
                f"[frame {segment.frame_number}]" if isinstance(segment, FrameSegmentRecord) else segment.text
                for segment in message.segments
            ),
        )
        for message in trajectory.first_input
    ]


def _facts(trajectory: Trajectory) -> list[tuple[str, str]]:
    settings: EpisodeSettings = trajectory.settings
    window = "to the end" if settings.window is None else f"{settings.window} rounds"
    facts = [
        ("Pair", trajectory.id),
        ("Model", trajectory.engine),
        ("Dimensions of", trajectory.dataset or "the default data set"),
        ("Retrieved frames stay", "1 round" if settings.window == 1 else window),
        ("Memory", settings.memory),
        ("Temperature", f"{settings.temperature:g}" + (" (greedy)" if settings.temperature == 0 else "")),
        ("Seed", str(trajectory.seed)),
        ("First frames", str(settings.initial_frames)),
        ("Frames asked for per round, at most", str(settings.retrieved_frames)),
        ("Rounds, at most", str(settings.max_rounds)),
        ("Tokens per round, at most", str(settings.max_round_tokens)),
        ("Took", f"{trajectory.latency_seconds:.1f} s"),
        ("Page written by", f"vrthinker {__version__}"),
    ]
    optional = [
        ("Top p", f"{settings.top_p:g}", settings.top_p < 1),
        ("Rounds forced into their form", "yes", settings.guided),
        ("Frames numbered per second, at most", f"{settings.max_fps or 0:g}", settings.max_fps is not None),
        ("Policy version", str(trajectory.policy_version), trajectory.policy_version > 0),
    ]
    return facts[:-2] + [(name, value) for name, value, given in optional if given] + facts[-2:]


def content_policy(*, styles: Sequence[str], script: str) -> str:
    """A page's Content-Security-Policy, which allows only its own parts, each by its hash.

    Args:
        styles: The texts of the page's style elements.
        script: The text of its script.
    """

    def hashed(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}'"

    return "; ".join(
        (
            "default-src 'none'",
            "img-src data:",
            "media-src data:",
            f"style-src {' '.join(map(hashed, styles))}",
            f"script-src {hashed(script)}",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )
