"""The doctor finds what is planted, says what to do, and is well on a healthy machine."""

import io
import json
import os
import time
from pathlib import Path

import pytest

from cluster import doctor, names

pytestmark = pytest.mark.unit


def of(check: str, found: list[doctor.Finding]) -> list[doctor.Finding]:
    return [f for f in found if f.check == check]


def test_a_healthy_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    out = io.StringIO()
    assert doctor.doctor_command([f"paths.runs={tmp_path}/runs", f"paths.store={tmp_path}/store"], True, out) == 0


def test_json_and_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    old = time.time() - 3600
    os.utime(lock, (old, old))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert doctor.doctor_command([], True, io.StringIO()) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["usable"] is False
    broken = [f for f in said["findings"] if f["state"] == "broken"]
    assert [(f["check"], f["todo"]) for f in broken] == [("jit cache", f"rm {lock}")]


def test_a_young_lock_may_be_a_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lock").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert [f.state for f in doctor.check_jit_cache()] == ["note"]


def test_a_foreign_owner_of_our_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert names.foreign_owners() == {}
    info = tmp_path / "composer_tools-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: composer-tools\nVersion: 1.0\n")
    (info / "RECORD").write_text("trainer/__init__.py,,\ntrainer/extra.py,,\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match="pip uninstall -y composer-tools"):
        names.check_owners()
    assert [(f.state, "composer-tools" in f.found) for f in doctor.check_names()] == [("broken", True)]


def test_the_check_of_owners_is_quick() -> None:
    names.foreign_owners()
    began = time.perf_counter()
    for _ in range(5):
        names.foreign_owners()
    assert (time.perf_counter() - began) / 5 < 0.2


def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "DISK_NEEDED_GIB", 1e9)
    (finding,) = doctor.check_disk({"paths.runs": str(tmp_path / "not" / "yet")})
    assert finding.state == "broken"
    assert "paths.runs=" in finding.todo


def test_a_check_that_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def check_ports() -> None:
        raise ImportError("libfoo.so: cannot open")

    monkeypatch.setattr(doctor, "check_ports", check_ports)
    (finding,) = of("ports", list(doctor.findings({})))
    assert finding.state == "broken"
    assert "libfoo" in finding.found


def test_every_broken_finding_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "FLOORS", {"ray": (99, 0), "no-such-package": (1, 0)})
    monkeypatch.setattr(doctor, "DISK_NEEDED_GIB", 1e9)
    found = [f for f in doctor.findings({"paths.runs": str(tmp_path)}) if f.state == "broken"]
    assert {f.check for f in found} >= {"ray", "no-such-package", "paths.runs"}
    assert all(f.todo for f in found)
    table = doctor.table(found)
    assert table.count("->") == len(found) + 1


def test_the_key_of_wandb_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "secret-key")
    (finding,) = doctor.check_wandb()
    assert "online" in finding.found
    assert "secret-key" not in str(finding)
