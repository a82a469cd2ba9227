"""The trained adapter as a reward model, and how well rewards agree with judgments."""

from .implicit import ImplicitReward
from .judgments import score_dataset

__all__ = ["ImplicitReward", "score_dataset"]
