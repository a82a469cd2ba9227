"""Loading, freezing and dropout of the model that is trained; what is stored how is in test_trainer_traps.py."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from forward_models import SHARING, build
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from peft.tuners.lora.config import MontecloraConfig
from torch import nn
from trainer_helpers import lora
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
)
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from dpo_peft import OptionError
from dpo_peft.model.loading import attach_adapter, disable_dropout, keep_weights, load_base

IDS = torch.arange(10, 30)[None]


# ---- Loading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, torch.bfloat16),
        ({"dtype": "float32"}, torch.float32),
        ({"dtype": torch.float16}, torch.float16),
        ({"torch_dtype": "float32"}, torch.float32),  # the older name
        ({"dtype": "auto"}, torch.float32),  # as it was saved
    ],
)
def test_dtype(base_folder, given, expected):
    model = load_base(base_folder, quantize=False, init_kwargs=given)
    assert {p.dtype for p in model.parameters()} == {expected}


@pytest.mark.parametrize("wrong", ["fp32", "int8", torch.int8, 32])
def test_wrong_dtype(base_folder, wrong):
    with pytest.raises(OptionError, match="dtype.*'auto', 'bfloat16'"):
        load_base(base_folder, init_kwargs={"dtype": wrong})


def test_init_kwargs_are_passed_on_and_left_alone(base_folder):
    given = {"dtype": "float32", "attn_implementation": "eager"}
    model = load_base(base_folder, quantize=False, init_kwargs=given)
    assert model.config._attn_implementation == "eager"
    assert given == {"dtype": "float32", "attn_implementation": "eager"}


def test_nf4_is_near_the_original_and_not_equal(base_folder, tiny_llama):
    """A rounding to 4 bits: the right layer, and really quantized."""
    original = tiny_llama().model.layers[0].mlp.up_proj.weight
    layer = load_base(base_folder, init_kwargs={"dtype": "float32"}).model.layers[0].mlp.up_proj
    quantized = layer(torch.eye(64)).T.detach()
    error = (quantized - original).norm() / original.norm()
    assert 0.05 < error < 0.15
    assert len(quantized.abs().unique()) < original.abs().unique().numel()


def test_a_quantized_folder_loads_as_it_is(base_folder, tmp_path):
    first = load_base(base_folder, init_kwargs={"dtype": "float32"})
    first.save_pretrained(tmp_path)
    again = load_base(str(tmp_path), init_kwargs={"dtype": "float32"})
    keep_weights(first)
    keep_weights(again)
    with torch.no_grad():
        assert torch.equal(first(IDS).logits, again(IDS).logits)
    assert again.is_loaded_in_4bit


def test_bitsandbytes_may_not_repack_the_weights(base_folder):
    """On some CPUs its layers do so at the first eval-mode forward: the bytes change and the gradient is gone."""
    model, _ = attach_adapter(load_base(base_folder), lora())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        model.eval()(IDS)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    model.train()(IDS).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_repacked_weights_are_refused():
    layer = nn.Linear(2, 2)
    layer.weight.quant_state = SimpleNamespace(packing_format_for_cpu=True)
    with pytest.raises(OptionError, match="repacked for inference.*Load the model again"):
        keep_weights(nn.Sequential(layer))


# ---- The adapter ----------------------------------------------------------------------------------------------------


def test_everything_but_the_adapter_is_frozen(tiny_llama):
    model, _ = attach_adapter(tiny_llama())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".lora_A." in name or ".lora_B." in name}
    adapted = {name.split(".lora_A")[0].rsplit(".", 1)[-1] for name in trained if "lora_A" in name}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}  # not the head


SIZES = dict(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
SCAN = dict(mamba_n_heads=4, mamba_d_head=8, mamba_d_state=4, mamba_n_groups=1, mamba_expand=2, mamba_d_conv=4)
SCANS: dict[str, tuple[str, dict, set[str]]] = {
    "mamba": ("Mamba", dict(state_size=4, num_hidden_layers=2), {"dt_proj", "out_proj", "x_proj"}),
    "mamba2": ("Mamba2", dict(num_heads=4, head_dim=8, state_size=4, n_groups=1, num_hidden_layers=2), {"out_proj"}),
    "bamba": ("Bamba", dict(intermediate_size=32, attn_layer_indices=[1], **SCAN), {"out_proj"}),
    "jamba": (
        "Jamba",
        dict(intermediate_size=32, mamba_d_state=4, attn_layer_period=2, attn_layer_offset=1),
        {"dt_proj"},
    ),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("family", SCANS)
def test_no_adapter_where_a_scan_reads_the_weights_itself(family):
    """Mamba's layers, of which PEFT refuses some and wraps others without effect; the rest is adapted as ever."""
    name, sizes, left_out = SCANS[family]
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **sizes})
    model, _ = attach_adapter(getattr(transformers, f"{name}ForCausalLM")(config))
    own = {module for module in model.modules() if hasattr(module, "A_log")}
    layers = {name for mixer in own for name, child in mixer.named_children() if hasattr(child, "weight")}
    adapted = {name for mixer in own for name, child in mixer.named_children() if hasattr(child, "lora_A")}
    assert left_out <= layers and adapted == layers - left_out - {"conv1d"} - {n for n in layers if "norm" in n}
    model(input_ids=IDS, labels=IDS).loss.backward()
    idle = [n for n, p in model.named_parameters() if ".lora_B." in n and (p.grad is None or not p.grad.any())]
    assert not [name for name in idle if "expert" not in name]


def test_an_adapter_on_such_a_layer_would_have_no_gradient():
    """Negative control of the test above."""
    config = transformers.MambaConfig(**{**SIZES, "state_size": 4})
    model = get_peft_model(transformers.MambaForCausalLM(config), lora(target_modules=["dt_proj", "in_proj"]))
    model(input_ids=IDS, labels=IDS).loss.backward()
    moved = {n for n, p in model.named_parameters() if ".lora_B." in n and p.grad is not None and p.grad.any()}
    assert moved and not [name for name in moved if "dt_proj" in name]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AdaLoraConfig(total_step=10, target_modules=["q_proj"]), "AdaLoraConfig, which needs a schedule"),
        (lora(monteclora_config=MontecloraConfig()), "monteclora_config.*a loss of its own"),
    ],
    ids=["adalora", "monteclora"],
)
def test_methods_with_steps_or_losses_of_their_own_are_refused(config, message, tiny_llama):
    with pytest.raises(OptionError, match=message):
        attach_adapter(tiny_llama(), config)
    with pytest.raises(OptionError, match=message):
        attach_adapter(get_peft_model(tiny_llama(), config))


def test_several_active_adapters_are_refused(tiny_llama):
    model = get_peft_model(tiny_llama(), lora(), adapter_name="a")
    model.add_adapter("b", lora())
    model.base_model.set_adapter(["a", "b"])
    with pytest.raises(OptionError, match="2 adapters are active.*set_adapter"):
        attach_adapter(model)


def test_a_model_with_nan_is_not_taken_for_a_changed_one(tiny_llama):
    """NaN differs from itself; the comparison of the base before and after must not stumble over it."""
    model = tiny_llama()
    model.model.embed_tokens.weight.data[240] = float("nan")  # one of the tokens that are compared
    assert attach_adapter(model, lora())[0].peft_config


# ---- Dropout --------------------------------------------------------------------------------------------------------


MODELS = {
    "gpt2": (
        lambda p: GPT2LMHeadModel(
            GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, attn_pdrop=p, embd_pdrop=p, resid_pdrop=p)
        ),
        ["c_attn"],
    ),
    "opt": (
        lambda p: OPTForCausalLM(
            OPTConfig(
                vocab_size=64,
                hidden_size=32,
                word_embed_proj_dim=32,
                ffn_dim=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                dropout=p,
                attention_dropout=p,
                layerdrop=p,
            )
        ),
        ["q_proj"],
    ),
    "falcon": (
        lambda p: FalconForCausalLM(
            FalconConfig(
                vocab_size=64,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                attention_dropout=p,
                hidden_dropout=p,
            )
        ),
        ["query_key_value"],
    ),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_dropout_of_every_kind_is_turned_off(name, attention):
    build, targets = MODELS[name]
    model = build(0.3)
    model.set_attn_implementation(attention)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=targets, lora_dropout=0.4, init_lora_weights=False))

    def spread() -> float:
        with torch.no_grad():
            runs = torch.stack([model.train()(IDS).logits for _ in range(4)])
        return float((runs - runs[0]).abs().max())

    assert spread() > 1e-3
    found = disable_dropout(model)
    assert "lora_dropout" in found and len(found) >= 2
    assert spread() == 0.0
    with torch.no_grad():
        assert torch.equal(model.train()(IDS).logits, model.eval()(IDS).logits)
    assert disable_dropout(model) == []


class NoisyRouter(MixtralTopKRouter):
    def forward(self, hidden_states):
        if self.training:
            hidden_states = hidden_states * torch.empty_like(hidden_states).uniform_(0.7, 1.3)
        return super().forward(hidden_states)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("class_name", ["Phimoe", "Mixtral"])
def test_routers_that_draw_at_random_in_training(class_name, checkpointing):
    """They would act on the policy alone, and on no two of its passes alike; gradients are those of evaluation."""
    near = dict(router_jitter_noise=0.4)  # among experts of about this share of the best score Phi-MoE draws
    model = build(class_name, dict(num_local_experts=4, num_experts_per_tok=2, **near), dropout=True).double()
    if class_name == "Mixtral":  # this one multiplies by noise
        for layer in model.model.layers:
            layer.mlp.gate.__class__ = NoisyRouter
    model.set_experts_implementation("eager")
    if checkpointing:
        model.gradient_checkpointing_enable()

    def value() -> torch.Tensor:
        return model.train()(IDS).logits.log_softmax(-1)[..., 0].sum()

    with torch.no_grad():
        assert len({float(value()) for _ in range(4)}) > 1
    assert disable_dropout(model)[-1] == "sampling of experts"
    weight = model.get_input_embeddings().weight
    (gradient,) = torch.autograd.grad(value(), weight)
    (evaluated,) = torch.autograd.grad(model.eval()(IDS).logits.log_softmax(-1)[..., 0].sum(), weight)
    assert torch.equal(gradient, evaluated)
    assert disable_dropout(model) == []


@pytest.mark.parametrize("given", [None, {"target_modules": "all-linear", "r": 2}], ids=["default", "all-linear"])
@pytest.mark.parametrize(("class_name", "options"), [SHARING["llama4"], ("Phimoe", {})])
def test_a_router_that_is_a_linear_layer_gets_no_adapter(class_name, options, given):
    """It gives more than one tensor, so PEFT's layer around it fails in the first forward pass."""
    config = None if given is None else LoraConfig(**given)
    model, _ = attach_adapter(build(class_name, options), config, None, True)
    adapted = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert any(name.endswith("q_proj") for name in adapted) and not any(name.endswith("router") for name in adapted)
    model(input_ids=IDS).logits.sum().backward()
