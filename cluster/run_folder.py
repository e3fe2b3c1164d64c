"""The folder of one run: who may work in it, whether a request fits what is there, and the files a reader finds.

    folder = RunFolder(paths_runs, name)
    with folder.claimed():            one driver at a time (`lease.json`); another one is told who and since when
        folder.admit(run)             "new" or "continue"; refuses other scientific keys, a history without checkpoint
        ...                           graph.execute(run, folder)

    run.yaml       the composed run        ledger.jsonl   what happened         metrics.jsonl   one row a step
    checkpoints/   committed states        logs/          driver.log, rank-*    stop            a request to stop

Nothing here needs Ray or torch, so that status, logs, list and stop answer at once and when everything else is dead;
checkpoints are verified (which needs torch) only by `admit`, and only before training. History means that a step was
committed once: files of a first checkpoint that was killed before its commit are none, so the same command continues.
"""

import contextlib
import glob
import itertools
import json
import os
import socket
import time
from collections.abc import Iterator
from typing import Any

from conf.identity import differences, scientific
from conf.keys import Names, names
from conf.refusal import BadRequest, refuse
from conf.saved import load_run, to_yaml
from conf.schema import Run, Stage
from data_pipeline.ledger import Ledger
from data_pipeline.store import EXPIRY_S, Lease, NoValidCheckpoint, read_json, write_bytes

DIFFERENCES_SHOWN = 20
VALUE_CHARS = 32
JOB_HOME = "ZERORAY_HOME"
NEEDS_CHECKPOINT = {Stage.train, Stage.evaluate, Stage.export}


class AlreadyActive(BadRequest):
    """Another process is working on this run."""


class LeaseLost(Exception):  # noqa: N818 (an outcome)
    """Another driver has taken over the run that this one was working on."""


class OtherSettings(BadRequest):
    """The request differs from the run in scientific keys; the message holds a table and may be longer than others."""


def job_home() -> str:
    """Where relative `paths.*` of a Ray job lead: the job's own working folder is a temporary copy."""
    return os.path.abspath(os.path.expanduser(os.environ.get(JOB_HOME) or "~/zeroray"))


def settle_paths(run: Run, inside_job: bool) -> None:
    """Make `paths.runs` and `paths.store` absolute, to where they outlive this process."""
    base = job_home() if inside_job else os.getcwd()
    run.paths.runs = os.path.normpath(os.path.join(base, os.path.expanduser(run.paths.runs)))
    run.paths.store = os.path.normpath(os.path.join(base, os.path.expanduser(run.paths.store)))


class RunFolder:
    """One run's folder, `<paths_runs>/<name>`; making the object touches nothing."""

    def __init__(self, paths_runs: str, name: str) -> None:
        self.name = name
        self.path = os.path.abspath(os.path.join(os.path.expanduser(paths_runs), name))
        self.ledger = Ledger(self.path)
        self.lease_path = f"{self.path}/lease.json"
        self.stop_path = f"{self.path}/stop"
        self.yaml_path = f"{self.path}/run.yaml"
        self.logs = f"{self.path}/logs"
        self.driver_log = f"{self.path}/logs/driver.log"
        self._lease: Lease | None = None

    # --- who works here ---

    def holder(self) -> dict[str, Any] | None:
        """The record of the live driver of this run, or None; one elsewhere is alive while its heartbeat is fresh."""
        record = Lease(self.lease_path).holder()
        if record is None or record["host"] == socket.gethostname():
            return record
        with contextlib.suppress(FileNotFoundError):
            if time.time() - os.path.getmtime(self.lease_path) < EXPIRY_S:
                return record
        return None

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Be the one driver of this run; raises AlreadyActive, saying who is, when there is another."""
        self._lease = self._claim()
        try:
            self.withdraw_stop()  # it was meant for the driver before
            yield
        finally:
            self._lease.release()
            with contextlib.suppress(OSError):
                os.rmdir(self.path)  # a request that was refused leaves no folder behind

    def _claim(self) -> Lease:
        """Take the lease; a holder on another machine is given the time of a heartbeat to show that it lives."""
        lease, seen = Lease(self.lease_path), None
        for record in lease.acquire():
            if record["host"] == socket.gethostname() or (seen is not None and record != seen):
                raise self.active_error(record)
            seen = record
        return lease

    def check_lease(self) -> None:
        """Raise LeaseLost when this driver was paused or cut off for so long that another one took the run over."""
        if self._lease is not None and not self._lease.verify():
            raise LeaseLost(
                f"run.name={self.name}: another driver has taken over this run, after this one gave no sign of life "
                f"for {EXPIRY_S:g} s; this one ends\nlook at it: zeroray status {self.name}"
            )

    def active_error(self, record: dict[str, Any]) -> AlreadyActive:
        """Who is active, where and since when, and how to look at it."""
        starts = [e for e in self.events() if e["event"] == "start" and e.get("pid") == record["pid"]]
        since = f" since {clock(starts[-1]['time'])}" if starts else ""
        return AlreadyActive(
            f"run.name={self.name}: is active: process {record['pid']} on {record['host']}{since}\n"
            f"look at it: zeroray status {self.name}   zeroray logs -f {self.name}\n"
            f"end it: zeroray stop {self.name}; or start another: run.name=..."
        )

    def ask_to_stop(self) -> None:
        """Ask the driver to commit a checkpoint and end."""
        write_bytes(self.stop_path, b"stop\n")

    def withdraw_stop(self) -> None:
        """Take back a request to stop."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.stop_path)

    # --- what is there ---

    def exists(self) -> bool:
        """Whether anything of this run is there."""
        return os.path.exists(self.yaml_path) or os.path.exists(self.ledger.path) or self.has_history()

    def events(self) -> list[dict[str, Any]]:
        """The ledger's whole events, oldest first; lines torn by a kill or a full disk are left out."""
        return self.ledger.read()

    def stage_key(self, stage: str) -> str | None:
        """The key of a stage of preparation that this run used last, which is its folder's name in the store."""
        events = (e for e in reversed(self.events()) if e["event"] == "stage" and e.get("stage") == stage)
        return next((str(e["key"]) for e in events if e.get("key")), None)

    def has_history(self) -> bool:
        """Whether a step of this run was ever committed."""
        metrics = f"{self.path}/metrics.jsonl"
        if os.path.exists(metrics) and os.path.getsize(metrics) > 0:
            return True
        if any(glob.iglob(f"{glob.escape(self.path)}/checkpoints/*/gen-*/manifest.json")):
            return True
        return any(e["event"] == "checkpoint" for e in self.events())

    def has_results(self) -> bool:
        """Whether something was made under the settings in run.yaml, so that other ones would be another run."""
        return self.has_history() or any(e["event"] == "stage" for e in self.events())

    def last_row(self) -> dict[str, Any]:
        """The last whole row of metrics.jsonl; empty when there is none."""
        lines = tail(f"{self.path}/metrics.jsonl")
        rows = (json_object(line) for line in reversed(lines))
        return next((row for row in rows if row and isinstance(row.get("step"), int)), {})

    def submission(self) -> dict[str, Any] | None:
        """The record of the newest Ray job this run was submitted as from this machine."""
        try:
            record = read_json(f"{self.path}/submission.json")
        except (FileNotFoundError, ValueError):
            return None
        return record if isinstance(record, dict) else None

    # --- may this request work here ---

    def admit(self, run: Run) -> str:
        """Check the request against what is here and write run.yaml; returns "new" or "continue".

        Raises ValueError for changed scientific keys, and NoValidCheckpoint where a history has no whole checkpoint.
        """
        check_allow(run.run.allow, names())
        known = self.exists()
        if known and run.run.fresh:
            self._move_aside()
            known = False
        if known and self.has_results():
            self._compare(run)
            if self.has_history() and NEEDS_CHECKPOINT & set(run.stages):
                self._need_checkpoint()
        write_bytes(self.yaml_path, to_yaml(run).encode())
        return "continue" if known else "new"

    def _move_aside(self) -> None:
        """Rename the folder to `<name>.old-N` and hold the lease of the new, empty one."""
        free = (f"{self.path}.old-{n}" for n in itertools.count(1))
        aside = next(path for path in free if not os.path.exists(path))
        os.rename(self.path, aside)
        if self._lease is not None:
            self._lease.release()
            self._lease = self._claim()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{aside}/lease.json")
        os.makedirs(self.path, exist_ok=True)
        self.ledger.append("decision", text=f"run.fresh=true: what was here is now {aside}")

    def _compare(self, run: Run) -> None:
        """Refuse scientific keys that differ and are not allowed; record those that are."""
        if not os.path.exists(self.yaml_path):
            reason = "its run.yaml is gone, so nobody can tell whether this is the same run"
            raise refuse("run.name", self.name, reason, "restore the file, or move the run aside with run.fresh=true")
        changed = differences(scientific(load_run(self.yaml_path)), scientific(run))
        refused = [row for row in changed if not covered(row[0], run.run.allow)]
        if refused and self.has_history():
            # run.yaml may be that of a request that came to nothing; what was trained with stands in the commit.
            changed = differences(self._trained_with(), scientific(run))
            refused = [row for row in changed if not covered(row[0], run.run.allow)]
        if refused:
            raise OtherSettings(difference_message(self.name, refused))
        if changed:
            keys = [{"key": key, "before": before, "now": now} for key, before, now in changed]
            text = f"run.allow: {', '.join(key for key, _, _ in changed)} changed in a run that had begun"
            self.ledger.append("decision", text=text, allowed=keys)

    def _trained_with(self) -> Any:
        """The scientific part of the run that the newest whole commit was trained with, else of run.yaml."""
        from trainer.checkpoint import newest_valid

        commit, _ = newest_valid(self.path)
        known = None if commit is None else commit.state().extra.get("run")
        return scientific(load_run(self.yaml_path)) if known is None else known

    def _need_checkpoint(self) -> None:
        """Refuse a history from which nothing can be continued."""
        from trainer.checkpoint import newest_valid

        commit, damaged = newest_valid(self.path)
        if commit is None:
            raise NoValidCheckpoint(
                f"run.name={self.name}: has a history but no valid checkpoint "
                f"({damaged[0] if damaged else 'checkpoints/ holds none'})\n"
                f"restore one into {self.path}/checkpoints, or start over with run.fresh=true: the old folder is kept\n"
                f"beside it as {self.name}.old-N"
            )


def check_allow(allow: list[str], known: Names) -> None:
    """Refuse names in `run.allow` that are no keys."""
    for key in allow:
        if known.kind(key) == "unknown":
            way_out = "name the changed keys, or a group of keys: run.allow=[optim.lr,data]"
            raise refuse("run.allow", key, f"no such key{known.nearest(key)}", way_out)


def covered(key: str, allow: list[str]) -> bool:
    """Whether `run.allow` names the key or a group of keys it is in."""
    return any(key == name or key.startswith(f"{name}.") for name in allow)


def difference_message(name: str, changed: list[tuple[str, Any, Any]]) -> str:
    """The table of what differs, aligned, at most a screen, and the ways out."""
    shown = [(key, short(before), short(now)) for key, before, now in changed[:DIFFERENCES_SHOWN]]
    rows = [("key", "before", "now"), *shown]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    table = ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    more = [f"  ... and {len(changed) - len(shown)} more"] if len(changed) > len(shown) else []
    nodes = sorted({key.split(".")[0] for key, _, _ in changed})
    keys = [key for key, _, _ in changed] if len(changed) <= 3 else nodes
    what = f"{len(changed)} key{'s that change' if len(changed) > 1 else ' that changes'} the result"
    return "\n".join(
        [
            f"run.name={name}: this run was begun with other settings; {what} differ{'' if len(changed) > 1 else 's'}",
            *table,
            *more,
            f"go on all the same: run.allow=[{','.join(keys)}]; start over: run.fresh=true; another run: run.name=...",
        ]
    )


def short(value: Any) -> str:
    """A value in at most `VALUE_CHARS` characters."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= VALUE_CHARS else f"{text[: VALUE_CHARS - 3]}..."


def clock(seconds: float) -> str:
    """A Unix time as a person reads it."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def tail(path: str, num_bytes: int = 65_536) -> list[str]:
    """The last whole lines of a file; a line that a kill cut short is left out."""
    try:
        with open(path, "rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - num_bytes))
            text = file.read().decode("utf-8", "replace")
    except FileNotFoundError:
        return []
    lines = text[: text.rfind("\n") + 1].split("\n")[:-1]
    return lines[1:] if end > num_bytes else lines


def json_object(line: str) -> dict[str, Any]:
    """A line's JSON object; empty when it is none."""
    with contextlib.suppress(ValueError):
        value = json.loads(line)
        if isinstance(value, dict):
            return value
    return {}


def places(paths_runs: str, given: bool) -> tuple[str, ...]:
    """The folders in which runs are looked for: `paths.runs`; unless it was given, also where Ray jobs put theirs."""
    here, jobs = os.path.abspath(os.path.expanduser(paths_runs)), os.path.join(job_home(), "runs")
    return (here,) if given or here == jobs else (here, jobs)
