"""Ends what a private Ray leaves behind when its driver is killed: one tiny process that waits for the driver's end.

Ray binds its own daemons to the driver (the kernel kills them with it) and its workers notice within a second, but its
agents linger for a minute. Every process of a private session carries `ZERORAY_SESSION=<random id>` in its environment,
or is in the process group of a daemon that the driver has told of; when the pipe from the driver closes, for whatever
reason, all of these are killed and the session's folder removed. A process is never known by its name, so nobody else's
Ray is touched.

The surprise: a process that sets its title, as Ray's agents do, may wipe its environment in /proc; hence the groups.

Started as a plain script (`python -I -S reaper.py <id> <folder>`): only the standard library, 10 MB, 20 ms.
"""

import contextlib
import fcntl
import glob
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

SESSION_VARIABLE = "ZERORAY_SESSION"


def members(session_id: str, groups: set[int]) -> list[int]:
    """The pids of all processes of this session other than the caller; those that are dead already do not count."""
    mark, found = f"{SESSION_VARIABLE}={session_id}".encode(), []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            with contextlib.suppress(OSError), open(f"/proc/{name}/environ", "rb") as environ:
                if mark in environ.read().split(b"\0") or (group_of(name) in groups):
                    found.append(int(name))
    return found


def group_of(pid: str) -> int | None:
    """The process group of a process; None when it is dead."""
    with open(f"/proc/{pid}/stat") as file:
        state, _, group = file.read().rsplit(")", 1)[1].split()[:3]
    return None if state in "ZX" else int(group)


def end(session_id: str, groups: set[int], rounds: int = 20) -> None:
    """Kill every process of this session; a dying one may still be starting another, so look until none is left."""
    for _ in range(rounds):
        left = members(session_id, groups)
        if not left:
            return
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)


def start(session_id: str, folder: str) -> "subprocess.Popen[bytes]":
    """Start the reaper of this process; it acts when this process ends, or when its `stdin` is closed."""
    environment = {k: v for k, v in os.environ.items() if k != SESSION_VARIABLE}
    command = [sys.executable, "-I", "-S", os.path.abspath(__file__), session_id, folder]
    # Its own session: a signal to the driver's process group must not end the one who cleans up.
    return subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, start_new_session=True)


def tell(reaper: "subprocess.Popen[bytes]", group: int) -> None:
    """Tell the reaper of a process group of this session."""
    assert reaper.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        reaper.stdin.write(f"{group}\n".encode())
        reaper.stdin.flush()


@contextlib.contextmanager
def session_folder() -> Iterator[str]:
    """A folder for one session, locked while this process lives; folders whose owner was killed are removed first."""
    # Short, not TMPDIR: the names of the sockets in it may have 107 bytes at most.
    place = "/tmp" if os.access("/tmp", os.W_OK) else tempfile.gettempdir()
    for lock in glob.glob(f"{place}/zeroray-*/lock"):
        remove_if_dead(lock)
    folder = tempfile.mkdtemp(prefix="zeroray-", dir=place)
    with open(f"{folder}/lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield folder


def remove_if_dead(lock: str) -> None:
    """Remove the session folder of `lock` unless a process holds the lock, or has just created it to take it."""
    with contextlib.suppress(OSError), open(lock) as file:
        if time.time() - os.fstat(file.fileno()).st_mtime > 60:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(os.path.dirname(lock), ignore_errors=True)


def main(session_id: str, folder: str) -> None:
    """Take the process groups that the driver tells of until its end of the pipe closes; then end the session."""
    groups = {int(line) for line in sys.stdin.buffer if line.strip().isdigit()}
    end(session_id, groups)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
