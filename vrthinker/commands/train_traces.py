"""`vrthinker train traces` lets a teacher judge pairs, and keeps the episodes that are fit to learn from."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from vrthinker.commands.judges import JudgeSource, endpoint_extra
from vrthinker.commands.options import Flag, check_device, option
from vrthinker.errors import InputError
from vrthinker.progress import Progress, counted

if TYPE_CHECKING:
    from vrthinker.engine.base import Engine
    from vrthinker.judge import Judge
    from vrthinker.judge_configuration import JudgeConfiguration
    from vrthinker.records.verdicts import VerdictRecord
    from vrthinker.train.replies import StoredReplies
    from vrthinker.train.teacher import Collection


@dataclass(frozen=True)
class TracesCommand:
    """Let a teacher judge labelled pairs, and keep its episodes that are well formed and right.

    A server: vrthinker train traces --pairs pairs.jsonl --out TRACES --endpoint URL --model NAME --like M

    A checkpoint: vrthinker train traces --pairs pairs.jsonl --out TRACES --model M

    The oracle of a synthetic world: vrthinker train traces --oracle WORLD --out TRACES --like M

    The same command continues a run that was stopped; nothing that was answered is asked again.
    """

    out: Annotated[Path, option("FOLDER")]
    """The folder for the episodes. What is kept of them is in FOLDER/traces.jsonl."""
    pairs: Annotated[Path | None, option("FILE")] = None
    """The pairs to judge, with their labels."""
    endpoint: Annotated[str | None, option("URL")] = None
    """The address of an OpenAI-compatible server, with the API key in OPENAI_API_KEY."""
    model: Annotated[str | None, option("M")] = None
    """The teacher: a checkpoint folder or hub id; with --endpoint, its name on the server."""
    oracle: Annotated[Path | None, option("WORLD")] = None
    """The oracle of this world folder is the teacher, which reads the stored truth."""
    like: Annotated[str | None, option("M")] = None
    """Ask with the prompts, frame sizes and limits of the checkpoint that will learn from the traces."""
    endpoint_extra: Annotated[str | None, option("JSON")] = None
    """Fields to add to each request, as a JSON object; null leaves a field out that the server refuses."""
    samples: Annotated[int, option("N")] = 1
    """The number of episodes per pair. 1 by default."""
    temperature: Annotated[float | None, option("T")] = None
    """The sampling temperature. By default 1 for several samples, else the checkpoint's own."""
    guided: Flag = False
    """Let the grammar guide a checkpoint that does not keep to the form by itself, such as a base model."""
    keep_order: Flag = False
    """Judge the clips in the order of the file. By default the order of each episode is drawn."""
    price_input: Annotated[float | None, option("PRICE")] = None
    """The price of a million prompt tokens, for the account."""
    price_output: Annotated[float | None, option("PRICE")] = None
    """The price of a million written tokens, for the account."""
    rounds: Annotated[int | None, option("N")] = None
    """The most rounds of an episode. The checkpoint's own by default."""
    max_round_tokens: Annotated[int | None, option("N")] = None
    """The most tokens that one round may write. The checkpoint's own by default."""
    max_pixels: Annotated[int | None, option("N")] = None
    """The most pixels of a frame. The checkpoint's own by default."""
    templates: Annotated[Path | None, option("FOLDER")] = None
    """A folder of prompt templates to use instead of the checkpoint's."""
    batch_size: int = 8
    """The number of episodes, and of requests to a server, that are under way together."""
    seed: int = 0
    """The seed of the orders and of sampling."""
    device: Annotated[str | None, option("DEVICE")] = None
    """cpu, cuda, cuda:1. By default a GPU if there is one."""
    dtype: Annotated[Literal["float32", "bfloat16", "float16"] | None, option("TYPE")] = None
    """float32, bfloat16 or float16. bfloat16 on a GPU and float32 on a CPU by default."""
    json: Flag = False
    """Print JSON instead of a table."""

    def run(self) -> int:
        """Collects traces; returns 1 if nothing is kept, or if episodes are left to be tried again."""
        self._check_options()
        from vrthinker.data.pairs import load_pairs
        from vrthinker.train.teacher import PAIRS, REPLIES, collect, select, write_selection
        from vrthinker.train.trials import check_clips, make_trials
        from vrthinker.world.files import PAIRS_FILE

        pairs_file = self.pairs if self.oracle is None else self.oracle / PAIRS_FILE
        assert pairs_file is not None
        if pairs_file.resolve() == (self.out / PAIRS).resolve():
            raise InputError(f"--out: {self.out}: would replace {pairs_file}; choose another folder")
        pairs = load_pairs(pairs_file)
        check_clips(pairs, pairs_file)
        trials = make_trials(pairs, samples=self.samples, seed=self.seed, swap=not self.keep_order)
        teacher = self._teacher(self.out / REPLIES)
        shown = _Shown(len(trials))
        with shown, teacher:
            collect(
                teacher.configured,
                teacher.load,
                trials,
                self.out,
                seed=self.seed,
                run=teacher.run,
                on_start=shown.start,
                on_record=shown.record,
                on_wait=shown.wait,
            )
        collection = select(trials, self.out)
        account = None
        if teacher.replies is not None:
            account = teacher.replies.account(self.price_input, self.price_output).as_json()
        write_selection(collection, self.out, account)
        self._show(collection, account)
        return 1 if collection.failed or not collection.selection.traces else 0

    def _check_options(self) -> None:
        teachers = [name for name in ("endpoint", "oracle") if getattr(self, name) is not None]
        if len(teachers) == 2:
            raise InputError("--oracle: goes without --endpoint; give one teacher")
        if self.oracle is not None:
            for name in ("pairs", "model"):
                if getattr(self, name) is not None:
                    raise InputError(f"--{name}: goes without --oracle, whose world has its pairs")
            if self.like is None:
                raise InputError(
                    "--like: missing; name the checkpoint that will learn, because the oracle has no prompts "
                    "and sizes of its own"
                )
        else:
            if self.pairs is None:
                raise InputError("--pairs: missing; give the labelled pairs to judge, or --oracle WORLD")
            if self.model is None:
                raise InputError("--model: missing; name the teacher, a checkpoint or a model on --endpoint")
            if self.like is not None and self.endpoint is None:
                raise InputError("--like: goes with --endpoint or --oracle; a checkpoint has its own prompts")
        if self.guided and (self.endpoint is not None or self.oracle is not None):
            raise InputError("--guided: goes with a checkpoint as the teacher, given by --model alone")
        check_device(self.device)
        endpoint_extra(self.endpoint_extra, self.endpoint)
        for name, value, least in (
            ("--samples", self.samples, 1),
            ("--batch-size", self.batch_size, 1),
            ("--seed", self.seed, 0),
            ("--price-input", self.price_input, 0),
            ("--price-output", self.price_output, 0),
        ):
            if value is not None and not least <= value < float("inf"):
                raise InputError(f"{name}: got {value}, allowed: at least {least}, finite")
        for name in ("price_input", "price_output"):
            if getattr(self, name) is not None and self.endpoint is None:
                raise InputError(f"--{name.replace('_', '-')}: goes with --endpoint")
        if self.temperature == 0 and self.samples > 1 and self.oracle is None:
            raise InputError(
                f"--samples: got {self.samples} with temperature 0, which writes the same text each time; "
                "give a --temperature above 0"
            )

    def _overrides(self) -> dict[str, Any]:
        temperature = 1.0 if self.temperature is None and self.samples > 1 else self.temperature
        given = {
            "templates": self.templates,
            "max_pixels": self.max_pixels,
            "temperature": temperature,
            "max_rounds": self.rounds,
            "max_round_tokens": self.max_round_tokens,
        }
        # Cold start learns texts, whatever distribution they come from. Stages that learn from a policy's own
        # samples need samples that no grammar guided.
        return {name: value for name, value in given.items() if value is not None} | {"guided": self.guided}

    def _teacher(self, replies_file: Path) -> _Teacher:
        run: dict[str, Any] = {"keep_order": self.keep_order}
        if self.endpoint is None and self.oracle is None:
            assert self.model is not None
            source = JudgeSource(
                self.model,
                device=self.device,
                dtype=self.dtype,
                batch_size=self.batch_size,
                overrides=self._overrides(),
            )
            return _Teacher(source.configuration(), source.load, run | {"weights": source.weights()})
        from vrthinker.judge import Judge
        from vrthinker.judge_configuration import JudgeConfiguration

        if self.oracle is not None:
            engine = _oracle(self.oracle, self.batch_size)
            replies = None
        else:
            assert self.endpoint is not None
            assert self.model is not None
            from vrthinker.engine.endpoint.engine import EndpointEngine
            from vrthinker.train.replies import StoredReplies

            replies = StoredReplies(replies_file)
            extra = endpoint_extra(self.endpoint_extra, self.endpoint)
            run |= extra
            engine = EndpointEngine(
                self.endpoint,
                self.model,
                concurrency=self.batch_size,
                max_sessions=self.batch_size,
                memory=replies,
                **extra,
            )
        asked: JudgeConfiguration
        if self.like is not None:
            # A server keeps no cache that frames could leave.
            memory = {"memory": "rerender"} if self.endpoint is not None else {}
            asked = Judge.configuration_of(self.like, **(self._overrides() | memory))
        else:
            assert self.endpoint is not None
            assert self.model is not None
            with Judge.from_endpoint(self.endpoint, self.model, **self._overrides()) as judge:
                asked = judge.configuration
        configured = JudgeConfiguration(engine.name, asked.settings, asked.templates)

        def load() -> Judge:
            return Judge(engine, asked.settings, templates=asked.templates)

        return _Teacher(configured, load, run, replies, engine)

    def _show(self, collection: Collection, account: Mapping[str, Any] | None) -> None:
        from vrthinker.train.teacher import TRACES

        selection = collection.selection
        if self.json:
            found = {
                "asked": len(collection.trials),
                "kept": len(selection.traces),
                "dropped": selection.reasons,
                "unchecked_judgments": collection.unchecked,
                "left": len(collection.failed),
                "account": account,
            }
            sys.stdout.write(json.dumps(found, indent=2) + "\n")
            return
        lines = [f"kept {len(selection.traces)} of {counted(len(collection.trials), 'episode')}"]
        lines[0] += f" in {self.out / TRACES}"
        if selection.reasons:
            lines.append("why the others are not kept")
            width = max(map(len, selection.reasons))
            lines += [f"  {reason:{width}}  {count:6}" for reason, count in selection.reasons.items()]
        lines.append(f"judgments without a label, which were not checked: {collection.unchecked}")
        if account is not None:
            cost = "" if account["cost"] is None else f", cost {account['cost']:.4g}"
            uncounted = account["uncounted"]
            without = "" if not uncounted else f" ({counted(uncounted, 'reply')} without a count)"
            lines.append(
                f"answered: {counted(account['requests'], 'request')}, {account['prompt_tokens']} prompt "
                f"tokens and {account['completion_tokens']} written tokens{without}{cost}"
            )
        if collection.failed:
            failed = counted(len(collection.failed), "episode")
            lines.append(f"{failed} failed and can be tried again: give the same command again")
        sys.stdout.write("".join(f"{line}\n" for line in lines))


@dataclass(frozen=True)
class _Teacher:
    """A teacher, which is shut down at the end of a `with` block.

    Attributes:
        configured: What its verdicts depend on.
        load: A function that loads it.
        run: Further values that its verdicts depend on.
        replies: A server's replies.
        engine: Its engine, if it is made before it is loaded.
    """

    configured: JudgeConfiguration
    load: Callable[[], Judge]
    run: Mapping[str, Any]
    replies: StoredReplies | None = None
    engine: Engine | None = None

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        if self.engine is not None:
            self.engine.shutdown()


class _Shown(Progress):
    """The progress of a collection."""

    def __init__(self, total: int) -> None:
        super().__init__()
        self._total, self._count, self._waiting = total, 0, False

    def start(self, recorded: int) -> None:
        self._count = recorded
        if recorded:
            self.say(f"{recorded} of {counted(self._total, 'episode')} recorded already")

    def record(self, record: VerdictRecord) -> None:
        self._count += 1
        line = f"{self._count} of {counted(self._total, 'episode')}"
        self.show("traces", self._count, self._total, line=line, every=max(1, self._total // 20))

    def wait(self, waiting: int) -> None:
        if not self._waiting:
            self.say(f"waiting for {counted(waiting, 'episode')} of other processes")
        self._waiting = True


def _oracle(folder: Path, sessions: int) -> Any:
    from pydantic import ValidationError

    from vrthinker.bounded_files import read_json
    from vrthinker.errors import first_problem
    from vrthinker.world.files import WORLD_FILE, load_truths
    from vrthinker.world.oracle import OracleEngine, truths_by_clip
    from vrthinker.world.world import WorldConfig

    truths = load_truths(folder)
    stored = read_json(folder / WORLD_FILE)
    try:
        world = WorldConfig.model_validate(stored["world"] if isinstance(stored, dict) else stored)
    except (ValidationError, KeyError) as error:
        problem = first_problem(error) if isinstance(error, ValidationError) else "it has no world"
        raise InputError(f"{folder / WORLD_FILE}: {problem}; make the world again") from None
    return OracleEngine(truths_by_clip(folder, truths), span=world.span[0], max_sessions=sessions)
