"""Writes the page of a training run, and evidence pages of some of its episodes beside it.

Invariant: as the evidence page (`report/page`), the file is self-contained and loads nothing, no text from
the run's files can run as code, and the content security policy allows only the page's own script and styles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from vrthinker._version import __version__
from vrthinker.errors import InputError, unwritable
from vrthinker.records.files import replace_file
from vrthinker.report.page.page import check_page_path, content_policy, write_page
from vrthinker.report.page.templating import asset, page_template
from vrthinker.report.run_page.charts import sections, spelled
from vrthinker.report.run_page.data import Run, episodes_of, read_run

_TEMPLATES = Path(__file__).parent / "templates"
_TABLE = {
    "oa/tau": "OA tau",
    "oa/diff": "OA diff",
    "ta/accuracy": "TA",
    "vq/accuracy": "VQ",
    "mq/accuracy": "MQ",
    "tool_calls/mean": "calls",
    "format/well_formed": "well formed",
    "verdicts/share": "verdicts",
}
"""Measures of an evaluation -> the heading of its column."""


@dataclass(frozen=True)
class EpisodeLink:
    """An evidence page beside the run's page.

    Attributes:
        href: Its path from the run's page.
        what: Where the episode comes from.
        pair: The id of its pair.
        outcome: What it ended with.
    """

    href: str
    what: str
    pair: str
    outcome: str


def write_run_page(
    run_folder: Path,
    out: Path,
    *,
    episodes: int = 6,
    on_episode: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Writes the page of a run, finished or not.

    Args:
        run_folder: The run's folder.
        out: The HTML file. An older page is replaced.
        episodes: The most evidence pages that are written, to a folder beside `out`.
        on_episode: A function that is called with (written pages, most pages).

    Returns:
        `out`.

    Raises:
        InputError: The folder holds no run, or the path cannot be used.
        VRThinkerError: A file cannot be written.
    """
    run = read_run(run_folder)
    check_page_path(out, run_folder / "metrics.jsonl")
    links = []
    folder = out.with_name(f"{out.stem}-episodes")
    for number, (what, trajectory) in enumerate(episodes_of(run, episodes), start=1):
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise unwritable(folder, error, "give another --out", failed="cannot be made") from None
        path = folder / f"{number:03d}.html"
        try:
            write_page(path, trajectory)
        except InputError as error:
            run.problems.append(f"episode {trajectory.id}: {error}")
            continue
        judgments = trajectory.outcome.judgments
        outcome = (
            str(judgments.OA) if judgments is not None else f"no verdict ({trajectory.outcome.stop_reason})"
        )
        links.append(EpisodeLink(f"{folder.name}/{path.name}", what, trajectory.id, outcome))
        on_episode(number, episodes)
    replace_file(out, render_run_page(run, links).encode("utf-8", "backslashreplace"))
    return out


def render_run_page(run: Run, links: list[EpisodeLink] | None = None) -> str:
    """The page as a string that can be encoded as UTF-8."""
    style, script = asset(_TEMPLATES / "run.css"), asset(_TEMPLATES / "run.js")
    last = run.metrics[-1]
    ends = list(accumulate(steps for _, steps in run.phases))
    steps = ends[-1] if ends else None
    intervals = {
        f"eval/{name.replace('/', '_')}": {
            e.step: (low, high)
            for e in run.evaluations
            if (found := e.measures.get(name))
            and (low := found[1]) is not None
            and (high := found[2]) is not None
        }
        for name in ("oa/tau",)
    }
    charts = sections(run.metrics, ends=ends[:-1], intervals=intervals)
    page: str = page_template(_TEMPLATES / "run.html.jinja").render(
        policy=content_policy(styles=(style,), script=script),
        style=style,
        script=script,
        name=run.folder.absolute().name,
        done=last["step"],
        steps=steps,
        hours=(last["time_seconds"] - run.metrics[0]["time_seconds"]) / 3600,
        tiles=_tiles(run),
        phases=run.phases if len(run.phases) > 1 else [],
        sections=charts,
        chart_data=[
            {"series": [{"name": series.name, "points": series.points} for series in chart.series]}
            for _, inside in charts
            for chart in inside
        ],
        columns={
            key: title for key, title in _TABLE.items() if any(key in e.measures for e in run.evaluations)
        },
        evaluations=run.evaluations,
        traces=run.traces,
        links=links or [],
        settings=run.settings,
        provenance=run.provenance,
        problems=run.problems,
        spelled=spelled,
        version=__version__,
    )
    return page


def _tiles(run: Run) -> list[tuple[str, str]]:
    """The few numbers at the head of the page: (name, value)."""
    tiles = []
    for name, title in (
        ("loss/sft", "loss"),
        ("sft/token_accuracy", "token accuracy"),
        ("reward/total", "reward"),
        ("perf/tokens_per_s", "tokens/s"),
    ):
        values = [line[name] for line in run.metrics if line.get(name) is not None]
        if values:
            tiles.append(
                (f"{title}, last step", f"{values[-1]:,.0f}" if values[-1] >= 1e4 else spelled(values[-1]))
            )
    scored = [(e.measures["oa/tau"][0], -e.step) for e in run.evaluations if "oa/tau" in e.measures]
    known = [(value, step) for value, step in scored if value is not None]
    if known:
        value, step = max(known)
        tiles.insert(0, (f"best OA tau, after step {-step}", f"{value:.3f}"))
    return tiles
