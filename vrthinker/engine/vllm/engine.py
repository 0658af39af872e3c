"""The vLLM engine: many sessions in flight, each round posted as the token ids of its live context.

The ids of a context, its placeholders and its frames come from the same `Context` as in the transformers
engine, and so do the bans. What differs is who computes: vLLM schedules the requests, keeps what is shared in
its prefix cache, and encodes a picture once while it stays in its encoder cache. The memory mode is always
`rerender`, because nothing can be taken out of the middle of vLLM's cache.

Invariants:

- The ids that a round was written from are those that were posted, placeholders included; else it is an
error.
- `collect` never raises for what happens to vLLM. If its process or server is gone, every round under way
ends as a
  `RoundResult` with `FinishReason.ERROR` and the reason, and so does every attempt to go on.
- A round's seed is made of its session's seed and its number, so that it samples the same in any batch.

All methods must be called from one thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from vrthinker.engine.base import Engine, FinishReason, Message, RoundRequest, RoundResult, Session
from vrthinker.engine.hf.adapters import read_adapter
from vrthinker.engine.hf.checkpoint import check_size, load_config, resolve_checkpoint, unloadable
from vrthinker.engine.hf.context import Context
from vrthinker.engine.hf.frontend import load_frontend
from vrthinker.engine.hf.markup import Markup
from vrthinker.engine.sessions import SessionTable
from vrthinker.engine.vllm.generation import (
    MAX_BANNED,
    MIN_TEMPERATURE,
    EngineGone,
    Generated,
    Generation,
    Transport,
    bans_of,
    round_seed,
)
from vrthinker.engine.vllm.library import LocalOptions, chosen_dtype
from vrthinker.engine.vllm.pictures import Pictures
from vrthinker.engine.vllm.weights import WholeWeights
from vrthinker.errors import EngineError, InputError, as_reason
from vrthinker.visibility import MemoryMode


@dataclass
class VLLMUsage:
    """What was asked of vLLM so far.

    Attributes:
        rounds: The number of rounds that were sampled.
        prompt_tokens: The number of context tokens of these rounds.
        cached_tokens: The number of those that the prefix cache had.
        sampled_tokens: The number of tokens that were sampled.
    """

    rounds: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    sampled_tokens: int = 0


@dataclass
class _Round:
    request: RoundRequest
    generation: Generation
    budget: int


@dataclass
class _State:
    context: Context
    seed: int
    last_id: int | None = None
    writing: _Round | None = None


class VLLMEngine(Engine):
    """Sessions over a Qwen2.5-VL or Qwen3-VL checkpoint that vLLM runs.

    The engine is a context manager, which calls `shutdown` at its end.

    Args:
        model: The checkpoint folder or hub id.
        device: `cpu` or `cuda`, whichever the installed vLLM was built for. By default what there is.
        dtype: `float32`, `bfloat16` or `float16`. By default bfloat16 on a GPU, float32 on a CPU.
        max_sessions: The most sessions that may be open at once.
        max_context_tokens: The most tokens of context and text of one session (or the model's own limit, if
            that is lower).
        picture_cache_bytes: The most bytes of patches that are kept between rounds.
        server: The address of a `vllm serve` that runs the same checkpoint; None runs vLLM here.
        local: How vLLM is run here.

    Raises:
        InputError: vLLM is not installed, the checkpoint cannot be loaded, or an option is out of range.
        EngineError: vLLM does not start, or the server does not answer.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        device: str | None = None,
        dtype: str | None = None,
        max_sessions: int = 64,
        max_context_tokens: int = 32_768,
        picture_cache_bytes: int = 1 << 30,
        server: str | None = None,
        local: LocalOptions | None = None,
    ) -> None:
        if max_sessions < 1 or max_context_tokens < 2:
            raise InputError(
                f"max_sessions, max_context_tokens: got {max_sessions}, {max_context_tokens}; allowed: at "
                "least 1, 2"
            )
        torch_dtype = chosen_dtype(device, dtype)
        folder = resolve_checkpoint(model)
        try:
            config = load_config(folder)
            if read_adapter(folder) is not None:
                raise InputError(
                    "an adapter, allowed for vLLM: whole weights; use --engine hf, which merges it"
                )
            check_size(config, folder)
            self.frontend = load_frontend(folder, config)
            self.markup = Markup(self.frontend.tokenizer, self.frontend.vocabulary_size)
            vocabulary = self.markup.vocabulary(torch.device("cpu"))
        except BaseException as error:  # a tokenizer's panic is no Exception
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise unloadable(folder, error) from None
        banned = vocabulary.banned.nonzero()[:, 0].tolist()
        if len(banned) > MAX_BANNED:
            raise InputError(
                f"{folder}: {len(banned)} tokens may not be sampled, allowed for vLLM: up to {MAX_BANNED}; "
                "use --engine hf"
            )
        self.folder = folder
        self._name = f"vllm:{folder.name}"
        self._config = config
        self._weights: WholeWeights | None = None
        self._policy_version = 0
        self._sessions: SessionTable[_State] = SessionTable(max_sessions, name=self._name)
        self._asked = 0
        self._rounds: dict[str, Session] = {}
        self._finished: list[RoundResult] = []
        self._gone: str | None = None
        self.usage = VLLMUsage()
        self.pictures = Pictures(self.frontend, torch_dtype, picture_cache_bytes)
        limit = min(max_context_tokens, self.frontend.max_positions)
        bans, end = bans_of(banned), self.markup.turn_end
        self._transport: Transport
        if server is not None:
            from vrthinker.engine.vllm.served import ServedTransport

            self._transport = ServedTransport(
                server, self.frontend, bans=bans, end_of_turn=end, concurrency=max_sessions
            )
        else:
            from vrthinker.engine.vllm.local import LocalTransport

            self._transport = LocalTransport(
                self.frontend,
                bans=bans,
                end_of_turn=end,
                dtype=torch_dtype,
                max_requests=max_sessions,
                max_context_tokens=limit,
                options=local or LocalOptions(),
            )
        self.max_context_tokens = min(limit, self._transport.max_context_tokens)

    def __enter__(self) -> Self:
        """Returns the engine."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Shuts the engine down."""
        self.shutdown()

    @property
    def name(self) -> str:
        """The engine's name: `vllm:` and the checkpoint folder's name."""
        return self._name

    @property
    def policy_version(self) -> int:
        """The version that the last `update_weights` gave; 0 before."""
        return self._policy_version

    @property
    def max_sessions(self) -> int:
        """The most sessions that may be open at once."""
        return self._sessions.max_sessions

    @property
    def transport(self) -> Transport:
        """The way to vLLM."""
        return self._transport

    def open(self, messages: Sequence[Message], *, seed: int = 0, memory: MemoryMode = "rerender") -> Session:
        """Starts a session. Nothing is computed until its first round.

        Raises:
            EngineError: `max_sessions` are open, the engine is shut down, vLLM is gone, or `memory` is not
                `rerender`.
        """
        self._check_there()
        if memory != "rerender":
            raise EngineError(
                f"{self._name}: memory: got {memory!r}, allowed with vLLM: rerender, since nothing can be "
                "taken out "
                "of the middle of its cache; use --engine hf"
            )
        context = Context(self.markup, self.frontend.factor, memory)
        context.append_messages(messages)
        return self._sessions.add(_State(context, seed))

    def fork(self, session: Session, seeds: Sequence[int]) -> list[Session]:
        """Copies a session that has written nothing yet. What the copies share is found in the prefix cache.

        Raises:
            EngineError: The session is not open or has begun, or there is no room.
        """
        parent = self._sessions.check_fork(session, len(seeds))
        return [self._sessions.add(_State(parent.context.clone(), seed)) for seed in seeds]

    def submit(self, request: RoundRequest) -> None:
        """Queues a round. New frames are loaded here, in the caller's thread.

        Raises:
            EngineError: The request breaks the protocol or asks for what vLLM cannot do, or vLLM is gone.
            ValueError: An expired frame is not in the context.
        """
        session, limits = request.session, request.limits
        state = self._sessions.check_submit(session)
        self._check_there()
        number = self._sessions.rounds(session) + 1
        self._check_request(request, number)
        context = state.context.clone()
        context.expire(request.expired)
        if number > 1:
            context.close_turn(state.last_id)
        if request.new:
            context.append_messages(request.new)
        budget = min(limits.max_tokens, self.max_context_tokens - len(context))
        failed = None
        generation = None
        if budget < 1:
            error = f"context: {len(context)} tokens, allowed: fewer than {self.max_context_tokens}"
            failed = RoundResult(
                session, "", FinishReason.CONTEXT, (), (), prompt_tokens=len(context), error=error
            )
        else:
            try:
                self._asked += 1
                generation = Generation(
                    f"{self._asked}",
                    context.token_ids().tolist(),
                    self.pictures.of(context),
                    budget,
                    limits.temperature,
                    limits.top_p,
                    round_seed(state.seed, number),
                )
            # `load` is the caller's code and may fail in any way. That fails this round alone.
            except Exception as error:
                failed = RoundResult(session, "", FinishReason.ERROR, error=str(as_reason(error)))
        if generation is not None:
            try:
                self._transport.submit(generation)
            except EngineGone as error:
                self._gone = str(error)
                raise
            except EngineError as error:  # it refuses this request, and takes others
                failed = RoundResult(session, "", FinishReason.ERROR, error=str(error))
            else:
                state.writing = _Round(request, generation, budget)
                self._rounds[generation.id] = session
        self._sessions.begin_round(session)
        state.context = context
        if failed is not None:
            state.last_id = None
            self._finished.append(failed)

    def collect(self, timeout_seconds: float | None = None) -> list[RoundResult]:
        """Waits until at least one round is finished or the timeout has passed (see `Engine.collect`)."""
        if not self._finished and self._rounds:
            try:
                for generated in self._transport.poll(timeout_seconds):
                    self._take(generated)
            except EngineError as error:
                self._gone = str(error)
                for generation_id in list(self._rounds):
                    self._take(Generated(generation_id, error=str(error)))
        finished, self._finished = self._finished, []
        for result in finished:
            self._sessions.end_round(result.session)
        return finished

    def close(self, session: Session) -> None:
        """Closes a session and cancels its round. Closing twice is harmless.

        Raises:
            EngineError: The session was never opened here.
        """
        state = self._sessions.close(session)
        if state is None:
            return
        self._finished = [result for result in self._finished if result.session != session]
        if state.writing is not None:
            self._rounds.pop(state.writing.generation.id, None)
            if self._gone is None:
                try:
                    self._transport.cancel(state.writing.generation.id)
                except EngineError as error:
                    self._gone = str(error)

    def free_caches(self) -> None:
        """Gives memory back between two uses (with `LocalOptions.sleep`, that of weights and cache).

        Raises:
            EngineError: Sessions are open, or the engine is shut down.
        """
        self._sessions.check_update_weights()
        self.pictures.clear()
        self._transport.free_caches()

    def update_weights(
        self, named_tensors: Iterable[tuple[str, Any]] | Mapping[str, Any], policy_version: int
    ) -> None:
        """Replaces all weights and empties the prefix, picture and encoder caches.

        Raises:
            EngineError: Sessions are open, the engine is shut down, a name is unknown or missing, a shape
                differs, or vLLM is gone or on a server that cannot reload. If vLLM fails at it, weights and
                caches may be of two policies, and the engine writes no more rounds.
        """
        self._sessions.check_update_weights()
        self._check_there()
        if self._weights is None:
            self._weights = WholeWeights(self._config)
        pairs = self._weights.checked(named_tensors)
        try:
            self._transport.update_weights(pairs, policy_version)
        except EngineError as error:
            self._gone = f"{error}; its weights may be of two policies: make a new engine"
            raise
        self._policy_version = policy_version

    def shutdown(self) -> None:
        """Cancels all rounds, closes all sessions and ends vLLM. Shutting down twice is harmless."""
        for session in self._sessions.open_sessions:
            self.close(session)
        self._sessions.shut_down()
        self.pictures.clear()
        self._transport.close()

    def _check_there(self) -> None:
        if self._gone is not None:
            raise EngineError(self._gone)

    def _check_request(self, request: RoundRequest, number: int) -> None:
        """Refuses a request that does not fit the session's next round, which has this number (from 1)."""
        where = f"{self._name}: submit: session {request.session.id}"
        if number > 1 and not request.new:
            raise EngineError(f"{where}: a later round needs new messages")
        if request.expired and number == 1:
            raise EngineError(f"{where}: frames expire before its first round")
        limits = request.limits
        if limits.form is not None:
            raise EngineError(
                f"{self._name}: guided rounds are not supported with vLLM, whose grammars cannot say what a "
                "form "
                "says; use guided=false or --engine hf"
            )
        if 0 < limits.temperature < MIN_TEMPERATURE:
            raise EngineError(
                f"{self._name}: temperature: got {limits.temperature}, allowed with vLLM: 0, or "
                f"{MIN_TEMPERATURE} and "
                "above"
            )

    def _take(self, generated: Generated) -> None:
        """Takes what came back for a request into its session."""
        session = self._rounds.pop(generated.id, None)
        if session is None:
            return  # its session was closed meanwhile
        state = self._sessions[session]
        writing, state.writing = state.writing, None
        assert writing is not None
        ids, error = generated.token_ids, generated.error
        if error is None and (unusable := self.markup.unusable_id(ids)) is not None:
            error = f"{self._name}: got token {unusable}, which was banned; do not use this server"
        if error is not None:
            state.last_id = None
            self._finished.append(RoundResult(session, "", FinishReason.ERROR, error=error))
            return
        finish = FinishReason.STOP
        if not generated.stopped:
            full = writing.budget < writing.request.limits.max_tokens
            finish = FinishReason.CONTEXT if full else FinishReason.LENGTH
        prompt_tokens = len(writing.generation.token_ids)
        cached = generated.cached_tokens
        state.context.append_round(ids)
        state.last_id = ids[-1] if ids else None
        self.usage.rounds += 1
        self.usage.prompt_tokens += prompt_tokens
        self.usage.cached_tokens += cached or 0
        self.usage.sampled_tokens += len(ids)
        is_full = finish is FinishReason.CONTEXT
        self._finished.append(
            RoundResult(
                session=session,
                text=self.markup.decode(list(ids)),
                finish_reason=finish,
                token_ids=ids,
                # With a nucleus, vLLM's are those after the cut; no training may use either.
                logprobs=generated.logprobs if writing.request.limits.top_p == 1.0 else None,
                prompt_tokens=prompt_tokens,
                prefilled_tokens=None if cached is None else prompt_tokens - cached,
                error=f"context: reached {self.max_context_tokens} tokens" if is_full else None,
            )
        )
