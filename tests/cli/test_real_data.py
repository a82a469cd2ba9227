"""Twenty steps of `dpo-peft train` on real judgments of every kind, and what held-out rows say afterwards.

The bundled model has seen nothing like these texts; the rows are held out of the same set. A run passes when the
held-out loss is below its start, and better answers have the higher reward on average.
"""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest

from dpo_peft import quickstart
from dpo_peft.cli import train as cli

pytestmark = pytest.mark.slow


def rows_of(file: Path) -> list[dict[str, Any]]:
    with gzip.open(file, "rt") if file.suffix == ".gz" else open(file, encoding="utf-8") as stream:
        return json.load(stream) if file.suffix == ".json" else [json.loads(line) for line in stream]


# File, rows to use (None: all), of them held out, options.
RUNS: dict[str, tuple[str, int | None, int, dict[str, Any]]] = {
    "ranked lists, best against the rest": (
        "oasst-ranked-zh/oaast_rm_zh.json",
        None,
        40,
        {"dataset_format": "alpaca", "loss_type": "multi_negative", "per_device_train_batch_size": 8},
    ),
    "ranked lists, whole order": (
        "oasst-en-tree/en_100_tree.jsonl",
        None,
        20,
        {"dataset_format": "oasst_tree", "loss_type": "plackett_luce", "per_device_train_batch_size": 8},
    ),
    "ties and graded labels": (
        "tulu-human-eval/tulu1_human_eval.jsonl",
        None,
        100,
        {"dataset_format": "tulu"},
    ),
    "single judged completions": (
        "llama-factory-demo/kto_en_demo.json",
        None,
        100,
        {"loss_type": "kto", "beta": 0.5, "max_length": 256, "per_device_train_batch_size": 32},
    ),
    "conversations": (
        "hh-harmless-base-test/test.jsonl.gz",
        600,
        100,
        {"dataset_format": "hh", "loss_type": "trajectory", "discount_gamma": 0.9},
    ),
}
OPTIONS: dict[str, Any] = {
    "model_name_or_path": quickstart.model_path(),
    "max_steps": 20,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 32,
    "learning_rate": 3e-5,
    "lr_scheduler_type": "constant",
    "max_length": 128,
    "truncation_mode": "keep_end",
    "max_unusable_share": 0.9,
    "eval_strategy": "steps",
    "eval_steps": 20,
    "eval_on_start": True,
    "use_cpu": True,
    "bf16": False,
    "dtype": "float32",
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
}


@pytest.mark.sampled(99, slow=4)
@pytest.mark.parametrize("name", RUNS)
def test_real_judgments(name: str, data_dir: Path, tmp_path: Path) -> None:
    path, use, held_out, options = RUNS[name]
    rows = rows_of(data_dir / path)[:use]
    random.Random(0).shuffle(rows)
    files = {"dataset_name": rows[held_out:], "eval_dataset_name": rows[:held_out]}
    for option, part in files.items():
        (tmp_path / f"{option}.jsonl").write_text("\n".join(map(json.dumps, part)) + "\n", encoding="utf-8")
    given = {**OPTIONS, **{o: tmp_path / f"{o}.jsonl" for o in files}, "output_dir": tmp_path / "out", **options}
    trainer = cli.train([word for option, value in given.items() for word in (f"--{option}", str(value))])

    before, *_, after = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert trainer.state.global_step == 20
    assert before["eval_rewards/accuracies"] == 0.5 and before["eval_rewards/margins"] == 0
    assert after["eval_loss"] < before["eval_loss"] - 0.005
    assert after["eval_rewards/margins"] > 0.02 and after["eval_rewards/accuracies"] > 0.5
    # Every row is accounted for.
    for report in trainer.data_reports.values():
        assert report.kept_rows + report.dropped_total == report.source_rows
