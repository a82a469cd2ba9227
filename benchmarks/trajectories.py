"""Checks that a change of the code changes no number of a training run: short runs, compared bit for bit.

    python benchmarks/trajectories.py --write before.json                        # with the code as it was
    python benchmarks/trajectories.py --against before.json [--only nf4 kto]     # with the code as it is

Eleven runs of 30 steps train the bundled model on bundled rows, on one thread of the CPU. Together they pass through a
plain base, fused layers, NF4, bfloat16 with checkpointed layers, an adapter that goes on against a frozen copy of
itself, the cache of the reference, unpaired answers, whole conversations, an objective without reference, packed
micro-batches, and evaluation with samples. Kept of each are all figures that it logged, the digest of its adapter's
tensors, and those of the files that its evaluations wrote.

Figures are written as `float.hex`, which loses nothing. Times are left out. `--against` prints a line per run, and of
a run that differs the first step, metric and both values; the exit status is then 1. Last bits depend on the kind of
CPU and on the versions of the libraries, so both files should come from one machine; a difference of these is
printed. `--scale_beta 1.01` shows that a small change is noticed.
"""

import argparse
import hashlib
import json
import logging
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")  # before torch is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import PrinterCallback
from transformers.utils import logging as transformers_logging

import dpo_peft
from dpo_peft import DPOConfig, DPOTrainer

BUNDLED = Path(dpo_peft.__file__).parent / "quickstart"
STEPS = 30
PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "accelerate", "tokenizers")
TIMES = re.compile(r"(runtime|_per_second|preparation_time)$")
RECORDS = ("samples.jsonl", "eval_examples.jsonl")  # that evaluations write
ROUNDING = 1e-14  # relative: a few units in the last place of float64
FORMAT = 1

Result = dict[str, Any]  # "steps": step to metric to hexadecimal value; "adapter" and "files": digests
Row = dict[str, Any]


# ---- Rows -----------------------------------------------------------------------------------------------------------


def rows_of(name: str, number: int) -> list[Row]:
    """The first pairs of a bundled file, without the columns that no objective reads."""
    with open(BUNDLED / "data" / name, encoding="utf-8") as lines:
        rows = [json.loads(line) for _, line in zip(range(number), lines, strict=False)]
    return [{column: row[column] for column in ("prompt", "chosen", "rejected")} for row in rows]


def singles(pairs: list[Row]) -> list[Row]:
    """Single judged completions: of three pairs both answers, of the fourth the worse one alone."""
    rows = []
    for i, pair in enumerate(pairs):
        rows += [{"prompt": pair["prompt"], "completion": pair["chosen"], "label": True}] if i % 4 else []
        rows += [{"prompt": pair["prompt"], "completion": pair["rejected"], "label": False}]
    return rows


def conversations(pairs: list[Row]) -> list[Row]:
    """Conversations of two turns that part at the first answer, and in every third row at the second one."""
    rows = []
    for i, (one, two) in enumerate(zip(pairs[::2], pairs[1::2], strict=True)):
        first = one["chosen"] if i % 3 == 0 else one["rejected"]
        chosen = one["prompt"] + one["chosen"] + two["prompt"] + two["chosen"]
        rows.append({"chosen": chosen, "rejected": one["prompt"] + first + two["prompt"] + two["rejected"]})
    return rows


# ---- Runs -----------------------------------------------------------------------------------------------------------


def run(folder: Path, rows: list[Row], scale_beta: float, model: str | None = None, **options: Any) -> DPOTrainer:
    """Train once, save the adapter into `folder`, and give the trainer back."""
    held_out = options.pop("eval_dataset", None)
    beta = options.pop("beta", 0.5)
    settings = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 5,
        "logging_steps": 1,
        "max_length": 256,
        "beta": beta * scale_beta,
        "bf16": False,
        "gradient_checkpointing": False,
        "seed": 7,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **options,
    }
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = DPOTrainer(
        model or str(BUNDLED / "model"),
        args=DPOConfig(**settings),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=None if held_out is None else Dataset.from_list(held_out),
        peft_config=lora if model is None else None,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model()
    return trainer


def continued(folder: Path, scale_beta: float) -> DPOTrainer:
    """A run that goes on with an adapter of five steps, against a frozen copy of it."""
    pairs = rows_of("train.jsonl", 240)
    run(folder / "first", pairs, scale_beta, max_steps=5)
    return run(folder, pairs, scale_beta, model=str(folder / "first"), reference="initial", seed=8)


def cached(folder: Path, scale_beta: float) -> DPOTrainer:
    """Three epochs whose reference is computed in the first one and read from the disk in the rest."""
    cache = {"cache_ref_log_probs": True, "ref_cache_tokens": True, "ref_cache_dir": str(folder / "cache")}
    return run(folder, rows_of("train.jsonl", 80), scale_beta, **cache)


def evaluated(folder: Path, scale_beta: float) -> DPOTrainer:
    """A run that evaluates held-out pairs and answers two of their prompts every ten steps."""
    evaluation = {"eval_strategy": "steps", "eval_steps": 10, "per_device_eval_batch_size": 8}
    samples = {"sample_prompts": 2, "sample_max_new_tokens": 24}
    held_out = rows_of("test.jsonl", 20)
    pairs = rows_of("train.jsonl", 240)
    return run(folder, pairs, scale_beta, eval_dataset=held_out, **evaluation, **samples)


def of_pairs(**options: Any) -> Callable[[Path, float], DPOTrainer]:
    """A run on pairs, with these options."""
    return lambda folder, scale_beta: run(folder, rows_of("train.jsonl", 240), scale_beta, **options)


def of_singles(folder: Path, scale_beta: float) -> DPOTrainer:
    """KTO on single judged completions; mismatched completions give its reference point."""
    return run(folder, singles(rows_of("train.jsonl", 160)), scale_beta, loss_type="kto", undesirable_weight=0.75)


def of_conversations(folder: Path, scale_beta: float) -> DPOTrainer:
    """Whole conversations whose later turns count less."""
    rows = conversations(rows_of("train.jsonl", 320))
    options = {"loss_type": "trajectory", "discount_gamma": 0.7, "max_length": 512}
    return run(folder, rows, scale_beta, per_device_train_batch_size=2, **options)


PLAIN = {"quantize_base": False, "model_init_kwargs": {"dtype": "float32"}}
RUNS: dict[str, Callable[[Path, float], DPOTrainer]] = {
    "plain": of_pairs(**PLAIN, fused_layers=False),
    "fused": of_pairs(**PLAIN, fused_layers=True),
    "nf4": of_pairs(),
    "nf4_bf16": of_pairs(bf16=True, gradient_checkpointing=True, checkpoint_layers=2),
    "continued": continued,
    "cached": cached,
    "kto": of_singles,
    "trajectories": of_conversations,
    "orpo": of_pairs(loss_type="orpo"),
    "packed": of_pairs(max_tokens_per_microbatch=200),
    "evaluated": evaluated,
}


def result_of(name: str, scale_beta: float) -> Result:
    """Carry a run out in a temporary folder, and keep what is compared of it."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / name
        trainer = RUNS[name](folder, scale_beta)
        steps: dict[str, dict[str, str]] = {}
        for entry in trainer.state.log_history:
            figures = {key: float(value).hex() for key, value in entry.items() if not TIMES.search(key)}
            steps.setdefault(str(entry["step"]), {}).update(figures)
        files = {path.name: digest(path.read_bytes()) for one in RECORDS if (path := folder / one).is_file()}
        return {"steps": steps, "adapter": adapter_digest(folder), "files": files}


def adapter_digest(folder: Path) -> str:
    """SHA-256 of an adapter's tensors with their names, dtypes and shapes; the file's other content doesn't count."""
    total = hashlib.sha256()
    for name, tensor in sorted(load_file(folder / "adapter_model.safetensors").items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def digest(content: bytes) -> str:
    """SHA-256 in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


# ---- Comparing ------------------------------------------------------------------------------------------------------


def differences(before: Result, now: Result) -> list[str]:
    """What sets two results of a run apart, in sentences: names that came or went first, then the first figure."""
    lines = []
    names = [{metric for figures in result["steps"].values() for metric in figures} for result in (before, now)]
    if gone := names[0] - names[1]:
        lines.append(f"metrics that vanished: {', '.join(sorted(gone))}")
    if new := names[1] - names[0]:
        lines.append(f"metrics that appeared: {', '.join(sorted(new))}")
    if list(before["steps"]) != list(now["steps"]):
        lines.append(f"steps that were logged: {', '.join(before['steps'])} before, {', '.join(now['steps'])} now")
    if first := first_difference(before, now, names[0] & names[1]):
        lines.append(first)
    if before["adapter"] != now["adapter"]:
        lines.append(f"the adapter's tensors: {before['adapter'][:12]} before, {now['adapter'][:12]} now")
    for name in sorted(before["files"].keys() | now["files"].keys()):
        old, new_one = (result["files"].get(name, "absent")[:12] for result in (before, now))
        if old != new_one:
            lines.append(f"{name}: {old} before, {new_one} now")
    return lines


def first_difference(before: Result, now: Result, names: set[str]) -> str | None:
    """The first step with another value of a metric that both have, beyond rounding where that is allowed."""
    for step in (step for step in before["steps"] if step in now["steps"]):
        old, new = before["steps"][step], now["steps"][step]
        changed = [m for m in [*old, *new] if m in names and old.get(m) != new.get(m)]
        changed = [m for m in changed if not is_rounding(m, old.get(m), new.get(m))]
        if changed:
            metric = changed[0]
            values = " before, ".join(in_words(figures.get(metric)) for figures in (old, new)) + " now"
            others = f", and {len(set(changed)) - 1} other metrics of this step" if len(set(changed)) > 1 else ""
            return f"first at step {step}: {metric} is {values}{others}"
    return None


def is_rounding(metric: str, old: str | None, new: str | None) -> bool:
    """Whether two values of a mean over pairs differ by the order of its sum alone. Losses and gradient norms, and the
    adapter's tensors, must be equal bit for bit."""
    if old is None or new is None or metric.endswith(("loss", "grad_norm")):
        return False
    a, b = float.fromhex(old), float.fromhex(new)
    return abs(a - b) <= ROUNDING * max(abs(a), abs(b))


def rounded(before: Result, now: Result) -> str:
    """Which metrics differ by rounding, for the line of a run that is equal."""
    found = {
        metric
        for step, old in before["steps"].items()
        for metric, value in old.items()
        if now["steps"].get(step, {}).get(metric) not in (None, value)
    }
    return f"; {', '.join(sorted(found))} within {ROUNDING:g}" if found else ""


def in_words(value: str | None) -> str:
    """A figure as decimal and hexadecimal number."""
    return "absent" if value is None else f"{float.fromhex(value):.17g} ({value})"


# ---- The command ----------------------------------------------------------------------------------------------------


def circumstances() -> dict[str, Any]:
    """What the last bits depend on, and the commit."""
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, cwd=Path(dpo_peft.__file__).parent, capture_output=True, text=True, check=False)
    return {
        "commit": commit.stdout.strip() or None,
        "dpo_peft": dpo_peft.__version__,
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "cpu": cpu_name(),
    }


def cpu_name() -> str:
    """The kind of CPU, as Linux calls it."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.is_file() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def write(path: Path, results: dict[str, Result]) -> None:
    """Write the results, a line for each step."""
    document = {"format": FORMAT, **circumstances(), "runs": results}
    text = json.dumps(document, indent=1)
    # A step's figures stand at the fourth level: put them on one line.
    text = re.sub(r"\n {5}(?=\S)", " ", text)
    path.write_text(re.sub(r"\n {4}\}", " }", text) + "\n", encoding="utf-8")


def compare(before: Result | None, now: Result) -> list[str]:
    """As `differences`, also for a run that the file lacks."""
    return ["the file has no such run"] if before is None else differences(before, now)


def quiet() -> None:
    """One thread, deterministic algorithms, and nothing printed but our own lines."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    disable_progress_bars()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("dpo_peft").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", type=Path, metavar="FILE.json", help="Run, and write the figures.")
    action.add_argument("--against", type=Path, metavar="FILE.json", help="Run, and compare with a written file.")
    parser.add_argument("--only", nargs="+", choices=list(RUNS), metavar="NAME", help=f"Of {', '.join(RUNS)}.")
    parser.add_argument("--scale_beta", type=float, default=1.0, help="Multiplies beta: a change to be noticed.")
    return parser.parse_args()


def main() -> int:
    """Carry the runs out; the exit status."""
    options = parse()
    before = json.loads(options.against.read_text("utf-8")) if options.against else None
    if before is not None and before["format"] != FORMAT:
        sys.exit(f"{options.against} has format {before['format']}, and this script reads format {FORMAT}.")
    quiet()
    print(f"dpo_peft from {Path(dpo_peft.__file__).parent}")
    for key, value in circumstances().items() if before else ():
        if key != "commit" and before[key] != value:
            print(f"note: {key} was {before[key]}, and is {value}: last bits may differ for this reason.")
    results, different = {}, []
    for name in options.only or RUNS:
        start = time.perf_counter()
        results[name] = result_of(name, options.scale_beta)
        seconds = f"{time.perf_counter() - start:.0f} s"
        lines = compare(before["runs"].get(name), results[name]) if before else []
        what = ("different" if lines else "equal, bit for bit") if before else "done"
        what += rounded(before["runs"][name], results[name]) if before and not lines else ""
        print("\n    ".join([f"{name}: {what} ({seconds})", *lines]), flush=True)
        different += [name] if lines else []
    if before and options.only is None:
        for name in before["runs"].keys() - results.keys():
            print(f"{name}: the file has this run, and this script does not")
            different.append(name)
    if options.write:
        write(options.write, results)
        print(f"{options.write} is written.")
    elif different:
        print(f"{len(different)} of {len(results)} runs differ: {', '.join(different)}")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
