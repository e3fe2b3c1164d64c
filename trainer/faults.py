"""Fault injection: a test can have a process end or pause itself at a named point, as a lost or a hung machine would.

Nothing happens unless the environment says so. `ZERORAY_KILL_AT=checkpoint.before_manifest` kills every process that
reaches that point, by SIGKILL; `ZERORAY_PAUSE_AT=...` pauses it, by SIGSTOP. `checkpoint.before_manifest:3` means the
third time that it is reached.

Points, in the order of one save: checkpoint.before_tensors, checkpoint.in_tensors (between two fragments),
checkpoint.after_tensors, checkpoint.before_manifest, checkpoint.after_manifest, checkpoint.in_prune.
"""

import os
import signal
from collections import Counter

SIGNALS = {"ZERORAY_KILL_AT": signal.SIGKILL, "ZERORAY_PAUSE_AT": signal.SIGSTOP}
_reached: Counter[str] = Counter()


def point(name: str) -> None:
    """Die or pause here if the environment asks for it."""
    for variable, number in SIGNALS.items():
        wanted, _, times = os.environ.get(variable, "").partition(":")
        if wanted == name:
            _reached[variable] += 1
            if _reached[variable] == int(times or 1):
                os.kill(os.getpid(), number)
