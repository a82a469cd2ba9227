"""Is it better? Reward over KL of objectives, adapters that act on less, and TRL's trainer, from the same start.

    python benchmarks/quality.py [--variants full ipo] [--seeds 0 1 2] [--device cuda] [--times 3] [--show]
    python benchmarks/quality.py --task sentiment --model SMOLLM2 [--data pairs.json]
    python benchmarks/quality.py --task labels --model SMOLLM2 --data tulu1_human_eval.jsonl testset-v1.json

Variants have the same rank, steps, order of rows and, but for those that say so, rate; a control that must be worse
(rank 1, lowest quarter of the layers) shows that the measures can tell. A run is judged several times along the way:
worth over KL is its frontier (Rafailov et al. 2023, figure 2), and `seconds` of training until there compare at equal
time (of a CPU its own time, which other work doesn't move). SMOLLM2 is SmolLM2-135M-Instruct, a folder or the GGUF
file of smollm2_dpo.py; it may stand in the environment as SMOLLM2_GGUF, and the folder of data as DPO_PEFT_DATA.

- "quickstart" trains the bundled model; worth is the true reward of a fresh completion to each of 128 prompts.
- "sentiment" trains SmolLM2 in NF4 to go on with reviews in a good mood (the paper's controlled sentiment); worth is
  VADER's compound score (pip install vaderSentiment) of fresh completions to held-out openings. Pairs are the model's
  own: the best and the worst of four samples, drawn once into --data.
- "instructions" trains it on checkable instructions (dpo_peft/suites/instructions.yaml), on pairs of its own where one
  of four samples follows the instruction and one doesn't, the two that are nearest in length; worth is the share of
  held-out instructions that fresh completions follow. Every third kind of them is never trained on, and counted apart.
- "labels" trains it on answers that people compared (Tulu human evaluation, PandaLM's test set, OASST's trees), and
  judges one pair of each held-out prompt: accuracy, what length alone gets, and the length-balanced accuracy.
- "rewrites" trains it on rasbt's pairs; worth is the held-out pairs' margin in nats, KL what the trainer logs of them.

Adds what is missing to benchmarks/results/quality_<device>.json, run by run, and prints mean ± standard deviation over
seeds, and the difference to the full adapter with its 95 % interval over held-out items and seeds.
"""

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset, disable_progress_bars
from objectives import commit
from peft import LoraConfig
from quality_tasks import DRAWN, FILES, TASKS, UNSEEN, Run, draw_pairs, lengths, read_pairs, rewards, vader
from smollm2_dpo import convert
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, TrainerCallback, set_seed

from dpo_peft import DPOConfig, DPOTrainer, answer_only, quickstart
from dpo_peft.artifacts.card import framework_versions
from dpo_peft.model.base import load_base, nf4_config
from dpo_peft.model.rebuilding import keep_weights
from dpo_peft.quickstart.sampling import sample_answers, sampled_kl

HALVES = ["upper_half", "answer_only_upper_half"]
LOSSES: dict[str, Run] = {
    "ipo": {"loss_type": ["ipo"], "beta": 0.1},
    "kto": {"loss_type": ["kto"], "unpair_preferences": True},
    "simpo": {"loss_type": ["simpo"], "beta": 2.0, "simpo_gamma": 1.0},
}
ADAPTERS = ["full", "answer_only", *HALVES, *(f"{half}_at_twice_the_rate" for half in HALVES), "control"]
VARIANTS = [*ADAPTERS, *LOSSES, "trl"]  # trl: its trainer, as "full"
# Two-sided 95 % quantiles of Student's t by degrees of freedom.
QUANTILES = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 8: 2.306, 12: 2.179, 20: 2.086, 40: 2.021}


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


class Judge(TrainerCallback):
    """Judges the policy along the training, whose time it takes without its own.

    Args:
        trainer: ours or TRL's.
        judged: steps.
        task: its name.
        rows: held out.
        seed: of the samples.
    """

    def __init__(self, trainer: Any, judged: list[int], task: str, rows: list[Run], seed: int):
        self.trainer, self.judged, self.task, self.seed, self.points = trainer, judged, task, seed, list[Run]()
        own = quickstart.eval_prompts()[:128] if task == "quickstart" else ()
        self.rows = [{"prompt": prompt} for prompt in own] or rows
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
        sampled, rows = TASKS[self.task].tokens, trainer.eval_dataset
        if rows is not None and (last or not sampled):
            output = trainer.predict(rows)
            chosen, rejected = (torch.as_tensor(output.predictions) / trainer.beta).T
            point["kl"] = output.metrics.get("test_kl")
            point["length_balanced"] = output.metrics.get("test_accuracies/length_balanced")
            point["margins"] = packed(chosen - rejected)
            sides = [[len(ids) for ids in row["completion_ids"]] for row in rows]
            point["longer"] = packed(torch.tensor([better - worse for better, worse in sides]).sign())
        if sampled:
            model.eval()
            prompts = [row["prompt"] for row in self.rows]
            answers = sample_answers(model, tokenizer, prompts, 1 + self.seed, sampled)
            texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
            point["kl"] = sampled_kl(model, tokenizer, prompts, answers)
            point["words"] = statistics.mean(len(text.split()) for text in texts)
            if self.task == "quickstart":
                point["fluency"] = quickstart.known_trigram_share(texts)
            if self.task == "instructions":
                kinds = [json.loads(row["instruction"])["kind"] for row in self.rows]
                point["unseen"] = packed(torch.tensor([float(kind in UNSEEN) for kind in kinds]))
            point["rewards"] = packed(torch.tensor(rewards(self.task, self.rows, texts)))
            model.train()
        self.points.append(point)


def packed(values: Tensor) -> str:
    return " ".join(f"{value:.4g}" for value in values.tolist())


def unpacked(text: str) -> Tensor:
    return torch.tensor([float(word) for word in text.split()], dtype=torch.float64)


def measure(args: argparse.Namespace, variant: str, seed: int) -> Run:
    """Trains one variant, and judges it along the way."""
    task, bundled = TASKS[args.task], args.task == "quickstart"
    model, judged = quickstart.model_path() if bundled else args.model, [args.times * step for step in task.judged]
    train, test = read_pairs(args.task, args.data, args.times * task.held_out, args.device)
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
        evaluated = None if variant == "kto" or "chosen" not in test[0] else Dataset.from_list(test)
        trainer = DPOTrainer(model, args=config, train_dataset=rows, eval_dataset=evaluated, peft_config=peft_config)
    judge = Judge(trainer, judged, args.task, test, seed)
    trainer.add_callback(judge)
    trainer.train()
    return {"points": judge.points, "trained_on": lengths(train[: len(rows)]), "commit": commit()}


def interval(values_SI: Tensor) -> tuple[float, float]:
    """Returns the mean and the half width of its 95 % interval, when other seeds and items might be drawn: of one
    seed other items alone.

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
        if None not in (low["kl"], high["kl"]) and low["kl"] <= level <= high["kl"]:
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


def correct(points: list[Run]) -> Tensor | None:
    """Returns by held-out pairs whether the better completion has the higher implicit reward; half for equal ones."""
    return (unpacked(points[-1]["margins"]).sign() + 1) / 2 if "margins" in points[-1] else None


def length_alone(points: list[Run]) -> Tensor | None:
    """Returns by held-out pairs what "the longer completion is better" would get."""
    return (unpacked(points[-1]["longer"]) + 1) / 2 if "longer" in points[-1] else None


def balanced(points: list[Run]) -> Tensor | None:
    """Returns by held-out pairs what adds up to the length-balanced accuracy: pairs whose better completion is longer
    weigh as much as those whose better one is shorter, and others nothing."""
    if "longer" not in points[-1]:
        return torch.tensor([v]) if (v := points[-1].get("length_balanced")) is not None else None
    sides = [unpacked(points[-1]["longer"]) == sign for sign in (1, -1)]
    weights = sum(side / side.sum() for side in sides) * len(sides[0]) / 2
    return correct(points) * weights if all(map(torch.any, sides)) else None


def of_kinds(points: list[Run], unseen: bool) -> Tensor | None:
    """Returns what a run is worth by held-out instructions of kinds that were trained on, or of the others."""
    if "unseen" not in points[-1]:
        return None
    return worth(points[-1])[unpacked(points[-1]["unseen"]) == unseen]


def measures(levels: tuple[float, ...]) -> dict[str, Callable[[list[Run]], Tensor | None]]:
    """Returns what is compared: name to a function of a run's points that gives values by item, or None."""
    return {
        "accuracy": correct,
        "length alone": length_alone,
        "accuracy beyond length": lambda run: (
            correct(run) - alone if (alone := length_alone(run)) is not None else None
        ),
        "length_balanced": balanced,
        "seconds": lambda run: torch.tensor([v]) if (v := run[-1].get("seconds")) is not None else None,
        "kl": lambda run: torch.tensor([v]) if (v := run[-1]["kl"]) is not None else None,  # SimPO has no reference
        "words": lambda run: torch.tensor([float(v)]) if (v := run[-1].get("words")) is not None else None,
        "worth": lambda run: worth(run[-1]),
        **{f"worth, {kinds} kinds": partial(of_kinds, unseen=kinds == "unseen") for kinds in ("seen", "unseen")},
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
            if (values_SI := torch.stack([*found.values()])).numel() > 1:
                line["own_half_width"] = interval(values_SI)[1]
            pairs = [(items, of(full[seed])) for seed, items in found.items() if seed in full]
            beside = [items - others for items, others in pairs if others is not None]
            if beside and torch.stack(beside).numel() > 1 and not name.endswith("/full"):
                line["difference"], line["half_width"] = interval(torch.stack(beside))
            summary.setdefault(name, {})[measure_name] = {word: round(value, 4) for word, value in line.items()}
    return summary


def inputs(args: argparse.Namespace) -> tuple[str, list[str]]:
    """Returns the model's folder and the files of rows, which are made where they can be."""
    model, data, outputs = Path(args.model), args.data, Path(__file__).parents[1] / "outputs"
    outputs.mkdir(exist_ok=True)
    if args.task != "quickstart" and not args.model:
        raise SystemExit("--model: give a folder or GGUF file of SmolLM2-135M-Instruct (smollm2_dpo.py says how).")
    if model.suffix == ".gguf":
        gguf, model = model, outputs / "smollm2-135m"
        if not model.is_dir():
            convert(gguf, model)
    if args.task == "sentiment":
        vader()  # it may not be installed
    if args.task in DRAWN:
        data = data or [str(outputs / f"quality_{args.task}_{args.device}_{args.times}.json")]
        if not Path(data[0]).is_file():
            draw_pairs(args.task, Path(data[0]), str(model), args.device, args.times)
    folder = Path(os.environ.get("DPO_PEFT_DATA", Path(__file__).parents[2] / "shared" / "data"))
    data = data or [str(folder / file) for file in FILES.get(args.task, ())]
    if missing := [file for file in data if not Path(file).is_file()]:
        raise SystemExit(f"There is no file {missing[0]}: give --data, or DPO_PEFT_DATA, the folder with {FILES}.")
    return str(model), data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="quickstart")
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    model = os.environ.get("SMOLLM2_GGUF", "")
    parser.add_argument("--model", default=model, help="SmolLM2-135M-Instruct: a folder, or the wheel's GGUF file")
    parser.add_argument("--data", nargs="+", default=[], help="of rows; a model's own pairs are drawn if missing")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--times", type=int, default=1, help="as many steps and held-out pairs, in an own file")
    parser.add_argument("--tokens", type=int, help="of a sampled completion; default: few, for a CPU")
    parser.add_argument("--show", action="store_true", help="measure nothing: summarize what is there")
    args = parser.parse_args()
    disable_progress_bars()
    if args.tokens:
        TASKS[args.task] = TASKS[args.task]._replace(tokens=args.tokens)
    file = Path(__file__).parent / f"results/quality_{args.device}{f'_{args.times}' if args.times > 1 else ''}.json"
    results = json.loads(file.read_text("utf-8")) if file.is_file() else {"runs": {}}
    if not args.show:
        args.model, args.data = inputs(args)
    # Without samples it takes held-out pairs, of which there are margins for our trainer and paired rows.
    left_out = () if TASKS[args.task].tokens else ("kto", "trl")
    variants = [] if args.show else [variant for variant in args.variants if variant not in left_out]
    for variant, seed in [(variant, seed) for seed in args.seeds for variant in variants]:
        key = f"{args.task}/{variant}/{seed}"
        if key not in results["runs"]:
            run = results["runs"][key] = measure(args, variant, seed)
            print(key, [(p["step"], p["kl"], float(worth(p).mean())) for p in run["points"]], flush=True)
            file.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    results |= {"summary": summarize(results["runs"]), "versions": framework_versions()}
    file.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    print(json.dumps(results["summary"], indent=1))
    of_task = {name: lines["worth"] for name, lines in results["summary"].items() if name.startswith(args.task)}
    print("RESULT " + json.dumps({"runs": len(results["runs"]), "worth": of_task}))


if __name__ == "__main__":
    main()
