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


@pytest.fixture(scope="session")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A Ray head for jobs; Python packages put into its folder `SITE` are installed on it."""
    from heads import ray_head

    site = str(tmp_path_factory.mktemp("site"))
    with ray_head(tmp_path_factory.mktemp("home"), PYTHONPATH=site) as env:
        yield {**env, "SITE": site}
