"""Any split of an optimizer batch into micro-batches gives the same step, for every loss of the registry."""

from pathlib import Path
from typing import Any

import pytest
import torch
from objective_rows import NEEDED, rows_for
from trainer_helpers import adapter_weights, ours, step_logs

from dpo_peft.losses import REGISTRY
from dpo_peft.training.accumulation import OptimizerStep

SPLITS = [(8, 1), (4, 2), (2, 4), (1, 8)]
STEP = {"max_steps": 1, "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
MIXES = [
    {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]},
    {"loss_type": ["aot", "sft", "apo_zero"], "ld_alpha": 0.5, "label_smoothing": 0.1},
    {"loss_type": ["sigmoid", "bco_pair"], "use_weighting": True, "learning_rate": 10.0},
]


def one_step(model: Any, tokenizer: Any, rows: Any, folder: Path, split: tuple[int, int], **options: Any) -> Any:
    batch_size, accumulation = split
    trainer = ours(
        model,
        rows,
        tokenizer,
        folder,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        **{**STEP, **options},
    )
    # Away from the reference, where KTO's z_ref is not zero and a sort has something to sort.
    trainer.reference.start_checked = True
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in trainer.model.named_parameters():
            if "lora_B" in name:
                weight.copy_(0.2 * torch.randn(weight.shape, generator=draw))
    trainer.start = adapter_weights(trainer)
    trainer.train()
    return trainer


@pytest.mark.sampled(10, slow=5)
@pytest.mark.parametrize("mix", [{"loss_type": [name], **NEEDED.get(name, {})} for name in REGISTRY] + MIXES, ids=str)
def test_micro_batches_do_not_change_the_step(
    mix: dict[str, Any], tiny_llama: Any, make_tokenizer: Any, tmp_path: Path
) -> None:
    """One SGD step at 8x1, 4x2, 2x4 and 1x8: weights to 1e-6 (above 1, relative), the loss too, and it did step."""
    rows, tokenizer = rows_for(mix["loss_type"][0], 16), make_tokenizer()
    runs = []
    for split in SPLITS:
        torch.manual_seed(0)
        runs.append(one_step(tiny_llama(), tokenizer, rows, tmp_path / str(split), split, **mix))
    whole, logs = adapter_weights(runs[0]), step_logs(runs[0])[0]
    assert max(float((whole[name] - weight).abs().max()) for name, weight in runs[0].start.items()) > 1e-4
    assert "z_ref" not in logs or logs["z_ref"] > 0
    for run in runs[1:]:
        for name, weight in adapter_weights(run).items():
            torch.testing.assert_close(weight, whole[name], rtol=1e-6, atol=1e-6)
        assert abs(step_logs(run)[0]["loss"] - logs["loss"]) < 1e-6 * max(1, abs(logs["loss"]))


@pytest.mark.parametrize("loss", ["aot", "kto"])
def test_the_check_tells_a_coupled_loss_taken_per_micro_batch(
    loss: str, tiny_llama: Any, make_tokenizer: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """Negative control: without the pass over the whole optimizer batch the step changes with its split."""
    monkeypatch.setattr(OptimizerStep, "couple", lambda *_: None)
    rows, tokenizer, weights = rows_for(loss, 16), make_tokenizer(), []
    for split in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        trainer = one_step(tiny_llama(), tokenizer, rows, tmp_path / str(split), split, loss_type=loss)
        weights.append(adapter_weights(trainer))
    assert max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0]) > 1e-5
