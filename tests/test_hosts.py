"""What only shows on real nodes and real disks: a second node with a disk of its own, and a disk that is full."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from heads import ray_head
from processes import TINY, environment, events, rows, zeroray
from test_killed import reference, weights, write_corpus  # noqa: F401 (a fixture)

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(os.geteuid() != 0, reason="mounting file systems needs root"),
]


def test_a_node_with_a_disk_of_its_own(tmp_path: Path) -> None:
    mine = tmp_path / "disk"
    mine.mkdir()
    corpus = write_corpus(tmp_path)
    with ray_head(tmp_path / "home") as env:
        join = f"mount -t tmpfs none {mine} && exec ray start --address={env['HEAD_ADDRESS']} --num-cpus=2"
        subprocess.run(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", join],
            env=environment(**env, ZERORAY_SESSION=env["SESSION"]),
            check=True,
            capture_output=True,
            timeout=120,
        )
        args = ["run", *TINY, f"corpus.path={corpus}", f"cluster.address={env['HEAD_ADDRESS']}", "stages=[prepare]"]
        refused = zeroray(tmp_path, *args, f"paths.runs={mine}/runs", f"paths.store={mine}/store", **env)
        assert refused.returncode == 2, refused.stdout + refused.stderr
        assert "does not see this folder" in refused.stderr
        assert "paths.runs=/shared" in refused.stderr
        assert len(refused.stderr.strip().splitlines()) <= 6
        shared = zeroray(tmp_path, *args, f"paths.runs={tmp_path}/runs", f"paths.store={tmp_path}/store", **env)
        assert shared.returncode == 0, shared.stdout + shared.stderr


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk that holds the prepared text and a few checkpoints, not all that the run writes."""
    disk = tmp_path / "small"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(disk)], check=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_full_disk_is_a_stop_that_continues(reference: Path, small_disk: Path, tmp_path: Path) -> None:  # noqa: F811
    args = [
        "run",
        *TINY,
        f"corpus.path={reference / 'text'}",
        "run.name=one",
        f"paths.runs={small_disk}/runs",
        f"paths.store={tmp_path}/store",
    ]
    run = small_disk / "runs" / "one"
    full = zeroray(tmp_path, *args)
    assert full.returncode == 6, full.stdout + full.stderr
    assert f"{run}: the disk is full" in full.stderr
    assert "Traceback" not in full.stderr
    assert len(rows(run)) < 30
    assert len(events(run, "checkpoint")) > 0, "it was full before anything was committed; make the disk larger"

    subprocess.run(["mount", "-o", "remount,size=200m", str(small_disk)], check=True)
    done = zeroray(tmp_path, *args)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [r["step"] for r in rows(run)] == list(range(1, 31))
    assert weights(run) == weights(reference / "runs" / "one")
