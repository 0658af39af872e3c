"""World folders: the same bytes however they were made, one clear line for what cannot be."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forks import Outcomes, assert_session_ends
from world_worker import PAIRS_PER_TASK, job

from vrthinker.data.pairs import load_pairs
from vrthinker.errors import InputError, VRThinkerError
from vrthinker.world import files
from vrthinker.world.files import (
    MAX_LINE_BYTES,
    PAIRS_FILE,
    TRUTH_FILE,
    WORLD_FILE,
    clip_paths,
    load_pairs_of,
    load_truths,
    make_world,
    sample_world,
    write_pairs,
)
from vrthinker.world.pixels import DRAWING
from vrthinker.world.world import PRESETS, PairTruth, sample_pair

EASY, MEDIUM = PRESETS["easy"], PRESETS["medium"]


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but what killed runs left behind."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".new")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole world of a few pairs; to be copied, not changed."""
    folder = tmp_path_factory.mktemp("world") / "easy"
    make_world(folder, EASY, pairs=4, seed=1, workers=1)
    return folder


@pytest.fixture
def own(world: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(world, tmp_path / "own")


def test_a_folder_holds_clips_pairs_truths_and_its_configuration(world: Path) -> None:
    truths = sample_world(EASY, 4, 1)
    clips = {path.relative_to(world).as_posix() for truth in truths for path in clip_paths(world, truth)}
    assert set(tree(world)) == {PAIRS_FILE, TRUTH_FILE, WORLD_FILE, *clips}
    assert not list(world.rglob("*.new"))
    assert load_truths(world) == truths == [sample_pair(EASY, 1, index) for index in range(4)]
    assert json.loads((world / WORLD_FILE).read_bytes()) == {
        "world": EASY.model_dump(mode="json"),
        "pairs": 4,
        "seed": 1,
        "prefix": "world",
        "drawing": DRAWING,
    }


def test_pairs_load_as_any_pairs_file_with_the_true_labels_and_nothing_more_of_the_truth(world: Path) -> None:
    pairs, truths = load_pairs(world / PAIRS_FILE), load_truths(world)
    assert load_pairs_of(world) == pairs
    for pair, truth in zip(pairs, truths, strict=True):
        assert (pair.id, pair.prompt, pair.labels) == (truth.id, truth.caption, truth.judgments.as_dict())
        assert (pair.video_1, pair.video_2) == clip_paths(world, truth)
        assert pair.video_1.is_file()
        assert pair.video_2.is_file()
    for line in (world / PAIRS_FILE).read_text().splitlines():
        assert set(json.loads(line)) == {"id", "prompt", "video_1", "video_2", "labels"}


def test_a_folder_can_be_moved(own: Path, tmp_path: Path) -> None:
    moved = own.rename(tmp_path / "elsewhere")
    assert all(pair.video_1.is_file() and pair.video_2.is_file() for pair in load_pairs_of(moved))


@pytest.mark.multi_process
def test_the_number_of_processes_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_PAIRS_PER_TASK", 3)
    for workers in (1, 2):
        made = make_world(tmp_path / str(workers), EASY, pairs=10, seed=9, prefix="p", workers=workers)
        assert [truth.id for truth in made] == [f"p-9-{index:06d}" for index in range(10)]
    one, two = tree(tmp_path / "1"), tree(tmp_path / "2")
    assert len(one) == 2 * 10 + 3
    assert one == two


def test_other_seeds_make_other_files(world: Path, tmp_path: Path) -> None:
    make_world(tmp_path / "w", EASY, pairs=4, seed=2, workers=1)
    one, two = tree(world), tree(tmp_path / "w")
    assert not set(one.values()) & set(two.values())


def test_given_pairs_are_written_as_a_world_folder(tmp_path: Path) -> None:
    truths = [sample_pair(EASY, 0, 5, "demo"), sample_pair(MEDIUM, 0, 2, "demo")]
    write_pairs(tmp_path / "w", truths)
    assert load_truths(tmp_path / "w") == truths
    assert [pair.id for pair in load_pairs_of(tmp_path / "w")] == [truth.id for truth in truths]


# Runs that were cut short


def clips_in(folder: Path) -> list[Path]:
    return list((folder / "clips").glob("*.mp4"))


@pytest.mark.multi_process
def test_a_killed_run_is_continued_to_the_same_bytes_and_leaves_no_process_behind(
    tmp_path: Path, forked: Outcomes
) -> None:
    pairs, folder = 16, tmp_path / "world"
    (killed,) = forked([job(folder, pairs=pairs, seed=3, die_after=1)])
    assert killed["code"] == -9, killed
    assert_session_ends(killed["pid"])
    assert not (folder / PAIRS_FILE).exists()
    assert 2 * PAIRS_PER_TASK <= len(clips_in(folder)) < 2 * pairs
    with pytest.raises(InputError, match=r"truth\.jsonl"):
        load_truths(folder)

    # Whatever a killed run left of a clip is no clip.
    victim = clip_paths(folder, sample_pair(MEDIUM, 3, pairs - 1, "medium"))[1]
    victim.with_suffix(".12345.new").write_bytes(b"half a clip")
    make_world(folder, MEDIUM, pairs=pairs, seed=3, prefix="medium", workers=1)
    make_world(tmp_path / "whole", MEDIUM, pairs=pairs, seed=3, prefix="medium", workers=1)
    assert tree(folder) == tree(tmp_path / "whole")
    assert all(pair.video_1.suffix == pair.video_2.suffix == ".mp4" for pair in load_pairs_of(folder))


@pytest.mark.slow
@pytest.mark.multi_process
def test_killed_again_and_again_it_gets_there(tmp_path: Path, forked: Outcomes) -> None:
    pairs, folder = 40, tmp_path / "world"
    for die_after in (1, 3, 2, 1):
        (killed,) = forked([job(folder, pairs=pairs, seed=4, die_after=die_after)])
        assert killed["code"] == -9, killed
        assert_session_ends(killed["pid"])
        assert not (folder / PAIRS_FILE).exists()
    (finished,) = forked([job(folder, pairs=pairs, seed=4)])
    assert finished["result"] == pairs, finished
    make_world(tmp_path / "whole", MEDIUM, pairs=pairs, seed=4, prefix="medium", workers=1)
    assert tree(folder) == tree(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.multi_process
def test_a_worker_that_dies_is_one_clear_line(tmp_path: Path, forked: Outcomes) -> None:
    """As when memory runs out."""
    folder = tmp_path / "world"
    (broken,) = forked([job(folder, pairs=200, seed=0, die_after=1, whose="worker")])
    assert (broken["exit_code"], broken["stderr"]) == (1, "")
    assert broken["error"] == f"{folder}: a worker process died; give the same command again"
    assert_session_ends(broken["pid"])
    assert not (folder / PAIRS_FILE).exists()


@pytest.mark.parametrize("workers", [1, 2, None])
def test_a_run_killed_before_its_index_is_completed(own: Path, world: Path, workers: int | None) -> None:
    (own / PAIRS_FILE).unlink()
    make_world(own, EASY, pairs=4, seed=1, workers=workers)
    assert tree(own) == tree(world)


def test_what_is_missing_is_made_again_and_what_is_there_is_kept(own: Path, world: Path) -> None:
    truths = load_truths(own)
    gone, kept = clip_paths(own, truths[2])[1], clip_paths(own, truths[0])[0]
    before = kept.stat().st_mtime_ns
    for path in (gone, own / TRUTH_FILE):
        path.unlink()
        make_world(own, EASY, pairs=4, seed=1, workers=1)
        assert tree(own) == tree(world), path
    assert kept.stat().st_mtime_ns == before


def test_a_whole_folder_is_left_alone(own: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in own.rglob("*")}
    assert make_world(own, EASY, pairs=4, seed=1) == load_truths(own)
    assert {path: path.stat().st_mtime_ns for path in own.rglob("*")} == before


@pytest.mark.slow
@pytest.mark.multi_process
def test_a_full_disk_is_one_clear_line_and_leaves_no_clip_of_any_process(
    tmp_path: Path, forked: Outcomes
) -> None:
    (full,) = forked([job(tmp_path / "w", pairs=8, seed=0, most_bytes=4096)])
    assert (full["exit_code"], full["stderr"]) == (1, "")
    assert "cannot be written (File too large); make room" in full["error"]
    assert_session_ends(full["pid"])
    assert list((tmp_path / "w" / "clips").iterdir()) == []
    assert not (tmp_path / "w" / PAIRS_FILE).exists()


def test_a_full_disk_is_one_clear_line_and_leaves_no_clip(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(
            VRThinkerError, match=r"cannot be written \(File too large\); make room"
        ) as caught:
            make_world(tmp_path / "w", EASY, pairs=2, seed=0, workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "w" / "clips").iterdir()) == []
    assert not (tmp_path / "w" / PAIRS_FILE).exists()


# What is refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"config": MEDIUM}, "world.bars=0.45"),
        ({"config": MEDIUM}, "this run has world.frames=[24, 48]"),
        ({"seed": 2}, "seed=1; this run has seed=2"),
        ({"pairs": 5}, "pairs=4; this run has pairs=5"),
        ({"pairs": 3}, "pairs=4; this run has pairs=3"),
        ({"prefix": "other"}, 'prefix="world"; this run has prefix="other"'),
    ],
)
def test_another_world_in_the_same_folder_is_refused(
    changes: dict[str, Any], words: str, own: Path, world: Path
) -> None:
    asked: dict[str, Any] = {"config": EASY, "pairs": 4, "seed": 1, **changes}
    with pytest.raises(InputError) as caught:
        make_world(own, asked.pop("config"), **asked, workers=1)
    for word in words.split("; "):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    assert tree(own) == tree(world)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pairs": 0}, "got 0 pairs, allowed: 1 to 1000000"),
        ({"pairs": -1}, "got -1 pairs"),
        ({"pairs": 10**12}, "got 1000000000000 pairs"),
        ({"seed": -1}, "got seed -1"),
        ({"seed": 2**64}, "allowed: 0 to 2^64 - 1"),
        ({"seed": 10**4000}, "got seed 1000"),
        ({"workers": 0}, "got 0 workers"),
        ({"workers": -2}, "got -2 workers"),
        ({"prefix": ""}, "prefix ''"),
        ({"prefix": "../up"}, "prefix '../up'"),
        ({"prefix": "a/b"}, "prefix 'a/b'"),
        ({"prefix": "two\nlines"}, "prefix 'two"),
        ({"prefix": "x" * 61}, "up to 60"),
    ],
)
def test_numbers_and_names_out_of_range_are_refused_before_anything_is_made(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {"pairs": 2, "seed": 0, "workers": 1, **changes}
    with pytest.raises(InputError) as caught:
        make_world(tmp_path / "w", EASY, **asked)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "w").exists()


def test_the_longest_ids_are_fine() -> None:
    (truth,) = sample_world(EASY, 1, 2**64 - 1, "x" * 60)
    assert PairTruth.model_validate_json(truth.model_dump_json()) == truth


def test_a_folder_that_cannot_be_made_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    for out in (tmp_path / "file", tmp_path / "file" / "w"):
        with pytest.raises(InputError, match="cannot be made"):
            make_world(out, EASY, pairs=1, seed=0)
        with pytest.raises(InputError, match="cannot be made"):
            write_pairs(out, [sample_pair(EASY, 0, 0)])
    assert (tmp_path / "file").read_text() == "precious"


def test_somebody_elses_world_file_is_no_world(tmp_path: Path) -> None:
    (tmp_path / WORLD_FILE).write_text("[1, 2]")
    with pytest.raises(InputError, match=r"world\.json"):
        make_world(tmp_path, EASY, pairs=1, seed=0)
    assert (tmp_path / WORLD_FILE).read_text() == "[1, 2]"


def damages() -> dict[str, tuple[Callable[[list[bytes]], list[bytes]], str]]:
    def edit(**changes: Any) -> Callable[[list[bytes]], list[bytes]]:
        def apply(lines: list[bytes]) -> list[bytes]:
            row = json.loads(lines[2])
            row.update(changes)
            return [*lines[:2], json.dumps(row).encode() + b"\n", *lines[3:]]

        return apply

    def clip(**changes: Any) -> Callable[[list[bytes]], list[bytes]]:
        def apply(lines: list[bytes]) -> list[bytes]:
            row = json.loads(lines[2])
            row["clips"][1].update(changes)
            return edit(**row)(lines)

        return apply

    return {
        "a torn last line": (lambda lines: [*lines[:3], lines[3][:200]], ":4: "),
        "a torn line amid": (lambda lines: [*lines[:1], lines[1][:-40] + b"\n", *lines[2:]], ":2: "),
        "no JSON": (lambda lines: [b"this is no truth\n", *lines], ":1: "),
        "no text": (lambda lines: [*lines, b"\xff\xfe\x00\x01\n"], ":5: "),
        "a blank line": (lambda lines: [*lines[:2], b"\n", *lines[2:]], ":3: "),
        "nothing": (lambda lines: [], "got no line"),
        "a list": (lambda lines: [b"[]\n"], ":1: "),
        "nested without end": (lambda lines: [b"[" * 500_000 + b"\n"], ":1: "),
        "a line without end": (lambda lines: [b'{"id": "' + b"x" * (MAX_LINE_BYTES + 5)], ":1: got more"),
        "a pair twice": (lambda lines: [*lines, lines[1]], ":5: got world-1-000001 again"),
        "an unknown key": (edit(answer=1), ":3: answer: Extra inputs"),
        "a key of two lines": (edit(**{"a\nb\x1b[31m": 1}), ":3: a\\nb\\x1b[31m: "),
        "a long key": (edit(**{"k" * 5000: 1}), ":3: " + "k" * 37 + "...: "),
        "a billion frames": (clip(n_frames=10**9), ":3: clips.1.n_frames: "),
        "a negative seed": (clip(seed=-1), ":3: clips.1.seed: "),
        "a lane that is no number": (clip(lane=float("nan")), ":3: "),
        "an event nowhere": (
            clip(
                events=[
                    {"first_index": 3, "end_index": 5, "defects": [], "gap": [1, 9], "hint": "bars"},
                ]
            ),
            ":3: clips.1: ",
        ),
    }


@pytest.mark.parametrize("name", damages())
def test_a_damaged_truth_file_is_one_clear_line(name: str, own: Path) -> None:
    damage, words = damages()[name]
    path = own / TRUTH_FILE
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(damage(lines)))
    with pytest.raises(InputError) as caught:
        load_truths(own)
    message = str(caught.value)
    assert message.startswith(str(path)), message
    assert words in message
    assert message.isprintable(), message
    assert len(message) < 600 + len(str(path))


def test_no_truth_file_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"truth\.jsonl: No such file or directory; `vrthinker world make`"):
        load_truths(tmp_path)
    (tmp_path / TRUTH_FILE).mkdir()
    with pytest.raises(InputError, match=r"truth\.jsonl: not a file"):
        load_truths(tmp_path)


def test_an_endless_truth_file_is_not_read_to_its_end(tmp_path: Path) -> None:
    (tmp_path / TRUTH_FILE).symlink_to("/dev/zero")
    with pytest.raises(InputError, match=r"truth\.jsonl: not a file"):
        load_truths(tmp_path)


def test_an_error_of_the_package_is_what_a_failing_encoder_becomes(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    truth = sample_pair(EASY, 0, 0)
    clip_paths(tmp_path, truth)[0].mkdir()
    with pytest.raises(VRThinkerError, match="cannot be written"):
        write_pairs(tmp_path, [truth])
    assert not list(tmp_path.rglob("*.new"))
