"""The files that a run leaves: model card, recipe, figures, curves."""

from .run_files import SaveResults

__all__ = ["SaveResults"]
