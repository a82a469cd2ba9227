"""Adapters that act on less: answer-only ones (aLoRA) and those of the upper layers, against PEFT's own forward.

The oracle computes each completion in a row of its own through `PeftModel.forward`, which looks for the invocation and
switches the adapter on from there.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import vision_models as vm
from forward_models import SHARING, add_lora, build, grad_difference
from peft import PeftModel
from torch import Tensor
from varlen_kernel import emulated_kernel

from dpo_peft.forward import Sample, attention, completion_logps, pack, pad_rows, plan_forward
from dpo_peft.forward.layout import PackedBatch
from dpo_peft.forward.scope import acting, invocation_start
from dpo_peft.forward.score import logps_with_reference
from dpo_peft.fused.recognition import fused_decoder
from dpo_peft.reference.adapter_off import reference_logps

INVOCATION = [5, 6]
LINEAR = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
ANSWERS: dict[str, Any] = {"alora_invocation_tokens": INVOCATION}
UPPER: dict[str, Any] = {"layers_to_transform": [2, 3], "target_modules": LINEAR}
KINDS: dict[str, dict[str, Any]] = {"answers": ANSWERS, "upper": UPPER, "both": {**ANSWERS, **UPPER}}


def sample(prompt: list[int], *completions: list[int], after: tuple[int, ...] = ()) -> Sample:
    return Sample([*prompt, *INVOCATION, *after], [*completions], adapter_start=len(prompt))


# The second's invocation is its whole prompt; the third's prompt holds an earlier one, and goes on after its own.
SAMPLES = [
    sample([40, 9, 12, 41, 7, 33, 21, 8, 90], [30, 51, 77], [60, 17]),
    sample([], [14, 15], [92, 65, 35]),
    sample([3, *INVOCATION, 99, 44], [89, 79, 32, 38, 46], [7], after=(28, 64)),
]


def samples_for(kind: str) -> list[Sample]:
    return SAMPLES if "answers" in kind or kind == "both" else [one._replace(adapter_start=None) for one in SAMPLES]


def own_rows(model: PeftModel, samples: list[Sample]) -> Tensor:
    """Log-probs of all completions' tokens, row by row."""
    found = []
    for one in samples:
        for completion in one.completions:
            ids = torch.tensor([[*one.prompt, *completion]])
            logps = model(input_ids=ids).logits[0].log_softmax(-1)
            found.append(logps[len(one.prompt) - 1 : -1].gather(1, ids[0, len(one.prompt) :, None])[:, 0])
    return torch.cat(found)


def gradients(model: PeftModel, logps_N: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (logps_N * torch.linspace(-1.0, 1.3, len(logps_N), dtype=logps_N.dtype)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def on_rows(base: torch.nn.Module) -> list[str]:
    """Linear layers that read whole rows: PEFT's answer-only adapters can't be on experts, which get single tokens."""
    names = {name.rpartition(".")[2] for name, one in base.named_modules() if type(one) is torch.nn.Linear}
    experts = any("expert" in name for name, _ in base.named_modules())
    return sorted(names & {*"q_proj k_proj v_proj o_proj out_proj qkv_proj in_proj dense".split()}) + sorted(
        names & {*("gate_proj up_proj down_proj gate_up_proj fc1 fc2".split() if not experts else ())}
    )


def four_layers(kind: str, **options: Any) -> PeftModel:
    return add_lora(build("Llama", dict(num_hidden_layers=4)), **{**KINDS[kind], **options}).double()


# ---- The layout -----------------------------------------------------------------------------------------------------


def test_prompts_stand_first_and_each_completion_begins_with_the_invocation() -> None:
    batch = pack([sample([10, 11], [20, 21], [30]), sample([12], [40])])
    p0, p1 = [10, 11], [12]
    assert batch.input_ids.tolist() == [[*p0, *p1, 5, 6, 20, 21, 5, 6, 30, 5, 6, 40]]
    assert batch.position_ids.tolist() == [[0, 1, 0, 2, 3, 4, 5, 2, 3, 4, 1, 2, 3]]
    assert batch.alora_offsets == (10,)
    assert batch.pred_pos.tolist() == [4, 5, 8, 11] and batch.target.tolist() == [20, 21, 30, 40]
    assert batch.completion_of.tolist() == [0, 0, 1, 2] and batch.lengths.tolist() == [2, 1, 1]
    assert batch.sample_index.tolist() == [[0, 1, 3, 4, 5, 6, 7, 8, 9], [2, 10, 11, 12, -1, -1, -1, -1, -1]]
    assert batch.query_index.tolist() == [[3, 4, 5, 6, 7, 8, 9], [10, 11, 12, -1, -1, -1, -1]]
    assert batch.kv_index.tolist() == [0, 1, 2, 0, 1, 3, 4, 5, 6, 0, 1, 7, 8, 9, 2, 10, 11, 12]
    rows = pad_rows([sample([10, 11], [20, 21], [30])])
    assert rows.alora_offsets == (4, 4)  # the second's padding among them


# ---- Values and gradients -------------------------------------------------------------------------------------------


def by_rows(model: PeftModel, samples: list[Sample]) -> Tensor:
    return completion_logps(model, pad_rows(samples)).token_logps_N


def packed(model: PeftModel, samples: list[Sample]) -> Tensor:
    return completion_logps(model, pack(samples)).token_logps_N


def fused(checkpointed: int, backend: str = "dense") -> Callable[[PeftModel, list[Sample]], Tensor]:
    def score(model: PeftModel, samples: list[Sample]) -> Tensor:
        decoder = fused_decoder(model.get_base_model(), torch.float64, backend)
        decoder.checkpointed = lambda batch: (checkpointed, 0)
        reference = reference_logps(model, pad_rows(samples)).token_logps_N
        alone = completion_logps(model, pack(samples), decoder).token_logps_N
        policy, beside = logps_with_reference(model, pack(samples), decoder, None)
        assert torch.equal(policy.token_logps_N, alone)
        assert torch.equal(beside.token_logps_N, reference_logps(model, pack(samples), decoder).token_logps_N)
        assert (beside.token_logps_N - reference).abs().max() < 1e-6
        return policy.token_logps_N

    return score


WAYS = {
    "rows": by_rows,
    "packed": packed,
    "fused": fused(0),
    "fused, checkpointed": fused(4),
    "fused, in part": fused(3),
    "fused, gathered keys": fused(2, "varlen"),
}


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "varlen_kernel", emulated_kernel)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_peft(kind: str, way: str) -> None:
    """In float64: log-probs within 1e-6 and gradients within 1e-5 (norms compute in float32 in any case)."""
    model, samples = four_layers(kind), samples_for(kind)
    plan_forward(model)  # sets the attention
    own_N = own_rows(model, samples)
    own, found_N = gradients(model, own_N), WAYS[way](model, samples)
    assert (found_N - own_N).abs().max() < 1e-6
    found = gradients(model, found_N)
    assert found.keys() == own.keys() and grad_difference(found, own) < 1e-5
    reference_N = reference_logps(model, pad_rows(samples)).token_logps_N
    assert (reference_N - own_N).abs().max() > 0.05  # the adapter matters
    if kind != "upper":  # and so does where it begins
        shifted = [one._replace(adapter_start=one.adapter_start + 1) for one in samples]
        assert (WAYS[way](model, shifted) - own_N).abs().max() > 1e-3


@pytest.mark.sampled(12, slow=5)
@pytest.mark.parametrize("name", [n for n in SHARING if n not in ("gpt2", "gpt-neox", "opt", "mamba2")])
def test_families(name: str) -> None:
    """Windows, soft caps, sinks, experts, states: whoever computes the layers."""
    kind, options = SHARING[name]
    model = add_lora(base := build(kind, options), target_modules=on_rows(base), **ANSWERS)
    plan = plan_forward(model)
    own_N = own_rows(model, SAMPLES)
    own = gradients(model, own_N)
    batch = (pack if plan.shared else pad_rows)(SAMPLES)
    for checkpointed in (0, 1) if plan.fused else (0,):
        if plan.fused:
            plan.fused.checkpointed = lambda batch, n=checkpointed: (n, 0)
        found_N = completion_logps(model, batch, plan.scorer).token_logps_N
        assert (found_N - own_N).abs().max() < 3e-5
        assert grad_difference(gradients(model, found_N), own) < 2e-3  # of the smallest gradients, in float32


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "gemma3", "llava"])
def test_prompts_with_images(name: str) -> None:
    """Features, angles on three axes, deepstack and blocks stand where they belong when prompts come first."""
    base = vm.build(name, noise=0.05)
    samples = [
        one._replace(prompt=[*one.prompt, *INVOCATION], adapter_start=len(one.prompt))
        for one in vm.samples_for(name, base.config)
    ]
    model = vm.adapted(base)
    for layer in model.modules():  # the default rule's adapter, of completions alone
        if hasattr(layer, "lora_variant"):
            from peft.tuners.lora.variants import ALoraLinearVariant

            layer.lora_variant["default"] = ALoraLinearVariant()
    plan = plan_forward(model, images=samples)
    assert plan.fused, plan.unfused
    rows = pad_rows(samples)
    own_N = completion_logps(model, rows).token_logps_N
    own = gradients(model, own_N)
    alone = [one._replace(completions=[ids]) for one in samples for ids in one.completions]
    found = []
    for one in alone:  # the model's own encoding of each row
        with acting(model, (len(one.prompt) - one.adapter_start + len(one.completions[0]),)):
            found.append(vm.own_rows(model.get_base_model(), name, [one]))
    assert (torch.cat(found) - own_N).abs().max() < 1e-4
    for backend in (plan.scorer, "dense"):
        found_N = completion_logps(model, pack(samples), backend).token_logps_N
        assert (found_N - own_N).abs().max() < 3e-5
        assert grad_difference(gradients(model, found_N), own) < 2e-3


# ---- What follows from it -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_policy_and_reference_start_equal_to_the_bit(kind: str) -> None:
    model = four_layers(kind, init_lora_weights=True)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    decoder = plan_forward(model).fused
    assert decoder is not None and decoder.shares_work
    policy, reference = logps_with_reference(model, pack(samples_for(kind)), decoder, None)
    assert torch.equal(policy.token_logps_N, reference.token_logps_N)


def test_the_routers_loss_counts_what_rows_count() -> None:
    base = build("Qwen3Moe", dict(decoder_sparse_step=1))
    model = add_lora(base, target_modules=on_rows(base), **ANSWERS)
    plan = plan_forward(model)
    assert plan.fused is not None
    found = [
        completion_logps(model, batch, backend, routing=True).routing
        for batch, backend in ((pad_rows(SAMPLES), "dense"), (pack(SAMPLES), "dense"), (pack(SAMPLES), plan.fused))
    ]
    found.append(logps_with_reference(model, pack(SAMPLES), plan.fused, None, routing=True)[0].routing)
    rows, *others = found
    assert rows is not None
    for one in others:
        assert one is not None
        assert torch.equal(one.tokens_E, rows.tokens_E) and torch.equal(one.counts_EX, rows.counts_EX)
        assert (one.probs_EX - rows.probs_EX).abs().max() < 1e-5


def test_an_adapter_without_an_invocation_in_its_rows_is_off() -> None:
    """As PEFT leaves it off; here by whoever computes the layers."""
    model = add_lora(build("Llama", {}), **ANSWERS)
    plan = plan_forward(model)
    batch: PackedBatch = pack([one._replace(adapter_start=None) for one in SAMPLES])
    off_N = reference_logps(model, batch).token_logps_N
    for backend in ("dense", plan.scorer):
        assert (completion_logps(model, batch, backend).token_logps_N - off_N).abs().max() < 1e-5


@pytest.mark.parametrize("ids", [[1, 5, 6, 2], [5, 6], [5, 6, 5, 6, 5], [6, 5], [5], []])
def test_the_last_occurrence_counts(ids: list[int]) -> None:
    places = [i for i in range(len(ids)) if ids[i : i + 2] == INVOCATION]
    assert invocation_start(ids, INVOCATION) == (places[-1] if places else None)
