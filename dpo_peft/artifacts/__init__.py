"""The files that a run leaves: model card, recipe, figures, curves. Names are loaded on first use."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "SaveResults":
        from .run_files import SaveResults

        return SaveResults
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
