"""The objectives: pure functions of small tensors, and a registry of what each needs.

A loss knows nothing of models, configs or batches, and returns one number per item, unreduced. The trainer reads the
registry to learn which log-probs to compute and which options an objective takes. `python -m dpo_peft.losses` prints
the entries of docs/objectives.md.
"""

from importlib import import_module

from ..imports import load_function
from .pairwise import PairLoss, dpo_loss
from .registry import REGISTRY, Objective, find_objective, objective
from .scores import F_DIVERGENCES, discounts, length_desensitized_weights, shape_scores, wpo_weights
from .unpaired import reference_point

__all__ = [
    "F_DIVERGENCES",
    "REGISTRY",
    "Objective",
    "PairLoss",
    "discounts",
    "dpo_loss",
    "find_objective",
    "length_desensitized_weights",
    "load_function",
    "objective",
    "reference_point",
    "shape_scores",
    "wpo_weights",
]

for _family in ("pairwise", "anchored", "reference_free", "listwise", "unpaired"):  # they fill the registry
    import_module(f".{_family}", __name__)
