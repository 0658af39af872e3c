"""Profiles of released checkpoints: exactly their frames, numbers, sizes and words."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import heavy  # noqa: F401
import pytest
from clips import make_clip, read_number
from quick_judge import make_quick_judge

from vrthinker import InputError, Judge
from vrthinker.engine.scripted import ScriptedEngine
from vrthinker.episode.prompts import PromptTemplates
from vrthinker.episode.settings import EpisodeSettings, JudgeSettings
from vrthinker.judge_configuration import checkpoint_configuration, endpoint_configuration
from vrthinker.profiles.profiles import load_profile, profile_for, profile_names
from vrthinker.video.frame_cache import FrameCache
from vrthinker.video.open import open_reader
from vrthinker.video.workspace import Workspace, evenly_spaced


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as a hub has it: without settings and prompts of ours."""
    folder = make_quick_judge(tmp_path_factory.mktemp("model") / "tiny")
    (folder / "vrthinker.json").unlink()
    for template in (folder / "vrthinker_prompts").iterdir():
        template.unlink()
    (folder / "vrthinker_prompts").rmdir()
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One clip with more frames than any profile numbers, one with fewer."""
    folder = tmp_path_factory.mktemp("clips")
    long = make_clip(folder / "long.mp4", 150, size=(56, 84), fps=24)
    return long, make_clip(folder / "short.mp4", 20, size=(56, 84), fps=8)


def asks(*numbers: int) -> str:
    """A call as the paper's template shows it: the arguments alone."""
    return (
        "<snapshot>x</snapshot><think>y</think>"
        "<recommend answer>TA = 1, MQ = 0, VQ = 2, OA = 1, CF = 2</recommend answer>"
        f'<tool_call>{{"target_frames": {list(numbers)}}}</tool_call>'
    )


ANSWERS = [
    "<answer>TA=1, MQ=0, VQ=2, OA=1</answer>",
    "<answer>TA = 1, MQ = 0, VQ = 2, OA = 1</ answer>",
    "<final answer>\nTA = 1,\nMQ = 0,\nVQ = 2,\nOA = 1\n</ final answer>",
    "<Answer>TA=1\nMQ=0\nVQ=2\nOA=1</ answer>",
]


@pytest.mark.parametrize(
    ("name", "frames", "per_call", "pixels", "words"),
    [
        ("vr-thinker-48", 48, 8, 401_408, ("TA (Temporal Alignment (TA))", "VQ (Video Quality)")),
        ("vr-thinker-128", 128, 12, 200_704, ("TA (Text Alignment)", "VQ (Visual Quality)")),
    ],
)
def test_a_checkpoint_gets_exactly_what_its_profile_says(
    stock: Path,
    clips: tuple[Path, Path],
    name: str,
    frames: int,
    per_call: int,
    pixels: int,
    words: tuple[str, str],
) -> None:
    with Judge.from_pretrained(stock, profile=name, guided=True, max_rounds=1, max_round_tokens=190) as judge:
        assert judge.settings.resize.max_pixels == pixels
        assert (judge.settings.resize.patch_size, judge.settings.resize.merge_size) == (14, 2)
        verdict = judge("a dog", *clips)
    trajectory = verdict.trajectory
    assert verdict.judgments is not None
    assert (trajectory.n_frames, trajectory.n_frames_1) == (2 * frames, frames)
    share = frames // 4
    shown = [1 + i * share for i in range(4)]
    assert verdict.frames_seen == (*shown, *(frames + n for n in shown))
    lengths = {1: 150, 2: 20}
    for frame in trajectory.frames:
        place = (frame.frame_number - 1) % frames
        assert frame.video == 1 + (frame.frame_number > frames)
        assert frame.frame_index == evenly_spaced(lengths[frame.video], frames)[place]
        assert (frame.height, frame.width) == (56, 84), "within its limit, a picture keeps its size"
    system, task = ("".join(getattr(s, "text", "") for s in m.segments) for m in trajectory.first_input)
    assert f"numbered 1 to {2 * frames}: video 1 holds 1 to {frames}, video 2 holds {frames + 1} to" in system
    assert f"At most {per_call} frames are shown per call" in system
    assert all(word in system for word in words)
    assert system.index("- TA (") < system.index("- MQ (") < system.index("- VQ (") < system.index("- OA (")
    assert f"Frame {frames + 1} (video 2, 0.00 s)" in task


@pytest.mark.parametrize("answer", ANSWERS)
def test_published_forms_are_read_and_a_bare_call_shows_frames(clips: tuple[Path, Path], answer: str) -> None:
    profile = load_profile("vr-thinker-48")
    engine = ScriptedEngine([[asks(2, 48, 49, 96), f"<snapshot>x</snapshot><think>y</think>{answer}"]])
    verdict = Judge(engine, profile.settings, templates=profile.prompts())("a dog", *clips)
    assert verdict.judgments is not None, verdict.reason
    assert verdict.judgments.as_dict() == {"TA": 1, "VQ": 2, "MQ": 0, "OA": 1}
    assert verdict.tool_calls == 1
    assert {2, 48, 49, 96} <= set(verdict.frames_seen)
    by_number = {f.frame_number: (f.video, f.frame_index) for f in verdict.trajectory.frames}
    assert [by_number[n] for n in (48, 49, 96)] == [(1, 149), (2, 0), (2, 19)]


def test_twelve_frames_a_call_are_shown_and_no_more(clips: tuple[Path, Path]) -> None:
    profile = load_profile("vr-thinker-128")
    call = asks(*range(2, 15))
    engine = ScriptedEngine([[call, f"<snapshot>x</snapshot><think>y</think>{ANSWERS[0]}"]])
    verdict = Judge(engine, profile.settings, templates=profile.prompts())("a dog", *clips)
    assert [tool.frame_numbers for r in verdict.trajectory.rounds for tool in r.tools] == [
        tuple(range(2, 14))
    ]


def test_a_numbered_frame_is_the_picked_one(clips: tuple[Path, Path]) -> None:
    settings = JudgeSettings().resize
    workspace = Workspace.open(
        *clips, reader=open_reader(), resize=settings, cache=FrameCache(1 << 24), frames_per_video=48
    )
    shown = workspace.pixels([1, 24, 48, 49, 50, 96])
    assert [read_number(frame) for frame in shown] == [0, 73, 149, 0, 0, 19]


@pytest.mark.parametrize(
    ("n", "picks"), [(150, 48), (48, 48), (20, 48), (1, 3), (7, 1), (2, 2), (100_000, 128)]
)
def test_picks_are_evenly_spaced_from_end_to_end(n: int, picks: int) -> None:
    places = evenly_spaced(n, picks)
    assert len(places) == picks
    assert places[0] == 0
    assert picks == 1 or places[-1] == n - 1
    assert places == sorted(places)
    gaps = {b - a for a, b in pairwise(places)}
    assert not gaps or max(gaps) - min(gaps) <= 1
    assert picks < n or set(places) == set(range(n))


def test_released_checkpoints_get_their_profile_by_themselves(stock: Path, tmp_path: Path) -> None:
    for hub_id, name in (
        ("qunwang13/vr-thinker", "vr-thinker-48"),
        ("qunwang13/vrthinker", "vr-thinker-128"),
    ):
        cached = tmp_path / "hub" / f"models--{hub_id.replace('/', '--')}" / "snapshots" / "0a1b"
        cached.parent.mkdir(parents=True)
        cached.symlink_to(stock, target_is_directory=True)
        wanted = load_profile(name).settings
        assert profile_for(hub_id) == profile_for(cached) == load_profile(name)
        configured = checkpoint_configuration(cached)
        assert configured.settings.episode == wanted.episode
        assert configured.settings.dimensions == wanted.dimensions
        assert endpoint_configuration(hub_id)[0].episode == wanted.episode
    assert profile_for(stock) is None
    assert checkpoint_configuration(stock).settings.episode == EpisodeSettings()
    assert profile_for("someone/vr-thinker-7b") is None


def test_what_a_checkpoint_brings_comes_before_its_profile_and_a_named_one_before_both(
    stock: Path, tmp_path: Path
) -> None:
    own = tmp_path / "models--qunwang13--vr-thinker"
    own.mkdir()
    for file in stock.iterdir():
        (own / file.name).symlink_to(file)
    PromptTemplates({**PromptTemplates.load().sources, "first_input": "{{ caption }}"}).save(
        own / "vrthinker_prompts"
    )
    (own / "vrthinker.json").write_text('{"episode": {"max_rounds": 3}}')
    mine = checkpoint_configuration(own)
    assert (mine.settings.episode.max_rounds, mine.settings.episode.frames_per_video) == (3, None)
    assert mine.templates.sources["first_input"] == "{{ caption }}"
    named = checkpoint_configuration(own, profile="vr-thinker-128", max_rounds=2)
    assert (named.settings.episode.max_rounds, named.settings.episode.frames_per_video) == (2, 128)
    assert named.templates.sources == PromptTemplates.load().sources
    with pytest.raises(InputError, match="profile: got 'x', allowed: vr-thinker-128, vr-thinker-48"):
        checkpoint_configuration(own, profile="x")


def test_every_profile_says_all_four_dimensions_and_a_dataset_comes_before_them(
    clips: tuple[Path, Path],
) -> None:
    for name in profile_names():
        assert load_profile(name).settings.dimensions is not None
    profile = load_profile("vr-thinker-48")
    engine = ScriptedEngine([[f"<snapshot>x</snapshot><think>y</think>{ANSWERS[0]}"]])
    judge = Judge(engine, profile.settings, templates=profile.prompts())
    verdict = judge("a dog", *clips, dataset="mj-bench-video")
    system = "".join(getattr(s, "text", "") for s in verdict.trajectory.first_input[0].segments)
    assert "VQ (Fineness)" in system
    with pytest.raises(ValueError, match="each of TA, VQ, MQ, OA once"):
        JudgeSettings(dimensions=profile.settings.dimensions[:3])  # type: ignore[index]


def test_settings_without_picks_are_written_as_before() -> None:
    assert "frames_per_video" not in EpisodeSettings().model_dump(mode="json")
    assert "dimensions" not in JudgeSettings().model_dump(mode="json")
    settings = load_profile("vr-thinker-48").settings
    assert JudgeSettings.model_validate_json(settings.model_dump_json()) == settings
