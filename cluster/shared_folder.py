"""Whether `paths.runs` and `paths.store` are the same folders on every node of the cluster.

Ranks write checkpoints and tasks write shards where they run. On one node that is one disk; on several it must be a
shared file system, or a run would scatter over the nodes and its checkpoints would never be whole. So before anything
is started on more than one node, a random file is written here and read there.
"""

import contextlib
import os
import secrets
from typing import Any

from cluster.session import Session
from conf.refusal import refuse
from conf.schema import Run
from data_pipeline.store import write_bytes

PROBE_TIMEOUT_S = 60.0


def check_shared(run: Run, session: Session) -> None:
    """Refuse a run whose folders are not seen by all nodes of the session; with one node there is nothing to see."""
    if len(session.nodes) < 2:
        return
    for key, folder in (("paths.runs", run.paths.runs), ("paths.store", run.paths.store)):
        missing = nodes_that_miss(folder, session.nodes)
        if missing:
            raise refuse(
                key,
                folder,
                f"node {missing[0]} does not see this folder; on {len(session.nodes)} nodes it must be a shared one",
                f"use a folder that every node mounts: {key}=/shared/... (in a Ray job also: ZERORAY_HOME=/shared/...)",
            )


def nodes_that_miss(folder: str, nodes: list[dict[str, Any]]) -> list[str]:
    """The names of the nodes that cannot read what is written here into `folder`."""
    os.makedirs(folder, exist_ok=True)
    path, secret = f"{folder}/.probe-{secrets.token_hex(8)}", secrets.token_hex(16)
    write_bytes(path, secret.encode())
    try:
        answers = ask_nodes(path, nodes)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
    return [name for name, content in answers if content != secret]


def ask_nodes(path: str, nodes: list[dict[str, Any]]) -> list[tuple[str, str | None]]:
    """What each node reads at `path`; None where it reads nothing."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    calls = []
    for node in nodes:
        strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        call = ray.remote(num_cpus=0, max_retries=0)(read_probe).options(scheduling_strategy=strategy).remote(path)
        calls.append((f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})", call))
    ready, _ = ray.wait([call for _, call in calls], num_returns=len(calls), timeout=PROBE_TIMEOUT_S)
    return [(name, answer_of(call) if call in ready else None) for name, call in calls]


def answer_of(call: Any) -> str | None:
    """What a node read; None when it died or could not run us."""
    import ray

    try:
        content: str | None = ray.get(call)
    except ray.exceptions.RayError:
        return None
    return content


def read_probe(path: str) -> str | None:
    """On another node: the file's content, or None."""
    # A listing first: network file systems may remember for a while that the name was not there.
    with contextlib.suppress(OSError):
        os.listdir(os.path.dirname(path))
        with open(path) as file:
            return file.read()
    return None
