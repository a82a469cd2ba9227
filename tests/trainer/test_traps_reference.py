"""Traps of the reference, as `test_trainer_traps.py` has the others; numbers are those of the project's list of traps.

T5 and T15 are in `test_reference_contract.py`, T6 in `test_cached_reference.py`, T8 in `test_trainer_resume.py` and
`test_kills.py`.
"""

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from trainer_helpers import id_pairs, lora, ours, step_logs
from transformers import AutoModelForCausalLM

from dpo_peft import OptionError, ReferenceMismatchError
from dpo_peft.forward import PackedBatch
from dpo_peft.model.loading import load_base
from dpo_peft.reference import adapter_off as reference
from dpo_peft.reference.adapter_off import reference_logps


def perturbed(model: Any, **options: Any) -> PeftModel:
    model = get_peft_model(model, lora(), **options)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_t3_copy_and_policy_have_one_dtype(base_folder, make_tokenizer, tmp_path, dtype):
    """An adapter that comes in bfloat16 is trained in float32; so is what it is compared with."""
    model = perturbed(AutoModelForCausalLM.from_pretrained(base_folder, dtype=dtype), autocast_adapter_dtype=False)
    trainer = ours(model, id_pairs(8), make_tokenizer(), tmp_path, max_steps=2)
    adapter = trainer.reference.adapter
    of_copy = {p.dtype for n, p in trainer.model.named_parameters() if f".{adapter}." in n}
    assert of_copy == {torch.float32}
    trainer.train()
    first, second = step_logs(trainer)
    assert first["rewards/margins"] == 0 and second["rewards/margins"] != 0
    # The gate sees a copy in another dtype than the policy's.
    again = ours(perturbed(AutoModelForCausalLM.from_pretrained(base_folder)), id_pairs(8), make_tokenizer(), tmp_path)
    for name, parameter in again.model.named_parameters():
        if f".{again.reference.adapter}." in name:
            parameter.data = parameter.data.bfloat16().float()
    with pytest.raises(ReferenceMismatchError, match="noise floor"):
        again.train()


@pytest.mark.parametrize("option", [{"ld_alpha": 0.3}, {"use_weighting": True}, {"reward_clip": 1.0}])
def test_t16_options_act_on_both_sides(tiny_llama, make_tokenizer, tmp_path, option):
    trainer = ours(perturbed(tiny_llama()), id_pairs(8), make_tokenizer(), tmp_path, max_steps=1, **option)
    trainer.train()
    first = step_logs(trainer)[0]
    assert first["rewards/chosen"] == first["rewards/rejected"] == 0
    if "use_weighting" not in option:
        assert first["loss"] == pytest.approx(0.693147, abs=1e-6)


def test_t18_an_adapter_merged_into_its_base_is_refused(tiny_llama, make_tokenizer, tmp_path):
    model = perturbed(tiny_llama())
    model.merge_adapter()
    with pytest.raises(OptionError, match=r"merged into the base.*unmerge_adapter\(\)"):
        ours(model, id_pairs(4), make_tokenizer(), tmp_path)


@pytest.mark.parametrize("quantize", [True, False])
def test_t18_an_adapter_on_another_rounding_of_its_base_is_refused(base_folder, make_tokenizer, tmp_path, quantize):
    """Trained over 4 bits and put on 16, or the other way round, it is another model; so is a base with it merged."""
    options: dict[str, Any] = {"max_steps": 1, "bf16": True, "quantize_base": None if quantize else False}
    trainer = ours(base_folder, id_pairs(8), None, tmp_path / "a", **options)
    trainer.train()
    trainer.save_model()
    other = load_base(base_folder, quantize=not quantize)
    model = PeftModel.from_pretrained(other, tmp_path / "a", is_trainable=True)
    with pytest.raises(ReferenceMismatchError, match="base weights: .* and .*nf4" if not quantize else "nf4.* and "):
        ours(model, id_pairs(8), make_tokenizer(), tmp_path / "b", bf16=True)
    same = PeftModel.from_pretrained(load_base(base_folder, quantize=quantize), tmp_path / "a", is_trainable=True)
    assert ours(same, id_pairs(8), make_tokenizer(), tmp_path / "c", bf16=True, reference="base")


def test_t22_the_noise_floor_is_measured(base_folder, make_tokenizer, tmp_path, monkeypatch):
    """In bfloat16 the reference's own log-probs move with the shape of the batch. The gate lets as much pass."""
    trainer = ours(base_folder, id_pairs(8), None, tmp_path, bf16=True, quantize_base=False, cache_ref_log_probs=True,
                   ref_cache_dir=str(tmp_path / "store"), num_train_epochs=2, max_steps=-1)  # fmt: skip
    rows = [trainer.train_dataset[i] for i in range(4)]

    def logps(part: Any) -> torch.Tensor:
        with trainer.compute_loss_context_manager():
            return reference_logps(trainer.model, PackedBatch(**trainer.collate(part))).logps_C

    moved = float((logps(rows) - torch.cat([logps([row]) for row in rows])).abs().max())
    floors = []
    measure = reference.noise_floor
    monkeypatch.setattr(reference, "noise_floor", lambda *args: floors.append(measure(*args)) or floors[-1])
    trainer.train()  # neither the gate nor the cache's own check raises a false alarm
    assert 1e-4 < moved < floors[0] < 1.0
    # Without the floor the gate would take the rounding for another reference.
    monkeypatch.setattr(reference, "noise_floor", lambda *args: -1.0)
    trainer.reference.start_checked = False
    with pytest.raises(ReferenceMismatchError, match="noise floor"):
        trainer.train()
