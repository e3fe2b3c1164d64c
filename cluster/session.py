"""The Ray this process works with: a private local one that ends with it, or a cluster that it joins.

    with connect(run) as session: ...

    cluster.address, else RAY_ADDRESS (which `ray job submit` sets)   join it; ClusterDown when nobody answers
    neither, or cluster.address=local                                 start one: token auth, dashboard on loopback

A private Ray gets a random token that stands only in the environment of its processes (or the user's own
RAY_AUTH_TOKEN, so that the dashboard can be opened with it), a folder of its own under /tmp, and a reaper
(`cluster.reaper`), so that nothing outlives this process, not even after SIGKILL.

Two surprises. Ray ties its daemons to the *thread* that starts them: call `connect` from the main thread. And it puts
them into the driver's process group, where a SIGTERM meant for the driver (`timeout`, a supervisor) would end the
workers before they could commit a checkpoint: `own_process_groups` gives each its own.
"""

import contextlib
import http.client
import logging
import os
import random
import secrets
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cluster import reaper
from conf.refusal import refuse
from conf.schema import Run, Stage

log = logging.getLogger("zeroray")

PRIVATE_PORTS = range(18265, 28265)  # below the ports that the kernel hands out
CONNECT_DEADLINE_S = 10.0
OBJECT_STORE_BYTES = 200_000_000  # what goes through Ray is small; data goes through files


class ClusterDown(Exception):  # noqa: N818 (a fact about the world, not an error of ours)
    """The cluster that was named does not answer; the message is three lines: which, what set it, how to start one."""


@dataclass
class Session:
    """A connected Ray: how big it is, where to look at it, and whether it is ours to end."""

    private: bool
    address: str
    dashboard_url: str
    cpus: float
    gpus: float
    nodes: list[dict[str, Any]]


def inside_job() -> bool:
    """Whether this process is the driver of a Ray job, whose working folder is a temporary copy on every node."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def plugin_folder() -> str | None:
    """Where workers find the modules of `plugins=[...]`; None inside a Ray job: each node has its own copy."""
    return None if inside_job() else os.getcwd()


def available_cpus() -> int:
    """The CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def connect(run: Run) -> Iterator[Session]:
    """Join or start the Ray that `run` asks for; afterwards end what was started here, and nothing else.

    Raises ValueError for what the user can mend (ranks, ports) and ClusterDown when the named cluster does not answer.
    """
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"  # or `uv run` would rebuild an environment in every worker
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from ray._private import worker

    worker.print_to_stdstream = tell_in_our_log
    if connected():
        session = describe(private=False)
        check_ranks(run, session.cpus)
        yield session
        return
    address, source = chosen_address(run)
    with joined(address, source) if address else private(run) as session:
        check_ranks(run, session.cpus)
        yield session


def connected() -> bool:
    """Whether this process already has a Ray: a program that uses us as a library, or a test."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def chosen_address(run: Run) -> tuple[str | None, str]:
    """The address to join, or None for a private Ray, and what set it."""
    if run.cluster.address == "local":
        return None, "cluster.address"
    if run.cluster.address:
        return run.cluster.address, "cluster.address"
    return os.environ.get("RAY_ADDRESS") or None, "RAY_ADDRESS"


def tell_in_our_log(data: dict[str, Any], ignore_prefix: bool) -> None:
    """Take what Ray would print on stdout: one line to our log, and nothing of the deaths that we report ourselves."""
    for line in data["lines"]:
        level = logging.DEBUG if "worker died" in line else logging.INFO
        log.log(level, "Ray: %s", " ".join(line.split())[:200])


def check_ranks(run: Run, cpus: float) -> None:
    """Refuse a gang that can never be placed."""
    needed = run.cluster.ranks * run.cluster.cpus_per_rank
    if set(run.stages) <= {Stage.prepare} or needed <= cpus:
        return
    fitting, share = int(cpus // run.cluster.cpus_per_rank), int(10_000 * cpus / run.cluster.ranks) / 10_000
    fewer = f"use cluster.ranks={fitting}, or " if fitting else "use "
    raise refuse(
        "cluster.ranks",
        run.cluster.ranks,
        f"needs {needed:g} CPUs (cluster.cpus_per_rank={run.cluster.cpus_per_rank:g}), and there are {cpus:g}",
        f"{fewer}cluster.cpus_per_rank={share:g} to let ranks share CPUs",
    )


# --- a private Ray -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def private(run: Run) -> Iterator[Session]:
    """Start a Ray of our own on this machine and end it afterwards."""
    check_ranks(run, available_cpus())
    port = free_dashboard_port(run.cluster.dashboard_port)
    session_id = secrets.token_hex(8)
    with reaper.session_folder() as folder:
        guard = reaper.start(session_id, folder)
        try:
            with private_environment(session_id):
                yield start_private(port, folder, guard)
        finally:
            end_private(guard)


@contextlib.contextmanager
def private_environment(session_id: str) -> Iterator[None]:
    """The variables that our Ray's processes inherit; the caller's own come back afterwards."""
    ours = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32),
        reaper.SESSION_VARIABLE: session_id,
    }
    before = {name: os.environ.get(name) for name in [*ours, "RAY_ADDRESS"]}
    os.environ.pop("RAY_ADDRESS", None)
    os.environ.update(ours)
    reload_auth()
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        reload_auth()


def reload_auth() -> None:
    """Make a Ray that is already imported read the auth variables again; it reads them once, at import."""
    from ray._private.authentication import authentication_token_setup as setup

    setup.Config.initialize("")
    setup.AuthenticationTokenLoader.instance().reset_cache()


def start_private(port: int, folder: str, guard: "subprocess.Popen[bytes]") -> Session:
    """Start Ray's processes on this machine."""
    import ray

    with own_process_groups(guard):
        ray.init(
            address="local",
            num_cpus=available_cpus(),
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            dashboard_port=port,
            object_store_memory=OBJECT_STORE_BYTES,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=folder,
        )
    return describe(private=True)


@contextlib.contextmanager
def own_process_groups(guard: "subprocess.Popen[bytes]") -> Iterator[None]:
    """Give each daemon that Ray starts meanwhile its own process group, and tell the reaper of it."""
    from ray._private import services

    popen = services.ConsolePopen

    def start(*args: Any, **kwargs: Any) -> Any:
        process = popen(*args, process_group=0, **kwargs)
        reaper.tell(guard, process.pid)
        return process

    services.ConsolePopen = start
    try:
        yield
    finally:
        services.ConsolePopen = popen


def end_private(guard: "subprocess.Popen[bytes]") -> None:
    """Disconnect, and let the reaper end every process of the session and remove its folder."""
    import ray

    ray.shutdown()
    assert guard.stdin is not None
    guard.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        guard.wait(timeout=10)


def free_dashboard_port(port: int) -> int:
    """`cluster.dashboard_port` if it is free, some free port when it is 0; refuses one that is taken.

    Ray's own choice would be 8265, where a head that is started later expects its dashboard and Jobs API.
    """
    if port == 0:
        return next(number for number in random.sample(PRIVATE_PORTS, len(PRIVATE_PORTS)) if is_free(number))
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            raise refuse(
                "cluster.dashboard_port",
                port,
                f"this port cannot be used ({error})",
                "choose another, or 0 for any free one",
            ) from error
    return port


def is_free(port: int) -> bool:
    """Whether nobody listens on this port of loopback."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


# --- somebody else's Ray -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def joined(address: str, source: str) -> Iterator[Session]:
    """Join the cluster at `address` as it is; leave it running."""
    if "://" in address:
        raise refuse(
            source,
            address,
            "the driver runs on a node of the cluster and needs host:port there",
            "from outside use `zeroray submit cluster.address=http://host:8265 ...` or `ray job submit`",
        )
    session = join(address, source)
    try:
        yield session
    finally:
        import ray

        ray.shutdown()


def join(address: str, source: str) -> Session:
    """Connect within the deadline, or raise ClusterDown."""
    import ray

    use_auth_token_if_there()
    try:
        answering(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ray.exceptions.RayError, OSError, RuntimeError, ValueError) as error:
        raise down(address, source, error) from error
    session = describe(private=False)
    if is_open(session.dashboard_url):
        log.warning(
            "the Ray cluster at %s has no auth: who reaches it can run code on it (RAY_AUTH_MODE=token)", address
        )
    return session


def use_auth_token_if_there() -> None:
    """Turn token auth on when a token is at hand and nothing was said; Ray does so only without an address."""
    from ray._private.authentication.authentication_token_setup import AuthenticationTokenLoader

    if "RAY_AUTH_MODE" not in os.environ and AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True):
        os.environ["RAY_AUTH_MODE"] = "token"
    reload_auth()


def answering(address: str) -> None:
    """Raise unless a Ray head answers at `address` within the deadline; alone, ray.init waits for a minute."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError("not of the form host:port")
    socket.create_connection((host, int(port)), timeout=CONNECT_DEADLINE_S / 2).close()
    failures: list[BaseException] = []
    thread = threading.Thread(target=ask_head, args=(address, failures), daemon=True)
    thread.start()
    thread.join(CONNECT_DEADLINE_S)
    if thread.is_alive():
        raise TimeoutError(f"something listens there, but no Ray head answered within {CONNECT_DEADLINE_S:g} s")
    if failures:
        raise failures[0]


def ask_head(address: str, failures: list[BaseException]) -> None:
    """One question to the head; what it raises is appended to `failures`."""
    import ray

    try:
        ray._raylet.GcsClient(address=address).internal_kv_get(
            b"zeroray", namespace=b"zeroray", timeout=CONNECT_DEADLINE_S
        )
    except Exception as error:  # whatever it is, the caller says that the cluster cannot be used
        failures.append(error)


def down(address: str, source: str, error: Exception) -> ClusterDown:
    """The three lines of a cluster that cannot be reached."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
    way_out = "start one with `RAY_AUTH_MODE=token ray start --head`, or leave the address out for a private local Ray"
    if "AuthToken" in str(error) or "uthentication" in str(error):
        reason = "it wants a token, and ours is missing or wrong"
        way_out = "give its token in RAY_AUTH_TOKEN (or ~/.ray/auth_token), or start one: `ray start --head`"
    return ClusterDown(f"no usable Ray cluster at {address}: {reason}\nthe address was set by {source}\n{way_out}")


def is_open(dashboard_url: str) -> bool:
    """Whether the cluster's API answers a request without a token."""
    host, _, port = dashboard_url.removeprefix("http://").rpartition(":")
    if not port.isdigit():
        return False
    try:
        connection = http.client.HTTPConnection(host, int(port), timeout=3)
        connection.request("GET", "/api/jobs/")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False


def describe(private: bool) -> Session:
    """What is known of the Ray that this process is connected to."""
    import ray
    from ray._private import worker

    resources = ray.cluster_resources()
    url = worker.get_dashboard_url() or ""
    return Session(
        private=private,
        address=ray.get_runtime_context().gcs_address,
        dashboard_url=f"http://{url}" if url else "",
        cpus=resources.get("CPU", 0.0),
        gpus=resources.get("GPU", 0.0),
        nodes=[node for node in ray.nodes() if node["Alive"]],
    )
