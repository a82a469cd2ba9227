"""Named warnings: each fires on figures just over its threshold and on a run that goes wrong, and on no other."""

import math
import random
import re
from collections.abc import Callable
from typing import Any

import pytest
from datasets import Dataset
from paths import REPO
from trainer_helpers import ours
from transformers import set_seed

from dpo_peft.evaluation.diagnostics import CHECKS, REMEDIES, Run, RunFacts, diagnose, findings, unchanged

DOC = (REPO / "docs" / "diagnostics.md").read_text("utf-8")
TOKENS, BETA = 40.0, 0.1
FACTS = RunFacts("log_ratio", BETA, TOKENS, {"eval": 400}, 100)

HEALTHY = {
    "loss": 0.4,
    "rewards/chosen": 0.2,
    "rewards/rejected": -0.6,
    "rewards/margins": 0.8,
    "rewards/accuracies": 0.8,
    "accuracies/length_only": 0.55,
    "accuracies/chosen_longer": 0.82,
    "accuracies/chosen_shorter": 0.78,
    "logps/chosen": -50.0,
    "logps/rejected": -60.0,
    "sample_weight": 0.3,
    "kl": 4.0,
}


def training(logs: int, start: int = 1, **changed: float) -> list[dict[str, float]]:
    return [{**HEALTHY, **changed, "step": step} for step in range(start, start + logs)]


def evaluation(step: int, prefix: str = "eval", **changed: float) -> dict[str, float]:
    figures = {**HEALTHY, **{name.replace("__", "/"): value for name, value in changed.items()}}
    return {**{f"{prefix}_{name}": value for name, value in figures.items()}, "step": step}


def names(history: list[dict[str, float]], facts: RunFacts = FACTS) -> list[str]:
    return [finding.name for finding in diagnose(history, facts)]


def test_nothing_to_say() -> None:
    assert names([]) == names([{"train_loss": 0.4, "step": 3}]) == []
    assert names([*training(40), evaluation(40), *training(40, 41), evaluation(80)]) == []


# ---- Thresholds, from both sides ------------------------------------------------------------------------------------


def displaced(nats_per_token: float, share: float) -> dict[str, float]:
    """Chosen completions have fallen by so much, and this is such a share of the margin."""
    fall = nats_per_token * TOKENS
    return {"rewards__chosen": -fall * BETA, "rewards__margins": fall / share * BETA}


@pytest.mark.parametrize(
    ("figures", "fires"),
    [
        (displaced(0.101, 0.9), True),
        (displaced(0.099, 0.9), False),  # a fall that hardly matters
        (displaced(0.3, 0.51), True),
        (displaced(0.3, 0.49), False),  # most of the margin comes from the rejected ones
        (displaced(0.3, 1.5), True),  # both have fallen further than they came apart
        (displaced(0.3, -1.0), False),  # the margin does not grow: another trouble
        ({"rewards__chosen": 2.0, "rewards__margins": 4.0}, False),  # it has risen
    ],
)
def test_displacement(figures, fires) -> None:
    assert names([evaluation(10, **figures)]) == ["likelihood-displacement"] * fires


def test_displacement_without_a_reference() -> None:
    """The first evaluation stands in for it."""
    facts = RunFacts("mean_logp", 2.0, TOKENS, {"eval": 400}, 100)
    now = {"logps__chosen": -56.0, "logps__rejected": -72.0, "rewards__chosen": -9.0}
    assert names([evaluation(10), evaluation(20, **now)], facts) == ["likelihood-displacement"]
    assert names([evaluation(20, **now)], facts) == []
    assert names([evaluation(10), evaluation(20, **{**now, "logps__rejected": -80.0})], facts) == []


@pytest.mark.parametrize(("kl", "fires"), [(0.51 * TOKENS, True), (0.49 * TOKENS, False)])
def test_high_kl(kl, fires) -> None:
    assert names([evaluation(10, kl=kl)]) == ["high-kl"] * fires
    no_lengths = RunFacts("log_ratio", BETA, None, {"eval": 400}, 100)  # a stream that has not been read
    assert names([evaluation(10, kl=kl)], no_lengths) == []


@pytest.mark.parametrize(
    ("longer", "shorter", "rows", "fires"),
    [
        (0.95, 0.60, 400, True),
        (0.60, 0.95, 400, True),  # prefers the shorter
        (0.85, 0.60, 400, False),
        (0.95, 0.60, 40, False),  # may be chance: three standard errors are 0.38
        (1.0, 0.0, 40, True),
        (1.0, 0.0, 2, False),  # one pair on each side
        (0.95, 0.60, 0, False),  # unknown number
    ],
)
def test_length_exploitation(longer, shorter, rows, fires) -> None:
    facts = RunFacts("log_ratio", BETA, TOKENS, {"eval": rows}, 100)
    figures = {"accuracies__chosen_longer": longer, "accuracies__chosen_shorter": shorter}
    assert names([evaluation(10, **figures)], facts) == ["length-exploitation"] * fires


@pytest.mark.parametrize(
    ("by_length", "accuracy", "fires"),
    [(0.95, 0.97, True), (0.05, 0.97, True), (0.85, 0.97, False), (0.95, 0.5, False)],
)
def test_pairs_that_are_decided_by_length(by_length, accuracy, fires) -> None:
    figures = {"accuracies__length_only": by_length, "rewards__accuracies": accuracy}
    found = diagnose([evaluation(10, **figures)], FACTS)
    assert [finding.name for finding in found] == ["length-exploitation"] * fires
    if fires:
        assert (
            f"The {'longer' if by_length > 0.5 else 'shorter'} completion is the better one in 95%" in found[0].message
        )


@pytest.mark.parametrize(("weight", "logs", "fires"), [(0.009, 5, True), (0.011, 5, False), (0.001, 4, False)])
def test_reward_saturation(weight, logs, fires) -> None:
    assert names(training(logs, sample_weight=weight)) == ["reward-saturation"] * fires
    # One log of few pairs is no sign.
    assert names([*training(10), *training(1, 11, sample_weight=0.0)]) == []


@pytest.mark.parametrize(
    ("losses", "train_loss", "fires"),
    [
        ([0.6, 0.5, 0.56, 0.57], 0.3, True),
        ([0.6, 0.5, 0.56, 0.54], 0.3, False),  # the rise of 10 % was one evaluation's
        ([0.6, 0.5, 0.56, 0.57], 0.52, False),  # the training loss isn't below the lowest either: no overfitting
        ([0.5, 0.57], 0.3, False),  # two evaluations make no trend
        ([0.1, 0.015, 0.03, 0.03], 0.001, False),  # doubled, and still nothing
        ([0.1, 0.015, 0.036, 0.036], 0.001, True),
    ],
)
def test_overfitting(losses, train_loss, fires) -> None:
    history = training(5, loss=train_loss) + [evaluation(i, loss=loss) for i, loss in enumerate(losses)]
    assert names(history) == ["overfitting"] * fires


@pytest.mark.parametrize(
    ("nats", "steps", "total", "fires"),
    [
        (0.049, [10, 20, 30, 40, 50], 60, True),  # logging_steps is 10
        (-0.049, [10, 20, 30, 40, 50], 60, True),
        (0.051, [10, 20, 30, 40, 50], 60, False),
        (0.049, [10, 20, 30, 40, 50], 101, False),  # before half of the run
        (0.049, [10, 20, 30, 40], 60, False),  # more logs will come
        (0.049, [10, 20, 30, 40], 49, True),  # and here none
        (0.049, [1, 10, 20], 29, True),  # logging_first_step
        (0.049, [10], 19, False),  # too short a run
        (0.049, [15, 16, 17, 18, 19], 30, False),
        (0.049, [16, 17, 18, 19, 20], 30, True),
        (0.049, [8, 16, 24, 32, 40], 0, False),  # unknown length
    ],
)
@pytest.mark.parametrize("beta", [0.01, 2.0])
def test_no_learning(nats, steps, total, fires, beta) -> None:
    """The margin counts in nats, so that beta makes no difference."""
    history = [entry for step in steps for entry in training(1, step, **{"rewards/margins": nats * beta})]
    assert names(history, FACTS._replace(beta=beta, max_steps=total)) == ["no-learning"] * fires
    reference_free = RunFacts("mean_logp", 2.0, TOKENS, {"eval": 400}, total)  # whose margin doesn't start at 0
    assert names(history, reference_free) == []


@pytest.mark.parametrize(
    ("steps", "found"),
    [
        ({0: "a b", 30: "a c", 60: "a b"}, True),  # the newest counts
        ({0: "a b", 60: "a c"}, False),  # one of two has changed
        ({0: "a b", 60: "b a"}, False),
        ({30: "a b", 60: "a b"}, False),  # those from before training are not known
        ({0: "a b"}, False),
        ({}, False),
    ],
)
def test_unchanged_samples(steps, found) -> None:
    rows = [{"step": step, "completion": word} for step, words in steps.items() for word in words.split()]
    assert bool(unchanged(rows)) == found


# ---- Which figures are looked at ------------------------------------------------------------------------------------


def test_training_logs_count_where_nothing_is_evaluated() -> None:
    no_evaluation = RunFacts("log_ratio", BETA, TOKENS, {}, 100)
    assert names(training(5, kl=30.0), no_evaluation) == ["high-kl"]
    assert names(training(4, kl=30.0), no_evaluation) == []
    assert names([*training(4, kl=30.0), *training(4, 5)], no_evaluation) == []  # the mean of the last five: 9.2
    assert names(training(5, kl=30.0)) == [], "the held-out rows may tell otherwise"


def test_each_of_several_datasets_is_looked_at() -> None:
    facts = RunFacts("log_ratio", BETA, TOKENS, {"eval_a": 400, "eval_b": 400}, 100)
    history = [evaluation(10, "eval_a"), evaluation(10, "eval_b", kl=30.0)]
    found = diagnose(history, facts)
    assert [finding.name for finding in found] == ["high-kl"]
    assert "on the held-out rows of 'b': kl is 30.0 nats a completion, 0.75 a token" in found[0].message


def test_only_the_newest_evaluation_counts() -> None:
    assert names([evaluation(10, kl=30.0), evaluation(20)]) == []


def test_a_log_that_grows_is_read_once() -> None:
    """Read as it grows, a history gives what it gives at once, and each of its entries is taken in one time."""
    history = [{"loss": 0.7 - step / 100, "step": step, "rewards/margins": 0.001} for step in range(40)]
    for step in (5, 10, 20, 30, 39):
        history.insert(step, {"eval_loss": 0.6 + step / 100, "eval_kl": 30.0, "step": step})
    facts = RunFacts(tokens=10.0, held_out={"eval": 4}, max_steps=40)
    run, reads = Run(facts), 0

    class Counted(list):  # a log that counts what is taken of it
        def __getitem__(self, at: Any) -> Any:
            nonlocal reads
            reads += len(super().__getitem__(at))
            return super().__getitem__(at)

    for end in range(1, len(history) + 1):
        run.read(Counted(history[:end]))
        assert findings(run) == diagnose(history[:end], facts)
    assert reads == len(history) and {found.name for found in findings(run)} >= {"high-kl", "overfitting"}


def test_a_message_says_where_what_and_the_remedy() -> None:
    (found,) = diagnose([*training(3), evaluation(12, kl=30.0)], FACTS)
    assert (found.step, found.name) == (12, "high-kl")
    assert found.message == (
        "The policy is far from its reference on held-out rows: kl is 30.0 nats a completion, 0.75 a token. Raise "
        "beta, lower learning_rate or stop earlier, and look at samples (sample_prompts). "
        "See docs/diagnostics.md#high-kl."
    )


def test_the_quickstart_is_healthy() -> None:
    """Its logged figures (beta 0.5, 38.8 tokens an answer, 266 held-out pairs): its samples are fluent and better."""
    columns = "loss rewards/chosen rewards/margins rewards/accuracies sample_weight kl logps/chosen".split()
    logged = {  # step: figures, of 10 training logs' steps and of the evaluations
        "loss": {
            10: (0.661, 0.033, 0.067, 0.881, 0.483, 0.004, -51.541),
            20: (0.436, 0.198, 0.660, 0.994, 0.347, 0.222, -50.365),
            30: (0.179, 0.210, 1.981, 0.994, 0.156, 1.571, -49.253),
            40: (0.060, -0.282, 3.774, 1.0, 0.055, 4.478, -51.924),
            50: (0.030, -1.204, 5.548, 0.994, 0.027, 7.633, -52.449),
            60: (0.033, -1.647, 5.813, 1.0, 0.029, 9.576, -54.811),
            70: (0.033, -1.637, 6.468, 1.0, 0.028, 10.106, -53.856),
        },
        "eval_loss": {
            25: (0.156, 0.277, 2.121, 0.992, 0.138, 1.630, -49.508),
            50: (0.022, -1.242, 6.113, 1.0, 0.020, 8.864, -52.545),
            75: (0.017, -1.584, 6.601, 1.0, 0.016, 10.034, -53.229),
        },
    }
    history = [
        {**{kind.removesuffix("loss") + n: v for n, v in zip(columns, values, strict=True)}, "step": step}
        for kind, logs in logged.items()
        for step, values in logs.items()
    ]
    history.sort(key=lambda entry: entry["step"])
    facts = RunFacts("log_ratio", 0.5, 38.8, {"eval": 266}, 78)
    assert [names(history[: i + 1], facts) for i in range(len(history))] == [[]] * len(history)


# ---- Runs that go wrong ---------------------------------------------------------------------------------------------


def pairs(number: int, answers: Callable[[random.Random, Callable[[int], list[int]]], Any], seed: int = 0) -> Dataset:
    draw = random.Random(seed)

    def ids(length: int) -> list[int]:
        return [draw.randrange(5, 270) for _ in range(length)]

    rows = []
    for _ in range(number):
        chosen, rejected = answers(draw, ids)
        rows.append({"prompt_ids": ids(6), "chosen_ids": chosen, "rejected_ids": rejected})
    return Dataset.from_list(rows)


def unlike(draw: random.Random, ids: Any) -> Any:
    return ids(draw.randint(3, 8)), ids(draw.randint(3, 8))


def alike(draw: random.Random, ids: Any) -> Any:
    """But for one token."""
    chosen = ids(8)
    rejected = list(chosen)
    rejected[draw.randrange(8)] = draw.randrange(5, 270)
    return chosen, rejected


def longer(draw: random.Random, ids: Any) -> Any:
    return ids(draw.randint(7, 9)), ids(draw.randint(2, 4))


def half_swapped(rows: Dataset) -> Dataset:
    swapped = [{**r, "chosen_ids": r["rejected_ids"], "rejected_ids": r["chosen_ids"]} for r in rows]
    return Dataset.from_list([swapped[i] if i % 2 else row for i, row in enumerate(rows)])


# Name: rows, held-out rows, options, the warnings that must and those that may come.
RUNS: dict[str, tuple[Any, Any, dict[str, Any], set[str], set[str]]] = {
    # A loss that pushes chosen answers down too, on completions that share most tokens.
    "displaced": (
        lambda: pairs(32, alike),
        None,
        {"loss_type": "apo_down", "learning_rate": 3e-2, "max_steps": 5},
        {"likelihood-displacement"},
        {"high-kl"},
    ),
    # In training the longer completion is always the better one; in the held-out rows only in every second pair.
    "long": (
        lambda: pairs(40, longer),
        half_swapped,
        {"learning_rate": 3e-3, "max_steps": 10},
        {"length-exploitation"},
        {"overfitting", "high-kl"},
    ),
    "by heart": (
        lambda: pairs(16, unlike),
        lambda rows: pairs(32, unlike, seed=1),
        {"learning_rate": 2e-2, "max_steps": 20, "beta": 0.3},
        {"reward-saturation", "high-kl", "overfitting"},
        set(),
    ),
    "still": (lambda: pairs(16, unlike), None, {"learning_rate": 1e-6, "max_steps": 20}, {"no-learning"}, set()),
    "healthy": (lambda: pairs(16, unlike), None, {"learning_rate": 3e-3, "max_steps": 12}, set(), set()),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_goes_wrong(tiny_llama, make_tokenizer, tmp_path, caplog, name) -> None:
    make_rows, held_out, options, must, may = RUNS[name]
    rows = make_rows()
    set_seed(0)
    how = {"eval_strategy": "steps", "eval_steps": 5, "per_device_train_batch_size": 8, **options}
    evaluated = rows if held_out is None else held_out(rows)
    trainer = ours(tiny_llama(), rows, make_tokenizer(), tmp_path, eval_dataset=evaluated, **how)
    trainer.train()
    raised = [warning["name"] for warning in trainer.warnings_raised]
    assert len(raised) == len(set(raised)), "a warning was raised twice"
    assert must <= set(raised) <= must | may
    for warning in trainer.warnings_raised:
        assert f"{warning['name']} at step {warning['step']}: {warning['message']}" in caplog.text
        seen = [entry for entry in trainer.state.log_history if entry["step"] <= warning["step"]]
        assert warning["name"] in names(seen, trainer.evaluation.warnings.facts(trainer.state))
    if name == "healthy":
        last = [entry for entry in trainer.state.log_history if "eval_loss" in entry][-1]
        assert last["eval_rewards/accuracies"] == 1.0 and last["eval_rewards/margins"] > 0.3


def test_the_facts_of_a_run(tiny_llama, make_tokenizer, tmp_path) -> None:
    rows = pairs(8, longer)
    sets = {"a": pairs(3, unlike), "b": pairs(5, unlike)}
    options = {"eval_strategy": "steps", "eval_steps": 5, "beta": 0.3}
    trainer = ours(tiny_llama(), rows, make_tokenizer(), tmp_path, eval_dataset=sets, **options)
    facts = trainer.evaluation.warnings.facts(trainer.state)
    lengths = [len(row[side]) for row in rows for side in ("chosen_ids", "rejected_ids")]
    assert facts.tokens == pytest.approx(sum(lengths) / 16) and facts.beta == 0.3 and facts.reward == "log_ratio"
    assert facts.held_out == {"eval_a": 3, "eval_b": 5}


# ---- The documentation ----------------------------------------------------------------------------------------------


def test_every_warning_is_explained() -> None:
    of_samples = {"no-change"}
    assert set(re.findall(r"^## `([\w-]+)`$", DOC, flags=re.MULTILINE)) == set(CHECKS) | of_samples == set(REMEDIES)


def test_the_documented_thresholds_are_those_of_the_code() -> None:
    from dpo_peft.evaluation import diagnostics

    stated = dict(re.findall(r"^\| `([A-Z_]+)` \| ([\d.]+) \|", DOC, flags=re.MULTILINE))
    constants = {n: v for n, v in vars(diagnostics).items() if n.isupper() and isinstance(v, int | float)}
    assert {name: float(value) for name, value in stated.items()} == pytest.approx(constants)
    assert not math.isnan(sum(constants.values())) and len(constants) >= 10
