"""Each metric by hand on three pairs, and how metrics add up over uneven batches."""

import math

import pytest
import torch
from torch import Tensor

from dpo_peft.losses import PairLoss
from dpo_peft.metrics import Mean, MetricStore, mean_of, pair_metrics

# Rewards of three pairs: won, lost, tied.
CHOSEN, REJECTED = [0.5, -0.25, 0.125], [-0.5, 0.75, 0.125]
# Tokens of the six completions: pairs (2, 1), (1, 3), (2, 2).
LENGTHS = [2, 1, 1, 3, 2, 2]
LOGPS = [-1.0, -2.0, -0.5, -3.0, -1.0, -1.5, -0.25, -1.0, -1.25, -2.0, -0.75]
REF = [-1.0, -2.5, -0.5, -2.0, -1.0, -1.5, -0.25, -1.5, -1.25, -2.0, -0.25]


def by_hand() -> dict[str, float]:
    ratios = [p - r for p, r in zip(LOGPS, REF, strict=True)]  # 0.5, -1, 0.5, -0.5 and zeros
    return {
        "rewards/chosen": (0.5 - 0.25 + 0.125) / 3,
        "rewards/rejected": (-0.5 + 0.75 + 0.125) / 3,
        "rewards/margins": (1.0 - 1.0 + 0.0) / 3,
        "rewards/accuracies": (1 + 0 + 0.5) / 3,
        "accuracies/length_only": (1 + 0 + 0.5) / 3,
        "logps/chosen": (-3.0 - 3.0 - 2.25) / 3,
        "logps/rejected": (-0.5 - 2.75 - 2.75) / 3,
        "sample_weight": (1 / (1 + math.e) + math.e / (1 + math.e) + 0.5) / 3,
        "kl": sum(math.exp(x) - 1 - x for x in ratios) / 6,
    }


def metrics(pairs: list[int] | None = None) -> dict[str, Mean]:
    """The metrics of some of the pairs."""
    pairs = [0, 1, 2] if pairs is None else pairs
    bounds = [sum(LENGTHS[:i]) for i in range(7)]
    completions = [c for p in pairs for c in (2 * p, 2 * p + 1)]
    tokens = [t for c in completions for t in range(bounds[c], bounds[c + 1])]
    owner = torch.tensor([i for i, c in enumerate(completions) for _ in range(LENGTHS[c])])
    logps_N, ref_N = (torch.tensor([values[t] for t in tokens]) for values in (LOGPS, REF))
    logps_C = torch.zeros(len(completions), dtype=torch.float64).index_add(0, owner, logps_N.double())
    loss = PairLoss(*(torch.tensor([values[p] for p in pairs]) for values in ([0.1, 0.2, 0.3], CHOSEN, REJECTED)))
    return pair_metrics(loss, logps_C, logps_N, ref_N, owner)


def read(means: dict[str, Mean]) -> dict[str, float]:
    return {name: float(mean.total / mean.number) for name, mean in means.items()}


def test_every_metric_by_hand() -> None:
    assert read(metrics()) == pytest.approx(by_hand())


def test_length_only_is_about_tokens_not_rewards() -> None:
    """Pair 0: the chosen one is longer. Pair 1: the rejected one. Pair 2: as long as each other."""
    assert [read(metrics([p]))["accuracies/length_only"] for p in range(3)] == [1.0, 0.0, 0.5]
    assert [read(metrics([p]))["rewards/accuracies"] for p in range(3)] == [1.0, 0.0, 0.5]


def test_kl_estimate() -> None:
    """Zero where policy and reference agree, positive elsewhere; on samples of the reference KL(ref || policy)."""
    assert read(metrics([2]))["kl"] == pytest.approx((math.exp(0.5) - 1.5 + math.exp(-0.5) - 0.5) / 2)
    draw = torch.Generator().manual_seed(0)
    policy, ref = (torch.randn(6, generator=draw).log_softmax(0) for _ in range(2))
    tokens = torch.multinomial(ref.exp(), 200_000, replacement=True, generator=draw)
    zeros = torch.zeros(1)
    loss = PairLoss(zeros, zeros, zeros)
    half = torch.arange(200_000) // 100_000
    kl = pair_metrics(loss, torch.zeros(2), policy[tokens], ref[tokens], half)["kl"]
    exact = float((ref.exp() * (ref - policy)).sum())
    assert float(kl.total / kl.number) / 100_000 == pytest.approx(exact, rel=0.02)


def test_nothing_carries_gradients() -> None:
    logps_N = torch.tensor(LOGPS, requires_grad=True)
    owner = torch.repeat_interleave(torch.arange(6), torch.tensor(LENGTHS))
    logps_C = torch.zeros(6).index_add(0, owner, logps_N)
    rewards: list[Tensor] = [logps_C[0::2].detach(), logps_C[1::2].detach()]
    means = pair_metrics(PairLoss(logps_C[0::2], *rewards), logps_C, logps_N, torch.tensor(REF), owner)
    assert not any(tensor.requires_grad for mean in means.values() for tensor in mean)
    assert not mean_of(logps_C).total.requires_grad


@pytest.mark.parametrize("split", [[[0, 1, 2]], [[0], [1, 2]], [[0, 1], [2]], [[2], [0], [1]]])
def test_any_split_into_batches_gives_the_same_means(split: list[list[int]]) -> None:
    store = MetricStore()
    for pairs in split:
        store.add("train", metrics(pairs))
    assert store.pop("train") == pytest.approx(by_hand())


def test_a_mean_of_means_would_be_another_number() -> None:
    parts = [read(metrics(pairs))["rewards/chosen"] for pairs in ([0], [1, 2])]
    assert abs(sum(parts) / 2 - by_hand()["rewards/chosen"]) > 0.05


def test_store_keeps_modes_apart_and_empties_when_read() -> None:
    store = MetricStore()
    store.add("train", {"a": mean_of(torch.tensor([1.0, 2.0])), "b": mean_of(torch.tensor([5.0]))})
    store.add("eval", {"a": mean_of(torch.tensor([10.0]))})
    store.add("train", {"a": mean_of(torch.tensor([6.0]))})
    assert store.pop("train") == {"a": 3.0, "b": 5.0}
    assert store.pop("train") == {}
    assert store.pop("eval") == {"a": 10.0}
