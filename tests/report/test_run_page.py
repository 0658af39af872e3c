"""The page of a training run: gaps, hostile names, what is missing, and how it looks in a browser."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from cli_run import vrthinker

from vrthinker.engine.scripted import ScriptedEngine
from vrthinker.episode.trajectory import dump_line
from vrthinker.errors import InputError
from vrthinker.judge import Judge
from vrthinker.report.run_page.charts import Series, sections
from vrthinker.report.run_page.data import read_run
from vrthinker.report.run_page.page import render_run_page, write_run_page

HOSTILE = "</script><img src=x onerror=\"document.title='broken'\"><b>"


def lines(steps: int = 200, **more: Any) -> list[dict[str, Any]]:
    """A run whose loss is not finite in steps 50 to 59, and that is evaluated every 50 steps."""
    found = []
    for step in range(1, steps + 1):
        line: dict[str, Any] = {
            "step": step,
            "time_seconds": 1e9 + step,
            "loss/sft": None if 50 <= step < 60 else 3 * math.exp(-step / 50) + 0.3 * math.sin(step),
            "optim/learning_rate": 1e-6 * step,
            **more,
        }
        if step % 50 == 0:
            line["eval/oa_tau"] = step / 400
        found.append(line)
    return found


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "a run"
    folder.mkdir()
    write(folder, lines())
    (folder / "config.json").write_text(json.dumps({"model": "m", "phases": [{"steps": 200}]}))
    (folder / "provenance.json").write_text(json.dumps({"machine": {"cpu": "a fast one"}}))
    phases = [
        {"phase": "one", "steps": 80, "read": 9, "kept": 7, "dropped": {"wrong in TA": 2}},
        {"phase": "two", "steps": 120, "read": 5, "kept": 5, "dropped": {}},
    ]
    (folder / "traces.json").write_text(json.dumps({"phases": phases}))
    for step in (0, 100, 200):
        place = folder / "evaluations" / f"step-{step:08d}"
        place.mkdir(parents=True)
        measure = {"value": step / 400, "low": step / 500, "high": step / 300, "n": 9}
        (place / "eval.json").write_text(json.dumps({"step": step, "judged": {"all": {"oa/tau": measure}}}))
    return folder


def write(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def series(rows: list[dict[str, Any]], name: str) -> Series:
    found = [s for _, charts in sections(rows) for chart in charts for s in chart.series if s.name == name]
    assert len(found) == 1, "each metric is drawn once"
    return found[0]


def runs_of(path: str) -> list[list[float]]:
    """The horizontal places of each unbroken part of a line."""
    return [[float(place) for place in re.findall(r"([\d.]+) [\d.]+", part)] for part in path.split("M")[1:]]


def test_steps_that_are_not_finite_are_a_gap() -> None:
    loss = series(lines(), "loss/sft")
    before, after = runs_of(loss.path)
    assert len(before) == 49
    assert len(after) == 141
    assert before[-1] < after[0]
    assert loss.missing == 10
    assert [len(part) for part in runs_of(loss.smooth)] == [49, 141], "neither does the mean reach over it"
    assert "nan" not in loss.path + loss.smooth


def test_a_value_between_two_gaps_is_a_dot_and_missing_steps_are_a_gap() -> None:
    rows = [{"step": s, "time_seconds": 0.0, "a": None if s in (3, 5) else 1.0} for s in range(1, 9)]
    parts = series(rows, "a").path.split("M")[1:]
    assert len(parts) == 3
    assert parts[1].endswith("h0")
    rows = [{"step": s, "time_seconds": 0.0, "a": 1.0} for s in (1, 2, 3, 4, 40, 41, 42)]
    assert [len(part) for part in runs_of(series(rows, "a").path)] == [4, 3]
    sparse = [{"step": s, "time_seconds": 0.0, **({"a": 1.0} if s % 10 == 0 else {})} for s in range(1, 61)]
    assert [len(part) for part in runs_of(series(sparse, "a").path)] == [6], "every tenth step is no gap"


def test_a_phase_that_ends_outside_the_curve_has_no_border() -> None:
    ((_, (chart,)),) = sections(
        [{"step": n, "time_seconds": 0.0, "a": n} for n in range(10, 21)], ends=[5, 15, 20]
    )
    assert chart.borders == (50.0,)


def test_long_curves_keep_their_peaks_and_gaps() -> None:
    rows = [{"step": s, "time_seconds": 0.0, "a": math.cos(s / 900)} for s in range(1, 50_001)]
    rows[0]["a"] = 0.0
    rows[1]["a"] = -0.5
    rows[12_345]["a"], rows[40_000]["a"] = 9.0, None
    thinned = series(rows, "a")
    assert len(thinned.points) < 1000
    assert max(value for _, value in thinned.points if value is not None) == 9.0
    assert len(runs_of(thinned.path)) == 2
    assert (thinned.points[0][0], thinned.points[-1][0]) == (1, 50_000)


@pytest.mark.parametrize(
    "values",
    [[0.0, 0.0], [5.0], [1e-9, 1e9], [-3.0, 2.0], [None, None], [1e299, -1e299], [1e300, 1.0], [7, 7, 7]],
)
def test_any_values_can_be_drawn(values: list[float | None]) -> None:
    rows = [{"step": n, "time_seconds": 0.0, "a": value} for n, value in enumerate(values)]
    ((_, (chart,)),) = sections(rows)
    for tick in (*chart.y_ticks, *chart.x_ticks):
        assert -1 <= tick.place <= 101
    assert "nan" not in chart.series[0].path + chart.series[0].dots
    assert "inf" not in chart.series[0].path


def test_a_phase_that_learns_frames_is_a_phase_without_traces(run: Path) -> None:
    phases = json.loads((run / "traces.json").read_text())["phases"]
    phases[0] |= {"phase": "towers", "traces": {"kind": "frames"}, "read": 4321, "kept": 4321, "dropped": {}}
    phases[1]["traces"] = {"kind": "mixed", "of": [{"kind": "world", "pairs": 5}]}
    (run / "traces.json").write_text(json.dumps({"phases": phases}))
    found = read_run(run)
    assert found.phases == [("towers", 80), ("two", 120)]
    assert [traces.phase for traces in found.traces] == ["two"]
    page = render_run_page(found)
    assert "towers" in page
    assert "4321" not in page, "clips are no traces"
    rows = [{"step": 1, "time_seconds": 0.0, "frames/accuracy": 0.5, "loss/sft": 1.0}]
    ((name, charts),) = sections(rows)
    assert (name, len(charts)) == ("Learning", 2)


def test_what_the_run_is_stands_on_the_page(run: Path) -> None:
    page = render_run_page(read_run(run))
    for words in (
        "a run",
        "step 200 of 200",
        "loss/sft",
        "10 not finite",
        "wrong in TA",
        "phases.0.steps",
        "a fast one",
        "best OA tau, after step 200",
        "0.400\u20130.667",
    ):
        assert words in page, words
    assert page.count('class="border"') == len(re.findall('class="chart"', page)), "the phase's end"
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
    assert " style=" not in page, "the policy would refuse it"


def test_hostile_names_stay_text(run: Path, tmp_path: Path) -> None:
    write(run, lines(20, **{HOSTILE: 1.0, "reward/a\u202eb": 2.0}))
    (run / "config.json").write_text(json.dumps({HOSTILE: HOSTILE, "deep": {"er": [{"x": HOSTILE}]}}))
    (run / "traces.json").write_text(
        json.dumps({"phases": [{"phase": HOSTILE, "steps": "many", "dropped": {HOSTILE: HOSTILE}}, 3, None]})
    )
    page = render_run_page(read_run(run))
    assert "<img" not in page
    assert "<b>" not in page
    assert page.count("</script>") == 2
    assert "\u202e" not in page


@pytest.mark.parametrize("name", ["config.json", "provenance.json", "traces.json", "evaluations"])
@pytest.mark.parametrize("content", [None, "", "[1]", "[" * 50_000, '{"phases": 3, "judged": []}', "\xff"])
def test_whatever_else_is_missing_or_broken_the_curves_are_shown(
    run: Path, name: str, content: str | None
) -> None:
    path = run / name
    if name == "evaluations":
        path = path / "step-00000100" / "eval.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    found = read_run(run)
    assert "loss/sft" in render_run_page(found)
    assert bool(found.problems) == (content not in (None, '{"phases": 3, "judged": []}'))


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run that has finished a step"):
        read_run(tmp_path)
    done = vrthinker("report", tmp_path / "nothing")
    assert (done.code, done.out) == (2, "")
    assert "no folder of a run" in done.line
    assert vrthinker("report", tmp_path, "--episodes", -1).code == 2


def test_the_command_writes_the_page_and_says_where(run: Path, tmp_path: Path) -> None:
    done = vrthinker("report", run)
    assert (done.code, done.out) == (0, f"{run / 'report.html'}\n")
    before = (run / "report.html").read_text()
    (tmp_path / "mine.txt").write_text("mine")
    refused = vrthinker("report", run, "--out", tmp_path / "mine.txt")
    assert refused.code == 2
    assert "holds something else than a page" in refused.last_line
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert vrthinker("report", run, "--out", tmp_path / "page.html").code == 0
    assert (tmp_path / "page.html").read_text() == before


def test_episodes_are_evidence_pages_beside_it(
    run: Path, tmp_path: Path, clip_pair: tuple[Path, Path]
) -> None:
    """They are of the same pairs before and after training. The rest of a broken file is left out."""
    answer = "<snapshot>s</snapshot><think>t</think><answer>TA=2, VQ=1, MQ=0, OA=2</answer>"
    judge = Judge(ScriptedEngine([[answer]]))
    for number, step in enumerate((0, 100, 200)):
        episode = judge("a dog", *clip_pair).trajectory
        copies = [episode.model_copy(update={"id": f"pair {n} {HOSTILE}"}) for n in range(4 - number)]
        path = run / "evaluations" / f"step-{step:08d}" / "trajectories.jsonl"
        path.write_text("".join(map(dump_line, copies)) + ("no episode\n" if step == 200 else ""))
    out = write_run_page(run, tmp_path / "page.html", episodes=6)
    page = out.read_text()
    links = re.findall(r'href="([^"]+)"', page)
    assert links == [f"page-episodes/00{n}.html" for n in range(1, 6)], (
        "three from the first, two from the last"
    )
    assert page.count("<small>after step 0<") == 3
    assert page.count("<small>after step 200<") == 2
    for link in links:
        assert "pair " in (tmp_path / link).read_text()
    assert "<img" not in page


# In a browser


@pytest.mark.parametrize("width", [320, 700, 1600])
def test_nothing_overflows_and_nothing_complains(browser: Any, run: Path, tmp_path: Path, width: int) -> None:
    write(run, lines(120, **{HOSTILE * 3: 1.0, "x" * 300: 2.0}))
    browser.goto(write_run_page(run, tmp_path / "page.html"), width=width, height=800)
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    assert browser.complaints() == []
    assert len(browser.requests()) == 1, "only itself"
    assert browser.evaluate("document.title") == "a run: training run"
    assert browser.evaluate("document.images.length") == 0


def test_pointing_at_a_curve_tells_its_values(browser: Any, run: Path, tmp_path: Path) -> None:
    browser.goto(write_run_page(run, tmp_path / "page.html"))
    told = browser.evaluate(
        """[...document.querySelectorAll(".chart")].map((figure) => {
             const plot = figure.querySelector(".plot");
             const box = figure.querySelector(".lines").getBoundingClientRect();
             const said = [];
             for (const share of [0, 0.2714, 1]) {
               plot.dispatchEvent(new PointerEvent("pointermove",
                 {clientX: box.left + share * box.width, clientY: box.top + 5}));
               said.push(figure.querySelector("output").textContent);
             }
             plot.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowLeft"}));
             said.push(figure.querySelector("output").textContent);
             return [figure.querySelector("h3").textContent.trim(), said];
           })"""
    )
    said = dict(told)
    rate = next(value for name, value in said.items() if name.startswith("optim/learning_rate"))
    assert rate == ["step 1: 0.000001", "step 55: 0.000055", "step 200: 0.0002", "step 199: 0.000199"]
    assert said["loss/sft"][1] == "step 55: not finite"
    assert said["eval/oa_tau"][0] == "step 50: 0.125", "the nearest step with a value"


def test_light_and_dark(browser: Any, run: Path, tmp_path: Path) -> None:
    browser.goto(write_run_page(run, tmp_path / "page.html"))
    papers = []
    for scheme in ("light", "dark"):
        media = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.call("Emulation.setEmulatedMedia", features=media)
        papers.append(browser.evaluate("getComputedStyle(document.body).backgroundColor"))
    browser.call("Emulation.setEmulatedMedia", features=[])
    assert papers == ["rgb(251, 250, 247)", "rgb(23, 22, 20)"]
