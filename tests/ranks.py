"""Ranks for tests: every launch is a new set of processes, forked from one that has the heavy imports behind it.

A launch runs `job(rank, *args)` in each of `world_size` processes over gloo and returns what each returned (JSON) and
how each ended. One process per configuration: DeepSpeed's stage 3 leaves patched functions behind.
"""

import json
import multiprocessing
import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "trainer.engine_deepspeed", "trainer.models", "trainer.objectives"])


@dataclass
class Ended:
    """How one rank ended: its result, or its error's text, and its exit code (-9 for SIGKILL)."""

    result: Any
    error: str | None
    code: int | None


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def child(env: dict[str, str], out: str, job: Callable[..., Any], args: Any) -> None:
    import torch

    from trainer.distributed import RankInfo, close_distributed, init_distributed

    os.environ.update(env)
    torch.set_num_threads(1)
    ended: dict[str, Any] = {}
    try:
        rank = RankInfo.from_env()
        init_distributed(rank, meet_timeout_s=60, collective_timeout_s=60)
        ended["result"] = job(rank, *args)
        close_distributed()
    except Exception as error:
        traceback.print_exc()
        ended["error"] = f"{type(error).__name__}: {error}"
    with open(f"{out}/{os.environ['RANK']}.json", "w") as file:
        json.dump(ended, file)
    # What a failed collective leaves behind must not keep this process.
    os._exit(1 if "error" in ended else 0)


def launch(world_size: int, job: Callable[..., Any], *args: Any, timeout_s: float = 120, **env: str) -> list[Ended]:
    """Run `job` on `world_size` ranks; ends those that are still there after `timeout_s`."""
    everyone = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **env}
    with tempfile.TemporaryDirectory() as out:
        processes = [
            CONTEXT.Process(target=child, args=({**everyone, "RANK": str(r), "LOCAL_RANK": str(r)}, out, job, args))
            for r in range(world_size)
        ]
        for process in processes:
            process.start()
        ends = []
        for rank, process in enumerate(processes):
            process.join(timeout_s)
            if process.is_alive():
                process.kill()
                process.join()
            path = f"{out}/{rank}.json"
            found = json.load(open(path)) if os.path.exists(path) else {}  # noqa: SIM115
            ends.append(Ended(found.get("result"), found.get("error"), process.exitcode))
        return ends


def results(ends: list[Ended]) -> list[Any]:
    """The results of ranks that must all have ended well."""
    assert [e.error for e in ends] == [None] * len(ends), ends
    assert [e.code for e in ends] == [0] * len(ends), ends
    return [e.result for e in ends]
