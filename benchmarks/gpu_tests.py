"""Runs pytest and prints how many tests passed, failed and were skipped, as a case of gpu_queue.py.

python benchmarks/gpu_tests.py                        the tests that need a GPU (`pytest -m gpu`)
python benchmarks/gpu_tests.py tests/fused/test_attention.py
"""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


class Counts:
    """A plugin that counts."""

    def __init__(self) -> None:
        self.passed, self.skipped, self.failing = 0, 0, list[str]()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.passed += report.when == "call" and report.passed
        self.skipped += report.skipped
        if report.failed:
            self.failing.append(report.nodeid)


def main() -> None:
    marked = [
        str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text("utf-8")
    ]
    counts, given = Counts(), sys.argv[1:] or ["-m", "gpu", *marked]
    status = pytest.main([*given, "-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT)], plugins=[counts])
    found = {"passed": counts.passed, "failed": len(counts.failing), "skipped": counts.skipped}
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        sys.exit(int(status))  # nothing was run
    print("RESULT " + json.dumps({**found, "failing": counts.failing}))


if __name__ == "__main__":
    main()
