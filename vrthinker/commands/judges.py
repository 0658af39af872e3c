"""The judge that a command's options name: a checkpoint or a model on a server, configured or loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vrthinker.commands.options import announce

if TYPE_CHECKING:
    from vrthinker.judge import Judge, JudgeConfiguration


@dataclass(frozen=True)
class JudgeSource:
    """Where a judge comes from.

    Attributes:
        model: The checkpoint folder or hub id; with `endpoint`, the model's name on the server.
        endpoint: The address of an OpenAI-compatible server.
        device: The device of a checkpoint.
        dtype: The dtype of a checkpoint.
        batch_size: The number of episodes that advance together.
        overrides: The settings that the judge gets instead of its own (`Judge.configuration_of`).
    """

    model: str
    endpoint: str | None = None
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
            options = {"concurrency": self.batch_size, "max_sessions": self.batch_size}
            return Judge.from_endpoint(self.endpoint, self.model, engine_options=options, **self.overrides)
        announce(f"loading {self.model}")
        return Judge.from_pretrained(
            self.model,
            device=self.device,
            dtype=self.dtype,
            batch_size=self.batch_size,
            **self.overrides,
        )
