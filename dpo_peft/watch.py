"""What is watched between micro-batches: a non-finite loss or gradient stops the run before the next step."""

from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .errors import NonFiniteError


class StopWhenNonFinite(TrainerCallback):
    """Before every optimizer step: one look at the losses and gradients of its micro-batches."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self.trainer
        if not trainer.step_finite:
            return
        rows, finite = map(torch.cat, zip(*trainer.step_finite, strict=True))
        trainer.step_finite = []
        all_finite = finite.all()
        # Under fp16 the gradient scaler expects overflows and skips such steps by itself.
        if not args.fp16:
            grads = [p.grad for p in trainer.model.parameters() if p.grad is not None]
            all_finite &= torch.isfinite(torch.nn.utils.get_total_norm(grads))
        if not all_finite:
            bad = rows if finite.all() else rows[~finite]
            what = "gradient" if finite.all() else "loss"
            raise NonFiniteError(
                f"Step {state.global_step + 1}: the {what} is not finite, on training rows "
                f"{', '.join(map(str, bad.tolist()))}. The optimizer has not stepped; the last checkpoint is intact. "
                "Look at these rows, lower learning_rate, or use bf16 instead of fp16."
            )
