"""Requests to stop: SIGINT or SIGTERM once, or the file `stop` in the run folder (`zeroray stop`).

The first signal writes the file, which rank 0 sees at its next step: the gang commits a checkpoint and ends.
Preparation looks here between tasks. The second signal ends this process at once; the kernel and the reaper end a
private Ray's processes, Ray itself those of a joined cluster.
"""

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

from cluster.policy import Stopped
from cluster.run_folder import RunFolder

STOPPING = b"\nstopping after a checkpoint; once more ends at once. The same command continues.\n"


class StopRequest:
    """Whether someone asked this run to stop: a signal, or the file `stop` in its folder."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.signals = 0
        self.ended: int | None = None  # the exit code, once the run has come to its end and only Ray is left to close

    def asked(self) -> bool:
        """Whether to stop; raises LeaseLost when this driver has no say in the run any more."""
        self.folder.check_lease()
        return self.signals > 0 or os.path.exists(self.folder.stop_path)

    def check(self) -> None:
        """Raise Stopped when asked to stop."""
        if self.asked():
            raise Stopped

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """First signal: ask all ranks to commit and end. Second: end everything at once."""
        self.signals += 1
        if self.ended is not None:
            if self.signals > 1:
                os._exit(self.ended)
            return
        if self.signals == 1:
            # Not through sys.stderr: a signal may come in the middle of a write to it.
            with contextlib.suppress(OSError):
                os.write(2, STOPPING)
            with contextlib.suppress(OSError):  # a full disk: preparation stops without the file, ranks fail anyway
                self.folder.ask_to_stop()
            return
        with contextlib.suppress(OSError):
            self.folder.ledger.append("end", state="failed", exit_code=128 + number, reason="ended by a second signal")
        os._exit(128 + number)

    def listen(self) -> None:
        """Take the signals; again after Ray has started, which takes SIGTERM for itself."""
        signal.signal(signal.SIGINT, self.handle)
        signal.signal(signal.SIGTERM, self.handle)


@contextlib.contextmanager
def listening(stop: StopRequest) -> Iterator[None]:
    """Signals are requests to stop inside, and what they were before afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    stop.listen()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
