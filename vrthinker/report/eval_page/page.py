"""Writes the page of an evaluation, and evidence pages of its surest errors beside it.

Invariant: as the evidence page (`report/page`), the file is self-contained and loads nothing, no text from
the run's files can run as code, and the content security policy allows only the page's own styles.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import UndefinedError
from markupsafe import Markup

from vrthinker._version import __version__
from vrthinker.episode.dimensions import Dimension, Preference
from vrthinker.errors import InputError, VRThinkerError, unwritable
from vrthinker.records.eval_items import EvalItem
from vrthinker.records.files import replace_file
from vrthinker.report.eval_page.charts import Bar, bar, length_bars, spelled
from vrthinker.report.eval_page.errors import episodes_of, surest_errors, tie_threshold, verdict_in
from vrthinker.report.page.page import check_page_path, content_policy, write_page
from vrthinker.report.page.templating import page_template
from vrthinker.video.open import open_reader
from vrthinker.video.virtual import VirtualReader

_TEMPLATES = Path(__file__).parent / "templates"
_SHARED_STYLE = Path(__file__).parents[1] / "run_page" / "templates" / "run.css"
_WORDS = {preference.value: str(preference) for preference in Preference}
_LEVELS = {"1": "high", "2": "middle", "3": "low"}


@dataclass(frozen=True)
class ErrorRow:
    """A wrong verdict.

    Attributes:
        item: The item.
        said: What the judge said overall.
        label: What people said.
        sureness: How sure the judge was, in words.
        href: The path of its evidence page from the run's page; None without one.
    """

    item: EvalItem
    said: str
    label: str
    sureness: str
    href: str | None


def write_eval_page(
    out: Path,
    items: Sequence[EvalItem],
    about: Mapping[str, Any],
    *,
    trajectories: Path | None = None,
    controls: Mapping[str, Any] | None = None,
    errors: int = 20,
    on_episode: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Writes the page of a run.

    Args:
        out: The HTML file. An older page is replaced.
        items: The run's items.
        about: The content of its `eval.json`.
        trajectories: The file of its episodes, for the evidence of errors.
        controls: The content of a `controls.json` of the same judge, which is shown too.
        errors: The most errors that are listed.
        on_episode: A function that is called with (written evidence pages, errors).

    Returns:
        `out`.

    Raises:
        InputError: The path cannot be used, or the run's files hold something else.
        VRThinkerError: A file cannot be written.
    """
    check_page_path(out)
    threshold = tie_threshold(about, "OA")
    wrong = surest_errors(items, errors, tie_threshold=threshold)
    episodes = {} if trajectories is None else episodes_of(trajectories, {item.id for item in wrong})
    folder, rows = out.with_name(f"{out.stem}-evidence"), []
    for number, item in enumerate(wrong, start=1):
        href = None
        if item.id in episodes:
            try:
                folder.mkdir(exist_ok=True)
            except OSError as error:
                raise unwritable(folder, error, "give another --out", failed="cannot be made") from None
            path = folder / f"{number:03d}.html"
            try:
                write_page(path, episodes[item.id], reader=VirtualReader(open_reader()))
                href = quote(f"{folder.name}/{path.name}")
            except InputError:
                pass  # the record is inconsistent; the row is shown without its evidence
        rows.append(_error_row(item, href, threshold))
        on_episode(number, len(wrong))
    try:
        page = render_eval_page(about, rows, controls=controls)
    except (KeyError, TypeError, ValueError, AttributeError, UndefinedError) as error:
        if isinstance(error, VRThinkerError):
            raise
        raise InputError(f"{out}: the run's eval.json is not what `vrthinker eval` writes") from None
    replace_file(out, page.encode("utf-8", "backslashreplace"))
    return out


def render_eval_page(
    about: Mapping[str, Any], errors: Sequence[ErrorRow] = (), *, controls: Mapping[str, Any] | None = None
) -> str:
    """The page as a string that can be encoded as UTF-8. The arguments are those of `write_eval_page`."""
    style = Markup(_SHARED_STYLE.read_text("utf-8") + (_TEMPLATES / "eval.css").read_text("utf-8"))
    summary = about["summary"]
    columns: Mapping[str, Mapping[str, Any]] = summary["measures"]
    page: str = page_template(_TEMPLATES / "eval.html.jinja").render(
        policy=content_policy(styles=(style,), script=""),
        style=style,
        judge=about.get("judge"),
        data=about.get("data"),
        protocol=about.get("protocol") or {},
        summary=summary,
        tiles=_tiles(summary),
        columns=list(columns),
        measures=[
            (name, [_cell(columns[column].get(name, {})) for column in columns])
            for name in dict.fromkeys(name for column in columns.values() for name in column)
        ],
        baselines=[(name, values) for name, values in summary["baselines"].items()],
        accuracies=_accuracies(columns, summary),
        levels=_levels(summary["calibration"]),
        agreement=_agreement(summary["calibration"]),
        calibration=summary["calibration"],
        lengths=[(name, length_bars(bins)) for name, bins in summary["by_length"].items()],
        codes=[code.value for code in Dimension],
        controls=None if controls is None else [_control_row(row) for row in controls["rows"]],
        controls_of=None if controls is None else controls.get("judge"),
        errors=errors,
        settings=_facts(about.get("settings") or {}),
        provenance=_facts(about.get("provenance") or {}),
        version=__version__,
    )
    return page


def _cell(estimate: Mapping[str, Any]) -> tuple[str, str]:
    """A number, and its interval and number of items, which stand below it."""
    value, _, rest = spelled(estimate).partition(" ")
    return value.removesuffix(","), rest


def _tiles(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    everything, always = summary["measures"]["all"], summary["baselines"]["always tie"]
    tiles = []
    for name, title in (("oa/tau", "overall accuracy (tau)"), ("oa/diff", "without ties (diff)")):
        if name in everything and everything[name]["value"] is not None:
            tiles.append((title, f"{everything[name]['value']:.3f}"))
    if always.get("oa/tau") is not None:
        tiles.append(("always a tie would get", f"{always['oa/tau']:.3f}"))
    tiles.append(("without a verdict", f"{summary['items'] - summary['statuses']['judged']}"))
    return tiles


def _accuracies(
    columns: Mapping[str, Mapping[str, Any]], summary: Mapping[str, Any]
) -> list[tuple[str, list[Bar]]]:
    """Bars of the dimensions over all items, with what always-tie gets; then of OA by column."""
    always = summary["baselines"]["always tie"]
    names = {"oa/tau": "OA", "ta/accuracy": "TA", "vq/accuracy": "VQ", "mq/accuracy": "MQ"}
    everything = columns["all"]
    charts = [
        (
            "accuracy by dimension, ties a class",
            [
                bar(title, everything[name], always.get(name))
                for name, title in names.items()
                if name in everything
            ],
        )
    ]
    if len(columns) > 1:
        by_column = [bar(name, found["oa/tau"]) for name, found in columns.items() if "oa/tau" in found]
        charts.append(("overall accuracy by subset", by_column))
    return charts


def _levels(found: Mapping[str, Any]) -> list[Bar]:
    levels = found.get("stated", {}).get("levels", {})
    return [
        bar(_LEVELS[level], {"value": values["accuracy"], "n": values["count"]}, values["read_as"])
        for level, values in levels.items()
    ]


def _agreement(found: Mapping[str, Any]) -> list[Bar]:
    bins = found.get("agreement", {}).get("bins", [])
    return [
        bar(
            f"{one['confidence']:.2f} agree", {"value": one["accuracy"], "n": one["count"]}, one["confidence"]
        )
        for one in bins
    ]


def _control_row(row: Mapping[str, Any]) -> dict[str, Any]:
    estimate = {name: row["estimate"][name] for name in ("value", "low", "high")}
    return {**row, "text": spelled(estimate)}


def _error_row(item: EvalItem, href: str | None, threshold: float) -> ErrorRow:
    difference = (item.scores or {}).get("OA")
    verdict = verdict_in(item, "OA", threshold)
    sureness = []
    if item.confidence is not None:
        sureness.append(f"says {_LEVELS[str(item.confidence)]}")
    if item.agreement is not None:
        sureness.append(f"{item.agreement:.0%} of votes")
    if difference is not None:
        sureness.append(f"scores differ by {abs(difference):.3g}")
    return ErrorRow(
        item=item,
        said="nothing" if verdict is None else _WORDS[verdict],
        label=_WORDS[item.labels["OA"]],
        sureness=", ".join(sureness) or "not said",
        href=href,
    )


def _facts(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as rows of dotted names."""
    rows: list[tuple[str, str]] = []
    for name, inner in value.items():
        if isinstance(inner, Mapping) and inner:
            rows += _facts(inner, f"{prefix}{name}.")
        else:
            rows.append((f"{prefix}{name}", str(inner)))
    return rows
