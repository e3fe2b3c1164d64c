"""One stage through Ray tasks: bounded, retried by cause, resumable, one process at a time."""

import errno
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.policy import Cause, Stopped, TaskFailed
from cluster.preprocess import Progress, run_stage
from conf.refusal import BadRequest
from data_pipeline.store import Lease, write_json

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("shared_ray")]


class Squares:
    """A stage that squares numbers; each task leaves a line per try in its own file."""

    name = "squares"

    def __init__(self, folder: Path, numbers: int, **tricks: Any) -> None:
        self.folder = str(folder)
        self.numbers = numbers
        self.tricks = tricks

    def spec(self) -> dict[str, Any]:
        return {"folder": self.folder, **self.tricks}

    def tasks(self) -> list[dict[str, Any]]:
        return [{"number": n} for n in range(self.numbers)]

    def result(self, n: int) -> str:
        return f"{self.folder}/tasks/task-{n:05d}.json"

    def task_done(self, task: dict[str, Any]) -> bool:
        return os.path.exists(self.result(task["number"]))

    def done(self) -> bool:
        return os.path.exists(f"{self.folder}/manifest.json")

    def finish(self) -> None:
        total = sum(json.loads(Path(self.result(n)).read_text())["square"] for n in range(self.numbers))
        write_json(f"{self.folder}/manifest.json", {"total": total})

    def tries(self, n: int) -> int:
        path = Path(f"{self.folder}/tries-{n}")
        return len(path.read_text()) if path.exists() else 0


def square(spec: dict[str, Any], task: dict[str, Any]) -> dict[str, Any]:
    n = task["number"]
    with open(f"{spec['folder']}/tries-{n}", "a") as file:
        file.write(".")
    tries = os.path.getsize(f"{spec['folder']}/tries-{n}")
    if n == spec.get("dies") and tries <= spec.get("times", 1):
        os.kill(os.getpid(), signal.SIGKILL)
    if n == spec.get("full"):
        raise OSError(errno.ENOSPC, "No space left on device", spec["folder"])
    if n == spec.get("wrong"):
        raise BadRequest("corpus.path=x: is no such thing")
    if n == spec.get("bug"):
        raise KeyError("a bug")
    time.sleep(spec.get("sleep", 0))
    write_json(f"{spec['folder']}/tasks/task-{n:05d}.json", {"square": n * n})
    return {"bytes": 100}


def total(work: Squares) -> int:
    return int(json.loads(Path(work.folder, "manifest.json").read_text())["total"])


def never() -> bool:
    return False


def test_all_tasks_and_progress(tmp_path: Path) -> None:
    work, seen = Squares(tmp_path / "s", 6), []
    run_stage(work, 2, lambda p: seen.append((p.done, p.total, p.bytes)), never, square)
    assert total(work) == 55
    assert seen[0] == (0, 6, 0)
    assert seen[-1] == (6, 6, 600)
    run_stage(work, 2, lambda p: pytest.fail("done work reports nothing"), never, square)
    assert [work.tries(n) for n in range(6)] == [1] * 6


def test_finished_tasks_are_skipped(tmp_path: Path) -> None:
    work = Squares(tmp_path / "s", 4, bug=2)
    with pytest.raises(TaskFailed, match="a bug") as caught:
        run_stage(work, 1, lambda p: None, never, square)
    assert caught.value.failure.cause is Cause.bug
    assert "in square" in str(caught.value), "the task's own traceback is shown"
    work.tricks = {}
    run_stage(work, 1, lambda p: None, never, square)
    assert [work.tries(n) for n in range(4)] == [1, 1, 2, 1]
    assert total(work) == 14


def test_a_worker_that_dies_is_tried_again(tmp_path: Path) -> None:
    work = Squares(tmp_path / "s", 3, dies=1, times=2)
    run_stage(work, 2, lambda p: None, never, square)
    assert (work.tries(1), total(work)) == (3, 5)


def test_a_worker_that_dies_for_ever_fails(tmp_path: Path) -> None:
    work = Squares(tmp_path / "s", 1, dies=0, times=99)
    with pytest.raises(TaskFailed) as caught:
        run_stage(work, 2, lambda p: None, never, square)
    assert caught.value.failure.cause is Cause.worker_lost
    assert work.tries(0) == 4


@pytest.mark.parametrize(("trick", "kind"), [("full", OSError), ("wrong", ValueError)])
def test_errors_of_the_task_end_the_stage_at_once(tmp_path: Path, trick: str, kind: type[Exception]) -> None:
    work = Squares(tmp_path / "s", 50, sleep=0.05, **{trick: 1})
    with pytest.raises(kind) as caught:
        run_stage(work, 2, lambda p: None, never, square)
    assert sum(work.tries(n) for n in range(50)) < 10, "no new tasks after the error"
    assert work.tries(1) == 1, "not tried again"
    if trick == "full":
        assert isinstance(caught.value, OSError)
        assert caught.value.errno == errno.ENOSPC
    assert not work.done()


def test_stop_keeps_what_is_finished(tmp_path: Path) -> None:
    work, seen = Squares(tmp_path / "s", 50, sleep=0.2), Progress("", 0, 0)

    def report(progress: Progress) -> None:
        seen.done = progress.done

    with pytest.raises(Stopped):
        run_stage(work, 2, report, lambda: seen.done >= 2, square)
    finished = [n for n in range(50) if work.task_done({"number": n})]
    assert 2 <= len(finished) < 10
    assert Lease(f"{work.folder}/lease").holder() is None, "the lease is given back"


def test_bounded_in_flight(tmp_path: Path) -> None:
    work = Squares(tmp_path / "s", 8, sleep=0.3)
    started = time.monotonic()
    run_stage(work, 1, lambda p: None, never, square)
    assert time.monotonic() - started >= 8 * 0.3, "one worker means one task at a time"


def test_two_processes_one_computes_the_other_waits(tmp_path: Path) -> None:
    work, waited = Squares(tmp_path / "s", 2), []
    os.makedirs(work.folder)
    other = Lease(f"{work.folder}/lease")
    assert other.try_acquire()
    threading.Timer(1.0, other.release).start()
    run_stage(work, 2, lambda p: waited.append(p.waiting_for), never, square)
    assert waited[0] == f"process {os.getpid()} on {os.uname().nodename}"
    assert total(work) == 1


def test_a_dead_holder_is_taken_over(tmp_path: Path) -> None:
    work = Squares(tmp_path / "s", 2)
    record = {"token": "x", "host": os.uname().nodename, "pid": 2**22 - 1, "start": "1", "beat": 0}
    write_json(f"{work.folder}/lease", record)
    started = time.monotonic()
    run_stage(work, 2, lambda p: None, never, square)
    assert time.monotonic() - started < 10
