"""Leases: one holder however many race for a dead one's, and a holder that was taken over harms nobody."""

import errno
import json
import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from cluster.graph import Graph, execute
from cluster.interrupts import StopRequest
from cluster.run_folder import LeaseLost, RunFolder
from conf.schema import Run
from data_pipeline import store
from data_pipeline.store import Lease, read_json, write_json

RACERS, TRIALS = 4, 40
DEAD = {"token": "dead", "host": socket.gethostname(), "pid": 2**22 - 1, "start": "1", "beat": "3"}


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "lease.json")


def successor(lease: Lease) -> Lease:
    """Another holder, as if `lease` had given no sign of life for long."""
    record = store.read_record(lease.path)
    assert record is not None
    lease._remove(record)
    other = Lease(lease.path)
    assert other.try_acquire()
    return other


def race(folder: str, number: int, barrier: Barrier, prepare: Callable[[str], None]) -> None:
    """One of the processes that try to take each of the leases at the same time."""
    for trial in range(TRIALS):
        path = f"{folder}/{trial}/lease.json"
        if number == 0:
            prepare(path)
        lease = Lease(path)
        barrier.wait(30)
        if lease.try_acquire():
            Path(f"{folder}/{trial}/holder-{number}").touch()
        barrier.wait(30)  # none ends before all have tried: a process that is gone holds nothing
    os._exit(0)


def leave_dead(path: str) -> None:
    write_json(path, DEAD)


def leave_damaged(path: str) -> None:
    os.makedirs(os.path.dirname(path))
    Path(path).write_bytes(b'{"token": "cut')


def leave_nothing(path: str) -> None:
    os.makedirs(os.path.dirname(path))


@pytest.mark.unit
@pytest.mark.parametrize("prepare", [leave_dead, leave_damaged, leave_nothing])
def test_of_many_that_race_exactly_one_holds(tmp_path: Path, prepare: Callable[[str], None]) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(RACERS)
    racers = [context.Process(target=race, args=(str(tmp_path), n, barrier, prepare)) for n in range(RACERS)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(60)
    assert [racer.exitcode for racer in racers] == [0] * RACERS
    holders = [len(list(tmp_path.glob(f"{trial}/holder-*"))) for trial in range(TRIALS)]
    assert holders == [1] * TRIALS
    assert {p.name for p in tmp_path.glob("*/*") if not p.name.startswith("holder-")} == {"lease.json"}, "no litter"


@pytest.mark.unit
def test_who_reads_a_dead_record_late_does_not_remove_the_new_one(path: str) -> None:
    write_json(path, DEAD)
    slow, quick = Lease(path), Lease(path)
    late = store.read_record(path)
    assert late is not None
    assert quick.try_acquire()
    slow._remove(late)
    assert quick.verify()
    assert not slow.try_acquire()
    quick.release()


@pytest.mark.unit
def test_giving_back_a_lost_lease_leaves_the_successors(path: str) -> None:
    first = Lease(path)
    assert first.try_acquire()
    second = successor(first)
    first.release()
    assert read_json(path)["token"] == second.token
    assert not Lease(path).try_acquire()
    second.release()
    assert os.listdir(os.path.dirname(path)) == []


@pytest.mark.unit
def test_the_heartbeat_changes_the_record_and_nothing_of_its_length(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "HEARTBEAT_S", 0.01)
    lease = Lease(path)
    assert lease.try_acquire()
    size = os.path.getsize(path)
    beats: set[str] = set()
    deadline = time.monotonic() + 20
    while len(beats) < 5 and time.monotonic() < deadline:
        beats.add(read_json(path)["beat"])
    assert len(beats) == 5
    assert os.path.getsize(path) == size
    assert not lease.lost
    lease.release()
    assert not os.path.exists(path)


@pytest.mark.unit
@pytest.mark.parametrize("gone", [False, True])
def test_a_holder_that_was_taken_over_finds_out(path: str, monkeypatch: pytest.MonkeyPatch, gone: bool) -> None:
    monkeypatch.setattr(store, "HEARTBEAT_S", 0.2)
    first = Lease(path)
    assert first.try_acquire()
    second = successor(first)
    if gone:
        second.release()
    assert first._beat is not None
    first._beat.join(20)
    assert not first._beat.is_alive() and first.lost
    assert os.path.exists(path) is not gone
    assert gone or second.verify()
    second.release()


@pytest.mark.unit
def test_a_heartbeat_that_was_paused_in_the_middle_does_not_overwrite(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Lease(path)
    assert first.try_acquire()
    reached, go_on = threading.Event(), threading.Event()
    parse = store.parse_record

    def pause(data: bytes) -> dict[str, Any]:
        reached.set()
        assert go_on.wait(20)
        return parse(data)

    monkeypatch.setattr(store, "parse_record", pause)
    beat = threading.Thread(target=first._refresh, args=(7,))
    beat.start()
    assert reached.wait(20)
    monkeypatch.setattr(store, "parse_record", parse)
    second = successor(first)
    before = Path(path).read_bytes()
    go_on.set()
    beat.join()
    assert Path(path).read_bytes() == before
    assert second.verify() and not first.verify()
    second.release()
    first.release()


@pytest.mark.unit
def test_a_silent_holder_is_taken_over_and_a_beating_one_is_not(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "EXPIRY_S", 0.3)
    write_json(path, {**DEAD, "host": "elsewhere"})
    lease = Lease(path)
    began = time.monotonic()
    assert {record["token"] for record in lease.acquire(poll_s=0.05)} == {"dead"}
    assert 0.3 < time.monotonic() - began < 10
    waiting = Lease(path).acquire(poll_s=0.02)
    beats = 0
    monkeypatch.setattr(store, "EXPIRY_S", 1.0)
    began = time.monotonic()
    while time.monotonic() - began < 2:
        assert lease._refresh(beats := beats + 1)
        assert next(waiting)["token"] == lease.token
    lease.release()


@pytest.mark.unit
def test_a_lock_left_by_a_killed_process_hinders_nobody(path: str) -> None:
    Path(f"{path}.lock").touch()
    lease = Lease(path)
    assert lease.try_acquire()
    lease.release()
    assert os.listdir(os.path.dirname(path)) == []


@pytest.mark.unit
def test_one_at_a_time_is_inside_the_lock(path: str) -> None:
    inside: list[int] = []
    most: list[int] = []

    def enter() -> None:
        for _ in range(20):
            with Lease(path)._alone():
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.001)
                inside.pop()

    threads = [threading.Thread(target=enter) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1 and len(most) == 120


@pytest.mark.unit
def test_on_a_full_disk_it_is_given_back_all_the_same(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lease = Lease(path)
    assert lease.try_acquire()
    opened = os.open

    def no_space(name: str, flags: int, *rest: Any) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.ENOSPC, "No space left on device", name)
        return opened(name, flags, *rest)

    monkeypatch.setattr(os, "open", no_space)
    lease.release()
    monkeypatch.undo()
    assert not os.path.exists(path)


@pytest.mark.unit
def test_a_driver_that_was_taken_over_ends_its_work_and_leaves_the_lease(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path), "mine")
    with folder.claimed():
        assert not StopRequest(folder).asked()
        assert folder._lease is not None
        second = successor(folder._lease)
        graph: Any = Graph.__new__(Graph)
        graph.folder = folder
        for act in (StopRequest(folder).asked, StopRequest(folder).check, graph.watch):
            with pytest.raises(LeaseLost, match="another driver has taken over this run"):
                act()
    assert json.loads(Path(folder.lease_path).read_text())["token"] == second.token
    second.release()


@pytest.mark.ray
@pytest.mark.usefixtures("shared_ray")
def test_a_run_that_was_taken_over_ends_its_gang_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Graph, "prepare", lambda _: (str(tmp_path), "content"))
    run = Run()
    run.paths.runs = str(tmp_path / "runs")
    folder = RunFolder(run.paths.runs, run.run.name)

    def take_over() -> None:
        while not os.path.exists(f"{folder.path}/running-1"):
            time.sleep(0.05)
        assert folder._lease is not None
        taken.append(successor(folder._lease))

    taken: list[Lease] = []
    with folder.claimed():
        threading.Thread(target=take_over, daemon=True).start()
        assert execute(run, folder, target=train_for_ever) == 1
    assert taken[0].verify(), "what it had lost, it does not give back"
    taken[0].release()
    ends = [event for event in folder.events() if event["event"] == "end"]
    assert [(end["state"], end["exit_code"]) for end in ends] == [("failed", 1)]
    assert "another driver has taken over this run" in ends[0]["reason"]
    assert sum(event["event"] == "attempt" for event in folder.events()) == 1


def train_for_ever(run: Run, generation: int, tokens_folder: str) -> dict[str, Any]:
    Path(run.paths.runs, run.run.name, f"running-{os.environ['RANK']}").touch()
    time.sleep(600)
    return {}
