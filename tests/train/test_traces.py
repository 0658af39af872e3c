"""Traces: what is kept, what is made, and what a killed run leaves behind."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import heavy  # noqa: F401
import pytest
import traces_worker
from forks import Outcomes, assert_session_ends
from pydantic import ValidationError
from transformers import AutoTokenizer

from vrthinker.data.pairs import load_pairs
from vrthinker.engine.hf.markup import Markup
from vrthinker.engine.scripted import ScriptedEngine
from vrthinker.episode.settings import EpisodeSettings, JudgeSettings
from vrthinker.episode.trajectory import StopReason, Trajectory, dump_line, load_trajectories
from vrthinker.errors import InputError, VRThinkerError
from vrthinker.judge import Judge
from vrthinker.judge_file import judge_file, run_configuration
from vrthinker.policy.replay import round_ids
from vrthinker.policy.sequences import training_sequences
from vrthinker.records.verdict_log import VerdictLog
from vrthinker.train import world_traces
from vrthinker.train.trace_sources import FileTraces, MixedTraces, WorldTraces, sources_of
from vrthinker.train.traces import Dropped, Selection, read_traces, why_dropped
from vrthinker.train.world_traces import make_traces
from vrthinker.world.files import PAIRS_FILE, load_truths, make_world
from vrthinker.world.nano import nano_settings, nano_templates
from vrthinker.world.oracle import BehaviorMix, OracleEngine, truths_by_clip
from vrthinker.world.world import PRESETS, Difficulty

MakeCheckpoint = Callable[[str], Path]
PAIRS = 8


def made(
    folder: Path, *, seed: int = 0, settings: JudgeSettings | None = None, **source: Any
) -> list[Trajectory]:
    what = WorldTraces(**{"pairs": PAIRS, "seed": 5, **source})
    return make_traces(
        what, folder, settings or nano_settings(), nano_templates(), seed=seed, workers=1
    ).traces


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where traces are made; sources that differ only in what is done share its worlds."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def markup(checkpoint_of: MakeCheckpoint) -> Markup:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_of("nano"))
    return Markup(tokenizer, len(tokenizer))


def truths_of(folder: Path) -> dict[str, dict[str, int]]:
    (world,) = {path.parent for path in folder.rglob("truth.jsonl")}
    return {truth.id: truth.judgments.as_dict() for truth in load_truths(world)}


# Made ones


def test_an_oracle_that_looks_is_right_and_everything_is_kept(folder: Path) -> None:
    found = made(folder)
    truths = truths_of(folder)
    assert [trace.id for trace in found] == list(truths), "in the order of the pairs"
    for trace in found:
        assert trace.outcome.judgments is not None
        assert trace.outcome.judgments.as_dict() == truths[trace.id]
        assert trace.well_formed
        assert (trace.engine, trace.latency_seconds) == ("oracle", 0.0)
        assert trace.settings == nano_settings().episode
        assert {(frame.height, frame.width) for frame in trace.frames} == {(56, 56)}
    assert len({trace.seed for trace in found}) == PAIRS
    assert {len(trace.rounds) for trace in found} > {2}
    again = made(folder)
    assert again == found


def test_the_filters(folder: Path) -> None:
    guessing = BehaviorMix(oracle=0, immediate=1)
    every = made(folder, filter=False, mix=guessing)
    truths = truths_of(folder)
    right = [t for t in every if t.outcome.judgments and t.outcome.judgments.as_dict() == truths[t.id]]
    assert 0 < len(right) < len(every) == PAIRS
    assert [t.id for t in made(folder, mix=guessing)] == [t.id for t in right]
    whole = right[0]
    assert why_dropped(whole, truths[whole.id]) is None
    for code, label in truths[whole.id].items():
        assert why_dropped(whole, {**truths[whole.id], code: (label + 1) % 3}) == f"wrong in {code}"
    turned = {code: (label + 1) % 3 for code, label in truths[whole.id].items()}
    assert why_dropped(whole, turned) == "wrong in TA and VQ and MQ and OA"
    assert why_dropped(whole.model_copy(update={"rounds": ()}), None) == "without a verdict"
    lost = whole.outcome.model_copy(update={"judgments": None, "reason": "none"})
    assert why_dropped(whole.model_copy(update={"outcome": lost}), None) == "without a verdict"


def test_a_summary_names_the_most_frequent_reasons() -> None:
    dropped = [Dropped(f"p{n}", 0, f"wrong {reason}") for n, reason in enumerate("aabbbcdeefffff")]
    selection = Selection([], 16, "form and labels", tuple(dropped))
    assert selection.reasons == {
        **{"wrong f": 5, "wrong b": 3, "wrong a": 2, "wrong e": 2, "wrong c": 1, "wrong d": 1},
        "not right": 2,
    }
    assert selection.summary() == (
        "kept 0 of 16 traces (5 wrong f, 3 wrong b, 2 wrong a, 2 wrong e, 4 for other reasons)"
    )


def selection(name: str, kept: int, dropped: int, checked: Literal["form and labels", "form"]) -> Selection:
    """Some traces; they only need ids here."""
    traces = [Trajectory.model_construct(id=f"{name}{n}", rounds=(), videos=()) for n in range(kept)]
    reasons = tuple(
        Dropped(f"{name}-{n}", n, "wrong in TA" if n % 2 else "not well formed") for n in range(dropped)
    )
    return Selection(traces, kept + dropped, checked, reasons)


def test_several_sources_give_the_sum_of_what_each_gives() -> None:
    a, b = selection("a", 3, 2, "form and labels"), selection("b", 1, 4, "form")
    both = Selection.joined([a, b])
    assert [trace.id for trace in both.traces] == ["a0", "a1", "a2", "b0"], "in the order of the sources"
    assert (both.n_read, len(both.dropped)) == (10, 6)
    assert both.checked == Selection.joined([b, a]).checked == "form", "the weaker check"
    assert Selection.joined([a, a]).checked == "form and labels"
    assert both.reasons == {"not well formed": 3, "wrong in TA": 3}
    assert both.summary() == "kept 4 of 10 traces (3 not well formed, 3 wrong in TA)"
    assert Selection.joined([a]) == a, "one source alone is what it was"


def test_the_digest_of_several_sources_tells_their_order_and_content(folder: Path) -> None:
    mixes = (BehaviorMix(), BehaviorMix(oracle=0, immediate=1))
    one, two = (Selection(made(folder, filter=False, mix=mix), PAIRS, "form") for mix in mixes)
    assert Selection.joined([one]).digest() == one.digest()
    digests = {
        Selection.joined(parts).digest() for parts in ([one], [two], [one, two], [two, one], [one, one])
    }
    assert len(digests) == 5


def test_sources_of_a_phase() -> None:
    world, file = WorldTraces(pairs=2), FileTraces(path=Path("/t.jsonl"))
    assert sources_of(world) == (world,)
    assert sources_of(file) == (file,)
    mixed = MixedTraces.model_validate(
        {"of": [world.model_dump(), {"kind": "file", "path": "/t.jsonl"}, world]}
    )
    assert sources_of(mixed) == (world, file, world)
    assert MixedTraces.model_validate_json(mixed.model_dump_json()) == mixed
    with pytest.raises(ValidationError, match="at least 1 item"):
        MixedTraces.model_validate({"of": []})
    with pytest.raises(ValidationError, match="Input tag 'mixed'"):
        MixedTraces.model_validate({"of": [mixed.model_dump()]})


def test_the_filters_believe_the_texts_and_not_the_record(folder: Path) -> None:
    whole = made(folder, mix=BehaviorMix(oracle=0, immediate=1))[0]
    truth = truths_of(folder)[whole.id]
    last = whole.rounds[-1]

    def told(text: str, **changes: object) -> Trajectory:
        rounds = (*whole.rounds[:-1], last.model_copy(update={"text": text, **changes}))
        return whole.model_copy(update={"rounds": rounds})

    other = {code: (label + 1) % 3 for code, label in truth.items()}
    answer = ", ".join(f"{code}={value}" for code, value in other.items())
    assert why_dropped(told(f"<snapshot>a</snapshot><think>b</think><answer>{answer}</answer>"), truth) == (
        "wrong in TA and VQ and MQ and OA"
    ), "the record still has the right judgments"
    assert why_dropped(told(f"so {last.text}"), truth) == "not well formed", "the record lists no failure"
    assert why_dropped(told(last.text.replace("=", ": ")), truth) == "not well formed", "nor a repair"
    assert why_dropped(told("nothing"), truth) == "without a verdict"
    earlier = last.model_copy(update={"text": f"so {last.text}"})
    spoilt = whole.model_copy(update={"rounds": (earlier, *whole.rounds)})
    assert why_dropped(spoilt, truth) == "not well formed", "every round counts, and not only the last"
    odd = whole.rounds[0].model_copy(update={"failures": ({"reason": "no_ending"},)})
    assert why_dropped(whole.model_copy(update={"rounds": (odd, *whole.rounds[1:])}), truth) is None


def test_lessons_show_chosen_frames_and_end_with_their_only_round(folder: Path, markup: Markup) -> None:
    for frames in (1, 2, 4):
        mix = BehaviorMix(oracle=0, immediate=1)
        found = made(folder, lesson_frames=frames, filter=False, mix=mix)
        assert [len(trace.rounds) for trace in found] == [1] * PAIRS
        assert all(trace.settings.max_rounds == 1 for trace in found)
        shown = [[f.frame_number for f in trace.rounds[0].live] for trace in found]
        for numbers, trace in zip(shown, found, strict=True):
            assert len(numbers) == len(set(numbers)) == 2 * frames
            assert sum(number <= trace.n_frames_1 for number in numbers) == frames
            (lesson,) = training_sequences(trace, markup, (28, 28), learned="snapshots")
            assert len(lesson.frames) == 2 * frames
            text = markup.decode(lesson.token_ids[lesson.loss_mask].tolist())
            assert text.startswith("<snapshot>")
            assert text.endswith("</snapshot>")
            assert text.count(";") == 2 * (frames - 1), "each frame is described"
        assert len(set(map(str, shown))) > PAIRS / 2, "other frames for other pairs"


@pytest.mark.parametrize(
    ("difficulty", "pairs"),
    [("easy", PAIRS), ("medium", PAIRS), pytest.param("hard", 6, marks=pytest.mark.slow)],
)
def test_a_round_of_the_oracle_fits_what_nano_may_write(
    difficulty: Difficulty, pairs: int, tmp_path: Path, markup: Markup
) -> None:
    found = made(
        tmp_path, world=PRESETS[difficulty], pairs=pairs, calls=nano_settings().episode.max_rounds - 1
    )
    limit = nano_settings().episode.max_round_tokens
    assert max(len(round_ids(record, markup)) for trace in found for record in trace.rounds) < limit


def test_sources_and_seeds(tmp_path: Path) -> None:
    first = made(tmp_path, pairs=3)
    worlds = {path.parent for path in tmp_path.rglob("truth.jsonl")}
    clips = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.mp4")}
    assert made(tmp_path, pairs=3, calls=1, mix={"random_frames": 1}, filter=False) != first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.mp4")} == clips, "the world is shared"
    other = made(tmp_path, pairs=3, seed=1)
    assert {trace.id for trace in other}.isdisjoint({trace.id for trace in first})
    assert len({path.parent for path in tmp_path.rglob("truth.jsonl")} - worlds) == 1
    assert made(tmp_path, pairs=3) == first


def test_the_judges_settings_reach_the_traces(tmp_path: Path) -> None:
    """A judge that is guided, of another window, of a dataset of its own: as it will be asked later."""
    episode = EpisodeSettings(guided=True, window=None, max_rounds=4, max_round_tokens=256)
    settings = nano_settings().model_copy(update={"episode": episode, "dataset": "rapidata"})
    found = made(tmp_path, pairs=3, settings=settings)
    for trace in found:
        assert trace.dataset == "rapidata"
        assert trace.settings == episode.model_copy(update={"guided": False}), "the oracle holds the form"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({"mix": {"oracle": 0}}, "mix: got only zeros"),
        ({"lesson_frames": 2}, "mix: got oracle, allowed in a lesson: immediate alone, or calls: 0"),
        (
            {"lesson_frames": 2, "mix": {"oracle": 0, "random_frames": 1, "immediate": 1}},
            "immediate, random_frames",
        ),
        ({"lesson_frames": 5}, "lesson_frames"),
        ({"pairs": 0}, "pairs"),
        ({"calls": -1}, "calls"),
        ({"worlds": {}}, "worlds"),
        ({"world": {"span": [0.5, 0.2]}}, "span: got"),
    ],
)
def test_sources_that_make_no_sense(source: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        WorldTraces.model_validate({"pairs": 2, **source})
    WorldTraces(pairs=2, lesson_frames=2, calls=0)


def test_settings_that_do_not_fit_the_world(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"calls: got 8, allowed: up to 7"):
        made(tmp_path, calls=8)
    slow = nano_settings().episode.model_copy(update={"max_fps": 4.0})
    with pytest.raises(InputError, match=r"max_fps: got 4\.0"):
        made(tmp_path, settings=nano_settings().model_copy(update={"episode": slow}))
    assert not list(tmp_path.iterdir()), "nothing is made"
    once = nano_settings().episode.model_copy(update={"max_rounds": 1})
    single = nano_settings().model_copy(update={"episode": once})
    assert len(made(tmp_path, settings=single, pairs=2, mix={"oracle": 0, "immediate": 1}, filter=False)) == 2


def test_an_episode_that_fails_names_its_pair(tmp_path: Path) -> None:
    made(tmp_path, pairs=3)
    (victim,) = tmp_path.rglob("*000001-2.mp4")
    victim.write_text("this is no video\n" * 50)
    with pytest.raises(VRThinkerError, match=r"traces: pair world-5-000001: .*000001-2\.mp4") as caught:
        made(tmp_path, pairs=3, calls=1)
    assert "\n" not in str(caught.value)


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("traces/*.jsonl")}


@pytest.mark.multi_process
def test_killed_and_made_again_the_files_are_equal_whatever_the_number_of_workers(
    tmp_path: Path, outcomes_of: Outcomes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world_traces, "_SHARD_PAIRS", traces_worker.SHARD_PAIRS)
    alone, folder = tmp_path / "alone", tmp_path / "data"
    traces_worker.make(alone, workers=1)
    paths = (str(alone).encode(), str(folder).encode())  # traces name their clips
    wanted = {name: content.replace(*paths) for name, content in shards(alone).items()}
    assert len(wanted) == traces_worker.SOURCE.pairs // traces_worker.SHARD_PAIRS
    (killed,) = outcomes_of([traces_worker.job(folder, die_after=1)])
    assert killed["code"] == -9, killed
    assert_session_ends(killed["pid"])
    there = shards(folder)
    assert 0 < len(there) < len(wanted), "it was in the middle"
    assert there == {name: wanted[name] for name in there}
    (finished,) = outcomes_of([traces_worker.job(folder)])
    assert finished["result"] == traces_worker.SOURCE.pairs, finished
    assert shards(folder) == wanted


# Ones from a file


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world") / "world"
    make_world(folder, PRESETS["easy"], pairs=PAIRS, seed=9, workers=1)
    return folder


def teach(world: Path, out: Path, *, seed: int = 0, mix: BehaviorMix | None = None) -> Path:
    """What `vrthinker judge --pairs --trajectories` writes, with the oracle as the teacher."""
    engine = OracleEngine(truths_by_clip(world, load_truths(world)), mix, calls=2)
    pairs = load_pairs(world / PAIRS_FILE)
    record = out / "traces.jsonl"
    with Judge(engine, nano_settings(), templates=nano_templates()) as judge:
        run, ignored = run_configuration(judge, pairs_file=world / PAIRS_FILE, seed=seed)
        with VerdictLog(out / f"verdicts-{seed}.jsonl", run, ignore=ignored) as log:
            judge_file(judge, pairs, log, seed=seed, trajectories=record)
    return record


def test_a_teachers_file_with_and_without_labels(world: Path, tmp_path: Path) -> None:
    record = teach(world, tmp_path, mix=BehaviorMix(oracle=0.5, immediate=0.5), seed=2)
    every = {trace.id: trace for trace in load_trajectories(record)}
    assert {trace.id for trace in read_traces(FileTraces(path=record)).traces} == set(every)
    labels = {pair.id: pair.labels for pair in load_pairs(world / PAIRS_FILE)}
    right = {
        id_
        for id_, trace in every.items()
        if trace.outcome.judgments is not None and trace.outcome.judgments.as_dict() == labels[id_]
    }
    assert 0 < len(right) < PAIRS
    selection = read_traces(FileTraces(path=record, pairs=world / PAIRS_FILE))
    kept = selection.traces
    assert (selection.n_read, selection.checked, selection.without_content) == (PAIRS, "form and labels", 0)
    assert {dropped.id for dropped in selection.dropped} == set(every) - right
    assert sum(selection.reasons.values()) == PAIRS - len(right)
    assert all(reason.startswith("wrong in ") for reason in selection.reasons)
    assert selection.summary().startswith(f"kept {len(right)} of {PAIRS} traces (")
    unfiltered = read_traces(FileTraces(path=record))
    assert (unfiltered.checked, unfiltered.summary()) == ("form", f"kept {PAIRS} of {PAIRS} traces")
    assert unfiltered.digest() != selection.digest()
    assert {trace.id for trace in kept} == right
    assert all(trace == every[trace.id] for trace in kept)


def test_of_an_episode_that_is_there_twice_the_last_one_counts(world: Path, tmp_path: Path) -> None:
    record = teach(world, tmp_path)
    lines = record.read_text().splitlines(keepends=True)
    first = Trajectory.model_validate_json(lines[0])
    answer = first.rounds[-1].text.replace("<answer>", "<answer> ")
    again = first.model_copy(
        update={"rounds": (*first.rounds[:-1], first.rounds[-1].model_copy(update={"text": answer}))}
    )
    record.write_text("".join([*lines, dump_line(again)]))
    kept = read_traces(FileTraces(path=record)).traces
    assert len(kept) == PAIRS
    assert [t for t in kept if t.id == first.id] == [again]
    lost = {"judgments": None, "reason": "x", "stop_reason": StopReason.TOKEN_LIMIT}
    failed = first.outcome.model_copy(update=lost)
    record.write_text("".join([*lines, dump_line(first.model_copy(update={"outcome": failed}))]))
    assert first.id not in {t.id for t in read_traces(FileTraces(path=record)).traces}
    other = first.model_copy(update={"seed": first.seed + 1})
    record.write_text("".join([*lines, dump_line(other)]))
    assert len(read_traces(FileTraces(path=record)).traces) == PAIRS + 1, (
        "sampled again with another seed: another trace"
    )


def test_single_pairs_share_an_id_and_are_all_kept(world: Path, tmp_path: Path) -> None:
    """`vrthinker judge A B --trajectories FILE` calls every pair `pair`."""
    engine = OracleEngine(truths_by_clip(world, load_truths(world)))
    record = tmp_path / "traces.jsonl"
    with Judge(engine, nano_settings(), templates=nano_templates()) as judge, record.open("w") as stream:
        for pair in load_pairs(world / PAIRS_FILE)[:3]:
            stream.write(dump_line(judge(pair.prompt, pair.video_1, pair.video_2).trajectory))
    assert len(read_traces(FileTraces(path=record)).traces) == 3


def refused(source: FileTraces, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        read_traces(source)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700, "two paths, which may be long"
    for word in words:
        assert word in message


def test_files_that_cannot_be_used(world: Path, tmp_path: Path) -> None:
    record = teach(world, tmp_path, mix=BehaviorMix(oracle=0, immediate=1))
    lines = record.read_text().splitlines(keepends=True)
    pairs = world / PAIRS_FILE

    def hostile(text: str) -> FileTraces:
        path = tmp_path / "hostile.jsonl"
        path.write_text(text)
        return FileTraces(path=path, pairs=pairs)

    refused(FileTraces(path=tmp_path / "none.jsonl"), "none.jsonl", "No such file")
    refused(FileTraces(path=tmp_path), str(tmp_path), "not a file")
    refused(hostile(""), "hostile.jsonl", "kept 0 of 0 traces; nothing to learn from")
    refused(hostile(lines[0] + lines[1][:-40]), "hostile.jsonl:2", "EOF")
    refused(hostile(lines[0] + "\0\xff garbage\n"), "hostile.jsonl:2")
    newer = json.loads(lines[0]) | {"schema_version": 2}
    refused(hostile(json.dumps(newer) + "\n"), "hostile.jsonl:1", "schema_version")
    refused(hostile(pairs.read_text()), "hostile.jsonl:1")
    stranger = json.loads(lines[0]) | {"id": "stranger"}
    refused(hostile(json.dumps(stranger) + "\n"), "pairs.jsonl", "'stranger'")
    half = tmp_path / "half.jsonl"
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    for row in rows:
        row["video_1"], row["video_2"] = (str(world / row[name]) for name in ("video_1", "video_2"))
        del row["labels"]["MQ"]
    half.write_text("".join(json.dumps(row) + "\n" for row in rows))
    refused(FileTraces(path=record, pairs=half), "half.jsonl", "lacks the label MQ; add it")
    wrong = tmp_path / "wrong.jsonl"
    for row in rows:
        row["labels"] = {code: (label + 1) % 3 for code, label in {**row["labels"], "MQ": 1}.items()}
    wrong.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = {t.id: t.outcome.judgments for t in load_trajectories(record)}
    for row in rows:
        judged = said[row["id"]]
        assert judged is not None
        row["labels"] = judged.as_dict() | {"TA": (int(judged.TA) + 1) % 3}
    wrong.write_text("".join(json.dumps(row) + "\n" for row in rows))
    refused(FileTraces(path=record, pairs=wrong), f"kept 0 of {PAIRS} traces ({PAIRS} wrong in TA)")
    for row in rows:
        row["prompt"] += "!"
    wrong.write_text("".join(json.dumps(row) + "\n" for row in rows))
    refused(FileTraces(path=record, pairs=wrong), "wrong.jsonl", "has another caption than its trace")
    for row in rows:
        row["prompt"] = row["prompt"][:-1]
        row["video_1"], row["video_2"] = row["video_2"], row["video_1"]
    wrong.write_text("".join(json.dumps(row) + "\n" for row in rows))
    refused(FileTraces(path=record, pairs=wrong), "wrong.jsonl", "has its clips in another order")
    older = [json.loads(line) for line in lines]
    for video in (video for trace in older for video in trace["videos"]):
        del video["size_bytes"], video["sha256"]
    old = hostile("".join(json.dumps(trace) + "\n" for trace in older)).path
    refused(FileTraces(path=old, pairs=wrong), "wrong.jsonl", "has its clips in another order")
    for row in rows:
        row["video_2"] = row["video_1"]
    wrong.write_text("".join(json.dumps(row) + "\n" for row in rows))
    refused(FileTraces(path=record, pairs=wrong), "wrong.jsonl", "another clip")


def test_a_teacher_that_does_not_hold_the_form_teaches_nothing(world: Path, tmp_path: Path) -> None:
    def script(index: int, number: int, messages: Sequence[object]) -> str:
        return "<answer>TA=1, VQ=1, MQ=1, OA=1</answer>"

    record = tmp_path / "traces.jsonl"
    with Judge(ScriptedEngine(script), nano_settings()) as judge, record.open("w") as stream:
        for done in judge.judge_pairs(load_pairs(world / PAIRS_FILE)):
            assert done.trajectory is not None
            stream.write(dump_line(done.trajectory))
    refused(FileTraces(path=record), f"kept 0 of {PAIRS} traces ({PAIRS} not well formed)")


def test_paths_are_kept_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = FileTraces.model_validate({"path": "t.jsonl", "pairs": "p.jsonl"})
    assert (source.path, source.pairs) == (tmp_path / "t.jsonl", tmp_path / "p.jsonl")
    assert FileTraces.model_validate_json(source.model_dump_json()) == source
    assert FileTraces(path=Path("t.jsonl")).pairs is None
    assert world_traces._SHARD_PAIRS > traces_worker.SHARD_PAIRS
