"""Preference data: any supported row format in, token ids of one prompt with K completions out.

Names are loaded on first use: a help that lists the formats doesn't wait for transformers.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "DISCOUNT_UNITS": "formats",
    "REASONS": "summary",
    "TRUNCATION_MODES": "truncate",
    "DataReport": "summary",
    "DataSummary": "summary",
    "answer_only": "invocation",
    "convert_dataset": "published",
    "from_alpaca": "converters",
    "from_hh": "converters",
    "from_oasst_tree": "converters",
    "from_pandalm": "converters",
    "from_sharegpt": "converters",
    "from_tulu": "converters",
    "pandalm_decided": "converters",
    "prepare_dataset": "prepare",
    "preprocess_dpo_sample": "encode",
    "rows_digest": "fingerprint",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
