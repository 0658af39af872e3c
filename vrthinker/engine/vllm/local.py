"""vLLM on this machine: its `LLMEngine`, stepped here, with the model in this process or in one of its own.

A core in its own process may be killed at any time. vLLM's own loop would then wait for ever, because a
killed process says nothing. So this module never waits without looking whether the core is alive.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from vrthinker.engine.hf.frontend import Frontend
from vrthinker.engine.vllm.features import as_checkpoint, image_items, placeholders
from vrthinker.engine.vllm.generation import EngineGone, Generated, Generation, Transport, sampling_fields
from vrthinker.engine.vllm.library import EXTENSION, LocalOptions, is_cpu_build
from vrthinker.errors import EngineError, InputError, one_line

Result = TypeVar("Result")
_LOOK_SECONDS = 0.05
"""How often it is looked whether a core in its own process is alive."""
_CPU_CACHE_BYTES = 1 << 30


class LocalTransport(Transport):
    """The way to a vLLM that this process runs.

    Args:
        frontend: The checkpoint, without its weights.
        bans: The biases of tokens that may not be sampled.
        end_of_turn: The token that ends a round.
        dtype: The dtype of the model.
        max_requests: The most requests under way.
        max_context_tokens: The most tokens of context and text of a request.
        options: How vLLM is run.

    Raises:
        InputError: An option is not vLLM's.
        EngineError: vLLM does not start; the message has its reason.
    """

    _in_this_process = 0
    """The number of engines whose model is in this process; they share vLLM's process groups."""

    def __init__(
        self,
        frontend: Frontend,
        *,
        bans: Mapping[int, float],
        end_of_turn: int,
        dtype: torch.dtype,
        max_requests: int,
        max_context_tokens: int,
        options: LocalOptions,
    ) -> None:
        self._bans, self._end_of_turn = bans, end_of_turn
        self._frontend, self._options = frontend, options
        self._asleep = False
        self._ids: dict[str, list[int]] = {}  # request -> its context, while it is under way
        self._engine: Any = None
        self._max_context_tokens = max_context_tokens
        groups = torch.distributed.is_available() and torch.distributed.is_initialized()
        if groups and not options.own_process and not self._in_this_process:
            raise InputError(
                "own_process: got False where torch.distributed is in use, allowed there: True; vLLM would "
                "take its process groups for its own"
            )
        try:
            self._engine = _started(frontend.folder, dtype, max_requests, max_context_tokens, options)
        except InputError:
            raise
        except Exception as error:
            said = one_line(
                str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
            )
            raise EngineError(f"vllm:{frontend.folder.name}: vLLM does not start: {said}") from error
        type(self)._in_this_process += not options.own_process
        self._client = self._engine.engine_core
        self._queue: Any = getattr(self._client, "outputs_queue", None)

    @property
    def max_context_tokens(self) -> int:
        """The most tokens of context and text of one request."""
        return min(self._max_context_tokens, int(self._engine.model_config.max_model_len))

    @property
    def engine(self) -> Any:
        """The engine of vLLM."""
        return self._engine

    @property
    def core_pids(self) -> list[int]:
        """The ids of the processes that compute, if they are not this one."""
        if self._queue is None:
            return []
        return [process.pid for process in self._client.resources.engine_manager.processes]

    def submit(self, generation: Generation) -> None:
        """Queues a request.

        Raises:
            EngineError: vLLM is gone, asleep, or refuses the request.
        """
        if self._asleep:
            raise EngineError(
                f"vllm:{self._frontend.folder.name}: asleep, without weights; call update_weights first"
            )
        from vllm.inputs.engine import mm_input, tokens_input
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        fields = sampling_fields(generation, self._bans, self._end_of_turn)
        params = SamplingParams(**fields, output_kind=RequestOutputKind.FINAL_ONLY)
        if generation.pictures:
            hashes = {"image": [picture.uuid for picture in generation.pictures]}
            items = {"image": image_items(generation.pictures)}
            if self._queue is not None:  # a picture that the core has is not sent again
                self._engine.input_processor.inject_into_mm_cache(hashes, items)
            prompt: Any = mm_input(
                generation.token_ids, items, hashes, {"image": placeholders(generation.pictures)}
            )
        else:
            prompt = tokens_input(generation.token_ids)
        with self._reasons():
            self._engine.add_request(generation.id, prompt, params)
        self._ids[generation.id] = generation.token_ids

    def poll(self, timeout_seconds: float | None) -> list[Generated]:
        """Steps until a request is finished or the time is over (at least one step)."""
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        while self._ids:
            with self._reasons():
                if self._queue is not None and not self._is_ready(deadline):
                    return []
                outputs = self._engine.step()
            done = [self._generated(output) for output in outputs if output.finished]
            if found := [generated for generated in done if generated is not None]:
                return found
            if deadline is not None and time.monotonic() >= deadline:
                return []
        return []

    def cancel(self, generation_id: str) -> None:
        """Ends a request."""
        if self._ids.pop(generation_id, None) is not None:
            with self._reasons():
                self._engine.abort_request([generation_id])

    def update_weights(self, named_tensors: Iterable[tuple[str, Any]], policy_version: int) -> None:
        """Reloads all weights in place, then empties the prefix, picture and encoder caches."""
        with self._reasons():
            if self._asleep:
                self._watched(lambda: self._engine.wake_up())
                self._asleep = False
            if self._queue is None:
                pairs = list(named_tensors)
                self._engine.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(pairs)})
            else:
                with as_checkpoint(named_tensors) as folder:
                    self._watched(
                        lambda: self._engine.collective_rpc(
                            "reload_weights", kwargs={"weights_path": str(folder)}
                        )
                    )
            self._watched(lambda: self._engine.collective_rpc("refresh_tied_head"))
            if self._watched(lambda: self._engine.reset_prefix_cache()) is False:
                raise EngineError("vLLM did not empty its prefix cache, which holds the old policy's")
            self._watched(lambda: self._engine.reset_mm_cache())
            self._watched(lambda: self._engine.reset_encoder_cache())
            self._watched(lambda: self._engine.set_weight_version(str(policy_version)))

    def free_caches(self) -> None:
        """Empties the caches; with `sleep`, gives the memory of weights and cache back too."""
        with self._reasons():
            if self._options.sleep:
                self._watched(lambda: self._engine.sleep(2))
                self._asleep = True
            else:
                self._watched(lambda: self._engine.reset_mm_cache())

    def close(self) -> None:
        """Ends vLLM."""
        engine, self._engine = self._engine, None
        if engine is None:
            return
        self._ids.clear()
        with contextlib.suppress(Exception):  # what is gone needs no end
            engine.engine_core.shutdown()
        if self._queue is None:
            del self._client
            type(self)._in_this_process -= 1
            if not self._in_this_process:
                from vllm.distributed import cleanup_dist_env_and_memory

                cleanup_dist_env_and_memory()

    def _generated(self, output: Any) -> Generated | None:
        """What a finished request came to; None if it was cancelled."""
        posted = self._ids.pop(output.request_id, None)
        if posted is None:
            return None
        if list(output.prompt_token_ids or ()) != posted:
            return Generated(output.request_id, error="vLLM read other context tokens than were posted")
        (choice,) = output.outputs
        if choice.finish_reason not in ("stop", "length"):
            return Generated(output.request_id, error=f"vLLM ended the request: {choice.finish_reason}")
        ids = tuple(int(token) for token in choice.token_ids)
        found = list(choice.logprobs or ())
        if len(found) != len(ids) or any(token not in one for token, one in zip(ids, found, strict=True)):
            # An error of this request alone: others may have finished in the same step.
            return Generated(output.request_id, error="vLLM left out log-probabilities of sampled tokens")
        logprobs = tuple(float(one[token].logprob) for token, one in zip(ids, found, strict=True))
        return Generated(
            output.request_id,
            ids,
            logprobs,
            stopped=choice.finish_reason == "stop",
            cached_tokens=output.num_cached_tokens,
        )

    def _is_ready(self, deadline: float | None) -> bool:
        """Waits until the core has said something; False if the time is over first.

        Raises:
            EngineError: The core is gone.
        """
        while True:
            with self._queue.not_empty:
                if self._queue.queue:
                    return True
                self._refuse_dead()
                left = _LOOK_SECONDS if deadline is None else min(_LOOK_SECONDS, deadline - time.monotonic())
                if left <= 0:
                    return False
                self._queue.not_empty.wait(left)

    def _refuse_dead(self) -> None:
        if self._client.resources.engine_dead:
            raise EngineGone(self._gone("was ended"))

    def _gone(self, how: str) -> str:
        return (
            f"vllm:{self._frontend.folder.name}: its process {how}; the system's log may say why (often: "
            "out of "
            "memory); run again to judge what is missing"
        )

    def _watched(self, call: Callable[[], Result]) -> Result:
        """Calls the core and waits, as long as it is alive."""
        if self._queue is None:
            return call()
        future: concurrent.futures.Future[Result] = concurrent.futures.Future()

        def run() -> None:
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)

        # A thread that waits for a dead core must not keep this process from ending.
        threading.Thread(target=run, name="vrthinker-vllm", daemon=True).start()
        while True:
            try:
                return future.result(timeout=_LOOK_SECONDS)
            except concurrent.futures.TimeoutError:
                if not future.done():
                    self._refuse_dead()

    @contextlib.contextmanager
    def _reasons(self) -> Iterator[None]:
        """Turns whatever vLLM raises into an error of one line."""
        if self._engine is None:
            raise EngineError(f"vllm:{self._frontend.folder.name}: shut down; make a new engine")
        try:
            yield
        except EngineError:
            raise
        except Exception as error:
            from vllm.v1.engine.exceptions import EngineDeadError

            if isinstance(error, EngineDeadError):
                raise EngineGone(self._gone("was ended")) from error
            said = one_line(str(error).strip().partition("\n")[0]) or type(error).__name__
            raise EngineError(f"vllm:{self._frontend.folder.name}: {said}") from error


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Sets environment variables, and sets them back."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _started(
    folder: Path, dtype: torch.dtype, max_requests: int, max_context_tokens: int, options: LocalOptions
) -> Any:
    """The engine of vLLM over a checkpoint folder."""
    from vllm.engine.arg_utils import EngineArgs

    cpu = is_cpu_build()
    arguments: dict[str, Any] = {
        "model": str(folder),
        "dtype": str(dtype).removeprefix("torch."),
        "load_format": "safetensors",
        "trust_remote_code": False,
        "generation_config": "vllm",  # what a round is sampled with is said by us alone
        "seed": 0,
        "max_model_len": max_context_tokens,
        "max_num_seqs": max_requests,
        # A prompt that is computed in parts, with a seed of its own, ends vLLM on a CPU (0.32: a CPU's
        # generator has no offset to set back). So there a step takes whole prompts.
        "enable_chunked_prefill": not cpu,
        "max_num_batched_tokens": max(
            options.max_batch_tokens, max_requests, max_context_tokens if cpu else 0
        ),
        "block_size": options.block_size,
        "enable_prefix_caching": options.prefix_caching,
        "tensor_parallel_size": options.tensor_parallel,
        "enable_sleep_mode": options.sleep,
        "logprobs_mode": "processed_logprobs",
        "limit_mm_per_prompt": {"image": max_context_tokens, "video": 0},
        "skip_mm_profiling": True,
        "worker_extension_cls": EXTENSION,
        "mm_device_do_normalize": False,  # patches come normalised
        "mm_processor_cache_gb": 4 if options.own_process else 0,
        "kv_cache_memory_bytes": options.kv_cache_bytes or (_CPU_CACHE_BYTES if cpu else None),
        "enforce_eager": cpu,
        "disable_log_stats": True,
    }
    unknown = set(options.more) - set(EngineArgs.__dataclass_fields__)
    if unknown:
        raise InputError(f"vllm: no such argument: {', '.join(sorted(unknown))}; allowed: vLLM's EngineArgs")
    # vLLM chooses between processes by this variable in places that no argument reaches.
    with _environment(VLLM_ENABLE_V1_MULTIPROCESSING="1" if options.own_process else "0"):
        return _made(EngineArgs(**{**arguments, **options.more}), options)


def _made(arguments: Any, options: LocalOptions) -> Any:
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.executor import Executor

    config = arguments.create_engine_config()
    scheduler = config.scheduler_config
    scheduler.encoder_cache_size = max(options.encoder_cache_tokens, scheduler.encoder_cache_size)
    # Pictures that do not fit into a step's budget would cut their prompt in two.
    scheduler.max_num_encoder_input_tokens = max(
        options.encoder_cache_tokens, scheduler.max_num_encoder_input_tokens
    )
    return LLMEngine(
        vllm_config=config,
        executor_class=Executor.get_class(config),
        log_stats=False,
        multiprocess_mode=options.own_process,
    )
