"""Whether all nodes see the same folders: a real probe, and what a node that misses one leads to."""

import os
from pathlib import Path
from typing import Any

import pytest

from cluster import shared_folder
from cluster.session import Session
from cluster.shared_folder import check_shared, nodes_that_miss
from conf.schema import Run


def session_of(*hosts: str) -> Session:
    nodes = [{"NodeManagerHostname": host, "NodeManagerAddress": "10.0.0.1", "NodeID": host} for host in hosts]
    return Session(private=False, address="", dashboard_url="", cpus=4, gpus=0, nodes=nodes)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    made = Run()
    made.paths.runs, made.paths.store = str(tmp_path / "runs"), str(tmp_path / "store")
    return made


@pytest.mark.ray
def test_a_node_that_sees_it(shared_ray: Session, tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    assert nodes_that_miss(str(folder), shared_ray.nodes) == []
    assert os.listdir(folder) == [], "the probe is removed"


@pytest.mark.ray
def test_a_node_that_cannot_answer(shared_ray: Session, tmp_path: Path) -> None:
    gone = {**shared_ray.nodes[0], "NodeID": "0" * 56, "NodeManagerHostname": "gone"}
    missing = nodes_that_miss(str(tmp_path), [shared_ray.nodes[0], gone])
    assert [name.split()[0] for name in missing] == ["gone"]


def reads_nothing(path: str, nodes: list[dict[str, Any]]) -> list[tuple[str, str | None]]:
    here = Path(path).read_text()
    return [
        (n["NodeManagerHostname"], here if n["NodeManagerHostname"] == "a" or "store" in path else None) for n in nodes
    ]


@pytest.mark.unit
def test_the_node_and_the_folder_are_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_folder, "ask_nodes", reads_nothing)
    with pytest.raises(
        ValueError, match=r"^paths.runs=\S+/runs: node b does not see this folder; on 2 nodes"
    ) as caught:
        check_shared(run, session_of("a", "b"))
    assert "ZERORAY_HOME" in str(caught.value)


@pytest.mark.unit
def test_one_node_needs_no_sharing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_folder, "ask_nodes", lambda *_: pytest.fail("nobody to ask"))
    check_shared(run, session_of("a"))
