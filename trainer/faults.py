"""Fault injection: a test can have a process kill itself at a named point, exactly as a lost machine would.

Nothing happens unless the environment says so. `ZERORAY_KILL_AT=checkpoint.before_manifest` kills every process that
reaches that point, by SIGKILL; `ZERORAY_KILL_AT=checkpoint.before_manifest:3` only when it is reached the third time.

Points, in the order of one save: checkpoint.before_tensors, checkpoint.in_tensors (between two fragments),
checkpoint.after_tensors, checkpoint.before_manifest, checkpoint.after_manifest, checkpoint.in_prune.
"""

import os
import signal
from collections import Counter

VARIABLE = "ZERORAY_KILL_AT"
_reached: Counter[str] = Counter()


def point(name: str) -> None:
    """Die here if the environment asks for it."""
    wanted, _, times = os.environ.get(VARIABLE, "").partition(":")
    if wanted != name:
        return
    _reached[name] += 1
    if _reached[name] >= int(times or 1):
        os.kill(os.getpid(), signal.SIGKILL)
