"""The run folder: who may work in it, which requests fit, and what is read from it when everything else is dead."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster import run_folder
from cluster.run_folder import AlreadyActive, OtherSettings, RunFolder
from cluster.status import list_row, status_of, status_text
from conf.saved import load_run
from conf.schema import Model, Optim, Paths, Run, RunInfo, Stage, Train
from data_pipeline.store import NoValidCheckpoint, write_json

pytestmark = pytest.mark.unit

HOLD = """
import sys, time
from cluster.run_folder import RunFolder
folder = RunFolder(sys.argv[1], "mine")
with folder.claimed():
    folder.ledger.append("start", pid=__import__("os").getpid(), host="h")
    print("held", flush=True)
    time.sleep(60)
"""


def a_run(**changes: object) -> Run:
    return Run(**{"run": RunInfo(name="mine"), "stages": [Stage.prepare], **changes})  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path / "runs"), "mine")


def begun(folder: RunFolder, run: Run) -> None:
    with folder.claimed():
        assert folder.admit(run) == "new"
    folder.ledger.append("stage", stage="documents", state="started", done=0, total=3)


def hold(folder: RunFolder) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLD, os.path.dirname(folder.path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_operational_keys_change_freely(folder: RunFolder) -> None:
    begun(folder, a_run())
    with folder.claimed():
        assert folder.admit(a_run(train=Train(micro_batch_rows=2))) == "continue"
    assert load_run(folder.yaml_path).train.micro_batch_rows == 2


def test_scientific_keys_are_refused_with_a_table(folder: RunFolder) -> None:
    begun(folder, a_run())
    before = Path(folder.yaml_path).read_text()
    changed = a_run(optim=Optim(lr=0.5), model=Model(width=96))
    with pytest.raises(OtherSettings) as refused:
        folder.admit(changed)
    head, titles, *rows, way_out = str(refused.value).splitlines()
    assert "run.name=mine" in head
    assert titles.split() == ["key", "before", "now"]
    assert [row.split() for row in rows] == [["model.width", "192", "96"], ["optim.lr", "0.001", "0.5"]]
    assert len({row.index(cell) for row, cell in zip([titles, *rows], ["now", "96", "0.5"], strict=True)}) == 1, (
        "aligned"
    )
    assert "run.allow=[model.width,optim.lr]" in way_out
    assert Path(folder.yaml_path).read_text() == before


def test_a_table_is_at_most_a_screen() -> None:
    many = [(f"data.key{i}", "x" * 500, i) for i in range(200)]
    message = run_folder.difference_message("mine", many)
    assert len(message.splitlines()) < 25
    assert max(map(len, message.splitlines())) < 130
    assert "and 180 more" in message


def test_allowed_changes_are_recorded_and_become_the_run(folder: RunFolder) -> None:
    begun(folder, a_run())
    allowing = a_run(run=RunInfo(name="mine", allow=["optim"]), optim=Optim(lr=0.5))
    assert folder.admit(allowing) == "continue"
    assert folder.events()[-1]["allowed"] == [{"key": "optim.lr", "before": 0.001, "now": 0.5}]
    assert folder.admit(a_run(optim=Optim(lr=0.5))) == "continue", "the change is part of the run now"
    with pytest.raises(ValueError, match="did you mean 'optim'"):
        folder.admit(a_run(run=RunInfo(name="mine", allow=["optm"])))


def test_before_anything_was_made_every_key_may_change(folder: RunFolder) -> None:
    assert folder.admit(a_run()) == "new"
    assert folder.admit(a_run(optim=Optim(lr=0.5))) == "continue"


def training(**changes: object) -> Run:
    return a_run(stages=[Stage.prepare, Stage.train], **changes)


def test_history_without_a_checkpoint_is_refused(folder: RunFolder) -> None:
    begun(folder, training())
    Path(folder.path, "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(NoValidCheckpoint, match=r"run\.fresh=true"):
        folder.admit(training())
    assert folder.admit(a_run()) == "continue", "preparing data needs no checkpoint"


def test_a_first_save_that_was_killed_is_no_history(folder: RunFolder) -> None:
    begun(folder, training())
    os.makedirs(f"{folder.path}/checkpoints/step-00000000/gen-0001")
    Path(folder.path, "checkpoints/step-00000000/gen-0001/rank-00000.safetensors").write_bytes(b"half")
    assert folder.admit(training()) == "continue"


def test_a_lost_checkpoint_folder_is_noticed(folder: RunFolder) -> None:
    begun(folder, training())
    folder.ledger.append("checkpoint", step=5, generation=1)
    with pytest.raises(NoValidCheckpoint):
        folder.admit(training())


def test_fresh_keeps_the_old_folder_aside(folder: RunFolder) -> None:
    begun(folder, training())
    Path(folder.path, "metrics.jsonl").write_text('{"step": 1}\n')
    with folder.claimed():
        assert folder.admit(training(run=RunInfo(name="mine", fresh=True), optim=Optim(lr=0.5))) == "new"
        assert folder.holder() is not None
        assert folder.holder() == RunFolder(os.path.dirname(folder.path), "mine").holder()
    aside = Path(f"{folder.path}.old-1")
    assert (aside / "metrics.jsonl").exists()
    assert not (aside / "lease.json").exists()
    assert not folder.has_history()


def test_one_driver_at_a_time_and_a_dead_one_is_taken_over(folder: RunFolder) -> None:
    process = hold(folder)
    try:
        with pytest.raises(AlreadyActive, match=rf"process {process.pid} on .* since 20"), folder.claimed():
            pass
        assert status_of(folder)["state"] == "running"
        process.send_signal(signal.SIGKILL)
        while folder.holder() is not None:  # not waited for: a zombie holds no lease
            time.sleep(0.01)
        assert status_of(folder)["state"] == "dead"
        assert "same command" in status_text(status_of(folder))
        with folder.claimed():
            assert status_of(folder)["state"] == "running"
    finally:
        process.kill()
        process.wait()


def test_a_refused_request_leaves_nothing_behind(folder: RunFolder) -> None:
    with pytest.raises(ValueError, match=r"run\.allow"), folder.claimed():
        folder.admit(a_run(run=RunInfo(name="mine", allow=["nothing.such"])))
    assert not os.path.exists(folder.path)


def test_an_old_request_to_stop_is_withdrawn(folder: RunFolder) -> None:
    begun(folder, a_run())
    folder.ask_to_stop()
    with folder.claimed():
        assert not os.path.exists(folder.stop_path)


def test_a_holder_elsewhere_lives_as_long_as_its_heartbeat(folder: RunFolder) -> None:
    write_json(folder.lease_path, {"token": "t", "host": "elsewhere", "pid": 1, "start": "1", "beat": 1})
    assert folder.holder() is not None
    old = time.time() - run_folder.EXPIRY_S - 1
    os.utime(folder.lease_path, (old, old))
    assert folder.holder() is None


STATES = [
    ([], False, None, "unknown"),
    ([("start", {})], True, None, "running"),
    ([("start", {})], False, None, "dead"),
    ([("start", {}), ("end", {"state": "done"})], False, None, "done"),
    ([("start", {}), ("end", {"state": "stopped"}), ("start", {})], False, None, "dead"),
    ([], False, {"time": 1.0}, "queued"),
    ([("start", {})], False, {"time": 1.0}, "dead"),
    ([("start", {}), ("end", {"state": "failed"})], False, {"time": 9e12}, "queued"),
]


@pytest.mark.parametrize(("marks", "alive", "submission", "expected"), STATES)
def test_states(marks: list[tuple[str, dict[str, str]]], alive: bool, submission: object, expected: str) -> None:
    from cluster.status import state_of

    events = [{"time": 10.0 + i, "event": name, **fields} for i, (name, fields) in enumerate(marks)]
    assert state_of(events, alive, submission) == expected  # type: ignore[arg-type]


def test_status_of_a_torn_folder(folder: RunFolder, tmp_path: Path) -> None:
    begun(folder, training(paths=Paths(store=str(tmp_path / "store"))))
    folder.ledger.append("stage", stage="documents", state="done", done=3, total=3, key="abc")
    folder.ledger.append("attempt", attempt=1, generation=1)
    folder.ledger.append("stage", stage="train", state="started", done=0, total=200)
    folder.ledger.append("cause", cause="worker_lost", rank=1, detail="SIGKILL")
    Path(folder.path, "metrics.jsonl").write_text('{"step": 6, "train/loss": 2.5}\n{"step": 7, "trai')
    with open(folder.ledger.path, "ab") as file:
        file.write(b'{"time": 1, "event": "end", "state": "do')
    accounting = {"read": 5, "kept": 3, "filtered": {"short": 1}, "duplicates": {}, "quarantined": {"nul": 1}}
    write_json(f"{tmp_path}/store/documents/abc/manifest.json", {"accounting": accounting})
    status = status_of(folder)
    assert json.loads(json.dumps(status)) == status
    assert (status["step"], status["steps"]) == (6, 200)
    assert status["data"]["accounting"] == accounting
    assert list(status["stages"]) == ["prepare", "documents", "train"]
    assert status["stages"]["documents"]["state"] == "done"
    assert status["stages"]["train"] == {"state": "unfinished", "done": 6, "total": 200}
    assert [a["cause"] for a in status["attempts"]] == ["worker_lost"]
    text = status_text(status)
    assert "read 5 = kept 3 + filtered 1 + duplicates 0 + quarantined 1" in text
    assert "worker_lost of rank 1: SIGKILL" in text
    assert list_row(folder)["loss"] == 2.5
