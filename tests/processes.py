"""Running zeroray as a person does: a process of its own, whose whole tree can be killed in the middle."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

TINY = (
    "experiment=quickstart",
    "corpus=text",
    "model=nano",
    "tokenizer.vocab_size=512",
    "data.row_tokens=64",
    "data.heldout_fraction=0.1",
    "data.task_bytes=60000",
    "train.steps=30",
    "train.global_batch_rows=8",
    "train.micro_batch_rows=4",
    "train.checkpoint_every=5",
    "train.eval_every=15",
    "train.eval_rows=8",
    "train.sample_tokens=8",
    "tracker.wandb=disabled",
)


def environment(**extra: str) -> dict[str, str]:
    """This environment without anything that points to a Ray of someone else."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "ZERORAY_"))}
    return {**kept, "WANDB_MODE": "offline", "PYTHONUNBUFFERED": "1", **extra}


def command(*args: str) -> list[str]:
    """The console script's command line in this interpreter."""
    return [sys.executable, "-m", "cluster", *args]


def zeroray(folder: Path, *args: str, timeout: float = 600, **env: str) -> subprocess.CompletedProcess[str]:
    """Run zeroray in `folder` to its end."""
    with (folder / "output.txt").open("a") as log:
        log.write(f"$ zeroray {' '.join(args)}\n")
    done = subprocess.run(
        command(*args), cwd=folder, env=environment(**env), capture_output=True, text=True, timeout=timeout, check=False
    )
    with (folder / "output.txt").open("a") as log:
        log.write(f"{done.stdout}\n{done.stderr}\n-> exit {done.returncode}\n")
    return done


def start(folder: Path, *args: str, **env: str) -> subprocess.Popen[bytes]:
    """Start zeroray in `folder`; its output goes to `output.txt` there."""
    with (folder / "output.txt").open("ab") as log:
        return subprocess.Popen(command(*args), cwd=folder, env=environment(**env), stdout=log, stderr=log)


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL a process and every descendant, and see them gone."""
    try:
        tree = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    except psutil.NoSuchProcess:
        tree = []
    for member in tree:
        try:
            member.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    process.wait(30)
    psutil.wait_procs(tree, timeout=30)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes], timeout: float = 180) -> None:
    """Wait until `condition` holds; fails when the process ends first or time runs out."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, f"zeroray ended with {process.returncode} before the moment was reached"
        assert time.monotonic() < deadline, "the moment was never reached"
        time.sleep(0.02)


def rows(run: Path) -> list[dict[str, object]]:
    """The whole rows of a run's metrics so far."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def events(run: Path, event: str) -> list[dict[str, object]]:
    """The ledger's events of one name."""
    path = run / "ledger.jsonl"
    if not path.exists():
        return []
    found = [
        json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n") and line.strip()
    ]
    return [e for e in found if e["event"] == event]
