"""The Ray a driver works with: private and ended with it, or joined and left alone."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from cluster import reaper, session
from cluster.session import ClusterDown, Session, check_ranks, chosen_address, connect
from conf.schema import Run, Stage

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def run_with(**cluster: object) -> Run:
    run = Run()
    for key, value in cluster.items():
        setattr(run.cluster, key, value)
    return run


@pytest.mark.unit
def test_more_ranks_than_cpus() -> None:
    with pytest.raises(ValueError, match=r"^cluster.ranks=3: needs 3 CPUs .* there are 2\n") as caught:
        check_ranks(run_with(ranks=3), 2)
    assert "cluster.ranks=2" in str(caught.value)
    assert "cluster.cpus_per_rank=0.66" in str(caught.value)
    check_ranks(run_with(ranks=3, cpus_per_rank=0.66), 2)
    prepare_only = run_with(ranks=3)
    prepare_only.stages = [Stage.prepare]
    check_ranks(prepare_only, 2)


@pytest.mark.unit
def test_which_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert chosen_address(run_with())[0] is None
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert chosen_address(run_with()) == ("head:6379", "RAY_ADDRESS")
    assert chosen_address(run_with(address="other:1")) == ("other:1", "cluster.address")
    assert chosen_address(run_with(address="local"))[0] is None


@pytest.mark.unit
def test_a_taken_dashboard_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"cluster.dashboard_port={port}: .*in use"):
            session.free_dashboard_port(port)
    assert session.free_dashboard_port(0) in session.PRIVATE_PORTS


@pytest.mark.unit
def test_too_high_a_port() -> None:
    with pytest.raises(ValueError, match=r"cluster.dashboard_port=99999"):
        session.free_dashboard_port(99999)


def three_lines(error: ClusterDown, address: str, source: str) -> None:
    lines = str(error).splitlines()
    assert len(lines) == 3
    assert address in lines[0]
    assert source in lines[1]
    assert "ray start --head" in lines[2]


@pytest.mark.unit
def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    began = time.monotonic()
    with pytest.raises(ClusterDown) as caught:
        session.join(address, "RAY_ADDRESS")
    three_lines(caught.value, address, "RAY_ADDRESS")
    assert time.monotonic() - began < 15


@pytest.mark.unit
def test_something_else_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "CONNECT_DEADLINE_S", 2.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ClusterDown, match="no Ray head answered") as caught:
            session.join(address, "cluster.address")
    three_lines(caught.value, address, "cluster.address")


@pytest.mark.unit
@pytest.mark.parametrize("address", ["nonsense", "host:port", "host:99999"])
def test_not_an_address(address: str) -> None:
    with pytest.raises(ClusterDown) as caught:
        session.join(address, "cluster.address")
    three_lines(caught.value, address, "cluster.address")


@pytest.mark.unit
def test_addresses_of_other_protocols_are_refused() -> None:
    with (
        pytest.raises(ValueError, match=r"cluster.address=ray://head:10001.*\n.*zeroray submit"),
        session.joined("ray://head:10001", "cluster.address"),
    ):
        pass


@pytest.mark.ray
def test_the_private_ray_is_private(shared_ray: Session) -> None:
    assert shared_ray.private
    assert shared_ray.dashboard_url.startswith("http://127.0.0.1:")
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{shared_ray.dashboard_url}/api/jobs/", timeout=10)
    assert caught.value.code == 401
    assert not session.is_open(shared_ray.dashboard_url)
    token = os.environ["RAY_AUTH_TOKEN"]
    assert len(token) >= 32
    for pid in reaper.members(os.environ[reaper.SESSION_VARIABLE], set()):
        assert token not in Path(f"/proc/{pid}/cmdline").read_text()
    with connect(Run()) as again:
        assert not again.private, "a Ray that is already connected is used and not ended"
    with connect(Run()) as again:
        assert again.address == shared_ray.address


SCRIPT = """
    import os, sys, time
    from cluster.session import ClusterDown, connect
    from conf.schema import Run

    try:
        with connect(Run()) as session:
            import ray
            print(session.private, session.address, ray.get(ray.remote(lambda: 7).remote()), flush=True)
            if "hang" in sys.argv:
                time.sleep(600)
    except ClusterDown as error:
        print(error)
        sys.exit(1)
"""


def script(*args: str, **env: str) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "ZERORAY_"))}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), *args],
        env={**environment, "PYTHONPATH": ROOT, **env},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.ray
@pytest.mark.parametrize("whole_group", [False, True])
def test_nothing_outlives_a_killed_driver(whole_group: bool) -> None:
    process = script("hang")
    assert process.stdout is not None
    assert process.stdout.readline().startswith("True ")
    tree = psutil.Process(process.pid).children(recursive=True)
    assert len(tree) > 5
    if whole_group:
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait(10)
    _, left = psutil.wait_procs(tree, timeout=15)
    assert not left


@pytest.mark.ray
def test_joining_leaves_the_cluster_running(shared_ray: Session) -> None:
    token = os.environ["RAY_AUTH_TOKEN"]
    for _ in range(2):
        process = script(RAY_ADDRESS=shared_ray.address, RAY_AUTH_TOKEN=token)
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        assert out.startswith(f"False {shared_ray.address} ")


@pytest.mark.ray
def test_joining_with_the_wrong_token(shared_ray: Session, tmp_path: Path) -> None:
    began = time.monotonic()
    process = script(RAY_ADDRESS=shared_ray.address, RAY_AUTH_TOKEN="0" * 64, HOME=str(tmp_path))
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert out.splitlines()[0].endswith("it wants a token, and ours is missing or wrong")
    assert len(out.splitlines()) == 3
    assert time.monotonic() - began < 15
