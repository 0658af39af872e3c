"""The commands, thin: parse, call the library, print.

stdout is the result, stderr is the log. Exit 0: done; 1: something failed (a judgment without a verdict
too); 2: bad input. Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from vrthinker.commands.bench import BenchCommand
from vrthinker.commands.evaluate import EvalCommand
from vrthinker.commands.train import TrainCommand
from vrthinker.commands.world import WorldCommand
from vrthinker.errors import InputError, VRThinkerError
from vrthinker.visibility import MemoryMode

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vrthinker.data.pairs import Pair
    from vrthinker.data.verdict_log import VerdictLog
    from vrthinker.judge import Judge, Verdict

Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help_behavior_hint="")]


def _option(metavar: str) -> Any:
    """An option that the checkpoint or the machine decides when it is not given."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="")


@dataclass(frozen=True)
class JudgeCommand:
    """Judge which of two clips is better, or every pair of a file.

    One pair: vrthinker judge A.mp4 B.mp4 --prompt "a dog runs" --model M

    Many pairs: vrthinker judge --pairs pairs.jsonl --out verdicts.jsonl --model M
    """

    videos: Annotated[tyro.conf.Positional[tuple[Path, ...]], _option("A B")] = ()
    """The two clips: files, or folders of images."""
    prompt: Annotated[str | None, _option("TEXT")] = None
    """The caption that both clips were made from."""
    model: Annotated[str | None, _option("M")] = None
    """A Qwen2.5-VL or Qwen3-VL checkpoint, a folder or a hub id; nano judges the synthetic world. With
    --endpoint, the server's name of it."""
    pairs: Annotated[Path | None, _option("FILE")] = None
    """Judge every pair of this JSONL file: {"id", "prompt", "video_1", "video_2", ...}."""
    out: Annotated[Path | None, _option("FILE")] = None
    """Where the verdicts of --pairs go, one JSON line each. A killed run continues where it was."""
    retry_failed: Flag = False
    """Judge the pairs again that --out holds without a judgment."""
    trajectories: Annotated[Path | None, _option("FILE")] = None
    """Append the full record of each episode to this JSONL file."""
    report: Annotated[Path | None, _option("FILE")] = None
    """Show the episode of a single pair on one HTML page: both clips, and what each round saw and said."""
    json: Flag = False
    """Print JSON instead of a table."""
    window: Annotated[int | Literal["all"] | None, _option("ROUNDS")] = None
    """How many rounds a retrieved frame stays visible, or "all". The checkpoint's own by default."""
    rounds: Annotated[int | None, _option("N")] = None
    """Most rounds of an episode. The checkpoint's own by default."""
    frames: Annotated[int | None, _option("N")] = None
    """Frames of the first input, half of them from each clip. The checkpoint's own by default."""
    max_round_tokens: Annotated[int | None, _option("N")] = None
    """Most tokens that one round may write. The checkpoint's own by default."""
    memory: Annotated[MemoryMode | None, _option("rerender|evict|renumber")] = None
    """How expired frames leave the context. The checkpoint's own by default; another is another policy."""
    temperature: Annotated[float | None, _option("T")] = None
    """0 is greedy. The checkpoint's own by default."""
    seed: int = 0
    """For sampling."""
    max_fps: Annotated[float | None, _option("FPS")] = None
    """Number at most so many frames of a second. All of them by default."""
    max_pixels: Annotated[int | None, _option("N")] = None
    """Most pixels of a frame. The checkpoint's own by default."""
    dataset: Annotated[str | None, _option("NAME")] = None
    """Whose names of the dimensions the prompt takes, for a single pair. The checkpoint's own by default."""
    tolerate_truncation: Flag = False
    """Judge a clip that breaks half-way on the frames before the break; the verdict says so."""
    guided: Annotated[bool | None, _option("True|False")] = None
    """Force rounds into their form, for models that do not hold it. The checkpoint's own by default."""
    templates: Annotated[Path | None, _option("FOLDER")] = None
    """Prompt templates instead of the checkpoint's."""
    device: Annotated[str | None, _option("DEVICE")] = None
    """cpu, cuda, cuda:1. A GPU where there is one by default."""
    dtype: Annotated[Literal["float32", "bfloat16", "float16"] | None, _option("TYPE")] = None
    """float32, bfloat16 or float16. bfloat16 on a GPU and float32 on a CPU by default."""
    batch_size: int = 8
    """Episodes that advance together."""
    endpoint: Annotated[str | None, _option("URL")] = None
    """Judge through the OpenAI-compatible server at this address; OPENAI_API_KEY holds its key."""

    def run(self) -> int:
        """Judges; see the class."""
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
        # A clip that cannot be read should not have to wait for a model to load.
        from vrthinker.video.reader import open_reader

        for video in self.videos:
            open_reader().probe(video, tolerate_truncation=self.tolerate_truncation)
        if self.report is not None:
            from vrthinker.report.page import check_page_path

            check_page_path(self.report, *self.videos, *([self.trajectories] if self.trajectories else []))
        if self.trajectories is not None:
            from vrthinker.judge_file import check_trajectories_file

            check_trajectories_file(self.trajectories, *self.videos)
        with self._judge() as judge:
            verdict = judge(self.prompt, *self.videos, dataset=self.dataset, seed=self.seed)
        if self.trajectories is not None:
            from vrthinker.judge_file import append_trajectory

            append_trajectory(self.trajectories, verdict.trajectory)
        _print(verdict, as_json=self.json)
        if self.report is not None:
            self._write_page(self.report, verdict)
        return 0 if verdict.judgments is not None else 1

    def _write_page(self, path: Path, verdict: Verdict) -> None:
        from vrthinker.evals.world_truth import find_truth
        from vrthinker.report.page import write_page
        from vrthinker.report.terminal import plain

        sys.stdout.flush()  # the verdict stands, whatever becomes of the page
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
        from vrthinker.data.verdict_log import VerdictLog
        from vrthinker.judge_file import check_trajectories_file, run_configuration

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


@dataclass(frozen=True)
class DemoCommand:
    """Judge a generated pair whose first frames mislead; show the truth, write the evidence page."""

    out: Annotated[Path | None, _option("FOLDER")] = None
    """Keep clips, truth, record and page in this folder. Only the page is kept by default."""
    page: Annotated[Path | None, _option("FILE")] = None
    """Where the page goes. vrthinker-demo.html by default, in the current folder or in --out."""
    seed: int = 0
    """Another seed, another pair."""
    json: Flag = False
    """Print JSON instead of a table."""

    def run(self) -> int:
        """Runs the demo; 1 if the overall verdict is not right."""
        import tempfile

        if self.seed < 0:
            raise InputError(f"--seed: got {self.seed}, allowed: 0 and above")
        page = self.page or (self.out or Path()) / "vrthinker-demo.html"
        if self.out is not None:
            return self._run(page, self.out)
        with tempfile.TemporaryDirectory(prefix="vrthinker-demo-") as folder:
            return self._run(page, Path(folder))

    def _run(self, page: Path, clips: Path) -> int:
        from vrthinker.demo import run_demo
        from vrthinker.judge_file import append_trajectory
        from vrthinker.report.terminal import plain, print_truth

        demo = run_demo(page, clips, self.seed)
        if self.json:
            sys.stdout.write(demo.as_json() + "\n")
        else:
            _print(demo.verdict, as_json=False, whole_episode=True)
            print_truth(demo.verdict, demo.truth.judgments, demo.facts)
        if self.out is not None:
            append_trajectory(clips / "trajectories.jsonl", demo.verdict.trajectory)
            sys.stderr.write(f"kept in {plain(str(clips))}: both clips, truth.jsonl, trajectories.jsonl\n")
        sys.stderr.write(f"the episode as a page, open it in a browser: {plain(str(page))}\n")
        return 0 if demo.right else 1


@dataclass(frozen=True)
class DoctorCommand:
    """Say what this machine has, and what is missing for what; or how far a model's numbers drift.

    vrthinker doctor
    vrthinker doctor --numerics nano
    """

    numerics: Annotated[str | None, _option("M")] = None
    """Instead: judge some pairs with this model in every memory mode, and compare the log-probabilities that
    were sampled with those of training's packed forward."""
    pairs: Annotated[Path | None, _option("FILE")] = None
    """With --numerics: a pairs file. Pairs of the synthetic world by default."""
    limit: Annotated[int, _option("N")] = 16
    """With --numerics: how many pairs. 16 by default."""
    device: Annotated[str | None, _option("DEVICE")] = None
    """With --numerics: cpu, cuda, cuda:1. A GPU where there is one by default."""
    dtype: Annotated[Literal["float32", "bfloat16"] | None, _option("DTYPE")] = None
    """With --numerics: float32 or bfloat16. bfloat16 on a GPU, float32 on a CPU by default."""
    json: Flag = False
    """Print JSON instead of a table."""

    def run(self) -> int:
        """Examines the machine; 1 if judging cannot work here."""
        from vrthinker import doctor

        if self.numerics is None:
            options = {"--pairs": self.pairs, "--device": self.device, "--dtype": self.dtype}
            if unused := [name for name, value in options.items() if value is not None]:
                raise InputError(f"{unused[0]}: allowed only with --numerics MODEL")
            return doctor.main(as_json=self.json)
        if self.limit < 1:
            raise InputError(f"--limit: got {self.limit}, allowed: at least 1")
        report = doctor.numerics(self.numerics, self.pairs, self.limit, device=self.device, dtype=self.dtype)
        if self.json:
            sys.stdout.write(report.as_json() + "\n")
        else:
            doctor.print_numerics(report)
        return 0


@dataclass(frozen=True)
class MakeTinyCommand:
    """Write a tiny random checkpoint, for tests and for trying the machinery."""

    out: Annotated[tyro.conf.Positional[Path], _option("FOLDER")]
    """The folder to write; it must not exist yet, or be empty."""
    family: Literal["qwen2.5-vl", "qwen3-vl"] = "qwen2.5-vl"
    """Which model class."""
    seed: int = 0
    """Of the weights."""

    def run(self) -> int:
        """Writes the checkpoint."""
        from vrthinker.demo import make_tiny_judge

        folder = make_tiny_judge(self.out, self.family, self.seed)
        sys.stdout.write(f"{folder}\n")
        return 0


def _print(verdict: Verdict, *, as_json: bool, whole_episode: bool = False) -> None:
    from vrthinker.judge_file import verdict_record
    from vrthinker.report.terminal import print_episode, print_verdict

    if as_json:
        sys.stdout.write(verdict_record(verdict, verdict.trajectory.id).model_dump_json(indent=2) + "\n")
    elif whole_episode:
        print_episode(verdict)
    else:
        print_verdict(verdict)


def _group(name: str, description: str) -> Any:
    """A command that has commands of its own."""
    return tyro.conf.subcommand(name, description=description, prefix_name=False)


Command = (
    Annotated[JudgeCommand, tyro.conf.subcommand("judge", prefix_name=False)]
    | Annotated[DemoCommand, tyro.conf.subcommand("demo", prefix_name=False)]
    | Annotated[WorldCommand, _group("world", "The synthetic world: clips with planted defects.")]
    | Annotated[EvalCommand, _group("eval", "Say how good a judge is, with intervals.")]
    | Annotated[TrainCommand, _group("train", "Train a judge.")]
    | Annotated[BenchCommand, tyro.conf.subcommand("bench", prefix_name=False)]
    | Annotated[DoctorCommand, tyro.conf.subcommand("doctor", prefix_name=False)]
    | Annotated[MakeTinyCommand, tyro.conf.subcommand("make-tiny", prefix_name=False)]
)

_DESCRIPTION = "A video reward model that thinks with images: which of two clips is better, and why."


def main(args: list[str] | None = None) -> None:
    """The `vrthinker` command."""
    import logging
    import os

    logging.basicConfig(level=logging.WARNING, format="vrthinker: %(message)s")
    # Read when torch loads: OpenMP threads that spin while they wait starve whatever shares the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    given = sys.argv[1:] if args is None else args
    try:
        if given == ["--version"]:
            from vrthinker import __version__

            sys.stdout.write(f"vrthinker {__version__}\n")
            sys.exit(0)
        command: Any = tyro.cli(Command, prog="vrthinker", description=_DESCRIPTION, args=given)
        code = command.run()
        sys.stdout.flush()
    except VRThinkerError as error:
        # One line, whatever a file name or a hostile file put into the message.
        line = "".join(c if c.isprintable() else " " for c in str(error))
        sys.stderr.write(f"vrthinker: {line}\n")
        code = error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("vrthinker: interrupted; what was recorded is kept\n")
        code = 130
    except BrokenPipeError:
        # The reader of stdout is gone (`| head`): leave without a traceback at shutdown.
        sys.stderr.close()
        code = 1
    sys.exit(code)


if __name__ == "__main__":
    main()
