"""What both tests of this folder share: a plain adapter of PEFT's on the tiny model."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from trainer_helpers import lora
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="session")
def make_adapter(
    base_folder: str, make_tokenizer: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., str]:
    """`make_adapter(seed=3, **lora)`: an adapter without a record of ours, whose weights act."""

    def make(seed: int = 3, **options: Any) -> str:
        folder = tmp_path_factory.mktemp("plain")
        torch.manual_seed(seed)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder), lora(**options))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        return str(folder)

    return make


@pytest.fixture(scope="session")
def adapter(make_adapter: Callable[..., str]) -> str:
    return make_adapter()
