"""What the routers of a mixture of experts did with a batch: the auxiliary loss that spreads tokens over the experts.

The loss is Switch Transformer's (Fedus et al. 2022, eq. 4 to 6) as transformers computes it, over all layers at once:
with X experts, X * sum over them of (how often one is chosen, per token) * (its mean probability). Which experts are
chosen has no gradient, so over any tokens the loss is linear in the probabilities of each sample.

Shape suffixes: T flat positions, S segments, E samples, C completions, X experts, K experts chosen for a token.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .layout import PackedBatch


class Routing(NamedTuple):
    """Sums over the layers and over the tokens of each sample; float64. A token counts once for each of the sample's
    own completions that read it, as in one row per completion."""

    probs_EX: Tensor  # probability of each expert, differentiable
    counts_EX: Tensor  # how often it was chosen
    tokens_E: Tensor


def read_routing(logits: Sequence[Tensor], batch: PackedBatch, chosen: int) -> Routing:
    """Sums up what routers did.

    Args:
        logits: (T, X) of each layer that has a router.
        batch: what went through the model.
        chosen: experts for a token.
    """
    sample_T, uses_T = _uses(batch)
    experts = logits[0].shape[-1]
    probs_EX = uses_T.new_zeros(batch.num_samples, experts)
    counts_EX = probs_EX
    for logits_TX in logits:
        probs_TX = logits_TX.softmax(-1, dtype=torch.promote_types(logits_TX.dtype, torch.float32))
        hits_TX = uses_T.new_zeros(probs_TX.shape).scatter_(1, probs_TX.topk(chosen).indices, 1.0)
        probs_EX = probs_EX.index_add(0, sample_T, probs_TX.double() * uses_T[:, None])
        counts_EX = counts_EX.index_add(0, sample_T, hits_TX * uses_T[:, None])
    tokens_E = uses_T.new_zeros(batch.num_samples).index_add(0, sample_T, uses_T)
    return Routing(probs_EX, counts_EX, len(logits) * tokens_E)


def slopes(
    routings: Sequence[Routing], weights: Sequence[Tensor], groups: Sequence[Sequence[int]] | None = None
) -> list[Tensor]:
    """Returns the gradient of the weighted sum of some groups' losses with respect to each part's `probs_EX`.

    The loss itself is the sum over the parts of gradient times `probs_EX`.

    Args:
        routings: of the parts.
        weights: for each part (E,) what each sample adds to the weight of its group's loss.
        groups: for each part the group of each sample, from 0; None: there is one.
    """
    counts_EX = torch.cat([routing.counts_EX for routing in routings])
    tokens_E = torch.cat([routing.tokens_E for routing in routings])
    numbers = [number for part in groups or () for number in part]
    group_E = torch.tensor(numbers, device=tokens_E.device) if numbers else torch.zeros_like(tokens_E).long()

    def of_group(x_E: Tensor) -> Tensor:
        return x_E.new_zeros(max(numbers, default=0) + 1, *x_E.shape[1:]).index_add(0, group_E, x_E)

    scale_G = counts_EX.shape[1] * of_group(torch.cat(list(weights))) / of_group(tokens_E) ** 2
    slopes_EX = (scale_G[:, None] * of_group(counts_EX))[group_E]
    return list(slopes_EX.split([len(routing.tokens_E) for routing in routings]))


def _uses(batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """Returns (T,) the sample of each position, and (T,) how many of its own completions read it, 0 for padding."""
    own_C = torch.ones_like(batch.lengths) if batch.mismatched is None else ~batch.mismatched
    own_C = own_C.double()
    if batch.attention_mask is not None:
        length = batch.input_ids.shape[1]
        return batch.sample_of.repeat_interleave(length), (batch.attention_mask * own_C[:, None]).flatten()
    assert batch.sample_index is not None and batch.segment is not None
    assert batch.kv_copies is not None and batch.cu_seq_q is not None
    filled_EB, sample_T = batch.sample_index >= 0, torch.empty_like(batch.segment)
    sample_T[batch.sample_index[filled_EB]] = filled_EB.nonzero()[:, 0]
    own_E = own_C.new_zeros(batch.num_samples).index_add(0, batch.sample_of, own_C)
    # A prompt is among the keys of its completions too; the other segments are the completions in turn.
    prompt_T = (batch.kv_copies[:, 1:] >= 0).any(1)
    completion_S = (~prompt_T[batch.cu_seq_q[:-1]]).cumsum(0) - 1
    return sample_T, torch.where(prompt_T, own_E[sample_T], own_C[completion_S[batch.segment]])
