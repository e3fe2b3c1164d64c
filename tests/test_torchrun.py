"""One run, three lives: 2 ranks on Ray under ZeRO-1, then 3 and 1 under torchrun with other stages, one loss curve."""

import subprocess
import sys
from pathlib import Path

import pytest
from processes import TINY, environment, events, rows, start, wait_until, zeroray
from test_killed import write_corpus

pytestmark = pytest.mark.entry


def torchrun(folder: Path, ranks: int, *args: str) -> subprocess.CompletedProcess[str]:
    """The README's line for a machine without Ray."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [*launcher, "-m", "trainer.train", *args]
    env = environment(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False)


def stopped_at(folder: Path, run: Path, step: int, *args: str) -> None:
    """Run under Ray and ask it to stop once `step` is reached, as another terminal would."""
    process = start(folder, *args)
    wait_until(lambda: len(rows(run)) >= step, process)
    assert zeroray(folder, "stop", run.name).returncode == 0
    assert process.wait(60) == 6


def test_another_launcher_world_size_and_stage(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path)
    args = [*TINY, f"corpus.path={corpus}", "optim.lr=1e-3"]
    whole = zeroray(tmp_path, "run", *args, "run.name=whole", "stages=[prepare,train]")
    assert whole.returncode == 0, whole.stdout + whole.stderr

    run = tmp_path / "runs" / "lives"
    stopped_at(tmp_path, run, 6, "run", *args, "run.name=lives")
    changed = torchrun(tmp_path, 1, *args, "run.name=lives", "optim.lr=2e-3")
    assert changed.returncode != 0
    assert "run.allow=[optim.lr]" in changed.stderr

    middle = torchrun(tmp_path, 3, *args, "run.name=lives", "zero.stage=2", "stages=[train]")
    assert middle.returncode == 0, middle.stdout + middle.stderr
    rest = torchrun(tmp_path, 1, *args, "run.name=lives", "zero.stage=3", "stages=[evaluate,export]")
    assert rest.returncode == 0, rest.stdout + rest.stderr

    assert [(e["world_size"], e["zero_stage"]) for e in events(run, "resumed")][-2:] == [(3, 2), (1, 3)]
    expected = rows(tmp_path / "runs" / "whole")
    assert [r["step"] for r in rows(run)] == [r["step"] for r in expected] == list(range(1, 31))
    assert [r["train/tokens"] for r in rows(run)] == [r["train/tokens"] for r in expected]
    for found, wanted in zip(rows(run), expected, strict=True):
        assert found["train/loss"] == pytest.approx(wanted["train/loss"], abs=1e-5), f"step {wanted['step']}"
    assert (run / "export" / "model.safetensors").exists()
