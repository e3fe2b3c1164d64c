"""The stages of a run on a shared Ray, with a stand-in for training: exit codes, restarts, stops, what is skipped."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster import graph
from cluster.graph import RESULTS, execute, stage_key
from cluster.policy import Stopped
from cluster.run_folder import RunFolder
from conf.refusal import BadRequest
from conf.schema import Run, Stage
from data_pipeline.ledger import Ledger
from data_pipeline.store import write_json


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run over three small texts."""
    monkeypatch.chdir(tmp_path)
    corpus = tmp_path / "text"
    corpus.mkdir()
    for n in range(3):
        (corpus / f"{n}.txt").write_text(f"Text number {n}, which is about nothing in particular. " * 40)
    made = Run()
    made.corpus.path = str(corpus)
    made.tokenizer.vocab_size = 300
    made.data.heldout_fraction = 0.3
    made.cluster.start_timeout_s = 30.0
    return made


def folder_of(run: Run) -> RunFolder:
    folder = RunFolder(run.paths.runs, run.run.name)
    os.makedirs(folder.path, exist_ok=True)
    return folder


def record_done(run: Run, tokens_folder: str) -> None:
    """What the trainer leaves behind."""
    from data_pipeline.manifest import Manifest

    folder = f"{run.paths.runs}/{run.run.name}"
    key = stage_key(run, Manifest.load(tokens_folder).content_sha256)
    for stage in ("train", "evaluate", "export"):
        Ledger(folder).append("stage", stage=stage, state="done", done=9, total=9, key=key)
    for names in RESULTS.values():
        for name in names:
            write_json(f"{folder}/{name}", {"of": name})


def train(run: Run, generation: int, tokens_folder: str) -> dict[str, Any]:
    if os.environ["RANK"] == "0":
        record_done(run, tokens_folder)
    return {"state": "done", "step": 9}


def die_in_the_first_life(run: Run, generation: int, tokens_folder: str) -> dict[str, Any]:
    if generation == 1 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.5)
    return train(run, generation, tokens_folder)


def die_always(run: Run, generation: int, tokens_folder: str) -> dict[str, Any]:
    os.write(1, b"I was here\n")
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def wait_for_stop(run: Run, generation: int, tokens_folder: str) -> dict[str, Any]:
    folder = f"{run.paths.runs}/{run.run.name}"
    Path(folder, f"running-{os.environ['RANK']}").touch()
    while not os.path.exists(f"{folder}/stop"):
        time.sleep(0.05)
    return {"state": "stopped", "step": 4}


def refuse(run: Run, generation: int, tokens_folder: str) -> dict[str, Any]:
    raise BadRequest("zero.extra.round_robin_gradients=true: refused\nleave it out")


def fill_the_disk(spec: dict[str, Any], task: dict[str, Any]) -> dict[str, Any]:
    raise OSError(errno.ENOSPC, "No space left on device", spec["folder"])


def events(folder: RunFolder, name: str) -> list[dict[str, Any]]:
    return [e for e in folder.events() if e["event"] == name]


@pytest.mark.ray
@pytest.mark.usefixtures("shared_ray")
def test_to_the_end_and_again(run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of(run)
    assert execute(run, folder, target=train) == 0
    assert os.path.isabs(run.paths.store)
    assert [e["stage"] for e in events(folder, "stage") if e["state"] == "done"][:4] == [
        "documents",
        "tokenizer",
        "tokens",
        "prepare",
    ]
    assert events(folder, "end")[-1]["state"] == "done"
    assert f"export       {folder.path}/export" in capsys.readouterr().out

    monkeypatch.setattr(graph, "connect", lambda _: pytest.fail("a finished run starts no Ray"))
    monkeypatch.setattr(graph, "run_gang", lambda *_: pytest.fail("a finished run trains nothing"))
    assert execute(run, folder) == 0
    assert f"export       {folder.path}/export" in capsys.readouterr().out


@pytest.mark.ray
@pytest.mark.usefixtures("shared_ray")
def test_a_lost_worker_is_a_restart(run: Run) -> None:
    folder = folder_of(run)
    assert execute(run, folder, target=die_in_the_first_life) == 0
    assert [e["generation"] for e in events(folder, "attempt")] == [1, 2]
    assert [(e["cause"], e["rank"]) for e in events(folder, "cause")] == [("worker_lost", 1)]
    assert events(folder, "decision")[0]["text"].startswith("restart: a worker process died; restart 1 of 3")


@pytest.mark.ray
@pytest.mark.usefixtures("shared_ray")
def test_restarts_end_and_the_log_is_shown(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of(run)
    run.cluster.max_restarts = 1
    assert execute(run, folder, target=die_always) == 1
    assert [e["generation"] for e in events(folder, "attempt")] == [1, 2]
    assert events(folder, "end")[-1]["exit_code"] == 1
    shown = capsys.readouterr().err
    assert "I was here" in shown
    assert "2 times without a newer checkpoint" in shown


@pytest.mark.ray
@pytest.mark.usefixtures("shared_ray")
def test_a_signal_stops_the_gang(run: Run) -> None:
    folder = folder_of(run)

    def interrupt() -> None:
        while not os.path.exists(f"{folder.path}/running-0"):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=interrupt, daemon=True).start()
    assert execute(run, folder, target=wait_for_stop) == 6
    assert events(folder, "end")[-1]["state"] == "stopped"
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.ray
@pytest.mark.usefixtures("shared_ray")
def test_a_stop_in_preparation(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(run)

    def stopped(*_: object) -> None:
        raise Stopped

    monkeypatch.setattr(graph, "run_stage", stopped)
    assert execute(run, folder, target=train) == 6
    assert not events(folder, "attempt")
    folder.ask_to_stop()
    monkeypatch.undo()
    assert execute(run, folder, target=train) == 6, "the file is a request too"


@pytest.mark.ray
@pytest.mark.usefixtures("shared_ray")
def test_a_refusal_of_a_rank_reaches_the_user(run: Run) -> None:
    folder = folder_of(run)
    with pytest.raises(ValueError, match=r"^zero.extra.round_robin_gradients=true: refused\nleave it out$"):
        execute(run, folder, target=refuse)
    assert len(events(folder, "attempt")) == 1


@pytest.mark.ray
@pytest.mark.usefixtures("shared_ray")
def test_a_full_disk(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of(run)
    assert execute(run, folder, task_function=fill_the_disk) == 6
    assert "make room; the same command continues" in capsys.readouterr().err
    assert events(folder, "end")[-1]["exit_code"] == 6
    assert execute(run, folder, target=train) == 0


@pytest.mark.ray
@pytest.mark.usefixtures("shared_ray")
@pytest.mark.parametrize(("limit", "code"), [(0.5, 3), (0.1, 4)])
def test_quarantine(run: Run, tmp_path: Path, limit: float, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text" / "broken.txt").write_bytes(b"\xff\xfe broken")
    run.data.quarantine_limit = limit
    run.stages = [Stage.prepare]
    folder = folder_of(run)
    assert execute(run, folder) == code
    assert events(folder, "end")[-1]["exit_code"] == code
    assert "quarantined 1 of 4 documents (25.00%)" in capsys.readouterr().err


@pytest.mark.unit
@pytest.mark.parametrize("change", ["path", "empty", "unprepared"])
def test_bad_requests_start_nothing(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    monkeypatch.setattr(graph, "connect", lambda _: pytest.fail("nothing is started"))
    monkeypatch.setattr(graph, "check_ranks_early", lambda _: None)
    mend: dict[str, Callable[[], object]] = {
        "path": lambda: setattr(run.corpus, "path", str(tmp_path / "nowhere")),
        "empty": lambda: [p.unlink() for p in (tmp_path / "text").iterdir()],
        "unprepared": lambda: setattr(run, "stages", [Stage.train]),
    }
    mend[change]()
    with pytest.raises(ValueError, match=r"^(corpus.path|stages)="):
        execute(run, folder_of(run))


@pytest.mark.unit
def test_the_key_is_the_trainers() -> None:
    from trainer import train as trainer

    class Data:
        class manifest:  # noqa: N801
            content_sha256 = "abc"

    assert stage_key(Run(), "abc") == trainer.stage_key(Run(), Data())  # type: ignore[arg-type]


TWO_SIGNALS = """
import os, signal, sys, time
from cluster.interrupts import StopRequest, listening
from cluster.run_folder import RunFolder

folder = RunFolder(sys.argv[1], "one")
stop = StopRequest(folder)
with listening(stop):
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.asked() and os.path.exists(folder.stop_path)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""


@pytest.mark.unit
def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    os.makedirs(tmp_path / "one")
    ended = subprocess.run([sys.executable, "-c", TWO_SIGNALS, str(tmp_path)], timeout=30, check=False)
    assert ended.returncode == 128 + signal.SIGTERM
    end = Ledger(str(tmp_path / "one")).read()[-1]
    assert (end["event"], end["exit_code"], end["state"]) == ("end", 143, "failed")
