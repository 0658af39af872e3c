"""A trajectories file is only ever added to, and no other file is taken for one."""

from __future__ import annotations

from pathlib import Path

import pytest
from full_disk import full_at

from vrthinker.episode.trajectory import Trajectory, dump_line
from vrthinker.errors import InputError, MachineError
from vrthinker.records.trajectories import append_trajectory, check_trajectories_file

LINE = '{"schema_version":1,"id":"a"}\n'


def test_a_line_begins_as_the_check_expects(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    append_trajectory(path, dump_line(Trajectory.model_construct(id="a")))
    check_trajectories_file(path)


@pytest.mark.parametrize("content", ["", LINE, LINE * 2, LINE + LINE[:9], LINE[:1], LINE[:20]])
def test_what_a_run_left_is_added_to_after_a_torn_line_is_cut_off(tmp_path: Path, content: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(content)
    check_trajectories_file(path)
    assert path.read_text() == content
    append_trajectory(path, LINE)
    assert path.read_text() == LINE * (content.count("\n") + 1)


@pytest.mark.parametrize(
    "content", ["precious text without a newline", "{}\n", "\n", '{"schema_version":2,"id":"a"}']
)
def test_a_file_that_holds_something_else_is_refused_and_kept(tmp_path: Path, content: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=r"t\.jsonl: holds something else than trajectories"):
        check_trajectories_file(path)
    assert path.read_text() == content


def test_a_file_of_the_same_command_is_refused(tmp_path: Path) -> None:
    clip, link, absent = tmp_path / "clip", tmp_path / "link", tmp_path / "absent"
    clip.touch()
    link.symlink_to(clip)
    for path, other in [(clip, clip), (link, clip), (clip, link), (absent, tmp_path / "." / "absent")]:
        with pytest.raises(InputError, match="got the same file twice"):
            check_trajectories_file(path, tmp_path / "another", other)
    assert not absent.exists()


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a file"):
        check_trajectories_file(tmp_path)
    with pytest.raises(InputError, match="No such file or directory"):
        check_trajectories_file(tmp_path / "absent" / "t.jsonl")


def test_a_full_disk_leaves_the_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(LINE + LINE[:9])
    with full_at(len(LINE) + 10), pytest.raises(MachineError, match=r"t\.jsonl: cannot .*; make room"):
        append_trajectory(path, LINE)
    assert path.read_text() == LINE
