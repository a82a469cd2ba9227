"""One copy: the reference costs no second model. Bytes held, bits of the logits, gradients, and the peak of a step."""

import gc
import hashlib
from typing import Any

import pytest
import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.profiler import ProfilerActivity, profile
from trainer_helpers import id_pairs, lora, ours, step_logs
from transformers import TrainerCallback

from dpo_peft.forward import PackedBatch, Scores, completion_logps
from dpo_peft.model.loading import keep_weights, load_base, storage_report
from dpo_peft.reference import policy
from dpo_peft.reference.adapter_off import reference_logps, reference_mode

IDS = torch.arange(20, 60)[None]


@pytest.fixture(scope="module")
def base_folder(tiny_llama, make_tokenizer, tmp_path_factory) -> str:
    """2.9 million weights, 92 % of them in linear layers."""
    folder = str(tmp_path_factory.mktemp("base"))
    model = tiny_llama(hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=8)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def storages(tensors: Any) -> dict[int, int]:
    """Address of each storage to its bytes: tensors that share one count once."""
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    return found


def all_tensors() -> list[Tensor]:
    """Every tensor that Python can reach, gradients and quantization constants included; fake ones have no bytes."""
    gc.collect()
    kinds = [(thing, type(thing)) for thing in gc.get_objects()]
    tensors = [thing for thing, kind in kinds if issubclass(kind, Tensor) and not issubclass(kind, FakeTensor)]
    return tensors + [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]


class CountBytes(TrainerCallback):
    """Takes stock when a step's gradients exist and the optimizer has not stepped yet."""

    def __init__(self, before: dict[int, int]):
        self.before = before
        self.held = 0

    def on_pre_optimizer_step(self, *args, **kwargs):
        now = storages(all_tensors())
        self.held = sum(size for address, size in now.items() if address not in self.before)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("quantize", [True, False])
def test_the_process_holds_one_copy_of_the_base(base_folder, make_tokenizer, tmp_path, quantize):
    count = CountBytes(storages(all_tensors()))
    trainer = ours(
        base_folder, id_pairs(8), make_tokenizer(), tmp_path, callbacks=[count], quantize_base=quantize, max_steps=3
    )
    trainer.train()
    report = storage_report(trainer.model)
    linear = 4 * (2 * 256 * 256 + 2 * 256 * 64 + 3 * 256 * 768)
    if quantize:
        assert 0.5 * linear < report.quantized < 0.56 * linear  # 4 bits, and the constants
    else:
        assert report.quantized == 0 and report.unquantized > 2 * linear
    base = report.quantized + report.unquantized
    # Beside the base: the adapter, its gradients, Adam's two moments; and room for a batch and buffers.
    expected = base + 4 * report.trainable
    assert expected <= count.held < expected + 0.03 * base


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", ["nf4 in bfloat16", "nf4 in float32", "float32"])
def test_adapter_off_is_the_untouched_base_bit_for_bit(base_folder, make_tokenizer, tmp_path, kind):
    loading = {"quantize": kind != "float32", "init_kwargs": {"dtype": "bfloat16" if "bf" in kind else "float32"}}
    base = load_base(base_folder, **loading)
    keep_weights(base)
    with torch.no_grad():
        expected = base.eval()(IDS).logits
    options = {"quantize_base": loading["quantize"], "model_init_kwargs": loading["init_kwargs"]}
    trainer = ours(
        base_folder, id_pairs(8), make_tokenizer(), tmp_path, max_steps=5, bf16="bfloat16" in kind, **options
    )
    with reference_mode(trainer.model):
        assert torch.equal(trainer.model(IDS).logits, expected)
    trainer.train()
    with reference_mode(trainer.model):
        assert torch.equal(trainer.model(IDS).logits, expected)
    with torch.no_grad():  # the comparison can fail: with the adapter on, the model is another
        assert (trainer.model.eval()(IDS).logits - expected).abs().max() > 1e-2


def digest(parameter: Tensor) -> str:
    return hashlib.sha256(parameter.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("checkpointing", [True, False])
def test_only_the_adapter_gets_gradients_and_moves(base_folder, make_tokenizer, tmp_path, checkpointing):
    class Gradients(TrainerCallback):
        names: set[str] = set()

        def on_pre_optimizer_step(self, *args, model=None, **kwargs):
            self.names = {
                name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0
            }

    seen = Gradients()
    trainer = ours(
        base_folder,
        id_pairs(8),
        make_tokenizer(),
        tmp_path,
        callbacks=[seen],
        max_steps=3,
        gradient_checkpointing=checkpointing,
    )
    before = {name: digest(p) for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if digest(p) != before[name]}
    adapter = {name for name in before if ".lora_A." in name or ".lora_B." in name}
    assert len(adapter) == 4 * 7 * 2
    assert seen.names == moved == adapter


# ---- Peak of a step -------------------------------------------------------------------------------------------------


def peak_bytes(trainer: Any, inputs: dict[str, Any]) -> int:
    """Most bytes allocated at a time by one forward and backward pass, above what was there before."""
    trainer.model.train()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        trainer.compute_loss(trainer.model, inputs).backward()
    trainer.model.zero_grad()
    events = [event for event in prof.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.sampled(2)
@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_reference_costs_its_log_probs_only(base_folder, make_tokenizer, tmp_path, monkeypatch, checkpointing):
    trainer = ours(
        base_folder, id_pairs(8), make_tokenizer(), tmp_path, max_steps=1, gradient_checkpointing=checkpointing
    )
    trainer.train()  # one-time allocations: gradients, buffers
    inputs = trainer.collate([trainer.train_dataset[i] for i in range(8)])
    batch = PackedBatch(**inputs)
    ref = reference_logps(trainer.model, batch)

    peak_bytes(trainer, inputs)
    peak = peak_bytes(trainer, inputs)
    monkeypatch.setattr(policy, "reference_logps", lambda *args: ref)
    without = peak_bytes(trainer, inputs)
    logps = 4 * len(batch.target) + 8 * batch.num_completions
    assert peak - without <= logps + 2048  # the allocator's rounding, and scalars

    # The measurement can fail: a reference that keeps its activations shows at once.
    def with_activations(model: Any, batch: PackedBatch, backend: str, adapter: str | None) -> Scores:
        scores = completion_logps(model, batch, backend)
        return Scores(scores.token_logps_N, scores.logps_C)

    monkeypatch.setattr(policy, "reference_logps", with_activations)
    assert peak_bytes(trainer, inputs) - without > 20 * logps


# ---- The state of the adapter ---------------------------------------------------------------------------------------


SWITCHES = (BaseTunerLayer, AuxiliaryTrainingWrapper)


def state_of(model: Any) -> dict[str, Any]:
    return {
        "grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "training": {name: module.training for name, module in model.named_modules()},
        "off": {name: m.disable_adapters for name, m in model.named_modules() if isinstance(m, SWITCHES)},
        "active": {name: m.active_adapters for name, m in model.named_modules() if isinstance(m, SWITCHES)},
        "grad mode": torch.is_grad_enabled(),
    }


def partly_frozen(tiny_llama: Any) -> Any:
    """A PEFT model in an odd state: parts of the adapter frozen, one layer's off, one module in eval mode."""
    config = lora(modules_to_save=["lm_head"], trainable_token_indices=[11], target_modules=["q_proj", "v_proj"])
    model = get_peft_model(tiny_llama(), config).train()
    for name, p in model.named_parameters():
        if "layers.0" in name:
            p.requires_grad_(False)
    model.get_base_model().model.layers[1].self_attn.v_proj.enable_adapters(False)
    model.get_base_model().model.layers[1].mlp.eval()
    return model


@pytest.mark.parametrize("fails", [True, False])
def test_reference_mode_restores_everything(tiny_llama, fails):
    model = partly_frozen(tiny_llama)
    before = state_of(model)
    assert len(set(before["grad"].values())) == len(set(before["training"].values())) == 2
    try:
        with reference_mode(model):
            inside = state_of(model)
            assert all(inside["off"].values()) and not any(inside["training"].values()) and not inside["grad mode"]
            if fails:
                raise KeyError("inside")
    except KeyError:
        assert fails
    assert state_of(model) == before


def test_reference_mode_survives_a_failing_forward(tiny_llama, make_tokenizer, tmp_path):
    """An exception from inside the reference's forward pass, in the middle of training."""
    trainer = ours(tiny_llama(), id_pairs(8), make_tokenizer(), tmp_path, max_steps=4)
    before = {name: p.requires_grad for name, p in trainer.model.named_parameters()}
    layer = trainer.model.get_base_model().model.layers[1]
    calls = []

    def fail_once(module: Any, inputs: Any) -> None:
        calls.append(module)
        if len(calls) == 8:
            raise RuntimeError("planted")

    handle = layer.register_forward_pre_hook(fail_once)
    with pytest.raises(RuntimeError, match="planted"):
        trainer.train()
    handle.remove()
    assert {name: p.requires_grad for name, p in trainer.model.named_parameters()} == before
    assert not any(m.disable_adapters for m in trainer.model.modules() if isinstance(m, SWITCHES))


def test_a_frozen_part_of_the_adapter_stays_frozen(tiny_llama, make_tokenizer, tmp_path):
    """MiCA trains its A matrices only, and a user may freeze layers; the reference must not thaw them."""
    trainer = ours(
        tiny_llama(), id_pairs(8), make_tokenizer(), tmp_path, peft_config=lora(init_lora_weights="mica"), max_steps=4
    )
    for name, p in trainer.model.named_parameters():
        if "layers.0" in name:
            p.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "layers.1" in name and "lora_A" in name}
    assert step_logs(trainer)[-1]["rewards/margins"] != 0
