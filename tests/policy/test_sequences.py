"""Training sequences against what the engine sampled from, token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from products import covering
from sampled import (
    EPISODES,
    Ending,
    RoundContext,
    Sampled,
    Stage,
    round_contexts,
    with_ids,
    without_ids,
    written_ids,
)
from transformers import AutoTokenizer

from vrthinker.engine.base import FinishReason
from vrthinker.engine.hf.markup import Markup
from vrthinker.engine.scripted import ScriptedEngine
from vrthinker.episode.episode import EpisodeItem
from vrthinker.episode.runner import EpisodeRunner
from vrthinker.episode.settings import EpisodeSettings
from vrthinker.episode.trajectory import FrameRecord, Trajectory
from vrthinker.errors import InputError
from vrthinker.policy.sequences import TrainingSequence, training_sequences
from vrthinker.video.resize import ResizeSettings
from vrthinker.visibility import ShownFrame

KINDS = ("qwen2.5-vl", "qwen3-vl", "nano")
FACTOR = {"qwen2.5-vl": 28, "qwen3-vl": 32, "nano": 28}
MakeCheckpoint = Callable[[str], Path]
MakeStage = Callable[[str], Stage]
MakeEpisodes = Callable[[str, int | None], list[tuple[Trajectory, list[Sampled]]]]


def markup_of(folder: Path) -> Markup:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return Markup(tokenizer, len(tokenizer))


def sequences_of(trajectory: Trajectory, markup: Markup, kind: str) -> list[TrainingSequence]:
    return training_sequences(trajectory, markup, (FACTOR[kind], FACTOR[kind]))


def spans_of(sequence: TrainingSequence, rounds: Sequence[RoundContext]) -> list[int]:
    """The rounds that are learned in a sequence, each in the very context it was written from.

    Fails if anything else is learned.
    """
    expected = np.zeros(len(sequence), dtype=bool)
    found = []
    for number, round_ in enumerate(rounds):
        start, end = len(round_.prompt), len(round_.prompt) + len(round_.written)
        same = sequence.token_ids[:end].tolist() == round_.prompt + round_.written
        if same and sequence.loss_mask[start:end].all():
            expected[start:end] = True
            found.append(number)
    assert np.array_equal(sequence.loss_mask, expected), "something else is learned than whole rounds"
    return found


def check_replay(
    trajectory: Trajectory,
    sequences: Sequence[TrainingSequence],
    rounds: Sequence[RoundContext],
    sampled: Sequence[Sampled] = (),
) -> None:
    learned = [number for sequence in sequences for number in spans_of(sequence, rounds)]
    assert sorted(learned) == [n for n, r in enumerate(rounds) if r.written], "each round once, in order"
    assert learned == sorted(learned)
    for sequence in sequences:
        assert sequence.id == trajectory.id
        assert sequence.token_ids.dtype == sequence.positions.dtype == np.int64
        assert sequence.positions.shape == (3, len(sequence))
        assert sequence.loss_mask[0] == np.False_
        numbers = spans_of(sequence, rounds)
        for number in numbers:
            frames = tuple(frame for frame in sequence.frames if frame[0] < len(rounds[number].prompt))
            assert [key for _, key in frames] == rounds[number].frames
            if sampled:
                begun = sampled[number]
                assert sequence.token_ids[: len(begun.ids)].tolist() == begun.ids.tolist()
                assert np.array_equal(sequence.positions[:, : len(begun.ids)], begun.positions)
                assert frames == begun.frames
        last = rounds[numbers[-1]]
        assert len(sequence) == len(last.prompt) + len(last.written), "nothing behind the last learned round"
        # What is sampled takes a position each, from the context's last one on.
        tail = sequence.positions[:, len(last.prompt) - 1 :]
        assert np.array_equal(tail, tail[:1, :1] + np.arange(tail.shape[1])[None].repeat(3, 0))


@pytest.mark.parametrize(("kind", "window"), covering(KINDS, [0, 1, 2, None], strength=1))
def test_a_replay_is_what_the_engine_sampled_from(
    kind: str, window: int | None, checkpoint_of: MakeCheckpoint, episodes_of: MakeEpisodes
) -> None:
    markup = markup_of(checkpoint_of(kind))
    finishes, errors, shared = set(), 0, 0
    for (trajectory, sampled), endings in zip(episodes_of(kind, window), [*EPISODES, None], strict=True):
        assert len(trajectory.rounds) == len(sampled) == (1 if endings is None else len(endings))
        rounds = round_contexts(trajectory, markup, FACTOR[kind])
        for round_, begun in zip(rounds, sampled, strict=True):
            assert round_.prompt == begun.ids.tolist(), "the test's own rendering is the engine's context"
        sequences = sequences_of(trajectory, markup, kind)
        check_replay(trajectory, sequences, rounds, sampled)
        assert len(sequences) == 1 + sum(bool(record.expired) for record in trajectory.rounds)
        shared += len(rounds) - len(sequences)
        finishes |= {record.finish_reason for record in trajectory.rounds}
        errors += sum(r.tool is not None and r.tool.error_kind is not None for r in trajectory.rounds)
    assert finishes == {FinishReason.STOP, FinishReason.LENGTH}
    assert errors == 2, "tool errors were part of it"
    assert shared > 0, "rounds shared sequences"


@pytest.mark.parametrize("window", [0, 1, None])
def test_a_teachers_text_is_learned_with_the_end_of_its_turn(
    window: int | None, checkpoint_of: MakeCheckpoint, episodes_of: MakeEpisodes
) -> None:
    """Forms write no end of turn, so the same rounds as texts differ by that token, which then is learned."""
    kind = "nano"
    markup = markup_of(checkpoint_of(kind))
    sampled, _ = episodes_of(kind, window)[2]
    # Free parts may hold bytes that are no text; a teacher's texts are what a tokenizer gives.
    rounds = tuple(
        record.model_copy(update={"token_ids": tuple(markup.encode(record.text)), "logprobs": None})
        for record in sampled.rounds
    )
    sampled = sampled.model_copy(update={"rounds": rounds})
    taught = without_ids(sampled)
    contexts = round_contexts(taught, markup, FACTOR[kind])
    check_replay(taught, sequences_of(taught, markup, kind), contexts)
    ends = 0
    pairs = zip(sequences_of(sampled, markup, kind), sequences_of(taught, markup, kind), strict=True)
    for own, text in pairs:
        length = len(own)
        assert own.token_ids.tolist() == text.token_ids[:length].tolist()
        more = text.loss_mask.copy()
        more[:length] ^= own.loss_mask
        assert set(text.token_ids[more]) == {markup.turn_end}
        ends += int(more.sum())
    stops = [record.finish_reason for record in sampled.rounds].count(FinishReason.STOP)
    assert ends == stops == 3, "the round that was cut off does not learn to stop"


def test_prompts_outcomes_and_frames_are_never_learned(
    checkpoint_of: MakeCheckpoint, episodes_of: MakeEpisodes
) -> None:
    kind = "qwen2.5-vl"
    markup = markup_of(checkpoint_of(kind))
    for trajectory, _ in episodes_of(kind, 1):
        sequences = sequences_of(trajectory, markup, kind)
        learned = [ids for sequence in sequences for ids in sequence.token_ids[sequence.loss_mask]]
        assert not {markup.image_pad, markup.vision_start, markup.vision_end, markup.turn_start} & set(
            learned
        )
        assert learned == [ids for record in trajectory.rounds for ids in written_ids(record, markup)]


def test_a_round_that_found_its_context_full_is_left_out(
    checkpoint_of: MakeCheckpoint, stage_of: MakeStage
) -> None:
    folder, kind = checkpoint_of("nano"), "nano"
    markup = markup_of(folder)
    endings: tuple[Ending, ...] = ("look", "look", "answer")
    ((whole, rounds),) = stage_of(kind).sample(folder, [endings], window=1)
    # Room for two rounds, none for the third, in front of which frames expired.
    full = len(rounds[2].ids)
    assert full > len(rounds[1].ids) + len(whole.rounds[1].token_ids or ())
    ((trajectory, sampled),) = stage_of(kind).sample(folder, [endings], window=1, most_context=full)
    assert [len(record.token_ids or ()) > 0 for record in trajectory.rounds] == [True, True, False]
    assert trajectory.rounds[2].finish_reason is FinishReason.CONTEXT
    assert trajectory.rounds[2].expired
    sequences = sequences_of(trajectory, markup, kind)
    assert len(sequences) == 1
    check_replay(trajectory, sequences, round_contexts(trajectory, markup, FACTOR[kind]), sampled)


# Any script under any window


def script_text(ending: Ending, numbers: Sequence[int], words: str) -> str:
    recommended = "<recommend answer>TA=1, VQ=0, MQ=2, OA=1, CF=2</recommend answer>"
    opening = f"<snapshot>{words}</snapshot><think>{words[::-1]}</think>"
    if ending == "answer":
        return f"{opening}<answer>TA=1, VQ=0, MQ=2, OA=1</answer>"
    asked = {"look": list(numbers), "unknown frame": [9999], "cut": []}.get(ending)
    call = (
        "look" if asked is None else f'{{"name": "select_frames", "arguments": {{"target_frames": {asked}}}}}'
    )
    return f"{opening}{recommended}<tool_call>{call}</tool_call>"


ROUND = st.tuples(
    st.sampled_from(["look", "look", "look", "unknown frame", "not json", "cut"]),
    st.lists(st.integers(1, 22), min_size=1, max_size=8),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0<>"), max_size=12),
)


@settings(derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    rounds=st.lists(ROUND, max_size=6), window=st.sampled_from([0, 1, 2, 3, None]), words=st.text(max_size=3)
)
def test_any_script_is_learned_once_in_its_own_contexts(
    rounds: list[tuple[Ending, list[int], str]],
    window: int | None,
    words: str,
    checkpoint_of: MakeCheckpoint,
    stage_of: MakeStage,
) -> None:
    kind = "nano"
    markup = markup_of(checkpoint_of(kind))
    script = [script_text(*round_) for round_ in rounds] + [script_text("answer", (), "done")]
    runner = EpisodeRunner(ScriptedEngine([script]), EpisodeSettings(window=window, max_rounds=8))
    trajectory = runner.run_one(EpisodeItem("script", words, stage_of(kind).open))
    assert len(trajectory.rounds) == len(script)
    sequences = sequences_of(trajectory, markup, kind)
    check_replay(trajectory, sequences, round_contexts(trajectory, markup, FACTOR[kind]))


# Reading lessons


def test_a_lesson_is_learned_up_to_the_end_of_its_snapshot(
    checkpoint_of: MakeCheckpoint, stage_of: MakeStage
) -> None:
    kind = "nano"
    markup = markup_of(checkpoint_of(kind))
    text = script_text("answer", (), "video 1: 4 red noise")
    runner = EpisodeRunner(ScriptedEngine([[text]]), EpisodeSettings(max_rounds=1))
    trajectory = runner.run_one(EpisodeItem("lesson", "a dog", stage_of(kind).open))
    (sequence,) = training_sequences(trajectory, markup, (28, 28), learned="snapshots")
    learned = sequence.token_ids[sequence.loss_mask].tolist()
    assert markup.decode(learned) == "<snapshot>video 1: 4 red noise</snapshot>"
    (whole,) = training_sequences(trajectory, markup, (28, 28))
    assert whole.token_ids[: len(sequence)].tolist() == sequence.token_ids.tolist()


@pytest.mark.parametrize("what", ["sampled", "goes on", "no snapshot"])
def test_what_is_no_lesson_is_refused(what: str, checkpoint_of: MakeCheckpoint, stage_of: MakeStage) -> None:
    kind = "nano"
    markup = markup_of(checkpoint_of(kind))
    script = [script_text("answer", (), "words")]
    if what == "goes on":
        script.insert(0, script_text("look", [3], "words"))
    if what == "no snapshot":
        script = ["<answer>TA=1, VQ=0, MQ=2, OA=1</answer>"]
    trajectory = EpisodeRunner(ScriptedEngine([script])).run_one(
        EpisodeItem("lesson", "a dog", stage_of(kind).open)
    )
    if what == "sampled":
        trajectory = with_ids(trajectory, markup)
    with pytest.raises(InputError, match="reading lessons"):
        training_sequences(trajectory, markup, (28, 28), learned="snapshots")


# Frame sizes, and records that do not add up


@pytest.fixture
def taught(checkpoint_of: MakeCheckpoint, stage_of: MakeStage) -> Trajectory:
    """A teacher's episode at Qwen2.5-VL's sizes; the frames of the first call expire before round 3."""
    script = [
        script_text("look", [3, 15], "a"),
        script_text("look", [4], "b"),
        script_text("answer", (), "c"),
    ]
    item = EpisodeItem("taught", "a dog", stage_of("qwen2.5-vl").open)
    return EpisodeRunner(ScriptedEngine([script])).run_one(item)


def test_a_teachers_frames_take_the_sizes_of_the_model_that_is_trained(
    taught: Trajectory, checkpoint_of: MakeCheckpoint
) -> None:
    markup = markup_of(checkpoint_of("qwen3-vl"))
    resize = ResizeSettings(patch_size=16, merge_size=2, min_pixels=1024, max_pixels=64 * 1024)
    with pytest.raises(InputError, match="'taught': got frames of 168x112, allowed: multiples of 32x32"):
        training_sequences(taught, markup, (32, 32))
    for sequence in training_sequences(taught, markup, (32, 32), resize=resize):
        for first, (path, _, height, width, *_) in sequence.frames:
            native = (112, 168) if path.endswith("first.mp4") else (84, 56)
            assert (height, width) == resize.grid_size(*native)
            pads = height * width // 32**2
            assert (sequence.token_ids[first : first + pads] == markup.image_pad).all()
            assert sequence.token_ids[first - 1] == markup.vision_start
            assert sequence.token_ids[first + pads] == markup.vision_end


def test_sampled_frames_keep_the_sizes_they_were_sampled_at(
    taught: Trajectory, checkpoint_of: MakeCheckpoint
) -> None:
    markup = markup_of(checkpoint_of("qwen2.5-vl"))
    sampled = with_ids(taught, markup)
    other = ResizeSettings(max_pixels=4 * 28 * 28)
    found = [training_sequences(t, markup, (28, 28), resize=other) for t in (sampled, taught)]
    sizes = [{(key.height, key.width) for s in sequences for _, key in s.frames} for sequences in found]
    assert sizes[0] == {(112, 168), (84, 56)}
    assert sizes[1] == {other.grid_size(112, 168), other.grid_size(84, 56)} != sizes[0]


def test_records_that_do_not_add_up_are_one_line(taught: Trajectory, checkpoint_of: MakeCheckpoint) -> None:
    markup = markup_of(checkpoint_of("qwen2.5-vl"))

    def refused(match: str, **changes: object) -> None:
        with pytest.raises(InputError, match=match) as caught:
            training_sequences(taught.model_copy(update=changes), markup, (28, 28))
        assert "\n" not in str(caught.value)

    refused("frame 3 is shown, but not among", frames=tuple(f for f in taught.frames if f.frame_number != 3))

    def resized(height: int) -> tuple[FrameRecord, ...]:
        return tuple(f.model_copy(update={"height": height}) for f in taught.frames)

    for height in (0, -28, 113):
        refused(f"got frames of [0-9]+x{height}, allowed", frames=resized(height))
    gone = taught.rounds[1].model_copy(update={"expired": (ShownFrame(1, 9),)})
    refused("'taught', round 2: expired", rounds=(taught.rounds[0], gone, *taught.rounds[2:]))
    evicting = taught.settings.model_copy(update={"memory": "evict"})
    refused("memory: got 'evict', allowed here: rerender", settings=evicting)
