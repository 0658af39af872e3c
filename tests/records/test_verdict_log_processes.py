"""The shared results file between real processes: they claim, append, and are killed."""

import contextlib
import fcntl
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import verdict_worker
from verdict_worker import RUN, add, record_of, whole_ids

from vrthinker.errors import InputError, VRThinkerError
from vrthinker.records.claims import LockFile
from vrthinker.records.verdict_log import VerdictLog, read_verdicts

pytestmark = pytest.mark.multi_process
SEED = 20261121
PATIENCE = 200  # seconds, for a machine that is busy with other things
WORKER = Path(verdict_worker.__file__)

# Forked children: fast real processes


def in_child(act: Callable[[], object]) -> int:
    """Runs `act` in a forked child; returns 0, 1 (it raised) or minus the signal that killed it."""
    pid = os.fork()
    if pid == 0:
        code = 1
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(PATIENCE)
        try:
            act()
            code = 0
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def expect(truth: bool) -> None:
    if not truth:
        raise AssertionError


def judge_in_a_fresh_log(out: Path, pair_id: str) -> None:
    with VerdictLog(out, RUN) as log:
        add(log, pair_id)


def claimed_by_a_fresh_log(out: Path, pair_id: str) -> bool:
    with VerdictLog(out, RUN) as log:
        return log.claim(pair_id)


def test_closing_gives_claims_back_and_leaves_the_other_logs_claims(out: Path) -> None:
    with VerdictLog(out, RUN) as log:
        other = VerdictLog(out, RUN)
        assert other.claim("a")
        assert log.claim("b")
        other.close()
        other.close()
        assert log.claim("a")
        assert in_child(lambda: expect(not claimed_by_a_fresh_log(out, "b"))) == 0


def test_what_is_recorded_just_before_a_claim_is_seen(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take = LockFile.take

    def late(locks: LockFile, name: str, owner: object) -> bool:
        if owner is log:
            assert in_child(lambda: judge_in_a_fresh_log(out, name)) == 0
        return take(locks, name, owner)

    with VerdictLog(out, RUN) as log:
        monkeypatch.setattr(LockFile, "take", late)
        assert not log.claim("a")
        monkeypatch.undo()
        assert log.done_ids() == {"a"}
        assert log.claimable(["a", "b"]) == ["b"]
        assert not log._locks.has("a", log)


def test_a_fork_inherits_no_claim(out: Path) -> None:
    with VerdictLog(out, RUN) as log:
        assert log.claim("a")

        def child() -> None:
            with pytest.raises(VRThinkerError, match="before a fork"):
                log.claim("b")
            log.close()
            expect(not claimed_by_a_fresh_log(out, "a"))
            expect(claimed_by_a_fresh_log(out, "b"))

        assert in_child(child) == 0
        # The child's closing dropped nothing of the parent's.
        assert in_child(lambda: expect(not claimed_by_a_fresh_log(out, "a"))) == 0
        log.append(record_of("a"))


def test_a_full_disk_corrupts_nothing(out: Path) -> None:
    with VerdictLog(out, RUN) as log:
        add(log, "a")
        add(log, "f", judged=False)
    before = out.read_bytes()

    def child() -> None:
        with VerdictLog(out, RUN) as log:
            expect(log.claim("b"))
            # The kernel writes what fits and refuses the rest, as on a full disk.
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 50, resource.RLIM_INFINITY))
            with pytest.raises(VRThinkerError, match="cannot be written"):
                log.append(record_of("b"))
            expect(out.read_bytes() == before)
            expect(log.pending(["b"]) == ["b"])
            expect(not log.claim("b"))  # still held
            resource.setrlimit(resource.RLIMIT_FSIZE, (60, resource.RLIM_INFINITY))
            with pytest.raises(VRThinkerError, match="cannot be written"):
                log.drop_failed()
            expect(out.read_bytes() == before)
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            log.append(record_of("b"))

    assert in_child(child) == 0
    assert whole_ids(out) == ["a", "f", "b"]
    assert sorted(path.name for path in out.parent.iterdir()) == [
        "verdicts.jsonl",
        "verdicts.jsonl.lock",
        "verdicts.jsonl.run.json",
    ]


def scenario(out: Path, said: int) -> None:
    """Every kind of change a log knows. What has returned is told to the pipe `said`."""
    with VerdictLog(out, RUN) as log:
        for pair_id, judged in (("a", True), ("b", False), ("c", True)):
            if log.claim(pair_id):
                log.append(record_of(pair_id, judged=judged))
                if judged:
                    real_write(said, pair_id.encode())
        log.drop_failed()
        if log.claim("b"):
            log.append(record_of("b"))
            real_write(said, b"b")


real_write = os.write


def die_at(point: int, how: str) -> None:
    """Makes this process kill itself at its n-th step that others could see."""
    step = 0

    def wrap(module: object, name: str) -> None:
        original = getattr(module, name)

        def wrapped(*args: object, **kwargs: object) -> object:
            nonlocal step
            step += 1
            if step == point:
                if how == "half" and name == "write":
                    real_write(args[0], args[1][: len(args[1]) // 2])  # type: ignore[arg-type, index]
                if how == "after":
                    with contextlib.suppress(OSError):
                        original(*args, **kwargs)
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(module, name, wrapped)

    for module, name in [
        *((os, name) for name in ("open", "write", "fsync", "pread", "ftruncate", "replace", "close")),
        (fcntl, "lockf"),
        (Path, "replace"),
        (Path, "open"),
    ]:
        wrap(module, name)


@pytest.mark.parametrize("how", ["before", "half", "after"])
@pytest.mark.parametrize("stride", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_every_step_nothing_is_lost_or_doubled(memory_path: Path, how: str, stride: int) -> None:
    # With a stride, each way of dying starts elsewhere, so that together they reach most steps.
    point = ["before", "half", "after"].index(how) % stride - stride + 1
    survived = False
    while not survived:
        point += stride
        out = memory_path / str(point) / "verdicts.jsonl"
        listen, said = os.pipe()

        def child(point: int = point, out: Path = out, said: int = said) -> None:
            die_at(point, how)
            scenario(out, said)

        code = in_child(child)
        os.close(said)
        returned = set(os.read(listen, 100).decode())
        os.close(listen)
        assert code in (0, -signal.SIGKILL)
        survived = code == 0

        found = set(whole_ids(out))
        assert returned <= found, f"killed at step {point} ({how})"
        reader, said = os.pipe()
        scenario(out, said)
        os.close(reader)
        os.close(said)
        assert sorted(record.id for record in read_verdicts(out)) == ["a", "b", "c"]
        assert all(record.judgment for record in read_verdicts(out))
        assert out.read_bytes().endswith(b"\n")
        assert len(list(out.parent.iterdir())) == 3
    assert point > 30  # the scenario has that many steps, so the loop went through them


# Workers of their own


def start_worker(
    out: Path, ids: int, seed: int, *, sleep: float, fail_every: int = 0, gate: Path | None = None
) -> subprocess.Popen[bytes]:
    task = {
        "out": str(out),
        "starts": str(out.with_name("starts.txt")),
        "ids": ids,
        "seed": seed,
        "sleep": sleep,
        "fail_every": fail_every,
        "gate": str(gate) if gate else None,
    }
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.Popen([sys.executable, str(WORKER), json.dumps(task)], env=environment)


@pytest.fixture
def workers() -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for worker in started:
        worker.kill()
        worker.wait()


def started_by(out: Path, pid: int | None = None) -> list[str]:
    file = out.with_name("starts.txt")
    lines = [line.split() for line in file.read_text().splitlines()] if file.exists() else []
    return [pair_id for owner, pair_id in lines if pid is None or int(owner) == pid]


def wait_for_work(out: Path, worker: subprocess.Popen[bytes], n_starts: int = 1) -> None:
    deadline = time.monotonic() + PATIENCE
    while len(started_by(out, worker.pid)) < n_starts and worker.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_four_processes_judge_each_id_once(
    out: Path, tmp_path: Path, workers: list[subprocess.Popen[bytes]]
) -> None:
    gate = tmp_path / "gate"
    gate.mkdir()
    workers.extend(start_worker(out, 200, seed, sleep=0.01, gate=gate) for seed in range(4))
    deadline = time.monotonic() + PATIENCE
    while len(list(gate.iterdir())) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    (gate / "go").touch()
    assert [worker.wait(PATIENCE) for worker in workers] == [0, 0, 0, 0]
    ids = Counter(f"pair-{n}" for n in range(200))
    assert Counter(started_by(out)) == ids
    assert Counter(whole_ids(out)) == ids
    assert len({record.model for record in read_verdicts(out)}) == 4


@pytest.mark.parametrize("moments", [4, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_moments_every_id_is_there_once(
    out: Path, workers: list[subprocess.Popen[bytes]], moments: int
) -> None:
    sys.stdout.write(f"seed {SEED}\n")
    chance = random.Random(SEED)
    ids = 400
    seen: list[tuple[set[str], int]] = []
    finished = False  # a busy machine may let the workers judge everything before all moments have come
    for moment in range(moments):
        # Two at work: one is killed under the other's eyes, then the other.
        pair = [start_worker(out, ids, 2 * moment + n, sleep=0.02) for n in range(2)]
        workers.extend(pair)
        for victim in chance.sample(pair, 2):
            wait_for_work(out, victim)
            time.sleep(chance.uniform(0, 0.06))
            victim.kill()
            finished = victim.wait() != -signal.SIGKILL
            if finished:
                break
            recorded = whole_ids(out)
            assert len(recorded) == len(set(recorded))
            assert all(earlier <= set(recorded) for earlier, _ in seen)
            seen.append((set(recorded), len(started_by(out))))
        if finished:
            break
    assert seen, "no worker was killed at work"
    last = [start_worker(out, ids, n, sleep=0) for n in range(2)]
    workers.extend(last)
    assert [worker.wait(PATIENCE) for worker in last] == [0, 0]
    assert Counter(whole_ids(out)) == Counter(f"pair-{n}" for n in range(ids))
    starts = started_by(out)
    for recorded_ids, position in seen:
        assert not recorded_ids & set(starts[position:]), "a recorded id was judged again"
    assert len(starts) <= ids + len(seen)  # a kill costs what the victim had in hand, no more


def test_the_claims_of_a_killed_process_vanish(out: Path, workers: list[subprocess.Popen[bytes]]) -> None:
    worker = start_worker(out, 1, 0, sleep=1000)
    workers.append(worker)
    wait_for_work(out, worker)
    with VerdictLog(out, RUN) as log:
        assert log.pending(["pair-0"]) == ["pair-0"]
        assert log.claimable(["pair-0", "pair-1"]) == ["pair-1"]
        assert not log.claim("pair-0")
        worker.kill()
        worker.wait()
        assert log.claimable(["pair-0", "pair-1"]) == ["pair-0", "pair-1"]
        add(log, "pair-0")


def test_failures_are_dropped_while_another_process_appends(
    out: Path, workers: list[subprocess.Popen[bytes]]
) -> None:
    sys.stdout.write(f"seed {SEED}\n")
    chance = random.Random(SEED)
    worker = start_worker(out, 150, 0, sleep=0.006, fail_every=3)
    workers.append(worker)
    wait_for_work(out, worker)
    dropped = 0
    judged: set[str] = set()
    with VerdictLog(out, RUN) as log:
        for _ in range(12):
            time.sleep(chance.uniform(0, 0.05))
            dropped += log.drop_failed()
            now = log.done_ids() - log.failed_ids()
            assert judged <= now
            judged = now
        assert worker.wait(PATIENCE) == 0
        # It may have been done before the last failures were dropped.
        assert start_worker(out, 150, 2, sleep=0, fail_every=3).wait(PATIENCE) == 0
        assert log.pending(f"pair-{n}" for n in range(150)) == []
        last = log.drop_failed()
    assert dropped > 0
    assert len(started_by(out)) == 150 + dropped
    assert last == 50
    assert start_worker(out, 150, 1, sleep=0).wait(PATIENCE) == 0
    assert Counter(whole_ids(out)) == Counter(f"pair-{n}" for n in range(150))
    assert all(record.judgment for record in read_verdicts(out))


def test_processes_that_start_together_agree_on_one_configuration(tmp_path: Path) -> None:
    for n in range(10):
        out = tmp_path / str(n) / "verdicts.jsonl"
        children = []
        for window in (1, 2):
            pid = os.fork()
            if pid == 0:
                try:
                    VerdictLog(out, {"window": window}).close()
                    os._exit(window)
                except InputError:
                    os._exit(0)
                finally:
                    os._exit(99)
            children.append(pid)
        codes = {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children}
        assert codes in ({0, 1}, {0, 2})
        assert json.loads((out.parent / "verdicts.jsonl.run.json").read_text())["window"] in codes
