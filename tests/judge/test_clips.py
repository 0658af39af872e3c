"""What a judge says of clips that it was not trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import pytest
from clips import make_clip
from PIL import Image

from vrthinker import Judge
from vrthinker.data.pairs import Pair
from vrthinker.engine.base import Engine
from vrthinker.engine.scripted import ScriptedEngine
from vrthinker.episode.settings import JudgeSettings, load_judge_settings
from vrthinker.judge_file import record_of
from vrthinker.judge_items import FOREIGN_NOTE
from vrthinker.video.open import open_reader
from vrthinker.world.files import clip_paths, make_world
from vrthinker.world.world import PRESETS, WORLD_COMMENT

ANSWER = "<snapshot>s</snapshot><think>t</think><answer>TA=1, VQ=1, MQ=0, OA=1, CF=1</answer>"


def judge(clips: str = "synthetic", **more: object) -> Judge:
    settings = JudgeSettings.model_validate({"clips": clips, **more})
    engine: Engine = ScriptedEngine(lambda session, number, messages: ANSWER)  # type: ignore[abstract]
    return Judge(engine, settings)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("world")
    (truth,) = make_world(folder, PRESETS["easy"], pairs=1, seed=0, workers=1)
    return clip_paths(folder, truth)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("foreign")
    return make_clip(folder / "a.mp4", 24, size=(112, 112)), make_clip(folder / "b.mp4", 24, size=(112, 112))


def images(folder: Path, clip: Path) -> Path:
    """A world clip's frames as a folder of images."""
    folder.mkdir()
    with av.open(str(clip)) as container:
        for index, frame in enumerate(container.decode(video=0)):
            Image.fromarray(frame.to_ndarray(format="rgb24")).save(folder / f"{index:03d}.png")
    return folder


def gray_clip(path: Path, comment: str | None, codec: str = "libx264") -> Path:
    with av.open(str(path), "w") as container:
        if comment is not None:
            container.metadata["comment"] = comment
        stream: Any = container.add_stream(codec, rate=8, options={"deadline": "realtime", "cpu-used": "8"})
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for _ in range(8):
            container.mux(stream.encode(av.VideoFrame(64, 64, "yuv420p")))
        container.mux(stream.encode())
    return path


def notes_of(judge: Judge, first: Path, second: Path) -> list[str]:
    """A pair's notes; the same through every way in and out."""
    verdict = judge("a red ball", first, second)
    (finished,) = judge.judge_pairs([Pair(id="x", prompt="a red ball", video_1=first, video_2=second)])
    assert verdict.judgments is not None
    notes = verdict.record("x").notes
    assert list(verdict.notes) == notes
    assert record_of(finished, judge=judge, seed=0).notes == notes
    return notes


def test_a_judge_of_the_world_has_nothing_to_say_of_world_clips(world: tuple[Path, Path]) -> None:
    assert notes_of(judge(), *world) == []
    assert notes_of(judge(), *world[::-1]) == []


def test_a_judge_of_the_world_says_when_clips_are_foreign(
    world: tuple[Path, Path], foreign: tuple[Path, Path], tmp_path: Path
) -> None:
    pictures = images(tmp_path / "pictures", world[0])
    other = gray_clip(tmp_path / "other.mp4", WORLD_COMMENT + " of somebody else")
    for first, second in (
        foreign,
        (world[0], foreign[1]),
        (foreign[0], world[1]),
        (pictures, world[1]),
        (world[0], other),
    ):
        assert notes_of(judge(), first, second) == [FOREIGN_NOTE]
    assert "means nothing" in FOREIGN_NOTE


def test_the_note_comes_once_a_verdict_and_beside_others(
    world: tuple[Path, Path], foreign: tuple[Path, Path]
) -> None:
    one = judge(note="one line about the checkpoint")
    for _ in range(2):
        assert notes_of(one, *foreign) == [FOREIGN_NOTE, "one line about the checkpoint"]
    assert notes_of(one, *world) == ["one line about the checkpoint"]


def test_a_judge_of_anything_says_nothing(world: tuple[Path, Path], foreign: tuple[Path, Path]) -> None:
    for clips in (world, foreign):
        assert notes_of(judge("any"), *clips) == []
    assert JudgeSettings().clips == "any"


def test_what_it_judges_is_read_from_the_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "vrthinker.json").write_text(JudgeSettings(clips="synthetic").model_dump_json())
    loaded = load_judge_settings(tmp_path)
    assert loaded is not None
    assert loaded.clips == "synthetic"


@pytest.mark.parametrize("ending", ["mp4", "mkv", "webm"])
@pytest.mark.parametrize(
    ("comment", "read"),
    [
        (None, ""),
        (WORLD_COMMENT, WORLD_COMMENT),
        ("ünïcode ✓", "ünïcode ✓"),
        ("x" * 5000, "x" * 200),
        (WORLD_COMMENT + "!", WORLD_COMMENT + "!"),
    ],
)
def test_a_files_comment_is_read(comment: str | None, read: str, ending: str, tmp_path: Path) -> None:
    codec = "libvpx-vp9" if ending == "webm" else "libx264"
    path = gray_clip(tmp_path / f"clip.{ending}", comment, codec)
    info = open_reader().probe(path)
    assert info.comment == read
    assert "comment=" not in repr(info)


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_a_comment_that_is_no_text_harms_nobody(ending: str, tmp_path: Path) -> None:
    path = gray_clip(tmp_path / f"clip.{ending}", "hello")
    content = path.read_bytes()
    assert content.count(b"hello") == 1
    path.write_bytes(content.replace(b"hello", b"h\xff\xfe\x1bo"))
    assert open_reader().probe(path).comment == "h\ufffd\ufffd\x1bo"
