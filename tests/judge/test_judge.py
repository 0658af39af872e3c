"""`Judge` on real checkpoints of random weights: generated clips, and real clips at full preprocessing."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import heavy  # noqa: F401
import numpy as np
import pytest
from clips import make_clip, read_number
from quick_judge import make_quick_judge

from vrthinker import Judge, Preference, StopReason, VideoError
from vrthinker.commands.make_tiny import RANDOM_NOTE, make_tiny_judge
from vrthinker.data.pairs import Pair
from vrthinker.engine.base import Choice, RoundLimits, RoundRequest
from vrthinker.engine.hf.engine import HFEngine
from vrthinker.engine.scripted import ScriptedEngine
from vrthinker.errors import InputError
from vrthinker.verdict import Verdict

REAL_CLIPS = Path(__file__).resolve().parents[3] / "shared" / "data" / "videoalign"


class DictatedEngine(HFEngine):
    """The real engine, made to write given texts: every token is forwarded, none is chosen.

    Keeps the pixels that its vision tower is given, by (file, frame index).
    """

    def dictate(self, *texts: str) -> None:
        self.texts = texts
        self.shown: dict[tuple[str, int], np.ndarray[Any, Any]] = {}
        self.prompt_tokens: list[int] = []
        self._said: dict[int, int] = {}
        real = self.features.get

        def remember(segments: Sequence[Any], **options: Any) -> Any:
            for segment in segments:
                self.shown[segment.key[:2]] = segment.load()
            return real(segments, **options)

        self.features.get = remember  # type: ignore[method-assign]

    def submit(self, request: RoundRequest) -> None:
        number = self._said.get(request.session.id, 0)
        self._said[request.session.id] = number + 1
        limits = RoundLimits(max_tokens=4096, form=(Choice((self.texts[number],)),))
        super().submit(RoundRequest(request.session, request.new, request.expired, limits))


def asks(numbers: Sequence[int]) -> str:
    frames = ", ".join(map(str, numbers))
    return (
        "<snapshot>seen</snapshot><think>more</think><recommend answer>TA=1, VQ=1, MQ=1, OA=1, CF=3"
        '</recommend answer><tool_call>{"name": "select_frames", "arguments": '
        f'{{"target_frames": [{frames}]}}}}</tool_call>'
    )


DONE = "<snapshot>seen</snapshot><think>done</think><answer>TA=1, VQ=0, MQ=2, OA=1, CF=2</answer>"


def dictated_judge(
    model: Path, max_pixels: int, *texts: str, **settings: Any
) -> tuple[Judge, DictatedEngine]:
    plain = Judge.from_pretrained(
        model, max_pixels=max_pixels, guided=False, max_rounds=6, max_round_tokens=512, **settings
    )
    engine = DictatedEngine(model, max_sessions=2)
    engine.dictate(*texts)
    return Judge(engine, plain.settings), engine


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_quick_judge(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("clips")
    first = make_clip(folder / "first.mp4", 30, size=(64, 96), fps=10)
    return first, make_clip(folder / "second.webm", 22, size=(80, 60), codec="vp9", fps=24)


def test_a_verdict_has_what_a_caller_needs(model: Path, clips: tuple[Path, Path]) -> None:
    judge, engine = dictated_judge(model, 112 * 112, asks([5, 31, 40]), DONE)
    verdict = judge("a dog", *clips)
    assert verdict.overall is Preference.VIDEO_1
    assert verdict.judgments is not None
    assert verdict.judgments.as_dict() == {"TA": 1, "VQ": 0, "MQ": 2, "OA": 1}
    assert (verdict.rounds, verdict.tool_calls) == (2, 1)
    assert verdict.stop_reason is StopReason.ANSWERED
    assert verdict.confidence == 2
    assert verdict.notes == (RANDOM_NOTE,)
    assert {5, 31, 40} <= set(verdict.frames_seen)
    for (path, index), pixels in engine.shown.items():
        assert read_number(pixels) == index, path


def test_a_tiny_judge_gives_a_random_verdict_and_says_so(model: Path, clips: tuple[Path, Path]) -> None:
    judge = Judge.from_pretrained(model, temperature=1.0)
    verdicts = [judge("a dog", *clips, seed=seed) for seed in range(6)]
    assert all(verdict.judgments is not None for verdict in verdicts), [v.reason for v in verdicts]
    assert len({str(verdict.judgments) for verdict in verdicts}) > 1
    assert any(verdict.tool_calls for verdict in verdicts)
    again = judge("a dog", *clips, seed=3)
    assert again.judgments == verdicts[3].judgments
    assert [r.token_ids for r in again.trajectory.rounds] == [
        r.token_ids for r in verdicts[3].trajectory.rounds
    ]


@pytest.mark.parametrize("family", ["qwen2.5-vl", "qwen3-vl"])
def test_both_families_judge(tmp_path: Path, clips: tuple[Path, Path], family: Any) -> None:
    verdict = Judge.from_pretrained(make_tiny_judge(tmp_path / "m", family))("a dog", *clips)
    assert verdict.judgments is not None


def test_bad_settings_are_one_clear_line(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="window"):
        Judge.from_pretrained(model, window=-1)
    with pytest.raises(InputError, match="rounds: got 3"):
        Judge.from_pretrained(model, rounds=3)
    with pytest.raises(InputError, match="not a folder of prompt templates"):
        Judge.from_pretrained(model, templates=tmp_path / "none")
    other = make_tiny_judge(tmp_path / "other", "qwen3-vl")
    settings = (model / "vrthinker.json").read_text()
    (other / "vrthinker.json").write_text(settings)
    with pytest.raises(InputError, match="patch_size: got 14, the model has 16"):
        Judge.from_pretrained(other)


def test_a_clip_that_cannot_be_read_is_an_error(
    model: Path, clips: tuple[Path, Path], tmp_path: Path
) -> None:
    judge, _ = dictated_judge(model, 112 * 112, DONE)
    with pytest.raises(VideoError, match=r"missing\.mp4"):
        judge("a dog", clips[0], tmp_path / "missing.mp4")


def sequential_frames(path: Path, wanted: set[int]) -> dict[int, np.ndarray[Any, Any]]:
    """Frames by their index, decoded in order with nothing but PyAV: the oracle."""
    import av
    from av.video.reformatter import Interpolation

    flags = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
    with av.open(str(path)) as container:
        return {
            index: frame.reformat(format="rgb24", interpolation=flags).to_ndarray()
            for index, frame in enumerate(container.decode(container.streams.video[0]))
            if index in wanted
        }


@pytest.mark.skipif(not REAL_CLIPS.is_dir(), reason="no real clips in ../shared/data/videoalign")
@pytest.mark.parametrize(
    ("row", "frames"),
    [
        (0, 2),
        pytest.param(0, 8, marks=[pytest.mark.slow, pytest.mark.guard]),
        pytest.param(1, 8, marks=pytest.mark.slow),
    ],
)
def test_real_clips_at_full_preprocessing_show_the_frames_asked_for(
    model: Path, row: int, frames: int
) -> None:
    """What a context costs grows with the square of its frames, so few of them are shown by default."""
    from PIL import Image

    with (REAL_CLIPS / "pairs.csv").open(newline="") as lines:
        pair = list(csv.DictReader(lines))[row]
    paths = [REAL_CLIPS / pair["path_A"], REAL_CLIPS / pair["path_B"]]
    n_1, n_2 = int(float(pair["num_frames_A"])), int(float(pair["num_frames_B"]))
    rng = np.random.default_rng(row)
    asked = [
        sorted(rng.choice(np.arange(1, n_1 + n_2 + 1), frames, replace=False).tolist()) for _ in range(2)
    ]
    judge, engine = dictated_judge(
        model, 512 * 28 * 28, asks(asked[0]), asks(asked[1]), DONE, initial_frames=frames
    )
    verdict: Verdict = judge(pair["prompt"], *paths)
    assert verdict.judgments is not None, verdict.reason
    trajectory = verdict.trajectory
    assert (trajectory.n_frames, trajectory.n_frames_1) == (n_1 + n_2, n_1)
    live = [{s.frame_number for s in r.live if s.outcome} for r in trajectory.rounds]
    assert live == [set(), set(asked[0]), set(asked[1])]
    seen = {
        str(path): sequential_frames(path, {i for p, i in engine.shown if p == str(path)}) for path in paths
    }
    tokens = set()
    for record in trajectory.frames:
        path = str(paths[record.video - 1])
        shown = engine.shown[path, record.frame_index]
        assert record.frame_index == record.frame_number - 1 - (n_1 if record.video == 2 else 0)
        assert record.height % 28 == record.width % 28 == 0
        tokens.add(record.height * record.width // 28**2)
        image = Image.fromarray(seen[path][record.frame_index])
        resized = np.asarray(image.resize((record.width, record.height), Image.Resampling.BICUBIC))
        assert np.array_equal(shown, resized), f"frame {record.frame_number}"
    assert min(tokens) > 200, "a few hundred tokens a frame"
    assert max(tokens) <= 512
    assert trajectory.rounds[-1].prompt_tokens > 2 * frames * 200


@pytest.mark.parametrize("variable", [False, True], ids=["constant", "variable"])
@pytest.mark.parametrize(
    ("codec", "ending"),
    [
        ("h264", "mp4"),
        ("hevc", "mkv"),
        ("vp9", "webm"),
        ("av1", "mp4"),
        ("mpeg4", "mp4"),
        ("mjpeg", "mkv"),
        ("gif", "gif"),
    ],
)
def test_the_frames_judged_are_the_frames_asked_for_in_every_codec(
    tmp_path: Path, codec: str, ending: str, variable: bool
) -> None:
    rng = np.random.default_rng([ord(c) for c in codec])
    n_1, n_2 = 26, 19
    gaps = rng.integers(2, 12, n_1) * 10
    pts = (gaps.cumsum() - gaps[0]).tolist() if variable else None
    first = make_clip(tmp_path / f"first.{ending}", n_1, size=(64, 96), codec=codec, fps=20, pts=pts)
    second = make_clip(tmp_path / f"second.{ending}", n_2, size=(96, 64), codec=codec, fps=10)
    asked = [sorted(rng.choice(np.arange(1, n_1 + n_2 + 1), 8, replace=False).tolist()) for _ in range(2)]
    engine = ScriptedEngine([[asks(asked[0]), asks(asked[1]), DONE]])
    verdict = Judge(engine)("a dog", first, second)
    assert verdict.stop_reason is StopReason.ANSWERED, verdict.reason
    assert verdict.trajectory.videos[0].is_variable_frame_rate is variable
    seconds = {frame.frame_number: frame.pts_seconds for frame in verdict.trajectory.frames}
    for round_number, seen in enumerate(engine.seen):
        retrieved = [s for s in seen.context.frames if s.shown.outcome]
        assert [s.shown.frame_number for s in retrieved] == (asked[round_number - 1] if round_number else [])
        for segment in seen.context.frames:
            number = segment.shown.frame_number
            index = number - 1 if number <= n_1 else number - 1 - n_1
            assert read_number(segment.load()) == index
            due = (pts[index] / 1000 if pts is not None else index / 20) if number <= n_1 else index / 10
            assert seconds[number] == pytest.approx(due, abs=0.002)


def test_a_clip_that_was_replaced_is_judged_anew(model: Path, tmp_path: Path) -> None:
    """Output names are used again by those who generate videos."""
    path, other = tmp_path / "a.mp4", make_clip(tmp_path / "b.mp4", 8, size=(64, 96), first_number=500)
    judge = Judge.from_pretrained(model)

    def logprobs() -> object:
        return [r.logprobs for r in judge("a dog", path, other).trajectory.rounds]

    make_clip(path, 8, size=(64, 96), first_number=0)
    first = logprobs()
    assert logprobs() == first
    make_clip(path, 8, size=(64, 96), first_number=300)
    assert logprobs() != first


def test_a_clip_that_changes_while_it_is_judged_is_noticed(clips: tuple[Path, Path], tmp_path: Path) -> None:
    path = make_clip(tmp_path / "a.mp4", 8, size=(64, 96))

    def script(session: int, number: int, context: object) -> str:
        make_clip(path, 9, size=(64, 96))
        return asks([2]) if number == 1 else DONE

    verdict = Judge(ScriptedEngine(script))("a dog", path, clips[0])
    assert verdict.stop_reason is StopReason.VIDEO_ERROR
    assert "changed while it was being judged" in (verdict.reason or "")


def test_pairs_of_one_file_sample_apart_from_each_other(model: Path, clips: tuple[Path, Path]) -> None:
    judge = Judge.from_pretrained(model, temperature=1.0, max_rounds=1)
    pairs = [Pair(id=f"p{i}", prompt="a dog", video_1=clips[0], video_2=clips[1]) for i in range(8)]
    texts = {f.item.id: f.trajectory.rounds[0].text for f in judge.judge_pairs(pairs) if f.trajectory}
    assert len(set(texts.values())) == 8
    again = {f.item.id: f.trajectory.rounds[0].text for f in judge.judge_pairs(pairs[::-1]) if f.trajectory}
    assert again == texts, "an item's sample does not depend on its place"


def test_a_group_has_the_episodes_of_its_pairs_judged_alone(model: Path, clips: tuple[Path, Path]) -> None:
    """At a temperature above 0 and in another batch: seeds and ids are the pairs', whatever the group."""
    pairs = [Pair(id=f"p#{n}", prompt="a dog", video_1=clips[0], video_2=clips[1]) for n in range(1, 4)]
    other = Pair(id="q#1", prompt="a cat", video_1=clips[1], video_2=clips[0])
    options: dict[str, Any] = {"temperature": 1.0, "guided": False, "max_round_tokens": 12}
    with Judge.from_pretrained(model, device="cpu", batch_size=2, **options) as judge:
        alone = {done.item.id: done.trajectory for done in judge.judge_pairs([*pairs, other], seed=5)}
        groups = [("p", pairs), ("q", [other])]
        found = {done.item.id: done.trajectory for done in judge.judge_groups(groups, seed=5)}
        with pytest.raises(InputError, match="group 'p': got different pairs"):
            list(judge.judge_groups([("p", [*pairs, other])]))
    assert found.keys() == alone.keys()
    for name, trajectory in found.items():
        single = alone[name]
        assert trajectory is not None
        assert single is not None
        assert (trajectory.id, trajectory.seed) == (name, single.seed)
        assert [r.token_ids for r in trajectory.rounds] == [r.token_ids for r in single.rounds]
    assert len({found[pair.id].rounds[0].text for pair in pairs}) > 1, "seeds differ"  # type: ignore[union-attr]


def test_a_checkpoint_cannot_decide_to_judge_broken_clips(tmp_path: Path, clips: tuple[Path, Path]) -> None:
    from clips import cut

    folder = make_tiny_judge(tmp_path / "tiny", "qwen2.5-vl")
    path = folder / "vrthinker.json"
    path.write_text(path.read_text().replace('"tolerate_truncation": false', '"tolerate_truncation": true'))
    broken = cut(make_clip(tmp_path / "whole.mkv", 40, size=(64, 96)), tmp_path / "cut.mkv", 0.5)
    with pytest.raises(VideoError, match="--tolerate-truncation"):
        Judge.from_pretrained(folder)("a dog", clips[0], broken)
    verdict = Judge.from_pretrained(folder, tolerate_truncation=True)("a dog", clips[0], broken)
    assert any("video 2 breaks" in note for note in verdict.notes)


def test_a_file_name_that_is_no_unicode_is_judged_and_recorded(
    clips: tuple[Path, Path], tmp_path: Path
) -> None:
    import os

    from vrthinker.episode.trajectory import Trajectory, dump_line

    path = os.fsdecode(bytes(tmp_path) + b"/v\xff.mp4")
    os.link(clips[0], path)
    verdict = Judge(ScriptedEngine([[DONE]]))("a dog", path, clips[1])
    assert Trajectory.model_validate_json(dump_line(verdict.trajectory)) == verdict.trajectory


def test_seeds_are_integers(clips: tuple[Path, Path]) -> None:
    with pytest.raises(InputError, match=r"seed: got 1\.5"):
        Judge(ScriptedEngine([[DONE]]))("a dog", *clips, seed=1.5)  # type: ignore[arg-type]
