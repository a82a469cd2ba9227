"""A sweep of 12 settings against 12 runs of their own, on the quickstart's task: the cost, and what either chooses.

    python benchmarks/sweep.py [--rows 640] [--output benchmarks/results/sweep.json]

Both sides train the same options on the same rows, one process each. Cost is CPU time, which other work on the machine
moves less than wall time. The full grid is judged by the rule of the sweep, on the same held-out rows. Single runs are
kept in the output, and made once.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from dpo_peft.artifacts.card import framework_versions
from dpo_peft.cli.sweep import read_grid
from dpo_peft.quickstart import config_file, model_path, test_file, train_file
from dpo_peft.sweep import rank
from dpo_peft.training.metrics import BALANCED, within_noise

RESULTS = Path(__file__).parent / "results" / "sweep.json"
GRID = {"beta": [0.1, 0.3, 1.0], "learning_rate": [3e-5, 1e-4, 3e-4, 1e-3]}
MAX_KL = 8.0  # nats a completion


def cpu_seconds(*words: str) -> float:
    """Returns the CPU time of a command of the package."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "dpo_peft", *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=640, help="training pairs")
    parser.add_argument("--held_out", type=int, default=256, help="pairs that settings are judged on")
    parser.add_argument("--output", type=Path, default=RESULTS)
    asked = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    folder = Path(tempfile.mkdtemp(prefix="sweep-"))
    for name, file, rows in (("train", train_file(), asked.rows), ("test", test_file(), asked.held_out)):
        lines = Path(file).read_text("utf-8").splitlines(keepends=True)[:rows]
        (folder / f"{name}.jsonl").write_text("".join(lines), "utf-8")
    options: dict[str, Any] = yaml.safe_load(Path(config_file()).read_text("utf-8"))
    for name in ("sample_prompts", "sample_max_new_tokens", "eval_steps", "overwrite_output_dir"):
        options.pop(name)
    options |= {
        "model_name_or_path": model_path(),
        "dataset_name": str(folder / "train.jsonl"),
        "eval_dataset_name": str(folder / "test.jsonl"),
        "unneeded_columns": ["chosen_reward", "rejected_reward"],
        "output_dir": str(folder / "sweep"),
        "eval_steps": 0.5,
        "warmup_steps": 5,
    }
    (folder / "grid.yaml").write_text(yaml.safe_dump({**options, "ref_cache_dir": str(folder / "a"), "grid": GRID}))
    started = time.time()
    cost = cpu_seconds("sweep", str(folder / "grid.yaml"), "--max_kl", str(MAX_KL))
    halved = json.loads((folder / "sweep" / "sweep.json").read_text())
    print(f"sweep: {cost:.0f} s, {halved['reason']}", flush=True)

    _, settings = read_grid(str(folder / "grid.yaml"))
    known = json.loads(asked.output.read_text()) if asked.output.is_file() else {}
    again = (known.get("rows"), known.get("held_out")) == (asked.rows, asked.held_out)
    alone: dict[str, dict[str, Any]] = known["runs"] if again else {}
    for name, setting in settings.items():
        if name in alone:
            continue
        run = folder / "alone" / name
        (folder / "run.yaml").write_text(yaml.safe_dump({**options, **setting, "output_dir": str(run)}))
        seconds = cpu_seconds("train", "--config", str(folder / "run.yaml"))
        last = json.loads((run / "metrics.json").read_text())["eval_last"]
        margin = last["rewards/margins"]
        figures = {"accuracy": last["rewards/accuracies"], "balanced": last.get(BALANCED), "kl": last["kl"]}
        figures |= {"rows": asked.held_out, "margin": margin, "nats": margin / setting["beta"]}
        noise = within_noise(margin, setting["beta"], last["kl"])
        alone[name] = {**figures, "noise": noise, "cpu_seconds": seconds}
        print(f"{name}: {alone[name]}", flush=True)
    best = rank(alone, MAX_KL)
    full = sum(one["cpu_seconds"] for one in alone.values())
    result = {
        "versions": framework_versions(),
        "rows": asked.rows,
        "held_out": asked.held_out,
        "max_kl": MAX_KL,
        "seconds": time.time() - started,
        "cpu_seconds": {"sweep": cost, "runs": full, "share": cost / full},
        "choice": {"sweep": halved["choice"], "runs": best[0], "order": best},
        "sweep": halved["results"],
        "runs": alone,
    }
    asked.output.write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"{cost:.0f} of {full:.0f} CPU seconds, {cost / full:.0%}; chosen {halved['choice']}, the full grid {best[0]}"
    )


if __name__ == "__main__":
    main()
