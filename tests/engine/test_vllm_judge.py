"""Judging through vLLM, here and on a server: nano's judgments are those of the transformers engine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from cli_run import vrthinker
from conversations import play, shows
from loopback import free_port

from vrthinker.data.pairs import Pair
from vrthinker.doctor.numerics import _differences, default_pairs
from vrthinker.engine.base import FinishReason, RoundLimits, RoundRequest, RoundResult
from vrthinker.engine.hf.checkpoint import NANO_FOLDER
from vrthinker.engine.hf.engine import HFEngine
from vrthinker.engine.vllm.engine import VLLMEngine
from vrthinker.engine.vllm.library import EXTENSION, LocalOptions
from vrthinker.errors import EngineError
from vrthinker.judge import Judge
from vrthinker.records.verdicts import read_verdicts

pytestmark = pytest.mark.vllm

TOLERANCE = 1e-4
HERE = {"local": LocalOptions(own_process=False, kv_cache_bytes=256 << 20), "max_context_tokens": 4096}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[Pair]:
    return default_pairs(tmp_path_factory.mktemp("world"), 6, seed=5)


def test_nano_judges_as_it_does_with_transformers(pairs: list[Pair]) -> None:
    found = {}
    for engine, options in (("hf", {"max_context_tokens": 4096}), ("vllm", HERE)):
        with Judge.from_pretrained(
            "nano", engine=engine, dtype="float32", batch_size=6, engine_options=options
        ) as judge:
            found[engine] = {done.item.id: done.trajectory for done in judge.judge_pairs(pairs, seed=1)}
            assert judge.engine.name == f"{engine}:nano"
    for pair in pairs:
        ours, theirs = found["vllm"][pair.id], found["hf"][pair.id]
        assert ours is not None
        assert theirs is not None
        assert ours.outcome.judgments is not None
        assert ours.outcome.judgments == theirs.outcome.judgments
        assert [r.text for r in ours.rounds] == [r.text for r in theirs.rounds]
    assert any(len(trajectory.rounds) > 1 for trajectory in found["vllm"].values() if trajectory is not None)


def test_what_it_samples_can_be_trained_on(pairs: list[Pair]) -> None:
    """The packed forward recomputes the log-probabilities of vLLM's samples, over rounds that lost frames."""
    with Judge.from_pretrained(
        "nano", engine="vllm", dtype="float32", batch_size=6, temperature=1.0, engine_options=HERE
    ) as judge:
        sampled = [done.trajectory for done in judge.judge_pairs(pairs[:4], seed=2)]
    trajectories = [trajectory for trajectory in sampled if trajectory is not None]
    assert len(trajectories) == 4
    reference = HFEngine(NANO_FOLDER, device="cpu", dtype="float32")
    differences = torch.cat(list(_differences(reference, trajectories, 1.0)))
    assert len(differences) == sum(len(r.token_ids or ()) for t in trajectories for r in t.rounds)
    assert differences.max() < TOLERANCE


class Server:
    """A `vllm serve` of nano on loopback, which a test may kill."""

    def __init__(self, log: Path, *options: str) -> None:
        self.port, self._log = free_port(), log
        self.address = f"http://127.0.0.1:{self.port}"
        self._command = [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(NANO_FOLDER)),
            *("--host", "127.0.0.1", "--port", str(self.port), "--dtype", "float32", "--enforce-eager"),
            *("--max-model-len", "4096", "--max-num-batched-tokens", "8192", "--kv-cache-memory-bytes"),
            *("268435456", "--block-size", "32", "--skip-mm-profiling", "--logprobs-mode"),
            *(
                "processed_logprobs",
                "--enable-scale-out",
                "--no-enable-chunked-prefill",
                "--enable-prompt-tokens-details",
            ),
            *("--worker-extension-cls", EXTENSION),
            *('--limit-mm-per-prompt={"image":64,"video":0}', *options),
        ]

    def start(self) -> None:
        environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        with self._log.open("ab") as out:
            self.process = subprocess.Popen(
                self._command, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        deadline = time.monotonic() + 1000
        while True:
            assert self.process.poll() is None, self._log.read_text("utf-8", "replace")[-3000:]
            assert time.monotonic() < deadline, self._log.read_text("utf-8", "replace")[-3000:]
            try:
                if httpx.get(f"{self.address}/health", timeout=5).status_code == 200:
                    return
            except httpx.HTTPError:
                time.sleep(0.5)

    def kill(self) -> None:
        """Ends the server and the processes that it started, as SIGKILL does."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("server") / "log", "--no-mm-device-do-normalize")
    running.start()
    yield running
    running.kill()


@pytest.mark.slow
@pytest.mark.multi_process
def test_a_server_writes_the_rounds_of_transformers_and_what_new_weights_write(server: Server) -> None:
    reference = HFEngine(NANO_FOLDER, device="cpu", dtype="float32", max_context_tokens=4096)
    with VLLMEngine("nano", server=server.address, max_sessions=16) as engine:
        for update in (False, True):
            if update:
                weights = {
                    name: 0.9 * tensor.clone() for name, tensor in reference.model.model.state_dict().items()
                }
                for one in (engine, reference):
                    one.update_weights(weights, 1)
            got = play(engine, factor=28, conversations=8, group=4, max_tokens=8)
            wanted = play(reference, factor=28, conversations=8, group=4, max_tokens=8)
            assert [one.error for results in got for one in results] == [None] * 24
            assert [[r.token_ids for r in c] for c in got] == [[r.token_ids for r in c] for c in wanted]
            ours, theirs = (
                torch.tensor([p for results in part for one in results for p in one.logprobs or ()])
                for part in (got, wanted)
            )
            assert (ours - theirs).abs().max() < TOLERANCE
        assert engine.usage.cached_tokens > 0


@pytest.mark.slow
@pytest.mark.multi_process
def test_a_killed_server_ends_every_episode_and_a_rerun_judges_what_is_missing(
    tmp_path: Path, pairs: list[Pair]
) -> None:
    running = Server(tmp_path / "log", "--no-mm-device-do-normalize")
    running.start()
    try:
        with VLLMEngine("nano", server=running.address, max_sessions=64) as engine:
            sessions = [engine.open([shows(9, [(56, 56)], 0, [1])], seed=seed) for seed in range(64)]
            for session in sessions:
                engine.submit(RoundRequest(session, limits=RoundLimits(2000, temperature=1.0)))
            engine.collect(0.5)
            running.kill()
            failed: list[RoundResult] = []
            while found := engine.collect():
                failed += [result for result in found if result.finish_reason is FinishReason.ERROR]
            assert len(failed) > 32
            assert all("no answer from" in (result.error or "") for result in failed)
        table = tmp_path / "pairs.jsonl"
        table.write_text("".join(pair.model_dump_json() + "\n" for pair in pairs), "utf-8")
        command = ["judge", "--pairs", str(table), "--out", str(tmp_path / "out.jsonl"), "--model", "nano"]
        command += ["--engine", "vllm", "--endpoint", running.address, "--dtype", "float32"]
        refused = vrthinker(*command)
        assert refused.code == 1
        assert "no answer from" in refused.err
        running.start()
        done = vrthinker(*command, "--retry-failed")
        assert done.code == 0, done.err
        records = read_verdicts(tmp_path / "out.jsonl")
        assert {record.id for record in records} == {pair.id for pair in pairs}
        assert all(record.judgment is not None for record in records)
    finally:
        running.kill()


@pytest.mark.slow
@pytest.mark.multi_process
def test_a_server_that_normalises_pixels_once_more_is_refused(tmp_path: Path) -> None:
    running = Server(tmp_path / "log")
    running.start()
    try:
        with pytest.raises(EngineError, match=r"a picture's patches mean something else .*--no-mm-device"):
            VLLMEngine("nano", server=running.address)
    finally:
        running.kill()
