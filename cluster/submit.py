"""`zeroray submit`: a run as a job of a Ray cluster, by the Jobs API, as `ray job submit` would do it.

    submit_command(words)            flags of our own, the rest is what `zeroray run` takes
    submit_run(run, request, out)    submit, or answer with the job that is active; prints id and where to look
    job_id(...)                      zeroray-<run.name>-<n>: n is the first number that no earlier job of the name has
    follow(...)                      the job's output to its end, and its exit code
    stop_job(record)                 stop what `submission.json` in the run folder records

Two people who submit one run at once both ask for the same id; the cluster takes one, the other gets an error and looks
who has it. The job's driver runs `python -m cluster run ...` with the head's first `python`, in a copy of this folder
without data, environments and caches. Nothing secret is sent: tokens and keys come from the nodes' own environment.
"""

import asyncio
import contextlib
import logging
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TextIO
from urllib.parse import urlsplit

from cluster.console import Parser
from cluster.names import check_owners
from cluster.run_folder import RunFolder, job_home
from cluster.session import ClusterDown, use_auth_token_if_there
from conf.app import run_app
from conf.refusal import refuse
from conf.schema import Run
from data_pipeline.store import write_json

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
ACTIVE = ("PENDING", "RUNNING")
CONNECT_DEADLINE_S = 5.0
POLL_S = 1.0
# In .gitignore's form. Ray leaves out .git and .venv by itself, and what .gitignore and .rayignore name.
EXCLUDES = [
    *(
        "/.git",
        "/.venv",
        "/venv",
        "/runs",
        "/store",
        "/build",
        "/dist",
        "/outputs",
        "/multirun",
        "/wandb",
        "*.egg-info",
    ),
    *("__pycache__", "*.pyc", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".import_linter_cache", ".cache"),
]


@dataclass(frozen=True)
class Request:
    """What was asked for besides the run: the overrides as typed, where to, and whether to wait for the end."""

    overrides: list[str]
    address: str | None = None
    follow: bool = False


@dataclass(frozen=True)
class Job:
    """What the cluster is asked to do, and where."""

    name: str
    folder: str
    entrypoint: str
    address: str


def submit_command(words: list[str]) -> int:
    """Everything after `zeroray submit`."""
    flags = Parser(prog="zeroray submit", add_help=False, allow_abbrev=False)
    flags.add_argument("--follow", "-f", action="store_true")
    flags.add_argument("--address")
    said, rest = flags.parse_known_args(words)
    if {"--help", "-h"} & set(rest):
        sys.stdout.write(HELP)
        return 0
    if {"--multirun", "-m"} & set(rest):
        raise refuse("--multirun", "", "one submission is one run", "submit each by itself, with its own run.name")
    request = Request(rest, said.address, said.follow)
    return run_app(rest, lambda run: submit_run(run, request, sys.stdout), prog="zeroray submit")


def submit_run(run: Run, request: Request, out: TextIO) -> int:
    """Submit the run unless it is active; returns 0, or with `follow` the job's exit code."""
    check_owners()
    try:
        address, source = chosen_address(run, request.address)
        client = connect(address, source)
        folder = job_folder(run)
        wanted = Job(run.run.name, folder.path, entrypoint_of(request.overrides), address)
        job, new = submitted(client, wanted, out)
    except ClusterDown as error:
        sys.stderr.write(f"{error}\n")
        return 1
    if new:
        remember(folder, {"id": job, "address": address, "time": time.time(), "entrypoint": wanted.entrypoint}, out)
    out.write(f"{'submitted' if new else 'already active'}: {job}\n")
    out.write(f"  dashboard  {address}/#/jobs/{job}\n")
    out.write(f"  log        {address}/api/jobs/{job}/logs, or: ray job logs -f {job} --address {address}\n")
    out.write(f"  status     zeroray status {run.run.name} paths.runs={shlex.quote(os.path.dirname(folder.path))}\n")
    out.write(f"  stop       ray job stop {job} --address {address}\n")
    out.flush()
    return follow(client, job, out) if request.follow else 0


# --- which cluster ------------------------------------------------------------------------------------------------


def chosen_address(run: Run, flag: str | None) -> tuple[str, str]:
    """The Jobs API's URL and what set it: --address, cluster.address, the environment, or the default."""
    named = run.cluster.address if run.cluster.address not in (None, "auto", "local") else None
    variables = [(os.environ.get(name), name) for name in ADDRESS_VARIABLES]
    candidates = [(flag, "--address"), (named, "cluster.address"), *variables, (DEFAULT_ADDRESS, "default")]
    address, source = next((a, s) for a, s in candidates if a and a != "auto")
    if "://" not in address:
        address = f"http://{address}"
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise refuse(source, address, "is not the address of a Jobs API", f"for example {DEFAULT_ADDRESS}")
    return address.rstrip("/"), source


def connect(address: str, source: str) -> Any:
    """A client of the Jobs API; raises ClusterDown, three lines, when nobody answers or the token is refused."""
    parts = urlsplit(address)
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((str(parts.hostname), port), CONNECT_DEADLINE_S).close()
        use_auth_token_if_there()
        from ray.job_submission import JobSubmissionClient

        for name in ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
            logging.getLogger(name).setLevel(logging.ERROR)  # or it lists every .gitignore that it leaves out
        with without_ray_addresses():
            return JobSubmissionClient(address)
    except ValueError as error:
        raise refuse(source, address, str(error), f"for example {DEFAULT_ADDRESS}") from error
    except Exception as error:  # requests, aiohttp and Ray have a family each; all mean: not usable
        raise down(address, source, error) from error


@contextlib.contextmanager
def without_ray_addresses() -> Iterator[None]:
    """Ray prefers these variables to an address that it is given."""
    before = {name: os.environ.pop(name) for name in ADDRESS_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


def down(address: str, source: str, error: Exception) -> ClusterDown:
    """The three lines of a cluster that does not take jobs."""
    kind, reason = type(error).__name__, (str(error).strip().splitlines() or [""])[0][:160]
    way_out = "start one: RAY_AUTH_MODE=token ray start --head --dashboard-host 127.0.0.1 (README, Using a cluster)"
    if kind == "AuthenticationError" or "401" in reason or "403" in reason:
        reason = "it wants a token, and ours is missing or wrong"
        way_out = "give it: export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=... (or RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token)"
    return ClusterDown(f"no Ray cluster takes jobs at {address}: {reason or kind}\nset by: {source}\n{way_out}")


# --- which job ----------------------------------------------------------------------------------------------------


def entrypoint_of(overrides: list[str]) -> str:
    """What the job executes; the address of the cluster is left out, for inside it is known."""
    kept = [word for word in overrides if not word.lstrip("+").startswith("cluster.address=")]
    return shlex.join(["python", "-m", "cluster", "run", *kept])


def job_folder(run: Run) -> RunFolder:
    """The run folder that the job will use, as this machine would name it."""
    return RunFolder(os.path.join(job_home(), os.path.expanduser(run.paths.runs)), run.run.name)


def jobs_of(client: Any, name: str) -> dict[str, Any]:
    """The jobs that were submitted for runs of this name, by submission id."""
    found = {job.submission_id: job for job in client.list_jobs() if job.submission_id}
    return {i: job for i, job in found.items() if number_of(i, name) is not None}


def number_of(job: str, name: str) -> int | None:
    """The n of `zeroray-<name>-<n>`; None for the job of another run."""
    head, _, number = job.rpartition("-")
    return int(number) if head == f"zeroray-{name}" and number.isdigit() else None


def job_id(name: str, taken: list[str]) -> str:
    """The next submission id of a run.

    >>> job_id("mine", ["zeroray-mine-1", "zeroray-mine-2", "zeroray-other-7"])
    'zeroray-mine-3'
    """
    return f"zeroray-{name}-{max([number_of(job, name) or 0 for job in taken], default=0) + 1}"


def submitted(client: Any, wanted: Job, out: TextIO) -> tuple[str, bool]:
    """The id of the job that does this run, and whether it is new. Of several that ask at once one submits."""
    facts = {"run": wanted.name, "folder": wanted.folder}
    environment = {"working_dir": ".", "excludes": EXCLUDES}
    for _ in range(10):
        jobs = jobs_of(client, wanted.name)
        ours = [i for i, job in jobs.items() if job.status in ACTIVE and job.metadata.get("folder") == wanted.folder]
        if ours:
            note_other_request(jobs[ours[0]], wanted.entrypoint, out)
            return ours[0], False
        new = job_id(wanted.name, list(jobs))
        try:
            client.submit_job(entrypoint=wanted.entrypoint, submission_id=new, runtime_env=environment, metadata=facts)
            return new, True
        except Exception as error:  # HTTP 500 when another took the id meanwhile; anything else is told
            if new not in jobs_of(client, wanted.name):
                raise down(wanted.address, "the submission", error) from error
    raise ClusterDown(f"{wanted.address}: every id was taken by somebody else\nset by: the submission\ntry again")


def note_other_request(job: Any, entrypoint: str, out: TextIO) -> None:
    """Say so when the active job was asked for something else."""
    if job.entrypoint != entrypoint:
        out.write(f"note: it was submitted with other overrides: {job.entrypoint}\n")


def remember(folder: RunFolder, record: dict[str, Any], out: TextIO) -> None:
    """Write the submission into the run folder, so that `status` and `stop` know of it before the driver begins."""
    try:
        write_json(f"{folder.path}/submission.json", record)
    except OSError as error:
        out.write(f"note: {folder.path} is not writable here ({error.strerror}); status works where it is\n")


# --- what becomes of it -------------------------------------------------------------------------------------------


def follow(client: Any, job: str, out: TextIO) -> int:
    """Print the job's output until it ends; returns its exit code. Ctrl-C leaves the job at work."""
    try:
        while client.get_job_info(job).status == "PENDING":
            time.sleep(POLL_S)
        asyncio.run(print_log(client, job, out))
        while client.get_job_info(job).status in ACTIVE:
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        out.write(f"the job goes on; end it with: ray job stop {job}\n")
        return 130
    return exit_code(client.get_job_info(job), out)


async def print_log(client: Any, job: str, out: TextIO) -> None:
    """Print what the job prints; a connection that breaks is the cluster's end or a pause, which the caller sees."""
    try:
        async for text in client.tail_job_logs(job):
            out.write(text)
            out.flush()
    except RuntimeError as error:
        out.write(f"the connection to the log broke ({error}); waiting for the job's end\n")


def exit_code(info: Any, out: TextIO) -> int:
    """The exit code of a job that ended; Ray knows failed or not, the driver's own code says which end it was."""
    if info.status == "SUCCEEDED":
        return 0
    out.write(f"{info.status}: {(info.message or '').splitlines()[0] if info.message else ''}\n")
    if info.driver_exit_code is not None and info.driver_exit_code > 0:
        return int(info.driver_exit_code)
    return 6 if info.status == "STOPPED" else 1


def stop_job(record: dict[str, Any]) -> str:
    """Stop the job of a submission that has not begun; returns what happened, for a person."""
    try:
        client = connect(record["address"], "submission.json")
        stopped = client.stop_job(record["id"])
    except ClusterDown as error:
        return f"{record['id']} cannot be reached: {str(error).splitlines()[0]}"
    except RuntimeError as error:
        return f"{record['id']} is not known there: {str(error).splitlines()[0][:160]}"
    return f"{record['id']} was told to stop" if stopped else f"{record['id']} had ended already"


HELP = """zeroray submit: do a run as a job of a Ray cluster; a run that is active is not started twice.

usage: zeroray submit [group=option | key=value ...] [--follow] [--address URL]

  --address URL   the cluster's Jobs API; else cluster.address, RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or
                  http://127.0.0.1:8265
  --follow, -f    print the job's output until it ends, and return its exit code
  --cfg job       print the run and submit nothing; groups and keys: zeroray run --help

This folder is sent along, without .git, .venv, runs, store, caches and what .gitignore names; each node needs zeroray's
packages. In a job relative paths.runs and paths.store lie in ~/zeroray of the nodes (or $ZERORAY_HOME there); with more
than one node both must be on a file system that all share. A cluster with auth: export RAY_AUTH_TOKEN (or
RAY_AUTH_TOKEN_PATH), as for `ray job submit`, which does the same:

  ray job submit --address http://127.0.0.1:8265 --working-dir . -- python -m cluster run experiment=quickstart

examples
  zeroray submit experiment=quickstart
  zeroray submit experiment=quickstart run.name=mine train.steps=500 --follow
  zeroray submit --address http://head:8265 experiment=quickstart paths.runs=/shared/runs paths.store=/shared/store
"""
