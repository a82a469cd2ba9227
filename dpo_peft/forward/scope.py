"""Which tokens an adapter acts on: all, or those from its invocation on (aLoRA: Greenewald et al. 2025).

An answer-only adapter leaves the prompt to the base, up to the invocation: the tokens that open a completion, such as
those of an assistant's turn in a chat template. PEFT holds them as `LoraConfig.alora_invocation_tokens`, looks for
their last occurrence in a row, and switches the adapter on from its first token to the row's end.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from peft import PeftConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import ALoraLinearVariant
from torch import nn

from .layout import PackedBatch


def invocation_tokens(configs: Mapping[str, PeftConfig], adapter: str) -> tuple[int, ...]:
    """Returns the token ids that an adapter acts from; empty if it acts on every token."""
    return tuple(getattr(configs[adapter], "alora_invocation_tokens", None) or ())


def invocation_start(ids: Sequence[int], invocation: Sequence[int]) -> int | None:
    """Returns the place in `ids` where the last occurrence of `invocation` begins; None if there is none."""
    where = np.asarray(ids)
    starts = np.flatnonzero(where[: len(where) - len(invocation) + 1] == invocation[0])
    return next((int(i) for i in starts[::-1] if where[i : i + len(invocation)].tolist() == list(invocation)), None)


def is_answer_only(module: nn.Module) -> bool:
    """Returns whether a module is a LoRA layer whose active adapter acts from its invocation on."""
    if not isinstance(module, LoraLayer):
        return False
    return any(isinstance(module.lora_variant.get(name), ALoraLinearVariant) for name in module.active_adapters)


@contextmanager
def acting(model: nn.Module, offsets: Sequence[int] | None) -> Iterator[None]:
    """Inside, answer-only adapters act on the last `offsets` positions of each row, as `PeftModel.forward` makes them
    do where it finds their invocation; None: on none. A backward pass that computes layers again belongs inside."""
    layers = [] if offsets is None else [module for module in model.modules() if is_answer_only(module)]
    hooks = [
        one.register_forward_pre_hook(partial(_with, {"alora_offsets": offsets}), with_kwargs=True) for one in layers
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _with(more: dict[str, Any], module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    return args, kwargs | more


def split(batch: PackedBatch) -> tuple[int, PackedBatch | None, PackedBatch]:
    """Cuts a packed batch of an answer-only adapter in two, for attention alone: all else is of the whole batch.

    Returns:
        The tokens of the prompts; the prompts, None where nothing stands before the invocations; and the completions,
        to whose queries (`query_index`) the prompts' keys and values are given before their own.
    """
    assert batch.alora_offsets is not None and batch.segments is not None
    assert batch.segment is not None and batch.context is not None and batch.sample_index is not None
    assert batch.cu_seq_q is not None and batch.cu_seq_k is not None and batch.kv_index is not None
    given, lengths = batch.input_ids.numel() - batch.alora_offsets[0], [length for length, _ in batch.segments]
    prompts = int(np.searchsorted(np.cumsum(lengths), given, side="right")) if given else 0
    completions = replace(
        batch,
        kv_index=batch.kv_index[given:],
        cu_seq_q=batch.cu_seq_q[prompts:] - given,
        cu_seq_k=batch.cu_seq_k[prompts:] - given,
        max_q=max(lengths[prompts:]),
    )
    if not prompts:
        return given, None, completions
    longest, itself = max(lengths[:prompts]), batch.kv_index[:given]
    index_EB = batch.sample_index[:, :longest]
    alone = replace(
        batch,
        input_ids=batch.input_ids[:, :given],
        position_ids=batch.position_ids[:, :given],
        segment=batch.segment[:given],
        context=batch.context[:given],
        sample_index=torch.where(index_EB < given, index_EB, -1),
        query_index=None,
        kv_index=itself,
        kv_copies=itself[:, None],
        segments=batch.segments[:prompts],
        cu_seq_q=batch.cu_seq_q[: prompts + 1],
        cu_seq_k=batch.cu_seq_k[: prompts + 1],
        max_q=longest,
        max_k=longest,
    )
    return given, alone, completions
