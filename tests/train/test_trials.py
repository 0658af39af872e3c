"""Trials: both orders of the clips, drawn by seed, pair and sample, with the labels turned along."""

from __future__ import annotations

from pathlib import Path

import pytest

from vrthinker.data.pairs import Pair, load_pairs
from vrthinker.errors import InputError
from vrthinker.train.trials import check_clips, make_trials, write_pairs_file


def pair(name: str = "p", **labels: int) -> Pair:
    return Pair(
        id=name, prompt="a dog", video_1=Path("/a.mp4"), video_2=Path("/b.mp4"), labels=labels or None
    )


def test_a_swapped_pair_has_its_labels_turned_and_its_ties_kept() -> None:
    swapped = pair(TA=1, VQ=2, MQ=0).swapped()
    assert (swapped.video_1, swapped.video_2) == (Path("/b.mp4"), Path("/a.mp4"))
    assert swapped.labels == {"TA": 2, "VQ": 1, "MQ": 0}
    assert swapped.swapped() == pair(TA=1, VQ=2, MQ=0)
    assert pair().swapped().labels is None


def test_an_order_follows_from_seed_pair_and_sample_alone() -> None:
    pairs = [pair(f"p{n}", OA=1) for n in range(100)]

    def orders(chosen: list[Pair], samples: int, seed: int = 0) -> dict[str, bool]:
        return {trial.id: trial.swapped for trial in make_trials(chosen, samples=samples, seed=seed)}

    wanted = orders(pairs, 4)
    assert len(wanted) == 400
    assert 150 < sum(wanted.values()) < 250, "both orders, about equally often"
    assert 20 < sum(wanted[f"p{n}#1"] != wanted[f"p{n}#2"] for n in range(100)) < 80, "each sample draws"
    fewer = orders(pairs[::-3], 2)
    assert fewer == {name: wanted[name] for name in fewer}, "whatever else is sampled"
    assert orders(pairs, 4, seed=1) != wanted
    assert not any(trial.swapped for trial in make_trials(pairs, samples=2, seed=0, swap=False))


def test_trials_of_one_first_input_are_neighbours_and_ids_never_clash() -> None:
    trials = make_trials([pair("a", OA=1), pair("a#1"), pair("a swapped")], samples=12, seed=0)
    assert len({trial.id for trial in trials}) == 36
    groups = [trial.group_id for trial in trials]
    runs = [group for number, group in enumerate(groups) if number == 0 or groups[number - 1] != group]
    assert len(runs) == len(set(runs)) == 6, "each group stands together, and no two have one id"
    for trial in trials:
        assert trial.pair.id == trial.id
        assert trial.pair.video_1 == (trial.source.video_2 if trial.swapped else trial.source.video_1)
        if trial.source.id == "a":
            assert trial.pair.labels == {"OA": 2 if trial.swapped else 1}


def test_pairs_come_back_from_the_file_that_is_written(tmp_path: Path) -> None:
    trials = make_trials([pair("a", OA=1, TA=0), pair("\u00e4")], samples=3, seed=0)
    write_pairs_file(tmp_path / "pairs.jsonl", [trial.pair for trial in trials])
    assert load_pairs(tmp_path / "pairs.jsonl") == [trial.pair for trial in trials]


def test_missing_clips_are_named_before_anything_is_asked(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"pairs\.jsonl: clips that are not there: /a\.mp4, .* and 3 more"):
        check_clips([pair("a"), pair("b"), pair("c")], tmp_path / "pairs.jsonl")
