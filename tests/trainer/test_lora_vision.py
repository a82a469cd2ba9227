"""`lora_vision` in training: one loss in every layout, and what has no effect is refused."""

from pathlib import Path
from typing import Any

import pytest
import vision_models as vm
import vision_processors as vp

from dpo_peft import DPOConfig, DPOTrainer, OptionError
from dpo_peft.forward.images import encoder_parts


def train(folder: Path, **options: Any) -> tuple[list[float], DPOTrainer]:
    base: dict[str, Any] = dict(max_steps=3, per_device_train_batch_size=2, logging_steps=1, learning_rate=1e-2)
    base |= dict(output_dir=str(folder), save_strategy="no", report_to=[], use_cpu=True, bf16=False)
    args = DPOConfig(**{**base, **options})
    rows, processor = vp.picture_pairs(8, images=2), vp.build_processor("qwen3_vl")
    model = vm.build("qwen3_vl", noise=0.05)
    trainer = DPOTrainer(model=model, args=args, train_dataset=rows, processing_class=processor)
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log], trainer


def test_losses_do_not_depend_on_the_layout(tmp_path: Path) -> None:
    text_only, _ = train(tmp_path / "text")
    losses, trainer = train(tmp_path / "fused", lora_vision=True)
    assert trainer.forward_plan.fused, trainer.forward_plan.unfused
    of_tower = [p for part in encoder_parts(trainer.model.get_base_model()) for p in part.parameters()]
    assert any(p.requires_grad for p in of_tower)
    assert losses[0] == pytest.approx(text_only[0], abs=1e-6) and abs(losses[1] - text_only[1]) > 1e-3
    for name, options in {
        "rows": {"share_prompts": False},
        "own": {"fused_layers": False, "gradient_checkpointing": True},
        "small": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    }.items():
        others, _ = train(tmp_path / name, lora_vision=True, **options)
        assert others == pytest.approx(losses, abs=2e-5), name


def test_what_would_have_no_effect_is_refused(tmp_path: Path) -> None:
    reentrant = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(OptionError, match="use_reentrant=True adapters in a tower may get no gradient"):
        train(tmp_path, lora_vision=True, **reentrant)
    args = DPOConfig(output_dir=str(tmp_path), lora_vision=True, report_to=[], use_cpu=True, bf16=False)
    rows, processor = vp.picture_pairs(2).remove_columns("images"), vp.build_processor("qwen3_vl")
    tokenizer = processor.tokenizer
    tokenizer.chat_template = processor.chat_template
    for given in (tokenizer, processor):
        with pytest.raises(OptionError, match="lora_vision=True, and there are no images"):
            DPOTrainer(model=vm.build("qwen3_vl"), args=args, train_dataset=rows, processing_class=given)
