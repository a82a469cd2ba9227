"""Each metric by hand on three pairs, and how metrics add up over uneven batches."""

import math

import pytest
import torch

from dpo_peft.forward import PackedBatch, Sample, Scores, pack, sum_by_completion
from dpo_peft.objective import KINDS, LossOutput, TrainingObjective
from dpo_peft.training.metrics import Mean, MetricStore, mean_of, preference_metrics, within_noise

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


def measure(
    data: str, batch: PackedBatch, rewards: list[float], logps_N: torch.Tensor, ref_N: torch.Tensor | None
) -> dict[str, Mean]:
    policy = Scores(logps_N, sum_by_completion(logps_N, batch))
    ref = None if ref_N is None else Scores(ref_N, sum_by_completion(ref_N, batch))
    scored = TrainingObjective(["sigmoid"]).score(policy, ref, batch)
    return preference_metrics(
        KINDS[data], LossOutput(torch.zeros(0), torch.tensor(rewards), scored), policy, ref, batch
    )


def metrics(pairs: list[int] | None = None, grad: bool = False) -> dict[str, Mean]:
    """The metrics of some of the pairs."""
    pairs = [0, 1, 2] if pairs is None else pairs
    bounds = [sum(LENGTHS[:i]) for i in range(7)]
    tokens = [t for p in pairs for c in (2 * p, 2 * p + 1) for t in range(bounds[c], bounds[c + 1])]
    logps_N, ref_N = (torch.tensor([values[t] for t in tokens], requires_grad=grad) for values in (LOGPS, REF))
    batch = pack([Sample([1], [[1] * LENGTHS[2 * p], [1] * LENGTHS[2 * p + 1]], p) for p in pairs])
    return measure("pairs", batch, [side[p] for p in pairs for side in (CHOSEN, REJECTED)], logps_N, ref_N)


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
    batch = pack([Sample([1], [[1] * 100_000] * 2)])
    kl = measure("pairs", batch, [0.0, 0.0], policy[tokens], ref[tokens])["kl"]
    exact = float((ref.exp() * (ref - policy)).sum())
    assert float(kl.total / kl.number) / 100_000 == pytest.approx(exact, rel=0.02)


def test_nothing_carries_gradients() -> None:
    assert not any(tensor.requires_grad for mean in metrics(grad=True).values() for tensor in mean)
    assert not mean_of(torch.ones(3, requires_grad=True)).total.requires_grad


def test_ties_count_on_neither_side() -> None:
    """Three pairs of which the second ties: the means are those of the other two."""
    samples = [Sample([1], [[1, 1], [1]], p, preference=preference) for p, preference in enumerate((1.0, 0.5, 0.8))]
    found = read(measure("pairs", pack(samples), [3.0, 1.0, 9.0, -9.0, 1.0, 2.0], -torch.ones(9), None))
    assert found["rewards/margins"] == pytest.approx((2 - 1) / 2)
    assert found["rewards/accuracies"] == 0.5
    assert (found["rewards/chosen"], found["rewards/rejected"]) == (2.0, 1.5)
    assert "kl" not in found


def test_pairs_compare_no_more_than_partners() -> None:
    """A pair's metrics are those of a list of two, which compares all completions; no (C, C) matrix is made."""
    draw = torch.Generator().manual_seed(3)
    preferences = [0.5, 0.7, 1.0, 1.0, 0.5, 0.9, 0.6]
    samples = [Sample([1], [[1] * (1 + p % 3), [1] * (1 + p % 2)], p, preference=x) for p, x in enumerate(preferences)]
    tokens = -torch.rand(sum(len(side) for s in samples for side in s.completions), generator=draw)
    rewards = torch.randn(14, generator=draw, dtype=torch.float64).tolist()
    pairs, lists = (read(measure(data, pack(samples), rewards, tokens, None)) for data in ("pairs", "lists"))
    assert {name: pairs[name] for name in lists} == pytest.approx(lists, rel=1e-14)
    batch = pack(samples)
    scored = TrainingObjective(["sigmoid"]).score(Scores(tokens, sum_by_completion(tokens, batch)), None, batch)
    compared = KINDS["pairs"].compare(scored, torch.tensor(rewards))
    assert [tensor.shape for tensor in compared] == [(14,)] * 5


def test_lists_by_hand() -> None:
    """Every two completions that are ranked apart: 3 + 1 pairs of the lists of 3 and 2; the last list ties."""
    samples = [
        Sample([1], [[1], [1, 1], [1, 1, 1]], 0, grades=[2.0, 1.0, 0.0]),
        Sample([1], [[1, 1], [1]], 1, grades=[1.0, 0.0]),
        Sample([1], [[1], [1]], 2, grades=[0.5, 0.5]),
    ]
    rewards = [3.0, 4.0, 1.0, 0.0, 5.0, 7.0, 7.0]
    found = read(measure("lists", pack(samples), rewards, -torch.ones(11), None))
    assert found["rewards/margins"] == pytest.approx((-1 + 2 + 3 - 5) / 4)
    assert found["rewards/accuracies"] == pytest.approx(2 / 4)
    assert found["accuracies/length_only"] == pytest.approx(1 / 4)
    assert found["rewards/chosen"] == pytest.approx((3 + 0) / 2)
    assert found["rewards/rejected"] == pytest.approx((4 + 1 + 5) / 3)
    assert found["logps/chosen"] == pytest.approx(-1.5)
    assert "sample_weight" not in found


def test_single_answers_by_hand() -> None:
    """Good answers against bad ones of the whole batch; mismatched ones only make z_ref."""
    samples = [
        Sample([1], [[1, 1]], 0, grades=[1.0], mismatched=[[2]]),
        Sample([1], [[1]], 1, grades=[0.0], mismatched=[[2, 2]]),
        Sample([1], [[1]], 2, grades=[1.0], mismatched=[[2]]),
    ]
    rewards = [2.0, 10.0, 1.0, 20.0, 0.5, 60.0]
    tokens = torch.arange(8.0)
    found = read(measure("singles", pack(samples), rewards, tokens, tokens - 1))
    assert found["rewards/margins"] == pytest.approx((2 - 1 + 0.5 - 1) / 2)
    assert found["rewards/accuracies"] == 0.5
    assert (found["rewards/chosen"], found["rewards/rejected"]) == (1.25, 1.0)
    assert found["z_ref"] == pytest.approx(30.0)
    assert found["kl"] == pytest.approx(4 * (math.e - 2) / 3)  # four own tokens, each one nat up, in three answers


def held_out_singles(*batches: list[tuple[float, int, float]]) -> dict[str, float]:
    """The figures of an evaluation of batches of (reward, length, grade)."""
    store = MetricStore()
    for rows in batches:
        batch = pack([Sample([1], [[1] * length], i, grades=[grade]) for i, (_, length, grade) in enumerate(rows)])
        tokens = -torch.ones(sum(length for _, length, _ in rows))
        policy = Scores(tokens, sum_by_completion(tokens, batch))
        scored = TrainingObjective(["sigmoid"]).score(policy, None, batch)
        rewards = torch.tensor([reward for reward, _, _ in rows], dtype=torch.float64)
        output = LossOutput(torch.zeros(len(rows)), rewards, scored)
        store.record(KINDS["singles"], output, policy, None, batch, held_out=True)
    return store.pop("eval")


def test_held_out_single_answers_meet_those_of_other_batches() -> None:
    """Good ones 2.0 (3 tokens) and 1.0 (1), bad ones 1.0 (2) and 3.0 (1): won 1, lost 2, one tie."""
    good, bad = [(2.0, 3, 1.0), (1.0, 1, 1.0)], [(1.0, 2, 0.0), (3.0, 1, 0.0)]
    found = held_out_singles(good, bad)
    assert found["rewards/accuracies"] == pytest.approx((1 + 0 + 0.5 + 0) / 4)
    assert found["rewards/margins"] == pytest.approx(1.5 - 2.0)
    assert found["accuracies/length_only"] == pytest.approx((1 + 1 + 0 + 0.5) / 4)
    assert found["accuracies/chosen_longer"] == pytest.approx((1 + 0) / 2)
    assert found["accuracies/chosen_shorter"] == pytest.approx(0.5)
    assert found["accuracies/length_balanced"] == pytest.approx(0.5)
    assert held_out_singles(bad + good) == held_out_singles(good[:1], bad, good[1:]) == found


def test_held_out_single_answers_that_tell_nothing() -> None:
    """Of one kind alone there is no accuracy; a reward that is not a number makes none that looks like one."""
    one_kind = held_out_singles([(2.0, 3, 1.0)], [(1.0, 1, 1.0)])
    assert not [name for name in one_kind if "accuracies" in name or "margins" in name]
    broken = held_out_singles([(2.0, 3, 1.0)], [(math.nan, 1, 1.0), (0.0, 2, 0.0)])
    assert math.isnan(broken["rewards/accuracies"]) and broken["accuracies/length_only"] == 0.5


def test_what_a_batch_does_not_have_is_left_out() -> None:
    """A batch of desirable completions alone has no rejected reward: its sum over nothing is not a zero."""
    store = MetricStore()
    batch = pack([Sample([1], [[1]], 0, grades=[1.0])])
    store.add("train", measure("singles", batch, [2.0], -torch.ones(1), None))
    assert store.pop("train") == {"rewards/chosen": 2.0, "logps/chosen": -1.0}


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


# ---- Margins within noise -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("margin", "beta", "kl", "reward", "expected"),
    [
        (0.0099, 0.1, 1e-4, "log_ratio", True),  # 0.099 nats
        (0.0101, 0.1, 1e-4, "log_ratio", False),
        (-0.0099, 0.1, None, "log_ratio", True),  # a cache of sums gives no kl
        (0.0, 0.1, 0.11, "log_ratio", False),  # far apart, without a preference: an accuracy of 0.5 that means it
        (0.05, 2.0, 0.0, "log_ratio", True),  # 0.025 nats, though half a percent of a pair's weight
        (0.05, 0.01, 0.0, "log_ratio", False),  # five nats
        (0.05, None, None, "log_ratio", True),  # an objective without beta counts nats
        (0.0, 2.0, None, "mean_logp", False),
        (None, 0.1, 1.0, "log_ratio", False),
    ],
)
def test_within_noise(margin, beta, kl, reward, expected) -> None:
    assert within_noise(margin, beta, kl, reward) is expected
