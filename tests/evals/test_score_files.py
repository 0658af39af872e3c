"""Anybody's verdict file: known judges get their analytic values, and no trap changes a denominator."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli_run import Done, vrthinker
from known_judges import KNOWN, labelled_pair, ten_pairs, write_pairs, write_rows

from vrthinker.data.pairs import Pair
from vrthinker.errors import InputError
from vrthinker.evals.verdict_files import WORDS, read_answers


def score(tmp_path: Path, pairs: list[Pair], rows: list[dict[str, Any]], *more: str) -> Done:
    file = write_rows(tmp_path / "verdicts.jsonl", rows)
    return vrthinker("eval", "score", file, "--data", write_pairs(tmp_path / "pairs.jsonl", pairs), *more)


def summary_of(tmp_path: Path, pairs: list[Pair], rows: list[dict[str, Any]]) -> dict[str, Any]:
    done = score(tmp_path, pairs, rows, "--json")
    assert done.code == 0, done.err
    return dict(json.loads(done.out))


@pytest.mark.parametrize(
    ("judge", "tau", "diff"),
    [
        ("always-1", 4 / 10, 4 / 7),
        ("always-2", 3 / 10, 3 / 7),
        ("always-tie", 3 / 10, 0.0),
        ("oracle", 1.0, 1.0),
        ("contrary", 0.0, 0.0),
    ],
)
def test_known_judges_get_their_analytic_values(judge: str, tau: float, diff: float, tmp_path: Path) -> None:
    pairs = ten_pairs()
    summary = summary_of(tmp_path, pairs, [{"id": p.id, "OA": KNOWN[judge](p)} for p in pairs])
    found = summary["measures"]["all"]
    assert (found["oa/tau"]["value"], found["oa/tau"]["n"]) == (tau, 10)
    assert (found["oa/diff"]["value"], found["oa/diff"]["n"]) == (pytest.approx(diff), 7)
    assert found["verdicts/share"]["value"] == 1.0
    beside = summary["baselines"]
    assert beside["always tie"] == {"oa/tau": 0.3, "oa/diff": 0.0} | {
        f"{code}/{kind}": None for code in ("ta", "vq", "mq") for kind in ("accuracy", "diff")
    }
    assert beside["always video 1"]["oa/tau"] == beside["commonest"]["oa/tau"] == 0.4
    assert beside["fair coin"] | {"oa/tau": 0.35, "oa/diff": 0.5} == beside["fair coin"]


@pytest.mark.parametrize(
    ("row", "status"),
    [
        ({"OA": "I think Video 1 is better, but video 2 is fine"}, "unparsed"),
        ({"OA": "<think>video 1 better</think>"}, "unparsed"),
        ({"OA": 3}, "unparsed"),
        ({"OA": True}, "unparsed"),
        ({"OA": ["video 1"]}, "unparsed"),
        ({"OA": None}, "unparsed"),
        ({"judgment": "video 1"}, "unparsed"),
        ({"judgment": None, "stop_reason": "unparseable", "reason": "no answer"}, "unparsed"),
        ({"judgment": None, "stop_reason": "video_error", "reason": "gone"}, "failed"),
        ({"score_1": float("nan"), "score_2": 1}, "unparsed"),
        ({"score_1": "high", "score_2": 1}, "unparsed"),
        (None, "missing"),
    ],
)
def test_what_cannot_be_read_stays_in_the_denominator_and_is_wrong(
    row: dict[str, Any] | None, status: str, tmp_path: Path
) -> None:
    """Each of these scripts count as a right tie, as video 1, or not at all: the pair is labelled a tie."""
    pairs = [labelled_pair(0, 0), labelled_pair(1, 1)]
    rows = [{"id": "p1", "OA": 1}] + ([] if row is None else [{"id": "p0", **row}])
    summary = summary_of(tmp_path, pairs, rows)
    tau = summary["measures"]["all"]["oa/tau"]
    assert (tau["value"], tau["n"]) == (0.5, 2)
    assert summary["statuses"] == {"judged": 1, "unparsed": 0, "failed": 0, "missing": 0} | {status: 1}
    assert summary["unanswered"]["OA"] == 1
    found = summary["measures"]["all"]
    assert found["unparsed/share"]["value"] == (0.5 if status == "unparsed" else 0.0)
    assert found["failed/share"]["value"] == (0.0 if status == "unparsed" else 0.5)
    shown = score(tmp_path, pairs, rows).out
    assert f"without a verdict: 1 of 2 (50%): 1 {status}; they count as wrong" in shown
    assert "OA: out of 2: 1 ties, 1 video 1, 0 video 2; 1 of them without a verdict" in shown


@pytest.mark.parametrize("word", ["Video 1 better", "Video 1 Better", " video 1  better ", "1.0", "A>B", 1.0])
def test_spellings_of_one_verdict_are_one_verdict(word: object, tmp_path: Path) -> None:
    summary = summary_of(tmp_path, [labelled_pair(0, 1)], [{"id": "p0", "OA": word}])
    assert summary["measures"]["all"]["oa/tau"]["value"] == 1.0


def test_both_kinds_of_ties_are_ties_and_are_told_apart(tmp_path: Path) -> None:
    rows = [
        {"id": n, "prompt": f"c{n}", "video_left": f"{n}l.mp4", "video_right": f"{n}r.mp4", "vote_type": vote}
        for n, vote in enumerate(["leftvote", "tievote", "bothbad_vote", "bothbad_vote", "rightvote"])
    ]
    rows.append(dict(rows[1]))  # the same row again, which the import drops
    (tmp_path / "genai.json").write_text(json.dumps(rows))
    data = tmp_path / "data"
    assert vrthinker("data", "import", "genai-bench", tmp_path / "genai.json", "--out", data).code == 0
    verdicts = write_rows(
        tmp_path / "verdicts.jsonl",
        [
            {"id": "0", "OA": 1},
            {"id": 1, "OA": "A=B=Good"},
            {"id": 2, "OA": "bothbad_vote"},
            {"id": 3, "OA": 2},
            {"id": 4, "OA": 2},
            {"id": "nobody", "OA": 1},
        ],
    )
    done = vrthinker("eval", "score", verdicts, "--data", data)
    assert done.code == 0, done.err
    for words in (
        "verdicts.jsonl on 5 items of data",
        "OA: out of 5: 3 ties, 1 video 1, 1 video 2",
        "left out: 1 rows that the import dropped: the same row again",
        "left out: 1 verdicts about ids that are no labelled pair",
        "ties that are both bad: 2, accuracy 0.500",
        "ties that are both equally good: 1, accuracy 1.000",
        "beside oa/tau: always video 1 0.200, always video 2 0.200, always tie 0.600",
    ):
        assert words in done.out, words
    found = json.loads(vrthinker("eval", "score", verdicts, "--data", data, "--json").out)
    assert found["measures"]["all"]["oa/tau"]["value"] == 0.8


def test_a_csv_with_scores_gets_the_best_threshold_and_ranks(tmp_path: Path) -> None:
    pairs = ten_pairs()
    sizes = {0: 0.01, 1: 0.5, 2: -0.5}
    lines = [f"p{n},{0.5 + sizes[p.labels['OA']]},0.5" for n, p in enumerate(pairs)]  # type: ignore[index]
    (tmp_path / "scores.csv").write_text("\n".join(["id,score_1,score_2", *lines]) + "\n")
    done = vrthinker(
        *("eval", "score", tmp_path / "scores.csv", "--json"),
        *("--data", write_pairs(tmp_path / "pairs.jsonl", pairs)),
    )
    summary = json.loads(done.out)
    found, scores = summary["measures"]["all"], summary["scores"]["OA"]
    assert found["oa/tau"]["value"] == found["oa/diff"]["value"] == 1.0
    assert scores["tie_threshold"] == pytest.approx(0.01)
    assert scores["kendall_tau_b"] == scores["spearman"] == pytest.approx(1.0)
    assert scores["items"] == 10


def test_the_threshold_of_ties_does_not_touch_the_accuracy_without_ties(tmp_path: Path) -> None:
    """Nine ties at small differences and one preference among them: as a tie it is wrong in tau only."""
    pairs = [labelled_pair(n, 0) for n in range(9)] + [labelled_pair(9, 1)]
    rows = [{"id": p.id, "score_1": 1 + n / 100, "score_2": 1.0} for n, p in enumerate(pairs)]
    rows[9]["score_1"] = 1.05
    found = summary_of(tmp_path, pairs, rows)["measures"]["all"]
    assert found["oa/tau"]["value"] == 0.9
    assert found["oa/diff"]["value"] == 1.0


def test_the_threshold_of_a_caption_comes_from_other_captions(tmp_path: Path) -> None:
    """Captions that differ in case or blanks are one: neither half may know them. All of one are one half."""
    prompts = ["A boat", "a boat", " a  boat", "A BOAT"]
    pairs = [labelled_pair(n, n % 3, prompt=prompts[n % 4]) for n in range(24)]
    rows = [{"id": pair.id, "score_1": (0.1, 1.0, -1.0)[n % 3], "score_2": 0} for n, pair in enumerate(pairs)]
    found = summary_of(tmp_path, pairs, rows)["scores"]["OA"]
    assert found["accuracy_of_the_scored"] == 1.0
    assert found["accuracy_of_the_scored_cross_fitted"] == pytest.approx(2 / 3), "by a threshold of 0"


def test_own_results_contradictions_and_stated_confidence(tmp_path: Path) -> None:
    pairs = [labelled_pair(n, 1, TA=1, VQ=1, MQ=1) for n in range(4)]
    rows = [
        {"id": "p0", "judgment": {"TA": 1, "VQ": 1, "MQ": 1, "OA": 1}, "confidence": 1},
        {"id": "p1", "judgment": {"TA": 1, "VQ": 0, "MQ": 1, "OA": 2}, "confidence": 1},
        {"id": "p2", "judgment": {"TA": 0, "VQ": 0, "MQ": 0, "OA": 1}, "confidence": 3},
        {"id": "p3", "judgment": {"TA": 1, "VQ": 0, "MQ": 0, "OA": 0}, "confidence": None},
    ]
    summary = summary_of(tmp_path, pairs, rows)
    assert summary["contradictions"] == {"verdicts": 4, "opposed": 1, "unsupported": 1, "withheld": 1}
    stated = summary["calibration"]["stated"]
    assert stated["levels"]["1"] == {"read_as": 5 / 6, "count": 2, "accuracy": 0.5}
    assert stated["error"] == pytest.approx((2 * abs(0.5 - 5 / 6) + abs(1 - 1 / 6)) / 3)
    assert summary["measures"]["all"]["oa/tau"]["value"] == 0.5, "nothing is repaired"
    assert "OA contradicts TA, VQ and MQ in 3 of 4 verdicts" in score(tmp_path, pairs, rows).out


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"id": "p0", "OA": 1}\n{"id": "p0", "OA": 2}\n', "line 2: got the id 'p0' again (first on line 1)"),
        ('{"OA": 1}\n', "line 1: id: got None"),
        ("", "got no row"),
        ("[1]\n", "allowed: a JSON object a line"),
        ('{"id": "p0", "says": 1}\n', "got the columns id, says, wanted one of TA"),
        ('{"id": "x", "OA": 1}\n', "none of its 1 ids is a labelled pair"),
    ],
)
def test_files_that_cannot_be_scored_are_refused(content: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "verdicts.jsonl"
    file.write_text(content)
    data = write_pairs(tmp_path / "pairs.jsonl", [labelled_pair(0, 1)])
    done = vrthinker("eval", "score", file, "--data", data)
    assert (done.code, done.out) == (2, "")
    assert words in done.line


def test_words_say_one_thing_each_and_other_endings_are_refused(tmp_path: Path) -> None:
    assert {WORDS[word] for word in ("1", "a", "left")} == {1}
    assert all(word == word.lower().strip() for word in WORDS)
    with pytest.raises(InputError, match=r"ends in \.csv or \.jsonl"):
        read_answers(tmp_path / "verdicts.txt")


def test_runs_are_compared_pair_by_pair(tmp_path: Path) -> None:
    pairs = ten_pairs()
    data = write_pairs(tmp_path / "pairs.jsonl", pairs)
    for name in ("oracle", "always-1"):
        rows = [{"id": p.id, "OA": KNOWN[name](p)} for p in pairs]
        if name == "always-1":
            rows = rows[:9]
        file = write_rows(tmp_path / f"{name}.jsonl", rows)
        done = vrthinker("eval", "score", file, "--data", data, "--out", tmp_path / name)
        assert done.code == 0, done.err
    done = vrthinker("eval", "compare", tmp_path / "oracle", tmp_path / "always-1", "--json")
    (found,) = json.loads(done.out)
    assert (found["items"], found["left_out"]) == (10, [0, 0]), "a pair without a verdict is an item"
    assert found["differences"]["oa/tau"]["value"] == pytest.approx(-0.6)
    assert found["mcnemar_overall"] == {"first_only": 6, "second_only": 0, "p_value": 2 / 64}
    assert found["flips"]["OA"] == 0.6
    shown = vrthinker("eval", "compare", tmp_path / "oracle", tmp_path / "always-1").out
    assert "always-1 minus oracle, on 10 common items" in shown
    assert "only oracle right: 6; only always-1 right: 0; McNemar exact p = 0.03125" in shown

    other = write_pairs(tmp_path / "other.jsonl", [labelled_pair(n, 2) for n in range(3)])
    file = write_rows(tmp_path / "other-verdicts.jsonl", [{"id": "p0", "OA": 1}])
    assert vrthinker("eval", "score", file, "--data", other, "--out", tmp_path / "other").code == 0
    refused = vrthinker("eval", "compare", tmp_path / "oracle", tmp_path / "other")
    assert refused.code == 2
    assert "p0 is labelled" in refused.line
    for given, words in (
        ([tmp_path / "oracle"], "got 1 run"),
        ([tmp_path / "oracle", tmp_path], "has no items.jsonl"),
        ([tmp_path / "oracle"] * 2, "twice"),
    ):
        assert words in vrthinker("eval", "compare", *given).line
