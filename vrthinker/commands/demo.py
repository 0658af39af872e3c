"""`vrthinker demo` runs the nano judge on a pair of the synthetic world whose first frames mislead.

Nothing is downloaded: the clips are generated, and the judge ships with the package. The truth is known
because the defects were planted.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from vrthinker.commands.options import Flag, announce, option
from vrthinker.errors import InputError

if TYPE_CHECKING:
    from vrthinker.verdict import Verdict
    from vrthinker.world.world import Difficulty, PairTruth

_DEMO_SEED = 900_000
"""The first seed of demos. It differs from all seeds of nano's training and of evaluations."""
_FRAMES = {"easy": 0, "medium": 0, "hard": 400}
"""The fewest frames that both clips of a demo have together."""


@dataclass(frozen=True)
class DemoCommand:
    """Judge a generated pair whose first frames mislead, show the truth, and write the evidence page."""

    out: Annotated[Path | None, option("FOLDER")] = None
    """Keep the clips, the truth, the record and the page in this folder. Only the page is kept by default."""
    page: Annotated[Path | None, option("FILE")] = None
    """The file of the page. vrthinker-demo.html by default, in the current folder or in --out."""
    seed: int = 0
    """The seed of the pair. Another seed gives another pair."""
    difficulty: Literal["easy", "medium", "hard"] = "easy"
    """How hard the pair is. In medium and hard, one look is not enough: what decides is found by the second
    or third call; hard has 400 frames and more."""
    json: Flag = False
    """Print JSON instead of a table."""

    def run(self) -> int:
        """Runs the demo; returns 1 if the overall verdict is wrong."""
        import tempfile

        if self.seed < 0:
            raise InputError(f"--seed: got {self.seed}, allowed: 0 and above")
        page = self.page or (self.out or Path()) / "vrthinker-demo.html"
        if self.out is not None:
            return self._run(page, self.out)
        with tempfile.TemporaryDirectory(prefix="vrthinker-demo-") as folder:
            return self._run(page, Path(folder))

    def _run(self, page: Path, clips: Path) -> int:
        from vrthinker.episode.trajectory import dump_line
        from vrthinker.evals.world_truth import findings_of
        from vrthinker.records.trajectories import append_trajectory
        from vrthinker.report.terminal import plain, print_episode, print_truth

        announce("loading nano; the demo takes half a minute on a slow machine")
        demo = run_demo(page, clips, self.seed, self.difficulty)
        if self.json:
            sys.stdout.write(demo.as_json() + "\n")
        else:
            print_episode(demo.verdict.trajectory, demo.verdict.notes, findings_of(demo.verdict.trajectory))
            print_truth(demo.verdict.judgments, demo.truth.judgments, demo.facts)
        if self.out is not None:
            append_trajectory(clips / "trajectories.jsonl", dump_line(demo.verdict.trajectory))
            sys.stderr.write(f"kept in {plain(str(clips))}: both clips, truth.jsonl, trajectories.jsonl\n")
        sys.stderr.write(f"the episode as a page, open it in a browser: {plain(str(page))}\n")
        return 0 if demo.right else 1


@dataclass(frozen=True)
class Demo:
    """The result of the demo.

    Attributes:
        truth: The truth of the pair.
        verdict: The verdict of the judge.
        page: The evidence page.
        right: Whether the overall judgment is right.
        by_looking: Whether a tool call showed a planted defect that none of the first frames shows.
    """

    truth: PairTruth
    verdict: Verdict
    page: Path
    right: bool
    by_looking: bool

    @property
    def facts(self) -> tuple[str, ...]:
        """The planted events, a line each."""
        from vrthinker.world.words import DEFECT_WORDS

        offsets = (1, 1 + self.truth.clips[0].n_frames)
        lines = []
        for video, (clip, offset) in enumerate(zip(self.truth.clips, offsets, strict=True), start=1):
            for event in clip.events:
                if event.defects:
                    what = ", ".join(DEFECT_WORDS[defect].strip() for defect in event.defects)
                    first, last = offset + event.first_index, offset + event.end_index - 1
                    seen = "none of the first frames shows it" if event.hidden else "a first frame shows it"
                    lines.append(f"video {video}, frames {first} to {last}: {what} ({seen})")
        return tuple(lines)

    def as_json(self) -> str:
        """The verdict's record, the truth, and the path of the page."""
        import json

        record = self.verdict.record(self.truth.id)
        values = {
            "verdict": record.model_dump(mode="json"),
            "truth": self.truth.judgments.as_dict(),
            "right": self.right,
            "by_looking": self.by_looking,
            "page": str(self.page),
        }
        return json.dumps(values, indent=2)


def demo_pair(seed: int, difficulty: Difficulty = "easy") -> PairTruth:
    """The first pair of a seed whose first frames mislead: by them alone, the overall judgment differs.

    In `medium` and `hard` it still differs after one call into the first marked gaps, and is right after
    three.
    """
    from vrthinker.episode.dimensions import Preference
    from vrthinker.world.truth_reader import count, look_at_hints
    from vrthinker.world.world import PRESETS, sample_pair

    config = PRESETS[difficulty]
    misleading, enough = ((0,), 2) if difficulty == "easy" else ((0, 1), 3)
    for index in itertools.count():
        pair = sample_pair(config, _DEMO_SEED + seed, index, "demo")
        overall = pair.judgments.OA
        if overall is Preference.TIE or sum(clip.n_frames for clip in pair.clips) < _FRAMES[difficulty]:
            continue
        seen = {calls: count(pair, look_at_hints(pair, config, calls)).OA for calls in (*misleading, enough)}
        if seen[enough] == overall and all(seen[calls] != overall for calls in misleading):
            return pair
    raise AssertionError("unreachable")


def run_demo(
    page: Path, clips: Path, seed: int = 0, difficulty: Difficulty = "easy", model: str = "nano"
) -> Demo:
    """Makes the pair of a seed, judges it, and writes the evidence page.

    Args:
        page: The HTML file to write.
        clips: The folder for the two clips.
        seed: The seed of the pair.
        difficulty: The difficulty of the pair.
        model: The judge's model.

    Raises:
        InputError: A path cannot be written to.
    """
    from vrthinker.evals.world_truth import findings_of, page_truth
    from vrthinker.judge import Judge
    from vrthinker.report.page.page import check_page_path, write_page
    from vrthinker.world.files import load_pairs_of, write_pairs
    from vrthinker.world.truth_reader import hidden_events_seen

    truth = demo_pair(seed, difficulty)
    write_pairs(clips, [truth])
    check_page_path(page)
    (pair,) = load_pairs_of(clips)
    with Judge.from_pretrained(model, device="cpu", batch_size=1) as judge:
        verdict = judge(pair.prompt, pair.video_1, pair.video_2, seed=seed)
    write_page(
        page,
        verdict.trajectory,
        notes=verdict.notes,
        truth=page_truth(truth),
        findings=findings_of(verdict.trajectory),
    )
    return Demo(
        truth=truth,
        verdict=verdict,
        page=page,
        right=verdict.overall == truth.judgments.OA,
        by_looking=hidden_events_seen(truth, verdict.frames_seen) > 0,
    )
