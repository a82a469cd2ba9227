"""What grows with a run: the report of its log, the scores of its rows, the store of its reference's log-probs.

    python benchmarks/scale.py [--small 10000 --large 100000]

Trains the bundled model for two steps. Then takes, at two sizes, each in a process of its own: `dpo-peft report` of a
log of so many lines, `dpo-peft score` of so many short rows, and ten times as many entries put into a store and read
again. Prints seconds and peak memory, and how much more one costs at the large size, in CPU time; writes
benchmarks/results/scale_cpu.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from dpo_peft import DPOConfig, DPOTrainer, quickstart
from dpo_peft.artifacts.card import framework_versions
from dpo_peft.cli import main as command
from dpo_peft.files import read_rows
from dpo_peft.reference.cache import Entry, ReferenceCache

RESULT = Path(__file__).parent / "results" / "scale_cpu.json"
JOBS = {"report": 1, "score": 1, "store": 10}  # and how many times as many items


def trained(folder: Path) -> None:
    """Makes a run of two steps."""
    args = DPOConfig(str(folder), max_steps=2, logging_steps=1, report_to="none", use_cpu=True, disable_tqdm=True)
    rows = read_rows(quickstart.train_file()).select(range(16))
    trainer = DPOTrainer(quickstart.model_path(), args=args, train_dataset=rows)
    trainer.train()
    trainer.save_model()


def report(run: Path, number: int, folder: Path) -> None:
    """Repeats the run's log to `number` lines, and reports."""
    facts = json.loads((run / "metrics.json").read_text("utf-8"))
    line = next(line for line in facts["log_history"] if "loss" in line)
    facts["log_history"] = [{**line, "step": step, "loss": 0.69 - step / 1e7} for step in range(1, number + 1)]
    (folder / "metrics.json").write_text(json.dumps(facts), "utf-8")
    measured(lambda: command(["report", str(folder)]))


def score(run: Path, number: int, folder: Path) -> None:
    """Scores `number` rows of a few words."""
    with open(folder / "rows.jsonl", "w", encoding="utf-8") as file:
        for i in range(number):
            row = {"prompt": f"How was it, number {i}?", "chosen": f" Good, {i % 7}.", "rejected": " Bad."}
            file.write(json.dumps(row) + "\n")
    rows = ["--dataset_name", str(folder / "rows.jsonl"), "--output", str(folder / "scores.jsonl")]
    measured(lambda: command(["score", str(run), *rows]))


def store(run: Path, number: int, folder: Path) -> None:
    """Puts `number` entries into a store in blocks of 1,000 and reads them again."""
    kept = ReferenceCache(folder / "store", "a reference", "benchmark")
    keys = [i.to_bytes(16, "big") for i in range(number)]

    def fill_and_read() -> None:
        for start in range(0, number, 1000):
            kept.put(keys[start : start + 1000], [Entry(-12.5, None)] * 1000)
        found = [kept.get(keys[start : start + 1000]) for start in range(0, number, 1000)]
        assert all(entry is not None for block in found for entry in block)

    measured(fill_and_read)


def measured(work: Any) -> None:
    """Runs `work` and prints, as the last line, its seconds, and peak memory (MiB) before and behind."""
    before, start, cpu = peak(), time.perf_counter(), time.process_time()
    assert not work()
    seconds = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
    print(json.dumps({**seconds, "before_mib": before, "peak_mib": peak()}))


def peak() -> float:
    """Returns the largest memory so far, MiB; not by getrusage, which counts the parent's before its exec."""
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", type=int, default=10_000)
    parser.add_argument("--large", type=int, default=100_000)
    parser.add_argument("--job", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        name, run, number, folder = options.job
        globals()[name](Path(run), int(number), Path(folder))
        return
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as home:
        trained(Path(home, "run"))
        for name, times in JOBS.items():
            for number in (options.small * times, options.large * times):
                folder = Path(home, f"{name}-{number}")
                folder.mkdir()
                job = [sys.executable, __file__, "--job", name, f"{home}/run", str(number), str(folder)]
                done = subprocess.run(job, check=True, capture_output=True, text=True)
                figures = json.loads(done.stdout.splitlines()[-1])
                results.setdefault(name, {})[str(number)] = figures
                print(
                    f"{name:7} {number:>9,}  {figures['seconds']:7.1f} s  {figures['peak_mib']:6.0f} MiB", flush=True
                )
            small, large = results[name].values()
            growth = large["cpu_seconds"] / small["cpu_seconds"] * options.small / options.large
            results[name]["one_costs_times_as_much"] = growth
            print(f"{name:7} at {options.large // options.small} times the size one costs {growth:.2f} times as much")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    about = {"versions": framework_versions(), "device": "CPU", "commit": commit.stdout.strip()}
    RESULT.write_text(json.dumps({**about, "results": results}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
