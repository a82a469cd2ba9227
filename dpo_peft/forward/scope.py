"""Which tokens an adapter acts on: all, or those from its invocation on (aLoRA: Greenewald et al. 2025).

An answer-only adapter leaves the prompt to the base, up to the invocation: the tokens that open a completion, such as
those of an assistant's turn in a chat template. PEFT holds them as `LoraConfig.alora_invocation_tokens`, looks for
their last occurrence in a row, and switches the adapter on from its first token to the row's end.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from peft import PeftConfig


def invocation_tokens(configs: Mapping[str, PeftConfig], adapter: str) -> tuple[int, ...]:
    """Returns the token ids that an adapter acts from; empty if it acts on every token."""
    return tuple(getattr(configs[adapter], "alora_invocation_tokens", None) or ())


def invocation_start(ids: Sequence[int], invocation: Sequence[int]) -> int | None:
    """Returns the place in `ids` where the last occurrence of `invocation` begins; None if there is none."""
    where = np.asarray(ids)
    starts = np.flatnonzero(where[: len(where) - len(invocation) + 1] == invocation[0])
    return next((int(i) for i in starts[::-1] if where[i : i + len(invocation)].tolist() == list(invocation)), None)
