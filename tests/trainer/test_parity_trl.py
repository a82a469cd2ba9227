"""The trajectory of training is TRL's: same model, rows, order and seed, step by step.

One deliberate difference is left out of the comparison: a tie counts as half in our `rewards/accuracies` and as a loss
in TRL's, so at the first step, where all pairs are ties, the two differ by a half.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, load_dataset
from trainer_helpers import LOGPS, REWARDS, id_pairs, largest_difference, lora, ours, step_logs, text_pairs, theirs
from transformers import AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase

from dpo_peft.data import from_hh, from_sharegpt, prepare_dataset

# Opens with BOS, has no system turn of its own and no header for the assistant.
MISTRAL_LIKE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}"
    "{% else %}[INST] {{ m['content'] }} [/INST]{% endif %}{% endfor %}"
)


def both(tiny_llama: Any, rows: Dataset, tokenizer: Any, folder: Path, **changed: Any) -> tuple[Any, Any]:
    """Train both trainers on fresh copies of one model."""
    config = changed.pop("model", {})
    trainers = tuple(make(tiny_llama(**config), rows, tokenizer, folder, **changed) for make in (ours, theirs))
    for trainer in trainers:
        trainer.train()
    return trainers


@pytest.mark.parametrize(("steps", "tolerance"), [(10, 1e-5), pytest.param(30, 1e-4, marks=pytest.mark.slow)])
def test_float32_steps(tiny_llama, make_tokenizer, tmp_path, steps, tolerance):
    mine, trl = both(tiny_llama, text_pairs(24), make_tokenizer(), tmp_path, max_steps=steps)
    assert len(step_logs(mine)) == steps
    assert largest_difference(mine, trl, [*REWARDS, "grad_norm"]) < tolerance
    assert largest_difference(mine, trl, LOGPS) < 1e-4
    assert step_logs(mine)[0]["loss"] == pytest.approx(0.693147, abs=1e-6)
    # The comparison can fail: these runs go somewhere, and TRL's own steps differ from each other by far more.
    assert step_logs(mine)[-1]["rewards/margins"] > 100 * tolerance
    assert [log["rewards/accuracies"] for log in step_logs(mine)[1:]] == pytest.approx(
        [log["rewards/accuracies"] for log in step_logs(trl)[1:]]
    )


def test_the_comparison_sees_another_beta(tiny_llama, make_tokenizer, tmp_path):
    rows, tokenizer = text_pairs(8), make_tokenizer()
    mine = ours(tiny_llama(), rows, tokenizer, tmp_path, beta=0.11, max_steps=3)
    trl = theirs(tiny_llama(), rows, tokenizer, tmp_path, beta=0.1, max_steps=3)
    mine.train()
    trl.train()
    assert largest_difference(mine, trl) > 1e-3


def test_trained_adapters_are_equal(tiny_llama, make_tokenizer, tmp_path):
    # SGD: Adam turns rounding noise in tiny gradients into whole steps of either sign.
    mine, trl = both(tiny_llama, id_pairs(16), make_tokenizer(), tmp_path, optim="sgd", learning_rate=0.1, max_steps=8)
    expected = dict(trl.model.named_parameters())
    trained = {name: p for name, p in mine.model.named_parameters() if p.requires_grad}
    assert sorted(trained) == sorted(name for name, p in expected.items() if p.requires_grad)
    assert max(float((p - expected[name]).abs().max()) for name, p in trained.items()) < 1e-6
    assert max(float(p.abs().max()) for name, p in trained.items() if "lora_B" in name) > 1e-4


def test_uneven_last_batch(tiny_llama, make_tokenizer, tmp_path):
    mine, trl = both(tiny_llama, id_pairs(11), make_tokenizer(), tmp_path, max_steps=-1, num_train_epochs=3)
    assert len(step_logs(mine)) == 9
    assert largest_difference(mine, trl, [*REWARDS, "grad_norm"]) < 1e-5


def test_gradient_accumulation(tiny_llama, make_tokenizer, tmp_path):
    mine, trl = both(
        tiny_llama,
        id_pairs(24),
        make_tokenizer(),
        tmp_path,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
    )
    assert largest_difference(mine, trl, [*REWARDS, "grad_norm"]) < 1e-5


def test_uneven_accumulation_differs_where_trl_weighs_pairs_unequally(tiny_llama, make_tokenizer, tmp_path):
    """7 pairs as 4 + 3: TRL takes the mean of two means, we take the mean over 7."""
    changed = {"gradient_accumulation_steps": 2, "max_steps": 1}
    mine, trl = both(tiny_llama, id_pairs(7), make_tokenizer(), tmp_path, **changed)
    whole = theirs(tiny_llama(), id_pairs(7), make_tokenizer(), tmp_path, per_device_train_batch_size=7, max_steps=1)
    whole.train()
    norms = [step_logs(trainer)[0]["grad_norm"] for trainer in (mine, trl, whole)]
    assert norms[0] == pytest.approx(norms[2], rel=1e-5)
    assert abs(norms[1] - norms[2]) > 1e-3 * norms[2]


def test_gradient_checkpointing_and_schedules(tiny_llama, make_tokenizer, tmp_path):
    changed = {"gradient_checkpointing": True, "lr_scheduler_type": "cosine", "warmup_steps": 3, "weight_decay": 0.1}
    mine, trl = both(tiny_llama, id_pairs(24), make_tokenizer(), tmp_path, max_grad_norm=0.3, **changed)
    assert largest_difference(mine, trl, [*REWARDS, "grad_norm", "learning_rate"]) < 1e-5


def test_mixed_precision_is_used_as_in_trl(tiny_llama, make_tokenizer, tmp_path):
    """bf16=True computes a float32 model in bfloat16, under autocast, in both."""
    rows, tokenizer, kinds = id_pairs(16), make_tokenizer(), {}
    for make in (ours, theirs):
        model = tiny_llama()
        seen = kinds[make] = set()
        trainer = make(model, rows, tokenizer, tmp_path, bf16=True, max_steps=6)
        layer = model.model.layers[1].mlp.up_proj.base_layer
        layer.register_forward_hook(lambda module, inputs, output, seen=seen: seen.add(output.dtype))
        trainer.train()
        kinds[make.__name__] = trainer
    assert kinds[ours] == kinds[theirs] == {torch.bfloat16}
    assert largest_difference(kinds["ours"], kinds["theirs"], ["loss", "rewards/chosen", "rewards/margins"]) < 2e-2
    assert largest_difference(kinds["ours"], kinds["theirs"], ["logps/chosen"]) < 0.3


def test_evaluation(tiny_llama, make_tokenizer, tmp_path):
    changed = {"eval_dataset": text_pairs(12, seed=1), "eval_strategy": "steps", "eval_steps": 4, "max_steps": 8}
    mine, trl = both(tiny_llama, text_pairs(16), make_tokenizer(), tmp_path, **changed)
    names = [f"eval_{name}" for name in [*REWARDS, "rewards/accuracies"]]
    evaluations = [[log for log in t.state.log_history if "eval_loss" in log] for t in (mine, trl)]
    assert len(evaluations[0]) == len(evaluations[1]) == 2
    for a, b in zip(*evaluations, strict=True):
        assert max(abs(a[name] - b[name]) for name in names) < 1e-5


@pytest.fixture(scope="module")
def base_folder(tiny_llama, make_tokenizer, tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("base"))
    tiny_llama(hidden_size=128, intermediate_size=256).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def nf4(dtype: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


@pytest.mark.parametrize(
    ("trl_lora", "tolerance"),
    [pytest.param("as TRL casts it, to bfloat16", 1e-3, marks=pytest.mark.slow), ("float32", 1e-5)],
)
def test_nf4_base(make_tokenizer, tmp_path, base_folder, trl_lora, tolerance):
    """The base in NF4, computed in float32. TRL trains LoRA in bfloat16 there (trap T7); in float32 it is ours."""
    changed = {"quantization_config": nf4(torch.float32), "model_init_kwargs": {"dtype": "float32"}, "max_steps": 10}
    rows, tokenizer = text_pairs(24), make_tokenizer()
    mine = ours(base_folder, rows, tokenizer, tmp_path, learning_rate=2e-4, **changed)
    trl = theirs(base_folder, rows, tokenizer, tmp_path, learning_rate=2e-4, **changed)
    assert type(mine.model.model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    if trl_lora == "float32":
        start = {name: p.detach().clone() for name, p in mine.model.named_parameters() if p.requires_grad}
        for name, p in trl.model.named_parameters():
            if p.requires_grad:
                p.data = start[name].clone()
    mine.train()
    trl.train()
    assert largest_difference(mine, trl) < tolerance
    assert abs(step_logs(mine)[-1]["rewards/margins"]) > 1e-3


@pytest.mark.parametrize(("fused", "bound"), [pytest.param(False, 5e-3, marks=pytest.mark.slow), (None, 1e-2)])
def test_nf4_base_in_bfloat16(fused, bound, make_tokenizer, tmp_path, base_folder):
    """The default: NF4, bfloat16 compute, autocast. TRL is given the same by name.

    Fused layers round in other places than the model's own, which TRL runs.
    """
    rows, tokenizer, changed = text_pairs(24), make_tokenizer(), {"bf16": True, "learning_rate": 1e-5}
    mine = ours(base_folder, rows, tokenizer, tmp_path, fused_layers=fused, **changed)
    loading = {"quantization_config": nf4(torch.bfloat16), "model_init_kwargs": {"dtype": "bfloat16"}}
    trl = theirs(base_folder, rows, tokenizer, tmp_path, **changed, **loading)
    mine.train()
    trl.train()
    # Log-probs of bfloat16 differ with the batch's layout by 1e-2; policy and reference share that, but not all of it.
    assert largest_difference(mine, trl, ["loss"]) < bound
    assert step_logs(mine)[0]["loss"] == pytest.approx(0.693147, abs=1e-3)


# ---- Real rows and chat templates -----------------------------------------------------------------------------------

ROWS, LONGEST = 12, 96


def real_rows(name: str, data_dir: Path, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Conversations of a public set: the shortest of those that keep a signal within `LONGEST` tokens."""
    if name == "hh":
        path, convert = data_dir / "hh-harmless-base-test" / "test.jsonl.gz", from_hh
    else:
        path, convert = data_dir / "llama-factory-demo" / f"{name}.json", from_sharegpt
    if not path.is_file():
        pytest.skip(f"no {path.name}")
    raw = sorted(load_dataset("json", data_files=str(path), split="train"), key=lambda row: len(str(row)))
    rows = Dataset.from_list([convert(row) for row in raw[: 10 * ROWS]])
    usable, _ = prepare_dataset(rows, tokenizer, max_length=LONGEST, max_unusable_share=0.95)
    return rows.select(usable["row"][:ROWS])


def real_tokenizer(name: str, tokenizer_dir: Any, make_tokenizer: Any) -> PreTrainedTokenizerBase:
    if name == "mistral_like":
        return make_tokenizer(chat_template=MISTRAL_LIKE)
    return AutoTokenizer.from_pretrained(tokenizer_dir(name))


@pytest.mark.slow
@pytest.mark.sampled(99, slow=4)  # each set and each template once
@pytest.mark.parametrize("template", ["smollm2", "minimind-6400", "mistral_like"])
@pytest.mark.parametrize("dataset", ["dpo_en_demo", "dpo_zh_demo", "hh"])
def test_real_rows(tiny_llama, make_tokenizer, tokenizer_dir, data_dir, tmp_path, dataset, template):
    tokenizer = real_tokenizer(template, tokenizer_dir, make_tokenizer)
    rows = real_rows(dataset, data_dir, tokenizer)
    config = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "max_position_embeddings": 8192,
        "initializer_range": 0.1,
    }
    changed = {"model": config, "per_device_train_batch_size": 1, "max_length": LONGEST}
    mine, trl = both(tiny_llama, rows, tokenizer, tmp_path, **changed)
    assert mine.data_reports["train"].kept_rows == ROWS == len(trl.train_dataset)
    assert len(step_logs(mine)) == 10
    # TRL adds log-probs up in float32: at -500 nats they are 6e-5 apart, and rewards a tenth of that for each of four.
    assert largest_difference(mine, trl) < 2e-5
    assert largest_difference(mine, trl, LOGPS) < 2e-4


INVOCATION = [271, 272]
UPPER = {
    "layers_to_transform": [1],
    "target_modules": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split(),
}
ON_LESS: dict[str, dict[str, Any]] = {
    "answers": {"alora_invocation_tokens": INVOCATION},
    "upper": UPPER,
    "both": {"alora_invocation_tokens": INVOCATION, **UPPER},
}


def invoked(number: int) -> Dataset:
    return id_pairs(number).map(lambda row: {"prompt_ids": [*row["prompt_ids"], *INVOCATION]})


@pytest.mark.sampled(4)
@pytest.mark.parametrize("kind", ON_LESS)
def test_adapters_that_act_on_less(tiny_llama, make_tokenizer, tmp_path, kind):
    """PEFT switches an answer-only adapter on where it finds its tokens; here the base computes prompts once."""
    rows, tokenizer, how = invoked(24), make_tokenizer(), {"peft_config": lora(**ON_LESS[kind])}
    mine, trl = both(tiny_llama, rows, tokenizer, tmp_path, **how)
    assert mine.forward_plan.fused is not None and mine.reference.lockstep
    assert largest_difference(mine, trl, [*REWARDS, "grad_norm"]) < 1e-5
    assert largest_difference(mine, trl, LOGPS) < 1e-4
    assert step_logs(mine)[-1]["rewards/margins"] > 1e-3
    whole = ours(tiny_llama(), rows, tokenizer, tmp_path)  # negative control: an adapter that acts on everything
    whole.train()
    assert largest_difference(whole, trl, ["grad_norm"]) > 1e-2
    # The model's own layers, of which some are computed again; rows of a budget; a reference that was kept.
    others = (
        {"fused_layers": False, "gradient_checkpointing": True},
        {"share_prompts": False, "gradient_checkpointing": True},
        {"max_tokens_per_microbatch": 40, "gradient_checkpointing": True, "checkpoint_layers": 1},
        {"precompute_ref_log_probs": True, "ref_cache_dir": str(tmp_path / "cache")},
    )
    for changed in others:
        other = ours(tiny_llama(), rows, tokenizer, tmp_path, **how, **changed)
        other.train()
        assert largest_difference(other, mine, [*REWARDS, "grad_norm"]) < 1e-5, changed
