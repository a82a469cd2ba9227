"""What grows with a run: the report of its log, the scores of its rows, the store of its reference's log-probs.

    python benchmarks/scale.py [--small 10000] [--jobs report score store lookups writers]

Trains the bundled model for two steps. Then takes, at several sizes, each in a process of its own: `dpo-peft report`
of a log of so many lines; `dpo-peft score` of so many short rows; ten times as many entries put into a store and read
again; look-ups of 32 keys at a time, in no order, in a store of so many entries; and four processes that write so many
entries into one store at the same time, against one process that writes all of them. Prints seconds and peak memory,
and how much more one costs at the largest size, in CPU time; writes benchmarks/results/scale_cpu.json.
"""

import argparse
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import time
from hashlib import blake2b
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from dpo_peft import DPOConfig, DPOTrainer, quickstart
from dpo_peft.artifacts.card import framework_versions
from dpo_peft.cli import main as command
from dpo_peft.files import read_rows
from dpo_peft.reference.cache import Entry, ReferenceCache

RESULT = Path(__file__).parent / "results" / "scale_cpu.json"
# And how many times as many items.
JOBS = {"report": (1, 10), "score": (1, 10), "store": (10, 100), "lookups": (1, 10, 100), "writers": (1, 10)}
BATCH, LOOKUPS, WRITERS = 32, 1000, 4


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


def filled(folder: Path, keys: list[bytes], known: int = 0) -> ReferenceCache:
    """Returns a store with the keys, put into it by 1,000 at a time."""
    kept = ReferenceCache(folder / "store", "a reference", "benchmark")
    for start in range(0, len(keys), 1000):
        block = keys[start : start + 1000]
        kept.put(block, [Entry(-12.5, None)] * len(block))
    assert (kept.stored, kept.refused) == (len(keys) - known, 0), (kept.stored, kept.refused)
    return kept


def digests(numbers: range) -> list[bytes]:
    """Returns keys as a run has them: digests, which come in no order."""
    return [blake2b(i.to_bytes(8, "big"), digest_size=16).digest() for i in numbers]


def lookups(run: Path, number: int, folder: Path) -> None:
    """Looks batches of keys up in a store of `number` entries, which a new process opens."""
    keys, random_ = digests(range(number)), random.Random(0)
    filled(folder, keys).close()
    batches = [random_.sample(keys, BATCH) for _ in range(LOOKUPS)]
    unknown = digests(range(number, number + BATCH))

    def look_up() -> dict[str, float]:
        start = time.process_time()
        kept = ReferenceCache(folder / "store", "a reference", "benchmark")
        kept.get(unknown)
        opened = time.process_time()
        for batch in batches:
            assert None not in kept.get(batch)
        found = time.process_time()
        for _ in batches:
            assert kept.get(unknown) == [None] * BATCH
        each = 1e6 / LOOKUPS
        size = sum(file.stat().st_size for file in (folder / "store").iterdir())
        return {
            "open_ms": 1e3 * (opened - start),
            "hit_us_a_batch": each * (found - opened),
            "miss_us_a_batch": each * (time.process_time() - found),
            "bytes_an_entry": size / number,
        }

    measured(look_up)


def writers(run: Path, number: int, folder: Path) -> None:
    """Lets processes write at the same time; every tenth entry is written by two of them."""
    alone = time.perf_counter()
    filled(folder / "alone", digests(range(number)))
    alone = time.perf_counter() - alone
    share, context = number // WRITERS, multiprocessing.get_context("fork")

    def write(start: int) -> None:
        kept = ReferenceCache(folder / "store", "a reference", "benchmark")
        keys = digests(range(start, start + share + share // 10))
        for at in range(0, len(keys), 100):
            kept.put(keys[at : at + 100], [Entry(-12.5, None)] * len(keys[at : at + 100]))
        assert kept.refused == 0

    def together() -> dict[str, float]:
        processes = [context.Process(target=write, args=(share * n,)) for n in range(WRITERS)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert not any(process.exitcode for process in processes)
        kept = ReferenceCache(folder / "store", "a reference", "benchmark")
        keys = digests(range(share * WRITERS))
        assert None not in kept.get(keys)
        return {"alone_seconds": alone}

    measured(together)


def measured(work: Any) -> None:
    """Runs `work` and prints, as the last line, its seconds, and peak memory (MiB) before and behind; and what it
    returns, if that is figures."""
    before, start, cpu = peak(), time.perf_counter(), time.process_time()
    found = work()
    assert not found or isinstance(found, dict)
    seconds = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
    print(json.dumps({**seconds, "before_mib": before, "peak_mib": peak(), **(found or {})}))


def peak() -> float:
    """Returns the largest memory so far, MiB; not by getrusage, which counts the parent's before its exec."""
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", type=int, default=10_000)
    parser.add_argument("--jobs", nargs="*", choices=JOBS, default=[*JOBS])
    parser.add_argument("--job", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        name, run, number, folder = options.job
        globals()[name](Path(run), int(number), Path(folder))
        return
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    about = {"versions": framework_versions(), "device": "CPU", "commit": commit.stdout.strip()}
    results = json.loads(RESULT.read_text("utf-8"))["results"] if RESULT.exists() else {}
    with tempfile.TemporaryDirectory() as home:
        trained(Path(home, "run"))
        for name in options.jobs:
            results[name] = found = dict[str, Any]()
            for number in (options.small * times for times in JOBS[name]):
                folder = Path(home, f"{name}-{number}")
                folder.mkdir()
                job = [sys.executable, __file__, "--job", name, f"{home}/run", str(number), str(folder)]
                done = subprocess.run(job, check=True, stdout=subprocess.PIPE, text=True)
                found[str(number)] = json.loads(done.stdout.splitlines()[-1])
                print(f"{name:7} {number:>9,}  {found[str(number)]}", flush=True)
            if name != "lookups":  # of which as many are made at each size
                small, *_, large = found.values()
                growth = large["cpu_seconds"] / small["cpu_seconds"] * JOBS[name][0] / JOBS[name][-1]
                found["one_costs_times_as_much"] = growth
                print(f"{name:7} at the largest size one costs {growth:.2f} times as much")
            found |= about
            RESULT.write_text(json.dumps({"results": results}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
