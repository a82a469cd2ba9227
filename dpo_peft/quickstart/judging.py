"""A training run on the quickstart's task, judged: fresh samples before and after, figures, a report, a summary."""

import json
import statistics
from pathlib import Path
from typing import NamedTuple

from ..files import write_atomically
from ..reference.adapter_off import reference_mode
from ..trainer import DPOTrainer
from .fluency import known_trigram_share
from .reward import true_reward
from .sampling import Messages, sample_answers, sampled_kl


class Run(NamedTuple):
    """Holds what was measured around a training."""

    prompts: list[Messages]
    before: list[str]  # a completion per prompt, of the reference
    after: list[str]  # the same of the trained policy
    start: dict[str, float]  # metrics on the held-out rows
    end: dict[str, float]
    kl: float  # of the trained policy from its reference, nats per completion


def train_between_samples(trainer: DPOTrainer, prompts: list[Messages]) -> Run:
    """Trains; samples a completion per prompt and evaluates before and after. Prints where it stands."""
    model, tokenizer = trainer.model, trainer.tokenizer
    print("\n== Before: the reference is this model with the adapter off ==")
    with reference_mode(model):
        before = tokenizer.batch_decode(sample_answers(model, tokenizer, prompts, seed=1), skip_special_tokens=True)
    start = trainer.evaluate()

    print("\n== Training ==")
    trainer.train()
    end = trainer.evaluate()

    print("\n== After ==")
    answers = sample_answers(model, tokenizer, prompts, seed=1)
    after = tokenizer.batch_decode(answers, skip_special_tokens=True)
    with trainer.compute_loss_context_manager():
        kl = sampled_kl(model, tokenizer, prompts, answers)
    return Run(prompts, before, after, start, end, kl)


def judge(before: list[str], after: list[str], start: dict[str, float], end: dict[str, float]) -> dict[str, float]:
    """Returns the figures of the run: accuracy on held-out pairs, true reward and fluency of fresh samples."""
    rewards = {name: [true_reward(text) for text in texts] for name, texts in (("b", before), ("a", after))}
    spread = statistics.stdev(rewards["b"])
    return {
        "accuracy_before": start["eval_rewards/accuracies"],
        "accuracy_after": end["eval_rewards/accuracies"],
        "accuracy_length_only": end["eval_accuracies/length_only"],
        "margin_after": end["eval_rewards/margins"],
        "reward_before": statistics.mean(rewards["b"]),
        "reward_after": statistics.mean(rewards["a"]),
        "reward_std_before": spread,
        "reward_gain_in_std": (statistics.mean(rewards["a"]) - statistics.mean(rewards["b"])) / spread,
        "fluency_before": known_trigram_share(before),
        "fluency_after": known_trigram_share(after),
        "words_before": statistics.mean(len(text.split()) for text in before),
        "words_after": statistics.mean(len(text.split()) for text in after),
    }


def write_report(
    folder: Path,
    figures: dict[str, float],
    prompts: list[Messages],
    before: list[str],
    after: list[str],
    title: str = "Quickstart report",
) -> None:
    """Writes report.md and report.json; the curves and the model card lie beside them."""
    samples = [
        {"prompt": p[-1]["content"], "before": b, "after": a} for p, b, a in zip(prompts, before, after, strict=True)
    ]
    write_atomically(folder / "report.json", json.dumps({"figures": figures, "samples": samples}, indent=2) + "\n")
    rows = [f"| {name} | {value:.3f} |" for name, value in figures.items()]
    shown = [
        f"**{s['prompt']}**\n\n- before ({true_reward(s['before']):+.2f}): {s['before']}\n"
        f"- after ({true_reward(s['after']):+.2f}): {s['after']}\n"
        for s in samples[:10]
    ]
    lines = [f"# {title}", "", "| figure | value |", "|---|---:|", *rows, "", "![Training curves](curves.png)"]
    text = "\n".join([*lines, "", "## Samples (true reward in brackets)", "", *shown])
    write_atomically(folder / "report.md", text)


def show(
    figures: dict[str, float], prompts: list[Messages], before: list[str], after: list[str], folder: Path
) -> None:
    """Prints a few samples and the figures."""
    for prompt, old, new in list(zip(prompts, before, after, strict=True))[:3]:
        print(f"\n> {prompt[-1]['content']}\n  before ({true_reward(old):+.2f}): {old}")
        print(f"  after  ({true_reward(new):+.2f}): {new}")
    print(
        f"\nHeld-out preference accuracy {figures['accuracy_before']:.2f} -> {figures['accuracy_after']:.2f} "
        f"(picking the longer completion: {figures['accuracy_length_only']:.2f})"
        f"\nMean true reward {figures['reward_before']:+.2f} -> {figures['reward_after']:+.2f}, up by "
        f"{figures['reward_gain_in_std']:.1f} of its standard deviations at the start"
        f"\nFluency {figures['fluency_before']:.3f} -> {figures['fluency_after']:.3f} (share of known word trigrams), "
        f"KL to the reference {figures['kl_to_reference']:.1f} nats per completion"
        f"\n{figures['seconds']:.0f} s. Report, curves, adapter and model card: {folder}"
    )
