"""Why something ended and what follows: tables."""

import errno
from pathlib import Path

import pytest

from cluster.policy import (
    Action,
    Attempt,
    Cause,
    Failure,
    Limits,
    TaskFailed,
    classify,
    culprit,
    decide,
    describe,
    rebuild,
)
from cluster.run_folder import AlreadyActive
from conf.refusal import BadRequest, refuse

pytestmark = pytest.mark.unit


class CheckpointError(Exception):
    pass


class Superseded(RuntimeError):  # noqa: N818
    pass


class NoValidCheckpoint(ValueError):  # noqa: N818
    pass


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (BadRequest("train.steps=0: must be above 0"), Cause.bad_request),
        (refuse("train.steps", 0, "must be above 0", "use 1"), Cause.bad_request),
        (AlreadyActive("another process"), Cause.bad_request),
        (ValueError("too many values to unpack"), Cause.bug),
        (type("BadRequest", (Exception,), {})("400 of some web service"), Cause.bug),
        (UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"), Cause.bug),
        (Superseded("another driver has taken over this run"), Cause.superseded),
        (KeyError("x"), Cause.bug),
        (RuntimeError("shape mismatch"), Cause.bug),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), Cause.disk_full),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/x"), Cause.disk_full),
        (RuntimeError("safetensors: No space left on device (os error 28)"), Cause.disk_full),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), Cause.bug),
        (MemoryError(), Cause.out_of_memory),
        (
            RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:123"),
            Cause.peer_lost,
        ),
        (ConnectionResetError("reset"), Cause.peer_lost),
        (TimeoutError("rank 1 of 2 waited 120 s, not all ranks came"), Cause.peer_lost),
        (CheckpointError("rank-00000.safetensors: hash"), Cause.damaged),
        (NoValidCheckpoint("history"), Cause.no_checkpoint),
    ],
)
def test_classify(error: BaseException, cause: Cause) -> None:
    assert classify(describe(error)) is cause


def test_the_lost_worker_explains_its_peers() -> None:
    peers = [Failure(Cause.peer_lost, "closed", 0), Failure(Cause.peer_lost, "closed", 2)]
    assert culprit([*peers, Failure(Cause.worker_lost, "died", 1)]).rank == 1
    assert culprit([*peers, Failure(Cause.bug, "KeyError", 1)]).cause is Cause.bug
    assert culprit([Failure(Cause.worker_lost, "", 1), Failure(Cause.out_of_memory, "", 3)]).rank == 3
    assert culprit([*peers, Failure(Cause.superseded, "", 2)]).cause is Cause.superseded
    assert culprit(peers).rank == 0


LIMITS = Limits(max_restarts=2)


@pytest.mark.parametrize(
    ("cause", "step", "history", "action", "exit_code"),
    [
        (Cause.bad_request, 0, [], Action.fail, 2),
        (Cause.superseded, 0, [], Action.fail, 1),
        (Cause.bug, 0, [], Action.fail, 1),
        (Cause.damaged, 0, [], Action.fail, 1),
        (Cause.no_checkpoint, 0, [], Action.fail, 5),
        (Cause.disk_full, 5, [], Action.stop, 6),
        (Cause.stopped, 5, [], Action.stop, 6),
        (Cause.not_placed, 0, [], Action.fail, 1),
        (Cause.worker_lost, 0, [], Action.restart, 1),
        (Cause.worker_lost, 5, [Attempt(Cause.worker_lost, 5)], Action.restart, 1),
        (Cause.worker_lost, 5, [Attempt(Cause.worker_lost, 5)] * 2, Action.fail, 1),
        (Cause.worker_lost, 5, [Attempt(Cause.node_lost, 5), Attempt(Cause.peer_lost, 5)], Action.fail, 1),
        # a newer checkpoint forgives what was before it
        (Cause.worker_lost, 9, [Attempt(Cause.worker_lost, 5)] * 2, Action.restart, 1),
        (
            Cause.worker_lost,
            9,
            [Attempt(Cause.worker_lost, 5)] * 2 + [Attempt(Cause.worker_lost, 9)],
            Action.restart,
            1,
        ),
        (Cause.out_of_memory, 5, [], Action.restart, 1),
        (Cause.out_of_memory, 5, [Attempt(Cause.out_of_memory, 5)], Action.fail, 1),
        (Cause.out_of_memory, 5, [Attempt(Cause.worker_lost, 5)], Action.restart, 1),
    ],
)
def test_decide(cause: Cause, step: int, history: list[Attempt], action: Action, exit_code: int) -> None:
    decision = decide(cause, step, history, LIMITS)
    assert (decision.action, decision.exit_code) == (action, exit_code)


def test_every_cause_has_a_decision() -> None:
    for cause in Cause:
        assert decide(cause, 0, [Attempt(cause, 0)] * 9, LIMITS).action is not Action.restart


def test_nothing_restarts_after_a_stop_was_asked_for() -> None:
    assert decide(Cause.worker_lost, 5, [], LIMITS, stop_asked=True).action is Action.fail


def test_no_restarts_when_none_are_allowed() -> None:
    for cause in Cause:
        assert decide(cause, 5, [], Limits(max_restarts=0)).action is not Action.restart


def test_errors_keep_their_type() -> None:
    full = rebuild(describe(OSError(errno.ENOSPC, "No space left on device", "/x")))
    assert isinstance(full, OSError)
    assert (full.errno, full.filename) == (errno.ENOSPC, "/x")
    assert isinstance(rebuild(describe(FileNotFoundError(errno.ENOENT, "no", "/x"))), FileNotFoundError)
    mended = rebuild(describe(BadRequest("corpus.path=x: no")))
    assert isinstance(mended, BadRequest)
    assert str(mended) == "corpus.path=x: no"
    assert isinstance(rebuild(describe(ValueError("not the user's"))), TaskFailed)
    bug = rebuild(describe(KeyError("x")))
    assert isinstance(bug, TaskFailed)
    assert "KeyError" in str(bug)


def test_the_traceback_of_a_task_goes_to_the_log(tmp_path: Path) -> None:
    def a_filter_of_others() -> None:
        raise ValueError("oh\nand more")

    try:
        a_filter_of_others()
    except ValueError as error:
        failed = rebuild(describe(error))
    assert isinstance(failed, TaskFailed)
    log = tmp_path / "logs" / "driver.log"
    assert failed.told(str(log)) == f"oh\nthe whole story: {log}"
    assert "in a_filter_of_others" in log.read_text()
