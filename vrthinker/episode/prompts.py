"""Prompts: jinja2 templates rendered into messages of text and frame segments.

Every prompt is made from three templates: `system.jinja`, `first_input.jinja` and `outcome.jinja`. The
package has defaults. A checkpoint's folder or a user may give others, so that a checkpoint trained with
another wording is used with that wording.

Templates are untrusted, because they come with checkpoints: `template_language.py` says what they may do.
Captions are untrusted too. The place of a frame is marked by NUL characters around its number. No caption can
contain such a mark, because NULs are removed from it, and engines encode all text without reading special
tokens in it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vrthinker.engine.base import FrameSegment, Message, Role, Segment, TextSegment
from vrthinker.episode.dimensions import DimensionText
from vrthinker.episode.template_language import PromptTemplate
from vrthinker.errors import InputError

TEMPLATE_NAMES = ("system", "first_input", "outcome")
MAX_TEMPLATE_BYTES = 65_536
MAX_CAPTION_CHARS = 20_000
_MARK = re.compile("\0(\\d{1,9})\0")


@dataclass(frozen=True)
class PromptFrame:
    """A frame as templates see it: they print `image` at the place of the frame."""

    frame_number: int
    video: int
    frame_index: int
    pts_seconds: float
    position: int = 1
    """Its 1-based place among the frames of its message."""
    gap: int = 0
    """The number of frames between it and the next one of its video that is shown with it, or the end."""

    @property
    def between_4(self) -> str:
        """Up to 4 evenly spread frame numbers of the gap, such as `10, 12, 14, 16`, or nothing."""
        return self._between(4)

    @property
    def between_8(self) -> str:
        """Up to 8 evenly spread frame numbers of the gap."""
        return self._between(8)

    def _between(self, number: int) -> str:
        return ", ".join(map(str, spread(self.frame_number, self.frame_number + self.gap + 1, number)))

    @property
    def image(self) -> str:
        """The mark that is replaced by the frame."""
        return f"\0{self.frame_number}\0"


@dataclass(frozen=True)
class PromptContext:
    """The values that every template may use."""

    n_frames: int
    n_frames_1: int
    max_frames: int
    max_rounds: int
    window: int | None
    dimensions: tuple[DimensionText, ...]
    tools: tuple[Mapping[str, Any], ...]


class PromptTemplates:
    """The three templates, compiled once.

    Raises:
        InputError: A template is missing, is not valid jinja2, or uses something that is not allowed
            (`template_language.py`).
    """

    def __init__(self, sources: Mapping[str, str]) -> None:
        self.sources = dict(sources)
        self._templates: dict[str, PromptTemplate] = {}
        for name in TEMPLATE_NAMES:
            if name not in sources:
                raise InputError(f"prompt template {name}.jinja: missing; wanted {', '.join(TEMPLATE_NAMES)}")
            self._templates[name] = PromptTemplate(name, sources[name])

    @classmethod
    def load(cls, folder: Path | None = None) -> PromptTemplates:
        """Reads templates from a folder. For each missing one, the package's default is used."""
        sources = {}
        for name in TEMPLATE_NAMES:
            path = (folder or DEFAULT_TEMPLATES) / f"{name}.jinja"
            if not path.exists():
                path = DEFAULT_TEMPLATES / f"{name}.jinja"
            if not path.is_file():
                raise InputError(f"{path}: not a file; wanted a template")
            size = path.stat().st_size
            if size > MAX_TEMPLATE_BYTES:
                raise InputError(f"{path}: got {size} bytes, allowed: up to {MAX_TEMPLATE_BYTES}")
            try:
                sources[name] = path.read_text("utf-8")
            except UnicodeDecodeError:
                raise InputError(f"{path}: not UTF-8 text") from None
        return cls(sources)

    @property
    def digest(self) -> str:
        """The SHA-256 of the templates, for records that must not mix wordings."""
        import hashlib

        joined = "\0".join(self.sources[name] for name in TEMPLATE_NAMES)
        return hashlib.sha256(joined.encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Writes the templates to a folder, from which `load` can read them."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, source in self.sources.items():
            (folder / f"{name}.jinja").write_text(source, "utf-8")

    def first_input(
        self,
        context: PromptContext,
        caption: str,
        frames: Sequence[PromptFrame],
        segments: Mapping[int, FrameSegment],
        *,
        last_round: bool,
    ) -> tuple[Message, ...]:
        """The first input X = [V, T] (method section 2): the system message and the task with frames.

        Raises:
            InputError: The caption is too long, or a template fails to render.
        """
        if len(caption) > MAX_CAPTION_CHARS:
            raise InputError(f"caption: got {len(caption)} characters, allowed: up to {MAX_CAPTION_CHARS}")
        extra = {"caption": clean(caption), "frames": frames, "last_round": last_round}
        return (
            self._message("system", "system", context, {}, {}),
            self._message("first_input", "user", context, extra, segments),
        )

    def outcome(
        self,
        context: PromptContext,
        frames: Sequence[PromptFrame],
        segments: Mapping[int, FrameSegment],
        *,
        error: str | None,
        note: str | None = None,
        last_round: bool,
    ) -> Message:
        """The tool outcome o_t as a message. Of frames without a segment only the label appears (p = 0).

        Args:
            context: The values that every template may use.
            frames: The frames that are shown.
            segments: The frames that the next round sees, by number.
            error: The reason why no frame is shown; None if frames are shown.
            note: The note about requested frames that are not shown. If the template does not print `note`
                (because it is older than notes), the note is put in front of the template's text.
            last_round: Whether the next round is the last one.
        """
        extra = {
            "frames": frames,
            "error": None if error is None else clean(error),
            "note": None if note is None else clean(note),
            "last_round": last_round,
        }
        message = self._message("outcome", "user", context, extra, segments)
        if note is not None and not re.search(r"\bnote\b", self.sources["outcome"]):
            return Message(message.role, (TextSegment(f"{clean(note)}\n"), *message.segments))
        return message

    def _message(
        self,
        name: str,
        role: Role,
        context: PromptContext,
        extra: Mapping[str, Any],
        segments: Mapping[int, FrameSegment],
    ) -> Message:
        # Templates get plain data only, because they may access the attributes of their values.
        values = {
            **vars(context),
            "dimensions": [dimension.model_dump() for dimension in context.dimensions],
            "tools": [dict(tool) for tool in context.tools],
            **extra,
        }
        if "frames" in extra:
            values["frames"] = [
                {**vars(f), "image": f.image, "between_4": f.between_4, "between_8": f.between_8}
                for f in extra["frames"]
            ]
        rendered = self._templates[name].render(values)
        return Message(role, _split(rendered.strip(), segments))


DEFAULT_TEMPLATES = Path(__file__).parent / "templates"


def spread(start: int, end: int, number: int) -> tuple[int, ...]:
    """Up to `number` evenly spread whole numbers strictly between two others, ascending."""
    inside = max(0, end - start - 1)
    number = min(number, inside)
    return tuple(start + 1 + int((j + 0.5) * inside / number) for j in range(number))


def clean(text: str) -> str:
    """Removes NULs, which delimit frame marks, and makes lone surrogates printable."""
    return text.replace("\0", "").encode("utf-8", "replace").decode("utf-8")


def _split(rendered: str, segments: Mapping[int, FrameSegment]) -> tuple[Segment, ...]:
    """Cuts a rendered template at its frame marks."""
    parts: list[Segment] = []
    pieces = _MARK.split(rendered)
    for index, piece in enumerate(pieces):
        if index % 2:
            segment = segments.get(int(piece))
            if segment is not None:
                parts.append(segment)
        elif piece:
            parts.append(TextSegment(piece))
    return tuple(parts)
