"""The objectives: pure functions of small tensors, and one literal registry of what each needs.

A loss knows nothing of models, configs or batches. The trainer reads the registry to learn which log-probs to compute
and which options an objective takes.
"""

from collections.abc import Callable
from dataclasses import dataclass

from .pairwise import PairLoss, dpo_loss

__all__ = ["REGISTRY", "Objective", "PairLoss", "dpo_loss"]


@dataclass(frozen=True)
class Objective:
    """One entry of the registry: a loss and what it needs."""

    loss: Callable[..., PairLoss]
    data: str  # "pairs": one chosen and one rejected completion per prompt
    needs_reference: bool
    options: tuple[str, ...]  # config fields that the loss reads
    default_beta: float
    paper: str
    equation: str  # in the paper; the note's number follows in brackets


REGISTRY: dict[str, Objective] = {
    "sigmoid": Objective(
        loss=dpo_loss,
        data="pairs",
        needs_reference=True,
        options=("beta", "reward_clip"),
        default_beta=0.1,
        paper="Rafailov et al. 2023, Direct Preference Optimization, arXiv:2305.18290",
        equation="7 (note eq. 9)",
    ),
}
