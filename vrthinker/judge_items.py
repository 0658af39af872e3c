"""The questions put to a judge: an item for each pair, with its clips, caption and notes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from vrthinker.episode.episode import EpisodeItem, episode_seed
from vrthinker.episode.orders import SWAPPED
from vrthinker.episode.settings import SYNTHETIC_COMMENT, JudgeSettings
from vrthinker.errors import InputError
from vrthinker.video.clips import ClipSource, as_clip, is_same_clip
from vrthinker.video.frame_cache import FrameCache
from vrthinker.video.reader import VideoReader
from vrthinker.video.workspace import Workspace

if TYPE_CHECKING:
    from vrthinker.data.pairs import Pair

FOREIGN_NOTE = (
    "this judge was trained on the package's synthetic world only, and these clips are not from it: "
    "its verdict on them means nothing"
)
EMPTY_NOTE = "the caption is empty: nothing says what the videos should show"
SAME_NOTE = "both videos are the same file: any preference is the judge's habit"


class JudgeItems:
    """Makes the items of a judge's episodes.

    Args:
        settings: The judge's settings.
        reader: The reader of files.
        cache: The cache of decoded frames.
        check: A function that is called before each item, and raises if the judge is closed.
    """

    def __init__(
        self, settings: JudgeSettings, reader: VideoReader, cache: FrameCache, *, check: Callable[[], None]
    ) -> None:
        self._settings, self._reader, self._cache, self._check = settings, reader, cache, check

    def of_call(
        self,
        item_id: str,
        prompt: str,
        video_1: ClipSource,
        video_2: ClipSource,
        dataset: str | None,
        seed: int,
        *,
        both_orders: bool,
        swapped_seed: int | None = None,
    ) -> list[EpisodeItem]:
        """The items of one call: one, or one for each order of the clips.

        Both have the same seed, unless the second gets one of its own.
        """
        # Bytes and open files are read once, here, whatever number of episodes shows them.
        video_1, video_2 = (
            as_clip(video, f"video {i}") for i, video in enumerate((video_1, video_2), start=1)
        )
        items = [self.one(item_id, prompt, video_1, video_2, dataset, seed)]
        if both_orders:
            second = seed if swapped_seed is None else swapped_seed
            items.append(self.one(item_id + SWAPPED, prompt, video_2, video_1, dataset, second))
        return items

    def of_pair(self, number: int, pair: Pair | tuple[str, ClipSource, ClipSource], seed: int) -> EpisodeItem:
        """The item of a pair. What cannot be judged is an item that cannot start."""
        pair_id = str(number) if isinstance(pair, tuple) else pair.id
        try:
            if not isinstance(pair, tuple):
                clips = pair.video_1, pair.video_2
                return self.one(pair_id, pair.prompt, *clips, pair.dataset, episode_seed(seed, pair_id))
            if len(pair) != 3:
                raise InputError(f"pairs: got {len(pair)} values, allowed: (caption, video 1, video 2)")
            return self.one(pair_id, *pair, None, episode_seed(seed, pair_id))
        except InputError as error:
            return EpisodeItem(pair_id, "", _refused(error))

    def of_group(self, group_id: str, pairs: Sequence[Pair], *, seed: int) -> EpisodeItem:
        """The item of episodes about the same clips, each with a seed and an id of its own.

        Raises:
            InputError: The pairs differ in more than their ids.
        """
        first = pairs[0]
        if any(pair.model_copy(update={"id": first.id}) != first for pair in pairs):
            raise InputError(
                f"group {group_id!r}: got different pairs, allowed: pairs that differ in their ids"
            )
        item = self.one(group_id, first.prompt, first.video_1, first.video_2, first.dataset, 0)
        return replace(
            item,
            group_seeds=tuple(episode_seed(seed, pair.id) for pair in pairs),
            group_ids=tuple(pair.id for pair in pairs),
        )

    def one(
        self,
        item_id: str,
        prompt: str,
        video_1: ClipSource,
        video_2: ClipSource,
        dataset: str | None,
        seed: int,
    ) -> EpisodeItem:
        """The item of one episode. Its clips are opened when it begins.

        Raises:
            InputError: The caption, the dataset, the seed or a clip cannot be used.
        """
        self._check()
        _check_types(prompt, dataset, seed)
        clips = as_clip(video_1, "video 1"), as_clip(video_2, "video 2")
        episode = self._settings.episode

        def open_workspace() -> Workspace:
            workspace = Workspace.open(
                *clips,
                reader=self._reader,
                resize=self._settings.resize,
                cache=self._cache,
                max_fps=episode.max_fps,
                frames_per_video=episode.frames_per_video,
                tolerate_truncation=episode.tolerate_truncation,
            )
            if not prompt.strip():
                workspace.note(EMPTY_NOTE)
            if is_same_clip(*clips):
                workspace.note(SAME_NOTE)
            if self._settings.clips == "synthetic":
                foreign = [info.path for info in workspace.infos if info.comment != SYNTHETIC_COMMENT]
                if foreign:
                    workspace.note(FOREIGN_NOTE)
            return workspace

        own = self._settings.dimensions if dataset is None else None
        dataset = dataset or self._settings.dataset
        return EpisodeItem(item_id, prompt, open_workspace, dataset, seed, dimensions=own)


def _refused(error: InputError) -> Callable[[], Workspace]:
    """What opens the clips of a pair that cannot be judged."""

    def open_workspace() -> Workspace:
        raise error

    return open_workspace


def _check_types(prompt: object, dataset: object, seed: object) -> None:
    if not isinstance(prompt, str):
        raise InputError(f"caption: got {type(prompt).__name__}, allowed: a text")
    if not isinstance(dataset, str | None):
        raise InputError(f"dataset: got {type(dataset).__name__}, allowed: a name, or None")
    if not isinstance(seed, int):
        raise InputError(f"seed: got {seed!r}, allowed: an integer")
