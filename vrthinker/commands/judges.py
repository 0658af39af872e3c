"""The judge that a command's options name: a checkpoint or a model on a server, configured or loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from vrthinker.bounded_files import parse_json
from vrthinker.commands.options import announce
from vrthinker.errors import InputError

if TYPE_CHECKING:
    from vrthinker.judge import Judge
    from vrthinker.judge_configuration import JudgeConfiguration, LocalEngine
    from vrthinker.video.open import ReaderName
    from vrthinker.video.reader import VideoReader

EngineName = Literal["hf", "vllm", "endpoint"]


def endpoint_extra(option: str | None, endpoint: str | None) -> dict[str, Any]:
    """The options of an endpoint's engine that `--endpoint-extra` gives.

    Raises:
        InputError: It is no JSON object, it goes without `--endpoint`, or it sets what the engine sets.
    """
    if option is None:
        return {}
    if endpoint is None:
        raise InputError("--endpoint-extra: goes with --endpoint")
    extra = parse_json(option, "--endpoint-extra")
    if not isinstance(extra, dict):
        raise InputError(
            f"--endpoint-extra: got {type(extra).__name__}, allowed: a JSON object of fields, like "
            '\'{"max_tokens": null, "max_completion_tokens": 2048}\''
        )
    return {"extra_body": extra}


@dataclass(frozen=True)
class JudgeSource:
    """Where a judge comes from.

    Attributes:
        model: The checkpoint folder or hub id; for the engine `endpoint`, the model's name on the server.
        engine: What runs the model. None: `endpoint` if there is one, else `hf`.
        endpoint: The address of an OpenAI-compatible server, or for `vllm` of a `vllm serve`.
        endpoint_options: Further options of the server's engine (`EndpointEngine`).
        device: The device of a checkpoint.
        dtype: The dtype of a checkpoint.
        batch_size: The number of episodes that advance together.
        overrides: The settings that the judge gets instead of its own (`Judge.configuration_of`).
        reader: The name of the video reader (`vrthinker.video.open.open_reader`).
    """

    model: str
    engine: EngineName | None = None
    endpoint: str | None = None
    endpoint_options: Mapping[str, Any] = field(default_factory=dict)
    device: str | None = None
    dtype: str | None = None
    batch_size: int = 8
    overrides: Mapping[str, Any] = field(default_factory=dict)
    reader: ReaderName = "auto"

    def __post_init__(self) -> None:
        if self.engine == "endpoint" and self.endpoint is None:
            raise InputError("--engine endpoint: wants --endpoint, the address of the server")
        if self.engine == "hf" and self.endpoint is not None:
            raise InputError("--engine hf: goes without --endpoint; allowed with it: endpoint, vllm")
        if self.engine == "vllm" and self.endpoint_options:
            raise InputError(
                "--endpoint-extra: goes with --engine endpoint; vllm's requests have fixed fields"
            )

    @property
    def is_remote(self) -> bool:
        """Whether nothing of the model is on this machine."""
        return self.endpoint is not None and self.engine != "vllm"

    @cached_property
    def video_reader(self) -> VideoReader:
        """What decodes clips, for the command and for the judge, so that no clip is opened twice."""
        from vrthinker.video.open import open_reader

        return open_reader(self.reader)

    def configuration(self) -> JudgeConfiguration:
        """What verdicts depend on. A checkpoint that cannot be used is refused here, before torch loads."""
        from vrthinker.judge import Judge

        if self.is_remote:
            with self.load() as judge:
                return judge.configuration
        return Judge.configuration_of(self.model, engine=self._local, **self.overrides)

    def weights(self) -> str | None:
        """A fingerprint of the weights; None over an endpoint, where nobody knows them."""
        from vrthinker.engine.hf.checkpoint import resolve_checkpoint, weights_fingerprint

        return None if self.is_remote else weights_fingerprint(resolve_checkpoint(self.model))

    def load(self) -> Judge:
        """The judge itself. Loading a checkpoint is said on stderr, because it takes long."""
        from vrthinker.judge import Judge

        reader = self.video_reader
        if self.is_remote:
            assert self.endpoint is not None
            sessions = {"concurrency": self.batch_size, "max_sessions": self.batch_size}
            options = {**sessions, **self.endpoint_options}
            return Judge.from_endpoint(
                self.endpoint, self.model, engine_options=options, reader=reader, **self.overrides
            )
        announce(f"loading {self.model}" + (" into vLLM" if self._local == "vllm" else ""))
        return Judge.from_pretrained(
            self.model,
            engine=self._local,
            engine_options=None if self.endpoint is None else {"server": self.endpoint},
            device=self.device,
            dtype=self.dtype,
            batch_size=self.batch_size,
            reader=reader,
            **self.overrides,
        )

    @property
    def _local(self) -> LocalEngine:
        return "vllm" if self.engine == "vllm" else "hf"
