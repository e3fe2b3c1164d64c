"""The stages of a run, from where it is to its end: what `zeroray run` does once the run folder is claimed.

    execute(run, folder) -> exit code
        prepare      documents, tokenizer, tokens: each skipped when its manifest stands, else through Ray tasks
        train, evaluate, export      one gang; skipped when the ledger says that all of them were done with these keys

A run with nothing left to do starts no Ray. When asked to stop (`cluster.interrupts`) ranks commit a checkpoint and
end, preparation submits nothing more; exit 6. What a gang's end means is decided in `cluster.policy`; a restart is a
new generation in the same driver. Raises ValueError and ClusterDown for the command line to tell.
"""

import contextlib
import glob
import os
import re
import socket
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from cluster.display import Display, duration, stage_line, train_line
from cluster.gang import GangFailed, GangRequest, Target, log_tail, rank_log, run_gang
from cluster.interrupts import StopRequest, listening
from cluster.policy import (
    DISK_ERRNOS,
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_QUARANTINE,
    EXIT_STOPPED,
    EXIT_TOO_MUCH_QUARANTINE,
    Action,
    Attempt,
    Cause,
    Decision,
    Failure,
    Limits,
    Stopped,
    TaskFailed,
    decide,
)
from cluster.preprocess import Progress, TaskFunction, run_stage
from cluster.run_folder import LeaseLost, RunFolder, settle_paths
from cluster.session import Session, check_ranks, connect, inside_job
from cluster.shared_folder import check_shared
from conf.identity import content_hash, scientific
from conf.refusal import BadRequest, refuse
from conf.schema import Run, Stage
from data_pipeline.store import NoValidCheckpoint, claim_generation, read_json

PROGRESS_EVENT_EVERY_S = 30.0
RESULTS = {
    Stage.evaluate: ("evaluation.json",),
    Stage.export: ("export/zeroray.json", "export/model.safetensors", "export/tokenizer.json", "samples.json"),
}
SHOW_LOG = (Cause.bug, Cause.worker_lost, Cause.peer_lost, Cause.node_lost, Cause.out_of_memory)
GANG_STAGES = (Stage.train, Stage.evaluate, Stage.export)
END_STATES = {EXIT_DONE: "done", EXIT_QUARANTINE: "done", EXIT_STOPPED: "stopped"}


def execute(
    run: Run, folder: RunFolder, *, task_function: TaskFunction | None = None, target: Target | None = None
) -> int:
    """Take the run to its end; returns the exit code. A test may put its own work in place of tasks and ranks."""
    settle_paths(run, inside_job())
    os.makedirs(folder.path, exist_ok=True)
    display = Display()
    stop = StopRequest(folder)
    with listening(stop), contextlib.ExitStack() as stack:
        graph = Graph(run, folder, stop, display, stack, task_function, target)
        try:
            return graph.go()
        except Stopped:
            return graph.ended(EXIT_STOPPED, "stopped as asked; the same command continues")
        except OSError as error:
            if error.errno not in DISK_ERRNOS:
                raise
            where = error.filename or f"{run.paths.runs} or {run.paths.store}"
            return graph.ended(EXIT_STOPPED, f"{where}: {error.strerror}: make room; the same command continues")
        except LeaseLost as error:
            return graph.ended(EXIT_FAILED, str(error))
        except TaskFailed as error:
            return graph.ended(EXIT_FAILED, error.told(folder.driver_log))


@dataclass
class Graph:
    """One execution of a run's stages."""

    run: Run
    folder: RunFolder
    stop: StopRequest
    display: Display
    stack: contextlib.ExitStack
    task_function: TaskFunction | None = None
    target: Target | None = None
    session: Session | None = None
    quarantined: int = 0
    last_event_at: float = field(default_factory=time.monotonic)

    def go(self) -> int:
        """All stages in order."""
        check_ranks_early(self.run)
        prepared = self.prepare()
        if prepared is None:
            return EXIT_TOO_MUCH_QUARANTINE
        code = EXIT_DONE
        if set(self.run.stages) & set(GANG_STAGES):
            code = self.train(*prepared)
        if code == EXIT_DONE and self.quarantined:
            code = EXIT_QUARANTINE
        if code in (EXIT_DONE, EXIT_QUARANTINE):
            self.show_places(prepared[0])
            self.event("end", state="done", exit_code=code, reason=self.quarantine_text() if self.quarantined else "")
            self.stop.ended = code
        return code

    def ended(self, code: int, reason: str) -> int:
        """Tell and record an end that is none of success; returns the exit code."""
        self.display.say(reason)
        self.event("end", state=END_STATES.get(code, "failed"), exit_code=code, reason=reason.splitlines()[0])
        self.stop.ended = code
        return code

    def event(self, name: str, **facts: Any) -> None:
        """A line in the ledger; a disk that is full already has been told."""
        try:
            self.folder.ledger.append(name, **facts)
        except OSError as error:
            if error.errno not in DISK_ERRNOS or name != "end":
                raise

    def connected(self) -> Session:
        """The Ray of this execution, started or joined when it is first needed."""
        if self.session is None:
            began = time.monotonic()
            try:
                self.session = self.stack.enter_context(connect(self.run))
            except SystemExit as error:  # what Ray makes of a SIGTERM while it starts
                raise Stopped from error
            self.stop.listen()
            kind = "private local Ray" if self.session.private else f"Ray at {self.session.address}"
            self.display.say(
                f"{kind} in {duration(time.monotonic() - began)}: {self.session.cpus:g} CPUs, "
                f"{self.session.gpus:g} GPUs; dashboard {self.session.dashboard_url}"
                + (" (its token is RAY_AUTH_TOKEN, if you set one before)" if self.session.private else "")
            )
            check_shared(self.run, self.session)
        return self.session

    # --- prepare ---

    def prepare(self) -> tuple[str, str] | None:
        """Make or find the three stages; the tokens folder and its content hash, None when too much is quarantined."""
        from data_pipeline.manifest import Manifest
        from data_pipeline.stages import plan

        manifests: list[Manifest] = []
        builders = plan(self.run)
        trained_on = documents_of_history(self.folder.events())
        for number, build in enumerate(builders):
            work = build(*manifests)
            self.stop.check()
            if not work.done():
                self.make(work, number, len(builders))
            else:
                self.event("stage", stage=work.name, state="skipped", key=os.path.basename(work.folder))
            manifests.append(Manifest.load(work.folder))
            if work.name == "documents":
                refuse_other_documents(self.run, trained_on, manifests[-1])
                if not self.accounted(manifests[-1], work.folder):
                    return None
        self.event("stage", stage=Stage.prepare.name, state="done", done=len(builders), total=len(builders))
        return work.folder, manifests[-1].content_sha256

    def make(self, work: Any, number: int, total: int) -> None:
        """Compute one stage through Ray."""
        if Stage.prepare not in self.run.stages:
            names = f"[{','.join(stage.name for stage in self.run.stages)}]"
            raise refuse(
                "stages", names, f"the stage {work.name} of this data is not prepared", "add prepare to stages"
            )
        session = self.connected()
        self.display.say(work.describe())
        key = os.path.basename(work.folder)
        self.event("stage", stage=Stage.prepare.name, state="progress", done=number, total=total)
        self.event("stage", stage=work.name, state="started", done=0, total=len(work.tasks()), key=key)
        began = time.monotonic()
        workers = max(1, min(self.run.cluster.workers, int(session.cpus)))
        run_stage(work, workers, self.report, self.stop.asked, self.task_function)
        seconds, tasks = time.monotonic() - began, len(work.tasks())
        self.event("stage", stage=work.name, state="done", done=tasks, total=tasks, key=key, seconds=round(seconds, 3))
        self.display.say(f"{work.name}: done in {duration(seconds)}")

    def report(self, progress: Progress) -> None:
        """Show a stage's progress, and note it in the ledger now and then."""
        self.display.move(stage_line(progress))
        if time.monotonic() - self.last_event_at > PROGRESS_EVENT_EVERY_S:
            self.last_event_at = time.monotonic()
            self.event("stage", stage=progress.stage, state="progress", done=progress.done, total=progress.total)

    def accounted(self, manifest: Any, folder: str) -> bool:
        """Whether little enough was quarantined to go on; says what was."""
        counts = manifest.accounting
        self.quarantined = sum(counts["quarantined"].values())
        if not self.quarantined:
            return True
        share, limit = self.quarantined / counts["read"], self.run.data.quarantine_limit
        reasons = ", ".join(f"{n} {reason}" for reason, n in counts["quarantined"].items())
        text = f"quarantined {self.quarantined} of {counts['read']} documents ({share:.2%}): {reasons}"
        text = f"{text}; they are in {folder}/quarantine"
        if share <= limit:
            self.display.say(text)
            return True
        self.ended(EXIT_TOO_MUCH_QUARANTINE, f"{text}\ndata.quarantine_limit={limit}: raise it to go on without them")
        return False

    def quarantine_text(self) -> str:
        """Why the exit code is 3."""
        return f"done; {self.quarantined} documents are in quarantine"

    # --- train, evaluate, export ---

    def train(self, tokens_folder: str, content_sha256: str) -> int:
        """Gangs, until one comes to the end or the policy says so; returns the exit code."""
        if self.trained(content_sha256):
            return EXIT_DONE
        self.stop.check()
        session = self.connected()
        history: list[Attempt] = []
        while True:
            failure = self.attempt(session, tokens_folder)
            if failure is None:
                return EXIT_DONE
            step = newest_step(self.folder.path)
            limits = Limits(self.run.cluster.max_restarts)
            decision = decide(failure.cause, step, history, limits, self.stop.asked())
            self.tell(failure, decision)
            if decision.action is not Action.restart:
                return self.finish(failure, decision)
            history.append(Attempt(failure.cause, step))

    def trained(self, content_sha256: str) -> bool:
        """Whether the ledger says that every wanted stage was done with these keys and this data."""
        key = stage_key(self.run, content_sha256)
        events = [e for e in self.folder.events() if e["event"] == "stage" and e.get("key") == key]
        done = {e["stage"] for e in events if e["state"] == "done"}
        wanted = [stage for stage in self.run.stages if stage in GANG_STAGES]
        files = [f"{self.folder.path}/{name}" for stage in wanted for name in RESULTS.get(stage, ())]
        return {stage.name for stage in wanted} <= done and all(map(is_whole, files))

    def attempt(self, session: Session, tokens_folder: str) -> Failure | None:
        """One life of a gang; None when it came to the end."""
        facts = {
            "attempt": 1 + sum(e["event"] == "attempt" for e in self.folder.events()),
            "ranks": self.run.cluster.ranks,
        }
        self.folder.check_lease()  # a driver that was taken over must not supersede its successor's gang
        generation = claim_generation(f"{self.folder.path}/generations", facts)
        self.event(
            "attempt", **facts, generation=generation, pid=os.getpid(), host=socket.gethostname(), command=sys.argv[1:]
        )
        self.display.say(f"training: {self.run.cluster.ranks} ranks, generation {generation}; {self.folder.path}/logs")
        request = GangRequest(self.run, self.folder.path, session, generation, tokens_folder, self.target)
        try:
            outcome = run_gang(request, self.watch, self.stop.check)
        except GangFailed as error:
            return error.failure
        return Failure(Cause.stopped, "asked to stop") if outcome["state"] == "stopped" else None

    def watch(self) -> None:
        """Show how training goes, from the last row of metrics.jsonl; raises LeaseLost, which ends the gang."""
        self.folder.check_lease()
        row = self.folder.last_row()
        if row.get("step"):
            self.display.move(train_line(row, self.run.train.steps))

    def tell(self, failure: Failure, decision: Decision) -> None:
        """Record why a gang ended and what follows."""
        if failure.cause is not Cause.stopped:
            self.event("cause", cause=failure.cause.name, rank=failure.rank, detail=failure.message[:1000])
        self.event("decision", text=f"{decision.action.value}: {decision.reason}")
        if decision.action is Action.restart:
            who = "a rank" if failure.rank is None else f"rank {failure.rank}"
            self.display.say(f"{who}: {failure.message.splitlines()[0]}\n{decision.reason}")

    def finish(self, failure: Failure, decision: Decision) -> int:
        """The end of a run whose gang did not come to its own."""
        if failure.cause is Cause.bad_request:
            raise BadRequest(failure.message)
        if failure.cause is Cause.no_checkpoint:
            raise NoValidCheckpoint(failure.message)
        if failure.cause is Cause.stopped:
            return self.ended(
                decision.exit_code, f"stopped at step {newest_step(self.folder.path)}; the same command continues"
            )
        if failure.cause is Cause.disk_full:
            return self.ended(decision.exit_code, f"{self.folder.path}: the disk is full\n{decision.reason}")
        if failure.rank is not None and failure.cause in SHOW_LOG:
            log, tail = rank_log(self.folder.path, failure.rank), log_tail(self.folder.path, failure.rank)
            self.display.say(f"the last lines of {log}:\n{tail}\n")
        who = "" if failure.rank is None else f"rank {failure.rank}: "
        return self.ended(decision.exit_code, f"{who}{failure.message}\n{decision.reason}")

    # --- the end ---

    def show_places(self, tokens_folder: str) -> None:
        """Print where everything is and what can be done with it."""
        self.display.clear()
        name, path = self.folder.name, self.folder.path
        there = {
            "run": path,
            "export": f"{path}/export",
            "evaluation": f"{path}/evaluation.json",
            "samples": f"{path}/samples.json",
            "checkpoints": f"{path}/checkpoints",
            "metrics": f"{path}/metrics.jsonl",
            "W&B": f"{path}/wandb",
            "logs": f"{path}/logs",
            "tokens": tokens_folder,
        }
        lines = [f"  {label:<12} {place}" for label, place in there.items() if os.path.exists(place)]
        place = "" if self.run.paths.runs == os.path.abspath("runs") else f" paths.runs={self.run.paths.runs}"
        following = [f"zeroray status {name}{place}"]
        if os.path.exists(there["export"]):
            following += [f'zeroray generate {name} "def "{place}', f"zeroray eval {name}{place}"]
        sys.stdout.write(
            "\n".join([f"{name}: done", *self.figures(), *lines, "next:", *(f"  {c}" for c in following)]) + "\n"
        )
        sys.stdout.flush()

    def figures(self) -> list[str]:
        """What was learned, in a line, if it was measured."""
        try:
            found = read_json(f"{self.folder.path}/evaluation.json")
            after, unigram = found["heldout"]["bpb"], found["heldout_unigram"]["bpb"]
        except (OSError, ValueError, KeyError, TypeError):
            return []
        before = f"{found['before']['bpb']:.4f} before, " if found.get("before") else ""
        return [
            f"  held-out bits per byte: {before}{after:.4f} after step {found['step']}; unigram model {unigram:.4f}"
        ]


def is_whole(path: str) -> bool:
    """Whether a result is there and, if it is JSON, can be read."""
    try:
        return read_json(path) is not None if path.endswith(".json") else os.path.getsize(path) > 0
    except (OSError, ValueError):
        return False


def documents_of_history(events: list[dict[str, Any]]) -> str | None:
    """The key of the documents that the newest checkpoint was trained on; None before there is one."""
    now = trained = None
    for event in events:
        if event["event"] == "stage" and event.get("stage") == "documents":
            now = event.get("key", now)
        elif event["event"] == "checkpoint":
            trained = now
    return trained


def refuse_other_documents(run: Run, trained_on: str | None, found: Any) -> None:
    """Refuse other documents than the run was trained on before they are tokenized, unless that is allowed."""
    from data_pipeline.manifest import Manifest

    if trained_on is None or {key.split(".")[0] for key in run.run.allow} & {"data", "corpus", "tokenizer"}:
        return
    folder = os.path.join(run.paths.store, "documents", trained_on)
    if os.path.exists(f"{folder}/manifest.json") and Manifest.load(folder).content_sha256 != found.content_sha256:
        raise refuse(
            "corpus",
            run.corpus.name,
            "the data of this run changed since it began",
            "restore it, allow it with run.allow=[data], or start another run with run.name=...",
        )


def stage_key(run: Run, content_sha256: str) -> str:
    """What the stages after prepare depend on: the key `trainer.train` writes with them, without importing torch."""
    return content_hash([scientific(run), content_sha256])


def check_ranks_early(run: Run) -> None:
    """Refuse too many ranks for this machine before anything is prepared, where the Ray will be a private one."""
    from cluster.session import available_cpus, chosen_address, connected

    if not connected() and chosen_address(run)[0] is None:
        check_ranks(run, available_cpus())


def newest_step(run_folder: str) -> int:
    """The step of the newest commit by name, valid or not; 0 when there is none."""
    found = glob.glob(f"{glob.escape(run_folder)}/checkpoints/step-*/gen-*/manifest.json")
    return max((int(m.group(1)) for m in (re.search(r"/step-(\d+)/", path) for path in found) if m), default=0)
