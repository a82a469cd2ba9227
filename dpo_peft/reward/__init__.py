"""The trained adapter as a reward model, and how well rewards agree with judgments."""

from .implicit import ImplicitReward

__all__ = ["ImplicitReward"]
