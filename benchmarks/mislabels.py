"""Are wrong labels found? Pairs of the quickstart with a share of the labels turned on purpose, cross-fitted.

    python benchmarks/mislabels.py [--rows 240 --folds 3 --repeats 1] [--seeds 0 1 2] [--shares 0 0.1 0.2]

For each seed and share, `dpo-peft data --cross_fit` in the same process: adapters of the bundled model in NF4 are
trained on all folds but one and score that one. Precision is the share of the rows called mislabelled that were
turned, recall the share of the turned ones that are called so. Adds each run to benchmarks/results/mislabels.json as
it ends, and prints it; runs that are there already are kept.
"""

import argparse
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

from dpo_peft import DPOConfig, DPOTrainer, quickstart
from dpo_peft.preview.crossfit import cross_fit
from dpo_peft.preview.labels import judge

RESULTS = Path(__file__).parent / "results" / "mislabels.json"
OPTIONS: dict[str, Any] = {"beta": 0.1, "learning_rate": 1e-3, "num_train_epochs": 1, "max_length": 256}
OPTIONS |= {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 32, "cache_ref_log_probs": True}


def turned(number: int, share: float, seed: int) -> tuple[Dataset, np.ndarray]:
    """Returns the first pairs, and (N,) bool: which of them have their labels turned."""
    lines = Path(quickstart.train_file()).read_text("utf-8").splitlines()[:number]
    flipped = set(random.Random(seed).sample(range(number), round(share * number)))
    rows = []
    for i, line in enumerate(lines):
        row = json.loads(line)
        sides = ("chosen", "rejected")[:: -1 if i in flipped else 1]
        rows.append({"prompt": row["prompt"], **dict(zip(sides, (row["chosen"], row["rejected"]), strict=True))})
    return Dataset.from_list(rows), np.isin(np.arange(number), list(flipped))


def run(number: int, share: float, seed: int, folds: int, repeats: int, store: str) -> dict[str, Any]:
    """Cross-fits one set, and says what was found of what was turned."""
    started = time.process_time()
    rows, turned_N = turned(number, share, seed)
    config = DPOConfig(
        output_dir=tempfile.mkdtemp(dir=store),
        seed=seed,
        ref_cache_dir=store,
        model_init_kwargs={"dtype": "float32"},
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **OPTIONS,
    )
    torch.manual_seed(0)
    trainer = DPOTrainer(quickstart.model_path(), args=config, train_dataset=rows)
    margins_RN = cross_fit(trainer, folds, repeats, seed)
    found = judge(margins_RN)
    hits, called = int((found.mislabelled_N & turned_N).sum()), int(found.mislabelled_N.sum())
    ranks = np.argsort(found.margin_N)[: turned_N.sum()]
    return {
        "turned": int(turned_N.sum()),
        "called": called,
        "precision": hits / called if called else None,
        "recall": hits / int(turned_N.sum()) if turned_N.any() else None,
        "estimated_share": found.flipped,
        "turned_among_as_many_lowest": float(turned_N[ranks].mean()) if turned_N.any() else None,
        "accuracy": float((found.margin_N > 0).mean()),
        "accuracy_on_true_labels": float(((found.margin_N > 0) ^ turned_N).mean()),
        "cpu_seconds": round(time.process_time() - started, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=240)
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.0, 0.2])
    args = parser.parse_args()
    disable_progress_bars()
    setup = {"rows": args.rows, "folds": args.folds, "repeats": args.repeats, "options": OPTIONS}
    kept = json.loads(RESULTS.read_text("utf-8")) if RESULTS.is_file() else {}
    runs = kept["runs"] if kept.get("setup") == setup else {}
    with tempfile.TemporaryDirectory() as store:
        for seed in args.seeds:
            for share in args.shares:
                if (name := f"share {share:g}, seed {seed}") not in runs:
                    runs[name] = run(args.rows, share, seed, args.folds, args.repeats, store)
                    RESULTS.write_text(json.dumps({"setup": setup, "runs": runs}, indent=2) + "\n", "utf-8")
                print(name, json.dumps(runs[name]), flush=True)


if __name__ == "__main__":
    main()
