"""Offline suites that say whether an adapter is better than its base: pairs, checkable instructions, what was lost."""

from .options import EvalOptions

__all__ = ["EvalOptions"]
