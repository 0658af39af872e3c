"""Writes the tables and figures of docs/reproduction.md from the rows of `reproduce.py`.

    python benchmarks/reproduction_page.py [--rows benchmarks/results/reproduction.jsonl]

Only what stands between `<!-- tables -->` and `<!-- end of tables -->` is replaced. The rest is written by
hand.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from reproduce import ARMS, COLD_START, CURVES, FINAL, VIEWS
from stages import MEASURES, WAYS
from tables import interval, number, table

from vrthinker.records.files import replace_file
from vrthinker.world.world import PRESETS

START, END = "<!-- tables -->", "<!-- end of tables -->"
NAMES = {
    "oa/tau": "OA tau",
    "hidden_events/seen": "hidden events seen",
    "all_four": "all four right",
    "tool_calls/mean": "calls an episode",
    "format/well_formed": "well formed",
}
CURVE_NAMES = dict(
    zip(
        CURVES,
        ("OA tau of the rollouts", "calls an episode", "tokens a round", "KL to the start"),
        strict=True,
    )
)
Rows = Sequence[Mapping[str, Any]]


def newest(rows: Rows) -> list[Mapping[str, Any]]:
    """The rows without those of first models that were trained anew since: the last row of a seed decides."""
    last = {(row["difficulty"], row["seed"]): row.get("cold_start_weights") for row in rows}
    return [row for row in rows if row.get("cold_start_weights") == last[row["difficulty"], row["seed"]]]


def of_arm(rows: Rows, arm: str) -> list[Mapping[str, Any]]:
    """The rows of an arm, by their seeds."""
    return sorted((row for row in rows if row.get("arm") == arm), key=lambda row: row["seed"])


def levels(rows: Rows) -> str:
    """Every arm's measures: the mean over seeds, and the seeds' lowest and highest."""
    lines = []
    for arm in ARMS:
        found = of_arm(rows, arm)
        if not found:
            continue
        cells = []
        for way in WAYS:
            for name in ("oa/tau", "hidden_events/seen", "tool_calls/mean"):
                values = [row[way][name]["value"] for row in found]
                spread = f" ({number(min(values))} to {number(max(values))})" if len(set(values)) > 1 else ""
                cells.append(number(fmean(values)) + spread)
        lines.append([arm, str(len(found)), *cells])
    names = [
        f"{NAMES[n]}, {way}" for way in WAYS for n in ("oa/tau", "hidden_events/seen", "tool_calls/mean")
    ]
    return table(["model", "seeds", *names], lines)


def differences(rows: Rows) -> str:
    """What each arm has above the models that it started from, seed by seed."""
    lines = []
    for arm in ARMS:
        for row in of_arm(rows, arm):
            for key in row:
                way, _, other = key.partition(" minus ")
                if other:
                    cells = [interval(row[key][name]) for name in MEASURES if name != "format/well_formed"]
                    lines.append([f"{arm} minus {other}", str(row["seed"]), way, *cells])
    names = [NAMES[name] for name in MEASURES if name != "format/well_formed"]
    return table(["difference, paired over pairs", "seed", "decoding", *names], lines)


def useless_calls(rows: Rows) -> str:
    """The calls of sampled episodes about pairs with nothing hidden."""
    lines = [
        [arm, str(row["seed"]), interval(row["sampled"]["calls_by_hidden_events"]["0"])]
        for arm in ARMS
        for row in of_arm(rows, arm)
        if "0" in row["sampled"]["calls_by_hidden_events"]
    ]
    return table(["model", "seed", "calls an episode about a pair with nothing hidden, sampled"], lines)


def views(rows: Rows) -> str:
    """The model after all stages, looked at in other ways."""
    lines = []
    for view in VIEWS:
        for row in sorted((r for r in rows if r.get("view") == view), key=lambda r: r["seed"]):
            ways = row["judged"] if view == "frames picked in other ways" else {"own": row["judged"]["own"]}
            for way, found in ways.items():
                gain = row["own above"].get(way)
                if way != "own":
                    change = f"own is above by {interval(gain)}" if gain else ""
                else:
                    change = interval(row["minus the usual way"]["oa/tau"])
                what = f"frames picked by: {way}" if len(ways) > 1 else view
                lines.append([what, str(row["seed"]), interval(found["oa/tau"]), change])
    return table([f"{FINAL}, greedy", "seed", "OA tau", "minus the usual way (paired)"], lines)


def figures(rows: Rows, folder: Path, name: str) -> list[str]:
    """Draws the stages as bars and GRPO's course as curves. Returns the lines that show them."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams.update({"svg.hashsalt": "vrthinker", "font.size": 9})
    shown = []
    arms = [arm for arm in ARMS if of_arm(rows, arm)]
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2), sharey=True)
    for axis, measure in zip(axes, ("oa/tau", "hidden_events/seen"), strict=True):
        for offset, way in zip((-0.2, 0.2), WAYS, strict=True):
            means = [fmean(row[way][measure]["value"] for row in of_arm(rows, arm)) for arm in arms]
            places = [place + offset for place in range(len(arms))]
            axis.bar(places, means, width=0.38, label=way)
            for place, arm in zip(places, arms, strict=True):
                values = [row[way][measure]["value"] for row in of_arm(rows, arm)]
                axis.plot([place] * len(values), values, "k.", markersize=4)
        axis.set_xticks(range(len(arms)), [arm.replace("+", "\n+ ").replace(", ", ",\n") for arm in arms])
        axis.set_title(NAMES[measure])
        axis.set_ylim(0, 1)
    axes[0].legend(loc="lower right")
    shown.append(_saved(figure, folder, f"reproduction-{name}-stages", "Every model's OA tau and looks"))
    grpo = [arm for arm in arms if any("curves" in row for row in of_arm(rows, arm))]
    if grpo:
        figure, axes = pyplot.subplots(1, len(CURVES), figsize=(12, 2.8))
        for axis, curve in zip(axes, CURVES, strict=True):
            for color, arm in enumerate(grpo):
                for row in of_arm(rows, arm):
                    if not row["curves"][curve]:
                        continue
                    steps, values = zip(*row["curves"][curve], strict=True)
                    label = arm if row is of_arm(rows, arm)[0] else None
                    axis.plot(steps, values, color=f"C{color}", linewidth=1, alpha=0.8, label=label)
            axis.set_title(CURVE_NAMES[curve])
            axis.set_xlabel("step")
        axes[0].legend(fontsize=7)
        shown.append(_saved(figure, folder, f"reproduction-{name}-course", "The course of GRPO"))
    return shown


def _saved(figure: Any, folder: Path, name: str, told: str) -> str:
    figure.tight_layout()
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    return f"![{told}](images/{name}.svg)"


def main() -> None:
    """The script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, default=Path("benchmarks/results/reproduction.jsonl"))
    parser.add_argument("--page", type=Path, default=Path("docs/reproduction.md"))
    parser.add_argument("--pairs", type=int, default=512, help="only rows of so many held-out pairs")
    parser.add_argument("--cold-start", default=COLD_START, help="only rows of this first model")
    given = parser.parse_args()
    every = [json.loads(line) for line in given.rows.read_text("utf-8").splitlines() if line.strip()]
    wanted = {"pairs": given.pairs, "cold_start": given.cold_start}
    every = newest([row for row in every if all(row[name] == value for name, value in wanted.items())])
    if not every:
        raise SystemExit(
            f"{given.rows}: no rows of the first model {given.cold_start}; --cold-start names another"
        )
    parts = []
    ways = dict.fromkeys((row["difficulty"], tuple(row["settings"])) for row in every)
    for difficulty, settings in sorted(ways, key=lambda way: (list(PRESETS).index(way[0]), way[1])):
        rows = [row for row in every if (row["difficulty"], tuple(row["settings"])) == (difficulty, settings)]
        title = " ".join((f"## {difficulty}", *(f"with `{setting}`" for setting in settings)))
        name = "-".join((difficulty, *(re.sub(r"\W+", "-", setting) for setting in settings)))
        parts += [title, *figures(rows, given.page.parent / "images", name)]
        parts += [levels(rows), differences(rows), useless_calls(rows)]
        if any("view" in row for row in rows):
            parts.append(views(rows))
    text = given.page.read_text("utf-8")
    if (text.count(START), text.count(END)) != (1, 1):
        raise SystemExit(f"{given.page}: wanted {START} and {END}, each once")
    before, _, rest = text.partition(START)
    after = rest.partition(END)[2]
    tables = "\n\n".join(parts)
    replace_file(given.page, f"{before}{START}\n{tables}\n{END}{after}".encode())


if __name__ == "__main__":
    main()
