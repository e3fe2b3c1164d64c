"""One gang: its environment, its failures, its logs, and that nothing of it is left."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster import gang
from cluster.gang import GangFailed, GangRequest, log_tail, rank_environment, rank_order, run_gang
from cluster.policy import Cause
from cluster.session import Session
from conf.identity import plain
from conf.refusal import BadRequest
from conf.schema import Run

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "DS_ACCELERATOR", "OMP_NUM_THREADS")


@pytest.fixture
def start(tmp_path: Path, shared_ray: Session) -> Callable[..., dict[str, Any]]:
    def started(target: gang.Target, watch: Callable[[], None] = lambda: None, **cluster: Any) -> dict[str, Any]:
        run = Run()
        run.run.name = str(tmp_path.name)[:20].replace("[", "")
        for key, value in {"start_timeout_s": 30.0, **cluster}.items():
            setattr(run.cluster, key, value)
        return run_gang(GangRequest(run, str(tmp_path), shared_ray, 3, "tokens", target), watch)

    return started


def rank() -> int:
    return int(os.environ["RANK"])


def say_who(run: Run, generation: int, tokens_folder: str) -> dict[str, Any]:
    sys.stdout.write(f"hello from rank {rank()}\n")
    facts = {name: os.environ[name] for name in NAMES}
    return {**facts, "run": plain(run), "generation": generation, "tokens": tokens_folder, "cwd": os.getcwd()}


def meet_over_gloo(run: Run, generation: int, tokens_folder: str) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    total = torch.tensor([float(rank() + 1)])
    dist.all_reduce(total)
    dist.destroy_process_group()
    return {"total": total.item()}


def fail_on_one(run: Run, generation: int, tokens_folder: str) -> dict[str, Any]:
    sys.stdout.write(f"last words of rank {rank()}\n")
    if rank() == 1:
        raise KeyError("planted")
    time.sleep(60)
    return {}


def refuse_on_one(run: Run, generation: int, tokens_folder: str) -> dict[str, Any]:
    if rank() == 0:
        raise BadRequest("train.steps=x: refused\nthe way out")
    raise RuntimeError("gloo: Connection closed by peer")


def die_on_one(run: Run, generation: int, tokens_folder: str) -> dict[str, Any]:
    if rank() == 1:
        time.sleep(1)  # the peer's broken connection is seen first
        os.kill(os.getpid(), signal.SIGKILL)
    raise RuntimeError("Connection closed by peer")


def sleep(run: Run, generation: int, tokens_folder: str) -> dict[str, Any]:
    Path(tokens_folder, f"pid-{rank()}").write_text(str(os.getpid()))
    time.sleep(60)
    return {}


def stick_in_c(run: Run, generation: int, tokens_folder: str) -> dict[str, Any]:
    return {"digits": len(str(sum(range(10)))), "busy": sum(range(30_000_000))}


@pytest.mark.ray
def test_environment_logs_and_outcome(start: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    outcome = start(say_who)
    assert {name: outcome[name] for name in NAMES[:6]} == {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "DS_ACCELERATOR": "cpu",
    }
    assert (outcome["generation"], outcome["tokens"], outcome["cwd"]) == (3, "tokens", os.getcwd())
    assert outcome["run"]["cluster"]["start_timeout_s"] == 30.0
    for r in (0, 1):
        text = log_tail(str(tmp_path), r)
        assert text.splitlines()[0].startswith("===")
        assert f"generation 3: rank {r} of 2" in text
        assert f"hello from rank {r}" in text


@pytest.mark.ray
def test_ranks_meet(start: Callable[..., dict[str, Any]]) -> None:
    assert start(meet_over_gloo, cpus_per_rank=0.5, ranks=3) == {"total": 6.0}


@pytest.mark.ray
def test_a_bug_names_its_rank(start: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(GangFailed, match="planted") as caught:
        start(fail_on_one)
    assert (caught.value.failure.cause, caught.value.failure.rank) == (Cause.bug, 1)
    assert "fail_on_one" in caught.value.failure.trace
    assert time.monotonic() - began < 30, "the other rank is not waited for"
    assert "last words of rank 1" in log_tail(str(tmp_path), 1)
    assert "KeyError: 'planted'" in log_tail(str(tmp_path), 1)


@pytest.mark.ray
def test_a_refusal_and_its_message(start: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(GangFailed) as caught:
        start(refuse_on_one)
    failure = caught.value.failure
    assert (failure.cause, failure.rank) == (Cause.bad_request, 0)
    assert failure.message == "train.steps=x: refused\nthe way out"


@pytest.mark.ray
def test_a_death_explains_its_peers(start: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(GangFailed) as caught:
        start(die_on_one)
    assert (caught.value.failure.cause, caught.value.failure.rank) == (Cause.worker_lost, 1)


@pytest.mark.ray
def test_the_watcher_can_end_it_and_nothing_is_left(tmp_path: Path, shared_ray: Session) -> None:
    run = Run()
    pids: list[int] = []

    def watch() -> None:
        files = list(tmp_path.glob("pid-*"))
        if len(files) == 2 and all(f.read_text() for f in files):
            pids.extend(int(f.read_text()) for f in files)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_gang(GangRequest(run, str(tmp_path), shared_ray, 1, str(tmp_path), sleep), watch)
    deadline = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}") and not zombie(pid) for pid in pids):
        assert time.monotonic() < deadline, "a rank outlived its gang"
        time.sleep(0.1)
    import ray

    while ray.available_resources().get("CPU") != shared_ray.cpus:
        assert time.monotonic() < deadline, "the group still holds CPUs"
        time.sleep(0.1)


def zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.ray
def test_no_room_in_time(start: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(GangFailed, match=r"no room for 50 times.*cluster.start_timeout_s=1\b") as caught:
        start(say_who, ranks=50, start_timeout_s=1)
    assert caught.value.failure.cause is Cause.not_placed


@pytest.mark.ray
def test_a_rank_answers_while_it_trains(shared_ray: Session, tmp_path: Path) -> None:
    import ray

    actor = ray.remote(max_concurrency=4, num_cpus=1)(gang.Rank).remote()
    busy = actor.run.remote(stick_in_c, plain(Run()), 1, "")
    threading.Event().wait(0.3)
    assert ray.get(actor.status.remote(), timeout=10)["state"] in {"starting", "running"}
    assert ray.get(busy, timeout=60)["outcome"]["digits"] == 2
    assert ray.get(actor.status.remote(), timeout=10)["state"] == "done"
    ray.kill(actor)


@pytest.mark.unit
def test_ranks_are_numbered_node_by_node() -> None:
    assert rank_order(["a", "b", "a", "b", "c"]) == [0, 2, 1, 3, 4]


@pytest.mark.unit
def test_two_nodes_of_gpus() -> None:
    def place(node: str, *gpus: str) -> dict[str, Any]:
        return {"node": node, "address": f"10.0.0.{node}", "gpus": list(gpus)}

    places = [place("1", "0"), place("1", "1"), place("2", "6"), place("2", "7")]
    found = [rank_environment(r, places, 1234, "2", gpus=1) for r in range(4)]
    assert [e["LOCAL_RANK"] for e in found] == ["0", "1", "0", "1"]
    assert [e["LOCAL_WORLD_SIZE"] for e in found] == ["2"] * 4
    assert {e["MASTER_ADDR"] for e in found} == {"10.0.0.1"}
    assert [e["NODE_ADDRESS"] for e in found] == ["10.0.0.1", "10.0.0.1", "10.0.0.2", "10.0.0.2"]
    # every rank of a node sees the gang's whole list there, and LOCAL_RANK is the place of its own
    assert [e["CUDA_VISIBLE_DEVICES"] for e in found] == ["0,1", "0,1", "6,7", "6,7"]
    assert "DS_ACCELERATOR" not in found[0]


@pytest.mark.unit
def test_gpus_per_rank() -> None:
    def session(gpus: float) -> Session:
        return Session(private=True, address="", dashboard_url="", cpus=8, gpus=gpus, nodes=[])

    run = Run()
    assert gang.gpus_per_rank(run, session(0)) == 0
    assert gang.gpus_per_rank(run, session(2)) == 1
    with pytest.raises(ValueError, match=r"cluster.ranks=2.*\n.*cluster.ranks=1.*cluster.gpus_per_rank=0"):
        gang.gpus_per_rank(run, session(1))
    run.cluster.gpus_per_rank = 0
    assert gang.gpus_per_rank(run, session(1)) == 0
