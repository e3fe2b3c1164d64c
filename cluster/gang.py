"""A gang: one actor per rank in one placement group, from its start to the first failure or the last success.

    run_gang(request, watch) -> what rank 0 returned, or GangFailed with the failure that explains the others

        placement group, ready within cluster.start_timeout_s      not_placed otherwise
        one actor per bundle; ranks are numbered node by node
        rendezvous: rank 0's address and a free port there; the variables that torchrun would set
        every rank runs the target; wait one at a time
        at the first failure: a moment for the others to fail too, then all are killed and the group is removed

A rank's output and log lines go to `<run folder>/logs/rank-<r>.log`, not through the driver. The actors have threads
to spare, so that a rank can be asked for its state while it trains. They are not detached: when the driver dies, Ray
ends them. On GPUs every rank sees the gang's whole list of its node, so that LOCAL_RANK is the index of its own.
"""

import contextlib
import faulthandler
import logging
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from cluster.policy import Cause, Failure, culprit, describe, failure_of
from cluster.session import Session, plugin_folder
from conf.identity import plain
from conf.refusal import refuse
from conf.registry import load_plugins
from conf.saved import run_from
from conf.schema import Run

log = logging.getLogger("zeroray")

GRACE_S = 5.0
POLL_S = 0.5
LOG_TAIL_LINES = 30
LOG_TAIL_BYTES = 64_000

Target = Callable[[Run, int, str], dict[str, Any]]


class GangFailed(Exception):  # noqa: N818 (an outcome)
    """A gang did not come to its end; `failure` is the one that explains it."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


@dataclass(frozen=True)
class GangRequest:
    """What a gang is started for. `target` runs on every rank, in an environment as torchrun would make it."""

    run: Run
    folder: str
    session: Session
    generation: int
    tokens_folder: str
    target: Target | None = None


def train(run: Run, generation: int, tokens_folder: str) -> dict[str, Any]:
    """What a rank does unless a test says otherwise."""
    from trainer.distributed import RankInfo
    from trainer.train import train_rank

    return train_rank(run, RankInfo.from_env(), generation, tokens_folder)


class Rank:
    """One rank's process; becomes a Ray actor."""

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {"state": "starting", "since": time.time()}

    def place(self) -> dict[str, Any]:
        """Where this process is."""
        import ray

        context = ray.get_runtime_context()
        return {
            "node": context.get_node_id(),
            "address": ray.util.get_node_ip_address(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "gpus": [str(gpu) for gpu in ray.get_gpu_ids()],
        }

    def free_port(self) -> int:
        """A port of this machine that is free now."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return int(probe.getsockname()[1])

    def settle(self, environment: dict[str, str], log_path: str, header: str, folder: str | None) -> None:
        """Take the environment and the working folder, and write to the log from now on."""
        os.environ.update(environment)
        interface = interface_of(environment["NODE_ADDRESS"])
        if interface:
            os.environ["GLOO_SOCKET_IFNAME"] = interface
        write_to(log_path, header)
        if folder is not None and os.path.isdir(folder):
            os.chdir(folder)

    def run(
        self, target: Target | None, run: dict[str, Any], generation: int, tokens_folder: str
    ) -> dict[str, dict[str, Any]]:
        """Run the target; its outcome, or its error as plain values."""
        self.facts = {"state": "running", "since": time.time()}
        try:
            typed = run_from(run)
            load_plugins(typed.plugins, os.getcwd())
            outcome = (target or train)(typed, generation, tokens_folder)
        except Exception as error:  # handed to the driver, which decides what follows
            logging.getLogger("zeroray").exception("this rank failed")
            self.facts = {"state": "failed", "since": time.time()}
            return {"error": describe(error)}
        self.facts = {"state": "done", "since": time.time()}
        return {"outcome": outcome}

    def status(self) -> dict[str, Any]:
        """What this rank is doing, answered while it runs."""
        return dict(self.facts)


def interface_of(address: str) -> str | None:
    """The network interface that has this address; None when none has it."""
    import psutil

    found = psutil.net_if_addrs().items()
    return next((name for name, entries in found if any(entry.address == address for entry in entries)), None)


def write_to(path: str, header: str) -> None:
    """Append everything this process prints or logs to the file at `path`, beginning with `header`."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 (lives as long as the process)
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    faulthandler.enable(sys.stderr)
    sys.stdout.write(f"{header}\n")
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr, force=True
    )


# --- the driver's side -------------------------------------------------------------------------------------------


def run_gang(
    request: GangRequest, watch: Callable[[], None], still_wanted: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Run one gang to its end; `watch` is called about twice a second, `still_wanted` while it waits for room.

    Either may raise to end it. Returns what rank 0 returned; raises GangFailed otherwise. Nothing of the gang is left
    when this returns.
    """
    gpus = gpus_per_rank(request.run, request.session)
    with placed(request.run, gpus, still_wanted) as group:
        actors = [actor_in(group, index, request.run, gpus) for index in range(request.run.cluster.ranks)]
        try:
            ranks = settled(request, actors, gpus)
            folder = request.tokens_folder
            run = plain(request.run)
            refs = [actor.run.remote(request.target, run, request.generation, folder) for actor in ranks]
            return wait_for_all(refs, watch)
        finally:
            kill(actors)


def gpus_per_rank(run: Run, session: Session) -> int:
    """One where the cluster has GPUs, none elsewhere, unless cluster.gpus_per_rank says it."""
    wanted = run.cluster.gpus_per_rank
    if wanted == 0 or (wanted < 0 and session.gpus == 0):
        return 0
    if session.gpus < run.cluster.ranks:
        raise refuse(
            "cluster.ranks",
            run.cluster.ranks,
            f"each rank drives one GPU, and there are {session.gpus:g}",
            f"use cluster.ranks={max(1, int(session.gpus))}, or cluster.gpus_per_rank=0 to train on CPUs",
        )
    return 1


@contextlib.contextmanager
def placed(run: Run, gpus: int, still_wanted: Callable[[], None]) -> Iterator[Any]:
    """A placement group that is ready, removed afterwards."""
    from ray.util import placement_group, remove_placement_group

    bundle = {"CPU": run.cluster.cpus_per_rank, **({"GPU": gpus} if gpus else {})}
    group = placement_group([bundle] * run.cluster.ranks, strategy="PACK")
    try:
        deadline = time.monotonic() + run.cluster.start_timeout_s
        while not group.wait(POLL_S):
            still_wanted()
            if time.monotonic() > deadline:
                raise GangFailed(Failure(Cause.not_placed, not_placed_message(run, bundle)))
        yield group
    finally:
        remove_placement_group(group)


def not_placed_message(run: Run, bundle: dict[str, float]) -> str:
    """What was asked for, what is free, and the ways out."""
    import ray

    free = ray.available_resources()
    return (
        f"cluster.ranks={run.cluster.ranks}: no room for {run.cluster.ranks} times {bundle} within "
        f"cluster.start_timeout_s={run.cluster.start_timeout_s:g}; free are {free.get('CPU', 0):g} CPUs and "
        f"{free.get('GPU', 0):g} GPUs\n"
        "wait for other work on the cluster, use fewer ranks, or a smaller cluster.cpus_per_rank"
    )


def actor_in(group: Any, index: int, run: Run, gpus: int) -> Any:
    """An actor in one bundle of the group."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    options = {
        "num_cpus": run.cluster.cpus_per_rank,
        "num_gpus": gpus,
        "max_concurrency": 4,
        "max_restarts": 0,
        "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
    }
    return ray.remote(**options)(Rank).remote()


def settled(request: GangRequest, actors: list[Any], gpus: int) -> list[Any]:
    """The actors in the order of their ranks, each with its environment, log and working folder."""
    timeout = request.run.cluster.start_timeout_s
    places = answers([actor.place.remote() for actor in actors], timeout)
    order = rank_order([place["node"] for place in places])
    ranks, places = [actors[i] for i in order], [places[i] for i in order]
    port = answers([ranks[0].free_port.remote()], timeout)[0]
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, int(request.session.cpus / len(ranks))))
    environments = [rank_environment(rank, places, port, threads, gpus) for rank in range(len(ranks))]
    calls = []
    for rank, (actor, place, environment) in enumerate(zip(ranks, places, environments, strict=True)):
        log_path = rank_log(request.folder, rank)
        header = (
            f"=== {time.strftime('%Y-%m-%d %H:%M:%S')} generation {request.generation}: rank {rank} of {len(ranks)}, "
            f"process {place['pid']} on {place['host']}"
        )
        calls.append(actor.settle.remote(environment, log_path, header, plugin_folder()))
    answers(calls, timeout)
    return ranks


def answers(refs: list[Any], timeout_s: float) -> list[Any]:
    """What the actors answer; GangFailed when one dies or is silent instead."""
    import ray

    try:
        return list(ray.get(refs, timeout=timeout_s))
    except ray.exceptions.GetTimeoutError as error:
        raise GangFailed(Failure(Cause.worker_lost, f"a rank did not start within {timeout_s:g} s")) from error
    except ray.exceptions.RayActorError as error:
        raise GangFailed(lost(error, None)) from error


def rank_order(nodes: list[str]) -> list[int]:
    """Which bundle is rank 0, 1, ...: node by node, in the order in which the nodes first appear."""
    first = {node: nodes.index(node) for node in nodes}
    return sorted(range(len(nodes)), key=lambda index: (first[nodes[index]], index))


def rank_environment(rank: int, places: list[dict[str, Any]], port: int, threads: str, gpus: int) -> dict[str, str]:
    """The variables of one rank, as torchrun would set them; `places` are those of all ranks, in order."""
    mine = [r for r, place in enumerate(places) if place["node"] == places[rank]["node"]]
    one_node = len(mine) == len(places)
    node_address = "127.0.0.1" if one_node else places[rank]["address"]
    environment = {
        "RANK": str(rank),
        "WORLD_SIZE": str(len(places)),
        "LOCAL_RANK": str(mine.index(rank)),
        "LOCAL_WORLD_SIZE": str(len(mine)),
        "MASTER_ADDR": "127.0.0.1" if one_node else places[0]["address"],
        "MASTER_PORT": str(port),
        "NODE_ADDRESS": node_address,
        "OMP_NUM_THREADS": threads,
    }
    if gpus:
        devices = [gpu for r in mine for gpu in places[r]["gpus"]]
        return {**environment, "CUDA_VISIBLE_DEVICES": ",".join(devices)}
    return {**environment, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}


def wait_for_all(refs: list[Any], watch: Callable[[], None]) -> dict[str, Any]:
    """Rank 0's outcome once all ranks have one; GangFailed after the first failure."""
    outcomes: dict[int, dict[str, Any]] = {}
    failures: list[Failure] = []
    deadline = None
    pending = {ref: rank for rank, ref in enumerate(refs)}
    while pending and (deadline is None or time.monotonic() < deadline):
        collect(pending, outcomes, failures)
        if failures and deadline is None:
            deadline = time.monotonic() + GRACE_S  # a peer's broken connection is seen before the death that caused it
        watch()
    if failures:
        raise GangFailed(culprit(failures))
    return outcomes[0]


def collect(pending: dict[Any, int], outcomes: dict[int, dict[str, Any]], failures: list[Failure]) -> None:
    """Move the ranks that ended since from `pending` to `outcomes` or `failures`."""
    import ray

    ray.wait(list(pending), num_returns=1, timeout=POLL_S)
    ended, _ = ray.wait(list(pending), num_returns=len(pending), timeout=0)
    for ref in ended:
        rank = pending.pop(ref)
        try:
            result = ray.get(ref)
        except ray.exceptions.RayError as error:
            failures.append(lost(error, rank))
            continue
        if "error" in result:
            failures.append(failure_of(result["error"], rank))
        else:
            outcomes[rank] = result["outcome"]


def lost(error: Exception, rank: int | None) -> Failure:
    """The failure of a rank whose process is gone."""
    import ray

    text = str(error)
    cause = Cause.worker_lost
    if "running low on memory" in text or isinstance(error, ray.exceptions.OutOfMemoryError):
        cause = Cause.out_of_memory
    elif re.search(r"node (has )?died|node failure|node is dead|NodeDied", text, re.IGNORECASE):
        cause = Cause.node_lost
    elif not isinstance(error, ray.exceptions.RayActorError):
        cause = Cause.bug
    where = re.search(r"\bpid: (\d+).*?\bip: ([\w.:]+)", text, re.DOTALL)
    # Ray's own text on a killed worker is a page of guesses; its first line is enough where even the place is unknown.
    gone = f"process {where[1]} at {where[2]} is gone" if where else (text.strip().splitlines() or [repr(error)])[0]
    return Failure(cause, f"{cause.value}: {gone[:500]}", rank)


def kill(actors: list[Any]) -> None:
    """End all ranks at once."""
    import ray

    for actor in actors:
        ray.kill(actor, no_restart=True)


# --- logs --------------------------------------------------------------------------------------------------------


def rank_log(folder: str, rank: int) -> str:
    """Where a rank writes."""
    return f"{folder}/logs/rank-{rank}.log"


def log_tail(folder: str, rank: int, lines: int = LOG_TAIL_LINES) -> str:
    """The last lines of a rank's log; empty when it wrote none."""
    with contextlib.suppress(FileNotFoundError), open(rank_log(folder, rank), "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - LOG_TAIL_BYTES))
        return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])
    return ""
