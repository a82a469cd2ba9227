"""Each family's fused layers against the model's own, and each part of an entry left out.

The oracle is transformers' model with PEFT's layers, run on the same packed batch; that this equals the model's own
logits on padded rows is tests/forward/test_shared_families.py's.
"""

import re
from dataclasses import replace
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import zoo
from forward_models import adapter_grads, add_lora, random_samples
from paths import REPO
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from zoo import COMPOSITES, PICTURE, TEXT, config_of

from dpo_peft.forward import completion_logps, pack, plan_forward
from dpo_peft.fused.elementwise import rms_norm
from dpo_peft.fused.families import FAMILIES, NORMS
from dpo_peft.model.loading import keep_weights
from dpo_peft.reference.adapter_off import reference_logps, reference_mode

# Prompts within the window of 16 tokens and far beyond it, and beyond the 64 from which Ministral 3 scales queries.
SAMPLES = random_samples([(10, (9, 14)), (150, (5, 30))], vocab=PICTURE)
BATCH = pack(SAMPLES)
# Types of FAMILIES whose model here asks for what the entry rules out -> what that is.
REFUSED = {
    "gemma4_e2b": "hidden_size_per_layer_input",
    "gemma4-vl": "hidden_size_per_layer_input",
}


def type_of(name: str) -> str:
    return config_of(name).get_text_config().model_type


KNOWN = [name for name in [*TEXT, *(f"{name}-vl" for name in COMPOSITES)] if type_of(name) in FAMILIES]
FUSED = [name for name in KNOWN if name not in REFUSED]


def adapted(name: str, **options: Any) -> Any:
    return add_lora(zoo.build(name).eval(), **options)


def scored(model: Any, backend: Any, routing: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """Token log-probs and the adapter's gradients, of the routers' auxiliary loss too where asked for."""
    scores = completion_logps(model, BATCH, backend, routing=routing)
    logps_C = scores.logps_C
    if scores.routing is not None:
        slopes_X = torch.linspace(-1, 1, scores.routing.probs_EX.shape[1], dtype=torch.float64)
        logps_C = logps_C + (scores.routing.probs_EX @ slopes_X).sum()
    return scores.token_logps_N.detach(), adapter_grads(model, logps_C)


def far(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys() and a
    return max(float((a[name] - b[name]).norm() / b[name].norm().clamp(min=1e-12)) for name in b)


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.sampled(9, slow=8)
def test_values_and_gradients_are_the_models_own(name: str) -> None:
    model = adapted(name)
    plan = plan_forward(model)
    assert plan.fused is not None, plan.unfused or plan.reason
    own_N, own_grads = scored(model, plan.backend)
    assert own_N.std() > 0.05
    for checkpointed in (0, len(plan.fused.parts.layers)):
        plan.fused.checkpointed = lambda batch, n=checkpointed: (n, 0)
        fused_N, grads = scored(model, plan.fused)
        assert (fused_N - own_N).abs().max() < 1e-5
        assert far(grads, own_grads) < 1e-4
    # The reference: adapters off in fused products and in the model's own modules alike.
    with reference_mode(model):
        off_N = completion_logps(model, BATCH, plan.backend).token_logps_N
    assert (reference_logps(model, BATCH, plan.fused).token_logps_N - off_N).abs().max() < 1e-5
    assert (off_N - own_N).abs().max() > 1e-2
    plan = plan_forward(model.to(torch.bfloat16))
    assert plan.fused is not None, plan.unfused


def test_every_family_is_tried() -> None:
    """But those that this version of transformers doesn't have, and others' names of Llama's own class."""
    tried = {type_of(name) for name in FUSED} | {"cwm", "exaone", "iquestcoder"}.intersection(CONFIG_MAPPING)
    assert {model_type for model_type in FAMILIES if model_type in CONFIG_MAPPING} == tried


def test_most_named_bases_are_fused() -> None:
    """What docs/models.md says of them, by the type of their layers."""
    table = (REPO / "docs" / "models.md").read_text("utf-8").partition("## Most named bases")[2]
    rows = re.findall(r"^\| (\w+) \| (.+) \| (fused|own) \|$", table, re.M)
    assert all((layers == "fused") == (model_type in FAMILIES) for model_type, _, layers in rows)
    number = {
        layers: sum(len(bases.split(", ")) for _, bases, x in rows if x == layers) for layers in ("fused", "own")
    }
    assert sum(number.values()) == 50 and number["fused"] >= 45
    assert f"{number['fused']} of them run fused" in table


@pytest.mark.parametrize("name", REFUSED)
def test_what_an_entry_does_not_say_is_refused(name: str) -> None:
    plan = plan_forward(adapted(name))
    assert plan.shared and plan.fused is None and REFUSED[name] in plan.unfused


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_5_moe_text", "gpt_oss", "mixtral", "granitemoehybrid"])
@pytest.mark.sampled(5)
def test_routers_are_recorded(name: str) -> None:
    """Also where a layer is recomputed: their auxiliary loss has the gradient that it has without fused layers."""
    model = adapted(name)
    plan = plan_forward(model)
    assert plan.fused is not None, plan.unfused
    _, own_grads = scored(model, plan.backend, routing=True)
    for checkpointed in (0, 2):
        plan.fused.checkpointed = lambda batch, n=checkpointed: (n, 0)
        assert far(scored(model, plan.fused, routing=True)[1], own_grads) < 1e-4
        assert far(scored(model, plan.fused)[1], own_grads) > 1e-3  # the control: without the loss


def test_frozen_adapters_take_the_place_of_the_active_one() -> None:
    """In the fused half of a layer and in its own one."""
    model = adapted("qwen3_5_moe_text")
    other = add_lora(zoo.build("qwen3_5_moe_text").eval(), seed=5).peft_config["default"]
    model.add_adapter("frozen", other)
    for name, parameter in model.named_parameters():
        if "frozen" in name:
            nn.init.normal_(parameter, std=0.1)
    model.set_adapter("default")
    plan = plan_forward(model)
    assert plan.fused is not None, plan.unfused
    with reference_mode(model, "frozen"):
        exchanged_N = completion_logps(model, BATCH, plan.backend).token_logps_N
    found_N = reference_logps(model, BATCH, plan.fused, "frozen").token_logps_N
    assert (found_N - exchanged_N).abs().max() < 1e-5
    policy_N = completion_logps(model, BATCH, plan.fused).token_logps_N
    assert (policy_N - found_N).abs().max() > 0.1


@pytest.mark.parametrize("name", ["gemma3_text", "qwen3_5_text", "cohere2", "glm4", "ernie4_5", "olmo3"])
@pytest.mark.sampled(6)
def test_half_precision_on_4_bits_is_no_further_from_float32_than_the_models_own(name: str) -> None:
    def run(dtype: torch.dtype, fused: bool) -> tuple[Tensor, dict[str, Tensor]]:
        base = zoo.build(name).eval().to(torch.bfloat16)  # weights that bfloat16 holds exactly
        for path, linear in list(base.named_modules()):
            if isinstance(linear, nn.Linear) and "lm_head" not in path:
                new = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=dtype)
                options: dict[str, Any] = dict(quant_type="nf4", requires_grad=False, module=new)
                new.weight = bnb.nn.Params4bit(linear.weight.data, **options)._quantize("cpu")
                base.set_submodule(path, new)
        model = add_lora(base)
        keep_weights(model)
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        plan = plan_forward(model, fused=fused)
        assert (plan.fused is not None) == fused, plan.unfused
        token_logps_N, grads = scored(model, plan.scorer)
        return token_logps_N, {name: grad.float() for name, grad in grads.items()}

    exact_N, exact_grads = run(torch.float32, False)
    errors = []
    for fused in (True, False):
        found_N, grads = run(torch.bfloat16, fused)
        off = sum(float((grads[n] - g).norm() ** 2) for n, g in exact_grads.items()) ** 0.5
        errors.append((float((found_N - exact_N).norm()), off))
    (fused_error, fused_off), (own_error, own_off) = errors
    assert 0 < fused_error < 1.25 * own_error and 0 < fused_off < 1.25 * own_off


# What an entry says, left out or exchanged: family, fields. Each must be noticed at start.
WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    "1 + w": ("gemma3_text", dict(norm_kind="gemma 4")),
    "post-norm": ("gemma3_text", dict(post_norm=None)),
    "post-norm of the second half": ("glm4", dict(mlp_post_norm=None)),
    "head norms": ("gemma3_text", dict(head_norms=None)),
    "head norms before, not after": ("hunyuan_dense", dict(late_norms=False)),
    "angles of the layer's kind": ("gemma3_text", dict(rope_by_type=False)),
    "pairs": ("glm4", dict(pairs=False)),
    "spread angles": ("helium", dict(spread=None)),
    "layers without positions": ("smollm3", dict(rotates=lambda attention, config: True)),
    "soft-cap": ("gemma2", dict(softcap=None)),
    "sinks": ("gpt_oss", dict(sinks=None)),
    "query scale, far": ("ministral3", dict(query_factor=None)),
    "residual multiplier": ("granite", dict(residual_multiplier=None)),
    "embedding multiplier": ("granite", dict(embedding_multiplier=None)),
    "layer scalar": ("gemma4_text", dict(scalar=None)),
    "norm of values": ("gemma4_text", dict(value_norm=False)),
    "parallel halves": ("cohere2", dict(parallel=False)),
    "mean of a layer norm": ("cohere2", dict(norm_kind="wide")),
    "gates": ("qwen3_5_text", dict(gated=False)),
    "experts": ("gemma4_moe", dict(experts=lambda layer, normed, residual: layer.mlp(normed))),
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.sampled(3)
def test_an_entry_without_a_part_is_noticed(what: str, monkeypatch: Any) -> None:
    name, changes = WRONG[what]
    model = adapted(name)
    if name == "gemma4_text":  # as trained ones have it; it is made as 1
        for layer in model.get_base_model().get_decoder().layers:
            layer.layer_scalar.fill_(0.7)
    right = plan_forward(model)
    assert right.fused is not None, right.unfused
    monkeypatch.setitem(FAMILIES, type_of(name), replace(FAMILIES[type_of(name)], **changes))
    plan = plan_forward(model)
    assert plan.shared and plan.fused is None
    assert "fused log-probs differ by" in plan.unfused or "Error" in plan.unfused


def test_activations_are_those_of_the_config() -> None:
    """One that isn't known is refused, and one exchanged for another noticed."""
    model = adapted("gemma3_text")
    config = model.get_base_model().config
    config.hidden_activation = "silu"
    assert "fused log-probs differ by" in plan_forward(model).unfused
    config.hidden_activation = "gelu_fast"
    assert "hidden_act is 'gelu_fast'" in plan_forward(model).unfused


def test_norm_kinds_are_those_of_transformers() -> None:
    """Each kind on a module that has it, in half precision too: the same bits."""
    for name, kind in {"llama": "plain", "olmo2": "wide", "gemma3_text": "one plus", "cohere2": "layer"}.items():
        norm = zoo.build(name).to(torch.bfloat16).get_decoder().norm
        x_TH = torch.randn(7, 64).to(torch.bfloat16)
        assert torch.equal(rms_norm(x_TH, NORMS[kind](norm)), norm(x_TH))
