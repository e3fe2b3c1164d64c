"""Submitting: one run is one job, whoever asks how often, and what is told when the cluster cannot take it."""

import io
import json
import os
import shlex
import socket
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from heads import working_folder
from processes import command, environment, zeroray

from cluster import submit
from cluster.run_folder import RunFolder
from cluster.session import ClusterDown
from cluster.status import status_of
from cluster.stop import stop
from conf.schema import Cluster, Run, RunInfo


class FakeJobs:
    """A Jobs API: ids are taken once, and a second taker gets an error, as from Ray."""

    def __init__(self, slow: bool = False) -> None:
        self.jobs: dict[str, Any] = {}
        self.lock = threading.Lock()
        self.together = threading.Barrier(4) if slow else None
        self.log = ["line 1\n", "line 2\n"]

    def list_jobs(self) -> list[Any]:
        with self.lock:
            return list(self.jobs.values())

    def submit_job(self, *, entrypoint: str, submission_id: str, runtime_env: Any, metadata: dict[str, str]) -> str:
        if self.together is not None and submission_id.endswith("-1"):
            self.together.wait(10)  # every caller has looked before anyone submits
        with self.lock:
            if submission_id in self.jobs:
                raise RuntimeError("Request failed with status code 500: already exists")
            facts = {"entrypoint": entrypoint, "metadata": metadata, "status": "PENDING", "runtime_env": runtime_env}
            self.jobs[submission_id] = SimpleNamespace(submission_id=submission_id, message="", **facts)
            return submission_id

    def get_job_info(self, job: str) -> Any:
        return self.jobs[job]

    def stop_job(self, job: str) -> bool:
        was = self.jobs[job].status in submit.ACTIVE
        self.jobs[job].status = "STOPPED"
        return was

    async def tail_job_logs(self, job: str) -> Any:
        for line in self.log:
            yield line


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeJobs:
    fake = FakeJobs()
    monkeypatch.setattr(submit, "connect", lambda address, source: fake)
    monkeypatch.setenv("ZERORAY_HOME", str(tmp_path / "home"))
    return fake


def submitted(overrides: list[str] | None = None, follow: bool = False, name: str = "mine") -> tuple[int, str]:
    out = io.StringIO()
    request = submit.Request(overrides or ["experiment=smoke"], follow=follow)
    return submit.submit_run(Run(run=RunInfo(name=name)), request, out), out.getvalue()


@pytest.mark.unit
def test_an_active_run_is_not_submitted_twice(jobs: FakeJobs) -> None:
    assert "submitted: zeroray-mine-1\n" in submitted()[1]
    code, text = submitted()
    assert (code, "already active: zeroray-mine-1\n" in text, len(jobs.jobs)) == (0, True, 1)
    assert "other overrides" in submitted(["experiment=smoke", "train.steps=9"])[1]
    assert "submitted: zeroray-other-1\n" in submitted(name="other")[1]
    jobs.jobs["zeroray-mine-1"].status = "FAILED"
    assert "submitted: zeroray-mine-2\n" in submitted()[1]


@pytest.mark.unit
def test_of_four_at_once_one_submits(jobs: FakeJobs, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = FakeJobs(slow=True)
    monkeypatch.setattr(submit, "connect", lambda address, source: slow)
    results: list[tuple[int, str]] = []
    threads = [threading.Thread(target=lambda: results.append(submitted())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [code for code, _ in results] == [0] * 4
    assert sum("submitted: zeroray-mine-1\n" in text for _, text in results) == 1
    assert sum("already active: zeroray-mine-1\n" in text for _, text in results) == 3
    assert list(slow.jobs) == ["zeroray-mine-1"]


@pytest.mark.unit
def test_the_entrypoint_is_a_quoted_command_line(jobs: FakeJobs) -> None:
    words = ["corpus.path='/data/a b/*.jsonl'", "run.name=mine", "cluster.address=http://head:8265", "x.y=$(rm -rf /)"]
    submitted(words)
    job = jobs.jobs["zeroray-mine-1"]
    kept = [word for word in words if "address" not in word]
    assert shlex.split(job.entrypoint) == ["python", "-m", "cluster", "run", *kept]
    assert job.runtime_env.keys() == {"working_dir", "excludes"}, "no variables: the jobs API shows them to everybody"


ENDS = [
    ("SUCCEEDED", 0, 0),
    ("FAILED", 3, 3),
    ("FAILED", 1, 1),
    ("FAILED", None, 1),
    ("STOPPED", 6, 6),
    ("STOPPED", None, 6),
]


@pytest.mark.unit
@pytest.mark.parametrize(("status", "driver", "expected"), ENDS)
def test_follow_returns_the_jobs_exit_code(
    jobs: FakeJobs, monkeypatch: pytest.MonkeyPatch, status: str, driver: int | None, expected: int
) -> None:
    ended = SimpleNamespace(status=status, message="why", driver_exit_code=driver)
    monkeypatch.setattr(jobs, "get_job_info", lambda job: ended)
    code, text = submitted(follow=True)
    assert code == expected
    assert "line 1\nline 2\n" in text


@pytest.mark.unit
def test_a_queued_run_is_seen_and_can_be_stopped(jobs: FakeJobs) -> None:
    submitted()
    folder = RunFolder(f"{os.environ['ZERORAY_HOME']}/runs", "mine")
    assert status_of(folder)["state"] == "queued"
    out = io.StringIO()
    assert stop(folder, 1.0, out) == 0
    assert jobs.jobs["zeroray-mine-1"].status == "STOPPED"
    assert status_of(folder)["state"] == "stopped"
    assert "told to stop" in out.getvalue()


ADDRESSES = [
    ("http://flag:1", "http://key:2", {}, ("http://flag:1", "--address")),
    (None, "http://key:2/", {"RAY_ADDRESS": "http://env:3"}, ("http://key:2", "cluster.address")),
    (None, None, {"RAY_ADDRESS": "http://env:3"}, ("http://env:3", "RAY_ADDRESS")),
    (
        None,
        None,
        {"RAY_ADDRESS": "http://a:3", "RAY_API_SERVER_ADDRESS": "b:4"},
        ("http://b:4", "RAY_API_SERVER_ADDRESS"),
    ),
    (None, "auto", {}, (submit.DEFAULT_ADDRESS, "default")),
]


@pytest.mark.unit
@pytest.mark.parametrize(("flag", "key", "env", "expected"), ADDRESSES)
def test_which_address(
    monkeypatch: pytest.MonkeyPatch, flag: str | None, key: str | None, env: dict[str, str], expected: tuple[str, str]
) -> None:
    for name in submit.ADDRESS_VARIABLES:
        monkeypatch.delenv(name, raising=False)
        if name in env:
            monkeypatch.setenv(name, env[name])
    assert submit.chosen_address(Run(cluster=Cluster(address=key)), flag) == expected


@pytest.mark.unit
def test_a_cluster_that_is_down_is_three_lines(capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
        code = submit.submit_run(Run(), submit.Request([], address), io.StringIO())
    lines = capfd.readouterr().err.splitlines()
    assert code == 1
    assert len(lines) == 3
    assert address in lines[0]
    assert "--address" in lines[1]
    assert "ray start --head" in lines[2]


@pytest.mark.unit
def test_a_submission_that_fails_is_told(jobs: FakeJobs, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: object) -> str:
        raise RuntimeError("Package size (900 MiB) exceeds the maximum size of 512.00 MiB")

    monkeypatch.setattr(jobs, "submit_job", full)
    with pytest.raises(ClusterDown, match="exceeds the maximum size"):
        submit.submitted(jobs, submit.Job("mine", "/f", "python", "http://a:1"), io.StringIO())


# --- against a real head ------------------------------------------------------------------------------------------


RUN = ["experiment=smoke", "stages=[prepare]", "corpus.include=['json/*']"]


@pytest.mark.ray
def test_a_job_twice_at_once_and_as_ray_submits_it(head: dict[str, str], tmp_path: Path) -> None:
    folder = working_folder(tmp_path / "work")
    args = command("submit", *RUN, "--follow")
    options: dict[str, Any] = {"cwd": folder, "env": environment(**head), "stdout": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(args, **options) for _ in range(2)]
    said = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sorted(text.splitlines()[0] for text in said) == [
        "already active: zeroray-smoke-1",
        "submitted: zeroray-smoke-1",
    ]
    assert all("smoke: done" in text for text in said)
    status = json.loads(zeroray(folder, "status", "smoke", "--json", **head).stdout)
    assert (status["state"], status["paths"]["folder"]) == ("done", f"{head['ZERORAY_HOME']}/runs/smoke")
    assert status["submission"]["id"] == "zeroray-smoke-1"

    ray_says = subprocess.run(
        ["ray", "job", "submit", "--working-dir", ".", "--", "python", "-m", "cluster", "run", *RUN],
        cwd=folder,
        env=environment(**head),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ray_says.returncode == 0, ray_says.stdout + ray_says.stderr
    assert status["data"]["accounting"]["read"] > 0
    sent = list(Path(head["HEAD_FOLDER"]).glob("session_*/runtime_resources/working_dir_files/*/*"))
    assert {path.name for path in sent} >= {"cluster", "conf", "trainer", "data_pipeline"}
    assert not {path.name for path in sent} & {".venv", "runs", "store"}


@pytest.mark.ray
def test_without_the_token_it_is_three_lines(head: dict[str, str], tmp_path: Path) -> None:
    folder = working_folder(tmp_path / "work")
    done = zeroray(folder, "submit", *RUN, **{**head, "RAY_AUTH_TOKEN": "wrong" * 8})
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 3
    assert "token" in done.stderr
    assert "wrongwrong" not in done.stdout + done.stderr
