"""What the trainer tests share: tiny runs of our trainer and of TRL's on the same rows."""

import random
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from run_figures import TIMED
from transformers import TrainerCallback

from dpo_peft import DPOConfig, DPOTrainer

REWARDS = "loss rewards/chosen rewards/rejected rewards/margins".split()
LOGPS = ["logps/chosen", "logps/rejected"]  # sums that TRL rounds to float32: 6e-5 apart at -500


def lora(**options: Any) -> LoraConfig:
    """A small LoRA on every linear layer."""
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options})


def id_pairs(number: int, seed: int = 0, vocab: int = 270) -> Dataset:
    """Pre-tokenized pairs of random ids, of unequal lengths."""
    draw = random.Random(seed)

    def ids(shortest: int, longest: int) -> list[int]:
        return [draw.randrange(5, vocab) for _ in range(draw.randint(shortest, longest))]

    rows = [{"prompt_ids": ids(2, 12), "chosen_ids": ids(2, 9), "rejected_ids": ids(2, 9)} for _ in range(number)]
    return Dataset.from_list(rows)


def text_pairs(number: int, seed: int = 0) -> Dataset:
    """Pairs of text: a question and a better and a worse answer of random words."""
    draw = random.Random(seed)
    words = "the cat sat on a mat and saw another thing in one old tree while it rained".split()

    def text(shortest: int, longest: int) -> str:
        return " ".join(draw.choice(words) for _ in range(draw.randint(shortest, longest)))

    rows = [
        {"prompt": text(2, 6) + "?", "chosen": " " + text(1, 5), "rejected": " " + text(1, 5)} for _ in range(number)
    ]
    return Dataset.from_list(rows)


def options(folder: Path | str, **changed: Any) -> dict[str, Any]:
    """Options of a short run on the CPU in float32 that logs every step; the same for both trainers."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-3,
        "max_steps": 10,
        "logging_steps": 1,
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "seed": 3,
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        **changed,
    }


def ours(model: Any, rows: Any, tokenizer: Any, folder: Path | str, **changed: Any) -> DPOTrainer:
    """Our trainer, on text as it is, as in TRL; its constructor's arguments in `changed` go there, the rest into
    the config."""
    arguments = {key: changed.pop(key) for key in list(changed) if key in CONSTRUCTOR}
    if not hasattr(model, "peft_config"):
        arguments.setdefault("peft_config", lora())
    args = DPOConfig(**options(folder, **{"as_chat": False, **changed}))
    return DPOTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer, **arguments)


CONSTRUCTOR = (
    "eval_dataset peft_config callbacks optimizers compute_metrics data_collator quantization_config ref_model".split()
)


class IdsTrainer(trl.DPOTrainer):
    """TRL's trainer for rows that are token ids already."""

    def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
        return dataset


def theirs(model: Any, rows: Any, tokenizer: Any, folder: Path | str, **changed: Any) -> trl.DPOTrainer:
    """TRL's trainer with the same arguments; pre-tokenized rows pass its preparation by."""
    arguments = {key: changed.pop(key) for key in list(changed) if key in CONSTRUCTOR}
    arguments.setdefault("peft_config", lora())
    trainer = IdsTrainer if "prompt_ids" in rows.column_names else trl.DPOTrainer
    args = trl.DPOConfig(**options(folder, **changed))
    return trainer(model, args=args, train_dataset=rows, processing_class=tokenizer, **arguments)


def step_logs(trainer: Any) -> list[dict[str, float]]:
    """The training logs, one per step, without times and rates."""
    return [entry for entry in history(trainer) if "loss" in entry]


def largest_difference(a: Any, b: Any, names: list[str] = REWARDS, relative: bool = False) -> float:
    """Between the logs of two trainers, over all steps and the given metrics; `relative` divides by values above 1."""
    logs_a, logs_b = step_logs(a), step_logs(b)
    assert len(logs_a) == len(logs_b) > 0
    values = [(x[name], y[name]) for x, y in zip(logs_a, logs_b, strict=True) for name in names]
    return max(abs(x - y) / (max(1.0, abs(y)) if relative else 1.0) for x, y in values)


def adapter_weights(trainer: Any) -> dict[str, torch.Tensor]:
    """Copies of the trained weights by name."""
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


class StopAt(TrainerCallback):
    """Ends the run after a step, as an interruption after its checkpoint would."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def history(trainer: Any) -> list[dict[str, float]]:
    """The logs without times and rates."""
    timed = (*TIMED, "total_flos")
    return [{k: v for k, v in log.items() if not k.endswith(timed)} for log in trainer.state.log_history]


def optimizer_tensors(trainer: Any) -> list[torch.Tensor]:
    state = trainer.optimizer.state_dict()["state"]
    return [value for index in sorted(state) for _, value in sorted(state[index].items())]
