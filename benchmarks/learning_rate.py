"""Which learning rate should be the default? Runs of 60 steps from rates of 1e-6 to 1e-3, on six tasks.

    python benchmarks/learning_rate.py [--tasks dpo kto] [--show]
    python benchmarks/learning_rate.py --tasks rewrites --model SMOLLM2 --data instruction-data-with-preference.json

A run is what somebody gets who sets nothing but the rate: LoRA's defaults, the objective's own beta, a linear
schedule, 8 pairs a step (16 single completions for KTO); NF4, computed in float32. Five tasks train the bundled model
on its rows, each with another objective; they are judged by 128 held-out pairs, and by the true reward, the fluency
and the KL of 64 fresh completions. "rewrites" trains SmolLM2-135M-Instruct (a folder, see
smollm2_dpo.py) with DPO on 240 of rasbt's 1,100 pairs (polite or not, 4 a step), judged by 64 others.

Adds to benchmarks/results/learning_rate_cpu.json what is missing there, and prints the table.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")  # before torch is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from datasets import Dataset, disable_progress_bars

from dpo_peft import DPOConfig, DPOTrainer, from_alpaca, quickstart
from dpo_peft.artifacts.card import framework_versions
from dpo_peft.losses import find_objective
from dpo_peft.quickstart.forms import write_form
from dpo_peft.quickstart.sampling import sample_answers, sampled_kl

RESULTS = Path(__file__).parent / "results" / "learning_rate_cpu.json"
TASKS = {"dpo": "sigmoid", "ipo": "ipo", "kto": "kto", "orpo": "orpo", "simpo": "simpo", "rewrites": "sigmoid"}
RATES = (1e-6, 5e-6, 1e-5, 2e-5, 5e-5, 2e-4, 1e-3)
STEPS, SAMPLES, HELD_OUT, HELD_OUT_REWRITES, REWRITES_A_STEP = 60, 64, 128, 64, 4


def run(task: str, rate: float, model: str, data: str) -> dict[str, Any]:
    """Trains one task at one rate, and judges it."""
    started, own = time.time(), task == "rewrites"
    train, test = rewrites(data) if own else reviews(TASKS[task])
    size = REWRITES_A_STEP if own else 16 if task == "kto" else 8
    config = DPOConfig(
        output_dir=tempfile.mkdtemp(),
        loss_type=[TASKS[task]],
        learning_rate=rate,
        max_steps=STEPS,
        per_device_train_batch_size=size,
        per_device_eval_batch_size=16,
        max_length=256,
        model_init_kwargs={"dtype": "float32"},
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = DPOTrainer(
        model if own else quickstart.model_path(), args=config, train_dataset=train, eval_dataset=test
    )
    trainer.train()
    held_out = trainer.evaluate()
    names = ("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "kl")
    figures = {name: held_out[f"eval_{name}"] for name in names if f"eval_{name}" in held_out}
    if not own:
        prompts = quickstart.eval_prompts()[:SAMPLES]
        answers = sample_answers(trainer.model, trainer.processing_class, prompts, seed=1)
        texts = trainer.processing_class.batch_decode(answers, skip_special_tokens=True)
        figures["true_reward"] = statistics.mean(map(quickstart.true_reward, texts))
        figures["fluency"] = quickstart.known_trigram_share(texts)
        figures["sampled_kl"] = sampled_kl(trainer.model, trainer.tokenizer, prompts, answers)
    warned = [warning["name"] for warning in trainer.warnings_raised]
    return figures | {"warnings": warned, "seconds": round(time.time() - started, 1)}


def reviews(loss: str) -> tuple[Dataset, Dataset]:
    """Training and held-out rows of the bundled task, in the form that a loss reads."""
    files, kind = (quickstart.train_file(), quickstart.test_file()), find_objective(loss).data
    made = [write_form(kind, file, tempfile.mkdtemp(), quickstart.model_path(), 0) for file in files]
    columns = {"prompt", "chosen", "rejected", "completion", "label"}
    lines = [Path(file).read_text("utf-8").splitlines() for file in made]
    train, test = ([{k: v for k, v in json.loads(line).items() if k in columns} for line in of] for of in lines)
    return Dataset.from_list(train), Dataset.from_list(test[:HELD_OUT])


def rewrites(file: str) -> tuple[Dataset, Dataset]:
    """Pairs of rasbt's file, in an order of their own."""
    rows = [row for row in json.loads(Path(file).read_text("utf-8")) if row["chosen"] != row["rejected"]]
    random.Random(0).shuffle(rows)
    pairs = [from_alpaca(row) for row in rows]
    held_out = pairs[STEPS * REWRITES_A_STEP :][:HELD_OUT_REWRITES]
    return Dataset.from_list(pairs[: STEPS * REWRITES_A_STEP]), Dataset.from_list(held_out)


def table(runs: dict[str, dict[str, Any]]) -> str:
    """Held-out accuracy, margin and KL a completion by task and rate; true reward and fluency where they are known."""
    lines = ["| task | learning_rate | accuracy | margin | loss | KL | true reward | fluency | warnings |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|---:|---|")
    for key, figures in runs.items():
        task, rate = key.split("@")
        names = ("rewards/accuracies", "rewards/margins", "loss", "sampled_kl", "true_reward", "fluency")
        found = [{"sampled_kl": figures.get("kl"), **figures}.get(name) for name in names]
        cells = ["" if value is None else f"{value:.3g}" for value in found]
        lines.append(f"| {task} | {rate} | {' | '.join(cells)} | {', '.join(figures['warnings'])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=[task for task in TASKS if task != "rewrites"])
    parser.add_argument("--rates", nargs="*", type=float, default=RATES)
    parser.add_argument("--model", default="", help="folder of SmolLM2-135M-Instruct, for rewrites")
    parser.add_argument("--data", default="", help="instruction-data-with-preference.json, for rewrites")
    parser.add_argument("--show", action="store_true", help="measure nothing: the table of what is there")
    args = parser.parse_args()
    disable_progress_bars()
    results = read()
    for key, task, rate in [(f"{t}@{r:g}", t, r) for t in args.tasks for r in args.rates if not args.show]:
        if key not in results["runs"]:
            figures = run(task, rate, args.model, args.data)
            print(key, json.dumps(figures), flush=True)
            commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent)
            results = read()  # another process may have added to it
            results["runs"][key] = {**figures, "commit": commit.stdout.strip()}
            results["runs"] = dict(sorted(results["runs"].items(), key=lambda one: place(one[0])))
            RESULTS.write_text(json.dumps({**results, "versions": framework_versions()}, indent=2) + "\n")
    print(table(results["runs"]))


def read() -> dict[str, Any]:
    """Returns the results so far."""
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"device": "cpu, one thread", "runs": {}}


def place(key: str) -> tuple[int, float]:
    """Where a run stands among the others."""
    task, rate = key.split("@")
    return list(TASKS).index(task), float(rate)


if __name__ == "__main__":
    main()
