"""What the tests of fingerprints and identities share: small changes, adapters of each kind, a quantized base."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from dpo_peft.model.loading import keep_weights

WRAPPINGS: dict[str, dict[str, Any]] = {
    "linear": {},
    "dora": dict(use_dora=True),
    "embedding and head": dict(target_modules=["embed_tokens", "lm_head", "q_proj"]),
    "saved modules": dict(target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"]),
    "trained tokens": dict(trainable_token_indices=[5, 9]),
    "lora_bias": dict(lora_bias=True),
}


def flip_one_bit(t: Tensor) -> None:
    data = t.detach().view(-1).view(torch.uint8)
    data[len(data) // 2] ^= 1


def swap(a: nn.Module, b: nn.Module) -> None:
    a.weight, b.weight = b.weight, a.weight


def quantized(folder: Any, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A saved model in NF4 with double quantization, by transformers alone."""
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, **options}
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, **options)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config)
    keep_weights(model)
    return model
