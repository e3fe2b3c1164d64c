"""A Ray head as the README starts one, on ports of its own, and the folder a person submits jobs from."""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from processes import environment

from cluster import reaper

ROOT = Path(__file__).parent.parent


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody has."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@contextlib.contextmanager
def ray_head(home: Path, **extra: str) -> Iterator[dict[str, str]]:
    """A head whose jobs keep their runs in `home`; yields the environment in which a person uses it."""
    session, ports, folder = secrets.token_hex(8), free_ports(5), tempfile.mkdtemp(prefix="zr", dir="/tmp")
    env = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_JOB_STOP_WAIT_TIME_S": "120",
        "ZERORAY_HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        reaper.SESSION_VARIABLE: session,
        **extra,
    }
    names = ("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port", "metrics-export-port")
    options = [f"--{name}={port}" for name, port in zip(names, ports, strict=True)]
    place = ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", "--num-cpus=2", f"--temp-dir={folder}"]
    started = subprocess.run(
        ["ray", "start", "--head", "--disable-usage-stats", *options, *place],
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        start_new_session=True,
    )
    try:
        assert started.returncode == 0, started.stdout + started.stderr
        dashboard = {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{ports[1]}"}
        del env[reaper.SESSION_VARIABLE]
        yield {**env, **dashboard, "HEAD_FOLDER": folder, "SESSION": session, "HEAD_ADDRESS": f"127.0.0.1:{ports[0]}"}
    finally:
        groups = {os.getpgid(pid) for pid in reaper.members(session, set())} - {os.getpgid(0)}
        reaper.end(session, groups)
        shutil.rmtree(folder, ignore_errors=True)


def working_folder(folder: Path) -> Path:
    """A clone as far as a job needs it, with what must not be sent along."""
    folder.mkdir()
    for name in ("conf", "data_pipeline", "trainer", "cluster", ".gitignore"):
        (folder / name).symlink_to(ROOT / name)
    for name in (".venv", "runs", "store"):
        (folder / name).mkdir()
        (folder / name / "heavy.bin").write_bytes(secrets.token_bytes(10_000_000))
    return folder
