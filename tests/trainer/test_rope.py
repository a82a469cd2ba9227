"""Runs on a model that chooses its rotary frequencies by the longest row, and the noise floor that must see it.

The oracle is plain transformers and PEFT, a row at a time, on a twin whose short and long factors are the same.
"""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from reward_helpers import plain_log_ratio
from trainer_helpers import adapter_weights, lora, ours, step_logs
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from dpo_peft import ImplicitReward, OptionError, ReferenceMismatchError
from dpo_peft.forward.probe import token_rounding
from dpo_peft.forward.rotary import fixed_rope_length
from dpo_peft.merge import merge_adapter
from dpo_peft.model.loading import load_base
from dpo_peft.model.training_record import read_training
from dpo_peft.pairs.engines import ModelSource, Sampling, TransformersEngine, _served_length
from dpo_peft.reference.adapter_off import noise_floor
from dpo_peft.serving import serving_problems
from dpo_peft.training import building

LIMIT = 32
ROPE = dict(
    rope_type="longrope",
    rope_theta=1e4,
    original_max_position_embeddings=LIMIT,
    factor=32.0,
    short_factor=[1.0] * 8,
    long_factor=[4.0] * 8,
)


def pairs(*prompts: int) -> Dataset:
    """Pairs after prompts of so many tokens."""
    draw = torch.Generator().manual_seed(5)

    def ids(number: int) -> list[int]:
        return torch.randint(5, 270, (number,), generator=draw).tolist()

    return Dataset.from_list([{"prompt_ids": ids(n), "chosen_ids": ids(4), "rejected_ids": ids(6)} for n in prompts])


FLOAT32: dict[str, Any] = {"quantize_base": False, "model_init_kwargs": {"dtype": "float32"}}
MIXED, SHORT = pairs(6, 9, 60, 4, 7, 12, 5, 8), pairs(6, 9, 8, 4)


@pytest.fixture
def longrope(tiny_llama: Any, make_tokenizer: Any, tmp_path: Path) -> str:
    """The folder of a model with two sets of factors."""
    folder = str(tmp_path / "base")
    tiny_llama(rope_parameters=ROPE).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def run(folder: str, rows: Dataset, output: Path, **options: Any) -> Any:
    trainer = ours(folder, rows, None, output, **{"max_steps": 4, **FLOAT32, **options})
    trainer.train()
    return trainer


def answers(rows: Dataset) -> list[tuple[list[int], list[int]]]:
    return [(row["prompt_ids"], row[side]) for row in rows for side in ("chosen_ids", "rejected_ids")]


def test_splits_caches_and_scores_agree_on_rows_of_both_sides(longrope, tiny_llama, tmp_path, caplog):
    caplog.set_level(logging.INFO, "dpo_peft")
    one = run(longrope, MIXED, tmp_path / "a", per_device_train_batch_size=8)
    assert "of 33 tokens" in caplog.text and "as long at least" in caplog.text
    split = run(longrope, MIXED, tmp_path / "b", per_device_train_batch_size=1, gradient_accumulation_steps=8)
    cached = run(longrope, MIXED, tmp_path / "c", per_device_train_batch_size=2, gradient_accumulation_steps=4,
                 precompute_ref_log_probs=True, precompute_ref_tokens=24,
                 ref_cache_dir=str(tmp_path / "store"))  # fmt: skip
    for other in (split, cached):
        assert [log["loss"] for log in step_logs(other)] == pytest.approx(
            [log["loss"] for log in step_logs(one)], abs=1e-5
        )
        assert step_logs(other)[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert cached.reference.counts()["ref_cache/misses"] == 0

    one.save_model()
    assert read_training(str(tmp_path / "a")).rope_length == 33
    problems = serving_problems(one.model.peft_config["default"])
    assert any("of rows of 33 tokens" in problem and "--max-model-len" in problem for problem in problems)
    reward = ImplicitReward(str(tmp_path / "a"), device="cpu")
    alone = [reward([p], [c], [c])[0] for p, c in answers(MIXED)]
    asked = (*zip(*answers(MIXED), strict=True), [c for _, c in answers(MIXED)])
    together = reward(*asked)
    twin = tiny_llama(rope_parameters={**ROPE, "short_factor": [4.0] * 8})
    oracle = PeftModel.from_pretrained(twin, str(tmp_path / "a")).eval()
    expected = [reward.beta * plain_log_ratio(oracle, p, c) for p, c in answers(MIXED)]
    assert alone == pytest.approx(expected, abs=2e-5) and together == pytest.approx(expected, abs=2e-5)
    assert max(map(abs, expected)) > 1e-2
    # A model in memory is scored alike, and left as it was.
    loose = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(longrope), str(tmp_path / "a")).eval()
    before = loose(torch.tensor([MIXED[0]["prompt_ids"]])).logits
    in_memory = ImplicitReward(loose, tokenizer=one.processing_class)
    assert in_memory(*zip(*answers(MIXED), strict=True), [c for _, c in answers(MIXED)]) == pytest.approx(
        expected, abs=2e-5
    )
    assert torch.equal(loose(torch.tensor([MIXED[0]["prompt_ids"]])).logits, before)
    # So is the model that wrote pairs, and what is merged.
    writer = TransformersEngine.load(ModelSource(str(tmp_path / "a"), quantize=False), Sampling(4), 2)
    assert fixed_rope_length(writer.model) == 33
    assert merge_adapter(str(tmp_path / "a"), str(tmp_path / "merged"), device="cpu").drift.mean_token < 1e-5


def test_rows_of_one_side_are_what_they_were(longrope, tiny_llama, make_tokenizer, tmp_path):
    trainer = run(longrope, SHORT, tmp_path / "a")
    plain = tiny_llama(rope_parameters={**ROPE, "long_factor": [1.0] * 8})
    other = ours(plain, SHORT, make_tokenizer(), tmp_path / "b", max_steps=4)
    other.train()
    pairs_of_weights = zip(adapter_weights(trainer).values(), adapter_weights(other).values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs_of_weights)
    assert fixed_rope_length(trainer.model) == LIMIT


def test_another_side_is_another_run(longrope, tmp_path, caplog):
    """A run isn't resumed with rows that ask for other frequencies; going on with them or evaluating them warns."""
    trainer = run(longrope, SHORT, tmp_path / "a", save_strategy="steps", save_steps=2)
    caplog.clear()
    trainer.evaluate(MIXED)
    assert "up to 66 tokens" in caplog.text and "rows of up to 32" in caplog.text
    again = ours(longrope, SHORT, None, tmp_path / "a", max_steps=6, eval_dataset=MIXED, **FLOAT32)
    with pytest.raises(OptionError, match="rotary frequencies of rows of: '32 tokens' before, '33 tokens' now"):
        again.train(resume_from_checkpoint=True)
    trainer.save_model(str(tmp_path / "done"))
    caplog.clear()
    ours(str(tmp_path / "done"), MIXED, None, tmp_path / "b", reference="base", peft_config=None, **FLOAT32)
    assert "rotary frequencies of rows of 32 tokens, and goes on with those of rows of 33" in caplog.text
    # vLLM decides by max_model_len.
    source = ModelSource(str(tmp_path / "done"))
    assert _served_length(source, 20) == LIMIT and _served_length(ModelSource(longrope), 20) == 20
    with pytest.raises(OptionError, match="lower max_new_tokens"):
        _served_length(source, 40)


def test_a_stream_needs_a_longest_row(longrope, tmp_path):
    with pytest.raises(OptionError, match="set max_length"):
        ours(longrope, MIXED.to_iterable_dataset(), None, tmp_path, quantize_base=False, max_length=None)
    trainer = ours(longrope, MIXED.to_iterable_dataset(), None, tmp_path, quantize_base=False, max_length=40)
    assert fixed_rope_length(trainer.model) == 33


def test_an_adapter_without_a_record_is_scored_by_max_length(longrope, tmp_path, caplog):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(longrope), lora(init_lora_weights=False))
    model.save_pretrained(tmp_path / "foreign")
    made: dict[str, Any] = dict(beta=1.0, quantize=False, dtype="float32", device="cpu")
    ids = [row["prompt_ids"] for row in MIXED], [row["chosen_ids"] for row in MIXED]
    scores = {}
    for max_length, taken in ((None, 32), (512, 33)):
        caplog.clear()
        reward = ImplicitReward(str(tmp_path / "foreign"), max_length=max_length, **made)
        assert f"those of rows of up to {taken} tokens are taken" in caplog.text
        scores[taken] = reward(*ids, ids[1])
        assert ("its score means little" in caplog.text) == (taken == 32)
    with torch.no_grad():
        own = [plain_log_ratio(model.eval(), p, c) for p, c in zip(*ids, strict=True)]
    assert scores[32][:2] == pytest.approx(own[:2], abs=1e-4)  # short alone, as transformers has it
    assert scores[33][2] == pytest.approx(own[2], abs=1e-4)  # long alone
    assert abs(scores[33][0] - own[0]) > 1e-2


# ---- The floor ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stretch", [4.0, 1.01], ids=["margins of 0.2", "margins of 0.005"])
def test_the_floor_is_not_measured_by_the_defect(tiny_llama, make_tokenizer, tmp_path, monkeypatch, caplog, stretch):
    monkeypatch.setattr(building, "fix_rope_by_rows", lambda *_: None)  # as it was
    model = tiny_llama(rope_parameters={**ROPE, "long_factor": [stretch] * 8})
    options = {"learning_rate": 0.0, "per_device_train_batch_size": 2, "max_steps": 4}
    trainer = ours(model, MIXED, make_tokenizer(), tmp_path / "a", **options)
    trainer.train()
    assert "depend on their neighbors in a batch" in caplog.text and "float32" in caplog.text
    model = tiny_llama(rope_parameters={**ROPE, "long_factor": [stretch] * 8})
    cached = ours(model, MIXED, make_tokenizer(), tmp_path / "b", precompute_ref_log_probs=True,
                  precompute_ref_tokens=24, ref_cache_dir=str(tmp_path / "store"), **options)  # fmt: skip
    with pytest.raises(ReferenceMismatchError, match="Leave cache_ref_log_probs and precompute_ref_log_probs out"):
        cached.train()
    # What it would have trained on.
    cached.reference.start_checked = True
    cached.train()
    margins = max(abs(log["rewards/margins"]) for log in step_logs(cached))
    assert 0.001 < margins < 0.01 if stretch == 1.01 else margins > 0.05


def test_the_floor_ends_at_what_rounding_explains(base_folder):
    ref_C, other_C = torch.tensor([-20.0, -30.0]), torch.tensor([-20.0, -29.0])
    assert noise_floor(ref_C, other_C) == pytest.approx(1e-4 + 3e-5 + 2.0)
    assert noise_floor(ref_C, other_C, 0.25) == pytest.approx(1e-4 + 3e-5 + 0.25)
    assert noise_floor(ref_C, ref_C, 0.25) == pytest.approx(1e-4 + 3e-5)
    model = load_base(base_folder, quantize=False, init_kwargs={"dtype": "float32"})
    assert token_rounding(get_peft_model(model, lora())) == 1e-4
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        assert token_rounding(model) == 0.1
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = "none"
    with torch.autocast("cpu", torch.bfloat16):
        assert token_rounding(model) == 0.1
    assert token_rounding(model.half()) == 2e-2
    float32 = {"dtype": "float32"}
    assert token_rounding(load_base(base_folder, init_kwargs=float32)) == 1e-4  # 4 bits, unpacked to float32
    wide = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    assert token_rounding(load_base(base_folder, wide, init_kwargs=float32)) == 0.1
    eight = BitsAndBytesConfig(load_in_8bit=True)
    assert token_rounding(load_base(base_folder, eight, init_kwargs=float32)) == 0.1
