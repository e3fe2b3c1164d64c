"""Metrics: exactly once across attempts, and no tracker stops training. Learning rates are arithmetic."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import wandb

from conf.schema import Run, RunInfo, Schedule, Tracker, Train, WandbMode
from data_pipeline.ledger import Ledger
from trainer import tracker as room
from trainer.schedules import learning_rate

pytestmark = pytest.mark.unit

OFF = Run(tracker=Tracker(wandb=WandbMode.disabled))


def steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_resume_keeps_what_its_checkpoint_knows(tmp_path: Path) -> None:
    first = room.Tracker(OFF, str(tmp_path), keep_bytes=0, attempt=1)
    first.log({"step": 1})
    position = first.flush()
    first.log({"step": 2})
    second = room.Tracker(OFF, str(tmp_path), keep_bytes=position, attempt=2)
    first.log({"step": 3})  # a process of the earlier attempt that is still alive
    second.log({"step": 2})
    second.close()
    assert steps(tmp_path) == [1, 2]


def test_metrics_that_are_gone_are_not_made_up(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"metrics\.jsonl.*\n.*run\.fresh=true"):
        room.Tracker(OFF, str(tmp_path), keep_bytes=100, attempt=2)


@pytest.mark.parametrize("when", ["start", "log", "close"])
def test_a_tracker_that_fails_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    class Broken:
        def __init__(self, *_: Any) -> None:
            self.fail_if("start")

        def fail_if(self, now: str) -> None:
            if now == when:
                raise ConnectionError(f"no network at {now}")

        def log(self, row: dict[str, Any]) -> None:
            self.fail_if("log")

        def close(self) -> None:
            self.fail_if("close")

    monkeypatch.setattr(room, "Wandb", Broken)
    made = room.Tracker(Run(tracker=Tracker(wandb=WandbMode.offline)), str(tmp_path), keep_bytes=0, attempt=1)
    for step in (1, 2, 3):
        made.log({"step": step})
    made.close()
    assert steps(tmp_path) == [1, 2, 3]
    failed = [e["detail"] for e in Ledger(str(tmp_path)).read() if e["event"] == "tracker_failed"]
    assert len(failed) == 1, "told once, then left alone"
    assert f"no network at {when}" in failed[0]


def test_online_only_with_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert room.wandb_mode(Run()) == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "planted")
    assert room.wandb_mode(Run()) == "online"
    assert room.wandb_mode(Run(tracker=Tracker(wandb=WandbMode.offline))) == "offline"
    for said, mode in (("offline", "offline"), ("disabled", "disabled"), ("dryrun", "offline"), ("online", "online")):
        monkeypatch.setenv("WANDB_MODE", said)
        assert room.wandb_mode(Run()) == mode
    assert room.wandb_mode(OFF) == "disabled"


def test_a_key_without_a_network_is_an_offline_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    request.addfinalizer(wandb.teardown)
    began = time.monotonic()
    made = room.Tracker(Run(), str(tmp_path), keep_bytes=0, attempt=1)
    assert time.monotonic() - began < 60, "ranks would wait for it"
    made.log({"step": 1, "train/tokens": 1})
    made.close()
    assert [e["detail"][:19] for e in Ledger(str(tmp_path)).read()] == ["starting W&B online"]
    assert len(list(tmp_path.glob("wandb/offline-run-*/*.wandb"))) == 1


@pytest.mark.parametrize(("name", "last"), [("constant", 1.0), ("linear", 0.1), ("cosine", 0.1)])
def test_learning_rates(name: str, last: float) -> None:
    run = Run(run=RunInfo(name="x"), schedule=Schedule(name=name), train=Train(steps=100))
    rates = [learning_rate(run, step) / run.optim.lr for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(last)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    half = {"constant": 1.0, "linear": 0.55, "cosine": 0.55}[name]
    assert (rates[54] + rates[55]) / 2 == pytest.approx(half, abs=1e-6)


@pytest.mark.parametrize("steps_of_run", [1, 2, 3])
def test_very_short_runs_have_a_rate(steps_of_run: int) -> None:
    run = Run(train=Train(steps=steps_of_run))
    assert all(0 < learning_rate(run, step) <= run.optim.lr for step in range(steps_of_run))
