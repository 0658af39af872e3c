"""Groups: a judge ranks clips; frames are decoded and encoded once for all pairs of a group."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from clips import make_clip
from quick_judge import make_quick_judge

from vrthinker import EngineError, InputError, Judge
from vrthinker.engine.scripted import ScriptedEngine
from vrthinker.episode.trajectory import load_trajectories
from vrthinker.judge_group import cost_of, cost_of_ranking, rank_into, records_of
from vrthinker.records.verdict_log import VerdictLog
from vrthinker.world.groups import GroupOracle, GroupTruth, sample_group, write_group
from vrthinker.world.nano import nano_settings, nano_templates
from vrthinker.world.world import PRESETS

BETTER_FIRST = "<snapshot>x</snapshot><think>y</think><answer>TA=1, VQ=0, MQ=2, OA=1, CF=1</answer>"


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> tuple[GroupTruth, list[Path]]:
    """Eight clips of the easy world, with their truth."""
    truth = sample_group(PRESETS["easy"], 4, 0, 8)
    return truth, write_group(tmp_path_factory.mktemp("group"), truth)


def oracle(*groups: tuple[GroupTruth, list[Path]]) -> Judge:
    return Judge(GroupOracle(groups), nano_settings(), templates=nano_templates())


def test_the_oracle_finds_the_best_clip_by_nine_pairs(group: tuple[GroupTruth, list[Path]]) -> None:
    truth, clips = group
    with oracle(group) as judge:
        ranking = judge.rank(truth.caption, clips, schedule="knockout")
        assert len(ranking.comparisons) == 9
        assert ranking.best in truth.best
        assert ranking.failures == ()
        every = judge.rank(truth.caption, clips)
    assert [truth.defects[clip] for clip in every.order] == sorted(truth.defects)
    cost = cost_of(records_of(every))
    assert cost.pairs == 28
    assert cost.rounds >= 28
    assert cost.rounds == 28 + cost.tool_calls


@pytest.mark.slow
def test_the_best_of_eight_in_a_hundred_groups(tmp_path: Path) -> None:
    groups = [sample_group(PRESETS["easy"], 5, index, 8) for index in range(100)]
    written = [(truth, write_group(tmp_path / str(i), truth)) for i, truth in enumerate(groups)]
    found = pairs = 0
    with oracle(*written) as judge:
        for truth, clips in written:
            ranking = judge.rank(truth.caption, clips, schedule="knockout")
            found += ranking.best in truth.best
            pairs += len(ranking.comparisons)
    print(f"best of 8 found in {found} of 100 groups with {pairs} of 2800 pairs")  # noqa: T201
    assert found >= 95
    assert pairs == 900


def test_a_judge_of_places_is_a_judge_of_nothing_in_both_orders(tmp_path: Path) -> None:
    clips = [make_clip(tmp_path / f"{n}.mp4", 9, size=(64, 96)) for n in range(3)]
    (tmp_path / "no.mp4").write_text("no video")
    with Judge(ScriptedEngine(lambda session, number, messages: BETTER_FIRST)) as judge:
        one = judge.rank("a dog", clips)
        ranking = judge.rank("a dog", [*clips, tmp_path / "no.mp4"], both_orders=True)
    assert {c.judgment["OA"] for c in one.comparisons if c.judgment} == {1}
    judged = [c for c in ranking.comparisons if c.judgment is not None]
    assert [dict(c.judgment or {}) for c in judged] == [{"TA": 0, "VQ": 0, "MQ": 0, "OA": 0}] * 3
    assert [c.consistent for c in judged] == [False] * 3
    assert (one.consistency, ranking.consistency) == (None, 0)
    assert len(ranking.failures) == 3
    assert {c.consistent for c in ranking.failures} == {None}
    assert [(c.trajectory.id, c.other_order.id) for c in judged if c.trajectory and c.other_order] == [
        (c.name, f"{c.name}#swapped") for c in judged
    ]
    assert cost_of_ranking(ranking).pairs == 6, "a pair counts once"
    assert cost_of_ranking(ranking).rounds == 6
    assert [standing.clip for standing in ranking.standings if standing.rank is None] == [3]


def test_each_order_is_sampled_as_in_a_folder(tmp_path: Path) -> None:
    clips = [make_clip(tmp_path / f"{n}.mp4", 9, size=(64, 96)) for n in range(2)]
    with Judge(ScriptedEngine(lambda session, number, messages: BETTER_FIRST)) as judge:
        (one,) = judge.rank("a dog", clips, both_orders=True, seed=3).comparisons
        with VerdictLog(tmp_path / "verdicts.jsonl", {}) as log:
            rank_into(judge, "a dog", clips, log, trajectories=tmp_path / "t.jsonl", both_orders=True, seed=3)
    kept = {t.id: t.seed for t in load_trajectories(tmp_path / "t.jsonl")}
    assert one.trajectory is not None
    assert one.other_order is not None
    assert {t.id: t.seed for t in (one.trajectory, one.other_order)} == kept
    assert len(set(kept.values())) == 2


def test_probabilities_of_a_group_add_up_in_one_order_and_in_both(tmp_path: Path) -> None:
    clips = [make_clip(tmp_path / f"{n}.mp4", 9, size=(64, 64 + 16 * n)) for n in range(3)]
    loaded = Judge.from_pretrained(make_quick_judge(tmp_path / "tiny"), device="cpu", max_rounds=1)
    with loaded as judge:
        for both_orders in (False, True):
            ranking = judge.rank("a dog", clips, both_orders=both_orders)
            for comparison, told in zip(ranking.comparisons, ranking.as_json()["comparisons"], strict=True):
                assert comparison.judgment is not None
                assert comparison.probabilities is not None
                known = comparison.probabilities["OA"]
                assert known is not None
                assert known.video_1 + known.tie + known.video_2 == pytest.approx(1)
                assert told["probabilities"]["OA"]["tie"] == known.tie
                assert told["consistent"] == comparison.consistent
                assert (comparison.consistent is None) != both_orders


class CountingReader:
    """A reader that counts which frames it decodes."""

    def __init__(self, reader: Any) -> None:
        self._reader, self.decoded = reader, Counter[tuple[str, int]]()

    def probe(self, path: Any, **options: Any) -> Any:
        return self._reader.probe(path, **options)

    def frames_at(self, path: Any, indices: Any, **options: Any) -> Any:
        self.decoded.update((str(path), int(index)) for index in indices)
        return self._reader.frames_at(path, indices, **options)


def test_a_group_decodes_and_encodes_each_frame_once(tmp_path: Path) -> None:
    from vrthinker.video.open import open_reader

    sizes = [(64, 96), (96, 64), (48, 48), (64, 96)]
    clips = [make_clip(tmp_path / f"{n}.mp4", 10 + n, size=size) for n, size in enumerate(sizes)]
    loaded = Judge.from_pretrained(make_quick_judge(tmp_path / "tiny"), device="cpu", max_rounds=2)
    reader: Any = CountingReader(open_reader())
    with Judge(loaded.engine, loaded.settings, templates=loaded.templates, reader=reader) as judge:
        ranking = judge.rank("a dog", clips)
        encoded = judge.engine.features  # type: ignore[attr-defined]
        assert len(ranking.comparisons) == 6
        seen = {
            (trajectory.videos[frame.video - 1].path, frame.frame_index)
            for one in ranking.comparisons
            if (trajectory := one.trajectory) is not None
            for frame in trajectory.frames
        }
        assert set(reader.decoded) >= seen
        assert set(reader.decoded.values()) == {1}
        assert encoded.misses == len(seen)
        assert encoded.hits > 0


def test_a_clip_that_cannot_be_read_is_a_failure_and_ranks_nowhere(tmp_path: Path) -> None:
    clips = [make_clip(tmp_path / f"{n}.mp4", 9, size=(64, 96)) for n in range(2)]
    (tmp_path / "no.mp4").write_text("no video")
    judge = Judge(ScriptedEngine(lambda session, number, messages: BETTER_FIRST))
    ranking = judge.rank("a dog", [*clips, tmp_path / "no.mp4"])
    assert [standing.clip for standing in ranking.standings if standing.rank is None] == [2]
    assert len(ranking.failures) == 2
    assert "no.mp4" in str(ranking.failures[0].reason)
    cost = cost_of_ranking(ranking)
    assert (cost.pairs, cost.rounds) == (3, 1), "pairs that could not start count, as in a folder"
    assert ranking.best == next(one.first for one in ranking.comparisons if one.judgment is not None)
    with pytest.raises(InputError, match="clips: got 1, allowed: 2 to 256"):
        judge.rank("a dog", clips[:1])


def test_open_files_are_ranked_and_one_bad_pair_ends_nothing(tmp_path: Path) -> None:
    paths = [make_clip(tmp_path / f"{number}.mp4", 4, size=(64, 96)) for number in range(3)]
    with Judge(ScriptedEngine(lambda session, number, messages: BETTER_FIRST)) as judge:
        files = [path.open("rb") for path in paths]
        ranking = judge.rank("a cat", files)
        assert ranking.failures == ()
        assert len(ranking.comparisons) == 3
        content = paths[0].read_bytes()
        pairs = [("a", content, content), ("b", b"", content), ("c", None, content), ("d", content, content)]
        done = {judged.id: judged for judged in judge.judge_pairs(pairs)}  # type: ignore[arg-type]
    assert {id: judged.verdict is not None for id, judged in done.items()} == {
        "0": True, "1": False, "2": False, "3": True,
    }  # fmt: skip
    assert "got no bytes" in str(done["1"].error)
    with pytest.raises(EngineError, match="its clips are let go"):
        done["0"].item.open_workspace()
