"""Evaluation on labelled pairs: what is counted, what is left out, and runs that broke off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import heavy  # noqa: F401
import pytest
from quick_judge import make_quick_judge

from vrthinker.data.pairs import Pair
from vrthinker.errors import InputError
from vrthinker.evals.intervals import Estimate
from vrthinker.evals.pairs import (
    ALL,
    TRAJECTORIES_FILE,
    PairsReport,
    evaluate_pairs,
    labelled,
    open_log,
    report_of,
    write_report,
)
from vrthinker.evals.pairs_table import print_pairs_report
from vrthinker.judge import Judge
from vrthinker.records.verdicts import VerdictRecord


def pair(name: str, labels: dict[str, int] | None, dataset: str | None = None) -> Pair:
    clips = {"video_1": Path(f"{name}-1.mp4"), "video_2": Path(f"{name}-2.mp4")}
    return Pair.model_validate({"id": name, "prompt": name, **clips, "labels": labels, "dataset": dataset})


def record(name: str, judgment: tuple[int, int, int, int] | None, **changes: Any) -> VerdictRecord:
    """A record; the judgment is in the order TA, VQ, MQ, OA."""
    codes = ("TA", "VQ", "MQ", "OA")
    usual = {
        "id": name,
        "judgment": None if judgment is None else dict(zip(codes, judgment, strict=True)),
        "confidence": None,
        "rounds": 2,
        "tool_calls": 1,
        "frames_seen": [1],
        "stop_reason": "answered" if judgment is not None else "unparseable",
        "reason": None if judgment is not None else "no answer",
        "well_formed": judgment is not None,
        "latency_seconds": 2.0,
        "prompt_tokens": 10,
        "sampled_tokens": 40,
        "seed": 0,
        "model": "m",
    }
    return VerdictRecord.model_validate({**usual, **changes})


PAIRS = [
    pair("right", {"TA": 1, "VQ": 2, "MQ": 0, "OA": 1}),
    pair("wrong", {"TA": 2, "OA": 2}),
    pair("tie", {"OA": 0}),
    pair("no-oa", {"TA": 1}),
    pair("unreadable", {"OA": 1}),
    pair("broken", {"OA": 2}),
    pair("waiting", {"OA": 1}),
]
RECORDS = [
    record("right", (1, 2, 0, 1)),
    record("wrong", (2, 0, 0, 1)),
    record("tie", (0, 0, 0, 0), notes=["a note", "a note"]),
    record("no-oa", (2, 1, 1, 1), notes=["a note"]),
    record("unreadable", None),
    record("broken", None, stop_reason="video_error", reason="gone", rounds=0, sampled_tokens=None),
    record("somebody-else's", (1, 1, 1, 1)),
]


def test_only_labels_that_a_pair_has_are_counted_and_failures_are_wrong() -> None:
    report = report_of(PAIRS, RECORDS)
    judged = report.judged[ALL]

    def value(name: str) -> tuple[float | None, int]:
        return judged[name].value, judged[name].n

    assert value("oa/tau") == (2 / 6, 6), "the tie is a class, and three failures count as wrong"
    assert value("oa/diff") == (1 / 5, 5), "without the pair that people tied"
    assert value("ta/accuracy") == (2 / 3, 3)
    assert value("vq/accuracy") == value("mq/accuracy") == (1.0, 1)
    assert value("all_four") == (1.0, 1)
    assert value("verdicts/share") == (4 / 7, 7)
    assert "hidden_events/seen" not in judged, "nothing of the kind is there"
    assert report.labels["OA"] == {"tie": 1, "video 1": 3, "video 2": 2, "missing": 1}
    assert report.labels["VQ"] == {"tie": 0, "video 1": 0, "video 2": 1, "missing": 6}
    assert report.commonest["OA"] == 3 / 6
    assert report.episodes == {
        "rounds": 2.0,
        "sampled_tokens_per_round": 20.0,
        "latency_seconds": 2.0,
    }
    assert report.notes == {"a note": 2}
    assert report.failures == (
        "unreadable: unparseable: no answer",
        "broken: video_error: gone",
        "waiting: not judged yet",
    )
    assert report.errors == report.failures[1:], "what a judge wrote is no error"
    assert report.pairs == 7


def test_a_column_for_each_of_several_datasets() -> None:
    pairs = [pair("a", {"OA": 1}, "genai-bench"), pair("b", {"OA": 1})]
    records = [record("a", (1, 1, 1, 1)), record("b", (2, 2, 2, 2))]
    report = report_of(pairs, records)
    values = {name: column["oa/tau"].value for name, column in report.judged.items()}
    assert values == {ALL: 0.5, "genai-bench": 1.0, "no dataset": 0.0}
    assert set(report_of(pairs[:1], records).judged) == {ALL}


def test_pairs_without_labels_are_left_out_and_a_limit_draws(tmp_path: Path) -> None:
    pairs = [pair(f"p{n}", {"OA": 1} if n % 2 else None) for n in range(40)]
    assert [p.id for p in labelled(pairs)] == [f"p{n}" for n in range(1, 40, 2)]
    drawn = [[p.id for p in labelled(pairs, limit=5, seed=seed)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0] == sorted(drawn[0], key=lambda name: int(name[1:])), "in the order of the file"
    assert drawn[0] != [f"p{n}" for n in (1, 3, 5, 7, 9)], "not simply the first ones"
    assert len(labelled(pairs, limit=100)) == 20
    with pytest.raises(InputError, match="got none with a label"):
        labelled(pairs[::2])
    with pytest.raises(InputError, match="limit: got 0"):
        labelled(pairs, limit=0)


def test_a_report_is_written_read_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = report_of(PAIRS, RECORDS)
    write_report(tmp_path, report, {"model": "m"})
    written = json.loads((tmp_path / "eval.json").read_text())
    assert {"schema_version", "model", "provenance"} <= set(written)
    assert PairsReport.from_json(written) == report
    print_pairs_report(report, model="\x1b[31mm", pairs_name="p.jsonl", without_labels=3)
    shown = capsys.readouterr().out
    for words in (
        "on 7 labelled pairs of p.jsonl",
        "oa/tau",
        "OA: tie 1, video 1 3, video 2 2; always the commonest: 0.500; 1 pair without a label",
        "3 pairs without any label: not judged",
        "an episode, on average: 2.0 rounds, 20.0 tokens a round, 2.0 seconds",
        "without a verdict: 3 of 7 pairs (43%); they count as wrong:",
        "2 of them by an error or not judged yet",
        "note on 2 pairs: a note",
    ):
        assert words in shown, words
    assert "\x1b" not in shown
    for broken in (
        {},
        {**written, "pairs": "many"},
        {**written, "judged": {"all": {"oa/tau": 3}}},
        {**written, "labels": {}},
        {**written, "labels": {code: {} for code in written["labels"]}},
        {**written, "accuracy_of_the_commonest_label": {}},
    ):
        with pytest.raises(InputError, match="no report of labelled pairs"):
            PairsReport.from_json(broken)


def test_an_evaluation_that_broke_off_goes_on(clip_pair: tuple[Path, Path], tmp_path: Path) -> None:
    """A judge of random weights; every second pair was judged before."""
    clips = {"video_1": clip_pair[0], "video_2": clip_pair[1]}
    pairs = [
        Pair.model_validate({"id": f"p{n}", "prompt": f"caption {n}", **clips, "labels": {"OA": n % 3}})
        for n in range(4)
    ]
    file = tmp_path / "pairs.jsonl"
    file.touch()
    reports = {}
    with Judge.from_pretrained(make_quick_judge(tmp_path / "tiny")) as judge:
        for name in ("whole", "broken"):
            out = tmp_path / name
            if name == "broken":
                with open_log(out, judge, pairs, pairs_file=file, seed=0, weights="w") as log:
                    assert log.claim("p1")
                    done = [r for r in reports["whole"][1] if r.id == "p1"]
                    log.append(done[0])
            written: list[str] = []
            with open_log(out, judge, pairs, pairs_file=file, seed=0, weights="w") as log:
                report = evaluate_pairs(judge, pairs, log, on_record=lambda r, w=written: w.append(r.id))
                reports[name] = (report, log.records())
            assert sorted(written) == (["p0", "p1", "p2", "p3"] if name == "whole" else ["p0", "p2", "p3"])
        whole, broken = (reports[name][0] for name in ("whole", "broken"))
        assert whole.judged == broken.judged
        assert whole.judged[ALL]["verdicts/share"] == Estimate(1.0, 1.0, 1.0, 4)
        assert len((tmp_path / "whole" / TRAJECTORIES_FILE).read_text().splitlines()) == 4
        for changes in ({"weights": "other"}, {"seed": 1}):
            options: dict[str, Any] = {"pairs_file": file, "seed": 0, "weights": "w", **changes}
            with pytest.raises(InputError, match="was made with"):
                open_log(tmp_path / "whole", judge, pairs, **options)
        with pytest.raises(InputError, match="judged_pairs"):
            open_log(tmp_path / "whole", judge, pairs[:2], pairs_file=file, seed=0, weights="w")
