"""Silent traps that were found in other trainers, each with its test. Numbers in the names are those of the list of
traps that this project keeps; every test has a control that would fail if the trap were open.
"""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import KasaConfig
from reference_helpers import build_base, named, options_of, perturb, same
from torch import Tensor
from trainer_helpers import adapter_weights, id_pairs, lora, ours, step_logs, text_pairs
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM, TrainerCallback

from dpo_peft import DPOTrainer, NonFiniteError, OptionError, ReferenceMismatchError
from dpo_peft.forward import Sample, completion_logps, pack, pad_rows, plan_forward
from dpo_peft.model import adapters
from dpo_peft.model.loading import attach_adapter, load_base, storage_report
from dpo_peft.reference.adapter_off import reference_logps

SAMPLES = [
    Sample([11, 12, 13, 14], [[21, 22, 23], [31, 32, 33, 34, 35]], 0),
    Sample([15, 16], [[24, 25, 26, 27], [36]], 1),
]


def base_logps(model: Any) -> Tensor:
    """Log-probs of `SAMPLES` under a bare model, in the packed layout."""
    plan_forward(model)
    with torch.no_grad():
        return completion_logps(model, pack(SAMPLES)).logps_C


# ---- T1: what initializations do to the base ------------------------------------------------------------------------

KEEPING = {
    "default": {},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "eva": {"init_lora_weights": "eva"},
    "mica": {"init_lora_weights": "mica"},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "head saved": {"modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj", "lm_head"]},
    "some tokens": {"trainable_token_indices": [11, 21]},
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", KEEPING)
def test_t1_the_reference_is_the_starting_model(tiny_llama, make_tokenizer, tmp_path, name):
    expected = base_logps(tiny_llama())
    config = lora(**KEEPING[name])
    trainer = ours(tiny_llama(), id_pairs(8), make_tokenizer(), tmp_path, peft_config=config, max_steps=4)
    assert torch.equal(reference_logps(trainer.model, pack(SAMPLES)).logps_C, expected)
    trainer.train()
    assert step_logs(trainer)[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert torch.equal(reference_logps(trainer.model, pack(SAMPLES)).logps_C, expected)
    with torch.no_grad():
        policy_C = completion_logps(trainer.model.eval(), pack(SAMPLES)).logps_C
    assert (policy_C - expected).abs().max() > 1e-3  # it was the adapter that moved


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq", "lora_ga", False])
def test_t1_the_base_is_no_reference_for_other_initializations(tiny_llama, init):
    config = lora()
    config.init_lora_weights = init  # set here, since LoraConfig itself asks for optional packages for some
    with pytest.raises(OptionError, match=rf"init_lora_weights={init!r}.*init_lora_weights=True"):
        attach_adapter(tiny_llama(), config, reference="base")


MOVING = {
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter_4": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "kasa": {"kasa_config": KasaConfig()},
    "layer replication": {"layer_replication": [(0, 2), (1, 2)]},
}


@pytest.mark.parametrize("name", MOVING)
def test_t1_a_changed_base_is_measured_too(tiny_llama, monkeypatch, name):
    """Whatever is not known by name shows on a few tokens."""
    monkeypatch.setattr(adapters, "_MOVED_BASE", {})
    with pytest.raises(ReferenceMismatchError, match="changed the base model"):
        attach_adapter(tiny_llama(), lora(**MOVING[name]), reference="base")
    assert attach_adapter(tiny_llama(), lora(**MOVING[name]))[1].adapter == "reference"


@pytest.mark.parametrize("init", ["pissa", "olora", False])
@pytest.mark.parametrize("wrapped", [True, False])
def test_t1_other_initializations_are_their_own_reference(tiny_llama, make_tokenizer, tmp_path, wrapped, init):
    config = lora(init_lora_weights=init)
    given = {"peft_config": config}
    model = tiny_llama()
    if wrapped:
        model, given = get_peft_model(model, config), {}
    trainer = ours(model, id_pairs(8), make_tokenizer(), tmp_path, max_steps=3, **given)
    start = base_logps(trainer.model)
    trainer.train()
    assert step_logs(trainer)[0]["rewards/margins"] == 0.0 != step_logs(trainer)[-1]["rewards/margins"]
    adapter = trainer.reference.adapter
    assert torch.equal(reference_logps(trainer.model, pack(SAMPLES), adapter=adapter).logps_C, start)
    # With the adapter off, which is what others take, the model is another one.
    assert (reference_logps(trainer.model, pack(SAMPLES)).logps_C - start).abs().max() > 1e-2


# ---- T2: going on from a trained adapter ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["linear", "embedding and head", "dora and rslora", "saved head", "some tokens", "nf4"]
)
def test_t2_a_trained_adapter_goes_on_against_itself(tiny_llama, make_tokenizer, tmp_path, base_folder, kind):
    """The same for every kind of adapter, without the trainer, is in test_reference_kinds.py."""
    config, base, name = options_of(kind)
    model = get_peft_model(build_base(base, tiny_llama, base_folder), config, adapter_name=name)
    perturb(model)
    incoming = named(model, name)
    trainer = ours(model, id_pairs(8), make_tokenizer(), tmp_path, max_steps=3)
    trainer.train()
    assert step_logs(trainer)[0]["rewards/margins"] == 0.0 != step_logs(trainer)[-1]["rewards/margins"]
    assert same(named(trainer.model, trainer.reference.adapter), incoming)
    assert any(not torch.equal(tensor, incoming[key]) for key, tensor in named(trainer.model, name).items())


# ---- The step-0 gate ------------------------------------------------------------------------------------------------


def test_gate_finds_an_adapter_that_is_not_at_its_start(tiny_llama, make_tokenizer, tmp_path):
    """As would be, if the adapter were changed between the making of the trainer and training."""
    trainer = ours(tiny_llama(), id_pairs(8), make_tokenizer(), tmp_path, max_steps=2)
    perturb(trainer.model)
    weights = adapter_weights(trainer)
    with pytest.raises(ReferenceMismatchError, match="not at its start.*trained before.*initial"):
        trainer.train()
    assert all(torch.equal(weights[name], p) for name, p in adapter_weights(trainer).items())


def test_gate_finds_a_hook_that_acts_with_the_adapter_only(tiny_llama, make_tokenizer, tmp_path):
    trainer = ours(tiny_llama(), id_pairs(8), make_tokenizer(), tmp_path, max_steps=2)
    layer = trainer.model.get_base_model().model.layers[0].self_attn.q_proj
    handle = layer.register_forward_hook(lambda m, i, out: out if m.disable_adapters else out * 1.01)
    with pytest.raises(ReferenceMismatchError, match="nothing else modifies the model"):
        trainer.train()
    handle.remove()
    trainer.train()
    assert trainer.state.global_step == 2


def test_gate_finds_dropout_that_came_back(tiny_llama, make_tokenizer, tmp_path):
    trainer = ours(
        tiny_llama(), id_pairs(8), make_tokenizer(), tmp_path, peft_config=lora(lora_dropout=0.5), max_steps=2
    )
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    for name, p in trainer.model.named_parameters():
        if "lora_B" in name:  # with B at zero LoRA's own dropout can't show
            p.data.fill_(1e-3)
    with pytest.raises(ReferenceMismatchError, match=r"Dropout of 0\.5.*disable_dropout=True"):
        trainer.train()


# ---- T3, T7: trained weights are float32 ----------------------------------------------------------------------------


def moved_share(tiny_llama: Any, make_tokenizer: Any, folder: Path, dtype: torch.dtype) -> float:
    """Share of lora_A elements that 10 steps at TRL's learning rate change."""
    trainer = ours(tiny_llama(), id_pairs(16), make_tokenizer(), folder, learning_rate=1e-6, max_steps=10)
    for p in trainer.model.parameters():
        if p.requires_grad:
            p.data = p.data.to(dtype)
    before = adapter_weights(trainer)
    trainer.train()
    after = adapter_weights(trainer)
    moved = torch.cat([(after[name] != p).flatten() for name, p in before.items() if "lora_A" in name])
    return float(moved.float().mean())


def test_t7_small_steps_reach_the_weights(tiny_llama, make_tokenizer, tmp_path):
    assert moved_share(tiny_llama, make_tokenizer, tmp_path, torch.float32) > 0.99
    assert moved_share(tiny_llama, make_tokenizer, tmp_path, torch.bfloat16) < 0.1


@pytest.mark.parametrize("wrapped", [True, False])
def test_t3_trained_weights_are_float32_on_a_bfloat16_base(tiny_llama, make_tokenizer, tmp_path, wrapped):
    model = tiny_llama().to(torch.bfloat16)
    config = lora(modules_to_save=["lm_head"])
    if wrapped:
        model = get_peft_model(model, config, autocast_adapter_dtype=False)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    changed = {} if wrapped else {"peft_config": config}
    trainer = ours(model, id_pairs(8), make_tokenizer(), tmp_path, max_steps=2, bf16=True, **changed)
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in trainer.model.parameters() if not p.requires_grad} == {torch.bfloat16}
    trainer.train()
    assert step_logs(trainer)[0]["rewards/margins"] == pytest.approx(0, abs=5e-3)


# ---- T4, T9, T15, T17 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_t4_trained_biases_are_refused(tiny_llama, bias):
    with pytest.raises(OptionError, match=rf'bias={bias!r}.*bias="none"'):
        attach_adapter(tiny_llama(attention_bias=True), lora(bias=bias))
    with pytest.raises(OptionError, match="bias"):
        attach_adapter(get_peft_model(tiny_llama(attention_bias=True), lora(bias=bias)))


@pytest.mark.parametrize("disable", [True, False])
def test_t9_dropout(tiny_llama, make_tokenizer, tmp_path, disable):
    """Off in both passes by default; asked for, it is in the policy alone."""
    expected = base_logps(tiny_llama())
    trainer = ours(
        tiny_llama(attention_dropout=0.3),
        id_pairs(8),
        make_tokenizer(),
        tmp_path,
        peft_config=lora(lora_dropout=0.3),
        disable_dropout=disable,
        max_steps=1,
    )
    trainer.train()
    margin = step_logs(trainer)[0]["rewards/margins"]
    assert margin == 0.0 if disable else abs(margin) > 1e-3
    trainer.model.train()
    assert torch.equal(reference_logps(trainer.model, pack(SAMPLES)).logps_C, expected)
    assert trainer.model.training


def test_t15_an_adapter_of_any_name(tiny_llama, make_tokenizer, tmp_path):
    model = get_peft_model(tiny_llama(), lora(), adapter_name="mine")
    trainer = ours(model, id_pairs(8), make_tokenizer(), tmp_path, max_steps=6)
    trainer.train()
    assert step_logs(trainer)[0]["loss"] == pytest.approx(0.693147, abs=1e-6)
    assert step_logs(trainer)[-1]["rewards/margins"] > 0.01
    trainer.save_model()
    with torch.no_grad():
        expected = completion_logps(trainer.model.eval(), pad_rows(SAMPLES)).logps_C
        loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "mine")
        assert (completion_logps(loaded, pad_rows(SAMPLES)).logps_C - expected).abs().max() < 1e-4


def test_t15_an_adapter_loaded_for_inference(tiny_llama, make_tokenizer, tmp_path):
    get_peft_model(tiny_llama(), lora()).save_pretrained(tmp_path / "given")
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "given")
    with pytest.raises(OptionError, match="no trainable weights.*is_trainable=True"):
        ours(model, id_pairs(8), make_tokenizer(), tmp_path)
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "given", is_trainable=True)
    ours(model, id_pairs(8), make_tokenizer(), tmp_path, max_steps=1).train()


def test_several_adapters_train_the_active_one_only(tiny_llama, make_tokenizer, tmp_path):
    model = get_peft_model(tiny_llama(), lora(), adapter_name="old")
    model.add_adapter("new", lora())
    model.set_adapter("new")
    old = {name: p.clone() for name, p in model.named_parameters() if ".old." in name}
    trainer = ours(model, id_pairs(8), make_tokenizer(), tmp_path, max_steps=2)
    trainer.train()
    assert all(torch.equal(p, model.get_parameter(name)) for name, p in old.items())
    assert all(".new." in name for name in adapter_weights(trainer))


def test_t17_a_trained_head_is_not_the_references(tiny_llama, make_tokenizer, tmp_path):
    expected = base_logps(tiny_llama())
    config = lora(modules_to_save=["lm_head"])
    trainer = ours(
        tiny_llama(), id_pairs(8), make_tokenizer(), tmp_path, peft_config=config, learning_rate=1e-2, max_steps=3
    )
    trainer.train()
    head = trainer.model.get_base_model().lm_head
    assert (head.modules_to_save["default"].weight - head.original_module.weight).abs().max() > 1e-2
    assert torch.equal(reference_logps(trainer.model, pack(SAMPLES)).logps_C, expected)


# ---- T19, T24: what is stored how -----------------------------------------------------------------------------------


def test_t19_default_of_a_model_given_by_name(base_folder, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        trainer = ours(base_folder, text_pairs(8), None, tmp_path, peft_config=None, bf16=True, max_steps=1)
    model = trainer.model
    assert model.get_base_model().model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    assert model.get_base_model().model.layers[0].mlp.up_proj.base_layer.compute_dtype == torch.bfloat16
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    assert frozen == {torch.uint8, torch.bfloat16}
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.bias) == (16, 32, "none")
    adapted = {
        name.split(".lora_A")[0].rsplit(".", 1)[-1] for name, _ in model.named_parameters() if ".lora_A" in name
    }
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    # Counted by hand, see test_storage_report_by_hand; rank 16 on 7 layers of 2 blocks.
    lora_weights = 2 * 16 * ((64 + 64) * 2 + (64 + 32) * 2 + (64 + 128) * 3)
    assert f"Adapter: {lora_weights:,} trained weights, {lora_weights * 4 / 2**20:.1f} MiB" in caplog.text
    assert "quantized" in caplog.text and "bfloat16" in caplog.text


def test_storage_report_by_hand(base_folder):
    report = storage_report(attach_adapter(load_base(base_folder), lora(r=4))[0])
    quantized = 0
    for weights in 2 * [64 * 64, 64 * 32, 64 * 32, 64 * 64, 64 * 128, 64 * 128, 128 * 64]:
        blocks = weights // 64
        # 4 bits each; per block a uint8 scale; per 256 blocks a float32 scale of scales; then two code books
        # (16 and 256 float32) and the float32 offset of the scales.
        quantized += weights // 2 + blocks + 4 * -(-blocks // 256) + 4 * 16 + 4 * 256 + 4
    assert report.quantized == quantized
    embeddings, norms = 2 * 320 * 64 * 2, 5 * 64 * 2
    assert report.unquantized == embeddings + norms == sum(report.dtypes.values())
    assert report.dtypes == {"bfloat16": embeddings + norms}
    assert report.trainable_count == 2 * 4 * ((64 + 64) * 2 + (64 + 32) * 2 + (64 + 128) * 3)
    assert report.trainable == 4 * report.trainable_count
    assert [size for _, size in report.largest_unquantized[:2]] == [320 * 64 * 2] * 2


def test_storage_report_counts_tied_weights_once(tiny_llama):
    free, tied = (storage_report(tiny_llama(tie_word_embeddings=tie)) for tie in (False, True))
    assert free.trainable - tied.trainable == 320 * 64 * 4


def test_unquantized_load(base_folder):
    report = storage_report(attach_adapter(load_base(base_folder, quantize=False), lora())[0])
    assert report.quantized == 0 and set(report.dtypes) == {"bfloat16"}


def test_t24_experts_that_stay_unquantized_are_listed(tmp_path):
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path)
    packed = storage_report(attach_adapter(load_base(str(tmp_path)), lora(target_modules=["q_proj"]))[0])
    assert "experts" not in str(packed)
    whole = load_base(str(tmp_path), experts=False)  # as adapters of before were trained
    report = storage_report(attach_adapter(whole, lora(target_modules=["q_proj"]))[0])
    names = [name for name, _ in report.largest_unquantized]
    experts = 2 * 4 * 3 * 64 * 64 * 2  # layers, experts, projections, weights, bytes
    assert sum(size for name, size in report.largest_unquantized if "experts" in name) == experts
    assert "experts" in names[0] and names[0] in str(report)


# ---- T27: the first non-finite value stops the run ------------------------------------------------------------------


class Snapshots(TrainerCallback):
    """The adapter after every step, and what `plant` does after one of them."""

    def __init__(self, after: int = 0, plant: Any = None):
        self.weights: dict[int, dict[str, Tensor]] = {}
        self.after, self.plant = after, plant

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights[state.global_step] = {
            n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad
        }
        if state.global_step == self.after and self.plant is not None:
            self.plant(model)


def run_into_nan(trainer: Any, snapshots: Snapshots, pattern: str) -> int:
    """Train until it stops; the optimizer must not have stepped on what was not finite."""
    trainer.add_callback(snapshots)
    with pytest.raises(NonFiniteError, match=pattern):
        trainer.train()
    last = trainer.state.global_step
    for name, p in adapter_weights(trainer).items():
        assert torch.equal(p, snapshots.weights[last][name])
    steps = {int(state["step"]) for state in trainer.optimizer.state.values()}
    assert steps == {last}
    return last


BAD_TOKEN = 6


def with_bad_token(model: Any) -> Any:
    """The model with NaN as the embedding of `BAD_TOKEN`."""
    model.model.embed_tokens.weight.data[BAD_TOKEN] = float("nan")
    return model


def bad_row(number: int, bad: int) -> Dataset:
    """Pairs of which one alone holds `BAD_TOKEN`."""
    rows = [{k: [7 if t == BAD_TOKEN else t for t in ids] for k, ids in row.items()} for row in id_pairs(number)]
    rows[bad]["prompt_ids"] = [BAD_TOKEN, *rows[bad]["prompt_ids"]]
    return Dataset.from_list(rows)


def test_t27_a_bad_row_is_named(tiny_llama, make_tokenizer, tmp_path):
    trainer = ours(
        with_bad_token(tiny_llama()),
        bad_row(12, 9),
        make_tokenizer(),
        tmp_path,
        per_device_train_batch_size=2,
        train_sampling_strategy="sequential",
        save_strategy="steps",
        save_steps=1,
    )
    snapshots = Snapshots()
    assert run_into_nan(trainer, snapshots, r"Step 5: the loss is not finite, on training rows 9\.") == 4
    kept = PeftModel.from_pretrained(tiny_llama(), tmp_path / "checkpoint-4")
    for name, p in kept.named_parameters():
        if "lora" in name:
            assert torch.equal(p, snapshots.weights[4][name])


def test_t27_a_bad_row_among_the_first_is_named_before_training(tiny_llama, make_tokenizer, tmp_path):
    trainer = ours(with_bad_token(tiny_llama()), bad_row(8, 2), make_tokenizer(), tmp_path)
    with pytest.raises(NonFiniteError, match="Before the first step.*training rows 2 are not finite"):
        trainer.train()


def test_t27_a_broken_weight(tiny_llama, make_tokenizer, tmp_path):
    def plant(model):
        weight = next(p for n, p in model.named_parameters() if "base_layer" in n)
        weight.data[0, 0] = float("nan")

    trainer = ours(tiny_llama(), id_pairs(8), make_tokenizer(), tmp_path, per_device_train_batch_size=2)
    assert (
        run_into_nan(trainer, Snapshots(3, plant), r"Step 4: the loss is not finite, on training rows \d, \d\.") == 3
    )


def test_t27_a_gradient_alone(tiny_llama, make_tokenizer, tmp_path):
    def plant(model):
        weight = next(p for n, p in model.named_parameters() if "lora_A" in n)
        weight.register_hook(lambda grad: grad * float("inf"))

    trainer = ours(
        tiny_llama(),
        id_pairs(8),
        make_tokenizer(),
        tmp_path,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )
    pattern = r"Step 3: the gradient is not finite, on training rows \d, \d, \d, \d\."
    assert run_into_nan(trainer, Snapshots(2, plant), pattern) == 2


# ---- T10: micro-batches don't change the step -----------------------------------------------------------------------


def one_step(tiny_llama: Any, tokenizer: Any, folder: Path, rows: int, size: int, accumulate: int, cls: Any = None):
    """The adapter after one SGD step over all rows."""
    trainer = ours(
        tiny_llama(),
        id_pairs(rows),
        tokenizer,
        folder,
        optim="sgd",
        learning_rate=1.0,
        max_grad_norm=0.0,
        max_steps=1,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulate,
    )
    if cls is not None:
        trainer.__class__ = cls
    trainer.train()
    assert trainer.state.global_step == 1
    return adapter_weights(trainer)


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize(("rows", "splits"), [(8, [(4, 2), (2, 4), (1, 8)]), (7, [(4, 2), (3, 3), (2, 4), (1, 7)])])
def test_t10_any_split_gives_the_same_step(tiny_llama, make_tokenizer, tmp_path, rows, splits):
    whole = one_step(tiny_llama, make_tokenizer(), tmp_path, rows, rows, 1)
    assert max(float(p.abs().max()) for name, p in whole.items() if "lora_B" in name) > 1e-2
    for size, accumulate in splits:
        assert apart(whole, one_step(tiny_llama, make_tokenizer(), tmp_path, rows, size, accumulate)) < 1e-6


def test_t10_a_mean_per_micro_batch_is_another_step(tiny_llama, make_tokenizer, tmp_path):
    class MeanOfMeans(DPOTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return super().compute_loss(model, inputs, return_outputs) / self.current_gradient_accumulation_steps

    whole = one_step(tiny_llama, make_tokenizer(), tmp_path, 7, 7, 1)
    assert apart(whole, one_step(tiny_llama, make_tokenizer(), tmp_path, 7, 4, 2, MeanOfMeans)) > 1e-4
    even = one_step(tiny_llama, make_tokenizer(), tmp_path, 8, 8, 1)
    assert apart(even, one_step(tiny_llama, make_tokenizer(), tmp_path, 8, 4, 2, MeanOfMeans)) < 1e-6


# ---- Adapters given as models ---------------------------------------------------------------------------------------


def test_an_adapters_folder_is_the_model(tiny_llama, make_tokenizer, tmp_path, base_folder):
    """transformers would load base and adapter from it, and wrapping that again would overwrite the adapter."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder, dtype="float32"), lora())
    perturb(model)
    model.save_pretrained(tmp_path / "adapter")
    make_tokenizer().save_pretrained(tmp_path / "adapter")
    expected = named(model, "default")
    loading = {"quantize_base": False, "model_init_kwargs": {"dtype": "float32"}}
    folder = str(tmp_path / "adapter")
    trainer = ours(folder, id_pairs(8), None, tmp_path, peft_config=None, max_steps=2, **loading)
    assert same(named(trainer.model, "default"), expected) and same(named(trainer.model, "reference"), expected)
    trainer.train()
    assert step_logs(trainer)[0]["rewards/margins"] == 0.0
    with pytest.raises(OptionError, match="PeftModel and peft_config is given too"):
        ours(folder, id_pairs(8), None, tmp_path, peft_config=lora(), **loading)
    with pytest.raises(OptionError, match="adapter loaded into it by transformers.*is_trainable=True"):
        attach_adapter(AutoModelForCausalLM.from_pretrained(folder))


def test_a_trainable_base_is_refused(tiny_llama):
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(
        OptionError, match=r"1 weights outside the adapter 'default'.*model\.norm\.weight.*requires_grad_"
    ):
        attach_adapter(model)
