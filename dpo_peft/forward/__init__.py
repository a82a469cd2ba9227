"""From token ids to log-probs: how a batch is laid out, how attention reads that layout, and the one forward pass.

Nothing here knows dataset formats, losses or configs.
"""

from .content import content_keys
from .layout import PackedBatch, Sample, halves, pack, pad_rows
from .probe import ForwardPlan, plan_forward, recheck
from .score import (
    Decoder,
    Scores,
    completion_logps,
    has_routers,
    logps_with_reference,
    sequence_logps,
    sum_by_completion,
)

__all__ = [
    "Decoder",
    "ForwardPlan",
    "PackedBatch",
    "Sample",
    "Scores",
    "completion_logps",
    "content_keys",
    "halves",
    "has_routers",
    "logps_with_reference",
    "pack",
    "pad_rows",
    "plan_forward",
    "recheck",
    "sequence_logps",
    "sum_by_completion",
]
