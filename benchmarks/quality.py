"""Is it better? Reward over KL of objectives, adapters that act on less, and TRL's trainer, from the same start.

    python benchmarks/quality.py [--variants full ipo] [--seeds 0 1 2] [--device cuda] [--times 3] [--show]
    python benchmarks/quality.py --task sentiment --model SMOLLM2 [--data pairs.json]
    python benchmarks/quality.py --task rewrites --model SMOLLM2 --data instruction-data-with-preference.json

Variants have the same rank, steps, order of rows and, but for those that say so, rate; a control that must be worse
(rank 1, lowest quarter of the layers) shows that the measures can tell. A run is judged several times along the way:
worth over KL is its frontier (Rafailov et al. 2023, figure 2), and `seconds` of training until there compare at equal
time (of a CPU its own time, which other work doesn't move). SMOLLM2 is a folder of SmolLM2-135M-Instruct (see
smollm2_dpo.py).

- "quickstart" trains the bundled model; worth is the true reward of a fresh completion to each of 128 prompts.
- "sentiment" trains SmolLM2 in NF4 to go on with reviews in a good mood (the paper's controlled sentiment); worth is
  VADER's compound score (pip install vaderSentiment) of fresh completions to held-out openings. Pairs are the model's
  own: the best and the worst of four samples, drawn once into --data.
- "rewrites" trains it on rasbt's pairs; worth is the held-out pairs' margin in nats, KL what the trainer logs of them.

Adds what is missing to benchmarks/results/quality_<device>.json, run by run, and prints mean ± standard deviation over
seeds, and the difference to the full adapter with its 95 % interval over held-out items and seeds.
"""

import argparse
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import trl
from datasets import Dataset, disable_progress_bars
from objectives import commit
from peft import LoraConfig
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)

from dpo_peft import DPOConfig, DPOTrainer, answer_only, from_alpaca, quickstart
from dpo_peft.artifacts.card import framework_versions
from dpo_peft.model.base import load_base, nf4_config
from dpo_peft.model.rebuilding import keep_weights
from dpo_peft.quickstart.sampling import sample_answers, sampled_kl

Run = dict[str, Any]
HALVES = ["upper_half", "answer_only_upper_half"]
TOKENS = {"quickstart": 96, "sentiment": 32}  # of a sampled completion
LOSSES: dict[str, Run] = {
    "ipo": {"loss_type": ["ipo"], "beta": 0.1},
    "kto": {"loss_type": ["kto"], "unpair_preferences": True},
    "simpo": {"loss_type": ["simpo"], "beta": 2.0, "simpo_gamma": 1.0},
}
ADAPTERS = ["full", "answer_only", *HALVES, *(f"{half}_at_twice_the_rate" for half in HALVES), "control"]
VARIANTS = [*ADAPTERS, *LOSSES, "trl"]  # trl: its trainer, as "full"
# Two-sided 95 % quantiles of Student's t by degrees of freedom.
QUANTILES = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 8: 2.306, 12: 2.179, 20: 2.086, 40: 2.021}
PLACES = [
    *(
        "the harbor hotel",
        "the new noodle bar",
        "the museum of clocks",
        "a guided walk in the old town",
        "the night bus",
    ),
    *("the corner bakery", "a cooking class", "the repair shop on Mill Lane", "the open-air cinema", "the city pool"),
    *("a weekend on the farm", "the second-hand bookshop", "the ferry to the islands", "a jazz evening", "the zoo"),
    *("the new phone", "this pair of boots", "the folding bicycle", "a garden chair", "the coffee machine"),
    *("the documentary on bees", "this detective novel", "the puzzle game", "a course on bread", "the mountain hut"),
]
OPENINGS = [
    *("We tried {} last week, and", "About {} I can say that", "After all the talk about {}, I", "So here is {}:"),
    *("My sister gave me {} for my birthday, and", "I had waited a year for {}, then", "Let me tell you about {}."),
    *("I had not expected that {}", "What I remember of {} is", "Nobody warned me that {}", "For the price, {}"),
    *("It was raining when we came to {}, and", "I went back to {} because", "If you are thinking of {}, then"),
]


class Task(NamedTuple):
    """Says how a task is trained and judged."""

    judged: tuple[int, ...]  # after these steps; the last one ends the training
    pairs: int  # a step
    rate: float
    beta: float
    held_out: int  # pairs
    levels: tuple[float, ...]  # of KL, in nats a completion, at which the frontiers are compared


TASKS = {
    "quickstart": Task((12, 20, 32), 8, 6e-4, 0.5, 128, (0.7, 2.0)),
    "sentiment": Task((8, 16, 24), 8, 3e-4, 0.1, 64, (1.0, 4.0)),
    "rewrites": Task((4, 8), 4, 5e-4, 0.1, 56, (0.5,)),
}


def adapter(variant: str, layers: int, tokenizer: PreTrainedTokenizerBase) -> LoraConfig:
    """Returns the adapter of a variant, for a model of so many layers."""
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    if variant == "control":
        config.r, config.lora_alpha, config.layers_to_transform = 1, 2, list(range(layers // 4))
    if "upper_half" in variant:
        config.layers_to_transform = list(range(layers // 2, layers))
    if variant.startswith("answer_only"):
        config.alora_invocation_tokens = answer_only(tokenizer)
    return config


def read_pairs(task: str, data: str, held_out: int) -> tuple[list[Run], list[Run]]:
    """Returns the rows of a task to train on and those held out, no prompt in both."""
    if task == "quickstart":
        files = [Path(file).read_text("utf-8") for file in (quickstart.train_file(), quickstart.test_file())]
        # A sampled completion in each file opens a turn itself, where an answer-only adapter would begin anew.
        lines = ([line for line in file.splitlines() if "<|im_start|>" not in line] for file in files)
        train, test = ([json.loads(line) for line in one] for one in lines)
        return train, test[:held_out]
    if task == "sentiment":
        rows = json.loads(Path(data).read_text("utf-8"))
        return rows["train"], rows["test"][:held_out]
    found = [from_alpaca(row) for row in json.loads(Path(data).read_text("utf-8")) if row["chosen"] != row["rejected"]]
    random.Random(0).shuffle(found)
    asked = [row["prompt"] for row in found[:held_out]]
    return [row for row in found if row["prompt"] not in asked], found[:held_out]


def vader() -> Callable[[str], float]:
    """Returns the lexicon's judgment of a text's mood, from -1 to 1 (Hutto and Gilbert 2014)."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()
    return lambda text: analyzer.polarity_scores(text)["compound"]


def draw_pairs(file: Path, model: str, device: str) -> None:
    """Writes the rows of "sentiment": the best and the worst of four completions of the model, by their mood."""
    asked = [f"Continue this review in two sentences: {one.format(place)}" for one in OPENINGS for place in PLACES]
    random.Random(0).shuffle(asked)
    prompts, score = [[{"role": "user", "content": text}] for text in asked], vader()
    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(device).eval()
    drawn = [sample_answers(base, tokenizer, prompts, seed, TOKENS["sentiment"]) for seed in range(4)]
    texts = [tokenizer.batch_decode(answers, skip_special_tokens=True) for answers in zip(*drawn, strict=True)]
    rows = []
    for prompt, four in zip(prompts, texts, strict=True):
        ranked = sorted(four, key=score)
        sides = {"chosen": ranked[-1], "rejected": ranked[0]}
        if score(ranked[-1]) > score(ranked[0]):
            rows.append({"prompt": prompt, **{k: [{"role": "assistant", "content": v}] for k, v in sides.items()}})
    held_out = TASKS["sentiment"].held_out
    file.write_text(json.dumps({"train": rows[3 * held_out :], "test": rows[: 3 * held_out]}, indent=0), "utf-8")


class Judge(TrainerCallback):
    """Judges the policy along the training, whose time it takes without its own.

    Args:
        trainer: ours or TRL's.
        judged: steps.
        task: its name.
        prompts: of the held-out rows.
        seed: of the samples.
    """

    def __init__(self, trainer: Any, judged: list[int], task: str, prompts: list[Any], seed: int):
        self.trainer, self.judged, self.task, self.seed, self.points = trainer, judged, task, seed, list[Run]()
        self.prompts = quickstart.eval_prompts()[:128] if task == "quickstart" else prompts
        self.reward = quickstart.true_reward if task == "quickstart" else vader() if task == "sentiment" else None
        self.clock = time.process_time if trainer.args.use_cpu else time.perf_counter
        self.seconds, self.began = 0.0, 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.began = self.clock()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds += self.clock() - self.began
        trainer, point = self.trainer, {"step": state.global_step, "seconds": round(self.seconds, 1)}
        if state.global_step not in self.judged:
            return
        model, tokenizer, last = trainer.model, trainer.processing_class, state.global_step == self.judged[-1]
        if isinstance(trainer, DPOTrainer) and trainer.objective.kind.paired and (last or self.reward is None):
            output = trainer.predict(trainer.eval_dataset)
            chosen, rejected = (torch.as_tensor(output.predictions) / trainer.beta).T
            point["kl"] = output.metrics.get("test_kl")
            point["length_balanced"] = output.metrics.get("test_accuracies/length_balanced")
            point["margins"] = packed(chosen - rejected)
        if self.reward is not None:
            model.eval()
            answers = sample_answers(model, tokenizer, self.prompts, 1 + self.seed, TOKENS[self.task])
            texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
            point["kl"] = sampled_kl(model, tokenizer, self.prompts, answers)
            point["words"] = statistics.mean(len(text.split()) for text in texts)
            if self.task == "quickstart":
                point["fluency"] = quickstart.known_trigram_share(texts)
            point["rewards"] = packed(torch.tensor([self.reward(text) for text in texts]))
            model.train()
        self.points.append(point)


def packed(values: Tensor) -> str:
    return " ".join(f"{value:.2f}" for value in values.tolist())


def unpacked(text: str) -> Tensor:
    return torch.tensor([float(word) for word in text.split()], dtype=torch.float64)


def measure(args: argparse.Namespace, variant: str, seed: int) -> Run:
    """Trains one variant, and judges it along the way."""
    task, bundled = TASKS[args.task], args.task == "quickstart"
    model, judged = quickstart.model_path() if bundled else args.model, [args.times * step for step in task.judged]
    train, test = read_pairs(args.task, args.data, args.times * task.held_out)
    shared = {
        "output_dir": tempfile.mkdtemp(),
        "beta": task.beta,
        "max_steps": judged[-1],
        "per_device_train_batch_size": task.pairs,
        "per_device_eval_batch_size": 32,
        "learning_rate": task.rate * (2 if variant.endswith("twice_the_rate") else 1),
        "lr_scheduler_type": "cosine",
        "warmup_steps": judged[-1] // 8,
        "seed": seed,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": args.device == "cpu",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    layers, tokenizer = AutoConfig.from_pretrained(model).num_hidden_layers, AutoTokenizer.from_pretrained(model)
    rows, peft_config = Dataset.from_list(train[: judged[-1] * task.pairs]), adapter(variant, layers, tokenizer)
    trainer: Any
    if variant == "trl":
        set_seed(seed)
        base = load_base(model, nf4_config(torch.float32), init_kwargs={"dtype": "float32"})
        keep_weights(base.to(args.device))
        how = {"args": trl.DPOConfig(**shared), "processing_class": tokenizer, "peft_config": peft_config}
        trainer = trl.DPOTrainer(base, train_dataset=rows, **how)
    else:
        loaded = {"model_init_kwargs": {"dtype": "float32"}}
        config = DPOConfig(**{**shared, **loaded, **LOSSES.get(variant, {})})
        evaluated = None if variant == "kto" else Dataset.from_list(test)
        trainer = DPOTrainer(model, args=config, train_dataset=rows, eval_dataset=evaluated, peft_config=peft_config)
    judge = Judge(trainer, judged, args.task, [row["prompt"] for row in test], seed)
    trainer.add_callback(judge)
    trainer.train()
    return {"points": judge.points, "commit": commit()}


def interval(values_SI: Tensor) -> tuple[float, float]:
    """Returns the mean and the half width of its 95 % interval, when other seeds and other items might be drawn.

    The variances of the mean by seeds and by items are added, which counts what is of neither twice: the interval is
    rather too wide. Degrees of freedom are Satterthwaite's, rounded down.
    """
    means = [m for m in (values_SI.mean(1), values_SI.mean(0)) if len(m) > 1]  # a KL is no item's
    parts = [float(m.var() / len(m)) for m in means]
    if not sum(parts):
        return float(values_SI.mean()), 0.0
    freedom = sum(parts) ** 2 / sum(part**2 / (len(m) - 1) for part, m in zip(parts, means, strict=True))
    quantile = next(q for df, q in reversed(QUANTILES.items()) if df <= freedom + 1e-9)
    return float(values_SI.mean()), quantile * sum(parts) ** 0.5


def worth(point: Run) -> Tensor:
    """Returns what a point is good for, by held-out items: true rewards, or margins in nats."""
    return unpacked(point["rewards"] if "rewards" in point else point["margins"])


def at_level(points: list[Run], level: float) -> Tensor | None:
    """Returns the items' worth where the frontier first reaches a KL, if it does: linear in the root of the KL."""
    for low, high in zip(points, points[1:], strict=False):
        if low["kl"] <= level <= high["kl"]:
            start, end, here = max(low["kl"], 0.0) ** 0.5, high["kl"] ** 0.5, level**0.5
            return worth(low) + (worth(high) - worth(low)) * (here - start) / (end - start)
    return None


def at_time(points: list[Run], seconds: float) -> Tensor | None:
    """Returns the items' worth after so many seconds of training, if they were judged before and after: linear."""
    for first, then in zip(points, points[1:], strict=False):
        if first.get("seconds", math.inf) <= seconds <= then["seconds"]:
            share = (seconds - first["seconds"]) / (then["seconds"] - first["seconds"])
            return worth(first) + (worth(then) - worth(first)) * share
    return None


def measures(levels: tuple[float, ...]) -> dict[str, Callable[[list[Run]], Tensor | None]]:
    """Returns what is compared: name to a function of a run's points that gives values by item, or None."""
    return {
        "accuracy": lambda run: (unpacked(run[-1]["margins"]).sign() + 1) / 2 if "margins" in run[-1] else None,
        "length_balanced": lambda run: (
            torch.tensor([v]) if (v := run[-1].get("length_balanced")) is not None else None
        ),
        "seconds": lambda run: torch.tensor([v]) if (v := run[-1].get("seconds")) is not None else None,
        "kl": lambda run: torch.tensor([run[-1]["kl"]]),
        "worth": lambda run: worth(run[-1]),
        **{f"worth at KL {level:g}": partial(at_level, level=level) for level in levels},
    }


def summarize(runs: dict[str, Run]) -> dict[str, Run]:
    """Returns by task and variant the measures: mean and standard deviation over seeds, and the difference to `full`
    with the same seeds, with the half width of its interval."""
    by: dict[str, dict[str, list[Run]]] = {}
    for key, run in runs.items():
        by.setdefault(key.rpartition("/")[0], {})[key.rpartition("/")[2]] = run["points"]
    summary: dict[str, Run] = {}
    for name in sorted(by, key=lambda name: (name.split("/")[0], VARIANTS.index(name.split("/")[1]))):
        full = by.get(f"{name.partition('/')[0]}/full", {})
        asked, ends = measures(TASKS[name.partition("/")[0]].levels), [p[-1].get("seconds") for p in full.values()]
        if ends and None not in ends:
            asked["worth in the time of full"] = partial(at_time, seconds=min(ends))
        for measure_name, of in asked.items():
            found = {seed: items for seed, points in by[name].items() if (items := of(points)) is not None}
            if not found:
                continue
            means = [float(items.mean()) for items in found.values()]
            line = {"seeds": len(means), "mean": statistics.mean(means)}
            line |= {"std": statistics.stdev(means)} if len(means) > 1 else {}
            pairs = [(items, of(full[seed])) for seed, items in found.items() if seed in full]
            beside = [items - others for items, others in pairs if others is not None]
            if len(beside) > 1 and not name.endswith("/full"):
                line["difference"], line["half_width"] = interval(torch.stack(beside))
            summary.setdefault(name, {})[measure_name] = {word: round(value, 4) for word, value in line.items()}
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="quickstart")
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--model", default="", help="folder of SmolLM2-135M-Instruct, but for the quickstart")
    parser.add_argument("--data", default="", help="rows of rewrites, or of sentiment, which are drawn if missing")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--times", type=int, default=1, help="as many steps and held-out pairs, in an own file")
    parser.add_argument("--show", action="store_true", help="measure nothing: summarize what is there")
    args = parser.parse_args()
    disable_progress_bars()
    file = Path(__file__).parent / f"results/quality_{args.device}{f'_{args.times}' if args.times > 1 else ''}.json"
    results = json.loads(file.read_text("utf-8")) if file.is_file() else {"runs": {}}
    if args.task == "sentiment" and not Path(args.data).is_file():
        draw_pairs(Path(args.data), args.model, args.device)
    for variant, seed in [(variant, seed) for seed in args.seeds for variant in args.variants if not args.show]:
        key = f"{args.task}/{variant}/{seed}"
        if key not in results["runs"]:
            run = results["runs"][key] = measure(args, variant, seed)
            print(key, [(p["step"], p["kl"], float(worth(p).mean())) for p in run["points"]], flush=True)
            file.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    results |= {"summary": summarize(results["runs"]), "versions": framework_versions()}
    file.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    print(json.dumps(results["summary"], indent=1))


if __name__ == "__main__":
    main()
