"""Sharing is exact on every family that shares, at lengths that cross windows, chunks, states and scalings.

The oracle is the model's own logits on padded rows, one per completion, before our attention or mixers come near it.
"""

import re
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
import zoo
from forward_models import own_token_logps, random_samples
from torch import Tensor, nn

from dpo_peft.forward import Sample, attention, completion_logps, lengths, pack, plan_forward, states
from dpo_peft.forward.attention import layout_marker, prefix_shared_attention
from dpo_peft.forward.layout import PackedBatch, visible
from dpo_peft.forward.score import Decoder
from dpo_peft.model.loading import disable_dropout
from dpo_peft.wings import wing

EXACT, EXACT_GRADIENT = 1e-5, 1e-4
# What doesn't share -> why.
ROWS = {
    "attention interface": ["bloom", "falcon", "gptj", "mpt"],
    "layers are plain attention": ["nemotron", "stablelm", "mllama-vl"],
    "carry a state that can't be handed on": ["falcon_mamba", "jamba", "minimax"],
    "kind indexed_attention": ["deepseek_v32", "glm_moe_dsa", "hy_v4", "qwen4_exp_text", "qwen4_exp-vl"],
    "kind heavily_compressed_attention": ["deepseek_v4"],
}
REASONS = {name: reason for reason, names in ROWS.items() for name in names}
REFUSED = ["inkling_text"]  # it scales its logits by a number that is not known here


def samples_of(prompt: int) -> list[Sample]:
    """A prompt of that length, one that is padded to it, and one that is shorter than a convolution; completions
    shorter and longer than windows, chunks and prompts."""
    shape = [(prompt, (20, 90)), (2 * prompt // 3, (7, 4)), (2, (3, 1, 9))]
    return random_samples(shape, seed=prompt, vocab=zoo.PICTURE)


def gradients(model: nn.Module, logps_N: Tensor) -> dict[str, Tensor]:
    """Of a weighted sum of the log-probs, with respect to every matrix that gets one: what an adapter may be on."""
    model.zero_grad()
    (logps_N * torch.linspace(-1.0, 1.3, len(logps_N))).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and p.ndim > 1}


def assert_exact(model: nn.Module, own: list[tuple[Tensor, dict[str, Tensor]]], prompts: list[int]) -> None:
    for (own_N, own_grads), prompt in zip(own, prompts, strict=True):
        shared_N = completion_logps(model, pack(samples_of(prompt))).token_logps_N
        assert own_N.std() > 0.02  # something is there to get wrong
        assert (shared_N.detach() - own_N).abs().max() < EXACT, prompt
        grads = gradients(model, shared_N)
        assert grads.keys() == own_grads.keys()
        # Where a gradient is zero but for rounding, the largest of all is what it is measured by.
        floor = 1e-3 * max(float(g.abs().max()) for g in own_grads.values())
        for name, grad in grads.items():
            largest = max(float(own_grads[name].abs().max()), floor)
            assert (grad - own_grads[name]).abs().max() < EXACT_GRADIENT * largest, (prompt, name)


def build(name: str) -> Any:
    model = zoo.build(name, noise=0.05).eval()  # with more, delta rules round by 1e-5 between any two batches
    disable_dropout(model)
    for module in model.modules():
        if getattr(module, "attn_logit_softcapping", None):
            module.attn_logit_softcapping = 2.0  # Gemma's 50 is far above these scores
    return model


@pytest.mark.sampled(24, slow=8)
@pytest.mark.parametrize("name", [name for name in zoo.ALL if name not in REFUSED])
def test_sharing_is_exact(name: str) -> None:
    model, prompts, own = build(name), [10, 150, 600], []
    if reason := REASONS.get(name):
        plan = plan_forward(model)
        assert not plan.shared and reason in plan.reason
        return
    for prompt in prompts:
        own_N = torch.cat(own_token_logps(model, samples_of(prompt)))
        own.append((own_N.detach(), gradients(model, own_N)))
    plan = plan_forward(model)
    assert plan.shared, plan.reason
    assert_exact(model, own, prompts)


# ---- Negative controls: what must be handed on, added, bent or cut --------------------------------------------------


def difference(model: Any, samples: list[Sample], own_N: Tensor) -> float:
    with torch.no_grad():
        return float((completion_logps(model, pack(samples)).token_logps_N - own_N).abs().max())


def each_for_itself(batch: PackedBatch) -> PackedBatch:
    return replace(batch, segments=tuple((length, i) for i, (length, _) in enumerate(batch.segments)))


def state_kept_back(patch: pytest.MonkeyPatch) -> None:
    right = states._Rounds.of
    patch.setattr(states._Rounds, "of", lambda batch: right(each_for_itself(batch)))


def inputs_kept_back(patch: pytest.MonkeyPatch) -> None:
    right = states._Histories.of
    patch.setattr(states._Histories, "of", lambda batch, width: right(each_for_itself(batch), width))


def padded_behind(patch: pytest.MonkeyPatch) -> None:
    """As completions are: Mamba's state would decay over the padding."""
    right = states._Rounds.of

    def of(batch: PackedBatch) -> Any:
        rounds = right(batch)
        moved = []
        for part in rounds.prompts:
            row = part.places // part.length
            counts = torch.bincount(row, minlength=part.segments)
            moved.append(part._replace(places=part.places - (part.length - counts)[row]))
        return rounds._replace(prompts=moved)

    patch.setattr(states._Rounds, "of", of)


def sinks_left_out(patch: pytest.MonkeyPatch) -> None:
    right = attention._with_sinks
    patch.setattr(attention, "_with_sinks", lambda q, k, v, sinks: right(q, k, v, sinks - 1e4))


def cap_left_out(patch: pytest.MonkeyPatch) -> None:
    right = attention._attend_capped
    patch.setattr(attention, "_attend_capped", lambda q, k, v, m, s, cap, d: right(q, k, v, m, s, 1e6, d))


def chunks_left_out(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(attention, "visible", lambda *args: visible(*args[:6]))


CONTROLS = [
    ("qwen3_5_text", state_kept_back),
    ("qwen3_5_text", inputs_kept_back),
    ("kimi_linear", state_kept_back),
    ("lfm2", inputs_kept_back),
    ("mamba2", state_kept_back),
    ("mamba2", inputs_kept_back),
    ("mamba2", padded_behind),
    ("gpt_oss", sinks_left_out),
    ("gemma2", cap_left_out),
    ("llama4_text", chunks_left_out),
]


@pytest.mark.parametrize(("name", "wrong"), CONTROLS, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_what_is_missing_is_noticed(name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the comparison above, and by the probe, which falls back to rows and leaves the model as it was."""
    model, samples = build(name), samples_of(150)
    before = [type(module) for module in model.modules()], model.config._attn_implementation
    with torch.no_grad():
        own_N = torch.cat(own_token_logps(model, samples))
        assert plan_forward(model).shared and difference(model, samples, own_N) < EXACT
        wrong(monkeypatch)
        assert difference(model, samples, own_N) > 1e-3
        plan = plan_forward(model)
    assert not plan.shared and re.search("(log-probs|mixers' outputs or gradients) differ by", plan.reason)
    model.set_attn_implementation(before[1])  # it was ours when the second plan was made
    assert ([type(module) for module in model.modules()], model.config._attn_implementation) == before


def test_a_scan_without_a_gradient_to_its_state_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a kernel may be: its log-probs are right."""
    model, samples = build("qwen3_5_text"), samples_of(150)
    own_N = torch.cat(own_token_logps(model, samples)).detach()
    code = sys.modules[type(model).__module__]
    right = code.torch_chunk_gated_delta_rule

    def without(*args: Any, initial_state: Tensor | None = None, **kwargs: Any) -> Any:
        return right(*args, initial_state=None if initial_state is None else initial_state.detach(), **kwargs)

    monkeypatch.setattr(code, "torch_chunk_gated_delta_rule", without)
    states._shared_class.cache_clear()
    try:
        plan = plan_forward(model)
        assert not plan.shared and "gradients differ" in plan.reason
        states.read_layouts(model)
        assert difference(model, samples, own_N) < EXACT
    finally:
        states._shared_class.cache_clear()


def test_queries_are_tuned_at_their_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama 4 scales those of layers without rotary angles by their place in the row, here every 16 tokens."""
    model, samples = build("llama4_text"), samples_of(150)
    for module in model.modules():
        if hasattr(module, "floor_scale"):
            module.floor_scale, module.attn_scale = 16, 0.5
    with torch.no_grad():
        own_N = torch.cat(own_token_logps(model, samples))
    assert plan_forward(model).shared and difference(model, samples, own_N) < EXACT
    monkeypatch.setattr(attention, "_retuned", lambda module, query, plan: query)
    assert difference(model, samples, own_N) > 1e-2


def test_sinks_may_be_trained() -> None:
    """Their gradient, in float64, against the model's own function for attention."""
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    torch.manual_seed(3)
    module, (only,) = nn.Module(), random_samples([(7, (5,))])
    module.sinks, module.num_key_value_groups, module.training = torch.randn(4).double(), 2, False
    q, k, v = (torch.randn(1, heads, 12, 16, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    given = [q, k, v, module.sinks.requires_grad_()]
    hidden = torch.full((12, 12), -1e9).triu(1)[None, None].double()
    plan = attention.AttentionPlan(pack([only]), "dense")
    for scaling in (0.3, None):
        own, _ = eager_attention_forward(module, q, k, v, hidden, scaling or 0.25)
        call = dict(scaling=scaling, prefix_layout=plan, s_aux=module.sinks)
        ours, _ = prefix_shared_attention(module, q, k, v, layout_marker(q.device), **call)
        torch.testing.assert_close(ours, own, atol=1e-12, rtol=0)
        weights = torch.randn_like(own)
        pairs = zip(*(torch.autograd.grad((out * weights).sum(), given) for out in (ours, own)), strict=True)
        assert all((a - b).abs().max() < 1e-12 for a, b in pairs)


# ---- The probe goes as far as a config says that behavior changes ---------------------------------------------------


class Unscaled(Decoder):
    """The model's own layers, whose queries aren't scaled by their position."""

    attention = "dense"

    def __init__(self, model: Any):
        self.model = model

    def hidden_states(self, batch: PackedBatch, router_logits: list[Tensor] | None = None) -> Tensor:
        rope, plan = self.model.config.rope_parameters, attention.AttentionPlan(batch, "dense")
        beta, rope["llama_4_scaling_beta"] = rope["llama_4_scaling_beta"], 0.0
        given = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "prefix_layout": plan}
        out = self.model.model(**given, attention_mask=layout_marker(batch.input_ids.device)).last_hidden_state
        rope["llama_4_scaling_beta"] = beta
        return out[0].index_select(0, batch.pred_pos)

    def reference(self, adapter: str | None) -> Decoder:
        raise NotImplementedError

    def use_fp8(self) -> None:
        raise NotImplementedError


@pytest.mark.parametrize("limit", [64, 4096])
def test_layers_that_go_wrong_at_some_position_are_refused(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.build("ministral3")
    model.config.max_position_embeddings = 8192
    model.config.rope_parameters["original_max_position_embeddings"] = limit
    fused = wing("fused")
    monkeypatch.setattr(fused, "fused_decoder", lambda *args: Unscaled(model))
    plan = plan_forward(model)
    assert plan.shared and plan.fused is None and "fused log-probs differ by" in plan.unfused
    assert f"up to position {min(64 * limit, 8192) - 1}" in plan.unfused
    # Near the beginning they are right.
    monkeypatch.setattr(lengths.FarText, "of", lambda *args: None)
    assert plan_forward(model).fused is not None


@pytest.mark.parametrize(("name", "farthest"), [("llama", None), ("gemma3_text", 94), ("mamba2", 142)])
def test_the_probe_is_as_long_as_it_must_be(name: str, farthest: int | None) -> None:
    config = zoo.config_of(name)
    text = lengths.FarText.of(config, {16} if name == "gemma3_text" else ())
    assert (text and text.farthest) == farthest
