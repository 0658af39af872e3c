"""Virtual clips: small files that say which clip is meant and how it is changed, for evaluations.

`name.clip.json` holds `{"vrthinker_clip": 1, "source": PATH, "source_bytes": N, "source_sha256": DIGEST,
"edit": {"kind": ..., ...}}`, with the size and the digest of `content.py`. A `VirtualReader`
reads such a file as a clip: it decodes the frames of the source that are asked for and changes them on the
way, so that no clip is encoded again and no change is lost in an encoder. The source's path may be relative
to the folder of the file.

Invariants:

- A virtual clip is a function of its file: frame i has the same pixels whenever it is read. A source that is
  no longer what it was when the file was written is refused. (Older files, and those whose source could not
  be read then, do not have its size and digest, and are not checked.)
- Every other reader refuses the file, because it is no video. So records that were made with changed frames
  cannot be taken for records of the source itself.
- The source is a real clip. A virtual clip of a virtual clip is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vrthinker.bounded_files import read_json
from vrthinker.errors import InputError, VideoError, first_problem
from vrthinker.video.content import clip_content
from vrthinker.video.frames import Frames
from vrthinker.video.reader import (
    ReadCounts,
    VideoInfo,
    VideoPath,
    VideoReader,
    checked_indices,
    close_idle_clips,
    reader_name,
)

ENDING = ".clip.json"
_MAX_BYTES = 1 << 16
_GREY = 128

Pixels = npt.NDArray[np.uint8]


class _Edit(BaseModel):
    """A change of a clip."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def places(self, n_frames: int) -> list[int]:
        """The source's frame index of every frame of the virtual clip."""
        return list(range(n_frames))

    def pixels(self, picture: Pixels, frame_index: int) -> Pixels:
        """The picture `[height, width, 3]` that is shown for this frame of the source."""
        return picture

    def note(self) -> str:
        """What a reader of a verdict has to know. It continues the words "video 1"."""
        raise NotImplementedError


class Redundant(_Edit):
    """Random frames are shown again right after themselves, until the clip is twice as long (section 6)."""

    kind: Literal["redundant"] = "redundant"
    seed: int = Field(0, ge=0)

    def places(self, n_frames: int) -> list[int]:
        """Every frame once, and as many random ones again."""
        again = np.random.default_rng([self.seed, n_frames]).integers(0, n_frames, n_frames)
        return sorted([*range(n_frames), *again.tolist()])

    def note(self) -> str:
        """What a reader of a verdict has to know."""
        return "is shown with random frames repeated, until it is twice as long"


class Reversed(_Edit):
    """The last frame comes first."""

    kind: Literal["reversed"] = "reversed"

    def places(self, n_frames: int) -> list[int]:
        """The frames in the opposite order."""
        return list(range(n_frames))[::-1]

    def note(self) -> str:
        """What a reader of a verdict has to know."""
        return "is shown backwards"


class Frozen(_Edit):
    """A stretch in the middle shows its first frame all the time."""

    kind: Literal["frozen"] = "frozen"
    share: float = Field(gt=0, le=1)
    """The length of the stretch, as a share of the clip."""

    def places(self, n_frames: int) -> list[int]:
        """The frames, with one frame in the place of the stretch."""
        length = round(self.share * n_frames)
        start = (n_frames - length) // 2
        return [start if start <= index < start + length else index for index in range(n_frames)]

    def note(self) -> str:
        """What a reader of a verdict has to know."""
        return f"is shown with {self.share:.0%} of it frozen"


class Dropped(_Edit):
    """Frames are missing in short runs, so that everything leaps on at these places."""

    kind: Literal["dropped"] = "dropped"
    share: float = Field(gt=0, lt=1)
    """The share of frames that is missing."""
    seed: int = Field(0, ge=0)

    def places(self, n_frames: int) -> list[int]:
        """The frames that are left. The first and the last one always are."""
        inner = n_frames - 2
        runs = max(1, round(inner / 12))
        wanted = min(round(self.share * n_frames), max(0, inner))
        rng = np.random.default_rng([self.seed, n_frames])
        missing: set[int] = set()
        for number in range(runs):
            low, high = 1 + number * inner // runs, 1 + (number + 1) * inner // runs
            length = min(high - low, round(wanted / runs))
            start = low + int(rng.integers(0, high - low - length + 1)) if length else low
            missing.update(range(start, start + length))
        return [index for index in range(n_frames) if index not in missing]

    def note(self) -> str:
        """What a reader of a verdict has to know."""
        return f"is shown without {self.share:.0%} of its frames"


class Blur(_Edit):
    """Every picture is blurred."""

    kind: Literal["blur"] = "blur"
    radius: float = Field(gt=0, le=1)
    """The standard deviation of the blur, as a share of the shorter side."""

    def pixels(self, picture: Pixels, frame_index: int) -> Pixels:
        """The blurred picture."""
        radius = self.radius * min(picture.shape[:2])
        return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(radius)))

    def note(self) -> str:
        """What a reader of a verdict has to know."""
        return f"is shown blurred ({self.radius:.1%} of the shorter side)"


class Noise(_Edit):
    """Every picture has noise of its own."""

    kind: Literal["noise"] = "noise"
    amount: float = Field(gt=0, le=1)
    """The standard deviation of the noise, as a share of the range of values."""
    seed: int = Field(0, ge=0)

    def pixels(self, picture: Pixels, frame_index: int) -> Pixels:
        """The noisy picture."""
        rng = np.random.default_rng([self.seed, frame_index])
        noisy = picture + rng.normal(0.0, 255 * self.amount, picture.shape)
        return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)

    def note(self) -> str:
        """What a reader of a verdict has to know."""
        return f"is shown with noise ({self.amount:.0%} of the range of values)"


class Blank(_Edit):
    """Nothing of the clip is to be seen: every picture is grey, or noise and nothing else."""

    kind: Literal["blank"] = "blank"
    shown: Literal["grey", "noise"] = "grey"
    seed: int = Field(0, ge=0)

    def pixels(self, picture: Pixels, frame_index: int) -> Pixels:
        """The picture that is shown instead."""
        if self.shown == "grey":
            return np.full_like(picture, _GREY)
        rng = np.random.default_rng([self.seed, frame_index])
        return rng.integers(0, 256, picture.shape, dtype=np.uint8)

    def note(self) -> str:
        """What a reader of a verdict has to know."""
        return f"is replaced by {self.shown}: nothing of it is shown"


Edit = Annotated[Redundant | Reversed | Frozen | Dropped | Blur | Noise | Blank, Field(discriminator="kind")]


class VirtualClip(BaseModel):
    """The content of a virtual clip's file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    vrthinker_clip: Literal[1] = 1
    source: str = Field(min_length=1, max_length=4096)
    source_bytes: int | None = Field(None, ge=0)
    source_sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    edit: Edit


def virtual_clip(source: Path, edit: _Edit) -> bytes:
    """The content of the file of a virtual clip, with its source's absolute path, size and digest."""
    value: dict[str, Any] = {"vrthinker_clip": 1, "source": os.path.abspath(source)}
    if (content := clip_content(source)) is not None:
        value |= {"source_bytes": content.size_bytes, "source_sha256": content.sha256}
    value["edit"] = edit.model_dump(mode="json")
    return (json.dumps(value, indent=1) + "\n").encode("utf-8", "surrogateescape")


def is_virtual(path: VideoPath) -> bool:
    """Whether a path is that of a virtual clip."""
    return os.fspath(path).endswith(ENDING)


class VirtualReader:
    """Reads virtual clips, and leaves all others to another reader (`VideoReader`).

    Args:
        reader: The reader of the sources.
    """

    def __init__(self, reader: VideoReader) -> None:
        self._reader = reader

    @property
    def counts(self) -> ReadCounts | None:
        """What the reader of the sources has read so far; None if it does not count."""
        counts: ReadCounts | None = getattr(self._reader, "counts", None)
        return counts

    def reader_of(self, path: VideoPath, *, tolerate_truncation: bool = False) -> str | None:
        """The name of the reader that shows the frames of a clip, or of a virtual one's source."""
        source = _read(path)[0] if is_virtual(path) else path
        return reader_name(self._reader, source, tolerate_truncation=tolerate_truncation)

    def close_idle(self) -> None:
        """Closes the clips that the reader of the sources keeps open."""
        close_idle_clips(self._reader)

    def probe(self, path: VideoPath, *, tolerate_truncation: bool = False) -> VideoInfo:
        """Finds out what a clip contains.

        Raises:
            VideoError: The clip, or the source of a virtual one, cannot be used.
        """
        if not is_virtual(path):
            return self._reader.probe(path, tolerate_truncation=tolerate_truncation)
        source, edit = _read(path)
        info = self._reader.probe(source, tolerate_truncation=tolerate_truncation)
        places = edit.places(info.n_frames)
        times, duration = info.pts_seconds, info.duration_seconds
        if len(places) != info.n_frames:
            times = tuple(number / info.fps for number in range(len(places)))
            duration = len(places) / info.fps
        return replace(
            info,
            path=os.fspath(path),
            n_frames=len(places),
            pts_seconds=times,
            duration_seconds=duration,
            notes=(*info.notes, edit.note()),
        )

    def frames_at(
        self, path: VideoPath, frame_indices: Sequence[int], *, tolerate_truncation: bool = False
    ) -> Frames:
        """Returns the frames at these 0-based positions, in the order given; repeats are allowed.

        Raises:
            VideoError: The clip cannot be used, an index is not in it, or a frame does not decode.
        """
        (frames,) = self.read_many([(path, frame_indices)], tolerate_truncation=tolerate_truncation)
        return frames

    def read_many(
        self, requests: Sequence[tuple[VideoPath, Sequence[int]]], *, tolerate_truncation: bool = False
    ) -> list[Frames]:
        """Does what `frames_at` does for several requests, in their order.

        Raises:
            VideoError: A request cannot be fulfilled (see `frames_at`).
        """
        translated: list[tuple[VideoPath, Sequence[int]]] = []
        edits: list[tuple[_Edit, tuple[int, ...], VideoInfo] | None] = []
        for path, indices in requests:
            if not is_virtual(path):
                translated.append((path, indices))
                edits.append(None)
                continue
            source, edit = _read(path)
            info = self.probe(path, tolerate_truncation=tolerate_truncation)
            wanted = checked_indices(path, indices, info.n_frames)
            places = edit.places(self._reader.probe(source, tolerate_truncation=tolerate_truncation).n_frames)
            translated.append((source, [places[index] for index in wanted]))
            edits.append((edit, wanted, info))
        read = self._reader.read_many(translated, tolerate_truncation=tolerate_truncation)
        return [
            frames if entry is None else _edited(frames, *entry)
            for frames, entry in zip(read, edits, strict=True)
        ]


def _edited(frames: Frames, edit: _Edit, wanted: tuple[int, ...], info: VideoInfo) -> Frames:
    pictures: Any = frames.numpy()
    data = np.stack(
        [edit.pixels(picture, index) for picture, index in zip(pictures, frames.frame_indices, strict=True)]
    ) if len(frames) else pictures  # fmt: skip
    return Frames(data, wanted, tuple(info.pts_seconds[index] for index in wanted))


def _read(path: VideoPath) -> tuple[str, _Edit]:
    """The source's path, and the edit."""
    try:
        clip = VirtualClip.model_validate(read_json(Path(path), _MAX_BYTES))
    except ValidationError as error:
        raise VideoError(path, f"is no virtual clip ({first_problem(error, 'file')})") from None
    except InputError as error:
        raise VideoError(path, f"is no virtual clip ({error})") from None
    source = os.path.join(os.path.dirname(os.path.abspath(path)), clip.source)
    if is_virtual(source):
        raise VideoError(path, f"source: got {source}, a virtual clip, allowed: a real clip")
    # The file is hashed once for each state (time and size), so this costs a look at its state.
    content = clip_content(source) if clip.source_sha256 is not None else None
    if content is not None and (content.size_bytes, content.sha256) != (
        clip.source_bytes,
        clip.source_sha256,
    ):
        raise VideoError(
            path,
            f"its source changed: {source} is another file than when this one was written; put it back, or "
            "evaluate again in a new folder",
        )
    return source, clip.edit


def source_of(path: VideoPath) -> str:
    """The path of the source of a virtual clip.

    Raises:
        VideoError: The clip cannot be used.
    """
    return _read(path)[0]


def source_places(path: VideoPath, reader: VideoReader) -> tuple[str, list[int]]:
    """The source of a virtual clip, and the source's frame index of every frame of it.

    Args:
        path: The virtual clip.
        reader: The reader of the source.

    Raises:
        VideoError: The clip or its source cannot be used.
    """
    source, edit = _read(path)
    return source, edit.places(reader.probe(source).n_frames)
