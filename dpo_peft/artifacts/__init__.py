"""The files that a run leaves: model card, recipe, figures, curves."""
