"""The README's first command, as it stands: real text to an exported model; the second time it redoes nothing."""

import json
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import environment, events, rows, zeroray

pytestmark = pytest.mark.entry


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `zeroray run experiment=quickstart` was run once, as it is."""
    folder = tmp_path_factory.mktemp("quickstart")
    done = zeroray(folder, "run", "experiment=quickstart", timeout=1200)
    assert done.returncode in (0, 3), done.stdout + done.stderr
    assert str(folder / "runs" / "quickstart" / "export") in done.stdout, "it does not say where the model is"
    return folder


def test_it_learns(quickstart: Path) -> None:
    run = quickstart / "runs" / "quickstart"
    figures = json.loads((run / "evaluation.json").read_text())
    assert figures["before"]["bpb"] > figures["heldout_unigram"]["bpb"]
    assert figures["heldout"]["bpb"] < 0.8 * figures["heldout_unigram"]["bpb"]
    during = [r["eval/heldout/bpb"] for r in rows(run) if "eval/heldout/bpb" in r]
    assert len(during) >= 2
    assert during == sorted(during, reverse=True)
    steps = [r["step"] for r in rows(run)]
    assert steps == list(range(1, len(steps) + 1))
    tokens = [r["train/tokens"] for r in rows(run)]
    assert all(a < b for a, b in pairwise(tokens))


def test_every_document_is_accounted_for(quickstart: Path) -> None:
    status = json.loads(zeroray(quickstart, "status", "quickstart", "--json").stdout)
    counts = status["data"]["accounting"]
    parts = [sum(counts[name].values()) for name in ("filtered", "duplicates", "quarantined")]
    assert counts["read"] == counts["kept"] + sum(parts) > 500
    assert status["state"] == "done"


def test_transformers_loads_the_export(quickstart: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trainer.generate import load_export

    export = quickstart / "runs" / "quickstart" / "export"
    theirs = AutoModelForCausalLM.from_pretrained(export)
    tokenizer = AutoTokenizer.from_pretrained(export)
    ids = torch.tensor([tokenizer("def read(path):\n    return open(path)").input_ids])
    with torch.no_grad():
        expected = theirs(ids).logits
        found = load_export(str(export))(ids)
    np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=1e-5)


def test_generate_and_eval(quickstart: Path) -> None:
    said = zeroray(quickstart, "generate", "quickstart", "import ", "--tokens", "16")
    assert said.returncode == 0, said.stderr
    assert len(said.stdout.strip()) > len("import ")
    measured = zeroray(quickstart, "eval", "quickstart", "--json")
    figures = json.loads(measured.stdout)
    stored = json.loads((quickstart / "runs" / "quickstart" / "evaluation.json").read_text())
    assert figures["heldout"]["bpb"] == pytest.approx(stored["heldout"]["bpb"], rel=1e-5)
    assert figures["heldout_unigram"]["bpb"] == pytest.approx(stored["heldout_unigram"]["bpb"], rel=1e-9)


def test_the_second_time_redoes_nothing(quickstart: Path) -> None:
    run = quickstart / "runs" / "quickstart"
    before = {
        p: p.stat().st_mtime_ns
        for p in [*run.glob("checkpoints/**/*"), *(quickstart / "store").rglob("*")]
        if p.is_file()
    }
    began = time.monotonic()
    again = zeroray(quickstart, "run", "experiment=quickstart")
    assert again.returncode in (0, 3), again.stderr
    after = {
        p: p.stat().st_mtime_ns
        for p in [*run.glob("checkpoints/**/*"), *(quickstart / "store").rglob("*")]
        if p.is_file()
    }
    assert after == before
    assert time.monotonic() - began < 60
    assert len(events(run, "resumed")) == 0


def test_wandb_has_the_run(quickstart: Path) -> None:
    run = quickstart / "runs" / "quickstart"
    files = list(run.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 1
    assert json.loads((run / "wandb.json").read_text())["id"] in files[0].name
    inspect = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json"]
    read = subprocess.run([*inspect, str(files[0])], env=environment(), capture_output=True, text=True, check=True)
    logged = [json.loads(line)["history"]["item"] for line in read.stdout.splitlines() if '"type":"history"' in line]
    assert [r["_step"] for r in logged] == [r["step"] for r in rows(run)]
    for name in ("train/loss", "train/tokens", "optim/lr", "perf/tokens_per_s"):
        assert [r[name] for r in logged] == [r[name] for r in rows(run)]
    said = subprocess.run(
        [*inspect, "--summary", str(files[0])], env=environment(), capture_output=True, text=True, check=True
    )
    config = json.loads(said.stdout)["config"]
    assert config["model"]["width"] == 160
    assert config["zero"]["stage"] == 1
    here = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    if here.returncode == 0:
        assert config["git_commit"] == here.stdout.strip()
