"""Others extend zeroray without forking it: a package with entry points, and a plugin module in the working folder."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from heads import working_folder
from processes import TINY, environment, events, rows, zeroray
from test_killed import write_corpus

MODULE = '''
import torch
from torch import nn
from torch.nn import functional as F

from conf.registry import FILTERS, MODELS, OBJECTIVES, OPTIMIZERS


class Bigram(nn.Module):
    """The next token by the present one."""

    def __init__(self, config, vocab_size):
        super().__init__()
        self.config, self.vocab_size, self.loss_chunk_tokens = config, vocab_size, 2048
        self.table = nn.Embedding(vocab_size, config.options["width"])
        self.out = nn.Linear(config.options["width"], vocab_size, bias=False)

    def forward(self, input_ids, labels=None, position_ids=None, cu_seqlens=None):
        logits = self.out(self.table(input_ids))
        if labels is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum")


def no_lucky(text, *, word="lucky"):
    return "lucky" if word in text else None


def tempered(model, batch, options):
    return model(**batch) * options["times"]


def sign_descent(param_groups, config):
    return torch.optim.RMSprop([{**g, "lr": config.lr} for g in param_groups], alpha=config.options["alpha"])
'''
REGISTER = """
MODELS.register("{0}_bigram")(Bigram)
FILTERS.register("{0}_no_lucky")(no_lucky)
OBJECTIVES.register("{0}_tempered")(tempered)
OPTIMIZERS.register("{0}_rmsprop")(sign_descent)
"""
PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "outside"
version = "1"
[tool.setuptools]
py-modules = ["outside"]
[project.entry-points."zeroray.models"]
outside_bigram = "outside:Bigram"
[project.entry-points."zeroray.filters"]
outside_no_lucky = "outside:no_lucky"
[project.entry-points."zeroray.objectives"]
outside_tempered = "outside:tempered"
[project.entry-points."zeroray.optimizers"]
outside_rmsprop = "outside:sign_descent"
"""


def overrides(owner: str, corpus: Path) -> list[str]:
    """A tiny run in which model, filter, objective and optimizer are someone else's."""
    return [
        *TINY,
        f"corpus.path={corpus}",
        "train.steps=6",
        f"model.name={owner}_bigram",
        "model.options.width=16",
        f"objective.name={owner}_tempered",
        "objective.options.times=0.5",
        f"optim.name={owner}_rmsprop",
        "optim.options.alpha=0.9",
        f"data.filters.{owner}_no_lucky.word=dictionary",
    ]


def install(folder: Path, site: Path) -> None:
    """Install somebody's package into `site`, and remove its sources."""
    source = folder / "source"
    source.mkdir()
    (source / "outside.py").write_text(MODULE)
    (source / "pyproject.toml").write_text(PROJECT)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(site), str(source)], check=True, capture_output=True)
    shutil.rmtree(source)


def check(folder: Path, owner: str, name: str = "quickstart") -> None:
    """The run of `overrides` in `folder` did use all four."""
    run = folder / "runs" / name
    assert [r["step"] for r in rows(run)] == [1, 2, 3, 4, 5, 6]
    status = json.loads(zeroray(folder, "status", name, "--json").stdout)
    assert status["data"]["accounting"]["filtered"]["lucky"] > 0
    commit = sorted(run.glob("checkpoints/*/*/manifest.json"))[-1]
    manifest = json.loads(commit.read_text())
    assert set(manifest["tensors"]) == {"table.weight", "out.weight"}
    assert manifest["kinds"] == ["param", "square_avg"]
    untrained = float(str(events(run, "eval")[0]["loss"]))
    assert untrained < 4, f"the objective of {owner} halves the loss of 512 tokens, ln 512 = 6.2"


@pytest.mark.entry
def test_an_installed_package(tmp_path: Path) -> None:
    site = tmp_path / "site"
    install(tmp_path, site)
    done = zeroray(tmp_path, "run", *overrides("outside", write_corpus(tmp_path)), PYTHONPATH=str(site))
    assert done.returncode == 0, done.stdout + done.stderr
    check(tmp_path, "outside")


@pytest.mark.entry
def test_a_module_in_the_working_folder(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MODULE + REGISTER.format("mine"))
    done = zeroray(tmp_path, "run", *overrides("mine", write_corpus(tmp_path)), "plugins=[mine]")
    assert done.returncode == 0, done.stdout + done.stderr
    check(tmp_path, "mine")


@pytest.mark.ray
@pytest.mark.parametrize("owner", ["outside", "mine"])
def test_both_as_a_ray_job(head: dict[str, str], tmp_path: Path, owner: str) -> None:
    folder = working_folder(tmp_path / "work")
    name = f"job_{owner}"
    args = [*overrides(owner, write_corpus(tmp_path)), f"run.name={name}"]
    if owner == "mine":
        (folder / "mine.py").write_text(MODULE + REGISTER.format("mine"))
        args.append("plugins=[mine]")
    else:
        install(tmp_path, Path(head["SITE"]))
    job = ["ray", "job", "submit", "--working-dir", ".", "--", "python", "-m", "cluster", "run", *args]
    env = {k: v for k, v in head.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        job, cwd=folder, env=environment(**env), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    check(Path(head["ZERORAY_HOME"]), owner, name)
    assert not (folder / "runs" / name).exists(), "the run is in the working folder, of which a job has a copy only"
