"""A process that judges every id of a shared log, and what it shares with the tests that start it."""

import json
import os
import random
import sys
import time
from pathlib import Path

from vrthinker.records.verdict_log import VerdictLog, VerdictRecord

RUN = {"window": 1}


def record_of(pair_id: str, *, judged: bool = True, model: str = "none") -> VerdictRecord:
    return VerdictRecord(
        id=pair_id,
        judgment={"TA": 1, "VQ": 0, "MQ": 2, "OA": 1} if judged else None,
        confidence=1 if judged else None,
        rounds=1,
        tool_calls=0,
        frames_seen=[1, 2, 3],
        stop_reason="answered" if judged else "unparseable",
        reason=None if judged else "no answer in the last round",
        well_formed=judged,
        latency_seconds=0.25,
        prompt_tokens=10,
        sampled_tokens=5,
        seed=0,
        model=model,
    )


def add(log: VerdictLog, pair_id: str, *, judged: bool = True) -> None:
    assert log.claim(pair_id)
    log.append(record_of(pair_id, judged=judged))


def whole_ids(out: Path) -> list[str]:
    """The ids of the lines that are whole, each of which must be a record."""
    lines = out.read_bytes().split(b"\n")[:-1] if out.exists() else []
    return [VerdictRecord.model_validate_json(line).id for line in lines]


def wait_at(gate: str | None) -> None:
    """Says that this process is there and waits for the others: the gate is a folder."""
    if gate is not None:
        Path(gate, f"ready-{os.getpid()}").touch()
        while not Path(gate, "go").exists():
            time.sleep(0.001)


def main() -> None:
    task = json.loads(sys.argv[1])
    ids = [f"pair-{n}" for n in range(task["ids"])]
    chance = random.Random(task["seed"])
    starts = os.open(task["starts"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    with VerdictLog(task["out"], RUN) as log:
        wait_at(task["gate"])
        while pending := log.pending(ids):
            claimed = False
            for pair_id in pending:
                if not log.claim(pair_id):
                    continue
                claimed = True
                os.write(starts, f"{os.getpid()} {pair_id}\n".encode())
                time.sleep(chance.uniform(0, task["sleep"]))
                failed = task["fail_every"] and int(pair_id.removeprefix("pair-")) % task["fail_every"] == 0
                log.append(record_of(pair_id, judged=not failed, model=str(os.getpid())))
            if not claimed:
                time.sleep(0.005)


if __name__ == "__main__":
    main()
