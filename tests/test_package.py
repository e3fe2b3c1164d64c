"""What is shipped, and the walls between the rooms."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("conf", "data_pipeline", "trainer", "cluster")

pytestmark = pytest.mark.unit


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The sources alone, to be changed."""
    for room in ROOMS:
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_nothing.py").write_text("")
    return tmp_path


def test_the_wheel_has_the_yaml_and_not_the_tests(copy: Path) -> None:
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", "dist", "."]
    subprocess.run(pip, cwd=copy, check=True, capture_output=True)
    (wheel,) = (copy / "dist").glob("zeroray-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {str(p.relative_to(copy)) for room in ROOMS for p in (copy / room).rglob("*.*") if p.suffix != ".pyc"}
    assert expected <= names
    assert "conf/experiment/quickstart.yaml" in names
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == set(ROOMS)


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env={"PYTHONPATH": "."})


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("conf/keys.py", "import trainer.loop"),
        ("data_pipeline/order.py", "import torch"),
        ("data_pipeline/packing.py", "import webdataset"),
        ("trainer/loop.py", "import ray"),
        ("trainer/loop.py", "import wandb"),
        ("trainer/checkpoint.py", "import deepspeed"),
        ("cluster/status.py", "def late():\n    import hydra"),
    ],
)
def test_a_wall_that_is_crossed_is_seen(copy: Path, file: str, line: str) -> None:
    with (copy / file).open("a") as source:
        source.write(f"\n{line}\n")
    found = lint(copy)
    assert found.returncode == 1, found.stdout
    assert "BROKEN" in found.stdout


def test_the_walls_stand(copy: Path) -> None:
    found = lint(copy)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("room", ROOMS)
def test_the_readme_names_every_file_of_a_room(room: str) -> None:
    (line,) = [text for text in (ROOT / "README.md").read_text().splitlines() if text.startswith(f"| `{room}/` |")]
    there = {path.name for path in (ROOT / room).glob("*.py")} - {"__init__.py"}
    assert set(re.findall(r"`(\w+\.py)`", line)) == there
