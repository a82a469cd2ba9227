"""The routers' auxiliary loss of a mixture of experts: TRL's, step by step, whatever the split into micro-batches."""

from pathlib import Path
from typing import Any

import pytest
import torch
from forward_models import FALLING_BACK, SHARING, build
from trainer_helpers import adapter_weights, id_pairs, largest_difference, lora, ours, step_logs, theirs

from dpo_peft import DPOConfig, OptionError
from dpo_peft.training.accumulation import OptimizerStep

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LOGGED = ["loss", "aux_loss", "rewards/margins"]


def mixture(class_name: str = "Qwen3Moe", **options: Any) -> Any:
    """A tiny mixture of experts whose config declares the loss with a weight that shows."""
    known = [known for known in [*SHARING.values(), *FALLING_BACK.values()] if known[0] == class_name]
    model = build(class_name, {**known[0][1], **options})
    model.config.router_aux_loss_coef = 0.1
    return model


def run(make: Any, tokenizer: Any, folder: Path, class_name: str = "Qwen3Moe", **changed: Any) -> Any:
    changed = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 3e-3, **changed}
    rows = id_pairs(16, vocab=130)
    trainer = make(mixture(class_name), rows, tokenizer, folder, peft_config=lora(target_modules=ATTENTION), **changed)
    trainer.train()
    return trainer


FAMILIES = ["Qwen3Moe", "Olmoe", "Qwen2Moe", "GptOss"]


@pytest.mark.sampled(4, slow=3)
@pytest.mark.parametrize("class_name", FAMILIES)
def test_steps_are_those_of_trl(class_name: str, make_tokenizer: Any, tmp_path: Path) -> None:
    """Four steps of two micro-batches, with checkpointing, and an evaluation; prompts shared, and one row each.

    The control: without the loss the steps are others.
    """
    evaluated = {"eval_dataset": id_pairs(4, seed=1, vocab=130), "eval_strategy": "steps", "eval_steps": 4}
    same = {"gradient_accumulation_steps": 2, "per_device_eval_batch_size": 2, "gradient_checkpointing": True}
    trl = run(theirs, make_tokenizer(), tmp_path / "trl", class_name, **same, **evaluated)
    for share in (True, False):
        own = run(ours, make_tokenizer(), tmp_path / str(share), class_name, share_prompts=share, **same, **evaluated)
        assert own.aux_loss_enabled and trl.aux_loss_enabled and own.router_aux_loss_coef == 0.1
        assert own.forward_plan.shared == share
        assert (own.forward_plan.fused is not None) == (share and class_name in ("Qwen3Moe", "GptOss"))
        assert largest_difference(own, trl, LOGGED) < 2e-6
        last, expected = ([log for log in t.state.log_history if "eval_loss" in log][-1] for t in (own, trl))
        assert last["eval_loss"] == pytest.approx(expected["eval_loss"], abs=2e-6)
        assert last["eval_aux_loss"] == pytest.approx(expected["eval_aux_loss"], abs=2e-6)
    off = run(ours, make_tokenizer(), tmp_path / "off", class_name, router_aux_loss_coef=0.0, **same)
    assert not off.aux_loss_enabled and "aux_loss" not in step_logs(off)[0]
    assert abs(step_logs(off)[0]["loss"] - step_logs(trl)[0]["loss"]) > 0.1
    assert abs(step_logs(off)[-1]["rewards/margins"] - step_logs(trl)[-1]["rewards/margins"]) > 1e-4


@pytest.mark.sampled(2)
@pytest.mark.parametrize("loss_type", ["sigmoid", "kto"])
def test_no_split_changes_the_step(loss_type: str, make_tokenizer: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Two batches of four rows: as they are, cut in two as when memory runs out, and packed within a token budget.

    The control: without the counts of the whole batch a cut one takes another step.
    """
    step = {"max_steps": 1, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "router_aux_loss_coef": 3.0}
    batches = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "loss_type": loss_type}
    original = OptimizerStep._start_over

    def halved(self: OptimizerStep) -> None:
        self.halvings = 1
        original(self)

    def trained(name: str, **changed: Any) -> Any:
        torch.manual_seed(0)
        return run(ours, make_tokenizer(), tmp_path / name, **{**batches, **step, **changed})

    whole, packed = trained("whole"), trained("packed", max_tokens_per_microbatch=40)
    monkeypatch.setattr(OptimizerStep, "_start_over", halved)
    cut = trained("cut")
    assert cut.step._cuts == 1
    for one in (packed, cut):
        assert step_logs(one)[0]["aux_loss"] == pytest.approx(step_logs(whole)[0]["aux_loss"], abs=1e-6)
        assert step_logs(one)[0]["loss"] == pytest.approx(step_logs(whole)[0]["loss"], abs=1e-6)
        for name, weight in adapter_weights(whole).items():
            torch.testing.assert_close(adapter_weights(one)[name], weight, rtol=1e-5, atol=1e-7)
    if loss_type == "sigmoid":
        monkeypatch.setattr(OptimizerStep, "couple", lambda *_: None)
        wrong, right = adapter_weights(trained("wrong")), adapter_weights(whole)
        assert max(float((wrong[name] - weight).abs().max()) for name, weight in right.items()) > 1e-5


def test_without_a_weight_in_the_config_it_is_off_until_given(make_tokenizer: Any, tmp_path: Path) -> None:
    def trainer(**given: Any) -> Any:
        model, rows = build(*SHARING["glm4-moe"]), id_pairs(4, vocab=130)
        given["fused_layers"] = False  # no matter here, and sooner built
        return ours(model, rows, make_tokenizer(), tmp_path, peft_config=lora(target_modules=ATTENTION), **given)

    assert not trainer().aux_loss_enabled
    assert trainer(router_aux_loss_coef=0.5).router_aux_loss_coef == 0.5


def test_it_is_refused_where_it_can_have_no_effect(tiny_llama: Any, make_tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"router_aux_loss_coef=0.1: LlamaForCausalLM is not a mixture of experts"):
        ours(tiny_llama(), id_pairs(4), make_tokenizer(), tmp_path, router_aux_loss_coef=0.1)
    assert not ours(tiny_llama(), id_pairs(4), make_tokenizer(), tmp_path, router_aux_loss_coef=0.0).aux_loss_enabled
    reentrant = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(OptionError, match="use_reentrant=True.*router_aux_loss_coef=0.0"):
        run(ours, make_tokenizer(), tmp_path, **reentrant)
    with pytest.raises(OptionError, match="router_aux_loss_coef=-1"):
        DPOConfig(output_dir=str(tmp_path), router_aux_loss_coef=-1)
