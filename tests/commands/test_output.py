"""Output that cannot be written: a full disk, streams that are closed, a terminal, a reader that is gone."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import heavy  # noqa: F401
import pytest
from cli_run import vrthinker
from full_disk import full_at

from vrthinker import __version__
from vrthinker.commands.demo import DemoCommand
from vrthinker.commands.output import safe_output
from vrthinker.errors import InputError

FULL = "/dev/full"
LINE = "vrthinker: stdout: cannot be written (No space left on device); what it lacks follows\n"


def test_a_verdict_that_stdout_does_not_take_is_on_stderr(tiny: Path, clips: Path) -> None:
    done = vrthinker(
        *("judge", clips / "a.mp4", clips / "b.mp4", "--prompt", "x", "--model", tiny, "--json"), stdout=FULL
    )
    assert done.code == 1
    line, verdict = done.err[done.err.index(LINE) :].split("\n", 1)
    assert line + "\n" == LINE
    assert set(json.loads(verdict)["judgment"]) == {"TA", "VQ", "MQ", "OA"}
    assert "Traceback" not in done.err


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["world", "ceilings", "--pairs", "1"]])
def test_what_any_command_prints_is_rescued(arguments: list[str]) -> None:
    usual = vrthinker(*arguments)
    done = vrthinker(*arguments, stdout=FULL)
    assert (done.code, done.err) == (1, LINE + usual.out)


def test_an_exit_code_that_says_more_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(self: DemoCommand) -> int:
        sys.stdout.write("half\n")
        raise InputError("no such thing")

    monkeypatch.setattr(DemoCommand, "run", run)
    done = vrthinker("demo", stdout=FULL)
    assert (done.code, done.err) == (2, f"vrthinker: no such thing\n{LINE}half\n")


def test_a_log_that_cannot_be_written_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(self: DemoCommand) -> int:
        sys.stderr.write("progress\n")
        sys.stdout.write("result\n")
        return 0

    monkeypatch.setattr(DemoCommand, "run", run)
    done = vrthinker("demo", stderr=FULL)
    assert (done.code, done.out) == (0, "result\n")


def test_what_fits_before_the_disk_is_full_is_not_repeated(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with (tmp_path / "out").open("wb") as disk, (tmp_path / "err").open("w") as err:
        stream = io.TextIOWrapper(io.FileIO(disk.fileno(), "wb", closefd=False))
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", err)
        with safe_output() as output:
            sys.stdout.write("0123456789")
            with full_at(5):
                sys.stdout.flush()
            assert not output.deliver()
    assert (tmp_path / "out").read_text() == "01234"
    line = LINE.replace("No space left on device", "File too large")
    assert (tmp_path / "err").read_text() == line + "56789"


def test_a_slow_reader_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    text = "x" * 300_000  # more than the pipe holds
    monkeypatch.setattr(sys, "stdout", open(writing, "w", closefd=False))  # noqa: SIM115
    with ThreadPoolExecutor(1) as pool, safe_output() as output:
        got = pool.submit(lambda: b"".join(iter(lambda: os.read(reading, 4096), b"")))
        sys.stdout.write(text)
        assert output.deliver()
        os.close(writing)
        assert got.result().decode() == text
    os.close(reading)


def test_a_name_that_stdout_cannot_spell_is_escaped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb", buffering=0) as raw:
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "ascii"))
        with safe_output() as output:
            sys.stdout.write("v\udcff \u00e9\n")
            assert output.deliver()
    assert (tmp_path / "out").read_bytes() == b"v\\udcff \\xe9\n"


def test_streams_that_do_not_exist_are_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with safe_output() as output:
        assert not sys.stdout.isatty()
        with pytest.raises(io.UnsupportedOperation):
            sys.stdout.fileno()
        sys.stdout.write("x")
        assert not output.deliver()
        assert output.out is not None
        assert bytes(output.out.kept) == b"x"
    assert sys.stdout is None


def test_a_stream_without_a_descriptor_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    text = io.StringIO()
    monkeypatch.setattr(sys, "stdout", text)
    with safe_output() as output:
        assert sys.stdout is text
        assert output.deliver()


def test_a_terminal_is_still_one_and_gets_lines_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pty.openpty()
    try:
        monkeypatch.setattr(sys, "stdout", open(theirs, "w", closefd=False))  # noqa: SIM115
        with safe_output():
            assert sys.stdout.isatty()
            assert sys.stdout.fileno() == theirs
            sys.stdout.write("now\n")
            assert os.read(ours, 100) == b"now\r\n"
    finally:
        os.close(ours)
        os.close(theirs)


def test_a_reader_that_is_gone_is_told_once_and_costs_nothing_more(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setattr(sys, "stdout", open(writing, "w", closefd=False))  # noqa: SIM115
    with safe_output() as output:
        sys.stdout.write("x")
        with pytest.raises(BrokenPipeError):
            output.deliver()
        assert output.deliver(), "nobody waits for the rest"
    os.close(writing)


@pytest.mark.multi_process
def test_a_process_with_a_full_disk_or_without_streams_ends_in_order() -> None:
    command = f"{sys.executable} -m vrthinker --version"
    full = subprocess.run(["bash", "-c", f"{command} >{FULL}"], capture_output=True, text=True, check=False)
    assert (full.returncode, full.stderr) == (1, f"{LINE}vrthinker {__version__}\n")
    closed = subprocess.run(["bash", "-c", f"{command} >&- 2>&-"], check=False)
    assert closed.returncode == 1
