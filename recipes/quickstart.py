"""The quickstart: a real 4-bit DPO run, offline, on the small language model that the package ships.

    make quickstart            or            python recipes/quickstart.py [--any_option value]

| GPU  | time on 2 CPU cores | expected                                                                     |
|------|---------------------|------------------------------------------------------------------------------|
| none | about 1.5 minutes   | held-out preference accuracy 0.99, mean true reward up by 2.5 of its standard |
|      |                     | deviations at the start, samples still fluent, KL below 10 nats per answer    |

The task is controlled sentiment (Rafailov et al. 2023, section 6): write reviews, the more positive the better. Its
true reward is a documented function of the text, so the run can be judged by more than its own loss. The pairs were
sampled from the model itself and ranked by that reward.
"""

import json
import logging
import os
import statistics
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Threads that wait by spinning make a step ten times slower as soon as anything else runs on the machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
warnings.filterwarnings("ignore", category=FutureWarning)
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it asks for an optional kernel that is not used here

import torch

from dpo_peft import cli, quickstart
from dpo_peft.quickstart.sampling import sample_answers, sampled_kl
from dpo_peft.reference import reference_mode

HERE = Path(__file__).parent
SAMPLES = 256  # fresh answers to held-out prompts, before and after
SHOWN = 3


def main() -> None:
    started = time.time()
    trainer = build_trainer(sys.argv[1:])
    model, tokenizer, folder = trainer.model, trainer.processing_class, Path(trainer.args.output_dir)
    prompts = [prompt for prompt, _ in zip(quickstart.eval_prompts() * SAMPLES, range(SAMPLES), strict=False)]

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
    figures = judge(before, after, start, end)
    figures["kl_to_reference"] = sampled_kl(trainer, prompts, answers)
    figures["seconds"] = round(time.time() - started, 1)

    trainer.save_model()
    write_report(folder, figures, prompts, before, after)
    show(figures, prompts, before, after, folder)


def build_trainer(argv: list[str]):
    data_and_model = {
        "--config": str(HERE / "quickstart.yaml"),
        "--model_name_or_path": quickstart.model_path(),
        "--dataset_name": quickstart.train_file(),
        "--eval_dataset_name": quickstart.test_file(),
    }
    given = [word for option, value in data_and_model.items() if option not in argv for word in (option, value)]
    torch.manual_seed(0)
    return cli.build_trainer(*cli.parse([*given, *argv]))


def judge(before: list[str], after: list[str], start: dict, end: dict) -> dict[str, float]:
    """Figures of the run: accuracy on held-out pairs, true reward and fluency of fresh samples."""
    rewards = {name: [quickstart.true_reward(text) for text in texts] for name, texts in (("b", before), ("a", after))}
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
        "fluency_before": quickstart.known_trigram_share(before),
        "fluency_after": quickstart.known_trigram_share(after),
        "words_before": statistics.mean(len(text.split()) for text in before),
        "words_after": statistics.mean(len(text.split()) for text in after),
    }


def write_report(folder: Path, figures: dict, prompts: list, before: list[str], after: list[str]) -> None:
    """report.md and report.json; the curves and the model card lie beside them."""
    samples = [
        {"prompt": p[-1]["content"], "before": b, "after": a} for p, b, a in zip(prompts, before, after, strict=True)
    ]
    (folder / "report.json").write_text(json.dumps({"figures": figures, "samples": samples}, indent=2) + "\n")
    rows = [f"| {name} | {value:.3f} |" for name, value in figures.items()]
    shown = [
        f"**{s['prompt']}**\n\n- before ({quickstart.true_reward(s['before']):+.2f}): {s['before']}\n"
        f"- after ({quickstart.true_reward(s['after']):+.2f}): {s['after']}\n"
        for s in samples[:10]
    ]
    lines = [
        "# Quickstart report",
        "",
        "| figure | value |",
        "|---|---:|",
        *rows,
        "",
        "![Training curves](curves.png)",
    ]
    (folder / "report.md").write_text("\n".join([*lines, "", "## Samples (true reward in brackets)", "", *shown]))


def show(figures: dict, prompts: list, before: list[str], after: list[str], folder: Path) -> None:
    for prompt, old, new in list(zip(prompts, before, after, strict=True))[:SHOWN]:
        print(f"\n> {prompt[-1]['content']}\n  before ({quickstart.true_reward(old):+.2f}): {old}")
        print(f"  after  ({quickstart.true_reward(new):+.2f}): {new}")
    print(
        f"\nHeld-out preference accuracy {figures['accuracy_before']:.2f} -> {figures['accuracy_after']:.2f} "
        f"(picking the longer answer: {figures['accuracy_length_only']:.2f})"
        f"\nMean true reward {figures['reward_before']:+.2f} -> {figures['reward_after']:+.2f}, up by "
        f"{figures['reward_gain_in_std']:.1f} of its standard deviations at the start"
        f"\nFluency {figures['fluency_before']:.3f} -> {figures['fluency_after']:.3f} (share of known word trigrams), "
        f"KL to the reference {figures['kl_to_reference']:.1f} nats per answer"
        f"\n{figures['seconds']:.0f} s. Report, curves, adapter and model card: {folder}"
    )


if __name__ == "__main__":
    main()
