"""`vrthinker bench`: rows, tables, pictures, and what stops it."""

from __future__ import annotations

import gc
import importlib.util
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import heavy  # noqa: F401
import numpy as np
import pytest
import torch
from cli_run import vrthinker
from full_disk import full_at
from PIL import Image

from vrthinker import kernels
from vrthinker.kernels.patchify import bench
from vrthinker.kernels.patchify.reference import patchify_reference

TINY = (
    bench.Case("tiny", 1, 28, 28, 14, bench.CLIP_MEAN, bench.CLIP_STD),
    bench.Case("less tiny", 2, 56, 56, 14, bench.CLIP_MEAN, bench.CLIP_STD),
)
FAST = ("bench", "patchify", "--rounds", "5", "--seed", "3")


@pytest.fixture(autouse=True)
def tiny_cases(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(bench, "CASES", TINY)
    monkeypatch.delenv("VRTHINKER_KERNELS", raising=False)
    threads = torch.get_num_threads()
    gc.freeze()  # a benchmark collects garbage time and again, which is slow with all that tests have loaded
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


def rows_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_table_on_stdout_and_the_log_on_stderr() -> None:
    printed = vrthinker(*FAST)
    assert printed.code == 0
    for case in TINY:
        assert f"patchify: {case.name} (cpu" in printed.out
        assert f"patchify: {case.name}\n" in printed.err
    for name in ("reference", "cpp", "transformers", bench.FRESH_COPY):
        assert f"  {name} " in printed.out


def test_json_on_stdout_is_rows_and_nothing_else() -> None:
    done = vrthinker(*FAST, "--threads", 1, "--json")
    assert done.code == 0
    rows = rows_of(done.out)
    assert [(row["benchmark"], row["case"], row["seed"], row["threads"]) for row in rows] == [
        ("patchify", "tiny", 3, 1),
        ("patchify", "less tiny", 3, 1),
    ]


def test_rows_go_to_files(tmp_path: Path) -> None:
    out, written = tmp_path / "results" / "rows.jsonl", tmp_path / "rows.json"
    out.parent.mkdir()
    out.write_text('{"an": "older row"}\n')
    written.write_text("what a run before wrote\n")
    done = vrthinker(*FAST, "--json", written, "--out", out)
    assert done.code == 0
    assert "patchify: tiny (cpu" in done.out
    plain, appended = rows_of(written.read_text()), rows_of(out.read_text())
    assert appended[0] == {"an": "older row"}
    for row, with_provenance in zip(plain, appended[1:], strict=True):
        assert with_provenance == {
            **row,
            **{key: with_provenance[key] for key in with_provenance.keys() - row},
        }
        assert with_provenance["machine"]["cores"] >= 1
        assert {"commit", "command", "versions", "date"} <= with_provenance.keys()


def test_the_seed_is_fresh_unless_given() -> None:
    seeds = set()
    for _ in range(2):
        done = vrthinker("bench", "patchify", "--rounds", 5, "--json")
        assert done.code == 0
        seeds |= {row["seed"] for row in rows_of(done.out)}
    assert len(seeds) == 2


def test_a_plot_is_a_picture_with_a_panel_per_case(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "bench.png"
    assert vrthinker(*FAST, "--plot", picture).code == 0
    image = np.asarray(Image.open(io.BytesIO(picture.read_bytes())).convert("RGB")).astype(int)
    assert image.shape[1] == 9 * 150
    # The bar of every version that is not the reference is blue: it takes most of its row of each panel.
    blue = (abs(image - np.array([0x3B, 0x6F, 0xB6])).max(axis=2) < 8).any(axis=1)
    bars = int(np.count_nonzero(np.diff(blue.astype(int)) == 1))
    assert bars == len(TINY) * len(("cpp", "transformers", bench.FRESH_COPY))


def test_a_plot_that_does_not_fit_on_the_disk_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "bench.png"
    with full_at(4000):
        done = vrthinker(*FAST, "--plot", picture)
    assert done.code == 1
    line = done.err.splitlines()[-1]
    assert line.startswith(f"vrthinker: --plot: {picture}: cannot be written (File too large)")


def test_a_competitor_that_differs_stops_the_run_and_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bench, "patchify", lambda frames, **layout: patchify_reference(frames, **layout) + 1)
    printed = vrthinker(*FAST, "--out", tmp_path / "rows.jsonl")
    assert (printed.code, printed.out) == (1, "")
    assert "vrthinker: bench patchify: tiny, seed 3: cpp differs from the reference" in printed.err
    assert (tmp_path / "rows.jsonl").read_text() == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bench", "patchfy"), "bench: got 'patchfy', allowed: "),
        ((*FAST[:2], "--rounds", "4"), "--rounds: got 4, allowed: 5 or more"),
        ((*FAST, "--threads", "0"), "--threads: got 0, allowed: at least 1"),
        ((*FAST[:4], "--seed", "-1"), "--seed: got -1, allowed: 0 to 2**63 - 1"),
        ((*FAST, "--json", "a", "b"), "--json: got 2 files, allowed: one, or none"),
        (
            (*FAST, "--plot", "bench.gif"),
            "--plot: got bench.gif, wanted a file that ends in .png, .svg, .pdf",
        ),
        ((*FAST, "--out", "/dev/null/rows"), "--out: /dev/null/rows: cannot be written"),
        (
            (*FAST, "--out", "/dev/null"),
            "--out: /dev/null: got a folder, a pipe or a device, allowed: a file",
        ),
        ((*FAST, "--out", "n" * 5000), "(File name too long)"),
    ],
)
def test_bad_input_is_refused_before_anything_is_measured(
    arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "comparisons", lambda device, seed: pytest.fail("it was measured"))
    done = vrthinker(*arguments)
    assert (done.code, done.out) == (2, "")
    assert message in done.err


def test_a_named_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VRTHINKER_KERNELS", "reference")
    done = vrthinker(*FAST)
    assert (done.code, done.out) == (2, "")
    assert "bench: VRTHINKER_KERNELS is set; unset it to compare the versions" in done.err


def test_cuda_without_a_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = vrthinker(*FAST, "--device", "cuda")
    assert (done.code, done.out) == (2, "")
    assert "--device: got cuda, but torch sees no CUDA device here" in done.err


def test_a_plot_without_matplotlib_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else find(name, *rest)
    )
    done = vrthinker(*FAST, "--plot", "bench.png")
    assert (done.code, done.out) == (2, "")
    assert "matplotlib is not installed: pip install 'vrthinker[train]'" in done.err


def test_ops_are_found_by_looking(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "patchify" in kernels.benchmarked_ops()
    for name, files in {"zoom": ("__init__.py", "bench.py"), "plain": ("__init__.py",)}.items():
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).touch()
    monkeypatch.setattr(kernels, "__path__", [str(tmp_path)])
    assert kernels.benchmarked_ops() == ("zoom",)
