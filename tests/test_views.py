"""A region of a frame is another picture than the frame, from the tool call to the page and the pack."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel, ConfigDict
from sampled import with_ids

from vrthinker.engine.base import FrameKey
from vrthinker.engine.hf.features import FeatureCache
from vrthinker.engine.hf.markup import Markup
from vrthinker.engine.hf.model import VisionLanguageModel
from vrthinker.engine.scripted import ScriptedEngine
from vrthinker.episode.episode import EpisodeItem
from vrthinker.episode.runner import EpisodeRunner
from vrthinker.episode.tools.base import FramesShown, ToolContext, ToolOutcome
from vrthinker.episode.tools.registry import ToolRegistry
from vrthinker.episode.tools.select_frames import SelectFrames
from vrthinker.episode.trajectory import StopReason, Trajectory, dump_line, load_trajectories
from vrthinker.errors import InputError, VideoError
from vrthinker.policy.batches import FrameLoader
from vrthinker.policy.packing import pack_group
from vrthinker.policy.sequences import training_sequences
from vrthinker.report.page.page import render_page
from vrthinker.video.frame_cache import FrameCache, file_state
from vrthinker.video.open import open_reader
from vrthinker.video.resize import ResizeSettings, resize_frame
from vrthinker.video.workspace import Workspace
from vrthinker.visibility import Region, ShownFrame, VisibilityRecord, WindowMemory

VIEW = Region(top=0, left=28, bottom=56, right=112)
DONE = "<think>seen</think><answer>TA=1, VQ=0, MQ=2, OA=1</answer>"
RESIZE = ResizeSettings(patch_size=14, merge_size=2, min_pixels=28 * 28, max_pixels=16 * 28 * 28)


class _Arguments(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    frame: int


class Zoom:
    """Shows the same region of any frame."""

    name = "zoom"
    description = "Shows a region of a frame."
    arguments_type: type[BaseModel] = _Arguments
    view = VIEW

    def run(self, arguments: Any, context: ToolContext) -> ToolOutcome:
        return FramesShown((arguments.frame,), self.view)


def call(name: str, **arguments: object) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


ROUNDS = [call("zoom", frame=1), call("select_frames", target_frames=[1, 2]), DONE]


@pytest.fixture(scope="module")
def open_workspace(clip_pair: tuple[Path, Path]) -> Callable[[], Workspace]:
    reader, cache = open_reader(), FrameCache(64 << 20)
    return lambda: Workspace.open(*clip_pair, reader=reader, resize=RESIZE, cache=cache)


@pytest.fixture(scope="module")
def trajectory(open_workspace: Callable[[], Workspace]) -> Trajectory:
    tools = ToolRegistry([SelectFrames(), Zoom()])
    return EpisodeRunner(ScriptedEngine([ROUNDS]), tools=tools).run_one(
        EpisodeItem("zoomed", "a dog", open_workspace)
    )


def test_the_record_tells_the_region_from_its_frame(trajectory: Trajectory) -> None:
    assert trajectory.outcome.stop_reason is StopReason.ANSWERED
    second, third = trajectory.rounds[1:]
    assert second.live[-1] == ShownFrame(1, 1, VIEW)
    assert ShownFrame(1, 1, VIEW) in third.expired
    assert third.live[-2:] == (ShownFrame(2, 1), ShownFrame(2, 2))
    of_frame_1 = [
        (frame.view, frame.height, frame.width) for frame in trajectory.frames if frame.frame_number == 1
    ]
    assert of_frame_1 == [(None, *RESIZE.grid_size(112, 168)), (VIEW, *RESIZE.grid_size(56, 84))]
    assert [record.tool.view for record in trajectory.rounds if record.tool] == [VIEW, None]


def test_it_loads_back_equal_and_whole_frames_are_written_as_before(
    trajectory: Trajectory, tmp_path: Path
) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(dump_line(trajectory), "utf-8")
    assert list(load_trajectories(path)) == [trajectory]
    written = json.loads(path.read_text("utf-8"))
    assert written["rounds"][0]["live"][0] == [0, 1]
    assert written["rounds"][1]["live"][-1] == [1, 1, list(VIEW)]
    assert "view" not in written["frames"][0]
    assert "view" not in written["rounds"][1]["tool"]
    assert written["rounds"][0]["tool"]["view"] == list(VIEW)


def test_a_record_from_before_there_were_views_still_loads(trajectory: Trajectory, tmp_path: Path) -> None:
    def without_views(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without_views(inner) for key, inner in value.items() if key != "view"}
        return [without_views(inner) for inner in value] if isinstance(value, list) else value

    old = json.loads(dump_line(trajectory))
    old["rounds"] = old["rounds"][:1]
    old["frames"] = [frame for frame in old["frames"] if "view" not in frame]
    path = tmp_path / "old.jsonl"
    path.write_text(json.dumps(without_views(old)) + "\n", "utf-8")
    (loaded,) = load_trajectories(path)
    assert {shown.view for shown in loaded.rounds[0].live} == {None}


def test_the_workspace_cuts_the_region_out_before_it_resizes(open_workspace: Callable[[], Workspace]) -> None:
    workspace = open_workspace()
    path = workspace.infos[0].path
    frame = open_reader().frames_at(path, [0]).numpy()[0]
    wanted = resize_frame(np.ascontiguousarray(frame[0:56, 28:112]), RESIZE.grid_size(56, 84))
    for _ in range(2):  # decoded, then from the cache
        (cut,), (whole,) = workspace.pixels([1], VIEW), workspace.pixels([1])
        assert np.array_equal(cut, wanted)
        assert whole.shape[:2] == RESIZE.grid_size(112, 168)
    # Of the same size as its frame, a region is not taken for it.
    corner = Region(0, 0, 56, 84)
    (zoomed,) = FrameCache(10**7).get(path, [0], (112, 168), open_reader(), view=corner)
    assert not np.array_equal(zoomed, frame)


@pytest.mark.parametrize(
    "view", [Region(0, 0, 113, 10), Region(5, 0, 5, 10), Region(-1, 0, 5, 10), Region(0, 9, 5, 3)]
)
def test_a_region_outside_its_frame_is_refused(open_workspace: Callable[[], Workspace], view: Region) -> None:
    workspace = open_workspace()
    with pytest.raises(InputError, match=r"view: got .* allowed: a region within its 112 x 168 pixels"):
        workspace.frame(1, view)
    with pytest.raises(VideoError, match="allowed: a region within 112 x 168 pixels"):
        FrameCache(10**7).get(workspace.infos[0].path, [0], (28, 28), open_reader(), view=view)


def test_the_encoder_sees_two_pictures(
    open_workspace: Callable[[], Workspace], checkpoint_of: Callable[[str], Path]
) -> None:
    import torch

    from vrthinker.engine.base import FrameSegment

    model = VisionLanguageModel(checkpoint_of("qwen2.5-vl"), device=torch.device("cpu"), dtype=torch.float32)
    cache, workspace = FeatureCache(model, 1 << 24), open_workspace()

    def segment(view: Region | None) -> FrameSegment:
        key = FrameKey("a.mp4", 0, 56, 84, view)
        load = lambda: np.ascontiguousarray(workspace.pixels([1], view or Region(56, 84, 112, 168))[0])  # noqa: E731
        return FrameSegment(ShownFrame(0, 1, view), key, (56, 84), load)

    whole, part, again = cache.get([segment(None), segment(VIEW), segment(VIEW)])
    assert cache.misses == 2
    assert torch.equal(part.embeds, again.embeds)
    assert not torch.equal(whole.embeds, part.embeds)


def test_sequences_and_packs_keep_the_region(
    trajectory: Trajectory, checkpoint_of: Callable[[str], Path]
) -> None:
    from transformers import AutoTokenizer

    folder = checkpoint_of("qwen2.5-vl")
    vocabulary = json.loads((folder / "config.json").read_text())["text_config"]["vocab_size"]
    markup = Markup(AutoTokenizer.from_pretrained(folder), vocabulary)
    path = trajectory.videos[0].path
    key = FrameKey(path, 0, *RESIZE.grid_size(56, 84), VIEW, file_state(path))
    with pytest.raises(InputError, match=r"'zoomed', round 1: its call shows no frames \(unknown_tool"):
        training_sequences(trajectory, markup, (28, 28))
    tools = ToolRegistry([SelectFrames(), Zoom()])
    sequences = training_sequences(trajectory, markup, (28, 28), tools=tools)
    assert [key in {k for _, k in sequence.frames} for sequence in sequences] == [True, False]
    (pack,) = pack_group([with_ids(trajectory, markup)], markup, (28, 28), tools=tools)
    assert key in pack.frames
    assert FrameKey(path, 0, *RESIZE.grid_size(112, 168), None, file_state(path)) in pack.frames
    loader = FrameLoader(open_reader(), FrameCache(1 << 24))
    (pixels,) = loader.load([key])
    frame = open_reader().frames_at(path, [0]).numpy()[0]
    assert np.array_equal(
        pixels, resize_frame(np.ascontiguousarray(frame[0:56, 28:112]), (key.height, key.width))
    )
    loader.close()


def test_visibility_keeps_frame_and_region_apart() -> None:
    record = VisibilityRecord(WindowMemory(1))
    record.show(0, [1])
    record.enter()
    assert record.show(1, [1], VIEW) == (ShownFrame(1, 1, VIEW),)
    assert record.enter().live == (ShownFrame(0, 1), ShownFrame(1, 1, VIEW))
    record.show(2, [])
    assert record.enter().expired == (ShownFrame(1, 1, VIEW),)


def test_the_page_shows_the_region(trajectory: Trajectory) -> None:
    page = render_page(trajectory)
    assert ".still-1{" in page
    assert ".still-1-0-28-56-112{" in page
    assert "1 (rows 0 to 55, columns 28 to 111)" in page
