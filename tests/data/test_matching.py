"""Clips of two folders find their prompts, or are named as missing; nothing is guessed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from vrthinker import InputError
from vrthinker.data.matching import clips_in, match_clips


def folders(root: Path, *names: list[str]) -> tuple[Path, Path]:
    made = []
    for letter, clips in zip("AB", names, strict=True):
        (root / letter).mkdir()
        for clip in clips:
            (root / letter / clip).touch()
        made.append(root / letter)
    return made[0], made[1]


def prompts(root: Path, text: str, name: str = "p.txt") -> Path:
    (root / name).write_text(text, "utf-8")
    return root / name


def test_by_order_numbers_count_by_value(tmp_path: Path) -> None:
    both = folders(tmp_path, ["10.mp4", "2.mp4", "notes.txt", ".hidden.mp4"], ["b.webm", "a.mkv"])
    (tmp_path / "B" / "empty").mkdir()
    assert [path.name for path in clips_in(both[0])] == ["2.mp4", "10.mp4"]
    matched = match_clips(both, prompts(tmp_path, "\ufeffa dog\r\na cat\n\n"))
    assert [(one.id, one.prompt, one.clips[0].name, one.clips[1].name) for one in matched.samples] == [
        ("001", "a dog", "2.mp4", "a.mkv"),
        ("002", "a cat", "10.mp4", "b.webm"),
    ]
    assert matched.missing == ()


def test_folders_of_pictures_are_clips(tmp_path: Path) -> None:
    both = folders(tmp_path, ["1.mp4"], [])
    (tmp_path / "B" / "one").mkdir()
    (tmp_path / "B" / "one" / "0.png").touch()
    assert match_clips(both, prompts(tmp_path, "x")).samples[0].clips[1].name == "one"


def test_by_number_missing_clips_are_named(tmp_path: Path) -> None:
    both = folders(tmp_path, ["s7_0.mp4", "s7_2.mp4"], ["0.gif", "1.gif", "2.gif"])
    matched = match_clips(both, prompts(tmp_path, "a\nb\nc\n"), match="number")
    assert [one.prompt for one in matched.samples] == ["a", "c"]
    (line,) = matched.missing
    assert line == f"prompt 002: a clip with the number 1 in {both[0]}"


def test_by_number_both_folders_start_at_the_same_number(tmp_path: Path) -> None:
    both = folders(tmp_path, ["0.mp4", "1.mp4", "2.mp4"], ["1.mp4", "2.mp4", "3.mp4"])
    file = prompts(tmp_path, "a\nb\nc\n")
    matched = match_clips(both, file, match="number")
    assert [one.clips[1].name for one in matched.samples] == ["1.mp4", "2.mp4", "3.mp4"], "no other way fits"
    (tmp_path / "B" / "3.mp4").unlink()
    with pytest.raises(InputError, match=r"A has a clip 0 and .*B has none, and no clip 3.*rename"):
        match_clips(both, file, match="number")
    (tmp_path / "B" / "0.mp4").touch()
    (tmp_path / "B" / "1.mp4").unlink()
    matched = match_clips(both, file, match="number")
    assert [(one.prompt, *(clip.name for clip in one.clips)) for one in matched.samples] == [
        ("a", "0.mp4", "0.mp4"),
        ("c", "2.mp4", "2.mp4"),
    ]
    assert matched.missing == (f"prompt 002: a clip with the number 1 in {both[1]}",)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_table_names_the_clips(tmp_path: Path, kind: str) -> None:
    both = folders(tmp_path, ["x.mp4"], ["x.mp4", "y.mp4"])
    rows = [
        {"id": "one", "prompt": "a, dog", "video": "x.mp4"},
        {"id": "two", "prompt": "cat", "video": "y.mp4"},
    ]
    file = tmp_path / f"p.{kind}"
    if kind == "csv":
        file.write_text('id,prompt,video\none,"a, dog",x.mp4\ntwo,cat,y.mp4\n')
    elif kind == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pytest.importorskip("pyarrow")
        from vrthinker.data.tables import table_bytes

        file.write_bytes(table_bytes(file, rows, ["id", "prompt", "video"]))
    matched = match_clips(both, file)
    assert [(one.id, one.prompt) for one in matched.samples] == [("one", "a, dog")]
    assert matched.missing == (f"prompt two: {both[0] / 'y.mp4'}",)


@pytest.mark.parametrize(
    ("clips", "text", "match", "message"),
    [
        ((["1.mp4"], ["1.mp4", "2.mp4"]), "a\nb", "order", "A has 1 clips"),
        ((["a.mp4"], ["1.mp4"]), "a", "number", "a.mp4: got a name without a number"),
        ((["1.mp4", "01.mp4"], ["1.mp4"]), "a", "number", "both with the number 1"),
        ((["1.mp4", "5.mp4"], ["1.mp4"]), "a", "number", "got 5.mp4, allowed: numbers of the 1 prompts"),
        ((["1.mp4"], ["1.mp4"]), "\n \n", "order", "got no prompt"),
        ((["1.mp4"], ["1.mp4"]), "a\n\nb", "order", "got an empty prompt 2"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, clips: tuple[list[str], list[str]], text: str, match: str, message: str
) -> None:
    both = folders(tmp_path, *clips)
    with pytest.raises(InputError, match=re.escape(message)):
        match_clips(both, prompts(tmp_path, text), match=match)  # type: ignore[arg-type]


def test_bad_tables_are_refused(tmp_path: Path) -> None:
    both = folders(tmp_path, ["1.mp4"], ["1.mp4"])
    for text, message in (
        ("prompt,clip\na,1.mp4\n", "got prompt, clip, allowed: id, prompt, video"),
        ("prompt,video\na,1.mp4\nb,\n", "rows with and without a video"),
        ("id,prompt\n1,a\n1,b\n", "the id 1 twice"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            match_clips(both, prompts(tmp_path, text, "p.csv"))
    with pytest.raises(InputError, match="line 1 is no UTF-8 text or no JSON object"):
        match_clips(both, prompts(tmp_path, "[" * 5000, "p.jsonl"))
    with pytest.raises(InputError, match="No such file"):
        match_clips((tmp_path / "no", both[1]), prompts(tmp_path, "a"))
