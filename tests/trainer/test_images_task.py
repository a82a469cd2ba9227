"""A task with a known true reward that only a picture tells: which color, or which shape?

A tiny random model like SmolVLM's, in real NF4, with LoRA on its language model, learns to prefer the right word. Two
equally common words are right as often, so without the picture, or with another row's, accuracy is chance.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from trainer_helpers import lora, options
from transformers import BitsAndBytesConfig, SmolVLMConfig, SmolVLMForConditionalGeneration
from vision_processors import COLORS, SHAPES, build_processor, colored_shape

from dpo_peft import DPOConfig, DPOTrainer

TRAINED, HELD_OUT, BATCH = 3200, 200, 16


def save_model(folder: Path, seed: int) -> str:
    """Saves a random model; its widths are multiples of 64, bitsandbytes' block on a CPU."""
    common = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    vision = dict(**common, image_size=16, patch_size=4)
    text = dict(**common, model_type="llama", num_key_value_heads=2, vocab_size=320, initializer_range=0.1)
    ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config = SmolVLMConfig(text_config={**text, **ids}, vision_config=vision, image_token_id=300, **ids)
    config.vision_config.initializer_range = 0.1
    torch.manual_seed(seed)
    model = SmolVLMForConditionalGeneration(config)
    model.save_pretrained(folder)
    return str(folder)


def make_rows(number: int, seed: int, swapped: bool = False) -> Dataset:
    """Returns pairs; `swapped` gives each row the picture of the row before it."""
    draw = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for _ in range(number):
        color, shape = str(draw.choice(list(COLORS))), str(draw.choice(SHAPES))
        asked, right, words = [("color", color, list(COLORS)), ("shape", shape, list(SHAPES))][draw.integers(2)]
        wrong = str(draw.choice([word for word in words if word != right]))
        answers = {n: [{"role": "assistant", "content": w}] for n, w in (("chosen", right), ("rejected", wrong))}
        picture = colored_shape(color, shape, draw)
        rows.append({"prompt": [{"role": "user", "content": f"{asked}?"}], **answers, "image": picture})
    pictures = [row["image"] for row in rows]
    if swapped:
        pictures = pictures[-1:] + pictures[:-1]
    return Dataset.from_list([{**row, "image": picture} for row, picture in zip(rows, pictures, strict=True)])


def train(folder: Path, seed: int, **changed: Any) -> DPOTrainer:
    changed = {"learning_rate": 5e-3, "warmup_steps": 10, "beta": 0.3, "num_train_epochs": 1, **changed}
    args = options(folder / "out", max_steps=-1, per_device_train_batch_size=BATCH, **changed)
    four_bit = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    trainer = DPOTrainer(
        save_model(folder / "model", seed),
        args=DPOConfig(**{**args, "seed": seed, "per_device_eval_batch_size": 50, "logging_steps": 10}),
        train_dataset=make_rows(TRAINED, seed=10 * seed + 1),
        eval_dataset={"held_out": make_rows(HELD_OUT, 7), "swapped": make_rows(HELD_OUT, 7, swapped=True)},
        processing_class=build_processor("smolvlm"),
        peft_config=lora(r=16, lora_alpha=32, target_modules=r".*text_model.*_proj"),
        quantization_config=BitsAndBytesConfig(**four_bit),
    )
    trainer.train()
    return trainer


@pytest.mark.slow
def test_what_is_seen_is_learned(tmp_path: Path) -> None:
    trainer = train(tmp_path, seed=0)
    assert (
        type(trainer.model.get_base_model().model.text_model.layers[0].mlp.up_proj.base_layer).__name__ == "Linear4bit"
    )
    found = trainer.evaluate()
    assert found["eval_held_out_rewards/accuracies"] >= 0.9
    assert 0.4 <= found["eval_swapped_rewards/accuracies"] <= 0.6
    assert trainer.state.log_history[0]["rewards/accuracies"] < 0.9
