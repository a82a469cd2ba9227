"""Kills runs of every kind at random moments and resumes them: does each end as the run that nobody killed?

    python benchmarks/kills.py [--kills 100] [--seed 0] [--scenarios float32 nf4 dora ...] [--out FILE]

A run of 12 steps of a tiny model gets SIGKILL up to six times, at moments drawn over whole attempts, within saves,
within steps and evaluations and at the end, and after each it goes on by `train(resume_from_checkpoint="latest")`.
After some of the kills a file of the newest checkpoint is damaged too. What it ends with is compared bit by bit with
the straight run: adapter weights (frozen copies too), optimizer state, all that was logged but times and cache hits.
`tests/kill_harness.py` is what does it. One thread; about ten minutes for 100 kills. Writes
benchmarks/results/kills_cpu.json and prints the table; exits with 1 if a run differs.
"""

# ruff: noqa: E402
import argparse
import json
import logging
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

# Before torch is imported: attempts are forks of this process, which must have no threads.
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", WANDB_DISABLED="true")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]

import torch
from datasets import disable_progress_bars
from kill_harness import Phase, Run, Torturer
from kill_scenarios import SCENARIOS, STEPS, make_base
from transformers.utils import logging as transformers_logging

from dpo_peft.artifacts.card import framework_versions

MAX_KILLS_OF_A_RUN = 6
DAMAGE = 0.4  # share of kills after which a file of the newest checkpoint is damaged


def commit() -> str:
    """Of the source that is measured; ends in -dirty if it has changes since."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, cwd=HERE).stdout.strip()


def figures(runs: list[Run]) -> dict[str, Any]:
    attempts = [attempt for run in runs for attempt in run.attempts]
    killed = [attempt for attempt in attempts if attempt.killed]
    phases = Counter(attempt.phase for attempt in killed)
    later = [second for run in runs for second in run.attempts[1:] if second.resumed_at >= 0]
    return {
        "runs": len(runs),
        "identical": sum(not run.differences for run in runs),
        "attempts": len(attempts),
        "kills": len(killed),
        "kills_by_phase": {phase.name.lower(): phases[phase] for phase in Phase},
        # Seen once each: the next training clears them up.
        "unfinished_checkpoints": sum(attempt.unfinished > 0 for attempt in killed if attempt.resumed_at >= 0),
        "damaged_checkpoints": sum(bool(attempt.damaged) for attempt in killed),
        "resumed_from_checkpoint": sum(attempt.resumed_at > 0 for attempt in later),
        "started_again": sum(attempt.resumed_at == 0 for attempt in later),
        "different": [{"seed": run.seed, "differences": run.differences[:20]} for run in runs if run.differences],
        "seconds": round(sum(run.seconds for run in runs), 1),
    }


def measure(names: list[str], kills: int, seed: int, folder: Path) -> dict[str, list[Run]]:
    """Runs of each scenario, until each has its part of the kills."""
    base, draw = make_base(folder), random.Random(seed)
    runs: dict[str, list[Run]] = {name: [] for name in names}
    for name in names:
        torturer = Torturer(SCENARIOS[name], base, folder / "runs")
        while sum(len(run.killed) for run in runs[name]) < kills / len(names):
            run = torturer.torture(draw.randrange(2**32), draw.randint(1, MAX_KILLS_OF_A_RUN), DAMAGE)
            runs[name].append(run)
            print(f"{name}: {len(run.killed)} kills, {'different' if run.differences else 'identical'}", flush=True)
            for line in run.differences[:5]:
                print(f"    {line}", flush=True)
    return runs


def table(results: dict[str, Any]) -> str:
    phases = [phase.name.lower() for phase in Phase]
    lines = [
        f"| run | runs | identical | kills | {' | '.join(phases)} | unfinished | damaged | from a checkpoint |",
        "|---|" + "---:|" * (len(phases) + 6),
    ]
    for name, row in [*results["scenarios"].items(), ("all", results["all"])]:
        by_phase = " | ".join(str(row["kills_by_phase"][phase]) for phase in phases)
        lines.append(
            f"| {name} | {row['runs']} | {row['identical']} | {row['kills']} | {by_phase} | "
            f"{row['unfinished_checkpoints']} | {row['damaged_checkpoints']} | {row['resumed_from_checkpoint']} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="at least that many in all")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the damage")
    parser.add_argument("--scenarios", nargs="+", choices=list(SCENARIOS), default=list(SCENARIOS))
    parser.add_argument("--out", type=Path, default=HERE / "results" / "kills_cpu.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bars()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    source, started = commit(), time.time()
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        runs = measure(args.scenarios, args.kills, args.seed, Path(folder))
    results = {
        "device": "cpu, one thread",
        "versions": framework_versions(),
        "commit": source,
        "options": {"kills": args.kills, "seed": args.seed, "steps": STEPS, "damage": DAMAGE},
        "seconds": round(time.time() - started, 1),
        "all": figures([run for name in runs for run in runs[name]]),
        "scenarios": {name: figures(runs[name]) for name in runs},
    }
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))
    sys.exit(bool(results["all"]["different"]))


if __name__ == "__main__":
    main()
