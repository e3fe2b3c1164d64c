"""`zeroray doctor`: can this machine run zeroray? A table of checks, what was found, and what to do.

    doctor_command(words, as_json, out)     exit 0 when everything needed is usable, 1 when something is broken
    findings(...)                           every check in its order; each is one function that returns Findings

`ok` is fine, `note` is worth knowing (something optional is missing), `broken` keeps a run from working.
"""

import dataclasses
import importlib.metadata
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TextIO

from cluster.names import PACKAGES, foreign_owners, installed, locations
from cluster.session import available_cpus

GIB = 2**30
DISK_NEEDED_GIB, SHM_NEEDED_GIB = 2.0, 0.25
PORTS = {8265: "a dashboard", 6379: "a Ray head"}
FLOORS = {"ray": (2, 60), "hydra-core": (1, 3), "omegaconf": (2, 3), "webdataset": (1, 0), "tokenizers": (0, 23)}
TRAIN_FLOORS = {"torch": (2, 10), "deepspeed": (0, 19), "transformers": (5, 3), "safetensors": (0, 8)}


@dataclass(frozen=True)
class Finding:
    """What one check found: `state` is ok, note or broken; `todo` is what to do, empty when nothing is."""

    check: str
    state: str
    found: str
    todo: str = ""


def doctor_command(words: list[str], as_json: bool, out: TextIO) -> int:
    """Print every finding; returns 1 when something is broken."""
    from cluster.lookup import read

    overrides = read(words).overrides
    places = {"paths.runs": overrides.get("paths.runs", "runs"), "paths.store": overrides.get("paths.store", "store")}
    found = list(findings(places))
    if as_json:
        from cluster.console import print_json

        usable = not any(f.state == "broken" for f in found)
        print_json({"usable": usable, "findings": [dataclasses.asdict(f) for f in found]})
    else:
        out.write(table(found))
    return 1 if any(f.state == "broken" for f in found) else 0


def findings(places: dict[str, str]) -> Iterator[Finding]:
    """Every check; one that fails in a way nobody foresaw is a finding too."""
    checks: list[Callable[[], Iterator[Finding]]] = [
        check_python, check_names, check_versions, check_torch, check_jit_cache, check_compiler, check_ray, check_ports,
        check_memory, lambda: check_disk(places), check_wandb,
    ]  # fmt: skip
    for check in checks:
        try:
            yield from check()
        except Exception as error:  # a broken installation raises anything at import
            name = getattr(check, "__name__", "check_disk").removeprefix("check_")
            yield Finding(name, "broken", f"{type(error).__name__}: {str(error).splitlines()[:1]}", "make install")


def table(found: list[Finding]) -> str:
    """The findings for a person."""
    widths = [max(len(getattr(f, name)) for f in found) for name in ("check", "state")]
    lines = []
    for f in found:
        lines.append(f"{f.state.ljust(widths[1])}  {f.check.ljust(widths[0])}  {f.found}")
        if f.todo:
            lines.append(f"{' ' * (sum(widths) + 4)}-> {f.todo}")
    broken = sum(f.state == "broken" for f in found)
    lines.append("this machine can run zeroray" if not broken else f"{broken} broken: see the lines with ->")
    return "\n".join(lines) + "\n"


def check_python() -> Iterator[Finding]:
    """The interpreter."""
    version = sys.version.split()[0]
    good = sys.version_info >= (3, 11)
    yield Finding(
        "python",
        "ok" if good else "broken",
        f"{version} at {sys.executable}",
        "" if good else "use Python 3.11 or newer",
    )


def check_names() -> Iterator[Finding]:
    """The four package names, which other distributions use too."""
    foreign = foreign_owners()
    for name, owners in foreign.items():
        todo = f"pip uninstall -y {' '.join(owners)}, then make install"
        yield Finding("names", "broken", f"{name} is also installed by {', '.join(owners)}", todo)
    homes = {os.path.dirname(place) if place else "nowhere" for place in locations().values()}
    if len(homes) > 1:
        todo = "leave the folder that hides one of them, or use an environment of its own"
        yield Finding("names", "broken", f"{', '.join(PACKAGES)} come from {', '.join(sorted(homes))}", todo)
    elif not foreign:
        yield Finding("names", "ok", f"{', '.join(PACKAGES)} are zeroray's, in {homes.pop()}")


def check_versions() -> Iterator[Finding]:
    """The packages that everything needs, and those for training."""
    for needed, floors in (("broken", FLOORS), ("note", TRAIN_FLOORS)):
        for name, floor in floors.items():
            least = ".".join(map(str, floor))
            try:
                version = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                what = "not installed" if needed == "broken" else "not installed: only stages=[prepare] works"
                yield Finding(name, needed, what, f"pip install '{name}>={least}', or make install")
                continue
            numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
            good = numbers >= floor
            yield Finding(name, "ok" if good else "broken", version, "" if good else f"at least {least} is needed")


def check_torch() -> Iterator[Finding]:
    """Whether torch works, and on what: CUDA with NCCL, or the CPU with gloo."""
    if not installed("torch"):
        return
    import torch

    if torch.cuda.is_available():
        nccl = torch.distributed.is_nccl_available()
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        found = f"{names}; NCCL {'there' if nccl else 'missing'}"
        yield Finding("cuda", "ok" if nccl else "broken", found, "" if nccl else "install a torch built with NCCL")
        return
    gloo = torch.distributed.is_available() and torch.distributed.is_gloo_available()
    todo = "" if gloo else "install a torch built with gloo"
    found = f"none; ranks train on the CPU ({available_cpus()} cores) and meet over gloo"
    yield Finding("cuda", "ok" if gloo else "broken", found, todo)


def check_jit_cache() -> Iterator[Finding]:
    """Locks of builds that were killed: DeepSpeed waits for them without end, and says nothing."""
    if not installed("torch"):
        return
    from trainer.distributed import private_extensions_folder, stale_locks

    folder = private_extensions_folder()
    locks, stale = stale_locks(folder, age_s=0.0), stale_locks(folder)
    for lock in locks:
        age_s = time.time() - os.path.getmtime(lock)
        state = "broken" if lock in stale else "note"
        todo = f"rm {lock}" if lock in stale else "a build is at work, or was killed: if none is, rm it"
        yield Finding("jit cache", state, f"{lock}: a lock, {age_s / 60:.0f} min old", todo)
    if not locks:
        yield Finding("jit cache", "ok", f"{folder}: no lock")


def check_compiler() -> Iterator[Finding]:
    """What DeepSpeed's own kernels would be built with; the ordinary recipe needs none."""
    there = {
        name: shutil.which(name) or shutil.which(name, path=os.path.dirname(sys.executable))
        for name in ("gcc", "ninja")
    }
    missing = [name for name, path in there.items() if path is None]
    if missing:
        todo = "needed only for DeepSpeed's own kernels (offload): apt install gcc, pip install ninja"
        yield Finding("compiler", "note", f"no {', no '.join(missing)}", todo)
    else:
        yield Finding("compiler", "ok", f"{there['gcc']}, {there['ninja']}")


def check_ray() -> Iterator[Finding]:
    """What decides which Ray a run uses."""
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        if value := os.environ.get(name):
            todo = f"unset {name} for a private local Ray"
            yield Finding("ray address", "note", f"{name}={value}: runs join that cluster", todo)
    mode = os.environ.get("RAY_AUTH_MODE", "")
    if mode not in ("", "token"):
        todo = "export RAY_AUTH_MODE=token"
        yield Finding("ray auth", "note", f"RAY_AUTH_MODE={mode}: who reaches a head can run code on it", todo)
    waits = os.environ.get("RAY_JOB_STOP_WAIT_TIME_S")
    todo = (
        "" if waits else "before `ray start --head`: export RAY_JOB_STOP_WAIT_TIME_S=120, or a job is killed after 3 s"
    )
    yield Finding("ray job stop", "ok" if waits else "note", f"RAY_JOB_STOP_WAIT_TIME_S={waits or 'unset (3 s)'}", todo)


def check_ports() -> Iterator[Finding]:
    """Whether somebody listens where a head would; a private Ray chooses free ports."""
    for port, what in PORTS.items():
        with socket.socket() as probe:
            probe.settimeout(1)
            taken = probe.connect_ex(("127.0.0.1", port)) == 0
        todo = "a private Ray does not mind; for another head choose other ports" if taken else ""
        yield Finding(
            f"port {port}", "note" if taken else "ok", f"{'taken' if taken else 'free'} (where {what} listens)", todo
        )


def check_memory() -> Iterator[Finding]:
    """Shared memory, in which Ray keeps its objects, and main memory."""
    import psutil

    if os.path.isdir("/dev/shm"):
        free = shutil.disk_usage("/dev/shm").free / GIB
        good = free >= SHM_NEEDED_GIB
        todo = "" if good else "containers: --shm-size=1g; Ray falls back to disk, slowly"
        yield Finding("/dev/shm", "ok" if good else "note", f"{free:.1f} GiB free", todo)
    free = psutil.virtual_memory().available / GIB
    good = free >= 2
    yield Finding(
        "memory", "ok" if good else "note", f"{free:.1f} GiB free", "" if good else "quickstart needs about 3 GiB"
    )


def check_disk(places: dict[str, str]) -> Iterator[Finding]:
    """Room, and the right to write, where runs and stage outputs go."""
    for key, place in places.items():
        path = os.path.abspath(os.path.expanduser(place))
        there = path
        while not os.path.isdir(there):
            there = os.path.dirname(there)
        free = shutil.disk_usage(there).free / GIB
        if not os.access(there, os.W_OK):
            yield Finding(key, "broken", f"{path}: not writable", f"choose another folder: {key}=FOLDER")
        elif free < DISK_NEEDED_GIB:
            yield Finding(
                key, "broken", f"{path}: {free:.1f} GiB free", f"make room, or choose another disk: {key}=FOLDER"
            )
        else:
            yield Finding(key, "ok", f"{path}: {free:.0f} GiB free")


def check_wandb() -> Iterator[Finding]:
    """What tracker.wandb=auto would do; the key itself is never shown."""
    if not installed("wandb"):
        yield Finding("wandb", "note", "not installed: metrics go to metrics.jsonl alone", "pip install wandb")
        return
    key = "WANDB_API_KEY" in os.environ
    found = "online: WANDB_API_KEY is set" if key else "offline: no WANDB_API_KEY; runs are kept in the run folder"
    yield Finding("wandb", "ok", found)
