"""What a record claims is what its texts, ids and clips say: edits are refused, nothing else is."""

from __future__ import annotations

import functools
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from clips import make_clip
from sampled import EPISODES, Sampled, Stage, with_ids
from transformers import AutoTokenizer

from vrthinker.engine.base import FinishReason
from vrthinker.engine.hf.markup import Markup
from vrthinker.engine.scripted import ScriptedEngine
from vrthinker.episode.dimensions import Confidence, Judgments, Preference
from vrthinker.episode.episode import EpisodeItem
from vrthinker.episode.runner import EpisodeRunner
from vrthinker.episode.settings import EpisodeSettings
from vrthinker.episode.tools.base import ToolErrorKind
from vrthinker.episode.trajectory import (
    Outcome,
    RoundRecord,
    StopReason,
    ToolRecord,
    Trajectory,
    dump_line,
    load_trajectories,
)
from vrthinker.errors import InputError, VideoError
from vrthinker.policy.record_checks import check_ids, check_record
from vrthinker.policy.sequences import training_sequences
from vrthinker.video.frame_cache import FrameCache, file_state
from vrthinker.video.open import open_reader
from vrthinker.video.resize import ResizeSettings
from vrthinker.video.workspace import Workspace
from vrthinker.visibility import MemoryMode, Region, ShownFrame

MakeCheckpoint = Callable[[str], Path]
MakeStage = Callable[[str], Stage]
MakeEpisodes = Callable[..., list[tuple[Trajectory, list[Sampled]]]]
FAMILIES = ("qwen2.5-vl", "qwen3-vl")
RECOMMENDED = "<recommend answer>TA=1, VQ=0, MQ=2, OA=1, CF=2</recommend answer>"
ANSWER = "<answer>TA=1, VQ=0, MQ=2, OA=1</answer>"


def call(*numbers: int) -> str:
    asked = f'{{"name": "select_frames", "arguments": {{"target_frames": {list(numbers)}}}}}'
    return f"<tool_call>{asked}</tool_call>"


def look(*numbers: int) -> str:
    return f"<snapshot>a</snapshot><think>b</think>{RECOMMENDED}{call(*numbers)}"


DONE = f"<snapshot>c</snapshot><think>d</think>{ANSWER}"


@functools.cache
def markup_of(folder: Path) -> Markup:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return Markup(tokenizer, len(tokenizer))


@pytest.fixture
def played(stage_of: MakeStage) -> Callable[..., Trajectory]:
    """Plays texts as the rounds of an episode."""

    def play(*texts: str, **settings: Any) -> Trajectory:
        runner = EpisodeRunner(ScriptedEngine([list(texts)]), EpisodeSettings(**settings))
        return runner.run_one(EpisodeItem("taught", "a dog", stage_of("qwen2.5-vl").open))

    return play


def edited(trajectory: Trajectory, number: int, **changes: object) -> Trajectory:
    rounds = list(trajectory.rounds)
    rounds[number - 1] = rounds[number - 1].model_copy(update=changes)
    return trajectory.model_copy(update={"rounds": tuple(rounds)})


def refused(trajectory: Trajectory, match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        check_record(trajectory)
    message = str(caught.value)
    assert message.startswith("trajectory 'taught'")
    assert message.isprintable()
    assert len(message) < 600
    assert message.endswith("judge the pair again")


# Records that are as they were written


@pytest.mark.parametrize("kind", ["qwen2.5-vl", "qwen3-vl", "nano"])
@pytest.mark.parametrize("memory", ["rerender", "evict"])
def test_what_engines_sampled_is_never_refused(
    kind: str, memory: MemoryMode, checkpoint_of: MakeCheckpoint, episodes_of: MakeEpisodes
) -> None:
    """Guided and free rounds, ones that were cut off in the middle of a character, failed calls."""
    markup = markup_of(checkpoint_of(kind))
    texts = []
    for trajectory, _ in episodes_of(kind, 1, memory):
        check_record(trajectory)
        for record in trajectory.rounds:
            assert record.token_ids is not None
            check_ids(trajectory.id, record, markup)
            texts.append(record.text)
    assert len(texts) == sum(map(len, EPISODES)) + 1
    assert any("\ufffd" in text for text in texts), "bytes that are no text were part of it"


@pytest.mark.parametrize(
    "texts",
    [
        (DONE,),
        (look(3), look(3, 15), DONE),
        (look(99), look(3, 99), look(*range(1, 13)), DONE),  # unknown, partly unknown, above the limit
        (f"{look(3)}{call(4, 3)}{call(15)}", DONE),  # several calls
        (
            '<tool_call>{"target_frames": [3, 4,]}</tool_call>',
            "<answer>TA: 1; VQ: 0; MQ: 2; OA: tie.</answer>",
        ),
        ("<tool_call>look</tool_call>", '<tool_call>{"name": "zoom", "arguments": {}}</tool_call>', "cut"),
        (look(3), look(4), look(5), look(6)),  # the last round asks for frames
        (look(3), ""),
        (f"<think>\0 e\u0301</think>{RECOMMENDED}{call(3)}", DONE),
    ],
)
@pytest.mark.parametrize("window", [0, 1, None])
def test_what_the_runner_recorded_is_never_refused(
    texts: tuple[str, ...],
    window: int | None,
    played: Callable[..., Trajectory],
    checkpoint_of: MakeCheckpoint,
) -> None:
    trajectory = played(*texts, window=window, max_rounds=4)
    assert len(trajectory.rounds) == len(texts)
    check_record(trajectory)
    for family in FAMILIES:
        markup = markup_of(checkpoint_of(family))
        for record in with_ids(trajectory, markup).rounds:
            check_ids("taught", record, markup)


def test_thinned_clips_are_never_refused(clip_pair: tuple[Path, Path], tmp_path: Path) -> None:
    reader, cache = open_reader(), FrameCache(1 << 24)

    def opened(max_fps: float) -> Callable[[], Workspace]:
        options = {"reader": reader, "resize": ResizeSettings(), "cache": cache, "max_fps": max_fps}
        return lambda: Workspace.open(*clip_pair, **options)  # type: ignore[arg-type]

    for max_fps in (1.0, 3.0, 5.0, 100.0):
        runner = EpisodeRunner(ScriptedEngine([[look(2, 3), DONE]]), EpisodeSettings(max_fps=max_fps))
        trajectory = runner.run_one(EpisodeItem("taught", "a dog", opened(max_fps)))
        check_record(trajectory)
        path = tmp_path / f"{max_fps}.jsonl"
        path.write_text(dump_line(trajectory))
        (loaded,) = load_trajectories(path)
        check_record(loaded)


@pytest.mark.parametrize("picks", [3, 10, 48])
def test_picked_frames_are_never_refused_and_others_are(clip_pair: tuple[Path, Path], picks: int) -> None:
    def opened() -> Workspace:
        options = {"resize": ResizeSettings(), "cache": FrameCache(1 << 24), "frames_per_video": picks}
        return Workspace.open(*clip_pair, reader=open_reader(), **options)  # type: ignore[arg-type]

    settings = EpisodeSettings(frames_per_video=picks)
    runner = EpisodeRunner(ScriptedEngine([[look(2, 3), DONE]]), settings)
    trajectory = runner.run_one(EpisodeItem("taught", "a dog", opened))
    check_record(trajectory)
    moved = trajectory.frames[1].model_copy(update={"frame_index": 11})
    frames = (trajectory.frames[0], moved, *trajectory.frames[2:])
    with pytest.raises(InputError, match="is given as video"):
        check_record(trajectory.model_copy(update={"frames": frames}))
    with pytest.raises(InputError, match="the record numbers"):
        check_record(trajectory.model_copy(update={"settings": EpisodeSettings()}))


def test_a_failed_episode_is_no_contradiction(played: Callable[..., Trajectory]) -> None:
    whole = played(look(3), look(4), DONE)
    failed = Outcome(judgments=None, confidence=None, stop_reason=StopReason.VIDEO_ERROR, reason="a frame")
    last = whole.rounds[1].model_copy(update={"outcome_messages": ()})
    check_record(whole.model_copy(update={"rounds": (whole.rounds[0], last), "outcome": failed}))
    check_record(whole.model_copy(update={"rounds": (), "outcome": failed}))


def test_what_an_older_version_did_not_show_is_no_contradiction(played: Callable[..., Trajectory]) -> None:
    def earlier(trajectory: Trajectory, kind: ToolErrorKind) -> Trajectory:
        tool = ToolRecord(name="select_frames", frame_numbers=(), error_kind=kind, error="nothing is shown")
        texts = tuple(
            message.model_copy(
                update={"segments": tuple(s for s in message.segments if not hasattr(s, "frame_number"))}
            )
            for message in trajectory.rounds[0].outcome_messages
        )
        before = edited(trajectory, 1, tool=tool, outcome_messages=texts)
        return edited(before, 2, live=trajectory.rounds[0].live)

    check_record(earlier(played(look(3, 99), DONE), ToolErrorKind.UNKNOWN_FRAME))
    check_record(earlier(played(look(*range(1, 13)), DONE), ToolErrorKind.TOO_MANY_FRAMES))
    bare = '<tool_call>{"target_frames": [3]}</tool_call>'
    check_record(earlier(played(bare, DONE), ToolErrorKind.SYNTAX))
    refused(earlier(played(look(3), DONE), ToolErrorKind.SYNTAX), "round 1: its call shows frames 3, the rec")
    # Its answers that needed a repair were not read.
    loose = f"<recommend answer>TA: 1, VQ: 0, MQ: 2, OA: 1</recommend answer>{call(3)}"
    check_record(edited(played(loose, DONE), 1, recommendation=None))


# Records that were edited


def judged(**changes: int) -> Judgments:
    values = {"TA": 1, "VQ": 0, "MQ": 2, "OA": 1} | changes
    return Judgments(**{code: Preference(value) for code, value in values.items()})


def outcome(**changes: int) -> Outcome:
    return Outcome(
        judgments=judged(**changes), confidence=Confidence(2), stop_reason=StopReason.ANSWERED, reason=None
    )


def test_judgments_that_differ_from_the_text_are_refused(played: Callable[..., Trajectory]) -> None:
    trajectory = played(look(3), DONE)
    assert trajectory.outcome == outcome()
    refused(trajectory.model_copy(update={"outcome": outcome(OA=2)}), "round 2: OA: got 2, its text says 1;")
    sure = trajectory.outcome.model_copy(update={"confidence": Confidence(1)})
    refused(trajectory.model_copy(update={"outcome": sure}), "round 2: CF: got 1, its text says 2")
    undecided = played(look(3), "nothing")
    refused(undecided.model_copy(update={"outcome": outcome()}), ": its last text gives no answer")
    refused(trajectory.model_copy(update={"rounds": ()}), ": its last text gives no answer")
    said = trajectory.rounds[0].recommendation
    assert said is not None
    other = said.model_copy(update={"judgments": judged(TA=2)})
    refused(edited(trajectory, 1, recommendation=other), "round 1: TA: got 2, its text says 1")
    unsure = said.model_copy(update={"confidence": Confidence(3)})
    refused(edited(trajectory, 1, recommendation=unsure), "round 1: CF: got 3, its text says 2")
    refused(edited(trajectory, 1, recommendation=None), "round 1: its text recommends an answer, the record")
    refused(edited(trajectory, 2, recommendation=said), "round 2: its text recommends no answer, the record")


@pytest.mark.parametrize("field", ["text", "tool"])
def test_calls_that_differ_from_what_was_shown_are_refused(
    field: str, played: Callable[..., Trajectory]
) -> None:
    trajectory = played(look(3, 15), DONE)
    if field == "text":
        refused(
            edited(trajectory, 1, text=look(3, 16)), "round 1: its call shows frames 3, 16, the record says"
        )
        refused(edited(trajectory, 1, text=DONE), "round 1: its text calls no tool")
        refused(
            edited(trajectory, 1, text=look(99)), r"its call shows no frames \(unknown_frame\), the record"
        )
        twice = look(3, 15) + call(4)
        refused(edited(trajectory, 1, text=twice), "its text makes 2 calls, the record has 1")
    else:
        tool = trajectory.rounds[0].tool
        assert tool is not None
        more = tool.model_copy(update={"frame_numbers": tuple(range(3, 10))})
        refused(edited(trajectory, 1, tool=more), "the record says frames 3, 4, 5, 6 and 3 more")
        cut = tool.model_copy(update={"view": Region(0, 0, 28, 28)})
        refused(edited(trajectory, 1, tool=cut), "its call shows frames 3, 15, the record says frames 3, 15")
        refused(edited(trajectory, 1, tool=None), "its text makes 1 calls, the record has 0")


def test_showings_that_differ_from_the_rules_are_refused(played: Callable[..., Trajectory]) -> None:
    trajectory = played(look(3, 15), look(4), DONE)
    first, second, _ = trajectory.rounds
    refused(edited(trajectory, 2, live=second.live[1:]), "round 2: live: got 4 of .* and 5 more, the window")
    refused(
        edited(trajectory, 3, expired=()), "round 3: expired: got nothing, the window says 3 of outcome 1,"
    )
    later = (ShownFrame(1, 1), *first.live[1:])
    refused(edited(trajectory, 1, live=later), "round 1: live: got 1 of outcome 1")
    refused(edited(trajectory, 1, live=first.live[:1] * 2), "round 1: outcome 0: got a picture twice")
    refused(
        edited(trajectory, 1, live=first.live[1:]), "round 1: its messages show 1 of outcome 0, which no call"
    )
    refused(
        edited(trajectory, 1, outcome_messages=second.outcome_messages), "round 1: its messages show 4 of out"
    )
    refused(
        edited(trajectory, 3, outcome_messages=second.outcome_messages), "round 3: its messages show 4 of out"
    )
    refused(edited(trajectory, 2, round_number=7), "round 7: wanted as round number: 2")
    short = trajectory.settings.model_copy(update={"max_rounds": 2})
    refused(trajectory.model_copy(update={"settings": short}), "round 3: wanted as round number: none")


def test_frames_that_are_not_in_the_clips_are_refused(played: Callable[..., Trajectory]) -> None:
    trajectory = played(look(3, 15), DONE)
    assert (trajectory.n_frames_1, trajectory.n_frames) == (12, 22)

    def given(number: int, **changes: object) -> Trajectory:
        frames = [
            frame.model_copy(update=changes) if frame.frame_number == number else frame
            for frame in trajectory.frames
        ]
        return trajectory.model_copy(update={"frames": tuple(frames)})

    said = r"frames are numbered 1 to 22, video 1's up to 12, and the videos have 12 and 10 frames"
    refused(given(3, frame_index=40), f": frame 3 is given as video 1, frame index 40; {said}")
    refused(given(3, frame_index=1), ": frame 3 is given as video 1, frame index 1;")
    refused(given(3, video=2), ": frame 3 is given as video 2, frame index 2;")
    refused(given(15, frame_index=-1), ": frame 15 is given as video 2, frame index -1;")
    refused(given(3, frame_number=23), ": frame 23 is given as")
    refused(given(3, frame_number=0), ": frame 0 is given as")
    refused(
        given(3, view=Region(0, 0, 113, 28)), "frame 3 shows the region .0, 0, 113, 28., the video has 112 x"
    )
    refused(given(3, view=Region(5, 0, 5, 28)), "frame 3 shows the region")
    refused(
        trajectory.model_copy(update={"n_frames_1": 11}), ": video 1 has 12 frames, the record numbers 11"
    )
    refused(trajectory.model_copy(update={"n_frames": 12}), ": video 2 has 10 frames, the record numbers 0")
    thinned = trajectory.settings.model_copy(update={"max_fps": 4.0})
    skips = given(3, frame_index=7).model_copy(update={"settings": thinned, "n_frames": 22})
    refused(skips, r": frame 4 is given as video 1, frame index 3;")


# Token ids


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_that_do_not_spell_the_text_are_refused(
    family: str, played: Callable[..., Trajectory], checkpoint_of: MakeCheckpoint
) -> None:
    markup = markup_of(checkpoint_of(family))
    trajectory = with_ids(played(look(3), DONE), markup)
    record = trajectory.rounds[1]
    ids = record.token_ids
    assert ids is not None

    def said(**changes: object) -> str:
        with pytest.raises(InputError) as caught:
            check_ids("taught", record.model_copy(update=changes), markup)
        message = str(caught.value)
        assert message.startswith("trajectory 'taught', round 2: ")
        assert message.isprintable()
        return message

    assert "do not spell its text" in said(token_ids=ids[1:])
    assert "do not spell its text" in said(token_ids=())
    assert "do not spell its text" in said(text=DONE.replace("OA=1", "OA=2"))
    for strange in (10**9, -1, markup.vocabulary_size, 10**30, 10**5000):
        shown = str(strange) if abs(strange) < 1 << 64 else "a huge number"
        assert f"token_ids: got {shown}, allowed: ids of the model's" in said(token_ids=(*ids[:2], strange))
    for marker in (markup.image_pad, markup.vision_start, markup.vision_end, markup.turn_start):
        assert f"token_ids: got {marker}, allowed" in said(token_ids=(*ids, marker))
    assert "logprobs: got 1 numbers" in said(logprobs=(-1.0,))
    assert "logprobs: got 1 numbers for 0 token ids" in said(logprobs=(-1.0,), token_ids=None)
    assert "wanted: a finite number for each" in said(logprobs=(float("nan"),) * len(ids))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("sampled", "text"),
    [
        ("caf\u00e9<answer>", "cafe\u0301<answer>"),
        ("a<answer> \n", "a<answer>"),
        ("a<answer>", "a<answer><|im_end|>\n"),
        ("a\0b", "ab"),
        ("\u732b", "\u732b\ufffd"),
    ],
)
def test_what_servers_do_to_the_end_of_a_text_is_no_contradiction(
    family: str, sampled: str, text: str, checkpoint_of: MakeCheckpoint
) -> None:
    markup = markup_of(checkpoint_of(family))
    record = RoundRecord.model_construct(
        round_number=1,
        text=text,
        token_ids=(*markup.encode(unicodedata.normalize("NFC", sampled)), markup.turn_end),
        logprobs=None,
        finish_reason=FinishReason.STOP,
    )
    check_ids("taught", record, markup)
    with pytest.raises(InputError, match="do not spell"):
        check_ids("taught", record.model_copy(update={"text": f"x{text}"}), markup)


def test_a_text_without_its_special_tokens_is_no_contradiction(checkpoint_of: MakeCheckpoint) -> None:
    folder = checkpoint_of("qwen2.5-vl")
    markup = markup_of(folder)
    special = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<|endoftext|>")
    ids = [*markup.encode("a"), special, *markup.encode("b"), special]
    for text in ("ab", "a<|endoftext|>b", "ab<|endoftext|>"):
        record = RoundRecord.model_construct(round_number=1, text=text, token_ids=tuple(ids), logprobs=None)
        check_ids("taught", record, markup)


# Clips


@pytest.fixture
def moved(clip_pair: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """Copies of the clips, which may be replaced."""
    first, second = (tmp_path / clip.name for clip in clip_pair)
    shutil.copyfile(clip_pair[0], first)
    shutil.copyfile(clip_pair[1], second)
    return first, second


def taught_on(clips: tuple[Path, Path]) -> Trajectory:
    stage = Stage(clips, ResizeSettings(patch_size=14, merge_size=2, min_pixels=28**2, max_pixels=64 * 28**2))
    runner = EpisodeRunner(ScriptedEngine([[look(3, 15), DONE]]))
    return runner.run_one(EpisodeItem("taught", "a dog", stage.open))


def test_a_replaced_clip_is_refused_by_name(
    moved: tuple[Path, Path], checkpoint_of: MakeCheckpoint, tmp_path: Path
) -> None:
    markup = markup_of(checkpoint_of("qwen2.5-vl"))
    trajectory = taught_on(moved)
    before = training_sequences(trajectory, markup, (28, 28))
    states = {key.file_state for sequence in before for _, key in sequence.frames}
    assert states == {file_state(str(clip)) for clip in moved}

    other = make_clip(tmp_path / "other.mp4", 12, size=(112, 168), fps=8, first_number=50)
    shutil.copyfile(moved[0], tmp_path / "kept.mp4")
    shutil.copyfile(other, moved[0])
    with pytest.raises(
        VideoError, match=r"first\.mp4: not the clip that trajectory 'taught' was judged on: got"
    ) as (caught):
        training_sequences(trajectory, markup, (28, 28))
    assert f"got {other.stat().st_size} bytes" in str(caught.value)
    assert str(caught.value).isprintable()

    # What was judged, put back as another file with another time, is the same clip again.
    shutil.copyfile(tmp_path / "kept.mp4", moved[0])
    after = training_sequences(trajectory, markup, (28, 28))
    assert [s.token_ids.tolist() for s in after] == [s.token_ids.tolist() for s in before]

    swapped = trajectory.model_copy(
        update={
            "videos": (trajectory.videos[0].model_copy(update={"path": str(moved[1])}), trajectory.videos[1])
        }
    )
    with pytest.raises(VideoError, match=r"second\.mkv: not the clip that"):
        training_sequences(swapped, markup, (28, 28))
    moved[1].unlink()
    with pytest.raises(
        VideoError, match=r"second\.mkv: cannot be read; trajectory 'taught' was judged on it"
    ):
        training_sequences(trajectory, markup, (28, 28))


def test_an_older_record_without_digests_is_replayed_as_before(
    moved: tuple[Path, Path], checkpoint_of: MakeCheckpoint, tmp_path: Path
) -> None:
    markup = markup_of(checkpoint_of("qwen2.5-vl"))
    trajectory = taught_on(moved)
    plain = [video.model_copy(update={"size_bytes": None, "sha256": None}) for video in trajectory.videos]
    path = tmp_path / "old.jsonl"
    path.write_text(dump_line(trajectory.model_copy(update={"videos": tuple(plain)})))
    assert "sha256" not in path.read_text()
    (older,) = load_trajectories(path)
    (sequence,) = training_sequences(older, markup, (28, 28))
    assert {key.file_state for _, key in sequence.frames} == {file_state(str(clip)) for clip in moved}
    for clip in moved:
        clip.unlink()
    (sequence,) = training_sequences(older, markup, (28, 28))
    assert {key.file_state for _, key in sequence.frames} == {None}


def test_more_pictures_than_any_model_takes_are_refused(
    played: Callable[..., Trajectory], checkpoint_of: MakeCheckpoint
) -> None:
    trajectory = played(DONE)
    huge = tuple(
        frame.model_copy(update={"height": 28 << 20, "width": 28 << 20}) for frame in trajectory.frames
    )
    with pytest.raises(InputError, match=r"'taught': its frames take \d+ tokens, allowed: up to 4194304"):
        training_sequences(
            trajectory.model_copy(update={"frames": huge}), markup_of(checkpoint_of("qwen2.5-vl")), (28, 28)
        )
