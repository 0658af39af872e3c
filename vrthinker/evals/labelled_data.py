"""What a judge is evaluated on: labelled pairs from a file, a folder, or a public benchmark's folder.

Invariant: what is left out is counted with its reason, so that a denominator can be told from the size of the
set. Rows that an import dropped, pairs without a label, and pairs beyond a limit are all named.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from vrthinker.bounded_files import read_json
from vrthinker.data.datasets.draft import Format
from vrthinker.data.importing import FORMATS, PAIRS_FILE, REPORT_FILE, import_pairs, report_json
from vrthinker.data.pairs import Pair, load_pairs
from vrthinker.errors import InputError, unwritable
from vrthinker.evals.pairs import labelled
from vrthinker.evals.published import is_whole
from vrthinker.records.files import replace_file

BENCHMARKS: Mapping[str, Format] = {
    name: FORMATS[name] for name in ("videogen-rewardbench", "genai-bench", "mj-bench-video")
}
"""Name on the command line -> the layout of the benchmark's annotations."""
_TABLES = (".csv", ".json", ".jsonl", ".parquet")
_MAX_REPORT_BYTES = 1 << 28


@dataclass(frozen=True)
class LabelledData:
    """Labelled pairs, and what was left out.

    Attributes:
        pairs: The pairs to judge; each has a label.
        name: The name of the file or the benchmark, for tables.
        left_out: Reason -> how many rows or pairs are not in the denominator because of it.
        tie_kinds: The id of a tie -> its kind, where a set has several.
        benchmark: The benchmark, if the pairs come from the whole annotation file of a public one.
        source: The pairs file.
    """

    pairs: list[Pair]
    name: str
    left_out: dict[str, int]
    source: Path
    tie_kinds: Mapping[str, str] = field(default_factory=dict)
    benchmark: str | None = None


def load_labelled(data: Path, *, limit: int | None = None, seed: int = 0) -> LabelledData:
    """Reads labelled pairs.

    Args:
        data: A pairs file, or a folder that has one (`pairs.jsonl`), such as `vrthinker data import` or
            `vrthinker world make` writes. An `import.json` beside it says what the import left out.
        limit: How many pairs to draw by chance; all by default.
        seed: The seed of the draw.

    Raises:
        InputError: There is no pairs file, or no pair has a label.
    """
    file = data / PAIRS_FILE if data.is_dir() else data
    if data.is_dir() and not file.is_file():
        raise InputError(
            f"{data}: has no {PAIRS_FILE}; name a pairs file, or a folder that `vrthinker data import` wrote"
        )
    pairs = load_pairs(file)
    left_out, ties = _imported(file.with_name(REPORT_FILE), {pair.id for pair in pairs})
    if unlabelled := sum(not pair.labels for pair in pairs):
        left_out["pairs without any label"] = unlabelled
    try:
        chosen = labelled(pairs, limit=limit, seed=seed)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    if beyond := len(pairs) - unlabelled - len(chosen):
        left_out[f"labelled pairs that --limit {limit} did not draw"] = beyond
    name = data.name if data.is_dir() else file.name
    return LabelledData(chosen, name, left_out, file, ties)


def load_benchmark(
    name: str,
    data: Path,
    out: Path,
    *,
    annotations: Path | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> LabelledData:
    """Imports a public benchmark from files on disk, and reads its pairs.

    Args:
        name: A key of `BENCHMARKS`.
        data: The folder with the clips, and usually with the annotation file.
        out: The folder that the imported pairs are written to (`pairs.jsonl`, `import.json`).
        annotations: The annotation file, if it is not the only table in `data`.
        limit: How many pairs to draw by chance; all by default.
        seed: The seed of the draw.

    Raises:
        InputError: The folder or the file cannot be used.
    """
    form = BENCHMARKS[name]
    if not data.is_dir():
        raise InputError(f"--data: {data}: no folder; give the folder of the benchmark's clips")
    source = annotations or _annotations_in(data, form)
    imported = import_pairs(form, source, out, videos=data)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(out, error, "name another", failed="the folder cannot be made") from None
    replace_file(out / REPORT_FILE, report_json(imported.report))
    replace_file(out / PAIRS_FILE, imported.lines)
    read = load_labelled(out, limit=limit, seed=seed)
    whole = is_whole(name, imported.report["rows"])
    return replace(read, name=name, benchmark=name if whole else None)


def _annotations_in(data: Path, form: Format) -> Path:
    """The only annotation file of a folder."""
    try:
        names = sorted(name for name in os.listdir(data) if name.lower().endswith(_TABLES))
    except OSError as error:
        raise InputError(f"--data: {data}: cannot be read ({error.strerror})") from None
    if len(names) == 1:
        return data / names[0]
    found = f"{len(names)} tables ({', '.join(names[:3])})" if names else "no table"
    raise InputError(
        f"--data: {data}: got {found}, allowed: one annotation file ({form.about}); name it "
        "with --annotations"
    )


def _imported(report: Path, ids: set[str]) -> tuple[dict[str, int], dict[str, str]]:
    """What an import left out, and the kinds of its ties; nothing without its report."""
    if not report.is_file():
        return {}, {}
    try:
        content = read_json(report, _MAX_REPORT_BYTES)
        dropped = {f"rows that the import dropped: {why}": int(n) for why, n in content["dropped"].items()}
        kinds = {str(kind): list(map(str, names)) for kind, names in content["tie_ids"].items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise InputError(
            f"{report}: no report of `vrthinker data import`; restore it, or move it away from the pairs file"
        ) from None
    ties = dict(
        itertools.chain.from_iterable(((name, kind) for name in names) for kind, names in kinds.items())
    )
    return dropped, {name: kind for name, kind in ties.items() if name in ids}
