"""`make test-gpu`: run the GPU tests; one JSON verdict, also in runs/test-gpu.json. Exit 0 when all passed."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch


class Results:
    """Collects the outcome of every test."""

    def __init__(self) -> None:
        self.tests: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.failed:
            detail = {"error": report.longreprtext[-2000:]} if report.failed else {}
            self.tests[report.nodeid] = {"outcome": report.outcome, "seconds": round(report.duration, 1), **detail}


def main() -> int:
    """Run, write, print; 2 without a GPU."""
    verdict: dict[str, Any] = {"verdict": "no CUDA device is visible to torch", "torch": torch.__version__}
    if torch.cuda.is_available():
        results = Results()
        pytest.main(["-m", "gpu", "--timeout", "600", str(Path(__file__).parent)], plugins=[results])
        passed = bool(results.tests) and all(t["outcome"] == "passed" for t in results.tests.values())
        devices = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
        verdict |= {"verdict": "passed" if passed else "failed", "devices": devices, "cuda": torch.version.cuda}
        verdict["tests"] = results.tests
    Path("runs").mkdir(exist_ok=True)
    text = json.dumps(verdict, indent=2)
    Path("runs/test-gpu.json").write_text(text + "\n")
    sys.stdout.write(text + "\n")
    return {"passed": 0, "failed": 1}.get(verdict["verdict"], 2)


if __name__ == "__main__":
    sys.exit(main())
