"""No speed option changes what is learned: 30 steps beside the plain path, compared by maximum and mean drift.

The plain path: the model's own layers, every row of a step in one batch, nothing checkpointed.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_helpers import id_pairs, ours, step_logs

from dpo_peft import DPOTrainer
from dpo_peft.fused import products as fused

STEPS = 30
COMPARED = ("loss", "rewards/chosen", "rewards/rejected", "logps/chosen", "grad_norm")
OPTIONS: dict[str, dict[str, Any]] = {
    "fused": {},
    "fused, all checkpointed": {"gradient_checkpointing": True, "checkpoint_layers": 2},
    "fused, some checkpointed": {"gradient_checkpointing": True, "checkpoint_layers": 1},
    "fused, small micro-batches": {"max_tokens_per_microbatch": 40},
    "fused, all of it automatic": {
        "max_tokens_per_microbatch": "auto",
        "gradient_checkpointing": True,
        "max_memory_gib": 0.0018,
    },
    "own layers, checkpointed": {"fused_layers": False, "gradient_checkpointing": True},
    "own layers, small micro-batches": {"fused_layers": False, "max_tokens_per_microbatch": 40},
}


def run(model: Any, tokenizer: Any, folder: Path, **options: Any) -> DPOTrainer:
    more = {"max_steps": STEPS, "per_device_train_batch_size": 8, "learning_rate": 2e-3, **options}
    trainer = ours(model, id_pairs(64, seed=4), tokenizer, folder, **more)
    trainer.train()
    return trainer


def drift(a: DPOTrainer, b: DPOTrainer) -> tuple[float, float]:
    """Maximum and mean over steps and metrics, relative to the metric's largest value (at least 1)."""
    far = []
    for name in COMPARED:
        values = torch.tensor([[log[name] for log in step_logs(one)] for one in (a, b)], dtype=torch.float64)
        assert values.shape == (2, STEPS)
        far.append((values[0] - values[1]).abs() / values.abs().max().clamp(min=1.0))
    return float(torch.stack(far).max()), float(torch.stack(far).mean())


@pytest.fixture(scope="module")
def plain(tiny_llama: Any, make_tokenizer: Any, tmp_path_factory: Any) -> DPOTrainer:
    return run(tiny_llama(), make_tokenizer(), tmp_path_factory.mktemp("plain"), fused_layers=False)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", OPTIONS)
def test_thirty_steps_in_float32(
    name: str, plain: DPOTrainer, tiny_llama: Any, make_tokenizer: Any, tmp_path: Path
) -> None:
    logs = step_logs(plain)
    assert logs[0]["loss"] == pytest.approx(0.693147, abs=1e-6) and logs[-1]["loss"] < 0.6
    other = run(tiny_llama(), make_tokenizer(), tmp_path, **OPTIONS[name])
    largest, mean = drift(other, plain)
    assert largest < 2e-5 and mean < 2e-6


def test_a_wrong_gradient_is_noticed(
    plain: DPOTrainer, tiny_llama: Any, make_tokenizer: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """Negative control: a layer's backward that is 1 % off in one place drifts beyond the floor."""
    right = fused.rms_norm_backward
    monkeypatch.setattr(fused, "rms_norm_backward", lambda *args: 1.01 * right(*args))
    largest, mean = drift(run(tiny_llama(), make_tokenizer(), tmp_path), plain)
    assert largest > 1e-4 and mean > 1e-5


@pytest.mark.slow
def test_thirty_steps_in_bfloat16_on_four_bit_weights(base_folder: str, make_tokenizer: Any, tmp_path: Path) -> None:
    """Here the order of rounding differs: the floor is how far two runs of the plain path drift that differ in the
    shape of their micro-batches only."""
    runs = {
        name: run(base_folder, make_tokenizer(), tmp_path / name, bf16=True, **options)
        for name, options in {
            "plain": {"fused_layers": False},
            "split": {"fused_layers": False, "max_tokens_per_microbatch": 40},
            "fused": {},
            "all": {"max_tokens_per_microbatch": 60, "gradient_checkpointing": True, "checkpoint_layers": 1},
        }.items()
    }
    floor, mean_floor = drift(runs["split"], runs["plain"])
    for name in ("fused", "all"):
        largest, mean = drift(runs[name], runs["plain"])
        assert largest < 3 * floor and mean < 3 * mean_floor, (name, largest, floor, mean, mean_floor)
