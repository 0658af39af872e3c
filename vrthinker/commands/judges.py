"""The judge that a command's options name: a checkpoint or a model on a server, configured or loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vrthinker.bounded_files import parse_json
from vrthinker.commands.options import announce
from vrthinker.errors import InputError

if TYPE_CHECKING:
    from vrthinker.judge import Judge, JudgeConfiguration


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
        model: The checkpoint folder or hub id; with `endpoint`, the model's name on the server.
        endpoint: The address of an OpenAI-compatible server.
        endpoint_options: Further options of the server's engine (`EndpointEngine`).
        device: The device of a checkpoint.
        dtype: The dtype of a checkpoint.
        batch_size: The number of episodes that advance together.
        overrides: The settings that the judge gets instead of its own (`Judge.configuration_of`).
    """

    model: str
    endpoint: str | None = None
    endpoint_options: Mapping[str, Any] = field(default_factory=dict)
    device: str | None = None
    dtype: str | None = None
    batch_size: int = 8
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def configuration(self) -> JudgeConfiguration:
        """What verdicts depend on. A checkpoint that cannot be used is refused here, before torch loads."""
        from vrthinker.judge import Judge

        if self.endpoint is not None:
            with self.load() as judge:
                return judge.configuration
        return Judge.configuration_of(self.model, **self.overrides)

    def weights(self) -> str | None:
        """A fingerprint of the weights; None over an endpoint, where nobody knows them."""
        from vrthinker.engine.hf.checkpoint import resolve_checkpoint, weights_fingerprint

        return None if self.endpoint is not None else weights_fingerprint(resolve_checkpoint(self.model))

    def load(self) -> Judge:
        """The judge itself. Loading a checkpoint is said on stderr, because it takes long."""
        from vrthinker.judge import Judge

        if self.endpoint is not None:
            sessions = {"concurrency": self.batch_size, "max_sessions": self.batch_size}
            options = {**sessions, **self.endpoint_options}
            return Judge.from_endpoint(self.endpoint, self.model, engine_options=options, **self.overrides)
        announce(f"loading {self.model}")
        return Judge.from_pretrained(
            self.model,
            device=self.device,
            dtype=self.dtype,
            batch_size=self.batch_size,
            **self.overrides,
        )
