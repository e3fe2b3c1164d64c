"""Preparing data needs neither torch nor deepspeed: the stage runs where importing them fails."""

import json
from pathlib import Path

import pytest
from processes import TINY, zeroray
from test_killed import write_corpus

BLOCKED = '''
import sys


class Absent:
    """Makes heavy libraries look as if they were not installed."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "deepspeed", "transformers", "safetensors", "wandb"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Absent())
'''


@pytest.mark.entry
def test_prepare_without_torch(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(BLOCKED)
    env = {"PYTHONPATH": str(tmp_path / "site")}
    args = ["run", *TINY, f"corpus.path={write_corpus(tmp_path)}"]
    blocked = zeroray(tmp_path, *args, **env)
    assert blocked.returncode != 0, "torch was found after all, so this test proves nothing"
    done = zeroray(tmp_path, *args, "stages=[prepare]", "run.name=data", **env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((tmp_path / "store").glob("tokens/*/manifest.json"))) == 1
    status = json.loads(zeroray(tmp_path, "status", "data", "--json", **env).stdout)
    assert status["data"]["accounting"]["kept"] > 50
