"""From the log-probs of a batch to its loss: a mix of the registry's losses, over one kind of data."""

from .kinds import KINDS, Kind, Scored, Totals
from .mix import Coupled, LossOutput, TrainingObjective

__all__ = ["KINDS", "Coupled", "Kind", "LossOutput", "Scored", "Totals", "TrainingObjective"]
