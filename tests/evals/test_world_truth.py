"""A pair's planted truth, as the evidence page shows it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from vrthinker.evals.world_truth import find_truth, page_truth
from vrthinker.world.files import TRUTH_FILE, clip_paths, make_world
from vrthinker.world.world import PRESETS, PairTruth


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[PairTruth]]:
    folder = tmp_path_factory.mktemp("world")
    return folder, make_world(folder, PRESETS["easy"], pairs=12, seed=6, workers=1)


WORDS = {"color": "wrong color", "noise": "noise", "jump": "off lane"}


def expected(pair: PairTruth, *, swapped: bool) -> set[tuple[int, int, int, str, bool]]:
    """Every event that shows something, found by walking over the frames."""
    events = set()
    for number, clip in enumerate(pair.clips):
        first = [i * clip.n_frames // 4 for i in range(4)]
        for event in clip.events:
            frames = [i for i in range(clip.n_frames) if event.covers(i)]
            text = ", ".join(WORDS[defect.value] for defect in event.defects)
            video = (2, 1)[number] if swapped else (1, 2)[number]
            if event.defects:
                events.add((video, frames[0], frames[-1] + 1, text, not set(frames) & set(first)))
    return events


def test_the_truth_of_both_orders_is_found(world: tuple[Path, list[PairTruth]]) -> None:
    folder, pairs = world
    kinds = set()
    for pair in pairs:
        first, second = clip_paths(folder, pair)
        for swapped, files in ((False, (first, second)), (True, (second, first))):
            truth = find_truth(*files)
            assert truth is not None
            assert truth == page_truth(pair, swapped=swapped)
            found = {(e.video, e.first_index, e.end_index, e.text, e.hidden) for e in truth.events}
            assert found == expected(pair, swapped=swapped)
            assert len(truth.events) == len(found)
            wanted = pair.judgments.as_dict()
            turned = {code: (0, 2, 1)[label] for code, label in wanted.items()}
            assert truth.judgments == (turned if swapped else wanted)
            kinds |= {event.hidden for event in truth.events}
    assert kinds == {True, False}
    empty = [e for pair in pairs for clip in pair.clips for e in clip.events if not e.defects]
    assert empty, "events without a defect are there, and left out"


def test_links_and_relative_paths_lead_to_the_same_truth(
    world: tuple[Path, list[PairTruth]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, pairs = world
    files = clip_paths(folder, pairs[1])
    (tmp_path / "link").symlink_to(folder)
    linked = [tmp_path / "link" / path.relative_to(folder) for path in files]
    assert find_truth(*linked) == page_truth(pairs[1])
    monkeypatch.chdir(folder / "clips")
    assert find_truth(Path(files[0].name), Path(files[1].name)) == page_truth(pairs[1])


def test_other_clips_have_no_truth(world: tuple[Path, list[PairTruth]], tmp_path: Path) -> None:
    folder, pairs = world
    (a1, a2), (b1, b2) = clip_paths(folder, pairs[0]), clip_paths(folder, pairs[1])
    for files in ((a1, b2), (b2, a1), (a1, a1), (a2, a2), (a1, b1)):
        assert find_truth(*files) is None
    copies = [Path(shutil.copy(path, tmp_path / path.name)) for path in (a1, a2)]
    assert find_truth(*copies) is None, "a copy elsewhere has no truth beside it"
    assert find_truth(copies[0], a2) is None
    assert find_truth(Path("a.mp4"), Path("b.mp4")) is None
    assert find_truth(Path("/"), Path("/")) is None


@pytest.mark.parametrize("content", [b"", b"not a truth\n", b"\xff\n", b'{"id": "x"}\n', b"[" * 100_000])
def test_some_other_file_of_that_name_is_no_truth(
    content: bytes, world: tuple[Path, list[PairTruth]], tmp_path: Path
) -> None:
    folder, pairs = world
    own = tmp_path / "own"
    (own / "clips").mkdir(parents=True)
    files = [Path(shutil.copy(path, own / "clips")) for path in clip_paths(folder, pairs[0])]
    (own / TRUTH_FILE).write_bytes(content)
    assert find_truth(*files) is None
    (own / TRUTH_FILE).unlink()
    os.mkfifo(own / TRUTH_FILE)
    assert find_truth(*files) is None, "a pipe is not waited for"
    (own / TRUTH_FILE).unlink()
    shutil.copy(folder / TRUTH_FILE, own)
    assert find_truth(*files) == page_truth(pairs[0])
