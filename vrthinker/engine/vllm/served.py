"""vLLM on a server: token ids in, token ids out, over the `/inference/v1/generate` of `vllm serve`.

A request has the ids of the whole context, where its pictures stand, and their patches in vLLM's own
spelling. A picture that the server has answered for is named and not sent again; should the server have
forgotten it, the request is sent once more, whole. Connection errors and the statuses 408, 409, 429 and 5xx
are tried again with growing pauses, as over an endpoint; then the round fails with the server's words.

Invariants: what comes back is checked and bounded, since a server may be anything. Requests run on an event
loop in a thread of their own, so that cancelling one closes its connection, whereupon the server ends it too.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import math
import os
import queue
import secrets
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import httpx
import numpy as np
import torch

from vrthinker.engine.base import FinishReason
from vrthinker.engine.endpoint.client import ChatClient, ChatFailure, checked_address
from vrthinker.engine.endpoint.wire import BadReply, data_uri, error_message
from vrthinker.engine.hf.frontend import Frontend
from vrthinker.engine.vllm.features import as_checkpoint, encoded_items
from vrthinker.engine.vllm.generation import Generated, Generation, Picture, Transport, sampling_fields
from vrthinker.engine.vllm.library import EXTENSION
from vrthinker.engine.vllm.replies import TokenReply, read_tokens
from vrthinker.errors import EngineError

_MAX_REPLY_BYTES = 64 << 20
_MAX_KNOWN = 100_000
"""The most pictures that are remembered as sent."""
_START = (
    "vllm serve MODEL --enable-scale-out --logprobs-mode processed_logprobs --no-mm-device-do-normalize "
    "--no-enable-chunked-prefill"
)
_SAME = 0.1
"""The most by which two ways of sending one picture may differ in a log-probability, in bfloat16."""


def generate_url(server: str) -> str:
    """The address that generations are posted to: below the server's root, which may end with /v1.

    Raises:
        InputError: The address cannot be used.
    """
    return str(_below(server, "inference/v1/generate"))


def _below(server: str, path: str) -> httpx.URL:
    url = checked_address(server)
    root = url.raw_path.partition(b"?")[0].rstrip(b"/").removesuffix(b"/v1")
    return url.copy_with(raw_path=root + b"/" + path.encode())


class ServedTransport(Transport):
    """The way to a `vllm serve`.

    Args:
        server: Its address.
        frontend: The checkpoint that it has loaded.
        bans: The biases of tokens that may not be sampled.
        end_of_turn: The token that ends a round.
        concurrency: The number of requests under way at once.
        timeout_seconds: The longest time of one attempt.
        max_retries: The most further attempts.
        backoff_seconds: The first pause before one; it doubles.

    Raises:
        InputError: The address cannot be used.
        EngineError: The server does not answer, or does not run as it has to.
    """

    def __init__(
        self,
        server: str,
        frontend: Frontend,
        *,
        bans: Mapping[int, float],
        end_of_turn: int,
        concurrency: int,
        timeout_seconds: float = 600.0,
        max_retries: int = 3,
        backoff_seconds: float = 0.5,
    ) -> None:
        self._server, self._bans, self._end_of_turn = server, bans, end_of_turn
        self._name = f"vllm:{frontend.folder.name}"
        self._client = ChatClient(
            server,
            None,
            timeout_seconds=timeout_seconds,
            max_retries=max_retries,
            concurrency=concurrency,
            backoff_seconds=backoff_seconds,
            max_backoff_seconds=30.0,
            max_reply_bytes=_MAX_REPLY_BYTES,
            url=generate_url,
            read=read_tokens,
        )
        self._known: OrderedDict[str, None] = OrderedDict()
        self._under_way: dict[str, concurrent.futures.Future[None]] = {}
        self._finished: queue.SimpleQueue[Generated] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vrthinker-vllm", daemon=True)
        self._thread.start()
        try:
            self._model, self._max_context_tokens = self._served_model()
            self._probe()
            self._probe_picture(frontend)
        except BaseException:
            self.close()
            raise

    @property
    def max_context_tokens(self) -> int:
        """The most tokens of context and text of one request, as the server says."""
        return self._max_context_tokens

    def submit(self, generation: Generation) -> None:
        """Queues a request."""
        assert self._loop is not None
        work = self._generate(generation)
        self._under_way[generation.id] = asyncio.run_coroutine_threadsafe(work, self._loop)

    def poll(self, timeout_seconds: float | None) -> list[Generated]:
        """Waits until a request is finished or the time is over; returns all finished ones."""
        found: list[Generated] = []
        while self._under_way and (not found or not self._finished.empty()):
            try:
                generated = self._finished.get(timeout=timeout_seconds)
            except queue.Empty:
                break
            if self._under_way.pop(generated.id, None) is not None:
                found.append(generated)
        return found

    def cancel(self, generation_id: str) -> None:
        """Ends a request: its connection is closed, and the server stops writing."""
        future = self._under_way.pop(generation_id, None)
        if future is not None:
            future.cancel()

    def update_weights(self, named_tensors: Iterable[tuple[str, Any]], policy_version: int) -> None:
        """Lets a server on this machine, started in development mode, reload and empty its caches.

        Raises:
            EngineError: The server does not offer this, or cannot read the weights.
        """
        with as_checkpoint(named_tensors) as folder:
            asked = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
            self._post("collective_rpc", asked)
        try:
            self._post("collective_rpc", {"method": "refresh_tied_head"})
        except EngineError as error:
            raise EngineError(f"{error}; start the server with --worker-extension-cls {EXTENSION}") from None
        for cache in ("reset_prefix_cache", "reset_mm_cache", "reset_encoder_cache"):
            self._post(cache, {})
        self._known.clear()

    def free_caches(self) -> None:
        """Does nothing: the memory is the server's."""

    def close(self) -> None:
        """Cancels all requests and closes the connections. The server goes on."""
        loop, self._loop = self._loop, None
        if loop is None:
            return
        for future in self._under_way.values():
            future.cancel()
        self._under_way.clear()
        asyncio.run_coroutine_threadsafe(self._end(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        self._thread.join()
        loop.close()

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*others, return_exceptions=True)
        await self._client.aclose()
        await asyncio.get_running_loop().shutdown_default_executor()

    async def _generate(self, generation: Generation) -> None:
        try:
            reply = await self._reply(generation)
        except ChatFailure as failure:
            self._finished.put(Generated(generation.id, error=f"{self._name}: {failure}"))
            return
        except asyncio.CancelledError:
            raise
        except Exception as error:
            said = self._client.clean(f"{type(error).__name__}: {error}")
            self._finished.put(Generated(generation.id, error=f"{self._name}: {said}"))
            return
        for picture in generation.pictures:
            self._known[picture.uuid] = None
            self._known.move_to_end(picture.uuid)
        while len(self._known) > _MAX_KNOWN:
            self._known.popitem(last=False)
        self._finished.put(
            Generated(
                generation.id,
                reply.token_ids,
                reply.logprobs,
                stopped=reply.finish_reason is FinishReason.STOP,
                cached_tokens=reply.cached_tokens,
            )
        )

    async def _reply(self, generation: Generation) -> TokenReply:
        known = {picture.uuid for picture in generation.pictures if picture.uuid in self._known}
        try:
            reply = await self._post_generation(generation, known)
        except ChatFailure:
            if not known:
                raise
            for uuid in known:  # the server may have forgotten them
                self._known.pop(uuid, None)
            reply = await self._post_generation(generation, set())
        if reply.prompt_tokens not in (None, len(generation.token_ids)):
            raise ChatFailure(
                f"{self._client.address}: it read {reply.prompt_tokens} context tokens of "
                f"{len(generation.token_ids)}; it does not run this checkpoint"
            )
        return reply

    async def _post_generation(self, generation: Generation, known: set[str]) -> TokenReply:
        def payload() -> bytes:
            body = {
                "request_id": f"vrthinker-{os.getpid()}-{id(self):x}-{generation.id}-{len(known)}",
                "model": self._model,
                "token_ids": generation.token_ids,
                "sampling_params": sampling_fields(generation, self._bans, self._end_of_turn),
                "stream": False,
            }
            if generation.pictures:
                body["features"] = {
                    "mm_hashes": {"image": [picture.uuid for picture in generation.pictures]},
                    "mm_placeholders": {
                        "image": [
                            {"offset": picture.offset, "length": picture.length}
                            for picture in generation.pictures
                        ]
                    },
                    "kwargs_data": {"image": encoded_items(generation.pictures, known)},
                }
            return json.dumps(body).encode()

        reply = await self._client.complete(payload, pictures=len(generation.pictures) - len(known))
        assert isinstance(reply, TokenReply)
        return reply

    # Starting

    def _served_model(self) -> tuple[str, int]:
        """The name of the model on the server, and its limit of tokens."""
        said = self._ask("GET", "v1/models", None)
        models = said.get("data") if isinstance(said, dict) else None
        if not isinstance(models, list) or not models or not isinstance(models[0], dict):
            raise EngineError(f"{self._name}: {self._client.address}: it names no model; start it: {_START}")
        name, limit = models[0].get("id"), models[0].get("max_model_len")
        if not isinstance(name, str) or type(limit) is not int or limit < 2:
            raise EngineError(
                f"{self._name}: {self._client.address}: it is no vllm serve; start one: {_START}"
            )
        return name, limit

    def _probe(self) -> None:
        """Checks that the server takes token ids, and that its logprobs are those after temperature and bans.

        The end of the turn is made certain. Then its log-probability is 0, or another one if the server gives
        that of the logits as they were.
        """
        generation = Generation("probe", [self._end_of_turn], (), 1, 1.0, 1.0, 0)
        bans, self._bans = self._bans, {self._end_of_turn: 1e9}
        try:
            generated = self._asked(generation)
        finally:
            self._bans = bans
        if generated.token_ids != (self._end_of_turn,) or abs(generated.logprobs[0]) > 1e-4:
            raise EngineError(
                f"{self._name}: {self._client.address}: its log-probabilities are not those after "
                "temperature and "
                f"bans; start it: {_START}"
            )

    def _probe_picture(self, frontend: Frontend) -> None:
        """Checks that patches mean to the server what a picture means that it prepares itself.

        One picture is sent both ways. A server that normalises pixels once more, or that runs another
        checkpoint, says something else, or counts other placeholders.
        """
        factor = frontend.factor[0]
        side = factor * max(2, math.ceil(math.sqrt(frontend.least_pixels) / factor))
        pixels = np.random.default_rng(7).integers(0, 256, (side, side, 3), np.uint8)
        known = frontend.tokenizer.get_vocab()
        around = known["<|vision_start|>"], known["<|image_pad|>"], known["<|vision_end|>"]
        length = (side // factor) ** 2
        patches = frontend.patches(torch.from_numpy(pixels)[None])
        picture = Picture(secrets.token_hex(16), 1, length, frontend.grid((side, side)), patches)
        ids = [around[0], *[around[1]] * length, around[2]]
        ours = self._asked(Generation("picture", ids, (picture,), 1, 0.0, 1.0, 0))
        body = {
            "model": self._model,
            "token_ids": list(around),
            "content_parts": [
                {
                    "type": "image_url",
                    "url": data_uri(pixels, (side, side), "png", 95),
                    "uuid": secrets.token_hex(16),
                }
            ],
            "sampling_params": sampling_fields(
                Generation("picture", [], (), 1, 0.0, 1.0, 0), self._bans, self._end_of_turn
            ),
        }
        try:
            theirs = read_tokens(json.dumps(self._post("inference/v1/generate", body)).encode())
        except BadReply as bad:
            raise EngineError(f"{self._name}: {self._client.address}: {bad}; start it: {_START}") from None
        differ = abs(ours.logprobs[0] - theirs.logprobs[0])
        if theirs.prompt_tokens != len(ids) or differ > _SAME:
            raise EngineError(
                f"{self._name}: {self._client.address}: a picture's patches mean something else to it than "
                f"the picture (log-probabilities differ by {differ:.3f}, {theirs.prompt_tokens} context "
                f"tokens of {len(ids)}); does it run this checkpoint? start it: {_START}"
            )

    def _asked(self, generation: Generation) -> Generated:
        """The answer to a request, while no other is under way."""
        self.submit(generation)
        (generated,) = self.poll(None)
        if generated.error is not None:
            raise EngineError(f"{generated.error}; a server for this is started by: {_START}")
        return generated

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        return self._ask("POST", path, body)

    def _ask(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        """Asks something small, once."""
        key = os.environ.get("OPENAI_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        url = _below(self._server, path)
        try:
            answer = httpx.request(method, url, json=body, headers=headers, timeout=600.0)
        except httpx.HTTPError as error:
            said = self._client.clean(str(error)) or type(error).__name__
            raise EngineError(f"{self._name}: no answer from {self._client.address}: {said}") from None
        if answer.status_code == 404 and method == "POST":
            raise EngineError(
                f"{self._name}: the server does not reload weights; start it with VLLM_SERVER_DEV_MODE=1 in "
                "its "
                "environment, where nobody else can reach it, or run vLLM here"
            )
        if answer.status_code != 200:
            said = error_message(answer.content[:65536])
            raise EngineError(f"{self._name}: {path}: HTTP {answer.status_code}: {self._client.clean(said)}")
        try:
            return answer.json() if answer.content else None
        except ValueError:
            return None
