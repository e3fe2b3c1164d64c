"""One stage of preparation as plain Ray tasks: bounded in flight, retried by cause, whole or resumable.

    run_stage(work, workers, report, stop_wanted)
        lease on the stage's folder      two processes, one stage: one computes, the other waits or takes over
        tasks without a committed result, at most `workers` in flight
        a worker that died: its task again, three times; out of memory: also fewer in flight
        any error of the task itself: stop at once, raise it here as the type it had
        finish()                         the manifest, which is the commit

What a task has committed stays, whatever happens: the next process skips it. `work` is a `data_pipeline.stages.Work`.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cluster.policy import Cause, Failure, Stopped, TaskFailed, describe, rebuild
from cluster.session import plugin_folder
from data_pipeline.store import Lease

if TYPE_CHECKING:
    from data_pipeline.stages import Work

TASK_RETRIES = 3
POLL_S = 0.2

TaskFunction = Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]


@dataclass
class Progress:
    """How far a stage is: tasks, and bytes of text done by this process."""

    stage: str
    done: int
    total: int
    started_at: float = field(default_factory=time.monotonic)
    done_before: int = 0
    bytes: int = 0
    waiting_for: str = ""

    @property
    def seconds(self) -> float:
        """Seconds since this process began with the stage."""
        return time.monotonic() - self.started_at

    @property
    def bytes_per_s(self) -> float:
        """Bytes of text a second of this process."""
        return self.bytes / max(self.seconds, 1e-9)

    @property
    def eta_s(self) -> float | None:
        """Seconds to go at the pace so far; None before the first task is done."""
        ours = self.done - self.done_before
        return self.seconds / ours * (self.total - self.done) if ours else None


Report = Callable[[Progress], None]


def run_stage(
    work: "Work",
    workers: int,
    report: Report,
    stop_wanted: Callable[[], bool],
    function: TaskFunction | None = None,
) -> None:
    """Do all unfinished tasks of `work` and commit its manifest; `function` stands in for `stages.run_task` in a test.

    Raises Stopped when `stop_wanted`, the task's own ValueError or OSError, or TaskFailed for what is none of these.
    """
    progress = Progress(work.name, 0, 0)
    with held(work.folder, progress, report, stop_wanted):
        if not work.done():
            tasks = work.tasks()
            todo = [task for task in tasks if not work.task_done(task)]
            progress.total, progress.done = len(tasks), len(tasks) - len(todo)
            progress.done_before, progress.waiting_for = progress.done, ""
            progress.started_at = time.monotonic()
            report(progress)
            if todo:
                StageRunner(work.spec(), todo, workers, function).run(progress, report, stop_wanted)
            work.finish()


@contextlib.contextmanager
def held(folder: str, progress: Progress, report: Report, stop_wanted: Callable[[], bool]) -> Iterator[None]:
    """The lease on a stage's folder; says who has it while waiting."""
    os.makedirs(folder, exist_ok=True)
    lease = Lease(f"{folder}/lease")
    for holder in lease.acquire():
        progress.waiting_for = f"process {holder['pid']} on {holder['host']}"
        report(progress)
        if stop_wanted():
            raise Stopped
    try:
        yield
    finally:
        lease.release()


def execute_task(
    function: TaskFunction | None, spec: dict[str, Any], task: dict[str, Any], folder: str | None
) -> dict[str, Any]:
    """In a worker: one task; its summary, or its error as plain values."""
    from data_pipeline.stages import run_task

    try:
        return {"summary": (function or run_task)({**spec, "folder_of_plugins": folder or os.getcwd()}, task)}
    except Exception as error:  # handed to the driver, which raises it there
        return {"error": describe(error)}


def text_bytes(summary: dict[str, Any]) -> int:
    """The bytes of text that a task's summary speaks of, over all splits; of its output when it speaks of none."""
    counts = summary.get("counts", {})
    parts = [counts, *(part for part in counts.values() if isinstance(part, dict))]
    found = [part["text_bytes"] for part in parts if "text_bytes" in part]
    return int(sum(found)) if found else int(summary.get("bytes", 0))


class StageRunner:
    """The tasks of one stage on their way through Ray."""

    def __init__(
        self, spec: dict[str, Any], todo: list[dict[str, Any]], workers: int, function: TaskFunction | None
    ) -> None:
        import ray

        self.spec = ray.put(spec)
        self.remote = ray.remote(num_cpus=1, max_retries=0)(execute_task)
        self.function = function
        self.waiting = list(reversed(todo))
        self.in_flight: dict[Any, dict[str, Any]] = {}
        self.limit = workers
        self.losses: dict[str, int] = {}

    def run(self, progress: Progress, report: Report, stop_wanted: Callable[[], bool]) -> None:
        """Work until all tasks are done; whatever ends this early also ends the tasks in flight."""
        try:
            while self.waiting or self.in_flight:
                if stop_wanted():
                    raise Stopped
                self.submit()
                for summary in self.collect():
                    progress.done += 1
                    progress.bytes += text_bytes(summary)
                report(progress)
        finally:
            self.cancel()

    def submit(self) -> None:
        """Fill up what may be in flight."""
        while self.waiting and len(self.in_flight) < self.limit:
            task = self.waiting.pop()
            self.in_flight[self.remote.remote(self.function, self.spec, task, plugin_folder())] = task

    def collect(self) -> Iterator[dict[str, Any]]:
        """The summaries of the tasks that ended since; a lost one is queued again."""
        import ray

        ray.wait(list(self.in_flight), num_returns=1, timeout=POLL_S)
        ended, _ = ray.wait(list(self.in_flight), num_returns=len(self.in_flight), timeout=0)
        for ref in ended:
            task = self.in_flight.pop(ref)
            try:
                result = ray.get(ref)
            except ray.exceptions.RayError as error:
                self.lost(task, error)
                continue
            if "error" in result:
                raise rebuild(result["error"])
            yield result["summary"]

    def lost(self, task: dict[str, Any], error: Exception) -> None:
        """Queue the task of a worker that died again, a limited number of times."""
        import ray

        died = (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.LocalRayletDiedError)
        starved = isinstance(error, ray.exceptions.OutOfMemoryError)
        if not starved and not isinstance(error, died):
            raise TaskFailed(Failure(Cause.bug, str(error))) from error
        if starved:
            self.limit = max(1, self.limit // 2)
        key = json.dumps(task, sort_keys=True)
        count = self.losses[key] = self.losses.get(key, 0) + 1
        if count > TASK_RETRIES:
            cause = Cause.out_of_memory if starved else Cause.worker_lost
            raise TaskFailed(
                Failure(cause, f"{cause.value}, {count} times with the same task: {key[:200]}"), [str(error)]
            )
        self.waiting.append(task)

    def cancel(self) -> None:
        """End the tasks in flight at once; what they had committed stays."""
        import ray

        for ref in self.in_flight:
            ray.cancel(ref, force=True)
        self.in_flight.clear()
