"""Negative controls, and what the probe may not disturb: a wrong forward is noticed, plain calls work as before."""

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forward_models import FALLING_BACK, SHARING, WINDOW, add_lora, build, own_token_logps, random_samples
from torch import Tensor
from transformers import LlamaForCausalLM

from dpo_peft.errors import NonFiniteError, OptionError
from dpo_peft.forward import attention, completion_logps, pack, pad_rows, plan_forward, probe, sequence_logps
from dpo_peft.forward.attention import IMPLEMENTATION, AttentionPlan, CannotShareError, prefix_shared_attention
from dpo_peft.forward.layout import visible

SAMPLES = random_samples([(11, (5, 8, 1)), (6, (7, 3))])


def difference(model: Any, samples: Any = SAMPLES, batch: Any = None) -> float:
    """How far the packed log-probs are from the model's own."""
    with torch.no_grad():
        shared_N = completion_logps(model, pack(samples) if batch is None else batch).token_logps_N
        return float((shared_N - torch.cat(own_token_logps(model, samples))).abs().max())


# ---- Wrong masks, wrong positions -----------------------------------------------------------------------------------


def neighbors_visible(seg_q, ctx_q, pos_q, seg_k, pos_k, window=None, chunk=None, blocks=None) -> Tensor:
    return (pos_k <= pos_q) & (seg_k >= 0)  # all within the sample, since the dense path cuts samples apart


def prompt_invisible(seg_q, ctx_q, pos_q, seg_k, pos_k, window=None, chunk=None, blocks=None) -> Tensor:
    return visible(seg_q, seg_q, pos_q, seg_k, pos_k, window)


def future_visible(seg_q, ctx_q, pos_q, seg_k, pos_k, window=None, chunk=None, blocks=None) -> Tensor:
    return visible(seg_q, ctx_q, pos_q + 1, seg_k, pos_k, window)


def window_ignored(seg_q, ctx_q, pos_q, seg_k, pos_k, window=None, chunk=None, blocks=None) -> Tensor:
    return visible(seg_q, ctx_q, pos_q, seg_k, pos_k)


def window_off_by_one(seg_q, ctx_q, pos_q, seg_k, pos_k, window=None, chunk=None, blocks=None) -> Tensor:
    return visible(seg_q, ctx_q, pos_q, seg_k, pos_k, window and window + 1)


WRONG_MASKS = [
    ("llama", neighbors_visible),
    ("llama", prompt_invisible),
    ("llama", future_visible),
    ("gpt2", neighbors_visible),
    ("mistral", window_ignored),
    ("mistral", window_off_by_one),
    ("gemma3", window_ignored),
    ("cohere2", window_ignored),
    ("qwen2", window_off_by_one),
]


@pytest.mark.parametrize(("name", "wrong"), WRONG_MASKS, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_wrong_masks_are_noticed(name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(*SHARING[name])
    assert plan_forward(model).shared and difference(model) < 1e-5
    monkeypatch.setattr(attention, "visible", wrong)
    assert difference(model) > 1e-2  # the comparison that the exactness tests make would fail
    model.set_attn_implementation("sdpa")
    plan = plan_forward(model)
    assert not plan.shared and "differ by" in plan.reason
    assert model.config._attn_implementation == "sdpa"
    with torch.no_grad():  # and the fall-back is right
        rows_N = completion_logps(model, pad_rows(SAMPLES), plan.backend).token_logps_N
        assert (rows_N - torch.cat(own_token_logps(model, SAMPLES))).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3-moe"])
def test_wrong_masks_are_noticed_in_bf16(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tolerance of bf16 is wide, and a few tokens may miss it; a wrong mask moves most of them beyond it."""
    model = build(*SHARING[name]).bfloat16()
    assert plan_forward(model).shared
    for wrong in (neighbors_visible, prompt_invisible, future_visible):
        monkeypatch.setattr(attention, "visible", wrong)
        plan = plan_forward(model)
        assert not plan.shared and "differ by" in plan.reason, wrong.__name__


def test_a_visible_neighbor_is_noticed_where_all_tokens_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probs of an untrained model hardly differ, whatever it sees; that others move with an edit still shows."""
    config_name, options = SHARING["llama"]
    model = build(config_name, dict(options, initializer_range=0.02)).bfloat16()
    assert plan_forward(model).shared
    monkeypatch.setattr(attention, "visible", neighbors_visible)
    plan = plan_forward(model)
    assert not plan.shared and "sees its neighbor" in plan.reason


@pytest.mark.parametrize("name", ["mixtral", "glm4-moe", "olmoe", "granitemoe", "qwen3", "gemma3"])
def test_rounding_raises_no_false_alarm_in_bf16(name: str) -> None:
    """Routers flip on rounding: seed 0 to 2 of glm4-moe once fell back because one token moved by 0.7 nats."""
    for seed in range(3):
        assert plan_forward(build(*SHARING[name], seed=seed).bfloat16()).shared


def positions_run_on(batch: Any) -> Any:
    return replace(batch, position_ids=torch.arange(batch.position_ids.shape[1])[None])


def positions_off_after_prompt(batch: Any) -> Any:
    return replace(batch, position_ids=batch.position_ids + (batch.segment != batch.context).long()[None])


@pytest.mark.parametrize("wrong", [positions_run_on, positions_off_after_prompt])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "ministral3"])
def test_wrong_positions_are_noticed(name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(*SHARING[name])
    assert plan_forward(model).shared
    # Positions alone are moved: the mask stays right, so what is seen is the model's use of position_ids.
    right = AttentionPlan(pack(SAMPLES), "dense")
    with torch.no_grad():
        moved_N = completion_logps(model, wrong(pack(SAMPLES)), right).token_logps_N
        assert (moved_N - torch.cat(own_token_logps(model, SAMPLES))).abs().max() > 1e-3
    monkeypatch.setattr(probe, "pack", lambda samples: wrong(pack(samples)))
    assert not plan_forward(model).shared


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma4", "mixtral", "deepseek-v3"])
def test_a_completion_does_not_see_its_neighbors(name: str) -> None:
    model = build(*SHARING[name])
    plan_forward(model)
    with torch.no_grad():
        before = completion_logps(model, pack(SAMPLES))
        first = SAMPLES[0].completions
        edited = [SAMPLES[0]._replace(completions=[first[0], [t - 1 for t in first[1]], first[2]]), SAMPLES[1]]
        after = completion_logps(model, pack(edited))
        other_prompt = [SAMPLES[0], SAMPLES[1]._replace(prompt=[t - 1 for t in SAMPLES[1].prompt])]
        moved = completion_logps(model, pack(other_prompt)).logps_C
    mine = pack(SAMPLES).completion_of == 1
    assert torch.equal(after.token_logps_N[~mine], before.token_logps_N[~mine])  # to the bit
    assert (after.logps_C[1] - before.logps_C[1]).abs() > 1e-2
    # The prompt is seen by its own completions only.
    assert torch.equal(moved[:3], before.logps_C[:3]) and (moved[3:] - before.logps_C[3:]).abs().min() > 1e-2


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_swapped_completions_swap_their_log_probs(name: str) -> None:
    model = build(*SHARING[name])
    plan_forward(model)
    samples = random_samples([(9, (6, 6)), (4, (3, 12))])
    with torch.no_grad():
        straight = completion_logps(model, pack(samples)).logps_C.view(2, 2)
        swapped = completion_logps(model, pack([s._replace(completions=s.completions[::-1]) for s in samples]))
    assert (swapped.logps_C.view(2, 2).flip(1) - straight).abs().max() < 1e-5
    assert (swapped.logps_C.view(2, 2) - straight).abs().min() > 1e-2  # control: they are not all alike


# ---- What a short probe can't see is refused beforehand -------------------------------------------------------------


def test_some_attention_would_pass_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of a check: without it this model packs exactly up to its window, and wrongly beyond."""
    config_name, options, _ = FALLING_BACK["qwen2-moe (window by mask only)"]
    model = build(config_name, options)
    monkeypatch.setattr(probe, "_check_trace", lambda trace, config: None)
    assert plan_forward(model).shared
    assert difference(model) < 1e-5 < 1e-2 < difference(model, random_samples([(70, (20, 9))]))


@pytest.mark.parametrize(
    ("trace", "reason"),
    [
        ([(None, 16), (None, 16)], "not told the sliding window"),
        ([(4096, 16), (4096, 16)], "not told the sliding window"),
        ([(4096, 16)], "1 of its 2 layers are plain attention"),
        ([], "0 of its 2 layers"),
    ],
)
def test_windows_longer_than_the_probe_are_checked(trace: list, reason: str) -> None:
    config = SimpleNamespace(
        num_hidden_layers=2, sliding_window=4096, layer_types=["sliding_attention", "full_attention"]
    )
    probe._check_trace([(4096, 16), (None, 16)], config)
    with pytest.raises(CannotShareError, match=reason):
        probe._check_trace(trace, config)


@pytest.mark.parametrize(
    ("name", "value"),
    [("position_bias", torch.zeros(1)), ("indices", torch.zeros(1))],
)
def test_attention_that_the_layout_does_not_know_is_refused(name: str, value: Any) -> None:
    q = torch.randn(1, 4, 30, 8)
    layout = AttentionPlan(pack(random_samples([(20, (5, 5))])), "dense")
    call = dict(attention_mask=None, prefix_layout=layout, position_ids=None, use_cache=False)
    prefix_shared_attention(torch.nn.Module(), q, q, q, **call, **{name: None})
    with pytest.raises(CannotShareError, match=name):
        prefix_shared_attention(torch.nn.Module(), q, q, q, **call, **{name: value})
    with pytest.raises(CannotShareError, match="bidirectional"):
        prefix_shared_attention(torch.nn.Module(), q, q, q, **call, is_causal=False)
    with pytest.raises(CannotShareError, match="mask of its own"):
        prefix_shared_attention(torch.nn.Module(), q, q, q, **dict(call, attention_mask=torch.ones(1, 1, 30, 30)))


def test_share_prompts_false_leaves_the_model_alone() -> None:
    model = build("Llama")
    plan = plan_forward(model, share_prompts=False)
    assert not plan.shared and "share_prompts=False" in str(plan) and model.config._attn_implementation == "sdpa"
    with pytest.raises(OptionError, match="fused_layers=True, but sharing is turned off .*: leave it out"):
        plan_forward(model, share_prompts=False, fused=True)


def test_any_failure_inside_the_model_means_no_sharing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("Llama")

    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(attention, "BACKENDS", [replace(attention.backend_named("dense"), attend=broken)])
    plan = plan_forward(model)
    assert plan.reason == "this model can't share prompts (RuntimeError: first line)"
    assert model.config._attn_implementation == "sdpa"


class DoubledLogits(LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output


def test_unknown_logit_transforms_are_an_error() -> None:
    model = DoubledLogits(build("Llama").config).float()
    with pytest.raises(ValueError, match="DoubledLogits changes its logits"):
        plan_forward(model)


def test_weights_that_are_not_finite_are_an_error() -> None:
    model = build("Llama")
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    with pytest.raises(NonFiniteError, match="LlamaForCausalLM are not finite.*Check the checkpoint"):
        plan_forward(model)


def test_plan_leaves_modes_and_gradients_alone() -> None:
    model = add_lora(build("Llama", dropout=True), lora_dropout=0.1).train()
    model.get_base_model().lm_head.eval()
    modes = [m.training for m in model.modules()]
    plan_forward(model)
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())


# ---- Plain calls after the probe ------------------------------------------------------------------------------------

PLAIN = [
    "llama",
    "mistral",
    "gemma3",
    "gemma4-shared-kv",
    "cohere2",
    "qwen3-moe",
    "phi3",
    "gpt2",
    "opt",
    "deepseek-v3",
    "gemma2",
    "gpt-oss",
    "llama4",
    "mamba2",
    "lfm2",
    "qwen3-next",
]


def padded(side: str) -> dict[str, Tensor]:
    rows = [s.prompt for s in random_samples([(13, ()), (4, ()), (1, ()), (9, ())], seed=8)]
    ids, mask = torch.zeros(4, 13, dtype=torch.long), torch.zeros(4, 13, dtype=torch.long)
    for r, row in enumerate(rows):
        place = slice(13 - len(row), None) if side == "left" else slice(len(row))
        ids[r, place], mask[r, place] = torch.tensor(row), 1
    return dict(input_ids=ids, attention_mask=mask)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", PLAIN)
def test_plain_calls_are_as_before(name: str) -> None:
    """Forwards with padding on either side and generation with a cache, to the bit; windows shorter than the text."""
    model = build(*SHARING[name])

    def everything() -> list[Tensor]:
        with torch.no_grad():
            forwards = [
                model(**padded(side)).logits[padded(side)["attention_mask"].bool()] for side in ("left", "right")
            ]
            alone = model(input_ids=padded("left")["input_ids"][:1]).logits
            sequences = [
                model.generate(**batch, max_new_tokens=12, do_sample=False, min_new_tokens=12, **how)
                for batch in (padded("left"), {k: v[:1] for k, v in padded("left").items()})
                for how in ({}, {"num_beams": 2})
            ]
        return [*forwards, alone, *sequences]

    before = everything()
    assert plan_forward(model).shared and model.config._attn_implementation == IMPLEMENTATION
    assert difference(model) < 1e-5
    for a, b in zip(before, everything(), strict=True):
        assert torch.equal(a, b)


def test_a_window_matters_in_the_plain_calls() -> None:
    """Control: the texts above are longer than the window, so a mask lost on the way would show."""
    with_window, without = build("Mistral", dict(sliding_window=WINDOW)), build("Mistral", dict(sliding_window=None))
    plan_forward(with_window)
    with torch.no_grad():
        a, b = (m(**padded("left")).logits[0, -1] for m in (with_window, without))
    assert (a - b).abs().max() > 1e-2


def test_our_implementation_is_not_saved(tmp_path: Any) -> None:
    """A model saved after training must load where this package is not installed."""
    model = build("Llama")
    plan_forward(model)
    model.save_pretrained(tmp_path / "model")
    add_lora(model).save_pretrained(tmp_path / "adapter")
    for file in tmp_path.rglob("*.json"):
        assert IMPLEMENTATION not in file.read_text()
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model_type"] == "llama"


def test_sequence_logps_matches_the_packed_forward() -> None:
    """Log-probs of any causal LM, against the forward that training uses."""
    model = build(*SHARING["mistral"])
    plan_forward(model)
    batch, rows = pack(SAMPLES), pad_rows(SAMPLES)
    labels = torch.full_like(rows.input_ids, -100).flatten()
    labels[rows.pred_pos + 1] = rows.target
    with torch.no_grad():
        plain = sequence_logps(model, rows.input_ids, rows.attention_mask, labels.view_as(rows.input_ids))
        assert (plain - completion_logps(model, batch).logps_C).abs().max() < 1e-5
        none = torch.full_like(rows.input_ids, -100)
        assert sequence_logps(model, rows.input_ids, rows.attention_mask, none).tolist() == [0.0] * 5
