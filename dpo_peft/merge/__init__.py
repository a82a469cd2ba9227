"""An adapter and its base as one plain model, kept only if it proves to be the adapter's model."""

from .merging import merge_adapter

__all__ = ["merge_adapter"]
