"""The workspace: both videos' frames under one numbering 1..N (method section 2).

Invariant: video 1 holds 1..N1 and video 2 holds N1+1..N. Only `Workspace.frame` translates a `frame_number`,
which the model uses, to a file, `frame_index` and `pts_seconds`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from vrthinker.errors import InputError, VideoError
from vrthinker.video.clips import Clip, as_clip
from vrthinker.video.content import ClipContent
from vrthinker.video.frame_cache import FrameCache, file_state
from vrthinker.video.frames import Picture
from vrthinker.video.reader import VideoInfo, VideoPath, VideoReader, reader_name
from vrthinker.video.resize import ResizeSettings
from vrthinker.visibility import Region

_CLOCK_ROUNDING_SECONDS = 1e-3
"""The unit to which Matroska rounds timestamps. Two frames may seem closer by this much than they are."""


@dataclass(frozen=True)
class WorkspaceFrame:
    """The origin of one numbered frame.

    Attributes:
        frame_number: The number in the workspace, 1..N.
        video: The number of the video, 1 or 2.
        path: The file as it was given.
        frame_index: The 0-based index in the file, counting the frames that `max_fps` skips too.
        pts_seconds: The time at which the file shows the frame, counted from the file's first frame.
        size: The (height, width) in pixels after resizing.
        file_state: The (mtime in ns, size in bytes) of the file when the workspace was opened.
        view: The region of the frame that is meant; None for the whole frame.
    """

    frame_number: int
    video: int
    path: str
    frame_index: int
    pts_seconds: float
    size: tuple[int, int]
    file_state: tuple[int, int] = (0, 0)
    view: Region | None = None


@dataclass(frozen=True)
class _Clip:
    info: VideoInfo
    kept: Sequence[int]  # frame_index of each numbered frame
    size: tuple[int, int]
    file_state: tuple[int, int]
    reader: VideoReader
    content: ClipContent | None = None


class Workspace:
    """Two clips whose frames are numbered and can be shown. Make one with `Workspace.open`."""

    def __init__(
        self,
        clips: tuple[_Clip, _Clip],
        *,
        cache: FrameCache,
        resize: ResizeSettings,
        tolerate_truncation: bool,
    ) -> None:
        self._clips = clips
        self._resize = resize
        self._cache = cache
        self._tolerate_truncation = tolerate_truncation
        self._notes: list[str] = []

    @classmethod
    def open(
        cls,
        video_1: VideoPath | Clip,
        video_2: VideoPath | Clip,
        *,
        reader: VideoReader,
        resize: ResizeSettings,
        cache: FrameCache,
        max_fps: float | None = None,
        frames_per_video: int | None = None,
        tolerate_truncation: bool = False,
    ) -> Self:
        """Probes both files and numbers their frames. Nothing is decoded except by `probe`.

        Args:
            video_1: The first clip: a file, a folder of images, or a clip in memory.
            video_2: The second clip. Its length, size and rate may differ.
            reader: The reader that decodes the frames of files.
            resize: The model's patch grid.
            cache: The cache of resized frames, which many workspaces may share.
            max_fps: The highest rate of numbered frames. Only frames that are at least `1 / max_fps` seconds
                apart are numbered, starting with the first. None numbers all.
            frames_per_video: The number of frames of each clip that are numbered: evenly spaced from the
                first to the last (of those that `max_fps` leaves), and repeated if there are fewer. None
                numbers all.
            tolerate_truncation: Whether a file that breaks half-way is used up to the break.

        Raises:
            VideoError: A file cannot be used.
            InputError: `max_fps` or `frames_per_video` is not above 0.
        """
        if frames_per_video is not None and frames_per_video < 1:
            raise InputError(f"frames_per_video: got {frames_per_video}, allowed: at least 1, or nothing")
        if max_fps is not None and not 0 < max_fps < float("inf"):
            raise InputError(f"max_fps: got {max_fps}, allowed: above 0, or nothing to keep every frame")

        def open_clip(clip: Clip) -> _Clip:
            state = file_state(clip.name)
            own = clip.reader(reader)
            info = own.probe(clip.name, tolerate_truncation=tolerate_truncation)
            try:
                size = resize.grid_size(info.height, info.width)
            except InputError as error:
                raise VideoError(clip.name, str(error)) from error
            # `pixels` refuses the file if it changed after its state was read, so this is what is judged.
            kept = _thin(info, max_fps)
            if frames_per_video is not None:
                kept = [kept[place] for place in evenly_spaced(len(kept), frames_per_video)]
            return _Clip(info, kept, size, state, own, clip.content())

        clips = (open_clip(as_clip(video_1, "video 1")), open_clip(as_clip(video_2, "video 2")))
        return cls(clips, cache=cache, resize=resize, tolerate_truncation=tolerate_truncation)

    @property
    def n_frames(self) -> int:
        """N, the number of numbered frames of both videos."""
        return len(self._clips[0].kept) + len(self._clips[1].kept)

    @property
    def n_frames_1(self) -> int:
        """N1, the number of numbered frames of video 1."""
        return len(self._clips[0].kept)

    @property
    def infos(self) -> tuple[VideoInfo, VideoInfo]:
        """What the reader found out about each file."""
        return self._clips[0].info, self._clips[1].info

    @property
    def readers(self) -> tuple[str | None, str | None]:
        """The name of the reader that shows each file's frames; None if the reader does not say."""
        first, second = (self._reader_of(clip) for clip in self._clips)
        return first, second

    def _reader_of(self, clip: _Clip) -> str | None:
        try:
            return reader_name(clip.reader, clip.info.path, tolerate_truncation=self._tolerate_truncation)
        except VideoError:  # the file is gone by now
            return None

    @property
    def contents(self) -> tuple[ClipContent | None, ClipContent | None]:
        """What each file contained when the workspace was opened."""
        return self._clips[0].content, self._clips[1].content

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the verdict has to know about the files and how they are shown."""
        broken = (
            f"video {video} breaks after frame {clip.info.n_frames}: only the frames before are judged "
            f"({clip.info.truncated})"
            for video, clip in enumerate(self._clips, start=1)
            if clip.info.truncated is not None
        )
        shown = (
            f"video {video} {note}"
            for video, clip in enumerate(self._clips, start=1)
            for note in clip.info.notes
        )
        return (*broken, *shown, *self._notes)

    def note(self, text: str) -> None:
        """Adds a note that a reader of the verdict has to know about these files."""
        self._notes.append(text)

    def frame(self, frame_number: int, view: Region | None = None) -> WorkspaceFrame:
        """The origin of a numbered frame, and the size at which it or a region of it is shown.

        Args:
            frame_number: The number of the frame, 1..N.
            view: The region that is meant; None for the whole frame.

        Raises:
            InputError: There is no such frame, or the region does not lie within it.
        """
        if not 1 <= frame_number <= self.n_frames:
            raise InputError(f"frame_number: got {frame_number}, allowed: 1 to {self.n_frames}")
        in_first = frame_number <= self.n_frames_1
        clip = self._clips[0 if in_first else 1]
        index = clip.kept[frame_number - 1 if in_first else frame_number - 1 - self.n_frames_1]
        size = clip.size
        if view is not None:
            height, width = clip.info.height, clip.info.width
            if not (0 <= view.top < view.bottom <= height and 0 <= view.left < view.right <= width):
                raise InputError(
                    f"view: got {tuple(view)} of frame {frame_number}, allowed: a region within its "
                    f"{height} x {width} pixels"
                )
            size = self._resize.grid_size(view.bottom - view.top, view.right - view.left)
        return WorkspaceFrame(
            frame_number=frame_number,
            video=1 if in_first else 2,
            path=clip.info.path,
            frame_index=index,
            pts_seconds=clip.info.pts_seconds[index],
            size=size,
            file_state=clip.file_state,
            view=view,
        )

    def initial_frames(self, n: int) -> tuple[int, ...]:
        """Picks the first input's frames: half per video, evenly spaced from each video's first frame.

        If `n` is odd, video 1 gets one frame more. A clip that is shorter than its share gives all its
        frames.

        Args:
            n: The number of frames of both videos (`N_in`; 8 in the paper).

        Returns:
            The frame numbers, ascending.

        Raises:
            InputError: `n` is too small for a frame of each video.
        """
        if n < 2:
            raise InputError(f"initial frames: got {n}, allowed: at least 2, one per video")
        shares = (n - n // 2, n // 2)
        numbers: list[int] = []
        for clip, share, offset in zip(self._clips, shares, (1, self.n_frames_1 + 1), strict=True):
            length = len(clip.kept)
            share = min(share, length)
            numbers.extend(offset + i * length // share for i in range(share))
        return tuple(numbers)

    def pixels(self, frame_numbers: Sequence[int], view: Region | None = None) -> list[Picture]:
        """Returns resized frames, through the cache, with one decoding pass per file.

        Args:
            frame_numbers: The numbers of the frames, in any order; repeats are allowed.
            view: The region of each frame that is wanted; None for whole frames.

        Returns:
            The frames, uint8 `[height, width, 3]` each: arrays, or tensors on the GPU that the reader decodes
            on. They are shared with the cache: do not write into them.

        Raises:
            InputError: There is no such frame, or the region does not lie within it.
            VideoError: A frame does not decode.
        """
        frames = [self.frame(number, view) for number in frame_numbers]
        pixels: dict[int, Picture] = {}
        for video, clip in enumerate(self._clips, start=1):
            wanted = [frame for frame in frames if frame.video == video]
            if not wanted:
                continue
            if file_state(clip.info.path) != clip.file_state:
                raise VideoError(clip.info.path, "changed while it was being judged; judge it again")
            loaded = self._cache.get(
                clip.info.path,
                [frame.frame_index for frame in wanted],
                wanted[0].size,
                clip.reader,
                self._tolerate_truncation,
                view,
            )
            pixels.update((frame.frame_number, array) for frame, array in zip(wanted, loaded, strict=True))
        return [pixels[number] for number in frame_numbers]

    def prefetch(self, frame_numbers: Sequence[int], view: Region | None = None) -> None:
        """Decodes frames into the cache now, so that `pixels` finds them there. It takes the same arguments.

        Raises:
            InputError: There is no such frame, or the region does not lie within it.
            VideoError: A frame does not decode.
        """
        self.pixels(frame_numbers, view)


def evenly_spaced(n: int, picks: int) -> list[int]:
    """`picks` places among `n`, from the first to the last, at equal distances but for rounding.

    More picks than places repeat some. A single pick is the first.
    """
    steps = max(1, picks - 1)
    return [(2 * pick * (n - 1) + steps) // (2 * steps) for pick in range(picks)]


def _thin(info: VideoInfo, max_fps: float | None) -> Sequence[int]:
    """The frame_index of every frame to number; all of them without `max_fps`."""
    if max_fps is None:
        return range(info.n_frames)
    gap = 1 / max_fps
    gap -= min(_CLOCK_ROUNDING_SECONDS, gap / 10)
    kept = [0]
    for index, seconds in enumerate(info.pts_seconds):
        if seconds - info.pts_seconds[kept[-1]] >= gap:
            kept.append(index)
    return kept
