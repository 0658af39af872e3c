"""`vrthinker rank`: a table, JSON, a folder that goes on where it was, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_run import vrthinker
from clips import make_clip


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("three")
    return [make_clip(folder / f"{n}.mp4", 12, size=(48, 64)) for n in range(3)]


def test_rank_prints_a_table_and_keeps_a_folder(tiny: Path, three: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "group"
    arguments = ["rank", "a [red]dog[/red]", *three, "--model", tiny, "--rounds", 1, "--out", out]
    done = vrthinker(*arguments)
    assert done.code == 0, done.err
    assert "best: " in done.out
    assert "3 of 3 pairs compared (all), 3 rounds, 0 tool calls" in done.out
    assert "CPU seconds" in done.out
    lines = (out / "verdicts.jsonl").read_text().splitlines()
    assert len(lines) == 3
    assert len((out / "trajectories.jsonl").read_text().splitlines()) == 3
    first = json.loads((out / "ranking.json").read_text())
    # Killed after its first pair, it goes on with the others, to the same ranking.
    (out / "verdicts.jsonl").write_text(lines[0] + "\n")
    again = vrthinker(*arguments, "--json")
    assert again.code == 0, again.err
    assert (out / "verdicts.jsonl").read_text().splitlines()[0] == lines[0]
    assert len((out / "trajectories.jsonl").read_text().splitlines()) == 5
    told = json.loads(again.out)
    assert told["standings"] == first["standings"]
    assert told["cost"]["pairs"] == 3
    other = vrthinker("rank", "a cat", *three, "--model", tiny, "--rounds", 1, "--out", out)
    assert other.code == 2
    assert "was made with prompt=" in other.last_line


def test_failed_pairs_can_be_compared_again(tiny: Path, three: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "group"
    arguments = ["rank", "a dog", *three, "--model", tiny, "--rounds", 1, "--out", out]
    assert vrthinker(*arguments).code == 0
    lines = [json.loads(line) for line in (out / "verdicts.jsonl").read_text().splitlines()]
    lines[1] |= {
        "judgment": None,
        "confidence": None,
        "stop_reason": "engine_error",
        "reason": "it was killed",
    }
    (out / "verdicts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    kept = vrthinker(*arguments)
    assert kept.code == 1, "a failed pair is kept as it is, and counted"
    assert "it was killed" in (out / "verdicts.jsonl").read_text()
    again = vrthinker(*arguments, "--retry-failed")
    assert again.code == 0, again.err
    assert "1 pairs failed; those that the schedule needs are compared again" in again.err
    assert "it was killed" not in (out / "verdicts.jsonl").read_text()
    assert len((out / "trajectories.jsonl").read_text().splitlines()) == 4


def test_both_orders_are_one_comparison_in_a_folder_and_without(
    tiny: Path, three: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "group"
    arguments = ["rank", "a dog", *three, "--model", tiny, "--rounds", 1, "--both-orders"]
    kept = vrthinker(*arguments, "--out", out)
    assert kept.code == 0, kept.err
    assert "3 of 3 pairs compared (all), 6 rounds" in kept.out
    assert "% of the judged pairs gave the same overall verdict in both orders" in kept.out
    records = [json.loads(line) for line in (out / "verdicts.jsonl").read_text().splitlines()]
    assert [len(record["orders"]) for record in records] == [2, 2, 2]
    told = json.loads(vrthinker(*arguments, "--json").out)
    written = json.loads((out / "ranking.json").read_text())
    for name in ("standings", "consistency"):
        assert told[name] == written[name], name
    for one, kept_one in zip(told["comparisons"], written["comparisons"], strict=True):
        known, kept_known = one.pop("probabilities"), kept_one.pop("probabilities")
        assert known["OA"] == pytest.approx(kept_known["OA"], abs=1e-5), "batched in another way"
        assert one == kept_one
    other = vrthinker(*arguments[:-1], "--out", out)
    assert other.code == 2, "the folder holds verdicts of both orders"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x", "0", "1", "--retry-failed"], "--retry-failed: got it without --out"),
        (["x", "0"], "rank: got 1 clip, allowed: 2 to 256"),
        (["x", "0", "0"], "rank: got a clip twice"),
        (["x", "0", "1", "--budget", "2"], "--budget: got 2, allowed: 1 to 1"),
        (["x", "0", "/no/clip.mp4"], "/no/clip.mp4"),
        (["x", "0", "1", "--frames", "3"], "--frames: got 3, allowed: an even number"),
        (["x", "0", "1", "--window", "-1"], "--window: got -1"),
    ],
)
def test_what_rank_refuses(tiny: Path, three: list[Path], arguments: list[str], message: str) -> None:
    given = [str(three[int(word)]) if word in "01" else word for word in arguments]
    done = vrthinker("rank", *given, "--model", tiny)
    assert done.code == 2
    assert message in done.last_line


def test_rank_wants_a_model(three: list[Path]) -> None:
    assert "--model: missing" in vrthinker("rank", "x", *three).line
