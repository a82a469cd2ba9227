"""Preference data: any supported row format in, token ids of one prompt with K completions out."""

from .convert import from_alpaca, from_hh, from_oasst_tree, from_pandalm, from_sharegpt, from_tulu, pandalm_decided
from .fingerprint import rows_digest
from .prepare import prepare_dataset
from .report import REASONS, DataReport
from .sample import preprocess_dpo_sample
from .schema import DISCOUNT_UNITS
from .truncate import TRUNCATION_MODES

__all__ = [
    "DISCOUNT_UNITS",
    "REASONS",
    "TRUNCATION_MODES",
    "DataReport",
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
