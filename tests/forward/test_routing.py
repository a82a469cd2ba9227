"""The routers' sums of a batch against rows computed one by one, in float64; and transformers' own auxiliary loss."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from forward_models import SHARING, add_lora, build, grad_difference, random_samples
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from dpo_peft.forward import PackedBatch, Sample, completion_logps, has_routers, pack, pad_rows, plan_forward
from dpo_peft.forward.routing import Routing, read_routing, slopes

EXPERTS, CHOSEN = 4, 2


def routed(name: str) -> Any:
    """A mixture of experts in float64 with an adapter on its attention."""
    model = build(*SHARING[name])
    model.set_experts_implementation("eager")  # the grouped product has no float64
    return add_lora(model, target_modules=["q_proj", "o_proj"]).double()


def samples() -> list[Sample]:
    """Three completions, two and one; the last two without a prompt, as trajectories that differ from the start."""
    lists = random_samples([(7, [3, 6, 2]), (1, [4, 4]), (5, [1])])
    apart = random_samples([(0, [5, 9])], seed=1)[0]._replace(steps=[[-1, 0, 0, 0, 0], [-1, *[0] * 8]])
    return [*(one._replace(steps=[[0] * len(c) for c in one.completions]) for one in lists), apart]


def row_by_row(model: Any, rows: Sequence[Sequence[int]]) -> Tensor:
    """The loss of rows that went through the model one at a time: no padding, no batch, no mask."""
    chosen, probs = torch.zeros(2, EXPERTS, dtype=torch.float64)
    tokens = 0
    for row in rows:
        backbone = model.get_base_model().model
        for logits in backbone(
            input_ids=torch.tensor([row]), output_router_logits=True, use_cache=False
        ).router_logits:
            for token in logits.softmax(-1):
                chosen = chosen + (token >= token.sort().values[-CHOSEN]).double()
                probs = probs + token
                tokens += 1
    return EXPERTS * (chosen / tokens * probs / tokens).sum()


def loss_of(routing: Routing) -> Tensor:
    number = len(routing.tokens_E)
    (slopes_EX,) = slopes([routing], [torch.full((number,), 1 / number, dtype=torch.float64)])
    return (slopes_EX * routing.probs_EX).sum()


def routing_of(model: Any, batch: PackedBatch) -> Routing:
    found = completion_logps(model, batch, routing=True).routing
    assert found is not None
    return found


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "padded"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "olmoe", "glm4-moe"])
def test_a_batch_has_the_loss_and_the_gradient_of_its_rows(name: str, shared: bool) -> None:
    """The control: a prompt that counts once, whatever the number of its completions, gives another loss."""
    model = routed(name)
    assert has_routers(model)
    batch = pack(samples()) if shared else pad_rows(samples())
    assert not shared or plan_forward(model).shared
    loss = loss_of(routing_of(model, batch))
    own = gradients(model, loss)
    rows = [[*sample.prompt, *ids] for sample in samples() for ids in sample.completions]
    expected = row_by_row(model, rows)
    assert abs(loss.item() - expected.item()) < 1e-12
    assert len(own) >= 4 and grad_difference(own, gradients(model, expected)) < 1e-6
    once = [[*sample.prompt, *sample.completions[0]] for sample in samples()]
    once += [list(ids) for sample in samples() for ids in sample.completions[1:]]
    assert abs(row_by_row(model, once).item() - expected.item()) > 1e-4


def test_completions_of_other_prompts_do_not_count() -> None:
    """They stand in the batch for KTO's reference point alone."""
    model, plain = routed("mixtral"), random_samples([(6, [3]), (4, [5, 2])])
    others = [plain[0]._replace(mismatched=[plain[1].completions[0]]), plain[1]]
    plan_forward(model)
    for lay_out in (pack, pad_rows):
        with_others, without = (routing_of(model, lay_out(part)) for part in (others, plain))
        for a, b in zip(with_others, without, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_it_is_the_loss_of_transformers() -> None:
    generator, batch = torch.Generator().manual_seed(0), pad_rows(random_samples([(3, [4, 9]), (8, [2, 6])]))
    assert batch.attention_mask is not None
    layers = tuple(torch.randn(batch.input_ids.numel(), EXPERTS, generator=generator) for _ in range(3))
    expected = load_balancing_loss_func(layers, EXPERTS, CHOSEN, batch.attention_mask)
    torch.testing.assert_close(loss_of(read_routing(layers, batch, CHOSEN)).float(), expected, rtol=1e-6, atol=0)
    # By hand: one token that takes both of two experts, at 3/4 and 1/4. 2 * (1 * 3/4 + 1 * 1/4) = 2.
    one = pad_rows([Sample([5], [[6]])])
    certain = (torch.tensor([[3.0, 1.0], [3.0, 1.0]]).log(),)
    assert float(loss_of(read_routing(certain, one, 2))) == pytest.approx(2)
    assert float(loss_of(read_routing(certain, one, 1))) == pytest.approx(1.5)  # 2 * (1 * 3/4 + 0)


def test_parts_have_the_loss_of_their_groups() -> None:
    """Samples of two groups, strewn over three parts: value and slopes are those of the groups by themselves."""
    draw = torch.Generator().manual_seed(3)
    whole = Routing(
        *(torch.rand(5, 4, generator=draw, dtype=torch.float64) for _ in range(2)), torch.arange(5.0).double() + 2
    )
    group, weight = [0, 1, 0, 1, 1], torch.tensor([1.0, 2.0, 1.0, 1.0, 3.0], dtype=torch.float64)
    cut = [slice(0, 2), slice(2, 3), slice(3, 5)]
    parts = [Routing(*(x[one] for x in whole)) for one in cut]
    found = slopes(parts, [weight[one] for one in cut], [group[one] for one in cut])
    expected = 0.0
    for number in (0, 1):
        rows = [i for i, one in enumerate(group) if one == number]
        shares = whole.counts_EX[rows].sum(0) / whole.tokens_E[rows].sum()
        probs = whole.probs_EX[rows].sum(0) / whole.tokens_E[rows].sum()
        expected += float(weight[rows].sum() * 4 * (shares * probs).sum())
    total = sum((slopes_EX * part.probs_EX).sum() for slopes_EX, part in zip(found, parts, strict=True))
    assert float(total) == pytest.approx(expected, rel=1e-12)


def test_dense_models_have_no_routers() -> None:
    assert not has_routers(build("Llama"))
    assert not has_routers(build("Qwen3Moe", dict(decoder_sparse_step=1, mlp_only_layers=[0, 1])))
    assert has_routers(build("GptOss", dict(layer_types=["sliding_attention", "full_attention"])))
