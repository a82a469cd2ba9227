"""How far is a merged model from the adapter's model, by base, dtype, kind of adapter and tied or untied embeddings?

    python benchmarks/merge_drift.py [--smollm2 FOLDER --data dpo_en_demo.json]

Trains short adapters on the bundled model in NF4 by DPO (12 steps of 16 pairs), merges each of them into the
dequantized base and into the original, in float32 and bfloat16, loads the result from disk and compares it on 32
held-out pairs. With `--smollm2` (made by `benchmarks/smollm2_dpo.py --gguf`) also a LoRA and a DoRA on
SmolLM2-135M-Instruct, 5 steps of 2 short pairs of `--data`, LLaMA-Factory's dpo_en_demo.json. No limit is set on the
drift. Writes benchmarks/results/merge_drift.json and prints the table of docs/merging.md.

| GPU  | time on 1 CPU core           |
|------|------------------------------|
| none | 3 minutes, and 9 for SmolLM2 |
"""

import argparse
import json
import platform
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from smollm2_dpo import load_rows
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_peft import DPOConfig, DPOTrainer, quickstart
from dpo_peft.artifacts.card import framework_versions
from dpo_peft.files import read_rows
from dpo_peft.merge.merging import merge_adapter

RESULT = Path(__file__).parent / "results" / "merge_drift.json"
EMBEDDINGS = ["q_proj", "v_proj", "embed_tokens"]
KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "LoRA on embeddings": {"target_modules": EMBEDDINGS},
    "head trained in full": {"modules_to_save": ["lm_head"]},
}


def untied(folder: str, new: Path) -> str:
    """The model with a head of its own, equal to the embeddings."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    model.save_pretrained(new)
    AutoTokenizer.from_pretrained(folder).save_pretrained(new)
    return str(new)


def train(base: str, kind: str, rows: Dataset, folder: Path, **options: Any) -> str:
    """An adapter of `base` in NF4, computed in float32."""
    lora = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **KINDS[kind]}
    trainer = DPOTrainer(
        base,
        args=DPOConfig(
            output_dir=str(folder),
            report_to="none",
            use_cpu=True,
            bf16=False,
            model_init_kwargs={"dtype": "float32"},
            lr_scheduler_type="constant",
            gradient_checkpointing=False,
            save_strategy="no",
            disable_tqdm=True,
            **options,
        ),
        train_dataset=rows,
        peft_config=LoraConfig(**lora),
    )
    trainer.train()
    trainer.save_model()
    return str(folder)


def merges(model: str, tied: bool, kind: str, adapter: str, rows: Dataset, max_rows: int) -> list[dict[str, Any]]:
    found = []
    for onto in ("dequantized", "base16"):
        for dtype in ("float32", "bfloat16"):
            started = time.time()
            with tempfile.TemporaryDirectory() as folder:
                report = merge_adapter(
                    adapter, folder, onto, dtype=dtype, max_drift=1e9, dataset=rows, max_rows=max_rows, device="cpu"
                )
            case = {"model": model, "tied": tied, "kind": kind, "onto": onto, "dtype": dtype}
            found.append(case | {"tied_after": report.tied, **asdict(report.drift), "seconds": time.time() - started})
            print("RESULT", json.dumps(found[-1]), flush=True)
    return found


def bundled(work: Path) -> list[dict[str, Any]]:
    tied = quickstart.model_path()
    train_rows, test_rows = read_rows(quickstart.train_file()), read_rows(quickstart.test_file())
    found = []
    for base in (tied, untied(tied, work / "untied")):
        for kind in KINDS:
            folder = work / f"{kind}-{base == tied}"
            options = {"learning_rate": 3e-4 if kind == "rsLoRA" else 1e-3, "beta": 0.5, "max_steps": 12}
            adapter = train(base, kind, train_rows, folder, per_device_train_batch_size=16, **options)
            found += merges("bundled", base == tied, kind, adapter, test_rows, 32)
    return found


def smollm2(folder: str, data: Path, work: Path, steps: int) -> list[dict[str, Any]]:
    rows = load_rows(data, folder, 200)
    found = []
    for base, kind in ((folder, "LoRA"), (untied(folder, work / "smollm2-untied"), "DoRA")):
        options = {"learning_rate": 3e-4, "max_steps": steps, "max_length": 200}
        adapter = train(base, kind, rows, work / f"smollm2-{kind}", per_device_train_batch_size=2, **options)
        found += merges("SmolLM2-135M-Instruct", base == folder, kind, adapter, rows, 4)
    return found


def table(cases: list[dict[str, Any]]) -> str:
    """A row per adapter; in each cell the mean over tokens and how many greedy completions are the same."""
    columns = [(onto, dtype) for onto in ("dequantized", "base16") for dtype in ("float32", "bfloat16")]
    heads = ["model", "embeddings", "adapter", "adapter moves", *(f"`{onto}`, {dtype}" for onto, dtype in columns)]
    lines = [f"| {' | '.join(heads)} |", "|---|---|---|---:|---:|---:|---:|---:|"]
    found: dict[tuple[str, str, str], dict[tuple[str, str], dict[str, Any]]] = {}
    for c in cases:
        adapter = (c["model"], "tied" if c["tied"] else "untied", c["kind"])
        found.setdefault(adapter, {})[c["onto"], c["dtype"]] = c
    for adapter, merged in found.items():
        cells = [f"{merged['dequantized', 'float32']['adapter_token']:.2f}"]
        for column in columns:
            c = merged[column]
            cells.append(f"{number(c['mean_token'])} ({c['greedy_equal']}/{c['greedy_prompts']})")
        lines.append(f"| {' | '.join([*adapter, *cells])} |")
    return "\n".join(lines)


def number(value: float) -> str:
    return f"{value:.0e}" if value < 1e-4 else f"{value:.2g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", help="folder of the converted model")
    parser.add_argument("--data", type=Path, help="dpo_en_demo.json, for SmolLM2")
    parser.add_argument("--steps", type=int, default=5, help="of SmolLM2's training")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        cases = bundled(Path(work))
        if args.smollm2:
            cases += smollm2(args.smollm2, args.data, Path(work), args.steps)
    result = {"platform": platform.platform(), "versions": framework_versions(), "cases": cases}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(table(cases))


if __name__ == "__main__":
    main()
