"""The reference over the life of an adapter: continued, saved, loaded, resumed, synchronised. Traps T5 and T15."""

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from trainer_helpers import adapter_weights, id_pairs, lora, ours, step_logs
from transformers import AutoModelForCausalLM, TrainerCallback, set_seed

from dpo_peft import ReferenceMismatchError
from dpo_peft.reference.fingerprint import read_record
from dpo_peft.reference.frozen_adapter import adapter_tensors


@pytest.fixture(scope="module")
def sft_folder(base_folder, tmp_path_factory) -> str:
    """An adapter that was trained by something else."""
    return save_adapter(base_folder, str(tmp_path_factory.mktemp("sft")), seed=1)


@pytest.fixture(scope="module")
def dpo_folder(base_folder, make_tokenizer, tmp_path_factory) -> str:
    """An adapter that was trained here, against the base."""
    folder = tmp_path_factory.mktemp("dpo")
    trainer = start(base_folder, make_tokenizer, folder, peft_config=lora())
    trainer.train()
    trainer.save_model()
    return str(folder)


def save_adapter(base: str, folder: str, seed: int, name: str = "default") -> str:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora(), adapter_name=name)
    set_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder if name == "default" else f"{folder}/{name}"


def start(model: Any, make_tokenizer: Any, folder: Any, **changed: Any) -> Any:
    options = {"max_steps": 3, "quantize_base": False, "model_init_kwargs": {"dtype": "float32"}, **changed}
    if not isinstance(model, str):
        del options["quantize_base"], options["model_init_kwargs"]
    options.setdefault("peft_config", None)
    return ours(model, id_pairs(8), make_tokenizer(), folder, **options)


def loaded(base: str, adapter: str) -> PeftModel:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter, is_trainable=True)


# ---- Continuing an adapter ------------------------------------------------------------------------------------------


def test_an_adapter_folder_goes_on_against_itself(base_folder, sft_folder, make_tokenizer, tmp_path):
    trainer = start(sft_folder, make_tokenizer, tmp_path)
    incoming = {name: t.clone() for name, t in adapter_tensors(loaded(base_folder, sft_folder), "default").items()}
    assert trainer.reference.adapter is not None
    for adapter in ("default", trainer.reference.adapter):
        tensors = adapter_tensors(trainer.model, adapter)
        assert tensors.keys() == incoming.keys()
        assert all(torch.equal(tensors[name], incoming[name]) for name in incoming)
    trainer.train()
    logs = step_logs(trainer)
    assert logs[0]["loss"] == pytest.approx(0.693147, abs=1e-6) and logs[0]["rewards/margins"] == 0
    assert abs(logs[-1]["rewards/margins"]) > 1e-4
    frozen = adapter_tensors(trainer.model, trainer.reference.adapter)
    assert all(torch.equal(frozen[name], incoming[name]) for name in incoming)
    trainer.save_model()
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(saved) == len(incoming) and not (tmp_path / "reference").exists()  # the policy's adapter alone


@pytest.mark.parametrize("reference", ["base", "another"])
def test_another_reference_than_the_adapter_itself(base_folder, sft_folder, make_tokenizer, tmp_path, reference):
    """Against plain PEFT: the same base with no adapter, or with the other one."""
    other = save_adapter(base_folder, str(tmp_path / "other"), seed=2)
    chosen = "base" if reference == "base" else other
    trainer = start(sft_folder, make_tokenizer, tmp_path / "run", reference=chosen, max_steps=1)
    plain = AutoModelForCausalLM.from_pretrained(base_folder)
    if reference == "another":
        plain = PeftModel.from_pretrained(plain, other)
    trainer.train()
    seen = []
    original = trainer.record
    trainer.record = lambda batch, output, policy, ref: seen.append((batch, policy, ref))
    batch = trainer.collate([trainer.train_dataset[i] for i in range(4)])
    trainer.model.eval()
    trainer.compute_loss(trainer.model, batch)
    trainer.record = original
    (_, _, ref) = seen[0]
    expected = []
    with torch.no_grad():
        for row in (trainer.train_dataset[i] for i in range(4)):
            for completion in row["completion_ids"]:
                ids = torch.tensor([row["prompt_ids"] + completion])
                logps = plain(input_ids=ids).logits[0].log_softmax(-1)
                border = len(row["prompt_ids"])
                expected.append(sum(float(logps[border - 1 + i, t]) for i, t in enumerate(completion)))
    assert ref.logps_C.tolist() == pytest.approx(expected, abs=2e-4)
    assert abs(step_logs(trainer)[0]["rewards/chosen"]) > 1e-3  # no gate: the user chose another reference


@pytest.mark.parametrize("name", ["mine", "reference"])
def test_any_adapter_name(base_folder, make_tokenizer, tmp_path, name):
    folder = save_adapter(base_folder, str(tmp_path / "sft"), seed=1, name=name)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base_folder), folder, adapter_name=name, is_trainable=True
    )
    trainer = start(model, make_tokenizer, tmp_path / "run", save_strategy="steps", save_steps=2)
    trainer.train()
    assert step_logs(trainer)[0]["rewards/margins"] == 0
    again = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base_folder), folder, adapter_name=name, is_trainable=True
    )
    resumed = start(again, make_tokenizer, tmp_path / "run")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    expected = adapter_weights(trainer)
    assert all(torch.equal(weight, expected[key]) for key, weight in adapter_weights(resumed).items())


# ---- T5: a trained adapter as the model -----------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["folder", "PeftModel", "saved again by PEFT"])
def test_t5_a_dpo_trained_adapter_is_not_its_own_reference_by_accident(
    base_folder, dpo_folder, make_tokenizer, tmp_path, way
):
    model: Any = dpo_folder
    its_own = re.escape(dpo_folder) if way == "folder" else "the adapter as it came in"
    if way != "folder":
        model = loaded(base_folder, dpo_folder)
    if way == "saved again by PEFT":
        model.save_pretrained(tmp_path / "copy")
        model = loaded(base_folder, str(tmp_path / "copy"))
    with pytest.raises(ReferenceMismatchError, match=f"another reference.*adapter: none and {its_own}.*'base'"):
        start(model, make_tokenizer, tmp_path / "run")


@pytest.mark.parametrize("reference", ["base", "initial"])
def test_t5_going_on_on_purpose(dpo_folder, make_tokenizer, tmp_path, caplog, reference):
    with caplog.at_level(logging.WARNING):
        trainer = start(dpo_folder, make_tokenizer, tmp_path, reference=reference)
    warned = any("goes on against" in r.getMessage() for r in caplog.records)
    assert warned == (reference == "initial")
    trainer.train()
    first = step_logs(trainer)[0]
    assert (first["rewards/margins"] == 0) == (reference == "initial")
    trainer.save_model()
    record = read_record(tmp_path)
    assert record is not None and (record.adapter_fingerprint is None) == (reference == "base")


def test_t5_another_base_is_found_out(dpo_folder, tiny_llama, make_tokenizer, tmp_path):
    other = PeftModel.from_pretrained(tiny_llama(seed=5), dpo_folder, is_trainable=True)
    with pytest.raises(ReferenceMismatchError, match="base"):
        start(other, make_tokenizer, tmp_path)


# ---- Resuming -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interrupted(sft_folder, make_tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("interrupted")
    start(sft_folder, make_tokenizer, folder, save_strategy="steps", save_steps=2).train()
    return folder / "checkpoint-2"


@pytest.mark.parametrize("change", ["adapter", "base adapter off", "base weights", "quantization", "dtype"])
def test_resuming_against_another_reference(
    base_folder, sft_folder, interrupted, tiny_llama, make_tokenizer, tmp_path, change
):
    options: dict[str, Any] = {}
    model: Any = sft_folder
    if change == "adapter":
        model = save_adapter(base_folder, str(tmp_path / "other"), seed=3)
    elif change == "base adapter off":
        model, options = base_folder, {"peft_config": lora()}
    elif change == "base weights":
        base = AutoModelForCausalLM.from_pretrained(base_folder)
        base.lm_head.weight.data[7, 3] += 1e-3
        model = PeftModel.from_pretrained(base, sft_folder, is_trainable=True)
    elif change == "quantization":
        options = {"quantize_base": None, "model_init_kwargs": {"dtype": "float32"}}
    else:
        options = {"model_init_kwargs": {"dtype": "bfloat16"}}
    trainer = start(model, make_tokenizer, tmp_path / "run", **options)
    with pytest.raises(ReferenceMismatchError, match="belongs to another reference") as error:
        trainer.train(resume_from_checkpoint=str(interrupted))
    record = read_record(interrupted)
    identity = trainer.reference.identity
    names = [record.base_fingerprint[:8], identity.base_fingerprint[:8]]
    if change.startswith(("adapter", "base adapter")):
        names = [
            str(record.adapter_fingerprint)[:8],
            str(identity.adapter_fingerprint or "none")[:8],
        ]
    assert all(name in str(error.value) for name in names), (names, str(error.value))


def test_resuming_against_another_reference_on_purpose(sft_folder, interrupted, make_tokenizer, tmp_path, caplog):
    trainer = start(sft_folder, make_tokenizer, tmp_path, reference="base")
    with caplog.at_level(logging.WARNING):
        trainer.train(resume_from_checkpoint=str(interrupted))
    assert any("as asked for" in r.getMessage() for r in caplog.records)


# ---- TR-DPO ---------------------------------------------------------------------------------------------------------


class StopAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def test_the_reference_follows_the_policy(tiny_llama, make_tokenizer, tmp_path):
    """By hand: after 2 steps the reference is alpha * policy + (1 - alpha) * start."""
    options = {"sync_ref_model": True, "ref_model_mixup_alpha": 0.25, "ref_model_sync_steps": 2, "max_steps": 2}
    trainer = start(tiny_llama(), make_tokenizer, tmp_path, peft_config=lora(), **options)
    before = {n: t.clone() for n, t in adapter_tensors(trainer.model, trainer.reference.adapter).items()}
    trainer.train()
    policy = adapter_tensors(trainer.model, "default")
    for name, tensor in adapter_tensors(trainer.model, trainer.reference.adapter).items():
        torch.testing.assert_close(tensor, 0.25 * policy[name] + 0.75 * before[name], rtol=1e-6, atol=1e-8)
    assert any(not torch.equal(policy[name], before[name]) for name in before)


@pytest.mark.parametrize("stop", [2, 3])
def test_a_moving_reference_survives_an_interruption(tiny_llama, make_tokenizer, tmp_path, stop):
    options = {"sync_ref_model": True, "ref_model_sync_steps": 2, "max_steps": 6, "peft_config": lora()}
    options |= {"save_strategy": "steps", "save_steps": stop}
    straight = start(tiny_llama(), make_tokenizer, tmp_path / "straight", **options)
    straight.train()
    start(tiny_llama(), make_tokenizer, tmp_path / "cut", callbacks=[StopAt(stop)], **options).train()
    resumed = start(tiny_llama(), make_tokenizer, tmp_path / "cut", **options)
    resumed.train(resume_from_checkpoint=True)
    for adapter in ("default", straight.reference.adapter):
        expected = adapter_tensors(straight.model, adapter)
        assert all(torch.equal(t, expected[n]) for n, t in adapter_tensors(resumed.model, adapter).items())
    assert [log["loss"] for log in step_logs(resumed)] == [log["loss"] for log in step_logs(straight)]


def test_a_reference_of_another_shape_can_not_move(base_folder, sft_folder, make_tokenizer, tmp_path):
    other = get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder), lora(r=2, lora_alpha=4))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ReferenceMismatchError, match="can't be mixed"):
        start(sft_folder, make_tokenizer, tmp_path, reference=str(tmp_path / "other"), sync_ref_model=True)


def test_a_moving_reference_is_another_one(tiny_llama, make_tokenizer, tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "peft_config": lora()}
    start(tiny_llama(), make_tokenizer, tmp_path, **options).train()
    moving = start(tiny_llama(), make_tokenizer, tmp_path / "x", sync_ref_model=True, **options)
    with pytest.raises(ReferenceMismatchError, match="alpha 0.6 every 512 steps"):
        moving.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
