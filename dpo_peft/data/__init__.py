"""Preference data: any supported row format in, token ids of one prompt with K completions out."""

from .converters import from_alpaca, from_hh, from_oasst_tree, from_pandalm, from_sharegpt, from_tulu, pandalm_decided
from .encode import preprocess_dpo_sample
from .fingerprint import rows_digest
from .formats import DISCOUNT_UNITS
from .prepare import prepare_dataset
from .summary import REASONS, DataReport, DataSummary
from .truncate import TRUNCATION_MODES

__all__ = [
    "DISCOUNT_UNITS",
    "REASONS",
    "TRUNCATION_MODES",
    "DataReport",
    "DataSummary",
    "from_alpaca",
    "from_hh",
    "from_oasst_tree",
    "from_pandalm",
    "from_sharegpt",
    "from_tulu",
    "pandalm_decided",
    "prepare_dataset",
    "preprocess_dpo_sample",
    "rows_digest",
]
