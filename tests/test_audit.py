"""What dev/audit.py makes of pip-audit's answers."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest

AUDIT = Path(__file__).parents[1] / "dev" / "audit.py"


@pytest.fixture(scope="module")
def judgment() -> Callable[[str], tuple[int, str]]:
    spec = importlib.util.spec_from_file_location("audit", AUDIT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.judgment


def test_a_known_vulnerability_fails(judgment: Callable[[str], tuple[int, str]]) -> None:
    bad = {"name": "jinja2", "version": "3.1.5", "vulns": [{"id": "CVE-2025-27516", "fix_versions": ["3.1.6"]}]}
    good = {"name": "torch", "version": "2.13.0", "vulns": []}
    unknown = {"name": "numpy", "version": "2.4.6", "skip_reason": "not found"}
    code, said = judgment(json.dumps({"dependencies": [bad, good, unknown]}))
    assert code == 1
    assert said == (
        "jinja2 3.1.5: CVE-2025-27516, mended in 3.1.6\n2 of 3 pinned packages audited, 1 known vulnerabilities."
    )


def test_unknown_packages_are_counted_as_not_audited(judgment: Callable[[str], tuple[int, str]]) -> None:
    unknown = {"name": "numpy", "version": "2.4.6", "skip_reason": "not found"}
    assert judgment(json.dumps({"dependencies": [unknown]})) == (
        0,
        "0 of 1 pinned packages audited, 0 known vulnerabilities.",
    )


def test_no_connection_is_said(judgment: Callable[[str], tuple[int, str]]) -> None:
    assert judgment("") == (0, "Nothing was audited: no index could be reached.")
