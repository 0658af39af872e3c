"""The provenance of a result row: nothing guessed, no row lost or mixed."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from full_disk import full_at

from vrthinker.errors import VRThinkerError
from vrthinker.records import provenance
from vrthinker.records.provenance import append_row, git_state


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=Test", "-c", "user.email=test@example.org"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()


def checkout(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository that holds a copy of the module, and the module believing that it runs from there."""
    own = Path(provenance.__file__)
    copy = folder / "vrthinker" / "records" / "provenance.py"
    copy.parent.mkdir(parents=True)
    copy.write_bytes(own.read_bytes())
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "first")
    monkeypatch.setattr(provenance, "__file__", str(copy))
    monkeypatch.delenv("VRTHINKER_COMMIT", raising=False)
    return copy


def test_machine_and_versions_are_those_of_this_process() -> None:
    facts = provenance.provenance("vrthinker judge")
    assert facts["command"] == "vrthinker judge"
    now = datetime.now(UTC)
    assert timedelta() <= now - datetime.fromisoformat(facts["date"]) < timedelta(minutes=5)
    assert facts["machine"]["cores"] == len(os.sched_getaffinity(0))
    assert facts["machine"]["memory_bytes"] > 2**28
    assert isinstance(facts["machine"]["gpus"], list)
    assert facts["versions"]["python"] == platform.python_version()
    for package in ("vrthinker", "torch", "transformers", "av", "numpy"):
        assert facts["versions"][package] == importlib.metadata.version(package)
    json.dumps(facts, allow_nan=False)


def test_a_package_that_is_not_installed_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "PACKAGES", ("numpy", "no-such-package-here"))
    assert provenance.provenance("x")["versions"]["no-such-package-here"] is None


def test_it_loads_no_tensor_library() -> None:
    code = (
        "import sys; from vrthinker.records.provenance import provenance; provenance(); "
        "print({'torch', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "set()"


def test_the_command_is_this_process_without_machine_paths(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text("from vrthinker.records.provenance import provenance; print(provenance()['command'])")
    done = subprocess.run(
        [sys.executable, str(script), "two words", "--n", "3"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.strip() == "python job.py 'two words' --n 3"


def test_commit_and_dirty_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = checkout(tmp_path / "repo", monkeypatch)
    head = git(tmp_path / "repo", "rev-parse", "HEAD")
    assert git_state() == (head, False)
    results = tmp_path / "repo" / "benchmarks" / "results"
    results.mkdir(parents=True)
    (results / "new.jsonl").write_text("{}\n")
    assert git_state() == (head, False)
    copy.write_text(copy.read_text() + "\n")
    assert git_state() == (head, True)


def test_untracked_files_make_a_tree_dirty_and_ignored_ones_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout(tmp_path / "repo", monkeypatch)
    (tmp_path / "repo" / ".git" / "info" / "exclude").write_text("ignored\n")
    (tmp_path / "repo" / "new.py").write_text("")
    assert git_state()[1] is True


def test_a_worktree_and_packed_references_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout(tmp_path / "repo", monkeypatch)
    head = git(tmp_path / "repo", "rev-parse", "HEAD")
    git(tmp_path / "repo", "pack-refs", "--all")
    git(tmp_path / "repo", "gc", "-q")
    assert git_state() == (head, False)
    git(tmp_path / "repo", "worktree", "add", "-q", str(tmp_path / "tree"), "-b", "other")
    copy = tmp_path / "tree" / "vrthinker" / "records" / "provenance.py"
    monkeypatch.setattr(provenance, "__file__", str(copy))
    assert git_state() == (head, False)
    copy.write_text(copy.read_text() + "\n")
    assert git_state() == (head, True)


def test_the_working_directory_is_never_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unpacked folder may name a program in its .git/config, and hold a copy of this very file."""
    copy = checkout(tmp_path / "repo", monkeypatch)
    installed = tmp_path / "site-packages" / "vrthinker" / "records" / "provenance.py"
    installed.parent.mkdir(parents=True)
    installed.write_bytes(copy.read_bytes())
    monkeypatch.setattr(provenance, "__file__", str(installed))
    monkeypatch.chdir(tmp_path / "repo")
    monkeypatch.setattr(provenance.subprocess, "run", lambda *a, **k: pytest.fail("a program was started"))
    assert git_state() == (None, None)


@pytest.mark.parametrize("where", ["own checkout", "working directory"])
def test_no_program_that_a_checkout_names_is_run(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trap, ran = tmp_path / "trap.sh", tmp_path / "ran"
    trap.write_text(f"#!/bin/sh\ntouch {ran}\ncat\n")
    trap.chmod(0o755)
    copy = checkout(tmp_path / "repo", monkeypatch)
    (tmp_path / "repo" / ".gitattributes").write_text("* filter=trap diff=trap\n")
    git(tmp_path / "repo", "add", ".")
    git(tmp_path / "repo", "commit", "-qm", "attributes")
    for name in (
        *("core.fsmonitor", "core.pager", "core.editor", "core.sshCommand", "core.askPass"),
        *("filter.trap.clean", "filter.trap.smudge", "filter.trap.process", "diff.trap.command"),
        *("diff.trap.textconv", "diff.external", "credential.helper", "uploadpack.packObjectsHook"),
    ):
        git(tmp_path / "repo", "config", name, str(trap))
    hooks = tmp_path / "repo" / ".git" / "hooks"
    hooks.mkdir(exist_ok=True)
    for name in ("post-index-change", "fsmonitor-watchman", "query-watchman", "post-checkout"):
        (hooks / name).write_text(trap.read_text())
        (hooks / name).chmod(0o755)
    copy.write_text(copy.read_text() + "# edited\n")
    ran.unlink(missing_ok=True)
    if where == "working directory":
        monkeypatch.undo()
    monkeypatch.chdir(tmp_path / "repo")
    state = git_state()
    if where == "own checkout":
        assert state[1] is True
    assert not ran.exists()
    git(tmp_path / "repo", "status")
    assert ran.exists(), "the trap was set"


def test_an_environment_inside_another_checkout_is_not_that_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = checkout(tmp_path / "repo", monkeypatch)
    inside = tmp_path / "repo" / ".venv" / "vrthinker" / "records" / "provenance.py"
    inside.parent.mkdir(parents=True)
    inside.write_text(copy.read_text() + "# newer\n")
    monkeypatch.setattr(provenance, "__file__", str(inside))
    monkeypatch.chdir(tmp_path)
    assert git_state() == (None, None)


def test_no_commit_yet_and_no_git_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = checkout(tmp_path / "repo", monkeypatch)
    head = git(tmp_path / "repo", "rev-parse", "HEAD")
    with monkeypatch.context() as without_git:
        without_git.setenv("PATH", str(tmp_path))
        assert git_state() == (head, None)
    git(tmp_path / "repo", "update-ref", "-d", "HEAD")
    assert git_state() == (None, None)
    monkeypatch.setenv("VRTHINKER_COMMIT", "0123abc")
    assert git_state() == ("0123abc", None)
    assert copy.exists()


def test_rows_carry_the_provenance_and_accumulate(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rows.jsonl"
    append_row(path, {"benchmark": "x", "milliseconds": 1.5}, command="bench")
    append_row(path, {"benchmark": "y"}, command="bench")
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert (first["benchmark"], first["milliseconds"], second["benchmark"]) == ("x", 1.5, "y")
    for row in (first, second):
        assert {"date", "command", "commit", "dirty", "machine", "versions"} <= row.keys()


def test_a_line_that_a_killed_writer_left_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"benchmark": "whole"}\n{"benchm')
    append_row(path, {"benchmark": "next"})
    lines = path.read_text().splitlines()
    assert lines[:2] == ['{"benchmark": "whole"}', '{"benchm']
    assert json.loads(lines[2])["benchmark"] == "next"


def test_a_row_that_finds_no_room_is_an_error_and_nothing_written(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"benchmark": "whole"}\n')
    with full_at(40), pytest.raises(VRThinkerError, match=r"rows\.jsonl: cannot be written"):
        append_row(path, {"benchmark": "next"}, command="bench")
    assert path.read_text() == '{"benchmark": "whole"}\n'


@pytest.mark.parametrize("row", [{"commit": "mine"}, {"value": float("nan")}, {"value": float("inf")}])
def test_a_row_that_would_lie_is_refused_and_nothing_written(tmp_path: Path, row: dict[str, object]) -> None:
    path = tmp_path / "rows.jsonl"
    with pytest.raises(ValueError, match=r"commit|JSON compliant"):
        append_row(path, row)
    assert not path.exists()
