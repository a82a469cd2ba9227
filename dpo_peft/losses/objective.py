"""What the registry says of a loss: what it needs and reads, and where it comes from."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Objective:
    """One entry of the registry. Every field is written out in every entry."""

    loss: Callable[..., Tensor]  # returns one loss per item, unreduced
    data: str  # "pairs", "trajectories", "lists" or "singles"
    inputs: tuple[str, ...]  # names of the positional parameters of `loss`, in order
    options: tuple[str, ...]  # config fields: its keyword options, and those that shape its scores beforehand
    needs_reference: bool
    batch_coupled: bool  # an item's loss depends on the other items of the optimizer batch
    soft_labels: bool  # p * loss(w, l) + (1 - p) * loss(l, w) is meaningful
    token_extras: tuple[str, ...]  # what the forward must return per token beside log-probs: "log_sum_sq" or nothing
    reward: str  # implicit reward to report, times beta: "log_ratio", "logp" or "mean_logp"
    default_beta: float | None  # None: the loss has no beta
    why_beta: str
    formula: str  # plain text; r is beta times the score, s the score, h the difference of the rewards
    paper: str
    equation: str  # in the paper; the note's number follows in brackets
    use_when: str

    @property
    def source(self) -> str:
        """Paper and equation in one line."""
        return f"{self.paper}, {'eq. ' if self.equation[0].isdigit() else ''}{self.equation}"
