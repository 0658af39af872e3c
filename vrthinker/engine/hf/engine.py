"""The transformers engine: many sessions advance together over one preallocated cache.

Every session has a memory mode (method section 3, docs/memory.md):

- `rerender`: the context of a round is the stored ids without the expired frames, at fresh contiguous
  positions. What the cache holds before the first removed frame is reused; everything after it is prefilled
  again.
- `evict`: the expired frames' rows are freed in place, for all sessions and layers in one call. Only new
  tokens are prefilled.
- `renumber`: like `evict`, but the remaining keys are also rotated, so that positions are contiguous again.

Scheduling: `collect` prefills what was submitted since the last call. Then it decodes all sessions that are
writing, one token a step, until at least one round is finished. Sessions join and leave the batch between
steps.

The engine is not thread-safe: call its methods from one thread.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vrthinker.engine.base import (
    Engine,
    FinishReason,
    Message,
    RoundRequest,
    RoundResult,
    Session,
    WatchedToken,
)
from vrthinker.engine.hf.checkpoint import resolve_checkpoint, unloadable
from vrthinker.engine.hf.context import Context
from vrthinker.engine.hf.features import FeatureCache
from vrthinker.engine.hf.markup import Markup
from vrthinker.engine.hf.model import VisionLanguageModel
from vrthinker.engine.hf.rows import SessionRows
from vrthinker.engine.hf.sampling import Draw, FormCursor, round_uniforms, sample
from vrthinker.engine.hf.session import RoundState, SessionState
from vrthinker.engine.sessions import SessionTable
from vrthinker.errors import EngineError, InputError, VRThinkerError
from vrthinker.visibility import MemoryMode

_FORWARD_ERRORS = (RuntimeError, IndexError, ValueError)
"""Errors that a forward can raise: out of memory (a RuntimeError), shapes that do not fit, bad numbers."""


class HFEngine(Engine):
    """Sessions over a Qwen2.5-VL or Qwen3-VL checkpoint.

    Args:
        model: The checkpoint folder or hub id, or a loaded model. A loaded model is used as it is and never
            changed, so that a policy can write rounds between two steps of its training. Whoever moves its
            weights must not use an engine that was made before (or calls `update_weights`, which copies).
        device: The device: `cpu`, `cuda`, `cuda:1`. By default a GPU if there is one. A loaded model has its
            own: None.
        dtype: The dtype: `float32`, `bfloat16` or `float16`. By default bfloat16 on a GPU, float32 on a CPU.
            A loaded model has its own: None.
        max_sessions: The most sessions that may be open at once.
        max_context_tokens: The most tokens of context and text of one session (or the model's own limit, if
            that is lower).
        prefix_reuse: Whether `rerender` reuses the cache before the first removed frame. If False, every
            round's whole context is prefilled.
        prefill_tokens: The most tokens of one prefill forward.
        feature_cache_bytes: The most bytes of encoded frames that are kept between rounds.
        keep_logits: Whether to return every step's logits (for tests and drift reports; they take much
            memory).

    Raises:
        InputError: The checkpoint cannot be loaded, or an option is out of range.
    """

    def __init__(
        self,
        model: str | Path | VisionLanguageModel,
        *,
        device: str | None = None,
        dtype: str | None = None,
        max_sessions: int = 16,
        max_context_tokens: int = 32_768,
        prefix_reuse: bool = True,
        prefill_tokens: int = 4096,
        feature_cache_bytes: int = 2 << 30,
        keep_logits: bool = False,
    ) -> None:
        if max_sessions < 1 or prefill_tokens < 1 or max_context_tokens < 2:
            raise InputError(
                f"max_sessions, prefill_tokens, max_context_tokens: got {max_sessions}, {prefill_tokens}, "
                f"{max_context_tokens}; allowed: at least 1, 1, 2"
            )
        if isinstance(model, VisionLanguageModel):
            if device is not None or dtype is not None:
                raise InputError(
                    f"device, dtype: got {device}, {dtype}, allowed for a loaded model: None, it has its own"
                )
            self.model, where = model, model.device
        else:
            where = _device(device)
            self.model = VisionLanguageModel(
                resolve_checkpoint(model), device=where, dtype=_dtype(dtype, where)
            )
        try:
            self.markup = Markup(self.model.tokenizer, self.model.vocabulary_size)
            self.vocabulary = self.markup.vocabulary(where)
        except (
            Exception
        ) as error:  # a tokenizer's settings are untrusted: its first use may provoke any error
            raise unloadable(self.model.folder, error) from None
        self.features = FeatureCache(self.model, feature_cache_bytes)
        self.max_context_tokens = min(max_context_tokens, self.model.max_positions)
        self._name = f"hf:{self.model.folder.name}"
        self._prefix_reuse, self._prefill_tokens, self._keep_logits = (
            prefix_reuse,
            prefill_tokens,
            keep_logits,
        )
        self._policy_version = 0
        self._sessions: SessionTable[SessionState] = SessionTable(max_sessions)
        self._rows = SessionRows(
            self.model,
            self.markup,
            self.features,
            most_rows=max_sessions,
            prefill_tokens=prefill_tokens,
        )
        self._queued: list[SessionState] = []
        self._finished: list[RoundResult] = []

    @property
    def name(self) -> str:
        """The engine's name: `hf:` and the checkpoint folder's name."""
        return self._name

    @property
    def policy_version(self) -> int:
        """The version that the last `update_weights` gave; 0 before."""
        return self._policy_version

    @property
    def max_sessions(self) -> int:
        """The most sessions that may be open at once."""
        return self._sessions.max_sessions

    def open(self, messages: Sequence[Message], *, seed: int = 0, memory: MemoryMode = "rerender") -> Session:
        """Starts a session. Nothing is computed until its first round.

        Raises:
            EngineError: `max_sessions` are open, the engine is shut down, or the model's rotary embedding
                cannot be renumbered.
        """
        if memory == "renumber" and (obstacle := self.model.renumber_obstacle):
            raise EngineError(f"memory: got 'renumber', allowed with this model: rerender, evict; {obstacle}")
        factor = self.model.patch_size * self.model.merge_size
        context = Context(self.markup, (factor, factor), memory)
        context.append_messages(messages)
        return self._sessions.add(SessionState(context, seed))

    def fork(self, session: Session, seeds: Sequence[int]) -> list[Session]:
        """Copies a session that has written nothing yet. The context is prefilled once, the cache row copied.

        Raises:
            EngineError: The session is not open or has begun, there is no room, or its context cannot be
                computed.
            VideoError: One of its frames does not decode.
        """
        parent = self._sessions.check_fork(session, len(seeds))
        children: list[Session] = []
        try:
            if parent.filled < len(parent.context):
                self.features.get([piece.segment for _, piece in self._rows.new_frames(parent)])
                self._rows.prefill([parent])
            for seed in seeds:
                child = SessionState(parent.context.clone(), seed)
                children.append(self._sessions.add(child))
                row = self._rows.enter(child, len(child.context) + 1)
                assert parent.row is not None
                self._rows.cache.copy_row(parent.row, row, parent.filled)
                child.filled = child.context.cached = parent.filled
        except _FORWARD_ERRORS as error:
            for forked in children:
                self.close(forked)
            raise EngineError(f"fork: session {session.id}: {_one_line(error)}") from error
        return children

    def submit(self, request: RoundRequest) -> None:
        """Queues a round (see `Engine.submit`).

        Raises:
            EngineError: The session is not open, it has a round under way, or an earlier round failed under
                `evict` or `renumber`, where a lost cache cannot be recomputed.
            ValueError: An expired frame is not in the context.
        """
        state = self._sessions.check_submit(request.session)
        number = self._sessions.rounds(request.session) + 1
        self._check_request(state, request, number)
        context, limits = state.context, request.limits
        cursor = None
        if limits.form is not None:
            cursor = FormCursor(limits.form, self.markup.encode_option, self.markup.turn_end)
        self._enter(state, request, number)
        self._sessions.begin_round(request.session)
        # Under `evict`, positions go on as if no frame had expired, and the model's limit is one on
        # positions.
        taken = max(len(context), context.next_position)
        budget = min(limits.max_tokens, self.max_context_tokens - taken)
        state.writing = RoundState(
            session=request.session,
            limits=limits,
            budget=budget,
            uniforms=iter(round_uniforms(state.seed, number, 2 * limits.max_tokens + 1)),
            cursor=cursor,
            prompt_tokens=len(context),
            prefilled_tokens=len(context) - context.cached,
        )
        state.writing.watch, state.writing.unwatched = self.markup.single_tokens(limits.watch)
        if budget < 1:
            error = f"context: {taken} tokens, allowed: fewer than {self.max_context_tokens}"
            self._fail(state, error, FinishReason.CONTEXT)
        else:
            self._queued.append(state)

    def collect(self, timeout_seconds: float | None = None) -> list[RoundResult]:
        """Runs until at least one round is finished or the timeout has passed (see `Engine.collect`)."""
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        stepped = False
        while not self._finished and not (stepped and deadline is not None and time.monotonic() >= deadline):
            stepped = True
            if self._queued:
                self._admit()
            elif any(state.writing is not None for state in self._rows.rows):
                self._decode_step()
            else:
                break
        finished, self._finished = self._finished, []
        for result in finished:
            self._sessions.end_round(result.session)
        return finished

    def close(self, session: Session) -> None:
        """Frees a session; the last cache row moves to the place of its row. Closing twice is harmless.

        Raises:
            EngineError: The session was never opened here.
        """
        state = self._sessions.close(session)
        if state is None:
            return
        self._queued = [queued for queued in self._queued if queued is not state]
        self._finished = [result for result in self._finished if result.session != session]
        self._rows.leave(state)

    def free_caches(self) -> None:
        """Frees the memory of the cache and of the features, between two uses.

        Raises:
            EngineError: Sessions are open, or the engine is shut down.
        """
        self._sessions.check_update_weights()
        self._free()

    def shutdown(self) -> None:
        """Closes every session and frees the memory of the cache and of the features."""
        for session in self._sessions.open_sessions:
            self.close(session)
        self._sessions.shut_down()
        self._free()

    def _free(self) -> None:
        self._rows.cache = self.model.new_cache()
        self.features.clear()

    def update_weights(
        self, named_tensors: Iterable[tuple[str, Any]] | Mapping[str, Any], policy_version: int
    ) -> None:
        """Replaces weights in place and drops all encoded frames.

        Raises:
            EngineError: Sessions are open, the engine is shut down, a name is unknown, or a shape differs.
        """
        self._sessions.check_update_weights()
        self.model.load_tensors(named_tensors)
        self.features.clear()
        self._policy_version = policy_version

    # Entering a round

    @staticmethod
    def _check_request(state: SessionState, request: RoundRequest, number: int) -> None:
        """Refuses a request that does not fit the session's next round, which has this number (from 1)."""
        session = request.session
        if number > 1 and not request.new:
            raise EngineError(f"submit: session {session.id}: a later round needs new messages")
        if request.expired and number == 1:
            raise EngineError(f"submit: session {session.id}: frames expire before its first round")
        if state.failed and state.context.memory != "rerender":
            raise EngineError(f"submit: session {session.id}: a round failed, and its cache is lost")

    def _enter(self, state: SessionState, request: RoundRequest, number: int) -> None:
        """Removes expired frames from the context, ends the previous turn, and appends the new messages."""
        context = state.context
        state.freed = context.expire(request.expired)
        if number > 1:
            context.close_turn(state.last_id)
        if request.new:
            context.append_messages(request.new)
        if not self._prefix_reuse and context.memory == "rerender":
            context.cached = 0
        # At least one token is computed, for the logits that the first sampled token is drawn from.
        context.cached = min(context.cached, len(context) - 1)
        if not state.freed:
            state.filled = context.cached

    # Prefill

    def _admit(self) -> None:
        """Evicts, prefills the queued sessions in groups and samples each one's first token."""
        queued, self._queued = self._queued, []
        evicting = [state for state in queued if state.freed]
        try:
            self._rows.evict(evicting)
        except (VRThinkerError, *_FORWARD_ERRORS) as error:
            for state in evicting:
                self._fail(state, _one_line(error))
            queued = [state for state in queued if state.writing is not None]
        waiting = sorted(queued, key=lambda state: state.to_prefill)
        while waiting:
            group = [waiting.pop(0)]
            while waiting:
                if waiting[0].to_prefill * (len(group) + 1) > self._prefill_tokens:
                    break
                group.append(waiting.pop(0))
            ready = self._with_frames(group)
            if not ready:
                continue
            try:
                logits = self._rows.prefill(ready)
            except _FORWARD_ERRORS as error:
                for state in ready:
                    self._fail(state, _one_line(error))
                continue
            self._take(ready, logits)

    def _with_frames(self, group: list[SessionState]) -> list[SessionState]:
        """Loads and encodes the frames of a group. Only a session whose frame does not decode fails."""
        ready = []
        for state in group:
            try:
                self.features.get([piece.segment for _, piece in self._rows.new_frames(state)])
            except (VRThinkerError, OSError, *_FORWARD_ERRORS) as error:
                self._fail(state, _one_line(error))
            else:
                ready.append(state)
        return ready

    # Decoding

    def _decode_step(self) -> None:
        """Decodes one token for every session that is writing."""
        try:
            states, logits = self._rows.decode()
        except _FORWARD_ERRORS as error:
            for state in self._rows.rows:
                if state.writing is not None:
                    self._fail(state, _one_line(error))
            return
        self._take(states, logits)

    def _take(self, states: list[SessionState], logits: torch.Tensor) -> None:
        """Samples one kept token per session from its logits; finishes rounds that end with it."""
        finite = torch.isfinite(logits).all(-1).tolist()
        for state, is_finite in zip(states, finite, strict=True):
            if not is_finite:
                self._fail(state, f"logits that are not finite; try another dtype than {self.model.dtype}")
        todo = [index for index, is_finite in enumerate(finite) if is_finite]
        while todo:
            rounds = [states[index].writing for index in todo]
            draws = [
                Draw(w.limits.temperature, w.limits.top_p, next(w.uniforms), w.cursor)
                for w in rounds
                if w is not None
            ]
            tokens, logprobs = sample(logits[todo], draws, self.vocabulary)
            again = []
            for index, token, logprob in zip(todo, tokens, logprobs, strict=True):
                if not self._accept(states[index], token, logprob, logits[index]):
                    again.append(index)
            todo = again

    def _accept(self, state: SessionState, token: int, logprob: float, logits: torch.Tensor) -> bool:
        """Takes a token. False if it only ended a free part, and the same logits have to give another."""
        writing = state.writing
        assert writing is not None
        if writing.cursor is not None and not writing.cursor.advance(token):
            return False
        if token in writing.watch:
            writing.watched.append((len(writing.ids), tuple(logits[list(writing.watch)].float().tolist())))
        writing.ids.append(token)
        writing.logprobs.append(logprob)
        if self._keep_logits:
            writing.logits.append(logits.float().cpu())
        ended = writing.cursor.done if writing.cursor is not None else token == self.markup.turn_end
        if ended:
            writing.finish = FinishReason.STOP
        elif len(writing.ids) >= writing.budget:
            full = writing.budget < writing.limits.max_tokens
            writing.finish = FinishReason.CONTEXT if full else FinishReason.LENGTH
        if writing.finish is not None:
            self._finish(state)
        return True

    def _finish(self, state: SessionState, error: str | None = None) -> None:
        writing = state.writing
        assert writing is not None
        assert writing.finish is not None
        if writing.finish is FinishReason.CONTEXT and error is None:
            error = f"context: reached {self.max_context_tokens} tokens"
        state.context.append_round(writing.ids)
        state.context.cached = state.filled
        state.last_id = writing.ids[-1] if writing.ids else None
        state.writing = None
        self._finished.append(
            RoundResult(
                session=writing.session,
                text=self.markup.decode(writing.ids),
                finish_reason=writing.finish,
                token_ids=tuple(writing.ids),
                logprobs=tuple(writing.logprobs),
                prompt_tokens=writing.prompt_tokens,
                prefilled_tokens=writing.prefilled_tokens,
                watched=self._watched(writing) if writing.watch else None,
                unwatched=writing.unwatched,
                error=error,
                logits=torch.stack(writing.logits) if writing.logits else None,
            )
        )

    def _watched(self, writing: RoundState) -> tuple[WatchedToken, ...]:
        """The watched tokens with their places in the text. They are ASCII, so no character is cut there."""
        found, start, before = [], 0, 0
        for place, scores in writing.watched:
            start += len(self.markup.decode(writing.ids[before:place]))
            before = place
            found.append(WatchedToken(start, scores))
        return tuple(found)

    def _fail(self, state: SessionState, error: str, finish: FinishReason = FinishReason.ERROR) -> None:
        assert state.writing is not None
        state.writing.finish = finish
        if state.row is not None:
            self._rows.cache.clear_row(state.row)
        self._finish(state, error)
        state.filled = state.context.cached = 0
        state.freed, state.failed = [], True


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device: got {name!r}, allowed: cpu, cuda, cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device: got {name!r}, but torch sees no GPU here; `vrthinker doctor` says why")
    return device


def _dtype(name: str | None, device: torch.device) -> torch.dtype:
    allowed = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in allowed:
        raise InputError(f"dtype: got {name!r}, allowed: {', '.join(allowed)}")
    return allowed[name]


def _one_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
