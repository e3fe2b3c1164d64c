"""`zeroray stop RUN`: ask for a checkpoint and an orderly end, and wait for it.

The request is a file in the run folder, which rank 0 sees at its next step and the driver between tasks. A run that was
submitted and has not begun, or whose folder is not on this machine, is stopped through Ray's Jobs API.
"""

import time
from typing import TextIO

from cluster.run_folder import RunFolder
from cluster.status import status_of

POLL_S = 0.2


def stop(folder: RunFolder, wait_s: float, out: TextIO) -> int:
    """Ask the run to stop and wait up to `wait_s` seconds; returns 0 when nobody works on it any more, else 1."""
    status = status_of(folder)
    if status["state"] == "queued":
        from cluster.submit import stop_job

        out.write(f"{folder.name}: {stop_job(status['submission'])}\n")
        folder.ledger.append("end", state="stopped", exit_code=6, reason="stopped before its driver began")
        return 0
    if status["state"] != "running":
        out.write(f"{folder.name}: is not active ({status['state']}, step {status['step']}); nothing to stop\n")
        return 0
    folder.ask_to_stop()
    out.write(f"{folder.name}: asked to stop; waiting up to {wait_s:g} s for its checkpoint\n")
    out.flush()
    if not ended(folder, wait_s):
        out.write(f"{folder.name}: still at work; it stops at its next step: zeroray status {folder.name}\n")
        return 1
    folder.withdraw_stop()  # a driver that died in between has left it
    after = status_of(folder)
    out.write(f"{folder.name}: {after['state']} at step {after['step']}; the same command continues\n")
    return 0


def ended(folder: RunFolder, wait_s: float) -> bool:
    """Whether the driver is gone before time runs out."""
    deadline = time.monotonic() + wait_s
    while folder.holder() is not None:
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True
