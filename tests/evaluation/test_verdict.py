"""The verdict on runs whose right verdict is written down by hand. Intervals are Wilson's at 95 %, from a table: 90 of
100 give 0.826 to 0.945, 50 of 100 give 0.404 to 0.596."""

from typing import Any

import pytest

from dpo_peft.evaluation.verdict import verdict


def run(accuracy: float | None = 0.9, rows: int = 100, **changes: Any) -> dict[str, Any]:
    """A metrics.json: pairs, a margin of 5 nats, length alone right half of the time."""
    figures = {
        "loss": 0.4,
        "rewards/margins": 0.5,
        "kl": 3.0,
        "rewards/accuracies": accuracy,
        "accuracies/length_only": 0.5,
        "accuracies/chosen_longer": accuracy,
        "accuracies/chosen_shorter": accuracy,
    } | changes.pop("figures", {})
    logs = [{"step": 10, "epoch": 0.5, "loss": 0.6}, {"step": 20, "epoch": 1.0, "eval_loss": 0.4}]
    return {
        "reward": "log_ratio",
        "beta": 0.1,
        "data": {"train": {"kept_rows": 2000}, "eval": {"kept_rows": rows, "ties": 0}},
        "last": {"rewards/accuracies": 0.9},
        "eval_first": figures,
        "eval_last": {name: value for name, value in figures.items() if value is not None},
        "log_history": logs,
    } | changes


SETS = {"train": {"kept_rows": 2000}, "eval_a": {"kept_rows": 100}, "eval_b": {"kept_rows": 100}}
FIGURES = {"loss": 0.4, "rewards/margins": 0.5, "accuracies/length_only": 0.5}


def of_sets(a: float, b: float) -> dict[str, Any]:
    last = {f"{name}_{key}": value for name in "ab" for key, value in FIGURES.items()}
    return run(data=SETS, eval_last=last | {"a_rewards/accuracies": a, "b_rewards/accuracies": b})


def warned(name: str) -> list[dict[str, Any]]:
    return [{"step": 7, "name": name, "message": "..."}]


CASES = {
    "clear": (run(), "good", "0.900 (0.826 to 0.945) on 100 comparisons; length alone gets 0.500"),
    # 0.826 is above 0.75, and so is the balanced accuracy above a half.
    "beyond a lopsided set": (run(figures={"accuracies/length_only": 0.25}), "good", "length alone gets 0.750"),
    # 200 pairs: 0.9 is 0.851 to 0.934, below the 0.95 of length alone; its 10 pairs with the shorter better: 0 won.
    "follows length": (
        run(0.9, 200, figures={"accuracies/length_only": 0.95, "accuracies/chosen_shorter": 0.0}),
        "bad",
        "No better than length alone",
    ),
    # 1,000 pairs: 0.53 is 0.499 to 0.561, at most 0.011 above the 0.55 of length alone.
    "chance, and many pairs": (run(0.53, 1000, figures={"accuracies/length_only": 0.45}), "bad", "length alone"),
    # 0.58 of 100 is 0.482 to 0.672; of 200 it is 0.511 to 0.646, which is above one half.
    "chance, and few pairs": (run(0.58, 100), "unsure", "so many of 200 would tell"),
    "ten pairs": (run(1.0, 10), "unsure", "Hold out at least 30"),
    "ties are no comparisons": (
        run(data={"train": {"kept_rows": 2000}, "eval": {"kept_rows": 100, "ties": 80}}),
        "unsure",
        "on 20 comparisons",
    ),
    # Of 90 desirable and 40 undesirable completions 40 comparisons are independent.
    "single completions": (
        run(data={"train": {"kept_rows": 2000}, "eval": {"kept_rows": 130, "desirable": 90, "undesirable": 40}}),
        "good",
        "on 40 comparisons",
    ),
    "one kind of them": (
        run(None, data={"train": {"kept_rows": 2000}, "eval": {"kept_rows": 90, "desirable": 90, "undesirable": 0}}),
        "unsure",
        "hold nothing to compare (0 comparisons)",
    ),
    # 0.0005 / 0.1 = 0.005 nats.
    "a margin that is noise": (run(1.0, figures={"rewards/margins": 0.0005, "kl": 6e-6}), "bad", "is 0.005 nats"),
    "not a number": (run(figures={"loss": float("nan")}), "bad", "not a number"),
    "nothing held out": (
        run(data={"train": {"kept_rows": 2000}}, eval_first={}, eval_last={}),
        "unsure",
        "--eval_share 0.05 --eval_strategy steps",
    ),
    # A fifth of 500 rows is 100.
    "nothing held out of few": (run(data={"train": {"kept_rows": 500}}, eval_last={}), "unsure", "--eval_share 0.2"),
    "no step": (run(log_history=[{"step": 0, "train_loss": 0.0}]), "bad", "The run took 0 steps"),
    "two good sets": (of_sets(0.9, 0.9), "good", "accuracy 0.900 (0.826 to 0.945) on 'a'"),
    "two bad sets": (of_sets(0.45, 0.45), "bad", "on 'a'"),
    "one of each": (of_sets(0.9, 0.45), "unsure", "No better than length alone on 'b'"),
    "a warning": (run(warnings=warned("high-kl")), "unsure", "Warning high-kl at step 7: Raise beta"),
    "a warning that is none": (run(warnings=warned("reward-saturation")), "good", "by more than chance"),
    "no text is changed": (run(warnings=warned("no-change")), "unsure", "Warning no-change at step 7: Raise learning"),
    "nothing is learned": (run(warnings=warned("no-learning")), "bad", "Nothing was learned."),
    # Rewards without a reference are not 0 at the start: a good accuracy may be the untrained model's.
    "no reference, one evaluation": (run(reward="logp"), "unsure", "--eval_on_start true"),
    "of an unknown number": (run(data={}), "unsure", "(0 comparisons)"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_verdict_is_the_one_by_hand(name: str) -> None:
    metrics, level, says = CASES[name]
    found = verdict(metrics)
    assert (found.level, says in " ".join([found.headline, *found.reasons])) == (level, True), found
    assert found.headline.count(".") == 1 and found.headline.endswith(".")
    assert any(character.isdigit() for character in found.reasons[0])


@pytest.mark.parametrize(("before", "level"), [(0.6, "good"), (0.85, "unsure")])
def test_without_a_reference_the_first_evaluation_is_what_counts(before: float, level: str) -> None:
    """0.9 of 100 is at least 0.826: more than 0.6, not more than 0.85."""
    logs = [{"step": 0, "eval_loss": 0.7}, {"step": 20, "eval_loss": 0.4}]
    assert verdict(run(reward="logp", log_history=logs, eval_first={"rewards/accuracies": before})).level == level


def test_what_may_have_kept_a_run_from_being_good_stands_at_the_end() -> None:
    data = {"train": {"kept_rows": 150}, "eval": {"kept_rows": 100}}
    few = verdict(run(0.5, data=data, last={"rewards/accuracies": 1.0}))  # 1.0 is more than 0.1 above 0.596
    assert few.reasons[1].startswith("It was trained on 150 rows") and "learned by heart" in few.reasons[2]
    part = verdict(run(0.5, log_history=[{"step": 5, "epoch": 0.1}]))
    assert "It has seen 10% of its 2,000 rows" in part.reasons[1]
    assert len(verdict(run(0.9, data=data, last={"rewards/accuracies": 1.0})).reasons) == 1
