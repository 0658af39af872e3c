"""The demo: the nano judge on a pair of the synthetic world that cannot be judged from its first frames.

Nothing is downloaded: the clips are generated, the judge ships with the package. The truth is known because
it was planted. Also here: `make_tiny_judge`, a checkpoint with random weights for tests and for trying the
machinery; its verdicts are random, and everything that prints them says so.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vrthinker.episode.prompts import PromptTemplates
from vrthinker.episode.settings import PROMPTS_FOLDER, SETTINGS_FILE, EpisodeSettings, JudgeSettings
from vrthinker.video.resize import ResizeSettings

if TYPE_CHECKING:
    from vrthinker.data.world import PairTruth
    from vrthinker.judge import Verdict

Family = Literal["qwen2.5-vl", "qwen3-vl"]

RANDOM_NOTE = "random weights: the verdict is random"
_DEMO_SEED = 900_000
"""Apart from the seeds that nano was trained on, and from those of evaluations."""
_PATCH_SIZES = {"qwen2.5-vl": 14, "qwen3-vl": 16}


def make_tiny_judge(out: Path, family: Family, seed: int = 0) -> Path:
    """Writes a tiny random checkpoint with tokenizer, processor, judge settings and prompt templates.

    Its rounds are guided (`EpisodeSettings.guided`): random weights do not hold the form by themselves.

    Args:
        out: A folder that does not exist yet or is empty.
        family: Which transformers class.
        seed: Of the weights; equal seeds give equal files.

    Raises:
        InputError: The folder holds something.
    """
    from vrthinker.engine.hf.tiny import make_tiny

    folder = make_tiny(out, family, seed)
    patch = _PATCH_SIZES[family]
    settings = JudgeSettings(
        resize=ResizeSettings(
            patch_size=patch, merge_size=2, min_pixels=(2 * patch) ** 2, max_pixels=16 * (2 * patch) ** 2
        ),
        episode=EpisodeSettings(guided=True, max_rounds=3, max_round_tokens=256),
        note=RANDOM_NOTE,
    )
    PromptTemplates.load().save(folder / PROMPTS_FOLDER)
    (folder / SETTINGS_FILE).write_text(settings.model_dump_json(indent=2) + "\n", "utf-8")
    return folder


@dataclass(frozen=True)
class Demo:
    """What the demo did.

    Attributes:
        truth: The pair, as planted.
        verdict: The judge's.
        page: The evidence page.
        right: The overall judgment is right.
        by_looking: A tool call showed a planted defect that none of the first frames shows.
    """

    truth: PairTruth
    verdict: Verdict
    page: Path
    right: bool
    by_looking: bool

    @property
    def facts(self) -> tuple[str, ...]:
        """What was planted, a line each."""
        from vrthinker.data.world_words import DEFECT_WORDS

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
        """The verdict's record, the truth, and where the page is."""
        import json

        from vrthinker.judge_file import verdict_record

        record = verdict_record(self.verdict, self.truth.id)
        values = {
            "verdict": record.model_dump(mode="json"),
            "truth": self.truth.judgments.as_dict(),
            "right": self.right,
            "by_looking": self.by_looking,
            "page": str(self.page),
        }
        return json.dumps(values, indent=2)


def demo_pair(seed: int) -> PairTruth:
    """The first pair of a seed whose first frames mislead: what they show gives another overall judgment."""
    from vrthinker.data.world import PRESETS, sample_pair
    from vrthinker.data.world_reader import count, first_seen
    from vrthinker.episode.dimensions import Preference

    for index in itertools.count():
        pair = sample_pair(PRESETS["easy"], _DEMO_SEED + seed, index, "demo")
        overall = pair.judgments.OA
        if overall is not Preference.TIE and overall != count(pair, first_seen(pair)).OA:
            return pair
    raise AssertionError("unreachable")


def run_demo(page: Path, clips: Path, seed: int = 0, model: str = "nano") -> Demo:
    """Makes the pair of a seed, judges it, and writes the evidence page.

    Args:
        page: The HTML file to write.
        clips: A folder for the two clips.
        seed: Which pair.
        model: The judge.

    Raises:
        InputError: A path cannot be written to.
    """
    from vrthinker.data.world_files import load_pairs_of, write_pairs
    from vrthinker.data.world_reader import hidden_events_seen
    from vrthinker.evals.world_truth import page_truth
    from vrthinker.judge import Judge
    from vrthinker.report.page import check_page_path, write_page

    truth = demo_pair(seed)
    write_pairs(clips, [truth])
    check_page_path(page)
    (pair,) = load_pairs_of(clips)
    with Judge.from_pretrained(model, device="cpu", batch_size=1) as judge:
        verdict = judge(pair.prompt, pair.video_1, pair.video_2, seed=seed)
    write_page(page, verdict.trajectory, notes=verdict.notes, truth=page_truth(truth))
    return Demo(
        truth=truth,
        verdict=verdict,
        page=page,
        right=verdict.overall == truth.judgments.OA,
        by_looking=hidden_events_seen(truth, verdict.frames_seen) > 0,
    )
