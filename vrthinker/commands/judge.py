"""`vrthinker judge` judges one pair on the terminal, or a file of pairs into a results file."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from vrthinker.commands.options import Flag, option
from vrthinker.errors import InputError
from vrthinker.visibility import MemoryMode

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vrthinker.data.pairs import Pair
    from vrthinker.judge import Judge, Verdict
    from vrthinker.records.verdict_log import VerdictLog


@dataclass(frozen=True)
class JudgeCommand:
    """Judge which of two clips is better, or every pair of a file.

    One pair: vrthinker judge A.mp4 B.mp4 --prompt "a dog runs" --model M

    Many pairs: vrthinker judge --pairs pairs.jsonl --out verdicts.jsonl --model M
    """

    videos: Annotated[tyro.conf.Positional[tuple[Path, ...]], option("A B")] = ()
    """The two clips: files, or folders of images."""
    prompt: Annotated[str | None, option("TEXT")] = None
    """The caption that both clips were made from."""
    model: Annotated[str | None, option("M")] = None
    """A checkpoint folder, a hub id, or nano (for synthetic clips); with --endpoint, a name on the server."""
    pairs: Annotated[Path | None, option("FILE")] = None
    """Judge every pair of this JSONL file: {"id", "prompt", "video_1", "video_2", ...}."""
    out: Annotated[Path | None, option("FILE")] = None
    """Write the verdicts of --pairs to this file, one JSON line each. A killed run continues there."""
    retry_failed: Flag = False
    """Judge pairs again that are in --out without a judgment."""
    trajectories: Annotated[Path | None, option("FILE")] = None
    """Append the full record of each episode to this JSONL file."""
    report: Annotated[Path | None, option("FILE")] = None
    """Write an HTML page about the episode of a single pair: both clips, and what each round saw and said."""
    json: Flag = False
    """Print JSON instead of a table."""
    window: Annotated[int | Literal["all"] | None, option("ROUNDS")] = None
    """How many rounds a retrieved frame stays visible, or "all". The checkpoint's own by default."""
    rounds: Annotated[int | None, option("N")] = None
    """The most rounds of an episode. The checkpoint's own by default."""
    frames: Annotated[int | None, option("N")] = None
    """The frames of the first input, half of them from each clip. The checkpoint's own by default."""
    max_round_tokens: Annotated[int | None, option("N")] = None
    """The most tokens that one round may write. The checkpoint's own by default."""
    memory: Annotated[MemoryMode | None, option("rerender|evict|renumber")] = None
    """How expired frames are removed. By default as in training; another mode is another policy."""
    temperature: Annotated[float | None, option("T")] = None
    """The sampling temperature; 0 is greedy. The checkpoint's own by default."""
    seed: int = 0
    """The seed of sampling."""
    max_fps: Annotated[float | None, option("FPS")] = None
    """The most frames per second that are numbered. All frames by default."""
    max_pixels: Annotated[int | None, option("N")] = None
    """The most pixels of a frame. The checkpoint's own by default."""
    dataset: Annotated[str | None, option("NAME")] = None
    """The dataset whose names of the dimensions a single pair's prompt uses. The checkpoint's by default."""
    tolerate_truncation: Flag = False
    """If a clip breaks half-way, judge the frames before the break. The verdict says so."""
    guided: Annotated[bool | None, option("True|False")] = None
    """Force rounds into the grammar, for models that do not keep to it. The checkpoint's own by default."""
    templates: Annotated[Path | None, option("FOLDER")] = None
    """A folder of prompt templates to use instead of the checkpoint's."""
    device: Annotated[str | None, option("DEVICE")] = None
    """cpu, cuda, cuda:1. By default a GPU if there is one."""
    dtype: Annotated[Literal["float32", "bfloat16", "float16"] | None, option("TYPE")] = None
    """float32, bfloat16 or float16. bfloat16 on a GPU and float32 on a CPU by default."""
    batch_size: int = 8
    """The number of episodes that advance together."""
    endpoint: Annotated[str | None, option("URL")] = None
    """Judge through the OpenAI-compatible server at this address, with the API key in OPENAI_API_KEY."""

    def run(self) -> int:
        """Judges; returns the exit code."""
        if self.model is None:
            raise InputError(
                "--model: missing; give a checkpoint folder or hub id (nano: for the synthetic world only)"
            )
        if self.pairs is not None:
            return self._judge_file()
        if len(self.videos) != 2 or self.prompt is None:
            got = f"{len(self.videos)} clips and {'a' if self.prompt is not None else 'no'} --prompt"
            raise InputError(f"judge: got {got}, wanted two clips with a --prompt, or --pairs with --out")
        if self.out is not None:
            raise InputError("--out: goes with --pairs; for one pair use --json or --trajectories")
        # Clips are checked first, so that nobody waits for a model to load before a clip is refused.
        from vrthinker.video.open import open_reader

        for video in self.videos:
            open_reader().probe(video, tolerate_truncation=self.tolerate_truncation)
        if self.report is not None:
            from vrthinker.report.page.page import check_page_path

            check_page_path(self.report, *self.videos, *([self.trajectories] if self.trajectories else []))
        if self.trajectories is not None:
            from vrthinker.records.trajectories import check_trajectories_file

            check_trajectories_file(self.trajectories, *self.videos)
        with self._judge() as judge:
            verdict = judge(self.prompt, *self.videos, dataset=self.dataset, seed=self.seed)
        if self.trajectories is not None:
            from vrthinker.episode.trajectory import dump_line
            from vrthinker.records.trajectories import append_trajectory

            append_trajectory(self.trajectories, dump_line(verdict.trajectory))
        show_verdict(verdict, as_json=self.json)
        if self.report is not None:
            self._write_page(self.report, verdict)
        return 0 if verdict.judgments is not None else 1

    def _write_page(self, path: Path, verdict: Verdict) -> None:
        from vrthinker.evals.world_truth import find_truth
        from vrthinker.report.page.page import write_page
        from vrthinker.report.terminal import plain

        sys.stdout.flush()  # the verdict is printed, whatever happens to the page
        truth = find_truth(*self.videos)
        write_page(path, verdict.trajectory, notes=verdict.notes, truth=truth)
        sys.stderr.write(f"the episode as a page: {plain(str(path))}\n")

    def _judge_file(self) -> int:
        if self.videos or self.prompt is not None or self.dataset is not None:
            raise InputError("--pairs: goes without clips, --prompt and --dataset; the file holds them")
        if self.report is not None:
            raise InputError("--report: goes with a single pair; with --pairs, keep --trajectories")
        if self.out is None or self.pairs is None:
            raise InputError("--pairs: wants --out, the file that verdicts are written to")
        from vrthinker.data.pairs import load_pairs
        from vrthinker.judge_file import run_configuration
        from vrthinker.records.trajectories import check_trajectories_file
        from vrthinker.records.verdict_log import VerdictLog

        pairs = load_pairs(self.pairs)
        if self.trajectories is not None:
            clips = {clip for pair in pairs for clip in (pair.video_1, pair.video_2)}
            check_trajectories_file(self.trajectories, self.pairs, self.out, *clips)
        with self._judge() as judge:
            run, ignored = run_configuration(judge, pairs_file=self.pairs, seed=self.seed)
            return self._judge_pairs(judge, pairs, VerdictLog(self.out, run, ignore=ignored))

    def _judge_pairs(self, judge: Judge, pairs: Sequence[Pair], opened: VerdictLog) -> int:
        from vrthinker.judge_file import judge_file
        from vrthinker.report.terminal import FileProgress

        with opened as log:
            if self.retry_failed:
                log.drop_failed()
            pending = len(log.pending([pair.id for pair in pairs]))
            with FileProgress(len(pairs), done=len(pairs) - pending) as progress:
                judge_file(
                    judge,
                    pairs,
                    log,
                    seed=self.seed,
                    trajectories=self.trajectories,
                    on_record=progress.record,
                    on_wait=progress.wait,
                )
            wanted = {pair.id for pair in pairs}
            return progress.summarise(
                [record for record in log.records() if record.id in wanted], opened.path, as_json=self.json
            )

    def _judge(self) -> Judge:
        from vrthinker.judge import Judge

        assert self.model is not None
        overrides: dict[str, Any] = {
            "max_rounds": self.rounds,
            "initial_frames": self.frames,
            "max_round_tokens": self.max_round_tokens,
            "memory": self.memory,
            "temperature": self.temperature,
            "max_fps": self.max_fps,
            "guided": self.guided,
            "tolerate_truncation": self.tolerate_truncation or None,
        }
        overrides = {name: value for name, value in overrides.items() if value is not None}
        if self.window is not None:
            overrides["window"] = None if self.window == "all" else self.window
        common = {"templates": self.templates, "max_pixels": self.max_pixels, **overrides}
        if self.batch_size < 1:
            raise InputError(f"--batch-size: got {self.batch_size}, allowed: at least 1")
        if self.endpoint is not None:
            options = {"concurrency": self.batch_size, "max_sessions": self.batch_size}
            return Judge.from_endpoint(self.endpoint, self.model, engine_options=options, **common)
        return Judge.from_pretrained(
            self.model, device=self.device, dtype=self.dtype, batch_size=self.batch_size, **common
        )


def show_verdict(verdict: Verdict, *, as_json: bool) -> None:
    """Prints a verdict to stdout, as a table or as its record in JSON."""
    from vrthinker.report.terminal import print_verdict

    if as_json:
        sys.stdout.write(verdict.record(verdict.trajectory.id).model_dump_json(indent=2) + "\n")
    else:
        print_verdict(verdict.trajectory, verdict.notes)
