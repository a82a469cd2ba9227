"""Are wrong labels found? Pairs of which some have wrong labels, cross-fitted as `dpo-peft data --cross_fit` does.

    python benchmarks/mislabels.py --rows 96 --folds 2                                   # the quickstart's pairs
    python benchmarks/mislabels.py --name rasbt --data FILE --model FOLDER --rows 160    # others, and another model
    python benchmarks/mislabels.py --name pandalm --data testset-v1.json --model FOLDER --shares 0 dissent

Adapters are trained on all folds but one and score that one, for each seed and each share of labels that are turned
on purpose (0.5: coin flips). "dissent" turns none at random: where two of PandaLM's three annotators contradict the
third, the label is the third one's. Rows are drawn among those of at most --tokens. Precision is the share of the rows
called mislabelled that were turned, recall the share of the turned ones that are called so; `auc` is the probability
that a turned row has a lower margin than another one. Beside the adapters the same is computed of two margins without
training: the log-prob per token by the model as it is, and the length, in the direction that agrees with more labels.
`doubt` is the auc of rows that people doubt instead of turned ones: PandaLM's annotators disagree, Tulu's said
"slightly better". Writes benchmarks/results/mislabels[_NAME].json; --store keeps margins for another call.
"""

import argparse
import gzip
import json
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from transformers import AutoConfig, AutoTokenizer

from dpo_peft import DPOConfig, DPOTrainer, prepare_dataset, quickstart
from dpo_peft.data.collator import PreferenceCollator, with_keys
from dpo_peft.forward.layout import PackedBatch
from dpo_peft.model.scope import layer_numbers
from dpo_peft.preview.crossfit import cross_fit
from dpo_peft.preview.labels import judge
from dpo_peft.training.tally import Z, wilson

RESULTS = Path(__file__).parent / "results"
OPTIONS: dict[str, Any] = {"beta": 0.1, "num_train_epochs": 1, "max_length": 256, "per_device_train_batch_size": 8}
OPTIONS |= {"per_device_eval_batch_size": 32, "cache_ref_log_probs": True}
LINEAR = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
Array = np.ndarray[Any, Any]
Rows = list[dict[str, Any]]


def read(file: str) -> Rows:
    """Reads JSON, or JSON lines; PandaLM's six rows with `true` for an answer are left out."""
    text = (gzip.open if file.endswith(".gz") else open)(file, "rt", encoding="utf-8").read()
    rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
    return [row for row in rows if not any(value is True for value in row.values())]


def draw(file: str, model: str, number: int, tokens: int) -> Rows:
    """Returns pairs of token ids, with what people said of them: doubt, and one who contradicts the others."""
    tokenizer, source = AutoTokenizer.from_pretrained(model), read(file)
    options = {"max_length": None, "label_columns": ("preference",), "unneeded_columns": tuple(source[0])}
    prepared, _ = prepare_dataset(Dataset.from_list(source), tokenizer, **options)
    rows = []
    for row in prepared:
        votes = [source[row["row"]].get(f"annotator{n}") for n in (1, 2, 3)]
        ids = dict(zip(("chosen_ids", "rejected_ids"), row["completion_ids"], strict=True))
        doubt = len(set(votes)) > 1 or row.get("preference") == 0.75
        rows.append({"prompt_ids": row["prompt_ids"], **ids, "doubt": doubt, "dissent": {1, 2} <= set(votes)})
        rows = rows[: -1 if row.get("preference") == 0.5 else None]
    rows = [row for row in rows if sum(len(ids) for name, ids in row.items() if name.endswith("ids")) <= tokens]
    return random.Random(0).sample(rows, number)


def turned(rows: Rows, share: str, seed: int) -> Array:
    """Returns (N,) bool: which labels to turn."""
    if share == "dissent":
        return np.array([row["dissent"] for row in rows])
    chosen = random.Random(seed).sample(range(len(rows)), round(float(share) * len(rows)))
    return np.isin(np.arange(len(rows)), chosen)


def fit(rows: Rows, turned_N: Array, args: argparse.Namespace, seed: int) -> dict[str, Array]:
    """Returns the margins of rows whose labels are as given: (R, N) under adapters that did not see them, and (1, N)
    the log-prob per token of the chosen completion less that of the rejected one under the model as it is."""
    sides, pairs = ("chosen_ids", "rejected_ids"), []
    for row, turn in zip(rows, turned_N, strict=True):
        ids = [row[side] for side in (sides[::-1] if turn else sides)]
        pairs.append({"prompt_ids": row["prompt_ids"], **dict(zip(sides, ids, strict=True))})
    config = DPOConfig(
        output_dir=tempfile.mkdtemp(dir=args.store),
        seed=seed,
        ref_cache_dir=str(args.store),
        model_init_kwargs={"dtype": args.dtype},
        learning_rate=args.learning_rate,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **OPTIONS,
    )
    torch.manual_seed(0)
    layers = layer_numbers(args.lora_layers_to_transform, AutoConfig.from_pretrained(args.model).num_hidden_layers)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=LINEAR, layers_to_transform=layers)
    trainer = DPOTrainer(args.model, args=config, train_dataset=Dataset.from_list(pairs), peft_config=lora)
    prepared, collate = trainer.train_dataset, PreferenceCollator()
    found = {"adapters": cross_fit(trainer, args.folds, args.repeats, seed)}
    base = []
    for row in prepared:
        scores = trainer.reference.logps(PackedBatch(**with_keys([row], collate)))
        assert scores is not None
        mean_C = [logp / len(ids) for logp, ids in zip(scores.logps_C.tolist(), row["completion_ids"], strict=True)]
        base.append(mean_C[0] - mean_C[1])
    return found | {"model": np.array([base])}


def auc(margin_N: Array, wrong_N: Array) -> list[float]:
    """Returns the probability that a wrong row has the lower margin, with its 95 % interval (Hanley and McNeil)."""
    low, high = margin_N[wrong_N, None], margin_N[None, ~wrong_N]
    a, n, m = float((low < high).mean() + (low == high).mean() / 2), wrong_N.sum(), (~wrong_N).sum()
    spread = a * (1 - a) + (n - 1) * (a / (2 - a) - a**2) + (m - 1) * (2 * a**2 / (1 + a) - a**2)
    half = Z * float(np.sqrt(spread / (n * m)))
    return [round(value, 3) for value in (a, max(0.0, a - half), min(1.0, a + half))]


def figures(margins_RN: Array, wrong_N: Array, doubt_N: Array) -> dict[str, Any]:
    """Returns what is found by margins of what is wrong, with 95 % intervals."""
    found, margin_N = judge(margins_RN), margins_RN.mean(0)

    def share(part: float, whole: float) -> list[float] | None:
        return [round(value, 3) for value in wilson(part / whole, whole)] if whole else None

    hits, called = int((found.mislabelled_N & wrong_N).sum()), int(found.mislabelled_N.sum())
    return {
        "called": called,
        "precision": share(hits, called),
        "recall": share(hits, int(wrong_N.sum())),
        "estimated_share": round(found.flipped, 3),
        "accuracy": share(float((margin_N > 0).sum()), len(margin_N)),
        "accuracy_on_true_labels": share(float(((margin_N > 0) ^ wrong_N).sum()), len(margin_N)),
        **{name: auc(margin_N, one) for name, one in (("auc", wrong_N), ("doubt", doubt_N)) if one.any()},
    }


def run(rows: Rows, share: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Cross-fits one set, and says what was found of what was turned."""
    started, wrong_N = time.process_time(), turned(rows, share, seed)
    kept = args.store / f"{args.name}-{share}-{seed}.npz"
    if not kept.exists():
        np.savez(kept, **fit(rows, wrong_N, args, seed), seconds=time.process_time() - started)
    stored = np.load(kept)
    sign_N, doubt_N = np.where(wrong_N, -1, 1), np.array([row["doubt"] for row in rows])
    length_N = sign_N * [len(row["chosen_ids"]) - len(row["rejected_ids"]) for row in rows]
    length_N = length_N * (1 if (length_N > 0).sum() >= (length_N < 0).sum() else -1)
    margins = {"adapters": stored["adapters"], "model": stored["model"], "length": length_N[None] * 1.0}
    found = {name: figures(margins_RN, wrong_N, doubt_N) for name, margins_RN in margins.items()}
    return {"turned": int(wrong_N.sum()), "cpu_seconds": round(float(stored["seconds"])), **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="", help="of the data, in the file of results")
    parser.add_argument("--data", default=str(quickstart.train_file()))
    parser.add_argument("--model", default=str(quickstart.model_path()))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--lora_layers_to_transform", help="as of `dpo-peft train`: 0.33 is the upper third")
    parser.add_argument("--tokens", type=int, default=256, help="most in a prompt and both completions")
    parser.add_argument("--rows", type=int, default=240)
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shares", nargs="+", default=["0.1", "0", "0.2"])
    parser.add_argument("--store", type=Path, default=Path(tempfile.mkdtemp()), help="folder of margins, for reuse")
    args = parser.parse_args()
    disable_progress_bars()
    args.store.mkdir(parents=True, exist_ok=True)
    rows = draw(args.data, args.model, args.rows, args.tokens)
    names = "rows tokens folds repeats learning_rate dtype lora_layers_to_transform".split()
    result: dict[str, Any] = {"setup": {name: getattr(args, name) for name in names} | {"options": OPTIONS}}
    result |= {"data": Path(args.data).name, "model": Path(args.model).name, "runs": {}}
    for seed in args.seeds:
        for share in args.shares:
            result["runs"][f"share {share}, seed {seed}"] = found = run(rows, share, seed, args)
            print(share, seed, json.dumps(found), flush=True)
            target = RESULTS / f"mislabels{args.name and '_' + args.name}.json"
            target.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
