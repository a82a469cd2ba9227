"""From prepared rows to a batch: the collator.

Rows come from `prepare_dataset`: `prompt_ids`, `completion_ids` (K lists) and `row`.
"""

from collections.abc import Sequence
from typing import Any

from ..forward.layout import Sample, pack, pad_rows


class PreferenceCollator:
    """Lays prepared rows out for one forward pass, as a dict of the fields of `PackedBatch`.

    Args:
        shared: each prompt once in one packed row; otherwise one padded row per completion.
        pad_token_id: fills padded rows (masked, so its value has no effect).
    """

    def __init__(self, shared: bool = True, pad_token_id: int = 0):
        self.shared = shared
        self.pad_token_id = pad_token_id

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Prepared rows to `PackedBatch` fields, on the CPU."""
        samples = [Sample(row["prompt_ids"], row["completion_ids"], row.get("row", -1)) for row in rows]
        return (pack(samples) if self.shared else pad_rows(samples, self.pad_token_id)).as_dict()
