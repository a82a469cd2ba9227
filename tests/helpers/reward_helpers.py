"""What the tests of implicit rewards share: short runs that were saved, and rewards by plain transformers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from peft import PeftModel, get_peft_model
from trainer_helpers import lora, options
from transformers import AutoModelForCausalLM

from dpo_peft import DPOConfig, DPOTrainer, quickstart


def bundled_rows(file: str, number: int) -> Any:
    return load_dataset("json", data_files=file, split=f"train[:{number}]")


def train_bundled(folder: Path, steps: int = 8, **changed: Any) -> DPOTrainer:
    """The quickstart's model on its pairs, in NF4, for a few large steps; saved."""
    chosen = {"learning_rate": 1e-3, "beta": 0.5, "max_steps": steps, "per_device_train_batch_size": 16, **changed}
    args = DPOConfig(**options(folder, model_init_kwargs={"dtype": "float32"}, max_length=256, **chosen))
    rows = bundled_rows(quickstart.train_file(), 16 * steps)
    trainer = DPOTrainer(quickstart.model_path(), args=args, train_dataset=rows)
    trainer.train()
    trainer.save_model()
    return trainer


def plain_adapter(base: str, tokenizer: Any, folder: Path, seed: int = 3, **changed: Any) -> str:
    """An adapter of PEFT's own on a base, without a record of ours, whose weights act; saved. Returns its folder."""
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora(**changed))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def plain_logps(model: Any, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> float:
    """Log-prob of a completion from the model's own logits, alone in its batch, summed in float64."""
    ids = torch.tensor([[*prompt_ids, *completion_ids]])
    with torch.no_grad():
        logps = model(input_ids=ids).logits.double().log_softmax(-1)[0]
    first = len(prompt_ids)
    return float(sum(logps[at - 1, ids[0, at]] for at in range(first, ids.shape[1])))


def plain_log_ratio(model: PeftModel, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> float:
    """log(policy / reference), the reference by PEFT's own `disable_adapter`."""
    policy = plain_logps(model, prompt_ids, completion_ids)
    with model.disable_adapter():
        return policy - plain_logps(model, prompt_ids, completion_ids)
