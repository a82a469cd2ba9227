"""What the cache of the reference's log-probs saves: seconds per epoch, and forward passes of a sweep.

    python benchmarks/reference_cache.py [--max_rows 1243 --repeats 5] [--model <folder or id> --data rows.jsonl]

Trains on the bundled pairs in NF4 without gradient checkpointing: after a warm-up, `--repeats` times in turn, a run
that computes the reference at each step (a); the same run with `cache_ref_log_probs` and an empty store, whose first
epoch fills the store (c) and whose later ones read it (b); and the pass of `precompute_ref_log_probs` alone (d). Then
trains a sweep of 2 betas x 2 learning rates x 2 ranks x 2 seeds over one store and counts what it computes of the
reference.

Checks: the losses of each step with and without the cache are the same (within 1e-5; in bfloat16, where the shape of a
batch moves the last bits, 0.05), a warm epoch computes nothing of the reference, and the sweep computes no completion
twice. Times are reported and never fail the run. Epochs are short, turns many, and ratios are taken within a turn,
since other work on the machine comes and goes; the CPU time of this process stands beside them. Writes
benchmarks/results/reference_cache_<cpu or gpu>.json and prints the table.
"""

import argparse
import gc
import itertools
import json
import logging
import os
import platform
import statistics
import subprocess
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in recipes/quickstart.py, before torch is imported

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from transformers import PrinterCallback, TrainerCallback
from transformers.utils import logging as transformers_logging

from dpo_peft import DPOConfig, DPOTrainer, quickstart
from dpo_peft.artifacts.card import framework_versions
from dpo_peft.forward import PackedBatch, Scores

HERE = Path(__file__).parent
TARGET = 1.25  # times as fast: a warm epoch against one that computes the reference
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.05}
BUSY = 2.5  # load average above which times say little on the two cores this was written for
SWEEP = {"beta": (0.1, 0.5), "learning_rate": (1e-4, 3e-4), "rank": (8, 16), "seed": (0, 1)}
RATIOS = ("uncached/warm", "filling/uncached_first", "precompute/uncached")  # epochs of the same number, same batches
LABELS = {
    "uncached_first": "(a) first epoch, reference computed each step",
    "filling": "(c) first epoch, filling the store",
    "uncached": "(a) later epoch, reference computed each step",
    "warm": "(b) later epoch, reference read from the store",
    "precompute": "(d) precompute, no training",
}

Lap = dict[str, float]  # seconds, cpu_seconds, and of the reference forwards and completions


class CountingTrainer(DPOTrainer):
    """Counts the reference's forward passes and their completions; `laps` has an entry for each epoch."""

    forwards = completions = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.laps: list[Lap] = []
        self.compute = self.reference.compute
        self.reference.compute = self.counted  # type: ignore[method-assign]
        self.add_callback(LapTimer(self))
        self.remove_callback(PrinterCallback)

    def counted(self, batch: PackedBatch) -> Scores:
        """Returns the log-probs of a forward pass under the reference, and counts it."""
        self.forwards += 1
        self.completions += batch.lengths.numel()
        return self.compute(batch)

    def stand(self) -> Lap:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        counts = {"forwards": self.forwards, "completions": self.completions}
        return {"seconds": time.perf_counter(), "cpu_seconds": time.process_time(), **counts}

    def since(self, start: Lap) -> Lap:
        return {name: value - start[name] for name, value in self.stand().items()}


class LapTimer(TrainerCallback):
    """Epochs alone: loading, and the checks before the first step, are the same with and without a cache."""

    def __init__(self, trainer: CountingTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self.start = self.trainer.stand()

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        self.trainer.laps.append(self.trainer.since(self.start))


def build(
    args: argparse.Namespace,
    rows: list[dict],
    store: str | None,
    rank: int = 16,
    precompute: bool = False,
    **given: Any,
) -> CountingTrainer:
    """The quickstart's run over `rows`; without `store`, the reference is computed each step."""
    cache = {"precompute_ref_log_probs" if precompute else "cache_ref_log_probs": True, "ref_cache_dir": store}
    options: dict[str, Any] = {"beta": 0.5, "learning_rate": 3e-4, "seed": 0, **(cache if store else {}), **given}
    config = DPOConfig(
        output_dir=tempfile.mkdtemp(dir=args.scratch),
        per_device_train_batch_size=args.batch_size,
        max_length=args.max_length,
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        bf16=args.dtype == "bfloat16",
        model_init_kwargs={"dtype": args.dtype},
        use_cpu=args.use_cpu,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    gc.collect()  # trainers hold themselves in cycles
    return CountingTrainer(args.model, args=config, train_dataset=Dataset.from_list(rows), peft_config=lora)


def new_store(args: argparse.Namespace) -> str:
    return tempfile.mkdtemp(dir=args.scratch)


def train(trainer: CountingTrainer) -> tuple[list[Lap], list[float]]:
    """The epochs, and the loss of each step."""
    trainer.train()
    return trainer.laps, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def measure_epochs(
    args: argparse.Namespace, rows: list[dict], loads: list[float]
) -> tuple[dict[str, list[Lap]], dict[str, float]]:
    """The laps of each kind, and the largest differences between the losses of (a) and of (c) or (b).

    The load average after each repeat goes to `loads`.
    """
    train(build(args, rows[: 4 * args.batch_size], new_store(args), num_train_epochs=2))  # warm-up
    laps: dict[str, list[Lap]] = {name: [] for name in LABELS}
    apart = {"filling": 0.0, "warm": 0.0}
    for repeat in range(args.repeats):
        (first, *uncached), expected = train(build(args, rows, None, num_train_epochs=args.epochs))
        (filling, *warm), losses = train(build(args, rows, new_store(args), num_train_epochs=args.epochs))
        trainer = build(args, rows, new_store(args), precompute=True)
        start = trainer.stand()
        trainer.reference.precompute({"train": trainer.train_dataset}, trainer.collate)
        found = {"uncached_first": [first], "filling": [filling], "uncached": uncached, "warm": warm}
        found["precompute"] = [trainer.since(start)]
        del trainer  # a large model should not stand beside the next one
        differences = [abs(a - b) for a, b in zip(expected, losses, strict=True)]
        steps = len(differences) // args.epochs
        for name, part in (("filling", differences[:steps]), ("warm", differences[steps:])):
            apart[name] = max(apart[name], *part)
        for name, more in found.items():
            laps[name] += more
        loads.append(round(os.getloadavg()[0], 2))
        print(
            repeat,
            loads[-1],
            {name: [round(lap["seconds"], 2) for lap in more] for name, more in found.items()},
            flush=True,
        )
    return laps, apart


def measure_sweep(args: argparse.Namespace, rows: list[dict]) -> dict[str, int]:
    """Runs of one epoch over a few rows that share a store: how often the reference is computed in all of them."""
    store = new_store(args)
    counts = dict.fromkeys(
        "runs steps completions_in_data completions_computed forwards forwards_of_checks".split(), 0
    )
    for values in itertools.product(*SWEEP.values()):
        options: dict[str, Any] = dict(zip(SWEEP, values, strict=True))
        trainer = build(args, rows, store, num_train_epochs=1, **options)
        (lap,), losses = train(trainer)
        counts["runs"] += 1
        counts["steps"] += len(losses)
        counts["completions_in_data"] = len(set(trainer.collate(list(trainer.train_dataset))["keys"]))
        counts["completions_computed"] += int(lap["completions"])
        counts["forwards"] += int(lap["forwards"])
        # Each run compares the store with the reference on the first rows.
        counts["forwards_of_checks"] += trainer.forwards - int(lap["forwards"])
        del trainer
    return counts


def _turns(values: list[float], repeats: int) -> list[list[float]]:
    """The values of each repeat, which lie one after the other."""
    each = len(values) // repeats
    return [values[i * each : (i + 1) * each] for i in range(repeats)]


def summarize(laps: dict[str, list[Lap]], clock: str, repeats: int) -> dict[str, Any]:
    """Medians per epoch by one of the clocks; ratios within each repeat, as median, least and greatest."""
    found = {name: [lap[clock] for lap in own] for name, own in laps.items()}
    mean = {name: [statistics.mean(turn) for turn in _turns(own, repeats)] for name, own in found.items()}
    result: dict[str, Any] = {name: round(statistics.median(own), 4) for name, own in found.items()}
    for ratio in RATIOS:
        above, below = ratio.split("/")
        values = sorted(a / b for a, b in zip(mean[above], mean[below], strict=True))
        result[ratio] = [round(value, 4) for value in (statistics.median(values), values[0], values[-1])]
    return result


def check(args: argparse.Namespace, result: dict[str, Any]) -> dict[str, bool]:
    apart, sweep = result["losses_apart"], result["sweep"]
    return {
        "losses_equal": max(apart.values()) <= TOLERANCE[args.dtype],
        "warm_computes_nothing": all(lap["forwards"] == 0 for lap in result["laps"]["warm"]),
        "sweep_computes_each_once": sweep["completions_computed"] == sweep["completions_in_data"],
    }


def table(result: dict[str, Any]) -> str:
    lines = ["| epoch | median s | range | CPU s | reference forwards |", "|---|---:|---:|---:|---:|"]
    for name, label in LABELS.items():
        laps = result["laps"][name]
        seconds = [lap["seconds"] for lap in laps]
        lines.append(
            f"| {label} | {result['seconds'][name]:.2f} | {min(seconds):.2f} to {max(seconds):.2f} | "
            f"{result['cpu_seconds'][name]:.2f} | {laps[-1]['forwards']} |"
        )
    for ratio in RATIOS:
        target = f" (target at least {TARGET})" if ratio == "uncached/warm" else ""
        (median, least, greatest), (cpu, *_) = result["seconds"][ratio], result["cpu_seconds"][ratio]
        lines.append(f"{ratio}: {median:.2f} ({least:.2f} to {greatest:.2f}), by CPU time {cpu:.2f}{target}")
    sweep = (
        "{runs} runs, {steps} steps: {forwards} forward passes of the reference (+ {forwards_of_checks} of checks), "
    )
    sweep += "{completions_computed} completions computed of {completions_in_data} in the data"
    lines.append("Sweep: " + sweep.format(**result["sweep"]))
    return "\n".join([*lines, f"Losses apart by at most {result['losses_apart']}. Checks: {result['checks']}"])


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=quickstart.model_path(), help="folder or Hub id; loaded in NF4")
    parser.add_argument("--data", default=quickstart.train_file(), help="JSON lines: prompt, chosen, rejected")
    parser.add_argument("--epochs", type=int, default=2, help="of each timed run, at least 2")
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--max_rows", type=int, default=320, help="use so many rows")
    parser.add_argument("--sweep_rows", type=int, default=64, help="rows of each run of the sweep")
    parser.add_argument("--use_cpu", action="store_true", default=not torch.cuda.is_available())
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: float32 on the CPU, else bfloat16")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.epochs < 2:
        parser.error("--epochs must be at least 2: the first fills the store.")
    device = "cpu" if args.use_cpu else "gpu"
    args.dtype = args.dtype or ("float32" if args.use_cpu else "bfloat16")
    args.out = args.out or HERE / "results" / f"reference_cache_{device}.json"
    return args


def main() -> None:
    args = read_arguments()
    load = os.getloadavg()
    if load[0] > BUSY:
        print(f"The load average is {load[0]:.1f}: other work shares the machine, and the times are rough.")
    warnings.filterwarnings("ignore", category=FutureWarning)
    disable_progress_bars()
    transformers_logging.disable_progress_bar()
    for name in ("dpo_peft", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    rows = [json.loads(line) for line in Path(args.data).read_text(encoding="utf-8").splitlines()]
    rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows][: args.max_rows]
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    result: dict[str, Any] = {
        "device": "cpu" if args.use_cpu else torch.cuda.get_device_name(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "commit": subprocess.run(describe, capture_output=True, text=True, cwd=HERE).stdout.strip(),
        "versions": framework_versions(),
        "load_average": [round(load[0], 2)],  # before the start, then after each repeat, this process included
        "rows": len(rows),
        "options": {name: value for name, value in vars(args).items() if name not in ("model", "data", "out")},
    }
    with tempfile.TemporaryDirectory() as args.scratch:
        laps, result["losses_apart"] = measure_epochs(args, rows, result["load_average"])
        result["sweep"] = measure_sweep(args, rows[: args.sweep_rows])
    result |= {clock: summarize(laps, clock, args.repeats) for clock in ("seconds", "cpu_seconds")}
    result["laps"] = {n: [{k: round(v, 3) for k, v in lap.items()} for lap in found] for n, found in laps.items()}
    result["checks"] = check(args, result)
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))
    if not all(result["checks"].values()):
        raise SystemExit(f"A check failed: {result['checks']}")


if __name__ == "__main__":
    main()
