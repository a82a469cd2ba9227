"""The objectives: pure functions of small tensors, and one literal registry of what each needs.

A loss knows nothing of models, configs or batches, and returns one number per item, unreduced. The trainer reads the
registry to learn which log-probs to compute and which options an objective takes.
"""

from .objective import Objective
from .pairwise import PairLoss, dpo_loss
from .registry_others import OTHERS
from .registry_reference import WITH_REFERENCE
from .scores import F_DIVERGENCES, discounts, length_desensitized_weights, shape_scores, wpo_weights
from .unpaired import reference_point

__all__ = [
    "F_DIVERGENCES",
    "REGISTRY",
    "Objective",
    "PairLoss",
    "discounts",
    "dpo_loss",
    "length_desensitized_weights",
    "reference_point",
    "shape_scores",
    "wpo_weights",
]

REGISTRY: dict[str, Objective] = {**WITH_REFERENCE, **OTHERS}
