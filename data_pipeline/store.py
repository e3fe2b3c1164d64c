"""The commit store: how anything durable is written, who may write it, and who waits.

Every contract reaches the disk through this room, so that a reader sees a whole file or none, whatever is killed when:

    write_bytes / write_json / AtomicFile   temporary name, flush, fsync, rename, fsync of the folder
    create_exclusive                        the same, but exactly one caller wins (a hard link never overwrites)
    claim_generation                        the next fencing number of a folder, claimed by exclusive creation
    Lease                                   one process works, another waits; a dead holder is taken over

The surprise: `rename` alone is not durable. Without the fsync of the folder a power cut can bring the old name back.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from types import TracebackType
from typing import Any, BinaryIO

from conf.refusal import BadRequest

HEARTBEAT_S = 2.0
EXPIRY_S = 30.0
LEASE_FIELDS = {"token", "host", "pid", "start", "beat"}


class NoValidCheckpoint(Exception):  # noqa: N818 (an outcome)
    """A run has a history, and none of its commits is whole: starting at step 0 would lose it in silence."""


def fsync_folder(folder: str) -> None:
    """Make the names in `folder` durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class AtomicFile:
    """A binary file that appears under its name, whole and durable, when its `with` block ends without an error."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.temporary = f"{path}.tmp-{uuid.uuid4().hex[:12]}"
        self.file: BinaryIO

    def __enter__(self) -> BinaryIO:
        os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
        self.file = open(self.temporary, "wb")  # closed in __exit__, after fsync
        return self.file

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.file.flush()
                os.fsync(self.file.fileno())
                self.file.close()
                os.rename(self.temporary, self.path)
                fsync_folder(os.path.dirname(self.path) or ".")
        finally:
            with contextlib.suppress(OSError):
                self.file.close()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.temporary)


def write_bytes(path: str, data: bytes) -> None:
    """Write `data` to `path`, whole and durable."""
    with AtomicFile(path) as file:
        file.write(data)


def json_bytes(value: Any) -> bytes:
    """The one byte form of a JSON value that zeroray writes: sorted keys, two spaces, a final newline."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def write_json(path: str, value: Any) -> None:
    """Write a JSON value to `path`, whole and durable."""
    write_bytes(path, json_bytes(value))


def read_json(path: str) -> Any:
    """Read a JSON file; raises ValueError naming the path when it is damaged."""
    with open(path, "rb") as file:
        data = file.read()
    try:
        return json.loads(data)
    except ValueError as error:
        raise BadRequest(f"{path}: damaged JSON ({error})") from error


def create_exclusive(path: str, data: bytes) -> bool:
    """Write `data` to `path` unless it exists; returns whether this caller created it. Exactly one caller wins."""
    folder = os.path.dirname(path) or "."
    os.makedirs(folder, exist_ok=True)
    temporary = f"{path}.tmp-{uuid.uuid4().hex[:12]}"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
    fsync_folder(folder)
    return True


def file_sha256(path: str) -> str:
    """SHA-256 (hex) of a whole file, read in blocks of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def seal(value: dict[str, Any]) -> dict[str, Any]:
    """Return `value` with `self_sha256`, the hash of everything else in it, so that a flipped bit is seen."""
    body = {k: v for k, v in value.items() if k != "self_sha256"}
    return {**body, "self_sha256": hashlib.sha256(json_bytes(body)).hexdigest()}


def unseal(path: str) -> dict[str, Any]:
    """Read a sealed JSON object; raises ValueError naming the path when its hash does not match."""
    value = read_json(path)
    if not isinstance(value, dict) or value != seal(value):
        raise BadRequest(f"{path}: damaged, its content does not match its own hash")
    return value


def generations(folder: str) -> list[int]:
    """The generations claimed in `folder`, ascending."""
    if not os.path.isdir(folder):
        return []
    found = (re.fullmatch(r"gen-(\d+)\.json", name) for name in os.listdir(folder))
    return sorted(int(m.group(1)) for m in found if m)


def claim_generation(folder: str, owner: dict[str, Any]) -> int:
    """Claim and return the next generation of `folder`; `owner` is recorded in it for a person to read."""
    while True:
        number = max(generations(folder), default=0) + 1
        record = {
            "generation": number,
            "claimed_at": time.time(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            **owner,
        }
        if create_exclusive(f"{folder}/gen-{number:04d}.json", json_bytes(record)):
            return number


def process_start(pid: int) -> str:
    """The kernel's start time of a process, which tells it from a later one with the same pid; empty if it is gone."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            state, *fields = file.read().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    # A killed process that nobody reaps (in containers without an init) stays in the table for ever.
    return "" if state in "ZX" else fields[18]


class Lease:
    """One holder at a time for a piece of work: the one whose token is in the lease file, which is also its heartbeat.

    A holder on this machine whose process is gone is taken over at once; any other after `EXPIRY_S` seconds in which
    its heartbeat did not change. A lease is taken, taken over and given back by one process at a time (a file lock
    beside it), and only the very record that was read is ever removed. Where a file system has no locks, two may hold
    the lease for the time of a heartbeat.

    A holder that was paused and then taken over finds another token, or none, at its next beat: `lost` becomes true,
    its heartbeat ends, and it must end too. What it writes until then is harmless: the same bytes under atomic names,
    and commits are fenced by generation.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.token = uuid.uuid4().hex
        self.lost = False
        self._stop = threading.Event()
        self._beat: threading.Thread | None = None

    def _record(self, beat: int) -> bytes:
        pid = os.getpid()
        record = {"token": self.token, "host": socket.gethostname(), "pid": pid, "start": process_start(pid)}
        return json_bytes({**record, "beat": f"{beat:012d}"})  # every beat has the same length, see _refresh

    def holder(self) -> dict[str, Any] | None:
        """The present holder's record, or None when nobody holds the lease or its holder is known to be dead."""
        record = read_record(self.path)
        return record if record and not holder_is_dead(record) else None

    def try_acquire(self) -> bool:
        """Take the lease if it is free or its holder on this machine is dead; returns whether it is ours."""
        if self.holder() is not None:
            return False
        os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
        with self._alone():
            record = read_record(self.path)
            if record is not None and holder_is_dead(record):
                self._remove(record)
            if not create_exclusive(self.path, self._record(0)):
                return False
        self._beat = threading.Thread(target=self._keep, daemon=True)
        self._beat.start()
        return True

    def acquire(self, poll_s: float = 0.5) -> Iterator[dict[str, Any]]:
        """Wait for the lease, yielding the present holder's record at every poll; ends when it is ours."""
        seen, since = None, time.monotonic()
        while not self.try_acquire():
            record = self.holder()
            if record != seen:
                seen, since = record, time.monotonic()
            elif record is not None and time.monotonic() - since > EXPIRY_S:
                with self._alone():
                    self._remove(record)
            if record is not None:
                yield record
            time.sleep(poll_s)

    def release(self) -> None:
        """Give the lease back, if it is still ours."""
        self._stop.set()
        if self._beat is None:
            return
        self._beat.join()
        # What cannot be given back is taken over when it expires; where the folder is gone, nothing is left to give.
        with contextlib.suppress(OSError), self._alone():
            record = read_record(self.path)
            if record and self._names_us(record):
                self._remove(record)

    def verify(self) -> bool:
        """Whether the lease that we took is still ours, read afresh; a disk that cannot be read says nothing."""
        with contextlib.suppress(OSError):
            self.lost = self.lost or not self._names_us(read_record(self.path))
        return not self.lost

    def _names_us(self, record: dict[str, Any] | None) -> bool:
        return bool(record and record["token"] == self.token)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the lock beside the lease; its file is removed again, so that an empty folder is empty."""
        path = f"{self.path}.lock"
        fd = locked(path)
        try:
            yield
        finally:
            if fd is not None:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                os.close(fd)

    def _remove(self, record: dict[str, Any]) -> None:
        """Remove the lease file if it holds `record`. What was moved away by mistake is put back."""
        aside = f"{self.path}.tmp-{uuid.uuid4().hex[:12]}"
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:
            return
        if read_record(aside) != record:
            with contextlib.suppress(FileExistsError):
                os.link(aside, self.path)
        os.unlink(aside)

    def _keep(self) -> None:
        beat = 0
        while not self._stop.wait(HEARTBEAT_S):
            beat += 1
            # A full disk must not end the holder; a missed beat only makes others wait or, after EXPIRY_S, take over.
            with contextlib.suppress(OSError):
                if not self._refresh(beat):
                    self.lost = True
                    return

    def _refresh(self, beat: int) -> bool:
        """Write the next beat; returns False, and writes nothing, when the lease is not ours any more.

        Written in place and not under a new name: however long this process is paused between reading and writing, it
        writes into its own file, never over a successor's.
        """
        try:
            with open(self.path, "r+b") as file:
                if not self._names_us(parse_record(file.read())):
                    return False
                file.seek(0)
                file.write(self._record(beat))
        except FileNotFoundError:
            return False
        return True


def locked(path: str) -> int | None:
    """Create and lock the file at `path`, and wait for it if need be; its descriptor, or None on a full disk."""
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                return None
            raise
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(fd, fcntl.LOCK_EX)
        if names_open_file(path, fd):
            return fd
        os.close(fd)  # the one we waited for removed it, so it is no longer the lock


def names_open_file(path: str, fd: int) -> bool:
    """Whether `path` still names the file that is open as `fd`."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except FileNotFoundError:
        return False


def read_record(path: str) -> dict[str, Any] | None:
    """The record in a lease file; None without a file, empty when it is damaged."""
    try:
        with open(path, "rb") as file:
            return parse_record(file.read())
    except FileNotFoundError:
        return None


def parse_record(data: bytes) -> dict[str, Any]:
    """A lease's record; empty when it is damaged."""
    try:
        value = json.loads(data)
    except ValueError:
        return {}
    return value if isinstance(value, dict) and value.keys() >= LEASE_FIELDS else {}


def holder_is_dead(record: dict[str, Any]) -> bool:
    """Whether a lease's holder is known to be gone: its process on this machine is, or its record is damaged."""
    if not record:
        return True
    return bool(record["host"] == socket.gethostname() and process_start(record["pid"]) != record["start"])
