"""Sharing is exact: packed log-probs and LoRA gradients equal those of the model's own logits on padded rows.

Tiny random models of every architecture that the design names, with an adapter that matters, with and without gradient
checkpointing; models that can't share a prompt fall back and are as exact.
"""

import copy
from typing import Any

import pytest
import torch
from forward_models import (
    FALLING_BACK,
    SHARING,
    adapter_grads,
    add_lora,
    build,
    grad_difference,
    own_token_logps,
    random_samples,
)
from torch import Tensor

from dpo_peft.forward import PackedBatch, Sample, completion_logps, pack, pad_rows, plan_forward
from dpo_peft.forward.attention import IMPLEMENTATION, AttentionPlan
from dpo_peft.model.loading import disable_dropout
from dpo_peft.reference.adapter_off import check_start, reference_logps

EXACT = 1e-5
# Three completions and two; prompts longer than the sliding window, completions shorter and longer than it.
SAMPLES = random_samples([(11, (5, 8, 1)), (6, (7, 3))])


def scored(model: Any, batch: PackedBatch, backend: str | AttentionPlan = "dense") -> tuple[Tensor, dict[str, Tensor]]:
    """Token log-probs (N,) and the adapter's gradients of a weighted sum of the completions."""
    scores = completion_logps(model, batch, backend)
    return scores.token_logps_N.detach(), adapter_grads(model, scores.logps_C)


def own(model: Any, samples: list[Sample]) -> tuple[Tensor, dict[str, Tensor]]:
    """The same from the model's own logits."""
    logps = own_token_logps(model, samples)
    return torch.cat(logps).detach(), adapter_grads(model, torch.stack([x.sum() for x in logps]))


def checkpointed(model: Any, use_reentrant: bool = False) -> None:
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.train()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", SHARING)
def test_sharing_is_exact(name: str) -> None:
    model = add_lora(build(*SHARING[name]))
    own_N, own_grads = own(model, SAMPLES)
    assert own_N.std() > 0.2 and min(g.abs().max() for g in own_grads.values()) > 0  # something is there to get wrong

    plan = plan_forward(model)
    assert (plan.shared, plan.backend, plan.reason) == (True, "dense", "")
    batch = pack(SAMPLES)
    shared_N, shared_grads = scored(model, batch)
    assert (shared_N - own_N).abs().max() < EXACT
    assert grad_difference(shared_grads, own_grads) < EXACT

    # T20: checkpointed equals not, and every adapter weight gets its gradient.
    checkpointed(model)
    attention = AttentionPlan(batch, "dense")
    attention.trace, attention.mixed = [], []
    checkpointed_N, checkpointed_grads = scored(model, batch, attention)
    calls = len(attention.trace) + len(attention.mixed)
    assert calls == 2 * model.config.get_text_config().num_hidden_layers  # it did recompute
    assert torch.equal(checkpointed_N, shared_N)
    assert grad_difference(checkpointed_grads, shared_grads) < 1e-6
    assert all(g.abs().max() > 0 for g in checkpointed_grads.values())


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "qwen3-moe", "gpt2", "opt"])
def test_reentrant_checkpointing_gives_the_same_gradients(name: str) -> None:
    model = add_lora(build(*SHARING[name]))
    plan_forward(model)
    shared_N, shared_grads = scored(model, pack(SAMPLES))
    checkpointed(model, use_reentrant=True)
    checkpointed_N, checkpointed_grads = scored(model, pack(SAMPLES))
    assert torch.equal(checkpointed_N, shared_N)
    assert grad_difference(checkpointed_grads, shared_grads) < 1e-6


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_without_input_gradients_would_train_nothing() -> None:
    """The control of T20: what the trainer's `enable_input_require_grads` is there for."""
    model = add_lora(build(*SHARING["llama"]))
    plan_forward(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.disable_input_require_grads()
    model.train()
    assert not completion_logps(model, pack(SAMPLES)).logps_C.requires_grad


@pytest.mark.parametrize("name", FALLING_BACK)
def test_models_that_cannot_share_fall_back_and_are_exact(name: str) -> None:
    config_name, options, reason = FALLING_BACK[name]
    model = add_lora(build(config_name, options))
    before = model.config._attn_implementation
    own_N, own_grads = own(model, SAMPLES)
    plan = plan_forward(model)
    assert not plan.shared and reason in plan.reason and reason in str(plan)
    assert model.config._attn_implementation == before
    batch = pad_rows(SAMPLES)
    rows_N, rows_grads = scored(model, batch, plan.backend)
    assert (rows_N - own_N).abs().max() < EXACT
    assert grad_difference(rows_grads, own_grads) < EXACT
    if model.get_base_model().supports_gradient_checkpointing:
        checkpointed(model)
        checkpointed_N, checkpointed_grads = scored(model, batch, plan.backend)
        assert (checkpointed_N - rows_N).abs().max() < EXACT
        assert grad_difference(checkpointed_grads, rows_grads) < EXACT


@pytest.mark.parametrize("layout", [pack, pad_rows])
def test_sums_are_those_of_the_tokens(layout: Any) -> None:
    model = build("Llama")
    plan_forward(model)
    with torch.no_grad():
        scores = completion_logps(model, layout(SAMPLES))
        own_C = torch.stack([x.double().sum() for x in own_token_logps(model, SAMPLES)])
    lengths = [len(c) for s in SAMPLES for c in s.completions]
    summed_C = torch.stack([x.double().sum() for x in scores.token_logps_N.split(lengths)])
    assert scores.token_logps_N.dtype == torch.float32 and scores.logps_C.dtype == torch.float64
    assert torch.allclose(scores.logps_C, summed_C, atol=1e-12, rtol=0)  # no rounding in the sum
    assert torch.allclose(scores.logps_C, own_C, atol=EXACT, rtol=0)


# ---- T21: a completion's log-prob is its own ------------------------------------------------------------------------


def by_completion(model: Any, samples: list[Sample], layout: Any) -> dict[tuple, float]:
    """(row, completion's ids) -> log-prob."""
    with torch.no_grad():
        logps = completion_logps(model, layout(samples)).logps_C.tolist()
    names = [(s.row, tuple(c)) for s in samples for c in s.completions]
    return dict(zip(names, logps, strict=True))


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3-moe", "gpt2"])
@pytest.mark.parametrize("layout", [pack, pad_rows])
def test_log_probs_do_not_depend_on_order_partner_or_batch(name: str, layout: Any) -> None:
    model = build(*SHARING[name])
    plan_forward(model)
    samples = random_samples([(11, (5, 8)), (3, (2, 20)), (1, (4, 1)), (17, (6, 6))], seed=4)
    together = by_completion(model, samples, layout)
    variants = [
        samples[::-1],
        [s._replace(completions=s.completions[::-1]) for s in samples],
        *([s] for s in samples),
        *([s._replace(completions=[c])] for s in samples for c in s.completions),
        [samples[0], *random_samples([(40, (1, 33))], seed=9)],
    ]
    for variant in variants:
        for key, value in by_completion(model, variant, layout).items():
            if key in together:
                assert value == pytest.approx(together[key], abs=2e-5)
    with torch.no_grad():  # padding on the other side, read by the oracle
        left = [float(x.sum()) for x in own_token_logps(model, samples, pad_left=True)]
    # GPT-2 numbers its positions from the row's start unless told otherwise, so left-padded rows are another text.
    assert name == "gpt2" or list(together.values()) == pytest.approx(left, abs=2e-5)


# ---- T22: bf16 has a floor, and it raises no alarm ------------------------------------------------------------------


def test_bf16_floor_is_measured_and_raises_no_alarm() -> None:
    samples = random_samples([(23, (9, 14)), (5, (31, 2)), (41, (6, 17)), (12, (8, 8))], seed=3)
    model = add_lora(build("Llama", dict(hidden_size=128, intermediate_size=352)), seed=2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()  # at its start, so that policy and reference are the same model
    model.get_base_model().to(torch.bfloat16)
    plan = plan_forward(model)
    assert plan.shared
    batches = [pack(samples), *(pack([s]) for s in samples)]
    whole, parts = reference_logps(model, batches[0]).logps_C, [reference_logps(model, b).logps_C for b in batches[1:]]
    floor = (whole - torch.cat(parts)).abs().max()
    assert 1e-4 < floor < 1.0  # the same completions, other shapes: not equal, and far from a wrong mask's nats
    exact = torch.stack([x.sum() for x in own_token_logps(copy.deepcopy(model).float(), samples)])
    assert (whole - exact).abs().max() < 2.0
    assert check_start(model, batches) == 0.0  # same shape on both sides: no difference at all


# ---- T9, the part of it in the forward: dropout that modules keep in plain attributes -------------------------------

DROPOUTS = {
    "llama": ("Llama", dict(attention_dropout=0.5)),
    "gpt-neox": ("GPTNeoX", dict(attention_dropout=0.5, hidden_dropout=0.5)),
    "gpt2": (*SHARING["gpt2"][:1], dict(SHARING["gpt2"][1], attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)),
    "opt": (*SHARING["opt"][:1], dict(SHARING["opt"][1], attention_dropout=0.5, dropout=0.5)),
    "phi": ("Phi", dict(num_key_value_heads=4, attention_dropout=0.5, resid_pdrop=0.5, embd_pdrop=0.5)),
}


@pytest.mark.parametrize("name", DROPOUTS)
def test_dropout_is_off_in_training_once_disabled(name: str) -> None:
    model = add_lora(build(*DROPOUTS[name], dropout=True), lora_dropout=0.3)
    assert plan_forward(model).shared  # the probe scores in eval mode
    batch = pack(SAMPLES)
    with torch.no_grad():
        expected_N = completion_logps(model.eval(), batch).token_logps_N
        noisy_N = completion_logps(model.train(), batch).token_logps_N
        assert (noisy_N - expected_N).abs().max() > 0.1  # control: it was on
        assert len(disable_dropout(model)) >= 2
        for _ in range(2):
            assert torch.equal(completion_logps(model.train(), batch).token_logps_N, expected_N)


def test_attention_dropout_reaches_the_packed_attention() -> None:
    """Where the user keeps dropout on, it is on in the packed forward as well."""
    model = build("Llama", dict(attention_dropout=0.5), dropout=True)
    plan_forward(model)
    assert model.config._attn_implementation == IMPLEMENTATION
    with torch.no_grad():
        draws = [completion_logps(model.train(), pack(SAMPLES)).token_logps_N for _ in range(2)]
    assert (draws[0] - draws[1]).abs().max() > 0.1
