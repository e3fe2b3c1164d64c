"""Why something ended, and what to do then: types and pure functions, tested as tables.

    describe(error)  -> dict           in the worker: an exception as plain values (nothing is unpickled elsewhere)
    classify(...)    -> Cause          what kind of end that is
    culprit(failures) -> Failure       when one rank dies its peers fail too; this is the one that explains the others
    decide(cause, history, limits) -> Decision
    rebuild(...)     -> Exception      a task's own error, raised again in the driver

A restart is worth it only for what may be different the next time. The budget `cluster.max_restarts` counts failures
since the newest checkpoint moved: a run of weeks that loses a machine a day goes on, one that dies at the same step
three times does not.
"""

import enum
import errno
import os
import re
import traceback
from dataclasses import dataclass, field
from typing import Any

from conf.refusal import BadRequest

EXIT_DONE, EXIT_FAILED, EXIT_BAD_REQUEST, EXIT_QUARANTINE, EXIT_TOO_MUCH_QUARANTINE = 0, 1, 2, 3, 4
EXIT_HISTORY, EXIT_STOPPED = 5, 6

OUT_OF_MEMORY_RESTARTS = 1
MESSAGE_CHARS = 4000
DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
NETWORK = re.compile(
    r"connection (closed|reset|refused)|broken pipe|socket timeout|gloo|nccl|rendezvous|not all ranks came"
    r"|taken by another program|address already in use|timed out waiting|peer",
    re.IGNORECASE,
)


class Cause(enum.Enum):
    """Why a gang or a task ended."""

    bad_request = "something the user can mend in the request"
    superseded = "another driver has taken over this run"
    no_checkpoint = "there is history, but no valid checkpoint"
    bug = "an error in the code"
    damaged = "data on disk does not match its own hash"
    disk_full = "the disk is full"
    out_of_memory = "out of memory"
    worker_lost = "a worker process died"
    node_lost = "a node was lost"
    peer_lost = "the connection between ranks broke"
    not_placed = "the cluster did not give the resources in time"
    stopped = "someone asked it to stop"


RESTARTABLE = (Cause.worker_lost, Cause.node_lost, Cause.peer_lost)

KINDS = [
    ({"Superseded"}, Cause.superseded),
    ({"MemoryError", "OutOfMemoryError"}, Cause.out_of_memory),
    ({"NoValidCheckpoint"}, Cause.no_checkpoint),
    ({"CheckpointError"}, Cause.damaged),
    ({"DistError", "DistBackendError", "DistNetworkError", "ConnectionError", "TimeoutError"}, Cause.peer_lost),
]

# The first that matches explains the others: a lost worker makes its peers fail with broken connections.
EXPLAINS = [
    Cause.superseded,
    Cause.bad_request,
    Cause.no_checkpoint,
    Cause.disk_full,
    Cause.damaged,
    Cause.out_of_memory,
    Cause.node_lost,
    Cause.worker_lost,
    Cause.bug,
    Cause.not_placed,
    Cause.stopped,
    Cause.peer_lost,
]


@dataclass(frozen=True)
class Failure:
    """How one rank or task failed."""

    cause: Cause
    message: str
    rank: int | None = None
    trace: str = ""


@dataclass(frozen=True)
class Attempt:
    """What an earlier attempt ended with, and the step of the newest checkpoint then."""

    cause: Cause
    step: int


@dataclass(frozen=True)
class Limits:
    """How often to start again."""

    max_restarts: int


class Action(enum.Enum):
    """What the driver does next."""

    restart = "restart"
    fail = "fail"
    stop = "stop"


@dataclass(frozen=True)
class Decision:
    """What to do, with which exit code when that ends the run, and why in words for a person."""

    action: Action
    exit_code: int
    reason: str


@dataclass
class TaskFailed(Exception):  # noqa: N818 (an outcome)
    """A task ended with an error of the code, or was lost too often."""

    failure: Failure
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join([self.failure.message, *self.notes])

    def told(self, log_path: str) -> str:
        """What happened, in two lines; the notes, which hold the task's traceback, are appended to the driver's log."""
        os.makedirs(os.path.dirname(log_path), exist_ok=True)
        with open(log_path, "a", encoding="utf-8") as file:
            file.write("\n".join([*self.notes, ""]))
        return f"{first_line(self.failure.message)}\nthe whole story: {log_path}"


def first_line(text: object) -> str:
    """The first line of a message; the name of the type of an exception without one."""
    return (str(text).strip().splitlines() or [type(text).__name__])[0]


class Stopped(Exception):  # noqa: N818 (an outcome)
    """Someone asked to stop; what is finished stays."""


def describe(error: BaseException) -> dict[str, Any]:
    """An exception as plain values: the names of its types, its message, errno and traceback."""
    return {
        "kinds": [kind.__name__ for kind in type(error).__mro__],
        "bad_request": isinstance(error, BadRequest),  # not by name: clients of web services have a BadRequest too
        "message": (str(error) or type(error).__name__)[:MESSAGE_CHARS],
        "errno": error.errno if isinstance(error, OSError) else None,
        "strerror": error.strerror if isinstance(error, OSError) else None,
        "filename": str(error.filename) if isinstance(error, OSError) and error.filename else None,
        "trace": "".join(traceback.format_exception(error))[-4 * MESSAGE_CHARS :],
    }


def classify(description: dict[str, Any]) -> Cause:
    """The cause that a described exception stands for."""
    kinds, message = set(description["kinds"]), description["message"]
    if description["errno"] in DISK_ERRNOS or "No space left on device" in message:
        return Cause.disk_full
    for names, cause in KINDS:
        if kinds & names:
            return cause
    if kinds & {"RuntimeError", "OSError"} and NETWORK.search(message):
        return Cause.peer_lost
    return Cause.bad_request if description["bad_request"] else Cause.bug


def failure_of(description: dict[str, Any], rank: int | None = None) -> Failure:
    """The failure that a described exception is."""
    return Failure(classify(description), description["message"], rank, description["trace"])


def rebuild(description: dict[str, Any]) -> Exception:
    """A task's own error as the type it had: BadRequest and OSError for what a user can mend, TaskFailed otherwise."""
    kinds = description["kinds"]
    if "OSError" in kinds and description["errno"] is not None:
        error: Exception = OSError(description["errno"], description["strerror"] or "", description["filename"])
    elif description["bad_request"]:
        error = BadRequest(description["message"])
    else:
        return TaskFailed(failure_of(description), [description["trace"]])
    error.add_note(description["trace"])
    return error


def culprit(failures: list[Failure]) -> Failure:
    """The one failure of a gang that explains the others; the lowest rank among equals."""
    return min(failures, key=lambda f: (EXPLAINS.index(f.cause), f.rank if f.rank is not None else -1))


def fruitless(cause: Cause, step: int, history: list[Attempt]) -> int:
    """How many attempts in a row, before this one, ended for this kind of cause without a newer checkpoint."""
    count = 0
    for attempt in reversed(history):
        same_kind = attempt.cause is cause or (attempt.cause in RESTARTABLE and cause in RESTARTABLE)
        if attempt.step < step or not same_kind:
            break
        count += 1
    return count


def decide(cause: Cause, step: int, history: list[Attempt], limits: Limits, stop_asked: bool = False) -> Decision:
    """What to do after an attempt that ended for `cause` when the newest checkpoint was that of `step`."""
    final = {
        Cause.bad_request: (Action.fail, EXIT_BAD_REQUEST, "the request cannot be carried out"),
        Cause.superseded: (Action.fail, EXIT_FAILED, "the other driver goes on with it; how it is: zeroray status"),
        Cause.no_checkpoint: (Action.fail, EXIT_HISTORY, "run.fresh=true starts over and keeps the old folder aside"),
        Cause.bug: (Action.fail, EXIT_FAILED, "an error in the code; a restart would meet it again"),
        Cause.damaged: (Action.fail, EXIT_FAILED, "something on disk is damaged; a restart would meet it again"),
        Cause.not_placed: (Action.fail, EXIT_FAILED, "the cluster is too small, or busy with other work"),
        Cause.disk_full: (Action.stop, EXIT_STOPPED, "make room; the same command continues"),
        Cause.stopped: (Action.stop, EXIT_STOPPED, "stopped as asked; the same command continues"),
    }.get(cause)
    if final is not None:
        return Decision(*final)
    if stop_asked:
        reason = f"{cause.value} while stopping; the same command continues from the newest checkpoint"
        return Decision(Action.fail, EXIT_FAILED, reason)
    budget = min(limits.max_restarts, OUT_OF_MEMORY_RESTARTS) if cause is Cause.out_of_memory else limits.max_restarts
    used = fruitless(cause, step, history)
    if used < budget:
        return Decision(
            Action.restart, EXIT_FAILED, f"{cause.value}; restart {used + 1} of {budget} without a newer checkpoint"
        )
    hint = "; lower train.micro_batch_rows or cluster.ranks" if cause is Cause.out_of_memory else ""
    return Decision(Action.fail, EXIT_FAILED, f"{cause.value} {used + 1} times without a newer checkpoint since{hint}")
