"""The evidence page: whole, right, harmless, and honest about what is missing."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import heavy  # noqa: F401
import numpy as np
import pytest
from clips import cut, make_clip, read_number
from PIL import Image
from quick_judge import make_quick_judge

from vrthinker import Judge, StopReason, load_trajectories
from vrthinker.cli import main
from vrthinker.engine.scripted import ScriptedEngine
from vrthinker.episode.trajectory import Trajectory, VideoRecord
from vrthinker.errors import InputError, VRThinkerError
from vrthinker.report.page.clips import PageClip, load_clip, playable_as
from vrthinker.report.page.page import PlantedEvent, Truth, check_page_path, render_page, write_page
from vrthinker.report.page.text import visible_markup, visible_text
from vrthinker.video.open import open_reader

N_1, N_2 = 32, 20
EVIL = (
    "\"'><script>document.title='owned'</script></script><img src=x onerror=\"document.title='owned'\">"
    "</style><style>*{display:none}</style> {{ 7*7 }}{% if %} \u202egnp.exe \x00\x1b[2J\x07\x9b\u2028\ufeff "
)
LONG = (EVIL + "w" * 500 + " ") * 15


def asks(frames: str, snapshot: str = "seen", answer: str = "TA=2, VQ=1, MQ=0, OA=2, CF=3") -> str:
    return (
        f"<snapshot>{snapshot}</snapshot><think>more</think><recommend answer>{answer}</recommend answer>"
        f'<tool_call>{{"name": "select_frames", "arguments": {{"target_frames": [{frames}]}}}}</tool_call>'
    )


DONE = "<snapshot>seen</snapshot><think>done</think><answer>TA=1, VQ=0, MQ=2, OA=1, CF=2</answer>"
ROUNDS = [asks("5, 12, 40"), asks("12, 12, 50"), asks("99"), DONE]


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("clips")
    first = make_clip(folder / "first.mp4", N_1, size=(96, 144), fps=8, b_frames=2, audio=True)
    return first, make_clip(folder / "second.webm", N_2, size=(84, 140), codec="vp9", fps=25)


def judged(clips: tuple[Path, Path], texts: list[str], caption: str = "a dog", **settings: Any) -> Trajectory:
    judge = Judge(ScriptedEngine([texts]))
    episode = judge.settings.episode.model_copy(update=settings)
    judge = Judge(ScriptedEngine([texts]), judge.settings.model_copy(update={"episode": episode}))
    return judge(caption, *clips).trajectory


@pytest.fixture(scope="session")
def trajectory(clips: tuple[Path, Path]) -> Trajectory:
    return judged(clips, ROUNDS)


@pytest.fixture(scope="session")
def page(trajectory: Trajectory) -> str:
    return render_page(trajectory)


class Node:
    """An element: its attributes, its text, and where it is."""

    def __init__(self, tag: str, attributes: dict[str, str], parents: tuple[Node, ...]) -> None:
        self.tag, self.attributes, self.parents, self.text = tag, attributes, parents, ""

    @property
    def classes(self) -> list[str]:
        return self.attributes.get("class", "").split()

    def inside(self, name: str) -> bool:
        """Whether it lies in an element of this class or id."""
        return any(name in (*parent.classes, parent.attributes.get("id")) for parent in self.parents)


class Tree(HTMLParser):
    """The elements of a page, in order."""

    _VOID = ("meta", "link", "br", "img", "input")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.nodes: list[Node] = []
        self._open: list[Node] = []
        self.feed(page)
        self.close()
        assert not self._open, f"not closed: {[node.tag for node in self._open]}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, names)
        node = Node(tag, {name: value or "" for name, value in attrs}, tuple(self._open))
        self.nodes.append(node)
        if tag not in self._VOID:
            self._open.append(node)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self._VOID:
            assert self._open, tag
            assert self._open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        for node in self._open:
            node.text += data

    def all(self, name: str, within: str | None = None) -> list[Node]:
        """Elements by class or tag."""
        found = [node for node in self.nodes if name == node.tag or name in node.classes]
        return [node for node in found if within is None or node.inside(within)]


def stills(page: str) -> dict[int, np.ndarray[Any, Any]]:
    """Frame number to the pixels that the page holds for it."""
    rules = re.findall(r"\.still-(\d+)\{background-image:url\(data:image/jpeg;base64,([^)]+)\)\}", page)
    assert len(rules) == len({number for number, _ in rules})
    return {
        int(number): np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))
        for number, data in rules
    }


def embedded(page: str) -> list[tuple[str, bytes]]:
    """(MIME type, content) of each clip."""
    sources = [node.attributes["src"] for node in Tree(page).all("video")]
    return [
        (source.partition(";")[0].removeprefix("data:"), base64.b64decode(source.partition(",")[2]))
        for source in sources
    ]


def test_the_page_is_self_contained(page: str) -> None:
    tree = Tree(page)
    for node in tree.nodes:
        for name in ("src", "href", "poster", "srcset", "action", "data"):
            assert node.attributes.get(name, "data:").startswith("data:"), node.tag
        assert not any(name.startswith("on") or name == "style" for name in node.attributes), node.tag
    assert page.startswith("<!doctype html>")
    without_data = re.sub(r"base64,[A-Za-z0-9+/=]+", "", page)
    assert not re.search(r"(?i)https?:|@import|//[a-z]", without_data.replace("// ", ""))
    policy = tree.nodes[[n.attributes.get("http-equiv") for n in tree.nodes].index("Content-Security-Policy")]
    assert policy.attributes["content"].startswith("default-src 'none'; img-src data:; media-src data:; ")
    assert "unsafe" not in policy.attributes["content"]


def test_each_frame_is_in_the_page_once_and_is_the_right_one(page: str, trajectory: Trajectory) -> None:
    pictures = stills(page)
    assert set(pictures) == {frame.frame_number for frame in trajectory.frames}
    assert page.count("data:image/jpeg") == len(pictures)
    for frame in trajectory.frames:
        assert read_number(pictures[frame.frame_number]) == frame.frame_index
        assert pictures[frame.frame_number].shape[:2] == ((96, 144) if frame.video == 1 else (84, 140))
        assert read_number(pictures[frame.frame_number]) == (frame.frame_number - 1) % N_1


def test_large_frames_become_small_stills(tmp_path: Path) -> None:
    first = make_clip(tmp_path / "a.mp4", 8, size=(480, 800))
    second = make_clip(tmp_path / "b.mp4", 8, size=(500, 300))
    found = stills(render_page(judged((first, second), [DONE])))
    assert {picture.shape[:2] for picture in found.values()} == {(192, 320), (320, 192)}
    assert [read_number(found[number]) for number in sorted(found)] == [0, 2, 4, 6] * 2


def strips(page: str, round_number: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(outcome, frame number) of what a round's film strip shows as live and as expired."""
    live, expired = [], []
    for node in Tree(page).all("frame", within=f"round-{round_number}"):
        outcome = next(
            int(p.attributes["data-outcome"]) for p in node.parents if "data-outcome" in p.attributes
        )
        number = int(node.attributes["data-number"])
        says_expired = "expired" in node.attributes["aria-label"]
        assert says_expired == node.inside("gone") == node.inside("expired")
        (expired if says_expired else live).append((outcome, number))
    return live, expired


@pytest.mark.parametrize("window", [1, 2, None, 0])
def test_film_strips_show_what_the_visibility_record_says(
    clips: tuple[Path, Path], window: int | None
) -> None:
    trajectory = judged(
        clips, [asks("5, 12, 40"), asks("12, 50"), asks("99"), asks("7"), DONE], window=window
    )
    page = render_page(trajectory)
    gone: list[tuple[int, int]] = []
    for record in trajectory.rounds:
        gone += record.expired
        live, expired = strips(page, record.round_number)
        assert sorted(live) == sorted(showing[:2] for showing in record.live)
        assert sorted(expired) == sorted(showing[:2] for showing in gone)
    text = Tree(page).all("call")[0].text
    assert ("no round saw these frames" in text) == (window == 0)


def test_a_round_tells_what_was_written_asked_and_answered(page: str) -> None:
    tree = Tree(page)
    told = [" ".join(node.text.split()) for node in tree.all("round")]
    assert "Snapshot seen Thinking more Answer so far Text Alignmentvideo 2" in told[0]
    assert (
        'Confidencelow Tool call select_frames {"target_frames": [5, 12, 40]} shown next: 5 12 40' in told[0]
    )
    assert "changed" not in told[0] + told[1] + told[2]
    assert 'target_frames": [12, 12, 50]} shown next: 12 50' in told[1]
    assert "unknown frame 99: frames are numbered 1 to 52." in told[2]
    assert "Final answer Text Alignmentvideo 1 changed Visual Qualitytie changed" in told[3]
    assert "Confidencemiddle" in told[3]
    assert "Outside the form" not in page
    rows = {row.attributes["data-dimension"]: row.text.split() for row in tree.all("tr") if row.classes}
    assert [rows[code][-2:] for code in ("TA", "OA")] == [["video", "1"], ["video", "1"]]
    assert "Video 1 is better" in tree.all("h1")[0].text


def test_every_call_of_a_round_is_told_with_its_outcome(clips: tuple[Path, Path]) -> None:
    further = asks("99").partition("</recommend answer>")[2]
    page = render_page(judged(clips, [asks("5, 12") + further + further.replace("99", "12, 40"), DONE]))
    told = " ".join(Tree(page).all("round")[0].text.split())
    assert 'Tool call 1 of 3 select_frames {"target_frames": [5, 12]} shown next: 5 12' in told
    assert 'Tool call 2 of 3 select_frames {"target_frames": [99]} unknown frame 99' in told
    assert 'Tool call 3 of 3 select_frames {"target_frames": [12, 40]} shown next: 40 frame 12 is' in told
    assert "several_calls" in told


def test_without_a_truth_nothing_speaks_of_one(page: str) -> None:
    body = page[page.index("<body>") : page.index('<script type="application/json"')]
    for word in ("Truth", "right<", "wrong<", "planted", "badge"):
        assert word not in body


def test_truth_marks_right_and_wrong_and_shows_events_where_they_are(clips: tuple[Path, Path]) -> None:
    trajectory = judged(clips, ROUNDS)
    events = (
        PlantedEvent(1, 11, 13, "wrong colour", hidden=True),  # frames 12 and 13; 12 is asked for twice
        PlantedEvent(2, 0, 3, "noise", hidden=False),  # frames 33 to 35; 33 is in the first input
        PlantedEvent(2, 12, 13, "jump", hidden=True),  # frame 45, never asked for
    )
    tree = Tree(render_page(trajectory, truth=Truth({"TA": 1, "VQ": 2, "OA": 1}, events)))
    rows = {row.attributes["data-dimension"]: row.text.split() for row in tree.all("tr") if row.classes}
    assert rows["TA"][-3:] == ["1", "✓", "right"]
    assert rows["VQ"][-4:] == ["video", "2", "✗", "wrong"]
    assert rows["MQ"][-1] == "\N{EN DASH}"
    badged = {
        (int(node.attributes["data-number"]), badge.text.strip())
        for node in tree.all("frame")
        for badge in tree.all("badge")
        if node in badge.parents
    }
    assert badged == {(12, "wrong colour"), (33, "noise")}
    told = [" ".join(node.text.split()) for node in tree.all("li") if node.inside("events")]
    assert told == [
        "frames 12 to 13, 1.38 to 1.62 s wrong colour hidden from the first input, seen in rounds 2, 3",
        "frames 33 to 35, 0.00 to 0.12 s noise visible in the first input, seen in rounds 1, 2, 3, 4",
        "frame 45, 0.48 to 0.52 s jump hidden from the first input, never seen",
    ]
    spans = [n for n in tree.all("rect") if n.inside("clip-1") and "hidden" in n.classes]
    assert [(float(n.attributes["x"]), float(n.attributes["width"])) for n in spans] == [(11.0, 2.0)]
    asked = [n for n in tree.all("rect") if n.inside("clip-1") and "asked" in n.classes]
    assert [float(n.attributes["x"]) for n in asked] == [4.0, 11.0]


def test_with_a_frame_rate_cap_frames_are_the_ones_that_were_judged(clips: tuple[Path, Path]) -> None:
    trajectory = judged(clips, [asks("3, 19"), DONE], max_fps=4.0)
    page = render_page(trajectory, truth=Truth({}, (PlantedEvent(1, 3, 6, "x", hidden=True),)))
    for frame in trajectory.frames:
        assert read_number(stills(page)[frame.frame_number]) == frame.frame_index
    assert trajectory.frames[1].frame_index == 4
    assert "frame_index 3 to 5, 0.38 to 0.75 s" in page


@pytest.mark.parametrize(
    ("truth", "words"),
    [
        (lambda: Truth({"XX": 1}), "truth: got code 'XX', allowed: TA, VQ, MQ, OA"),
        (lambda: Truth({"TA": 3}), "truth: TA: got 3, allowed: 0, 1, 2"),
        (lambda: PlantedEvent(3, 0, 1, "x", True), "video 3"),  # type: ignore[arg-type]
        (lambda: PlantedEvent(1, 2, 2, "x", True), "frames 2 to 2"),
    ],
)
def test_a_truth_that_is_none_is_refused(truth: Callable[[], object], words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        truth()


def test_clips_are_embedded_as_they_are_when_browsers_play_them(page: str, clips: tuple[Path, Path]) -> None:
    assert embedded(page) == [("video/mp4", clips[0].read_bytes()), ("video/webm", clips[1].read_bytes())]


def record_of(path: Path, **changes: Any) -> VideoRecord:
    info = open_reader().probe(path)
    fields = {name: getattr(info, name) for name in VideoRecord.model_fields if hasattr(info, name)}
    return VideoRecord(**{**fields, **changes})


LATE = [500 + 40 * index for index in range(12)]
VARIABLE = [0, 40, 100, 300, 340, 900, 1000, 1010, 1500, 1600, 1700, 1900]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("hevc.mp4", {"codec": "hevc", "b_frames": 2}),
        ("variable.mkv", {"codec": "hevc", "pts": VARIABLE}),
        ("mpeg4.avi", {"codec": "mpeg4"}),
        ("anim.gif", {"codec": "gif", "fps": 10}),
        ("other.mkv", {}),
        ("odd.mp4", {"size": (65, 97)}),
        ("large.mp4", {"codec": "hevc", "size": (480, 854)}),
        ("quick.mov", {}),
        ("late.mp4", {"pts": LATE}),
        ("behind.mp4", {"pts": LATE, "audio": True}),
        ("late.webm", {"codec": "vp9", "pts": LATE}),
        ("full.mp4", {"options": {"profile": "high444"}, "size": (33, 33)}),
    ],
)
def test_other_clips_become_copies_with_every_frame_at_its_time(
    tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    path = make_clip(tmp_path / name, 12, **options)
    assert check_copy(path, load_clip(record_of(path), ())) == list(range(12))


def check_copy(path: Path, clip: PageClip) -> list[int]:
    """Checks a copy against its original, and returns the numbers that its frames show."""
    assert clip.problems == ()
    assert clip.media is not None
    assert clip.media.is_copy
    assert clip.media.mime == "video/mp4"
    copy = path.parent / "copy.mp4"
    copy.write_bytes(clip.media.content)
    before, after = open_reader().probe(path), open_reader().probe(copy)
    assert (after.codec, after.n_frames) == ("h264", before.n_frames)
    assert after.pts_seconds == pytest.approx(before.pts_seconds, abs=2e-5)
    assert after.duration_seconds == pytest.approx(before.duration_seconds, abs=2e-5)
    assert clip.times == (*before.pts_seconds, before.duration_seconds)
    assert max(after.width, after.height) <= 640
    assert after.width % 2 == after.height % 2 == 0
    assert after.width / after.height == pytest.approx(before.width / before.height, rel=0.03)
    assert playable_as(str(copy), after) == "video/mp4"
    return [read_number(picture) for picture in open_reader().frames_at(copy, range(12)).numpy()]


def test_a_folder_of_images_becomes_a_copy(tmp_path: Path, clips: tuple[Path, Path]) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for index, picture in enumerate(open_reader().frames_at(clips[0], range(12)).numpy()):
        Image.fromarray(picture).save(folder / f"{index}.png")
    info = open_reader(image_fps=5.0).probe(folder)
    record = record_of(folder, fps=info.fps, duration_seconds=info.duration_seconds)
    clip = load_clip(record, ())
    assert clip.media is not None
    (tmp_path / "copy.mp4").write_bytes(clip.media.content)
    after = open_reader().probe(tmp_path / "copy.mp4")
    assert after.pts_seconds == pytest.approx(info.pts_seconds, abs=2e-5)
    assert after.fps == pytest.approx(5.0)


@pytest.mark.parametrize("turned", [{"rotation": 90}, {"mirror": True}])
def test_turned_clips_become_upright_copies(tmp_path: Path, turned: dict[str, Any]) -> None:
    path = make_clip(tmp_path / "turned.mp4", 6, size=(64, 96), **turned)
    clip = load_clip(record_of(path), ())
    assert clip.media is not None
    assert clip.media.is_copy
    copy = tmp_path / "copy.mp4"
    copy.write_bytes(clip.media.content)
    ours, theirs = (open_reader().frames_at(p, range(6)).numpy().astype(int) for p in (path, copy))
    assert abs(ours - theirs).mean() < 6


def test_the_same_colours_come_back_from_a_copy(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "c.mkv", 4, codec="mjpeg")
    clip = load_clip(record_of(path), ())
    assert clip.media is not None
    (tmp_path / "copy.mp4").write_bytes(clip.media.content)
    ours, theirs = (
        open_reader().frames_at(p, [0]).numpy().astype(int) for p in (path, tmp_path / "copy.mp4")
    )
    assert abs(ours - theirs).mean() < 4


@pytest.mark.parametrize("moved", ["missing", "changed", "retimed", "no video"])
def test_a_record_outlives_its_clips(tmp_path: Path, moved: str) -> None:
    first = make_clip(tmp_path / "first.mp4", 16, fps=8)
    second = make_clip(tmp_path / "second.mp4", 12, size=(64, 64))
    trajectory = judged((first, second), [asks("6, 21"), DONE])
    if moved == "missing":
        second.unlink()
    elif moved == "changed":
        make_clip(second, 13, size=(64, 64))
    elif moved == "retimed":
        make_clip(second, 12, size=(64, 64), fps=20)
    else:
        second.write_text("no video at all")
    page = write_page(tmp_path / "page.html", trajectory).read_text("utf-8")
    words = {
        "missing": "no such file",
        "changed": "the file has changed since it was judged (12 frames then, 13 frames now)",
        "retimed": "the file has changed since it was judged (frame 20 was at 0.125 s, is at 0.150 s)",
        "no video": "not a video in a known format",
    }[moved]
    tree = Tree(page)
    (problem,) = [node.text for node in tree.all("problem") if node.inside("clip-2")]
    assert problem == f"neither the clip nor its frames are shown: {words}"
    assert len(embedded(page)) == 1
    assert all(number <= 16 for number in stills(page))
    assert len(stills(page)) == 5
    assert strips(page, 2)[0] == [showing[:2] for showing in trajectory.rounds[1].live]
    assert not [n for n in tree.nodes if n.tag == "button" and n.attributes.get("data-video") == "2"]


def test_a_clip_over_the_limit_is_replaced_by_a_copy_or_left_out(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    noise = tmp_path / "noise"
    noise.mkdir()
    for index in range(12):
        Image.fromarray(rng.integers(0, 255, (200, 300, 3), dtype=np.uint8)).save(noise / f"{index}.png")
    small = make_clip(tmp_path / "small.mp4", 12, options={"crf": "1"}, size=(720, 1280))
    trajectory = judged((small, noise), [DONE])
    limit = small.stat().st_size - 1
    tree = Tree(page := render_page(trajectory, max_clip_bytes=limit))
    ((_, content),) = embedded(page)
    assert len(content) < limit
    assert content != small.read_bytes()
    assert "H.264 copy of 640\N{MULTIPLICATION SIGN}360" in page
    (problem,) = [node.text for node in tree.all("problem")]
    assert problem.startswith("only single frames are shown: the clip is over 0.0")
    assert len(stills(page)) == 8


def test_a_clip_that_breaks_is_shown_up_to_the_break(tmp_path: Path, clips: tuple[Path, Path]) -> None:
    whole = make_clip(tmp_path / "whole.mkv", 40, size=(64, 96))
    broken = cut(whole, tmp_path / "broken.mkv", 0.5)
    trajectory = judged((clips[0], broken), [DONE], tolerate_truncation=True)
    page = render_page(trajectory)
    assert len(embedded(page)) == 2
    assert "only the frames before are judged" in page
    (tmp_path / "copy.mp4").write_bytes(embedded(page)[1][1])
    copy = open_reader().probe(tmp_path / "copy.mp4")
    assert copy.n_frames == trajectory.videos[1].n_frames < 40


@pytest.mark.parametrize(
    ("texts", "settings", "stop", "words"),
    [
        (["<think>half"], {}, StopReason.UNPARSEABLE, "round 1: neither an answer nor a tool call"),
        (
            [asks("5"), asks("6")],
            {"max_rounds": 2},
            StopReason.ROUND_LIMIT,
            "not carried out: round 2, the last",
        ),
        ([DONE + DONE], {}, StopReason.UNPARSEABLE, "two_endings"),
    ],
)
def test_an_episode_without_judgments_says_why(
    clips: tuple[Path, Path], texts: list[str], settings: dict[str, Any], stop: StopReason, words: str
) -> None:
    trajectory = judged(clips, texts, **settings)
    assert trajectory.outcome.stop_reason is stop
    tree = Tree(page := render_page(trajectory))
    assert tree.all("h1")[0].text == "No verdict"
    assert not tree.all("table")
    assert words in page
    tree = Tree(render_page(trajectory, truth=Truth({"OA": 2})))
    rows = {row.attributes["data-dimension"]: row.text.split() for row in tree.all("tr") if row.classes}
    assert rows["OA"][-3:] == ["\N{EN DASH}", "video", "2"]
    assert not tree.all("mark")


def test_an_episode_without_rounds_is_a_page(trajectory: Trajectory) -> None:
    outcome = {"judgments": None, "confidence": None, "stop_reason": "bad_input", "reason": "no caption"}
    bare = Trajectory.model_validate(
        {**trajectory.model_dump(), "rounds": (), "frames": (), "outcome": outcome}
    )
    page = render_page(bare)
    assert "No round was written" in page
    assert "no caption" in page


def test_what_departs_from_the_form_is_shown_as_written(clips: tuple[Path, Path]) -> None:
    texts = [
        "before<snapshot>S</snapshot>between<think>T</think>" + asks("5").partition("</think>")[2] + "after",
        "<snapshot>a</snapshot><snapshot>b</snapshot><think>T</think>"
        "<recommend answer>TA=7</recommend answer><tool_call>{nonsense}</tool_call>",
        "<think>T</think><answer>TA=1, VQ=1, MQ=1, OA=1</answer>",
    ]
    tree = Tree(render_page(judged(clips, texts)))
    raw = {i: [n.text for n in tree.all("raw", within=f"round-{i}")] for i in (1, 2, 3)}
    assert raw == {
        1: ["before", "between", "after"],
        2: [
            "<snapshot>a</snapshot><snapshot>b</snapshot>",
            "<recommend answer>TA=7</recommend answer><tool_call>{nonsense}</tool_call>",
        ],
        3: [],
    }
    reasons = {
        i: [n.text for n in tree.all("code", within=f"round-{i}") if n.inside("failures")] for i in (1, 2, 3)
    }
    assert reasons == {
        1: ["text_outside_tags"] * 3,
        2: ["duplicate_tag", "answer_syntax", "tool_syntax"],
        3: ["missing_snapshot"],
    }
    assert "not JSON" in tree.all("call", within="round-2")[0].text


def test_a_record_that_does_not_hold_together_is_refused(trajectory: Trajectory) -> None:
    broken = trajectory.model_copy(update={"frames": trajectory.frames[1:]})
    with pytest.raises(InputError, match="shows frame 1, which is not among its frames"):
        render_page(broken)


def hostile(clips: tuple[Path, Path]) -> tuple[Trajectory, Truth]:
    """Hostile text wherever text comes from outside."""
    texts = [
        asks("5", snapshot=LONG).replace("more", EVIL),
        asks("5").replace("select_frames", EVIL.replace('"', '\\"').replace("\x00", "").replace("\x1b", "")),
        f"{EVIL}<snapshot>{EVIL}</snapshot><tool_call>{EVIL}</tool_call>",
        f"<snapshot>{EVIL}",
    ]
    trajectory = judged(clips, texts, caption=LONG[:10_000])
    evil = trajectory.model_copy(
        update={"id": EVIL, "engine": EVIL, "notes": (EVIL,), "prompt": EVIL + trajectory.prompt}
    )
    return evil, Truth({"TA": 1}, (PlantedEvent(1, 4, 5, EVIL, hidden=True),))


def test_hostile_text_stays_text(clips: tuple[Path, Path]) -> None:
    trajectory, truth = hostile(clips)
    page = render_page(trajectory, notes=[EVIL], truth=truth)
    tree = Tree(page)  # every element closes, no attribute comes twice
    assert {node.tag for node in tree.nodes} & {"img", "iframe", "object", "embed"} == set()
    assert [node.attributes.get("type") for node in tree.all("script")] == ["application/json", None]
    assert len(tree.all("style")) == 2
    assert "49" not in tree.all("caption")[0].text
    assert "{{ 7*7 }}{% if %}" in tree.all("caption")[0].text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u202a-\u202e\ufeff]", page)
    assert "U+202Egnp.exe U+0000U+001B[2JU+0007U+009BU+2028U+FEFF" in tree.all("note")[0].text
    assert page.encode("utf-8").decode("utf-8") == page
    assert all(not name.startswith("on") for node in tree.nodes for name in node.attributes)
    assert "long" in tree.all("caption")[0].classes


@pytest.mark.parametrize(
    ("given", "text", "markup"),
    [
        ("a<b>&\"'", "a<b>&\"'", "a&lt;b&gt;&amp;&#34;&#39;"),
        ("é ☃ שלום 👩\u200d💻\n\t", "é ☃ שלום 👩\u200d💻\n\t", "é ☃ שלום 👩\u200d💻\n\t"),
        ("\r\n", "\n", "\n"),
        ("\ud800", "[U+D800]", '<span class="odd">U+D800</span>'),
        ("x\0\0\0y", "x[U+0000, 3 times]y", 'x<span class="odd">U+0000, 3 times</span>y'),
        ("\U000e0041", "[U+E0041]", '<span class="odd">U+E0041</span>'),
    ],
)
def test_odd_characters_are_seen(given: str, text: str, markup: str) -> None:
    assert visible_text(given) == text
    assert str(visible_markup(given)) == markup


@pytest.mark.parametrize("made", ["folder", "clip", "link", "text", "nowhere", "device"])
def test_a_path_that_would_do_harm_is_refused(
    tmp_path: Path, trajectory: Trajectory, clips: tuple[Path, Path], made: str
) -> None:
    paths = {"folder": tmp_path, "clip": clips[0], "link": tmp_path / "link", "text": tmp_path / "t.jsonl"}
    (tmp_path / "link").symlink_to(clips[1])
    (tmp_path / "t.jsonl").write_text('{"schema_version":1}')
    path = paths.get(made, {"nowhere": tmp_path / "no" / "page.html", "device": Path("/dev/null")}.get(made))
    assert path is not None
    before = [clip.read_bytes() for clip in clips]
    with pytest.raises(InputError) as error:
        write_page(path, trajectory)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert [clip.read_bytes() for clip in clips] == before
    assert (tmp_path / "t.jsonl").read_text() == '{"schema_version":1}'


def test_a_page_is_replaced_in_one_step(
    tmp_path: Path, trajectory: Trajectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "page.html"
    assert write_page(path, trajectory, notes=["first"]) == path
    assert "first" in path.read_text("utf-8")
    write_page(path, trajectory, notes=["second"])
    assert "second" in (kept := path.read_text("utf-8"))
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(VRThinkerError, match="No space left on device"):
        write_page(path, trajectory, notes=["third"])
    assert path.read_text("utf-8") == kept


def test_a_page_must_not_be_the_trajectories_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="same file twice"):
        check_page_path(tmp_path / "x", tmp_path / "." / "x")


# The command


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_quick_judge(tmp_path_factory.mktemp("model") / "tiny")


def command(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `vrthinker judge`."""
    with pytest.raises(SystemExit) as left:
        main(["judge", *map(str, args)])
    assert isinstance(left.value.code, int)
    return (left.value.code, *capsys.readouterr())


def test_judge_writes_a_page(
    model: Path, clips: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, record = tmp_path / "page.html", tmp_path / "t.jsonl"
    options = ("--prompt", "<b>a dog", "--model", model, "--report", page, "--trajectories", record, "--json")
    code, out, err = command(capsys, *clips, *options)
    assert code == 0, err
    assert out.startswith("{")
    assert err.splitlines()[-1] == f"the episode as a page: {page}"
    (trajectory,) = load_trajectories(record)
    tree = Tree(page.read_text("utf-8"))
    assert tree.all("caption")[0].text == "<b>a dog"
    assert len(tree.all("round")) == len(trajectory.rounds)
    assert "random weights" in tree.all("note")[0].text


@pytest.mark.parametrize("where", ["folder", "clip", "trajectories", "pairs"])
def test_judge_refuses_a_bad_report_before_judging(
    clips: tuple[Path, Path], tmp_path: Path, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if where == "pairs":
        (tmp_path / "pairs.jsonl").write_text("{}")
        files = ("--pairs", tmp_path / "pairs.jsonl", "--out", tmp_path / "o")
        code, out, err = command(capsys, *files, "--model", "m", "--report", "x")
    else:
        bad = {"folder": tmp_path, "clip": clips[0], "trajectories": tmp_path / "t"}[where]
        options = ("--prompt", "x", "--trajectories", tmp_path / "t", "--report", bad)
        # The model does not exist: whoever looked at it first would say so.
        code, out, err = command(capsys, *clips, "--model", tmp_path / "none", *options)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert ("--report: goes with a single pair" if where == "pairs" else "give the page a file") in err
    assert sorted(path.name for path in tmp_path.iterdir()) == (["pairs.jsonl"] if where == "pairs" else [])


# In a browser

READ_NUMBER = """
function readNumber(video) {
  const canvas = document.createElement("canvas");
  const [height, width] = [(canvas.height = video.videoHeight), (canvas.width = video.videoWidth)];
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(video, 0, 0);
  let value = 0;
  for (let row = 0; row < 4; row++) for (let column = 0; column < 4; column++) {
    const top = Math.floor(height * row / 4), bottom = Math.floor(height * (row + 1) / 4);
    const left = Math.floor(width * column / 4), right = Math.floor(width * (column + 1) / 4);
    const y = Math.floor((bottom - top) / 4), x = Math.floor((right - left) / 4);
    const cell = context.getImageData(left + x, top + y, right - left - 2 * x, bottom - top - 2 * y).data;
    let sum = 0;
    for (let i = 0; i < cell.length; i += 4) sum += (cell[i] + cell[i + 1] + cell[i + 2]) / 3;
    value = value * 2 + (sum / (cell.length / 4) > 127 ? 1 : 0);
  }
  return value >> 4;
}
async function after(video, act, wanted) {
  const sought = new Promise((done) => video.addEventListener("seeked", done, { once: true }));
  act();
  await sought;
  // The picture may reach the screen a moment after the event: a wrong one stays wrong.
  for (let patience = 60; patience && readNumber(video) !== wanted; patience--) {
    await new Promise((done) => setTimeout(done, 50));
  }
  return readNumber(video);
}
"""


def open_page(browser: Any, path: Path, **size: int) -> None:
    browser.goto(path, **size)
    browser.evaluate(
        """Promise.all([...document.querySelectorAll("video")].map((video) =>
             video.readyState >= 2 || new Promise((done, failed) => {
               video.addEventListener("loadeddata", done);
               video.addEventListener("error", () => failed(video.error.message));
               if (video.error) failed(video.error.message);
             }))).then(() => true)"""
    )


CLICK_ALL = (
    "(async () => {"
    + READ_NUMBER
    + """
  const seen = [];
  for (const frame of document.querySelectorAll("button.frame")) {
    const { video, index, number } = frame.dataset;
    const [mine, other] = video === "1" ? [1, 2] : [2, 1];
    const player = document.querySelector(`#clip-${mine} video`);
    const elsewhere = document.querySelector(`#clip-${other} video`).currentTime;
    const shows = await after(player, () => frame.click(), Number(index));
    seen.push({
      number: Number(number), index: Number(index), shows, paused: player.paused,
      said: document.querySelector(`#clip-${mine} output`).textContent,
      moved: document.querySelector(`#clip-${other} video`).currentTime !== elsewhere,
      current: frame.getAttribute("aria-current"),
    });
  }
  return seen;
})()"""
)


@pytest.mark.parametrize("kind", ["playable", "copied"])
def test_clicking_a_frame_shows_it_in_its_clip(
    browser: Any, trajectory: Trajectory, tmp_path: Path, kind: str
) -> None:
    if kind == "copied":
        first = make_clip(tmp_path / "v.mkv", 12, codec="hevc", pts=VARIABLE)
        second = make_clip(tmp_path / "g.gif", 9, codec="gif", fps=10)
        trajectory = judged((first, second), [asks("2, 5, 6, 7, 12, 15"), DONE])
    open_page(browser, write_page(tmp_path / "page.html", trajectory))
    seen = browser.evaluate(CLICK_ALL)
    shown = [showing for r in trajectory.rounds for showing in (*r.live, *r.expired)]
    assert {frame["number"] for frame in seen} == {showing[1] for showing in shown}
    for frame in seen:
        assert frame["shows"] == frame["index"], frame
        assert frame["paused"]
        assert not frame["moved"]
        assert frame["current"] == "true"
        assert frame["said"].startswith(f"frame {frame['number']} ")
    assert browser.complaints() == []
    assert browser.requests() == [(tmp_path / "page.html").as_uri()]


ONE_CLOCK = """
(async () => {
  const told = () => [...document.querySelectorAll(".clip output")].map((one) => one.textContent);
  const bar = document.querySelector(".both");
  const [back, on] = bar.querySelectorAll("button[data-step]");
  const seen = [];
  for (let step = 0; step < 4; step++) { on.click(); seen.push(told()); }
  back.click();
  seen.push(told());
  const players = [...document.querySelectorAll("video")];
  for (const player of players) player.muted = true;  // browsers play sound only for people
  const started = Promise.all(
    players.map((player) => new Promise((done) => player.addEventListener("playing", done, { once: true })))
  );
  // Where the machine is busy, one may be at its end before the other has begun.
  const over = Promise.race(
    players.map((player) => new Promise((done) => player.addEventListener("ended", done, { once: true })))
  );
  bar.querySelector(".play").click();
  await Promise.race([started, over]);
  const range = bar.querySelector("input");
  range.value = 1000;
  range.dispatchEvent(new Event("input"));
  seen.push(told());
  return [seen, players.every((player) => player.paused), bar.querySelector("output").textContent];
})()
"""


@pytest.mark.slow  # it plays two clips, for which a browser on a busy machine takes its time
def test_one_clock_moves_both_clips(browser: Any, trajectory: Trajectory, tmp_path: Path) -> None:
    open_page(browser, write_page(tmp_path / "page.html", trajectory))
    seen, paused, clock = browser.evaluate(ONE_CLOCK)
    assert paused
    # The first clip has 8 frames a second, the second 25: a step goes to where the next of either begins.
    numbers = [[int(text.split()[1]) for text in both] for both in seen]
    second = N_1 + 1
    assert numbers[:4] == [[1, second + 1], [1, second + 2], [1, second + 3], [2, second + 3]]
    assert numbers[4] == [1, second + 3]
    assert numbers[5] == [N_1, N_1 + N_2], "the end of the longer one, and the last frame of the shorter one"
    assert clock == f"{(N_1 - 1) / 8:.3f} s"
    assert browser.complaints() == []


def test_clips_lie_side_by_side_where_there_is_room(
    browser: Any, trajectory: Trajectory, tmp_path: Path
) -> None:
    page = write_page(tmp_path / "page.html", trajectory)
    for width, beside in ((390, False), (1024, True), (1440, True), (2400, True)):
        open_page(browser, page, width=width, height=900)
        tops = browser.evaluate(
            "[...document.querySelectorAll('video')].map((v) => v.getBoundingClientRect().top)"
        )
        assert (tops[0] == tops[1]) == beside, width


def test_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
    clips = [make_clip(tmp_path / folder / "1.mp4", 9, size=(64, 96)) for folder in ("x", "y")]
    html = render_page(judged((clips[0], clips[1]), [DONE]))
    assert ">x/1.mp4</bdi>" in html
    assert ">y/1.mp4</bdi>" in html
    assert str(tmp_path) not in html


def test_without_a_script_the_page_still_shows_frames_and_clips(
    browser: Any, trajectory: Trajectory, tmp_path: Path
) -> None:
    page = write_page(tmp_path / "page.html", trajectory)
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    browser.goto(page)
    browser.call("Emulation.setScriptExecutionDisabled", value=False)
    frames, with_picture = browser.evaluate(
        """(() => {
          const all = [...document.querySelectorAll(".still")];
          const shown = all.filter((node) => getComputedStyle(node).backgroundImage.startsWith("url(") &&
            node.clientWidth > 50 && node.clientHeight > 30);
          return [all.length, shown.length];
        })()"""
    )
    assert frames == with_picture > 0
    assert browser.evaluate("[...document.querySelectorAll('video')].every((video) => video.controls)")
    assert browser.evaluate("document.querySelector('.controls').hidden")


def test_steps_timeline_and_speed(browser: Any, trajectory: Trajectory, tmp_path: Path) -> None:
    open_page(browser, write_page(tmp_path / "page.html", trajectory))
    script = (
        "(async () => {"
        + READ_NUMBER
        + """
  const clip = document.getElementById("clip-1");
  const player = clip.querySelector("video");
  const step = (by, to) => after(player, () => clip.querySelector(`button[data-step="${by}"]`).click(), to);
  const seen = [await step("1", 1), await step("1", 2), await step("-1", 1)];
  const bar = clip.querySelector(".timeline");
  const box = bar.getBoundingClientRect();
  const at = { buttons: 1, clientX: box.left + box.width * 20.5 / 32, clientY: box.top + 5, bubbles: true };
  seen.push(await after(player, () => bar.dispatchEvent(new PointerEvent("pointerdown", at)), 20));
  const speed = clip.querySelector("select");
  speed.value = "0.25";
  speed.dispatchEvent(new Event("change"));
  return [...seen, player.playbackRate, clip.querySelector("output").textContent, player.controls];
})()"""
    )
    assert browser.evaluate(script) == [1, 2, 1, 20, 0.25, "frame 21 · 2.500 s", False]


def test_on_a_phone_the_clip_comes_into_view_and_back(
    browser: Any, trajectory: Trajectory, tmp_path: Path
) -> None:
    open_page(browser, write_page(tmp_path / "page.html", trajectory), width=390, height=800)
    script = """(async () => {
      const frame = document.querySelector('#round-3 .frame[data-number="50"]');
      frame.focus();
      frame.scrollIntoView({ block: "center" });
      const player = document.querySelector("#clip-2 video");
      const visible = (node) => {
        const box = node.getBoundingClientRect();
        return box.top >= 0 && box.bottom <= innerHeight;
      };
      const before = [visible(frame), visible(player)];
      frame.click();
      await new Promise((done) => player.addEventListener("seeked", done, { once: true }));
      const during = [visible(frame), visible(player)];
      document.querySelector("#clip-2 .back").click();
      return [before, during, [visible(frame), visible(player)], document.activeElement === frame];
    })()"""
    assert browser.evaluate(script) == [[True, False], [False, True], [True, False], True]


def test_hostile_text_does_not_run(browser: Any, clips: tuple[Path, Path], tmp_path: Path) -> None:
    trajectory, truth = hostile(clips)
    page = write_page(tmp_path / "page.html", trajectory, notes=[EVIL], truth=truth)
    open_page(browser, page)
    assert browser.evaluate("document.title").startswith("No verdict: \"'><script>document.title='owned'")
    assert browser.evaluate("document.querySelectorAll('script').length") == 2
    assert browser.evaluate("document.querySelectorAll('img').length") == 0
    assert browser.evaluate("getComputedStyle(document.querySelector('h1')).display") == "block"
    assert browser.complaints() == []
    assert browser.requests() == [page.as_uri()]


def test_even_a_script_that_got_in_would_not_run(browser: Any, page: str, tmp_path: Path) -> None:
    injected = tmp_path / "injected.html"
    attack = "<script>document.title='owned'</script><p style='color:red' onclick='x()'>x</p>"
    injected.write_text(page.replace("<header>", attack + "<header>"), "utf-8")
    open_page(browser, injected)
    assert browser.evaluate("document.title") == "Video 1 is better: a dog"
    assert len([c for c in browser.complaints() if "Content Security Policy" in c]) >= 2
    # The page's own script and styles do run.
    assert browser.evaluate("document.querySelector('.controls').hidden") is False


@pytest.mark.parametrize("width", [320, 390, 700, 1280])
@pytest.mark.parametrize("content", ["plain", "hostile"])
def test_nothing_overflows(
    browser: Any, trajectory: Trajectory, clips: tuple[Path, Path], tmp_path: Path, width: int, content: str
) -> None:
    truth = Truth({"TA": 1, "VQ": 2, "MQ": 2, "OA": 1})
    if content == "hostile":
        trajectory, truth = hostile(clips)
    open_page(browser, write_page(tmp_path / "page.html", trajectory, truth=truth), width=width, height=800)
    over = browser.evaluate(
        """[...document.querySelectorAll("body *")].filter((node) => {
             const box = node.getBoundingClientRect();
             return box.width && !node.closest("svg, .badge, .mark span") && box.right > innerWidth + 0.5;
           }).map((node) => node.className || node.tagName)"""
    )
    assert over == []
    assert browser.evaluate("document.documentElement.scrollWidth") == width


def test_light_and_dark(browser: Any, trajectory: Trajectory, tmp_path: Path) -> None:
    open_page(browser, write_page(tmp_path / "page.html", trajectory))
    script = """["body", ".meta", "h2.of-1", "h2.of-2", "h3"].map((name) => [
      getComputedStyle(document.querySelector(name)).color,
      getComputedStyle(document.body).backgroundColor])"""
    for scheme in ("light", "dark"):
        media = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.call("Emulation.setEmulatedMedia", features=media)
        for ink, paper in browser.evaluate(script):
            dark = luminance(paper) < 0.2
            assert dark == (scheme == "dark")
            low, high = sorted((luminance(ink), luminance(paper)))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (scheme, ink, paper)  # WCAG AA
    browser.call("Emulation.setEmulatedMedia", features=[])


def luminance(color: str) -> float:
    """Relative luminance of `rgb(r, g, b)`, as WCAG defines it."""
    linear = []
    for value in re.findall(r"\d+", color)[:3]:
        share = int(value) / 255
        linear.append(share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4)
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
