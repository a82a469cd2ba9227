"""The kinds of runs that are killed: what they start from, their options, and how their trainer is built."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from trainer_helpers import id_pairs, lora, ours
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, set_seed

from dpo_peft import quickstart
from dpo_peft.model.loading import load_base

STEPS = 12


@dataclass(frozen=True)
class Scenario:
    """One kind of run to kill."""

    name: str
    lora: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)  # of DPOConfig
    rows: int = 14
    continued: bool = False  # goes on with a trained adapter
    cache: bool = False  # keeps the reference's log-probs in a folder beside the run's


COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "max_steps": STEPS,
    "save_strategy": "steps",
    "save_steps": 3,
    "eval_strategy": "steps",
    "eval_steps": 5,
    "quantize_base": False,
    "model_init_kwargs": {"dtype": "float32"},
    "lr_scheduler_type": "cosine",
}
NF4: dict[str, Any] = {"quantize_base": True, "model_init_kwargs": None, "bf16": True}
DROPOUT = {"disable_dropout": False}  # so that the state of the random numbers counts
SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("float32", {"lora_dropout": 0.1}, DROPOUT),
        Scenario("nf4", {"lora_dropout": 0.1}, {**NF4, **DROPOUT}),
        Scenario("dora", {"use_dora": True, "lora_dropout": 0.1}, DROPOUT),
        Scenario("continued", options={"reference": "initial"}, continued=True),
        Scenario("continued-nf4", options={"reference": "initial", **NF4}, continued=True),
        Scenario("cached", options={"cache_ref_log_probs": True}, rows=10, cache=True),
        Scenario("precomputed", options={"precompute_ref_log_probs": True}, rows=10, cache=True),
        # The last optimizer batch of an epoch is smaller, logs span checkpoints, only the newest checkpoint is kept.
        Scenario(
            "accumulated",
            {"lora_dropout": 0.1},
            {"gradient_accumulation_steps": 2, "logging_steps": 2, "save_total_limit": 1, "eval_steps": 4, **DROPOUT},
            rows=11,
        ),
    )
}


def make_base(folder: Path) -> Path:
    """A random tiny Llama with the quickstart's tokenizer, and a trained adapter of it, saved below `folder`."""
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(quickstart.model_path())
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, initializer_range=0.2, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), lora(r=8))
    for name, parameter in adapted.named_parameters():
        if ".lora_" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(folder / "adapter")
    return folder


def build(scenario: Scenario, base: Path, folder: Path) -> Any:
    """The trainer of a scenario; the same each time."""
    options = {**COMMON, **scenario.options}
    if scenario.cache:
        options["ref_cache_dir"] = str(folder / "cache")
    model: Any = str(base / "base")
    if scenario.continued:
        quantized = options.pop("quantize_base")
        options.pop("model_init_kwargs")
        model = load_base(model, quantize=quantized, init_kwargs={"dtype": "bfloat16" if quantized else "float32"})
        model = PeftModel.from_pretrained(model, base / "adapter", is_trainable=True)
    else:
        options["peft_config"] = lora(r=64, **scenario.lora)  # large enough that saving takes a while
    tokenizer = AutoTokenizer.from_pretrained(base / "base")
    return ours(model, id_pairs(scenario.rows), tokenizer, folder / "run", eval_dataset=id_pairs(5, seed=9), **options)
