"""Fused layers: the model's own function and gradients, whatever is checkpointed, on models they are right for only.

The oracle is transformers' model with PEFT's layers, run on the same batch.
"""

from dataclasses import replace
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from forward_models import add_lora, build
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from varlen_kernel import Flash, flash_kernel

from dpo_peft.errors import OptionError
from dpo_peft.forward import Sample, attention, completion_logps, pack, plan_forward
from dpo_peft.forward.attention import backend_named
from dpo_peft.fused import decoder, products, recognition
from dpo_peft.fused.heads import queries_keys_values
from dpo_peft.fused.model import FusedModel
from dpo_peft.fused.recognition import fused_decoder
from dpo_peft.model.loading import keep_weights
from dpo_peft.reference.adapter_off import reference_logps, reference_mode

SAMPLES = [
    Sample([5, 9, 12, 40, 7, 33, 21], [[8, 30, 51], [60, 17]]),
    Sample([3, 99], [[14, 15, 92, 65], [35], [89, 79, 32, 38, 46]]),
]
WINDOWED = dict(sliding_window=4, use_sliding_window=True, max_window_layers=1)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-biased": ("Llama", dict(attention_bias=True, mlp_bias=True)),
    "llama-wide-heads": ("Llama", dict(head_dim=32)),
    "mistral": ("Mistral", dict(sliding_window=4)),
    "qwen2": ("Qwen2", {}),
    "qwen2-windowed": ("Qwen2", WINDOWED),
    "qwen3": ("Qwen3", {}),
    "qwen3-windowed": ("Qwen3", WINDOWED),
}
# Adapters: some modules only, ranks that differ, scales that are no power of 2.
LORAS: dict[str, dict[str, Any]] = {
    "all": {},
    "attention only": dict(target_modules=["q_proj", "v_proj"]),
    "mlp only": dict(target_modules=["up_proj"]),
    "down only": dict(target_modules=["down_proj"]),
    "ranks": dict(rank_pattern={"k_proj": 3, "gate_proj": 5}, lora_alpha=7, use_rslora=True),
}


def adapted(base: nn.Module, **options: Any) -> PeftModel:
    model = add_lora(base, **options)
    draw = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.data = 1 + 0.3 * torch.randn(parameter.shape, generator=draw).to(parameter.dtype)
    return model


def fused_plan(model: nn.Module, **options: Any) -> FusedModel:
    plan = plan_forward(model, **options)
    assert plan.fused is not None, plan.unfused
    return plan.fused


def scored(model: nn.Module, backend: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Token log-probs, and gradients of a sum that tells the completions apart."""
    model.zero_grad()
    scores = completion_logps(model, pack(SAMPLES), backend)
    (scores.logps_C * torch.arange(1.0, 1 + len(scores.logps_C))).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return scores.token_logps_N.detach(), grads


def far(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys() and a
    return max(float((a[name] - b[name]).norm() / b[name].norm()) for name in b)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("lora", LORAS)
def test_values_and_gradients_are_the_models_own(name: str, lora: str) -> None:
    if lora != "all" and name not in ("llama", "qwen3"):
        pytest.skip("one model of each kind is enough")
    kind, options = MODELS[name]
    model = adapted(build(kind, options), **LORAS[lora])
    layers = fused_plan(model)
    own_N, own_grads = scored(model, "dense")
    for checkpointed in (0, 1, 2):
        layers.checkpointed = lambda batch, n=checkpointed: (n, 0)
        fused_N, grads = scored(model, layers)
        assert (fused_N - own_N).abs().max() < 1e-5
        assert far(grads, own_grads) < 1e-5


def test_four_bit_weights() -> None:
    """NF4 with and without double quantization and a layer that stays as it is, computed in float32."""
    base = build("Llama", {})
    for i, (name, linear) in enumerate(list(base.named_modules())):
        if isinstance(linear, nn.Linear) and "layers" in name and "layers.0.mlp.up" not in name:
            new = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32)
            options: dict[str, Any] = dict(quant_type="nf4", compress_statistics=bool(i % 2), module=new)
            new.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, **options)._quantize("cpu")
            base.set_submodule(name, new)
    model = adapted(base)
    keep_weights(model)
    layers = fused_plan(model)
    layers.checkpointed = lambda batch: (1, 0)
    own_N, own_grads = scored(model, "dense")
    fused_N, grads = scored(model, layers)
    assert (fused_N - own_N).abs().max() < 1e-5 and far(grads, own_grads) < 1e-5


def test_bfloat16_is_no_further_from_float32_than_the_models_own() -> None:
    def run(dtype: torch.dtype, backend: str | None) -> tuple[Tensor, dict[str, Tensor]]:
        model = adapted(build("Llama", dict(num_hidden_layers=6))).to(dtype)
        layers = fused_plan(model)
        return scored(model, backend or layers)

    # Weights that bfloat16 holds exactly.
    exact = adapted(build("Llama", dict(num_hidden_layers=6))).to(torch.bfloat16).float()
    exact_N, exact_grads = scored(exact, "dense")
    errors = []
    for backend in (None, "dense"):
        found_N, grads = run(torch.bfloat16, backend)
        wide = {name: grad.float() for name, grad in grads.items()}
        errors.append(((found_N - exact_N).norm(), far(wide, exact_grads)))
    (fused_error, fused_grads), (own_error, own_grads) = errors
    assert 0 < fused_error <= 1.1 * own_error
    assert 0 < fused_grads <= 1.1 * own_grads


def test_checkpointed_layers_equal_the_others_bit_for_bit() -> None:
    model = adapted(build("Qwen3", {}))
    layers = fused_plan(model)
    runs = []
    for checkpointed in (0, 1, 2):
        layers.checkpointed = lambda batch, n=checkpointed: (n, 0)
        runs.append(scored(model, layers))
    for values_N, grads in runs[1:]:
        assert torch.equal(values_N, runs[0][0])
        assert all(torch.equal(grad, runs[0][1][name]) for name, grad in grads.items())


def test_a_checkpointed_layer_keeps_its_input_alone() -> None:
    model = adapted(build("Llama", {}))
    layers = fused_plan(model)

    def kept(checkpointed: int) -> int:
        layers.checkpointed = lambda batch: (checkpointed, 0)
        sizes: dict[int, int] = {}

        def pack_tensor(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack_tensor, lambda tensor: tensor):
            loss = completion_logps(model, pack(SAMPLES), layers).logps_C.sum()
        assert loss.requires_grad
        return sum(sizes.values())

    saved = [kept(n) for n in (0, 1, 2)]
    assert saved[0] > saved[1] > saved[2]
    batch = pack(SAMPLES)
    inputs = 2 * batch.input_ids.numel() * 64 * 4
    rest = len(batch.target) * 64 * 4 * 2  # hidden states that predict, and their gradient
    assert saved[2] < inputs + rest + 2**14


@pytest.fixture
def flash(monkeypatch: Any) -> type[Flash]:
    monkeypatch.setattr(attention, "varlen_kernel", flash_kernel)
    monkeypatch.setattr(Flash, "calls", 0)
    return Flash


@pytest.mark.parametrize("kind", [*MODELS][:3])
def test_layers_that_keep_what_attention_gave_do_not_attend_again(kind: str, flash: type[Flash]) -> None:
    """Bit for bit, with keys that are gathered; and their recomputation has attention's operations less."""
    model = adapted(build(MODELS[kind][0], {**MODELS[kind][1], "num_hidden_layers": 3}))
    fused_plan(model)
    layers = fused_decoder(model.get_base_model(), torch.float32, "varlen")
    own_N, own_grads = scored(model, "dense")
    runs, flops = {}, {}
    for keeping in [(0, 0), (3, 0), (3, 2), (3, 3), (2, 1)]:
        layers.checkpointed = lambda batch, keeping=keeping: keeping
        flash.calls = 0
        with FlopCounterMode(display=False) as counter:
            runs[keeping] = scored(model, layers)
        flops[keeping] = counter.get_total_flops()
        assert flash.calls == 3 + keeping[0] - keeping[1]
        assert torch.equal(runs[keeping][0], runs[0, 0][0])
        assert all(torch.equal(grad, runs[0, 0][1][name]) for name, grad in runs[keeping][1].items())
    assert (runs[3, 3][0] - own_N).abs().max() < 1e-5 and far(runs[3, 3][1], own_grads) < 1e-5
    # The emulated kernel multiplies all queries with all keys.
    batch, config = pack(SAMPLES), model.config
    size = config.num_attention_heads * (config.head_dim or 16)
    of_attention = 4 * batch.input_ids.numel() * len(batch.kv_index) * size
    assert flops[3, 0] - flops[3, 2] == 2 * of_attention and flops[3, 0] - flops[3, 3] == 3 * of_attention


def test_the_reference_is_the_model_with_its_adapter_off_or_exchanged() -> None:
    model = adapted(build("Llama", {}))
    model.add_adapter("frozen", LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"]))
    for name, parameter in model.named_parameters():
        if "frozen" in name:
            nn.init.normal_(parameter, std=0.2)
    model.set_adapter("default")
    layers, batch = fused_plan(model), pack(SAMPLES)
    values = []
    for adapter in (None, "frozen"):
        with reference_mode(model, adapter):
            switched_N = completion_logps(model, batch, "dense").token_logps_N
        values.append(reference_logps(model, batch, layers, adapter).token_logps_N)
        assert (values[-1] - switched_N).abs().max() < 1e-5
        with reference_mode(model, adapter):  # the switches are read too
            assert torch.equal(completion_logps(model, batch, layers).token_logps_N, values[-1])
    policy_N = completion_logps(model, batch, layers).token_logps_N
    assert (values[0] - values[1]).abs().max() > 0.1 and (policy_N - values[0]).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_changes_not_one_bit(dtype: torch.dtype) -> None:
    base = build("Llama", {}).to(dtype)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    layers, batch = fused_plan(model), pack(SAMPLES)
    policy_N = completion_logps(model, batch, layers).token_logps_N
    assert torch.equal(policy_N, reference_logps(model, batch, layers).token_logps_N)


def test_activations_are_used_up_by_a_backward_pass() -> None:
    model = adapted(build("Llama", {}))
    layers = fused_plan(model)
    loss = completion_logps(model, pack(SAMPLES), layers).logps_C.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="used up by a first backward pass"):
        loss.backward()


def hooked(model: PeftModel) -> None:
    model.get_base_model().model.layers[1].mlp.register_forward_hook(lambda module, args, output: output * 2)


def replaced(model: PeftModel) -> None:
    attention = model.get_base_model().model.layers[0].self_attn
    attention.forward = type(attention).forward.__get__(attention)


def dropping(model: PeftModel) -> None:
    model.config.attention_dropout = 0.1


def trained_norm(model: PeftModel) -> None:
    model.get_base_model().model.layers[0].input_layernorm.weight.requires_grad_(True)


BROKEN = {
    hooked: "has hooks",
    replaced: "forward is replaced",
    dropping: "attention has dropout",
    trained_norm: "or is trained",
}


@pytest.mark.parametrize("change", BROKEN, ids=lambda change: change.__name__)
def test_models_with_something_else_keep_their_own_layers(change: Any) -> None:
    model = adapted(build("Llama", {}))
    change(model)
    plan = plan_forward(model)
    assert plan.fused is None and BROKEN[change] in plan.unfused and plan.unfused in str(plan)
    with pytest.raises(OptionError, match=f"fused_layers=True, but .*{BROKEN[change]}"):
        plan_forward(model, fused=True)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (dict(use_dora=True), "not plain LoRA"),
        (dict(lora_bias=True), "adapter with a bias"),
        (dict(lora_dropout=0.1), "drops out"),
        (dict(modules_to_save=["lm_head"]), "lm_head is trained"),
        (dict(target_modules=["q_proj", "embed_tokens"]), "embed_tokens is trained, or has an adapter"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_adapters_of_another_kind_keep_the_models_own_layers(options: dict[str, Any], reason: str) -> None:
    lora = LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options})
    plan = plan_forward(get_peft_model(build("Llama", {}), lora))
    assert plan.shared and plan.fused is None and reason in plan.unfused


def test_other_models_keep_their_own_layers() -> None:
    for kind in ("Apertus", "GPTNeoX", "Starcoder2", "Olmoe"):
        plan = plan_forward(adapted(build(kind, {})))
        assert plan.shared and plan.fused is None and "model type" in plan.unfused
    assert plan_forward(adapted(build("Llama", {})), fused=False).unfused == "fused_layers=False"


def backwards(qkv: Tensor, heads: Any, queries: Any, keys: Any, places: Any) -> Any:
    """Turned by the opposite angles."""
    queries, keys = (angles._replace(sin_TR=-angles.sin_TR) for angles in (queries, keys))
    return queries_keys_values(qkv, heads, queries, keys, places)


def test_the_probe_refuses_layers_that_are_wrong(monkeypatch: Any) -> None:
    """Negative control: each piece of a layer broken on purpose is noticed at start."""
    model = adapted(build("Qwen3", WINDOWED))
    dense, norm, activate = backend_named("dense"), products.rms_norm, products.activate
    wrong: dict[str, tuple[Any, Any]] = {
        "rms_norm": (products, lambda x, n, *out: norm(x, n._replace(eps=n.eps + 0.1), *out)),
        "activate": (products, lambda gate_up, out, kind: activate(gate_up.roll(out.shape[1], 1), out, kind)),
        "queries_keys_values": (decoder, backwards),
        # without its window
        "backend_named": (recognition, lambda name: replace(dense, attend=lambda *x: dense.attend(*x[:-1], None))),
    }
    for name, (module, function) in wrong.items():
        with monkeypatch.context() as patch:
            patch.setattr(module, name, function)
            plan = plan_forward(model)
            assert plan.fused is None and "fused log-probs differ by" in plan.unfused, name
    fused_plan(model)


def test_inputs_of_checkpointed_layers_can_be_offloaded() -> None:
    model = adapted(build("Llama", {}))
    layers = fused_plan(model)
    layers.checkpointed = lambda batch: (2, 0)
    kept_N, kept = scored(model, layers)
    layers.offload = True
    offloaded_N, offloaded = scored(model, layers)
    assert torch.equal(kept_N, offloaded_N) and all(torch.equal(grad, kept[name]) for name, grad in offloaded.items())
