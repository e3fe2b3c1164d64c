"""What a run said: the driver's log and each rank's, read from `<run>/logs/`; Ray may be dead.

    show(folder, rank, lines, follow, out) -> exit code
    Tee                                    what the driver prints, also into `<run>/logs/driver.log`

Following ends when nobody works on the run any more and everything was read.
"""

import contextlib
import io
import os
import re
import sys
import time
from collections.abc import Iterator
from typing import IO, TextIO

from cluster.run_folder import RunFolder
from cluster.status import state_of
from conf.refusal import BadRequest

POLL_S = 0.3
BLOCK_BYTES = 65_536


def log_files(folder: RunFolder, rank: int | None) -> list[str]:
    """The run's log files, the driver's first; with `rank` those of that rank alone."""
    found = sorted(n for n in os.listdir(folder.logs) if n.endswith(".log")) if os.path.isdir(folder.logs) else []
    if rank is not None:
        return [f"{folder.logs}/{n}" for n in found if re.search(rf"rank[-_.]?0*{rank}(?!\d)", n)]
    return [f"{folder.logs}/{n}" for n in sorted(found, key=lambda n: (n != "driver.log", n))]


def show(folder: RunFolder, rank: int | None, lines: int, follow: bool, out: TextIO) -> int:
    """Print the last `lines` lines of each log, then, with `follow`, what is added until the run ends."""
    files = log_files(folder, rank)
    if not files and not (follow and active(folder)):
        which = f"of rank {rank} " if rank is not None else ""
        raise BadRequest(
            f"run.name={folder.name}: no log {which}in {folder.logs}\nhow it is: zeroray status {folder.name}"
        )
    read_to = {}
    for path in files:
        if len(files) > 1:
            out.write(f"==> {path} <==\n")
        text, read_to[path] = last_lines(path, lines)
        out.write(text)
    out.flush()
    if follow:
        follow_files(folder, rank, read_to, out)
    return 0


def last_lines(path: str, lines: int) -> tuple[str, int]:
    """The last `lines` lines of a file, and the position up to which they were read."""
    with open(path, "rb") as file:
        end = position = file.seek(0, os.SEEK_END)
        data = b""
        while position > 0 and data.count(b"\n") <= lines:
            start = max(0, position - BLOCK_BYTES)
            file.seek(start)
            data, position = file.read(position - start) + data, start
    kept = data.splitlines(keepends=True)[-lines:] if lines else []
    return b"".join(kept).decode("utf-8", "replace"), end


def follow_files(folder: RunFolder, rank: int | None, read_to: dict[str, int], out: TextIO) -> None:
    """Print what is added to the logs until the run has ended; new files are read from their start."""
    while True:
        going_on = active(folder)  # looked at before reading, so that the last words are not missed
        for path in log_files(folder, rank):
            with open(path, "rb") as file:
                file.seek(read_to.get(path, 0))
                added = file.read()
            read_to[path] = read_to.get(path, 0) + len(added)
            out.write(added.decode("utf-8", "replace"))
        out.flush()
        if not going_on:
            return
        time.sleep(POLL_S)


def active(folder: RunFolder) -> bool:
    """Whether somebody works on the run, or a submitted job is still to begin."""
    holder = folder.holder()
    return holder is not None or state_of(folder.events(), False, folder.submission()) == "queued"


class Tee(io.TextIOBase):
    """A stream that writes to the console and to the driver's log.

    A console that went away (a closed terminal, `| head`) or a full disk under the log must not end a training run.
    """

    def __init__(self, console: TextIO, log: IO[str]) -> None:
        self.console = console
        self.log = log

    def write(self, text: str) -> int:
        """Write to both."""
        try:
            self.console.write(text)
        except BrokenPipeError:
            to_nowhere(self.console)
        with contextlib.suppress(OSError):
            self.log.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush both."""
        try:
            self.console.flush()
        except BrokenPipeError:
            to_nowhere(self.console)
        with contextlib.suppress(OSError):
            self.log.flush()

    def isatty(self) -> bool:
        """Whether a person looks on."""
        return self.console.isatty()

    def fileno(self) -> int:
        """The console's file descriptor."""
        return self.console.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The console's encoding."""
        return getattr(self.console, "encoding", "utf-8")


def to_nowhere(stream: TextIO) -> None:
    """Let what is written to a stream whose reader has gone vanish; else Python complains of it again at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


@contextlib.contextmanager
def teed(folder: RunFolder) -> Iterator[None]:
    """Send what this process prints also to the driver's log."""
    os.makedirs(folder.logs, exist_ok=True)
    before = sys.stdout, sys.stderr
    with open(folder.driver_log, "a", encoding="utf-8", buffering=1) as log:
        sys.stdout, sys.stderr = Tee(before[0], log), Tee(before[1], log)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            sys.stdout, sys.stderr = before
