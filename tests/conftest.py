"""What tests share: one private Ray for all tests marked `ray`, because a start costs seconds."""

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def shared_ray() -> Iterator[object]:
    """A connected private Ray with two CPUs' worth of room; `cluster.session.connect` finds and keeps it."""
    from cluster.session import connect
    from conf.schema import Run

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("PYTHONPATH", os.path.dirname(__file__))  # workers import what tests define
        with connect(Run()) as session:
            yield session
