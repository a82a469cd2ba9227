"""The GPU's queue: which case comes when, what fits, and what is left of one that fails, hangs or is killed."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from paths import REPO

BENCHMARKS = REPO / "benchmarks"
FACTS = {"device": "Card", "commit": "new", "matmul_flops": {}}


@pytest.fixture(scope="module")
def queue() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("gpu_queue", BENCHMARKS / "gpu_queue.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(BENCHMARKS))


def record(name: str, commit: str, day: int, **more: Any) -> dict[str, Any]:
    return {"name": name, "commit": commit, "measured": f"2026-01-{day:02d}", "took": 7.0, **more}


def program(name: str, code: str, seconds: float = 1.0, **more: Any) -> dict[str, Any]:
    return {"name": name, "seconds": seconds, "command": ["-c", code], **more}


def result(value: int) -> str:
    return f"print('noise'); print('RESULT {{\"value\": {value}}}'); print('more')"


def names(path: Path) -> list[str]:
    return [one["name"] for one in json.loads(path.read_text())["results"]]


def ends(pid: int) -> bool:
    """Whether a process is gone, or a zombie that nobody has waited for, within some seconds."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


# ---- order


def test_order(queue: ModuleType) -> None:
    """Without a figure by value, failures at another commit among them; then the oldest; then what failed here."""
    cases = [{"name": name, "seconds": 1} for name in "abcdefg"]
    records = [
        record("a", "new", 9, error="no"),
        record("b", "old", 5),
        record("c", "older", 3),
        record("d", "old", 5, error="mended since"),
        record("f", "old", 1),
        record("f", "new", 8, error="no"),
    ]
    assert [case["name"] for case in queue.in_order(cases, records, "new")] == [*"deg", *"cb", *"af"]


def test_what_is_current(queue: ModuleType) -> None:
    case, facts = {"name": "a"}, {"commit": "new", "versions": "trl 1"}
    assert queue.is_current(case, [record("a", "new", 1)], facts)
    assert not queue.is_current(case, [record("a", "old", 1)], facts)
    assert not queue.is_current(case, [record("a", "new", 1), record("a", "new", 2, error="no")], facts)
    for unknown in ("", "new-dirty"):  # the code may be another
        assert not queue.is_current(case, [record("a", unknown, 1)], {**facts, "commit": unknown})
    peer, measured = {"name": "a", "engine": "trl"}, [record("a", "old", 1, versions="trl 1")]
    assert queue.is_current(peer, measured, facts)
    assert not queue.is_current({**peer, "engine": "ours"}, measured, facts)
    assert not queue.is_current(peer, measured, {**facts, "versions": "trl 2"})


def test_seconds_are_those_of_the_last_figure(queue: ModuleType) -> None:
    case = {"name": "a", "seconds": 40}
    failed = record("a", "new", 2, error="no") | {"took": 1.0}
    assert queue.expected(case, []) == 40 and queue.expected(case, [failed]) == 40
    assert queue.expected(case, [record("a", "old", 1), failed]) == 7.0


def test_cases_have_names_of_their_own_and_seconds(queue: ModuleType) -> None:
    for make in queue.SETS.values():
        cases = make()
        assert len({case["name"] for case in cases}) == len(cases)
        assert all(
            case["seconds"] > 0 and ("command" in case) + ("engine" in case) + ("engines" in case) == 1
            for case in cases
        )
        assert all((REPO / case["command"][0]).exists() for case in cases if "command" in case)
    assert [case["name"] for case in queue.SETS["gpu"]()][:3] == [
        "8b outlier ours 24gb",
        "8b ctx16k ours 24gb",
        "70b uf ours 16",
    ]


# ---- running


def test_results_are_kept_one_by_one(queue: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A case reads what is there while it runs: the one before it."""
    path = tmp_path / "speed_card.json"
    count = f"import json; n = len(json.load(open({str(path)!r}))['results']); print('RESULT', json.dumps({{'n': n}}))"
    queue.work([program("a", result(1)), program("b", count)], path, FACTS, "cpu")
    first, second = json.loads(path.read_text())["results"]
    assert first["value"] == 1 and second["n"] == 1
    assert first["commit"] == "new" and first["measured"] > "2026" and 0 < first["took"] < 60
    assert json.loads(path.read_text())["device"] == "Card"
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("RESULT")][0] == (
        'RESULT {"name": "a", "value": 1}'
    )
    assert [file.name for file in tmp_path.iterdir()] == [path.name]  # no part of a file, no log of a success


def test_an_error_is_recorded_and_a_figure_outlives_it(queue: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "speed_card.json"
    fails = "raise ValueError('/some/where/else.py is bad')"
    for case in (program("a", result(1)), program("a", fails), program("a", fails), program("b", "pass")):
        queue.work([case], path, FACTS, "cpu")
    figure, error, silent = json.loads(path.read_text())["results"]
    assert figure["value"] == 1 and "error" not in figure
    assert error["error"].startswith("exit status 1: ") and error["error"].endswith("ValueError: else.py is bad")
    assert silent["error"] == "exit status 0: "
    assert "/some/where/else.py is bad" in (tmp_path / "a.log").read_text()
    queue.work([program("a", result(2))], path, FACTS, "cpu")
    assert names(path) == ["b", "a"] and not (tmp_path / "a.log").exists()


def test_an_error_that_the_case_names_itself(queue: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "speed_card.json"
    queue.work([program("a", 'print(\'RESULT {"error": "out of memory"}\')')], path, FACTS, "cpu")
    assert json.loads(path.read_text())["results"][0]["error"] == "out of memory"


HANGS = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({pids!r}, "w").write(f"{{child.pid}}")
print('RESULT {{"value": 1}}', flush=True)
time.sleep(60)
"""


def test_a_case_that_hangs_is_killed_with_its_children(queue: ModuleType, tmp_path: Path) -> None:
    """Others go on; what it had printed is no result."""
    path, pids = tmp_path / "speed_card.json", tmp_path / "pids"
    hangs = program("hangs", HANGS.format(pids=str(pids)), limit=1.5)
    queue.work([hangs, program("b", result(1))], path, FACTS, "cpu")
    first, second = json.loads(path.read_text())["results"]
    assert first["error"] == "took longer than 2 s" and "value" not in first and second["value"] == 1
    assert ends(int(pids.read_text()))


def test_children_that_a_case_leaves_behind_end_too(queue: ModuleType, tmp_path: Path) -> None:
    path, pids = tmp_path / "speed_card.json", tmp_path / "pids"
    left = HANGS.format(pids=str(pids)).rpartition("time.sleep")[0]
    queue.work([program("a", left)], path, FACTS, "cpu")
    assert json.loads(path.read_text())["results"][0]["value"] == 1
    assert ends(int(pids.read_text()))


def test_a_case_starts_only_if_it_fits(queue: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A smaller one of less value is taken instead; one that takes longer than it said ends with the minutes, which is
    no failure of it."""
    path, start = tmp_path / "speed_card.json", time.monotonic()
    slow = program("slow", "import time; time.sleep(60)")
    cases = [program("large", result(1), seconds=50), program("small", result(1)), slow]
    queue.work(cases, path, FACTS, "cpu", start + 5)
    assert time.monotonic() - start < 15 and names(path) == ["small"]
    assert "No time was left for 2 cases: large, slow." in capsys.readouterr().out
    queue.work(cases[:1], tmp_path / "other.json", FACTS, "cpu", time.monotonic() + 51)
    assert names(tmp_path / "other.json") == ["large"]


# ---- the end of the queue itself


QUEUE = """
import json, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's jobs in the background ignore it
sys.path.insert(0, {folder!r})
import gpu_queue
gpu_queue.work(json.loads({cases!r}), gpu_queue.Path({path!r}), json.loads({facts!r}), "cpu")
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_queue_keeps_its_results_and_goes_on(queue: ModuleType, tmp_path: Path, how: int) -> None:
    """The case that was running ends as well, or the next start would share the GPU with it."""
    path, pid = tmp_path / "speed_card.json", tmp_path / "pid"
    waits = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    cases = [program("a", result(1)), program("b", waits), program("c", result(3))]
    given = dict(folder=str(BENCHMARKS), cases=json.dumps(cases), path=str(path), facts=json.dumps(FACTS))
    started = subprocess.Popen([sys.executable, "-c", QUEUE.format(**given)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (pid.exists() and pid.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(started.pid, how)
    started.wait()
    assert names(path) == ["a"]
    assert ends(int(pid.read_text()))
    cases[1] = program("b", result(2))
    left = [case for case in cases if not queue.is_current(case, queue.read(path), FACTS)]
    queue.work(left, path, FACTS, "cpu")
    assert names(path) == ["a", "b", "c"]


# ---- the command


def test_without_a_gpu_it_says_so_and_runs_nothing(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu_queue.py"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 1 and done.stdout == "" and not (tmp_path / "out").exists()
    assert done.stderr.startswith("No GPU here: ") and done.stderr.count("\n") == 1


def test_the_command_starts_from_the_committed_results(
    queue: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And runs nothing twice at one commit, unless it is named."""
    cases, out = tmp_path / "cases.json", tmp_path / "out"
    cases.write_text(json.dumps([program("a", result(1)), program("b", result(2))]))
    monkeypatch.setattr(queue, "machine_facts", lambda device, commit: {**FACTS, "device": "cpu", "commit": commit})
    monkeypatch.setattr(queue.signal, "signal", lambda *_: None)
    given = ["gpu_queue.py", "--cases", str(cases), "--device", "cpu", "--out", str(out), "--commit", "new"]
    said = []
    for more in ([], [], ["--only", "^b$"]):
        monkeypatch.setattr(sys, "argv", [*given, *more])
        queue.main()
        said.append(capsys.readouterr().out.splitlines())
    committed = json.loads((BENCHMARKS / "results" / "speed_cpu.json").read_text())["results"]
    assert names(out / "speed_cpu.json") == [*(one["name"] for one in committed), "a", "b"]
    assert said[0][0].startswith("cpu: 2 of 2 cases to run") and len(said[0]) == 3
    assert said[1][0].startswith("cpu: 0 of 2 cases to run") and len(said[1]) == 1
    assert said[2][0].startswith("cpu: 1 of 2 cases to run") and len(said[2]) == 2
