"""Killed at any moment, the same command continues, and ends with the same bytes as a run that was left alone."""

import functools
import hashlib
import json
import os
import pydoc_data.topics
import shutil
import signal
import subprocess
import textwrap
from pathlib import Path

import psutil
import pytest
from processes import TINY, events, kill_tree, rows, start, wait_until, zeroray

pytestmark = pytest.mark.chaos


def write_corpus(folder: Path) -> Path:
    """One text file per topic of Python's own documentation."""
    corpus = folder / "text"
    corpus.mkdir(parents=True)
    for name, text in sorted(pydoc_data.topics.topics.items())[:70]:
        (corpus / f"{hashlib.sha256(name.encode()).hexdigest()[:8]}.txt").write_text(textwrap.dedent(text))
    return corpus


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbs; its folder, beside the corpus it was trained on."""
    folder = tmp_path_factory.mktemp("reference")
    corpus = write_corpus(folder)
    done = zeroray(folder, "run", *TINY, f"corpus.path={corpus}", "run.name=one")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def weights(run: Path) -> str:
    return hashlib.sha256((run / "export" / "model.safetensors").read_bytes()).hexdigest()


def finished_shards(store: Path) -> dict[str, int]:
    """When each shard was written whose task is committed; one that was cut off before that is made again."""
    shards = [p for p in store.glob("tokens/*/*.tar") if (p.parent / "tasks" / f"task-{p.stem[-5:]}.json").exists()]
    return {str(p): p.stat().st_mtime_ns for p in shards}


def paused(process: subprocess.Popen[bytes]) -> bool:
    """Whether a rank has paused itself."""
    try:
        tree = psutil.Process(process.pid).children(recursive=True)
        return any(member.status() == psutil.STATUS_STOPPED for member in tree)
    except psutil.NoSuchProcess:
        return False


def test_killed_in_every_phase(reference: Path, tmp_path: Path) -> None:
    args = ["run", *TINY, f"corpus.path={reference / 'text'}", "run.name=one"]
    run, store = tmp_path / "runs" / "one", tmp_path / "store"

    process = start(tmp_path, *args)  # in preprocessing: some shards are written, the manifest is not
    wait_until(lambda: len(finished_shards(store)) >= 1, process)
    kill_tree(process)
    shards = finished_shards(store)

    process = start(tmp_path, *args)  # in training, past the first checkpoint
    wait_until(lambda: len(rows(run)) >= 8, process)
    kill_tree(process)
    assert {p: t for p, t in finished_shards(store).items() if p in shards} == shards, (
        "a finished shard was written again"
    )

    # Inside a checkpoint save: all tensors are written, the manifest is not; and just after it.
    for place, steps in (("before_manifest", 1), ("after_manifest", 2)):
        process = start(tmp_path, *args, ZERORAY_PAUSE_AT=f"checkpoint.{place}:{steps}")
        wait_until(functools.partial(paused, process), process)
        kill_tree(process)

    done = zeroray(tmp_path, *args)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [r["step"] for r in rows(run)] == list(range(1, 31))
    assert [r["train/loss"] for r in rows(run)] == [r["train/loss"] for r in rows(reference / "runs" / "one")]
    assert weights(run) == weights(reference / "runs" / "one")
    assert len(events(run, "resumed")) >= 2


def test_interrupted_once_commits_and_exits_6(reference: Path, tmp_path: Path) -> None:
    args = ["run", *TINY, f"corpus.path={reference / 'text'}", f"paths.store={reference / 'store'}", "run.name=one"]
    args.append("tracker.wandb=offline")
    run = tmp_path / "runs" / "one"
    process = start(tmp_path, *args)
    wait_until(lambda: len(rows(run)) >= 6, process)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(60) == 6
    steps = len(rows(run))
    assert steps < 30
    assert events(run, "checkpoint")[-1]["step"] == steps, "the stop did not commit the step it stopped at"

    newest = max((run / "checkpoints").iterdir())
    damaged = next(newest.glob("gen-*/*.safetensors"))
    data = bytearray(damaged.read_bytes())
    data[-5] ^= 16
    damaged.write_bytes(data)
    done = zeroray(tmp_path, *args)
    assert done.returncode == 0, done.stdout + done.stderr
    assert newest.name in str(events(run, "damaged")[-1]["path"])
    assert int(str(events(run, "resumed")[-1]["step"])) < steps
    one_id = json.loads((run / "wandb.json").read_text())["id"]
    assert [p.stem for p in sorted(run.glob("wandb/offline-run-*/run-*.wandb"))] == [f"run-{one_id}"] * 2
    assert weights(run) == weights(reference / "runs" / "one")


def test_history_without_checkpoint_refuses(reference: Path, tmp_path: Path) -> None:
    args = ["run", *TINY, f"corpus.path={reference / 'text'}", f"paths.store={reference / 'store'}", "run.name=one"]
    run = tmp_path / "runs" / "one"
    process = start(tmp_path, *args)
    wait_until(lambda: len(rows(run)) >= 2, process)
    kill_tree(process)
    for manifest in run.glob("checkpoints/*/gen-*/manifest.json"):
        manifest.write_text(manifest.read_text().replace("1", "2"))
    refused = zeroray(tmp_path, *args)
    assert refused.returncode == 5, refused.stdout + refused.stderr
    assert "run.fresh=true" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_what_came_to_nothing_or_was_lost(reference: Path, tmp_path: Path) -> None:
    shutil.copytree(reference, tmp_path, dirs_exist_ok=True)
    args = ["run", *TINY, f"corpus.path={reference / 'text'}", "run.name=one"]
    run = tmp_path / "runs" / "one"

    wider = zeroray(tmp_path, *args, "model.width=128", "run.allow=[model.width]")
    assert wider.returncode == 2, wider.stdout + wider.stderr
    assert "has shape" in wider.stderr
    assert "Traceback" not in wider.stderr
    assert "width: 64" in (run / "run.yaml").read_text(), "a request that was refused changed what the run is"

    (run / "export" / "model.safetensors").unlink()
    (run / "evaluation.json").write_text("{")
    again = zeroray(tmp_path, *args)
    assert again.returncode == 0, again.stdout + again.stderr
    assert weights(run) == weights(reference / "runs" / "one")
    figures = [json.loads((folder / "evaluation.json").read_text()) for folder in (run, reference / "runs" / "one")]
    assert figures[0] == figures[1]
    assert len(rows(run)) == 30
