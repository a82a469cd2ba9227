"""Measures on a GPU what has no figure yet, the most valuable first: any few minutes on a card move the table forward.

    make gpu                                     every case without a figure of this commit on this card
    make gpu MINUTES=9                           those of them that fit into nine minutes
    python benchmarks/gpu_queue.py --minutes 9 --commit HASH --out DIR      without make, a virtual environment or git
    python benchmarks/gpu_queue.py --device cpu  a rehearsal: the same cases on tiny models, in outputs/rehearsal
    python benchmarks/gpu_queue.py --cases cpu   ours beside TRL on the CPU

Order: cases without a figure on a card of this name, by value (their order in speed_cases.py); then those whose figure
is of another commit, the oldest first; then those that failed at this very commit. A failure at another commit counts
as no figure, since it may be mended. What has a figure of this commit is not measured again, nor a peer that has one
of these versions, unless `--only` names it. Where measured code differs from the commit, no figure is of it.

Each case is a process of its own that prints a line `RESULT {...}`; speed.py is one, a case may name another
`command`. It starts if the seconds that it took last time, or that it declares, fit into what is left of the minutes.
It is killed, with the processes that it started, after twice that and half a minute, and ends with the queue, however
that ends. Files are replaced after each case: DIR/speed_<card>.json holds the last figure of each case, and its last
error if that is newer; an error's log stands beside it. DIR starts with the card's file of benchmarks/results, which
is the default: for it logs are in outputs/gpu, and the tables and the chart of docs/performance.md are written at the
end. For another DIR, put the file there and run speed_report.py. Without a GPU one line says so, and the exit status
is 1.
"""

import argparse
import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from speed_cases import SETS, Case, tiny

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
START = time.monotonic()
PR_SET_PDEATHSIG = 1  # of Linux' prctl

Record = dict[str, Any]  # the case, its figures or `error`, when, how long, and where it was measured


def end_with_parent() -> None:
    """Lets Linux kill the process that calls it when its parent ends, even by SIGKILL."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


# ---- What to run


def in_order(cases: list[Case], records: list[Record], commit: str) -> list[Case]:
    """Returns the cases to run at this commit, first to last."""

    def rank(case: Case) -> tuple[int, str]:
        of_case = [record for record in records if record["name"] == case["name"]]
        if any("error" in record and record["commit"] == commit for record in of_case):
            return 2, ""
        measured = max((record["measured"] for record in of_case if "error" not in record), default="")
        return bool(measured), measured

    return sorted(cases, key=rank)


def is_current(case: Case, records: list[Record], facts: dict[str, Any]) -> bool:
    """Whether the case has a figure of this commit, or of a peer of these versions, and nothing newer."""
    what = "commit" if case.get("engine", "ours") == "ours" else "versions"
    known = bool(facts[what]) and not facts[what].endswith("-dirty")
    last = [record for record in records if record["name"] == case["name"]][-1:]
    return known and any("error" not in record and record[what] == facts[what] for record in last)


def expected(case: Case, records: list[Record]) -> float:
    """Returns the seconds that a case takes: what it took last, or what it declares."""
    took = [record.get("took") for record in records if record["name"] == case["name"] and "error" not in record]
    return next((seconds for seconds in reversed(took) if seconds), case["seconds"])


# ---- Running


def without_folders(text: str) -> str:
    """Returns files by their names alone: results are committed, and say nothing of the machine's folders."""
    return re.sub(r"(?<![\w.])/(?:[\w.+-]+/)+", "", text)


def run(case: Case, device: str, limit: float, log: Path) -> dict[str, Any]:
    """Returns what a case's process found, or its error; what it printed stays in `log` then.

    Raises:
        subprocess.TimeoutExpired: it was killed after so many seconds.
    """
    command = case.get("command") or [str(HERE / "speed.py"), json.dumps(case), "--device", device]
    with log.open("w+", errors="replace") as output:
        given: dict[str, Any] = dict(stdout=output, stderr=subprocess.STDOUT, start_new_session=True, cwd=HERE.parent)
        process = subprocess.Popen([sys.executable, *command], **given, preexec_fn=end_with_parent)
        try:
            status = process.wait(timeout=limit)
        finally:  # also what it has left behind
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        text = output.read()
    lines = [line[7:] for line in text.splitlines() if line.startswith("RESULT ")]
    found = json.loads(lines[-1]) if lines else {}
    if status or not lines:
        found = {"error": f"exit status {status}: {without_folders(text.strip())[-600:]}"}
    if "error" not in found:
        log.unlink()
    return found


def read(path: Path) -> list[Record]:
    return json.loads(path.read_text("utf-8"))["results"] if path.exists() else []


def keep(record: Record, path: Path, device: str) -> list[Record]:
    """Puts a record into the file: a figure in place of all that was there of its case, an error of its last error."""
    kept = [r for r in read(path) if r["name"] != record["name"] or ("error" in record and "error" not in r)]
    write({"device": device, "results": [*kept, record]}, path)
    return [*kept, record]


def work(cases: list[Case], path: Path, facts: dict[str, Any], device: str, deadline: float = float("inf")) -> None:
    """Runs cases one after the other.

    Args:
        cases: with `name` and `seconds`, and if they have their own, `limit` in seconds and `command`.
        path: of the file with results.
        facts: of the machine and the commit, kept with each result; `device` is the card's name.
        device: cuda or cpu.
        deadline: on the clock of `time.monotonic`.
    """
    card, facts = facts["device"], {name: value for name, value in facts.items() if name != "device"}
    logs = HERE.parent / "outputs" / "gpu" if path.parent == RESULTS else path.parent
    logs.mkdir(parents=True, exist_ok=True)
    waiting = []
    for case in in_order(cases, records := read(path), facts["commit"]):
        needed, started = expected(case, records), time.monotonic()
        own, left = case.get("limit", 2 * needed + 30), deadline - started
        if needed > left:
            waiting.append(case["name"])
            continue
        try:
            found = run(case, device, min(own, left), logs / f"{slug(case['name'])}.log")
        except subprocess.TimeoutExpired:
            if left < own:
                waiting.append(case["name"])  # it may need no more than it says: the minutes are over
                continue
            found = {"error": f"took longer than {own:.0f} s"}
        now = datetime.now(UTC).isoformat(timespec="seconds")
        records = keep({**facts, "measured": now, "took": time.monotonic() - started, **case, **found}, path, card)
        shown = {name: value for name, value in found.items() if not isinstance(value, (dict, list))}
        print("RESULT " + json.dumps(rounded({"name": case["name"], **shown})), flush=True)
    if waiting:
        print(f"No time was left for {len(waiting)} cases: {', '.join(waiting)}.")


# ---- Files


def slug(text: str) -> str:
    return re.sub(r"\W+", "_", text).strip("_").lower()


def rounded(value: Any) -> Any:
    """Returns floats to six significant digits, all through."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def write(result: dict[str, Any], out: Path) -> None:
    part = out.with_suffix(".part")
    part.write_text(json.dumps(rounded(result), indent=1) + "\n")
    part.replace(out)


# ---- The command


def machine_facts(device: str, commit: str | None) -> dict[str, Any]:
    """Returns what speed.py says of this machine; it measures the rate of matrix products too."""
    command = [sys.executable, str(HERE / "speed.py"), "--describe", "--device", device]
    done = subprocess.run([*command, *(["--commit", commit] if commit else [])], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr.strip().splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no case that would take longer")
    parser.add_argument("--cases", default="gpu", help=f"{', '.join(SETS)}, or a JSON file")
    parser.add_argument("--only", help="cases whose name this regular expression finds, also those with a figure")
    parser.add_argument("--out", type=Path, help="folder of the results; default: benchmarks/results")
    parser.add_argument("--commit", help="of this checkout, where there is no git")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cpu for the set of that name, or cuda")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the case's processes end too
    cases = SETS[args.cases]() if args.cases in SETS else json.loads(Path(args.cases).read_text("utf-8"))
    device = args.device or ("cpu" if args.cases == "cpu" else "cuda")
    rehearsal = device == "cpu" and args.cases == "gpu"
    out = args.out.resolve() if args.out else (HERE.parent / "outputs" / "rehearsal" if rehearsal else RESULTS)
    facts = machine_facts(device, args.commit)
    if rehearsal:
        cases, facts["device"] = tiny(cases), "rehearsal"
    path = out / f"speed_{slug(facts['device'])}.json"
    out.mkdir(parents=True, exist_ok=True)
    if not path.exists() and (RESULTS / path.name).exists():
        shutil.copy(RESULTS / path.name, path)
    chosen = [case for case in cases if re.search(args.only or "", case["name"])]
    if not args.only:
        chosen = [case for case in chosen if not is_current(case, read(path), facts)]
    print(f"{facts['device']}: {len(chosen)} of {len(cases)} cases to run; results in {path}.", flush=True)
    work(chosen, path, facts, device, START + 60 * args.minutes)
    if out == RESULTS:
        from speed_report import write_page

        write_page()


if __name__ == "__main__":
    main()
