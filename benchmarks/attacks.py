"""Runs the tests that attack what docs/reliability.md promises, and writes its table: what was tried, what held.

    python benchmarks/attacks.py [--write] [--junit FILE ...]

A test that attacks has the mark `attack("kind")`; each case of a parametrized test is one try. The promise held when
the test passes: the right thing happened, or a refusal by name. Without --write the table is printed only. With
--junit the results are those of test runs that are over (pytest --junitxml=FILE). Exits with 1 if an attack got
through.
"""

import argparse
import os
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest

REPO = Path(__file__).resolve().parents[1]
PAGE = REPO / "docs" / "reliability.md"
BEGIN, END = "<!-- attacks: benchmarks/attacks.py --write -->", "<!-- end of attacks -->"


class Tally:
    """A plugin of pytest: counts the marked tests by kind."""

    def __init__(self) -> None:
        self.kinds: dict[str, str] = {}
        self.results: dict[str, bool] = {}  # whether a test passed when it ran last

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            if mark := item.get_closest_marker("attack"):
                self.kinds[item.nodeid] = mark.args[0]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.skipped and (report.when == "call" or report.failed):
            self.count(report.nodeid, report.passed)

    def count(self, test: str, passed: bool) -> None:
        """Counts a test, if it is one of the marked."""
        if test in self.kinds:
            self.results[test] = passed

    def read(self, file: Path) -> None:
        """Counts the tests of a JUnit file, which calls `tests/a/test_b.py::test_c` "tests.a.test_b" and "test_c"."""
        named = {}
        for test in self.kinds:
            path, _, name = test.partition(".py::")
            named[f"{path.replace('/', '.')}.{name.replace('::', '.')}"] = test
        for case in ElementTree.parse(file).iter("testcase"):
            outcome = {child.tag for child in case}
            test = named.get(f"{case.get('classname')}.{case.get('name')}")
            if test and "skipped" not in outcome:
                self.count(test, not outcome & {"failure", "error"})

    def table(self) -> str:
        tried = Counter(self.kinds[test] for test in self.results)
        held = Counter(self.kinds[test] for test, passed in self.results.items() if passed)
        rows = [(kind, tried[kind], held[kind]) for kind in sorted(tried)]
        rows.append(("all", tried.total(), held.total()))
        lines = ["| attack | tried | held |", "|---|---:|---:|"]
        return "\n".join(lines + [f"| {kind} | {tried} | {held} |" for kind, tried, held in rows])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/reliability.md")
    parser.add_argument("--junit", type=Path, nargs="+", help="results of runs that are over")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    tally = Tally()
    only = ["--collect-only"] if args.junit else ["--every-case"]
    pytest.main(["-q", "-m", "attack", *only, str(REPO / "tests")], plugins=[tally])
    for file in args.junit or ():
        tally.read(file)
    print(tally.table())
    if args.write:
        before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        PAGE.write_text(f"{before}{BEGIN}\n{tally.table()}\n{END}{after}", "utf-8")
    return int(not all(tally.results.values()))


if __name__ == "__main__":
    sys.exit(main())
