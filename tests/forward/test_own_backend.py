"""An attention backend from outside the package is one record, taken by name or as the first that supports a model."""

from typing import Any

import pytest
import torch
from forward_models import SHARING, adapter_grads, add_lora, build, grad_difference, random_samples
from torch import Tensor

from dpo_peft.forward import attention, completion_logps, pack, plan_forward
from dpo_peft.forward.attention import AttentionBackend, AttentionPlan, HeadShape, prefix_shared_attention
from dpo_peft.forward.layout import visible

SAMPLES = random_samples([(11, (5, 8, 1)), (6, (7, 3))])


class WrittenOut:
    """Softmax attention over the whole row under the mask predicate, and how often it was called."""

    def __init__(self, record: dict[str, Any] | None = None):
        self.calls = 0
        self.record = AttentionBackend("written out", self.supports, self.attend, **(record or {}))

    def supports(self, device: torch.device, dtype: torch.dtype, heads: HeadShape) -> bool:
        return dtype == torch.float32 and heads.size == 16

    def attend(
        self, plan: AttentionPlan, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        self.calls += 1
        batch, groups = plan.batch, q_THD.shape[1] // k_TGD.shape[1]
        segment, context, pos = batch.segment, batch.context, batch.position_ids[0]
        seen = plan.once(
            window,
            lambda: visible(segment[:, None], context[:, None], pos[:, None], segment[None], pos[None], window),
        )
        k, v = k_TGD.repeat_interleave(groups, 1), v_TGD.repeat_interleave(groups, 1)
        scores = torch.einsum("qhd,khd->hqk", q_THD, k) * scaling
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("name", ["llama", "mistral", "apertus"])
@pytest.mark.parametrize("fused", [None, False])
def test_the_first_that_supports_a_model_is_taken(name: str, fused: bool | None, monkeypatch: Any) -> None:
    """By the model's own layers and by fused ones alike."""
    mine = WrittenOut()
    monkeypatch.setattr(attention, "BACKENDS", [mine.record, *attention.BACKENDS])
    model = add_lora(build(*SHARING[name]))
    plan = plan_forward(model, fused=fused)
    assert plan.shared and plan.backend == "written out" and "'written out'" in str(plan)
    assert (plan.fused is None) == (fused is False or name == "apertus")
    results = []
    for backend in (plan.scorer, "written out", "dense"):
        before = mine.calls
        scores = completion_logps(model, pack(SAMPLES), backend)
        assert mine.calls - before == (0 if backend == "dense" else 2)  # once per layer
        results.append((scores.token_logps_N.detach(), adapter_grads(model, scores.logps_C)))
    for logps_N, grads in results[:2]:
        assert (logps_N - results[2][0]).abs().max() < 1e-5
        assert grad_difference(grads, results[2][1]) < 1e-5


def test_others_are_taken_where_it_does_not_run(monkeypatch: Any) -> None:
    mine = WrittenOut()
    monkeypatch.setattr(attention, "BACKENDS", [mine.record, *attention.BACKENDS])
    assert plan_forward(build("Llama", dict(head_dim=32))).backend == "dense" and mine.calls == 0


def test_a_wrong_one_is_noticed(monkeypatch: Any) -> None:
    """Negative control: the probe holds it against the model's own attention."""
    mine = WrittenOut()
    right = mine.attend
    wrong = AttentionBackend("wrong", mine.supports, lambda plan, q, k, v, s, w: right(plan, q, k.flip(0), v, s, w))
    monkeypatch.setattr(attention, "BACKENDS", [wrong, *attention.BACKENDS])
    assert plan_forward(build("Llama")).backend == "dense" and mine.calls > 0


def test_calls_that_it_does_not_do_go_to_another(monkeypatch: Any) -> None:
    mine = WrittenOut({"windows": False})
    monkeypatch.setattr(attention, "BACKENDS", [mine.record, *attention.BACKENDS])
    q = torch.randn(1, 4, 41, 8)
    for options, calls in [({}, 1), ({"sliding_window": 3}, 0), ({"dropout": 0.5}, 0)]:
        outs, mine.calls = [], 0
        for backend in ("written out", "dense"):
            torch.manual_seed(5)
            plan = AttentionPlan(pack(SAMPLES), backend)
            module = torch.nn.Module()
            outs.append(prefix_shared_attention(module, q, q, q, None, scaling=0.3, prefix_layout=plan, **options)[0])
        assert mine.calls == calls and (outs[0] - outs[1]).abs().max() < 1e-5
