"""Where metrics go: JSON lines, which are the truth, and W&B, which may fail without stopping anything.

One row per optimizer step, exactly once across attempts: a checkpoint records how many bytes of `metrics.jsonl` belong
to it, and a resume keeps exactly that prefix. The prefix is copied to a new file and renamed over the old one, so that
a process of an earlier attempt that is still alive writes into a file nobody reads.

W&B keeps one id per run (in `wandb.json` of the run folder). Offline W&B cannot continue a run, so each attempt adds an
offline folder with the same id; what can be replayed is `metrics.jsonl`.
"""

import json
import logging
import os
import secrets
import subprocess
from typing import Any, Literal, Protocol

from conf.identity import plain
from conf.refusal import BadRequest
from conf.schema import Run, WandbMode
from data_pipeline.ledger import Ledger
from data_pipeline.store import create_exclusive, json_bytes, read_json, write_bytes

log = logging.getLogger("zeroray")


class Sink(Protocol):
    """One place metrics go to."""

    def log(self, row: dict[str, Any]) -> None:
        """Take one step's row."""

    def close(self) -> None:
        """Write what is buffered and let go."""


class JsonLines:
    """`metrics.jsonl`: one JSON object a step; `flush` makes everything so far durable and returns its bytes."""

    def __init__(self, folder: str, keep_bytes: int) -> None:
        self.path = f"{folder}/metrics.jsonl"
        kept = b""
        if os.path.exists(self.path):
            with open(self.path, "rb") as old:
                kept = old.read(keep_bytes)
        if len(kept) < keep_bytes:
            raise BadRequest(
                f"{self.path}: has {len(kept)} bytes, but the checkpoint was written when it had {keep_bytes}\n"
                "restore the file, or start over with run.fresh=true (the old run folder is kept aside)"
            )
        write_bytes(self.path, kept)
        self.file = open(self.path, "ab")  # noqa: SIM115 (lives as long as the run)

    def log(self, row: dict[str, Any]) -> None:
        """Append one row; a reader sees it at once."""
        self.file.write(json.dumps(row).encode() + b"\n")
        self.file.flush()

    def flush(self) -> int:
        """Make all rows durable; returns the file's bytes, the metric position of a checkpoint."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return self.file.tell()

    def close(self) -> None:
        """Flush and close."""
        self.flush()
        self.file.close()


def git_state(folder: str) -> dict[str, Any]:
    """The commit and whether the work tree is clean; empty outside a git checkout."""

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", folder, *args], capture_output=True, text=True, timeout=10, check=False)
        except (FileNotFoundError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    return {} if commit is None else {"git_commit": commit, "git_clean": git("status", "--porcelain") == ""}


class Wandb:
    """A W&B run; raises whatever W&B raises, `Tracker` is what makes that harmless."""

    def __init__(self, run: Run, folder: str, attempt: int, mode: Literal["online", "offline"]) -> None:
        import wandb  # noqa: PLC0415 (two seconds, only where it is used)

        create_exclusive(f"{folder}/wandb.json", json_bytes({"id": secrets.token_hex(4)}))
        try:
            self.run = wandb.init(
                id=read_json(f"{folder}/wandb.json")["id"],
                resume="allow",
                name=run.run.name,
                project=run.tracker.project,
                entity=run.tracker.entity,
                group=run.tracker.group,
                tags=run.tracker.tags,
                job_type="train",
                dir=folder,
                mode=mode,
                config={**plain(run), **git_state(os.path.dirname(os.path.abspath(__file__))), "attempt": attempt},
                # Ranks wait for this one: without a network a start or an end costs seconds, not W&B's minutes.
                settings=wandb.Settings(
                    console="off",
                    silent=True,
                    login_timeout=10,
                    init_timeout=20,
                    finish_timeout=60,
                    x_graphql_timeout_seconds=10,
                    x_graphql_retry_max=1,
                ),
            )
        except Exception:
            wandb.teardown()  # its service would keep the id, and refuse the same run offline
            raise
        self.run.define_metric("train/tokens")
        self.run.define_metric("*", step_metric="train/tokens")

    def log(self, row: dict[str, Any]) -> None:
        """Log one row under its metric names."""
        self.run.log(row, step=row["step"])

    def close(self) -> None:
        """Finish the W&B run."""
        self.run.finish()


def wandb_mode(run: Run) -> Literal["online", "offline", "disabled"]:
    """The mode W&B is started in: `auto` is what WANDB_MODE says, else online exactly when there is a key."""
    if run.tracker.wandb is WandbMode.auto:
        wanted = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        return {"online": "online", "disabled": "disabled"}.get(wanted, "offline")  # type: ignore[return-value]
    if run.tracker.wandb is WandbMode.disabled:
        return "disabled"
    return "offline" if run.tracker.wandb is WandbMode.offline else "online"


class Tracker:
    """All sinks of rank 0. JSON lines must work; any other sink that fails is dropped with a ledger line."""

    def __init__(self, run: Run, folder: str, *, keep_bytes: int, attempt: int) -> None:
        self.ledger = Ledger(folder)
        self.truth = JsonLines(folder, keep_bytes)
        self.others: list[Sink] = []
        mode = wandb_mode(run)
        if mode != "disabled" and not self._start_wandb(run, folder, attempt, mode) and mode == "online":
            self._start_wandb(run, folder, attempt, "offline")

    def _start_wandb(self, run: Run, folder: str, attempt: int, mode: Literal["online", "offline"]) -> bool:
        return self._guard(lambda: self.others.append(Wandb(run, folder, attempt, mode)), f"starting W&B {mode}")

    def log(self, row: dict[str, Any]) -> None:
        """Send one step's row to every sink."""
        self.truth.log(row)
        for sink in list(self.others):
            if not self._guard(lambda sink=sink: sink.log(row), "logging to W&B"):
                self.others.remove(sink)

    def flush(self) -> int:
        """Make `metrics.jsonl` durable; returns the metric position."""
        return self.truth.flush()

    def close(self) -> None:
        """Close every sink."""
        for sink in self.others:
            self._guard(sink.close, "closing W&B")
        self.truth.close()

    def _guard(self, act: Any, what: str) -> bool:
        try:
            act()
        except Exception as error:  # a tracker on the network may fail in any way, and none may stop training
            log.warning("%s failed, going on without it: %s", what, error)
            self.ledger.append("tracker_failed", detail=f"{what}: {error}")
            return False
        return True
