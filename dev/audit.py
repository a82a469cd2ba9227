"""Looks whether a known vulnerability concerns a pinned dependency (pip-audit, on constraints.txt).

Needs an index that serves the list of vulnerabilities. Packages that the index says nothing of are counted, not passed
over; without a connection nothing is judged, and that is said. Exits with 1 if a vulnerability is found.

    python dev/audit.py
"""

import json
import subprocess
import sys
from pathlib import Path

CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"


def judgment(printed: str) -> tuple[int, str]:
    """Reads what pip-audit printed as JSON. Returns the exit code, and what to say.

    A text that is no JSON means that pip-audit reached no index.
    """
    try:
        packages = json.loads(printed)["dependencies"]
    except ValueError:
        return 0, "Nothing was audited: no index could be reached."
    audited = [package for package in packages if "skip_reason" not in package]
    found = [
        f"{package['name']} {package['version']}: {vulnerability['id']}, mended in "
        f"{', '.join(vulnerability['fix_versions']) or 'no release'}"
        for package in audited
        for vulnerability in package["vulns"]
    ]
    counts = f"{len(audited)} of {len(packages)} pinned packages audited, {len(found)} known vulnerabilities."
    return int(bool(found)), "\n".join([*found, counts])


def main() -> int:
    command = [sys.executable, "-m", "pip_audit", "-r", str(CONSTRAINTS), "--no-deps", "--disable-pip", "-f", "json"]
    ran = subprocess.run([*command, "--progress-spinner", "off"], capture_output=True, text=True, check=False)
    code, said = judgment(ran.stdout)
    print(said)
    return code


if __name__ == "__main__":
    sys.exit(main())
