"""Rows of random ids for each kind of data, of unequal lengths, and the options that single losses need."""

import random
from typing import Any

from datasets import Dataset

from dpo_peft.losses import REGISTRY

# Options without which a loss can't run or would be another one, and a beta that keeps its gradient near 1.
NEEDED: dict[str, dict[str, Any]] = {
    "exo_pair": {"label_smoothing": 0.05},
    "robust": {"label_smoothing": 0.1},
    "aot": {"label_smoothing": 0.1},
    "trajectory": {"discount_gamma": 0.7},
    "kto": {"desirable_weight": 1.5},
    "ipo": {"ipo_length_normalize": True, "beta": 1.0},
    "sppo_hard": {"beta": 1.0},
}


def rows_for(loss: str, number: int, seed: int = 0, vocab: int = 270) -> Dataset:
    """Rows that `loss` learns from: pairs, lists with 1 to 7 rejected, single answers, or trajectories."""
    draw = random.Random(seed)

    def ids(shortest: int, longest: int) -> list[int]:
        return [draw.randrange(5, vocab) for _ in range(draw.randint(shortest, longest))]

    def row(index: int) -> dict[str, Any]:
        data, prompt = REGISTRY[loss].data, {"prompt_ids": ids(2, 12)}
        if data == "lists" and loss == "multi_negative":
            return {**prompt, "chosen_ids": ids(2, 9), "rejected_ids": [ids(2, 9) for _ in range(1 + index % 7)]}
        if data == "lists":
            answers = [ids(2, 9) for _ in range(2 + index % 7)]
            return {**prompt, "completions_ids": answers, "scores": [draw.random() for _ in answers]}
        if data == "singles":
            return {**prompt, "completion_ids": ids(2, 9), "label": draw.random() < 0.6}
        return {**prompt, "chosen_ids": ids(2, 9), "rejected_ids": ids(2, 9)}

    return Dataset.from_list([row(index) for index in range(number)])
