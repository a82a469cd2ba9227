"""Every objective on the quickstart's task after the same budget, and the frontier of reward over KL.

    python benchmarks/objectives.py [--runs sft kto@0.5 discopop@0.1,discopop_tau=0.2] [--show]

Each run trains the bundled model for 77 steps of 32 answers (16 pairs, 32 single answers, 8 lists of 2 to 6, or 8
pairs of conversations of two turns), which is one pass over the pairs, from the same start. It is judged by the 266
held-out pairs and by 256 fresh answers to held-out prompts. The table takes every objective at its default beta, and a
few with other options; the frontier takes three objectives at six betas, as in figure 2 of Rafailov et al. 2023.

Runs go side by side, one thread each, and are written as they end: a second start does what is missing. Writes
benchmarks/results/objectives_cpu.json and docs/images/objectives_frontier.png, and prints the table.
"""

import argparse
import json
import logging
import math
import multiprocessing
import os
import statistics
import subprocess
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars

from dpo_peft import DPOConfig, DPOTrainer, quickstart
from dpo_peft.artifacts import curves as plots
from dpo_peft.artifacts.card import framework_versions
from dpo_peft.losses import REGISTRY
from dpo_peft.quickstart.forms import write_form
from dpo_peft.quickstart.sampling import sample_answers, sampled_kl
from dpo_peft.reference.adapter_off import reference_mode

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "objectives_cpu.json"
FORMS = Path(tempfile.gettempdir()) / "objectives_forms"
PLOT = HERE.parent / "docs" / "images" / "objectives_frontier.png"

BATCH = {"pairs": 16, "singles": 32, "lists": 8, "trajectories": 8}  # 32 answers, or about as many
LISTS = 616  # that many are needed: 8 a step
SAMPLES = 256
BUDGET: dict[str, Any] = {
    "max_steps": 77,
    "learning_rate": 3e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 8,
    "seed": 0,
    "max_length": 384,
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "per_device_eval_batch_size": 32,
}
NEEDED = {"exo_pair": {"label_smoothing": 1e-3}, "robust": {"label_smoothing": 0.1}}
# Beside the defaults: betas of papers, and options that change how a loss behaves.
VARIANTS = (
    "robust@0.5",
    "sppo_hard@0.001",
    "apo_down@1",
    "sigmoid_norm@5",
    "discopop@0.05",
    "discopop@0.1,discopop_tau=0.2",
    "aot_unpaired@0.5",
    "simpo@10,simpo_gamma=3",
    "trajectory@0.1,discount_gamma=0.9",
)
FRONTIER = ("sigmoid", "ipo", "kto")
BETAS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
COLORS = {"sigmoid": plots.BLUE, "ipo": plots.ORANGE, "kto": plots.GREEN}
LABELS = {"sigmoid": (12, -7), "ipo": (14, -16), "kto": (-12, 5)}  # where a beta stands beside its point
TICKS = (0, 0.5, 1, 2, 5, 10, 20, 50)
NAMES = {"sigmoid": "DPO", "ipo": "IPO", "kto": "KTO"}


def key(name: str, beta: float | None) -> str:
    return name if beta is None else f"{name}@{beta:g}"


def full_key(run: str) -> str:
    """ "kto" -> "kto@0.1": a run is known by its beta."""
    return run if "@" in run else key(run, REGISTRY[run].default_beta)


def read_key(run: str) -> tuple[str, float | None, dict[str, float]]:
    """Objective, beta and other options of a run: "discopop@0.1,discopop_tau=0.2"; what isn't given is the default."""
    head, *options = run.split(",")
    name, _, beta = head.partition("@")
    given = {option: float(value) for option, value in (word.split("=") for word in options)}
    return name, float(beta) if beta else REGISTRY[name].default_beta, {**NEEDED.get(name, {}), **given}


def planned() -> list[str]:
    """The table's runs, then what the frontier lacks."""
    table = [key(name, entry.default_beta) for name, entry in REGISTRY.items()]
    frontier = [key(name, beta) for beta in BETAS for name in FRONTIER]
    return list(dict.fromkeys([*table, *VARIANTS, *frontier]))


# ---- One run --------------------------------------------------------------------------------------------------------


def build(run: str, forms: str) -> DPOTrainer:
    name, beta, options = read_key(run)
    data = REGISTRY[name].data
    file = write_form(data, quickstart.train_file(), forms, quickstart.model_path(), LISTS)
    rows = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]
    config = DPOConfig(
        output_dir=tempfile.mkdtemp(),
        loss_type=[name],
        beta=beta,
        per_device_train_batch_size=BATCH[data],
        model_init_kwargs={"dtype": "float32"},
        **BUDGET,
        **options,
    )
    return DPOTrainer(quickstart.model_path(), args=config, train_dataset=Dataset.from_list(rows))


def held_out_pairs() -> Dataset:
    rows = [json.loads(line) for line in Path(quickstart.test_file()).read_text(encoding="utf-8").splitlines()]
    return Dataset.from_list([{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows])


def accuracy(trainer: DPOTrainer) -> float:
    """Share of the held-out pairs whose chosen answer has the higher implicit reward; equal ones count as half."""
    output = trainer.predict(held_out_pairs())
    rewards = torch.as_tensor(output.predictions)
    if trainer.objective.data in ("lists", "singles"):
        grade, row = torch.as_tensor(output.label_ids).T
        rewards = rewards[torch.argsort(2 * row - grade)].view(-1, 2)
    return float(((rewards[:, 0] - rewards[:, 1]).sign() + 1).mean() / 2)


def sample_prompts() -> list[list[dict[str, str]]]:
    return quickstart.eval_prompts()[:SAMPLES]


def judge_texts(texts: list[str]) -> dict[str, float]:
    rewards = [quickstart.true_reward(text) for text in texts]
    return {
        "reward": statistics.mean(rewards),
        "reward_std": statistics.stdev(rewards),
        "fluency": quickstart.known_trigram_share(texts),
        "words": statistics.mean(len(text.split()) for text in texts),
    }


def measure(run: str, forms: str) -> dict[str, Any]:
    """Train one objective and judge it."""
    name, beta, options = read_key(run)
    started = time.time()
    trainer = build(run, forms)
    before = 0.5 if REGISTRY[name].needs_reference else accuracy(trainer)
    trainer.train()
    trained = time.time()
    answers = sample_answers(trainer.model, trainer.processing_class, sample_prompts(), seed=1)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "objective": name,
        "beta": beta,
        "options": options,
        "accuracy_before": before,
        "accuracy": accuracy(trainer),
        **judge_texts(trainer.processing_class.batch_decode(answers, skip_special_tokens=True)),
        "kl": sampled_kl(trainer.model, trainer.tokenizer, sample_prompts(), answers),
        "loss_first": losses[0],
        "loss_last_5": statistics.mean(losses[-5:]),
        "train_seconds": round(trained - started, 1),
        "seconds": round(time.time() - started, 1),
    }


def measure_start(forms: str) -> dict[str, float]:
    """The reference itself, judged by the same prompts and random numbers."""
    trainer = build("sigmoid", forms)
    with reference_mode(trainer.model):
        answers = sample_answers(trainer.model, trainer.processing_class, sample_prompts(), seed=1)
    return judge_texts(trainer.processing_class.batch_decode(answers, skip_special_tokens=True))


# ---- All runs -------------------------------------------------------------------------------------------------------


def load() -> dict[str, Any]:
    options = {"samples": SAMPLES, "batch": BATCH, **BUDGET}
    if RESULTS.is_file():
        results = json.loads(RESULTS.read_text())
        if results["options"] != options:
            raise SystemExit(f"{RESULTS} was measured with other options: remove it first.")
        return results
    return {
        "device": "cpu, 2 cores, one thread per run, two runs side by side",
        "versions": framework_versions(),
        "options": options,
        "start": {},
        "runs": {},
    }


def commit() -> str:
    """Of the source that is measured; ends in -dirty if it has changes since."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, cwd=HERE).stdout.strip()


def save(results: dict[str, Any]) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


def start_worker() -> None:
    torch.set_num_threads(1)
    disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def work(job: tuple[str, str]) -> tuple[str, Any]:
    run, forms = job
    try:
        return run, measure_start(forms) if run == "start" else measure(run, forms)
    except Exception as error:  # the other runs go on; a second start tries this one again
        return run, f"{type(error).__name__}: {error}"


def measure_all(results: dict[str, Any], runs: list[str], workers: int, forms: str) -> None:
    jobs = [(run, forms) for run in (["start"] if not results["start"] else []) + runs if run not in results["runs"]]
    for data in BATCH:  # before the workers, which would all make them
        write_form(data, quickstart.train_file(), forms, quickstart.model_path(), LISTS)
    source = commit()
    with multiprocessing.get_context("spawn").Pool(workers, start_worker) as pool:
        for run, figures in pool.imap_unordered(work, jobs):
            print(run, json.dumps(figures), flush=True)
            if isinstance(figures, str):
                continue
            if run == "start":
                results["start"] = figures
            else:
                results["runs"][run] = {**figures, "commit": source}
            save(results)


# ---- Output ---------------------------------------------------------------------------------------------------------


def table(results: dict[str, Any]) -> str:
    start, runs = results["start"], results["runs"]
    lines = [
        "| objective | `beta` | held-out accuracy | mean true reward | gain (std) | KL (nats) | fluency |",
        "|---|---:|---:|---:|---:|---:|---:|",
        f"| (start) | | | {start['reward']:+.2f} | | 0 | {start['fluency']:.3f} |",
    ]
    default = {name: key(name, entry.default_beta) for name, entry in REGISTRY.items()}
    for name, entry in REGISTRY.items():
        for key_ in [default[name], *(variant for variant in VARIANTS if read_key(variant)[0] == name)]:
            run = runs.get(key_)
            if run is None:
                continue
            beta = "" if run["beta"] is None else f"{run['beta']:g}"
            extra = "".join(f", `{option}` {value:g}" for option, value in read_key(key_)[2].items())
            before = "" if entry.needs_reference else f" (from {run['accuracy_before']:.2f})"
            gain = (run["reward"] - start["reward"]) / start["reward_std"]
            lines.append(
                f"| `{name}`{extra} | {beta} | {run['accuracy']:.2f}{before} | {run['reward']:+.2f} | {gain:+.1f} | "
                f"{run['kl']:.2f} | {run['fluency']:.3f} |"
            )
    return "\n".join(lines)


def draw(results: dict[str, Any]) -> None:
    """Mean true reward over the KL to the reference: a line per objective, a point per beta."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

    figure = Figure(figsize=(7.0, 4.6), dpi=plots.DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    plots.style_axes(axes, f"True reward after {BUDGET['max_steps']} steps, one point per β")
    axes.set_xscale("symlog", linthresh=1, linscale=0.6)  # the large distances of small betas would fill the plot
    axes.xaxis.set_major_locator(FixedLocator(TICKS))
    axes.xaxis.set_major_formatter(FixedFormatter([f"{tick:g}" for tick in TICKS]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("KL(policy ‖ reference), nats per answer", fontsize=9, color=plots.INK)
    axes.set_ylabel("mean true reward", fontsize=9, color=plots.INK)
    for name in FRONTIER:
        runs = [results["runs"][key(name, beta)] for beta in BETAS if key(name, beta) in results["runs"]]
        runs.sort(key=lambda run: run["kl"])
        kl, reward = [run["kl"] for run in runs], [run["reward"] for run in runs]
        error = [run["reward_std"] / math.sqrt(SAMPLES) for run in runs]
        style = {"color": COLORS[name], "marker": "o", "markersize": 4.5, "elinewidth": 0.8}
        axes.errorbar(kl, reward, yerr=error, label=NAMES[name], **style)
        place = {"textcoords": "offset points", "fontsize": 7.5, "ha": "center", "color": COLORS[name]}
        for run in runs:
            axes.annotate(f"{run['beta']:g}", (run["kl"], run["reward"]), LABELS[name], **place)
    axes.set_ylim(bottom=-0.2)
    axes.plot([0], [results["start"]["reward"]], color=plots.INK, label="start", **plots.RING)
    axes.legend(frameon=False, fontsize=9, labelcolor=plots.INK, loc="lower right")
    plots.save(figure, PLOT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--runs",
        nargs="*",
        help="default: the table, then the frontier",
    )
    parser.add_argument("--workers", type=int, default=2, help="runs side by side")
    parser.add_argument(
        "--forms", default=str(Path(tempfile.gettempdir()) / "objectives_forms"), help="for data files"
    )
    parser.add_argument("--show", action="store_true", help="measure nothing: table and plot of what is there")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    results = load()
    if not args.show:
        runs = planned() if args.runs is None else [full_key(run) for run in args.runs]
        measure_all(results, runs, args.workers, args.forms)
    print(table(results))
    draw(results)


if __name__ == "__main__":
    main()
