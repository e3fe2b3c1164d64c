"""Ranks: who we are, how we meet, and the few collective operations that are not the engine's.

    RankInfo.from_env()    RANK, WORLD_SIZE, LOCAL_RANK as torchrun or the gang sets them
    init_distributed(rank) process group with a deadline: gloo on CPU, nccl where CUDA is
    sum_over_ranks([...])  a handful of numbers, in fp64, the same on every rank
    first_failed_rank(...) every rank learns whether any rank failed, so that nobody waits for it

No collective here moves Python objects: that would be pickle from the network.
"""

import os
import socket
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore

from conf.refusal import BadRequest

MEET_TIMEOUT_S = 120.0
COLLECTIVE_TIMEOUT_S = 600.0
STALE_LOCK_S = 900.0


@dataclass(frozen=True, slots=True)
class RankInfo:
    """Which rank of how many this process is, and its number among the ranks of its node."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def device(self) -> torch.device:
        """The device this rank computes on: its own GPU of the node's whole list, or the CPU."""
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")

    @classmethod
    def from_env(cls) -> "RankInfo":
        """The rank this process was started as; rank 0 of 1 when nobody said so. Raises ValueError if it cannot be."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        try:
            rank, world_size, local_rank = (int(os.environ.get(n, d)) for n, d in zip(names, "010", strict=True))
        except ValueError as error:
            raise BadRequest(f"{', '.join(names)} in the environment must be whole numbers ({error})") from error
        if not 0 <= rank < world_size:
            raise BadRequest(f"RANK={rank}: must be from 0 to below WORLD_SIZE={world_size}")
        return cls(rank, world_size, local_rank)


def init_distributed(
    rank: RankInfo, *, meet_timeout_s: float = MEET_TIMEOUT_S, collective_timeout_s: float = COLLECTIVE_TIMEOUT_S
) -> torch.device:
    """Join the process group; returns this rank's device.

    Raises TimeoutError when not all ranks meet within `meet_timeout_s`. A collective that a dead peer leaves
    incomplete fails within seconds on gloo, and after `collective_timeout_s` at the latest everywhere.
    """
    if dist.is_initialized():
        return rank.device
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(rank.local_rank)
    store = meet(rank, meet_timeout_s)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=store,
        rank=rank.rank,
        world_size=rank.world_size,
        timeout=timedelta(seconds=collective_timeout_s),
        device_id=rank.device if cuda else None,
    )
    return rank.device


def meet(rank: RankInfo, timeout_s: float) -> Store:
    """The key-value store at MASTER_ADDR:MASTER_PORT once all ranks are there; one alone needs no network."""
    if rank.world_size == 1:
        return HashStore()
    address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "29500"))
    # torchrun's agent already hosts the store at this address.
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    is_master = rank.rank == 0 and not hosted
    listen_fd = listening(address, port) if is_master else None
    try:
        store: Store = TCPStore(
            address,
            port,
            None if hosted else rank.world_size,
            is_master=is_master,
            timeout=timedelta(seconds=timeout_s),
            master_listen_fd=listen_fd,
        )
        store = PrefixStore(f"zeroray/{attempt}", store)
        store.set(f"here/{rank.rank}", "1")
        store.wait([f"here/{r}" for r in range(rank.world_size)], timedelta(seconds=timeout_s))
    except (RuntimeError, ConnectionError) as error:
        raise TimeoutError(
            f"rank {rank.rank} of {rank.world_size} waited {timeout_s:.0f} s at {address}:{port}, not all ranks came"
        ) from error
    return store


def listening(address: str, port: int) -> int:
    """A socket for the store on this address alone: by itself it listens everywhere, and it trusts whoever comes.

    Raises OSError when the port is taken.
    """
    try:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        return socket.create_server((address, port), family=family, backlog=1024).detach()
    except OSError as error:
        raise OSError(error.errno, f"port {port} of {address} cannot be used ({error.strerror})") from error


def close_distributed() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait until every rank is here; nothing to wait for without a process group."""
    if dist.is_initialized():
        dist.barrier()


def sum_over_ranks(values: list[float], device: torch.device) -> list[float]:
    """The sums of `values` over all ranks, in fp64, equal on every rank."""
    if not dist.is_initialized():
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return [float(v) for v in sums.tolist()]


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is true on any rank; every rank gets the same answer."""
    return sum_over_ranks([float(flag)], device)[0] > 0


def first_failed_rank(error: BaseException | None, rank: int, world_size: int, device: torch.device) -> int | None:
    """The lowest rank that came here with an error, the same on every rank; None when all is well."""
    failed = sum_over_ranks([float(error is not None and r == rank) for r in range(world_size)], device)
    return next((r for r, f in enumerate(failed) if f), None)


def private_extensions_folder() -> str:
    """Give this process our own folder for compiled torch extensions, unless it has one; returns it.

    The user's shared folder can hold the lock of a build that was killed, for which every later start waits for ever.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    own = os.path.join(home, "zeroray", "torch_extensions", f"torch-{torch.__version__}")
    return os.environ.setdefault("TORCH_EXTENSIONS_DIR", own)


def stale_locks(folder: str, age_s: float = STALE_LOCK_S) -> list[str]:
    """The lock files under an extensions folder that are older than any build takes."""
    found = [os.path.join(where, name) for where, _, names in os.walk(folder) for name in names if name == "lock"]
    now = time.time()
    return sorted(path for path in found if now - os.path.getmtime(path) > age_s)


def refuse_stale_locks() -> None:
    """Raise RuntimeError, naming the file, where a compiled extension would be waited for without end."""
    locks = stale_locks(private_extensions_folder())
    if locks:
        raise RuntimeError(
            f"{locks[0]}: the lock of a build that ended long ago; DeepSpeed would wait for it without end\n"
            f"remove it: rm {' '.join(locks)}"
        )
