"""The results file that several processes share, with one JSON line per judged pair. It is only appended to.

Beside `<out>` there are `<out>.run.json`, the configuration that every line was made with, and `<out>.lock`,
the claims (see `claims.py`). Invariants:

- An id is on at most one line. A process claims it, judges it, and appends the line; other processes cannot
  claim it meanwhile. If a process is killed, only the pairs that it had claimed were judged in vain.
- Recorded lines are kept: a line is one `O_APPEND` write under a lock, synced before `append` returns. A
  failed write is undone. If a killed writer wrote an unfinished line (without newline), the next process that
  holds the lock adds the newline if the line is complete, and removes the line otherwise.
- Lines are never dropped silently: any other line that is not a record is an error that names it.

This is for processes on one machine and a local file system. On a network file system, locks and appends
depend on its server, and nothing is guaranteed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from vrthinker.errors import InputError, VRThinkerError, unwritable
from vrthinker.records.claims import LockFile, open_locks
from vrthinker.records.files import replace_file, spare_name, sync_folder, write_whole
from vrthinker.records.run_folder import adopt_run
from vrthinker.records.verdicts import VerdictRecord, parse_line, read_verdicts, unfinished, whole_lines

__all__ = ["VerdictLog", "VerdictRecord", "read_verdicts", "run_file"]

_logger = logging.getLogger(__name__)


def run_file(path: Path) -> Path:
    """The file beside a results file that holds the configuration that every line was made with."""
    return path.parent / f"{path.name}.run.json"  # `with_name` refuses "/", of which more is said later


class VerdictLog:
    """A results file, open for judging. Threads may share it. After a fork, open it again.

    Args:
        path: The file. It is created, with its folder, if it is missing. A link is followed.
        run: The resolved configuration, as JSON values.
        ignore: Dotted keys of `run` that may differ between the processes and reruns of one file, because
            they do not change verdicts. A key includes everything below it.

    Raises:
        InputError: The file was made with another configuration, has other content than verdicts, or cannot
            be opened.
    """

    def __init__(
        self, path: str | os.PathLike[str], run: Mapping[str, Any], *, ignore: Collection[str] = ()
    ) -> None:
        self.path = Path(os.path.realpath(path))
        self.run_path = run_file(self.path)
        wanted = json.loads(json.dumps(dict(run), allow_nan=False))
        self._fd = -1
        self._closed = False
        self._forget()
        self._refuse_other_files()
        self._locks: LockFile = open_locks(self.path.parent / f"{self.path.name}.lock")
        try:
            with self._locks.writing():
                adopt_run(self.run_path, wanted, ignore, self.path)
                with contextlib.suppress(FileNotFoundError):
                    spare_name(self.path).unlink()
                self._open(os.O_CREAT)
                sync_folder(self.path.parent)
                self._sync()
        except BaseException:
            self.close()
            raise

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keeps other processes from writing to the log, and from entering here, for files beside it."""
        with self._locks.writing():
            yield

    def claim(self, pair_id: str) -> bool:
        """Claims an id for this log. Returns False if it is recorded, or claimed by this or another log."""
        with self._locks.mutex:
            self.refresh()
            if pair_id in self._lines or not self._locks.take(pair_id, self):
                return False
            # Between the check and the claim, the last holder may have recorded the id.
            self.refresh()
            if pair_id in self._lines:
                self._locks.drop(pair_id, self)
                return False
            return True

    def release(self, pair_id: str) -> None:
        """Gives up a claim without a record. This is harmless if this log does not hold it."""
        self._locks.drop(pair_id, self)

    def append(self, record: VerdictRecord) -> None:
        """Records a claimed id and gives up the claim. On return the line is on the disk.

        Raises:
            VRThinkerError: The id is not claimed by this log, it is recorded already, or the line could not
                be written (a full disk). In that case the file is unchanged and the claim is still held.
        """
        with self._locks.writing():
            if not self._locks.has(record.id, self):
                raise VRThinkerError(
                    f"{self.path}: {record.id!r} is not claimed; claim an id before judging it"
                )
            self._sync()
            if record.id in self._lines:
                line = self._lines[record.id]
                raise VRThinkerError(f"{self.path}: {record.id!r} is recorded already, on line {line}")
            self._write(record.model_dump_json().encode() + b"\n")
            self._sync()
            self._locks.drop(record.id, self)

    def refresh(self) -> None:
        """Reads what other processes have added. This costs two `stat` calls if there is nothing new."""
        with self._locks.mutex:
            self._locks.check()
            if self._state() != (self._identity, self._offset):
                with self._locks.writing():
                    self._sync()

    def done_ids(self) -> set[str]:
        """All recorded ids, including those with null judgments."""
        with self._locks.mutex:
            self.refresh()
            return set(self._lines)

    def failed_ids(self) -> set[str]:
        """The recorded ids whose judgment is null."""
        with self._locks.mutex:
            self.refresh()
            return set(self._failed)

    def records(self) -> list[VerdictRecord]:
        """All records, in the order of the file."""
        with self._locks.writing():
            self._sync()
            return read_verdicts(self.path)

    def pending(self, ids: Iterable[str]) -> list[str]:
        """The ids among `ids` that are not recorded, in order. Other processes may have claimed them."""
        with self._locks.mutex:
            self.refresh()
            return [pair_id for pair_id in ids if pair_id not in self._lines]

    def claimable(self, ids: Iterable[str]) -> list[str]:
        """The ids among `ids` that are neither recorded nor claimed at this moment."""
        return [pair_id for pair_id in self.pending(ids) if self._locks.holder(pair_id) is None]

    def drop_failed(self, spare: Collection[str] = ()) -> int:
        """Removes the null judgments, so that they are judged again, and returns their number.

        The file is replaced atomically. Other processes notice this at their next call.

        Args:
            spare: Stop reasons whose records stay.

        Raises:
            VRThinkerError: The new file could not be written. The old file is unchanged.
        """
        with self._locks.writing():
            self._sync()
            if not self._failed:
                return 0
            lines = list(whole_lines(self._fd, 0, self.path))
            kept = [line for line in lines if self._stays(line, spare)]
            if dropped := len(lines) - len(kept):
                replace_file(self.path, b"".join(line + b"\n" for line in kept))
                self._sync()
            return dropped

    def close(self) -> None:
        """Gives up every claim and closes the files. Closing twice is harmless."""
        if self._closed:
            return
        self._closed = True
        self._locks.drop_all(self)
        self._locks.leave()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Access to the file. `_sync`, `_repair` and `_write` need the write lock.

    def _refuse_other_files(self) -> None:
        """Refuses a mistyped output, which would otherwise be written to or lose its last line."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            status = self.path.stat()
        except FileNotFoundError:
            return
        except OSError as error:
            raise unwritable(self.path, error, "choose another output", failed="cannot be used") from None
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{self.path}: got a folder, a pipe or a device, allowed: a file")
        # A log's configuration is written before its first line, so a file without it is not a log.
        if status.st_size and not self.run_path.exists():
            raise InputError(
                f"{self.path}: holds something, and {self.run_path.name} is not beside it to say how it was "
                "made; choose another output"
            )

    def _forget(self) -> None:
        self._identity = (-1, -1)
        self._offset = 0
        self._line_count = 0
        self._lines: dict[str, int] = {}
        self._failed: set[str] = set()

    def _open(self, flags: int = 0) -> None:
        """Opens the file that has the name now, to be read from its start."""
        try:
            opened = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | flags, 0o666)
        except OSError as error:
            raise unwritable(self.path, error, "choose another output", failed="cannot be opened") from None
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = opened
        self._forget()
        status = os.fstat(opened)
        self._identity = (status.st_dev, status.st_ino)

    def _state(self) -> tuple[tuple[int, int], int]:
        """The identity of the file that has the name now, and its size in bytes."""
        try:
            status = self.path.stat()
        except OSError as error:
            raise VRThinkerError(
                f"{self.path}: {error.strerror} while in use; stop every process that writes there"
            ) from None
        return (status.st_dev, status.st_ino), status.st_size

    def _sync(self) -> None:
        """Reads new lines and repairs an unfinished last line. Afterwards `_offset` is the file's size."""
        identity, size = self._state()
        if identity != self._identity or size < self._offset:
            self._open()
        for line in whole_lines(self._fd, self._offset, self.path):
            self._take(line)
        tail = os.pread(self._fd, max(0, self._state()[1] - self._offset), self._offset)
        if tail:
            self._repair(tail)

    def _take(self, line: bytes) -> None:
        number = self._line_count + 1
        if line.strip():
            record = parse_line(line, self.path, number)
            first = self._lines.setdefault(record.id, number)
            if first != number:
                raise InputError(
                    f"{self.path}: {record.id!r} is on lines {first} and {number}; remove one, then run again"
                )
            if record.judgment is None:
                self._failed.add(record.id)
        self._line_count = number
        self._offset += len(line) + 1

    def _stays(self, line: bytes, spare: Collection[str]) -> bool:
        record = unfinished(line)
        return record is not None and (record.judgment is not None or record.stop_reason in spare)

    def _repair(self, tail: bytes) -> None:
        """Completes or removes the unfinished last line of a writer that was killed."""
        record = unfinished(tail)
        if record is not None and record.id not in self._lines:
            _logger.warning("%s: the last line lacked its end and was whole; it is kept", self.path)
            self._write(b"\n")
            self._take(tail)
        else:
            _logger.warning(
                "%s: an unfinished last line (%d bytes) is cut off; its pair will be judged again",
                self.path,
                len(tail),
            )
            os.ftruncate(self._fd, self._offset)
            os.fsync(self._fd)

    def _write(self, content: bytes) -> None:
        """Appends completely or not at all. On return the content is on the disk."""
        try:
            write_whole(self._fd, content, sync=True)
        except OSError as error:
            raise VRThinkerError(
                f"{self.path}: cannot be written ({error.strerror}); make room and run the command again: "
                "what is recorded stays"
            ) from None
