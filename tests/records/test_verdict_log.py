"""The shared results file, seen from one process; `test_verdict_log_processes.py` has the others."""

import json
import logging
import os
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from pydantic import ValidationError
from verdict_worker import RUN, add, record_of, whole_ids

from vrthinker.episode.dimensions import Confidence, Dimension, Judgments, Preference
from vrthinker.episode.trajectory import StopReason
from vrthinker.errors import InputError, VRThinkerError
from vrthinker.records import claims
from vrthinker.records.verdict_log import VerdictLog, VerdictRecord, read_verdicts

# One process


def test_records_come_back_equal_and_in_order(out: Path) -> None:
    with VerdictLog(out, RUN) as log:
        add(log, "b")
        add(log, "ä 漢\n\u2028 \x00", judged=False)
        assert log.records() == [record_of("b"), record_of("ä 漢\n\u2028 \x00", judged=False)]
        assert log.done_ids() == {"b", "ä 漢\n\u2028 \x00"}
        assert log.failed_ids() == {"ä 漢\n\u2028 \x00"}
        assert log.pending(["c", "b", "a"]) == ["c", "a"]
    assert out.read_bytes().count(b"\n") == 2
    assert read_verdicts(out) == [record_of("b"), record_of("ä 漢\n\u2028 \x00", judged=False)]
    assert json.loads((out.parent / "verdicts.jsonl.run.json").read_text()) == RUN


def test_a_claim_is_exclusive_until_it_is_given_back(out: Path) -> None:
    with VerdictLog(out, RUN) as log, VerdictLog(out, RUN) as other:
        assert log.claim("a")
        assert not log.claim("a")
        assert not other.claim("a")
        assert other.claimable(["a", "b"]) == ["b"]
        other.release("a")  # not its own
        assert not other.claim("a")
        log.release("a")
        assert other.claim("a")
        other.append(record_of("a"))
        assert not log.claim("a")
        assert log.claimable(["a", "b"]) == ["b"]


def test_append_needs_a_claim(out: Path) -> None:
    with VerdictLog(out, RUN) as log:
        with pytest.raises(VRThinkerError, match="'a' is not claimed"):
            log.append(record_of("a"))
        assert out.read_bytes() == b""


def test_threads_share_a_log(out: Path) -> None:
    ids = [f"pair-{n}" for n in range(60)]
    judged: list[str] = []
    errors: list[BaseException] = []

    def work(log: VerdictLog) -> None:
        try:
            for pair_id in ids:
                if log.claim(pair_id):
                    judged.append(pair_id)
                    time.sleep(0.0005)
                    log.append(record_of(pair_id))
        except BaseException as error:
            errors.append(error)

    with VerdictLog(out, RUN) as log:
        threads = [threading.Thread(target=work, args=(log,)) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
    assert Counter(judged) == Counter(ids)
    assert Counter(whole_ids(out)) == Counter(ids)


def test_a_record_is_null_exactly_with_a_reason() -> None:
    good = record_of("a").model_dump()
    for change, text in [
        ({"judgment": None}, "reason: got none"),
        ({"judgment": None, "reason": "  "}, "reason: got none"),
        ({"reason": "why"}, "reason: got one beside a judgment"),
        ({"judgment": {"TA": 1, "OA": 2}}, "judgment: got TA, OA, allowed: all of TA, VQ, MQ, OA"),
        ({"judgment": {"TA": 1, "VQ": 3, "MQ": 0, "OA": 0}}, "less than or equal to 2"),
        ({"judgment": {"TA": True, "VQ": 1, "MQ": 0, "OA": 0}}, "valid integer"),
        ({"confidence": 0}, "greater than or equal to 1"),
        ({"latency_seconds": float("nan")}, "finite number"),
        ({"schema_version": 2}, "Input should be 1"),
        ({"id": ""}, "id: got a blank one"),
        ({"extra": 1}, "Extra inputs"),
    ]:
        with pytest.raises(ValidationError, match=text):
            VerdictRecord.model_validate({**good, **change})


def test_a_record_takes_the_enums_of_an_episode(out: Path) -> None:
    judgments = Judgments(TA=Preference.TIE, VQ=Preference.VIDEO_1, MQ=Preference.VIDEO_2, OA=Preference.TIE)
    record = VerdictRecord.model_validate(
        {
            **record_of("a").model_dump(),
            "judgment": {dimension: getattr(judgments, dimension) for dimension in Dimension},
            "confidence": Confidence.LOW,
            "stop_reason": StopReason.ANSWERED,
        }
    )
    with VerdictLog(out, RUN) as log:
        assert log.claim("a")
        log.append(record)
        assert log.records() == [record]
    line = json.loads(out.read_text())
    assert (line["judgment"], line["confidence"], line["stop_reason"]) == (judgments.as_dict(), 3, "answered")


def test_a_reason_may_quote_a_file_name_that_is_no_unicode(out: Path) -> None:
    record = VerdictRecord.model_validate(
        {
            **record_of("a", judged=False).model_dump(),
            "reason": "clip\udcff.mp4: missing",
            "notes": ["\ud800"],
        }
    )
    with VerdictLog(out, RUN) as log:
        assert log.claim("a")
        log.append(record)
        assert log.records() == [record]
    assert "clip\\udcff.mp4: missing" in (record.reason or "")


# The configuration


def test_another_configuration_is_refused_and_named(out: Path) -> None:
    run = {"window": 1, "seed": 0, "engine": {"name": "hf", "dtype": "bf16", "batch": 4}, "old": None}
    with VerdictLog(out, run) as log:
        add(log, "a")
    before = out.read_bytes()
    changed = {"window": 2, "seed": 0, "engine": {"name": "hf", "dtype": "fp32", "batch": 8}, "new": [1]}
    with pytest.raises(InputError) as caught:
        VerdictLog(out, changed, ignore=["engine.batch"])
    assert str(caught.value) == (
        f'{out}: was made with window=1, engine.dtype="bf16", old=null, new=nothing; this run has window=2, '
        'engine.dtype="fp32", old=nothing, new=[1]; give the same settings, or another output file'
    )
    assert out.read_bytes() == before
    with VerdictLog(out, {**run, "window": True}, ignore=["window"]) as log:
        assert log.done_ids() == {"a"}
    with pytest.raises(InputError, match="window=true"):
        VerdictLog(out, {**run, "window": True})
    with VerdictLog(out, {"window": 1, "seed": 0}, ignore=["engine", "old"]) as log:
        assert json.loads(log.run_path.read_text()) == run


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_a_broken_configuration_is_an_input_error(out: Path, content: bytes) -> None:
    VerdictLog(out, RUN).close()
    (out.parent / "verdicts.jsonl.run.json").write_bytes(content)
    with pytest.raises(InputError, match=r"run\.json"):
        VerdictLog(out, RUN)


def test_a_file_that_is_no_log_is_left_alone(tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("the last line has no end")
    with pytest.raises(InputError, match="holds something"):
        VerdictLog(notes, RUN)
    assert notes.read_text() == "the last line has no end"
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("where", ["", "notes.txt/verdicts.jsonl"])
def test_a_place_that_cannot_hold_a_log_is_an_input_error(tmp_path: Path, where: str) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError):
        VerdictLog(tmp_path / where, RUN)


def test_folders_are_made_and_links_followed(tmp_path: Path) -> None:
    real = tmp_path / "a" / "b" / "verdicts.jsonl"
    VerdictLog(real, RUN).close()
    link = tmp_path / "link.jsonl"
    link.symlink_to(real)
    with VerdictLog(link, RUN) as log:
        add(log, "a", judged=False)
        log.drop_failed()
        add(log, "b")
    assert link.is_symlink()
    assert whole_ids(real) == ["b"]


# Damage


def test_a_torn_last_line_is_repaired_wherever_it_was_torn(
    memory_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = memory_path / "verdicts.jsonl"
    with VerdictLog(out, RUN) as log:
        add(log, "a")
        add(log, "b")
    content = out.read_bytes()
    first_end = content.index(b"\n") + 1
    for end in [*range(first_end, len(content), 5), len(content) - 2, len(content) - 1]:
        out.write_bytes(content[:end])
        caplog.clear()
        with caplog.at_level(logging.WARNING), VerdictLog(out, RUN) as log:
            whole = end == len(content) - 1
            assert log.done_ids() == ({"a", "b"} if whole else {"a"})
            if end > first_end:
                assert len(caplog.records) == 1
                assert ("is kept" if whole else "is cut off") in caplog.text
            if not whole:
                add(log, "b")
        assert out.read_bytes() == content


def test_a_torn_line_is_repaired_by_a_process_that_is_at_work(out: Path) -> None:
    with VerdictLog(out, RUN) as log:
        add(log, "a")
        with out.open("ab") as stream:
            stream.write(b'{"schema_version":1,"id":"c')
        add(log, "b")
        assert whole_ids(out) == ["a", "b"]
        with out.open("ab") as stream:
            stream.write(b"\0" * 5000)  # what a crash of the machine may leave
        assert log.pending(["a", "b", "c"]) == ["c"]
    assert whole_ids(out) == ["a", "b"]


@pytest.mark.parametrize(
    "line",
    [b"nonsense", b"{}", b"[" * 100_000, b"\xff", b'{"schema_version":2}', b"1" * 10_000, b"NaN"],
    ids=["text", "empty", "deep", "bytes", "version", "digits", "nan"],
)
def test_a_malformed_line_is_an_error_that_names_it(out: Path, line: bytes) -> None:
    with VerdictLog(out, RUN) as log:
        add(log, "a")
    damaged = out.read_bytes() + b"\n" + line + b"\n" + record_of("b").model_dump_json().encode() + b"\n"
    out.write_bytes(damaged)
    with pytest.raises(InputError, match=r"verdicts\.jsonl: line 3 is no verdict record"):
        VerdictLog(out, RUN)
    with pytest.raises(InputError, match="line 3"):
        read_verdicts(out)
    assert out.read_bytes() == damaged


def test_an_id_on_two_lines_is_an_error_that_names_both(out: Path) -> None:
    with VerdictLog(out, RUN) as log:
        add(log, "a")
        add(log, "b")
    out.write_bytes(out.read_bytes() + out.read_bytes().split(b"\n")[0] + b"\n")
    with pytest.raises(InputError, match="'a' is on lines 1 and 3"):
        VerdictLog(out, RUN)


def test_reading_a_log_that_is_not_finished(out: Path) -> None:
    with VerdictLog(out, RUN) as log:
        add(log, "a")
    line = out.read_bytes()
    out.write_bytes(line + b'{"id"')
    assert read_verdicts(out) == [record_of("a")]
    out.write_bytes(line.rstrip(b"\n"))
    assert read_verdicts(out) == [record_of("a")]
    with pytest.raises(InputError, match="No such file"):
        read_verdicts(out.with_name("absent"))


def test_a_log_or_lock_that_was_removed_is_noticed(out: Path) -> None:
    with VerdictLog(out, RUN) as log:
        assert log.claim("a")
        out.rename(out.with_name("moved"))
        with pytest.raises(VRThinkerError, match="while in use"):
            log.append(record_of("a"))
        out.with_name("moved").rename(out)
        lock = out.with_name("verdicts.jsonl.lock")
        lock.unlink()
        lock.touch()
        with pytest.raises(VRThinkerError, match="removed or replaced while in use"):
            log.append(record_of("a"))
        with pytest.raises(VRThinkerError, match="removed or replaced while in use"):
            log.claim("b")
    with VerdictLog(out, RUN) as log:
        add(log, "a")


def test_reading_is_incremental(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = 0
    pread = os.pread

    def counted(descriptor: int, size: int, offset: int) -> bytes:
        nonlocal read
        content = pread(descriptor, size, offset)
        read += len(content)
        return content

    with VerdictLog(out, RUN) as log, VerdictLog(out, RUN) as other:
        monkeypatch.setattr(os, "pread", counted)
        for n in range(100):
            add(log, f"pair-{n}")
            assert len(other.done_ids()) == n + 1
            assert not other.claim("pair-0")
        assert read == 2 * out.stat().st_size


def test_lines_that_cross_the_read_size(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with VerdictLog(out, RUN) as log:
        for n in range(5):
            add(log, f"pair-{n}")
        records = log.records()
    for size in (1, 7, len(out.read_bytes()) // 5, 1000):
        monkeypatch.setattr("vrthinker.records.verdicts._READ_BYTES", size)
        with VerdictLog(out, RUN) as log:
            assert log.records() == records
            assert log.done_ids() == {f"pair-{n}" for n in range(5)}


def test_two_names_on_one_byte_wait_for_one_another(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "claim_offset", lambda name: 5)
    with VerdictLog(out, RUN) as log:
        assert log.claim("a")
        assert not log.claim("b")
        log.append(record_of("a"))
        assert log.claim("b")


def test_claim_offsets_never_change() -> None:
    # Another value would let an old and a new version judge the same pair at once.
    assert claims.claim_offset("pair-1") == 3813511504080143621
    offsets = {claims.claim_offset(f"pair-{n}") for n in range(20_000)}
    assert len(offsets) == 20_000
    assert min(offsets) >= 1
    assert max(offsets) <= 1 << 62


# Failed items


def test_drop_failed_keeps_every_judgment(out: Path) -> None:
    with VerdictLog(out, RUN) as log, VerdictLog(out, RUN) as other:
        for n in range(6):
            add(log, f"pair-{n}", judged=n % 2 == 0)
        out.chmod(0o640)
        assert other.done_ids() == {f"pair-{n}" for n in range(6)}
        (reason,) = {record.stop_reason for record in log.records() if record.judgment is None}
        assert log.drop_failed(spare=[reason]) == 0
        assert log.drop_failed(spare=["another"]) == 3
        assert log.drop_failed() == 0
        assert whole_ids(out) == ["pair-0", "pair-2", "pair-4"]
        assert other.pending([f"pair-{n}" for n in range(6)]) == ["pair-1", "pair-3", "pair-5"]
        add(other, "pair-1")
        assert log.done_ids() == {"pair-0", "pair-1", "pair-2", "pair-4"}
        assert out.stat().st_mode & 0o777 == 0o640


def test_a_log_that_was_replaced_and_has_outgrown_the_old_one_is_read_anew(out: Path) -> None:
    with VerdictLog(out, RUN) as log, VerdictLog(out, RUN) as other:
        add(log, "a", judged=False)
        assert other.failed_ids() == {"a"}
        log.drop_failed()
        for pair_id in ("b", "c", "d"):
            add(log, pair_id)
        assert other.done_ids() == {"b", "c", "d"}
        assert other.failed_ids() == set()
        assert other.claim("a")


def test_append_returns_when_the_line_is_on_the_disk(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int]] = []
    write, fsync = os.write, os.fsync
    with VerdictLog(out, RUN) as log:
        assert log.claim("a")
        monkeypatch.setattr(os, "write", lambda fd, data: (calls.append(("write", fd)), write(fd, data))[1])
        monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(("fsync", fd)), fsync(fd))[1])
        log.append(record_of("a"))
    assert [name for name, _ in calls] == ["write", "fsync"]
    assert len({descriptor for _, descriptor in calls}) == 1


def test_what_a_killed_rewrite_left_behind_is_cleared_away(out: Path) -> None:
    VerdictLog(out, RUN).close()
    left = out.with_name("verdicts.jsonl.new")
    left.write_text("half a file")
    VerdictLog(out, RUN).close()
    assert not left.exists()
