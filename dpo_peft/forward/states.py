"""Layers that carry a state along the text (delta rules, Mamba 2, short convolutions), over a packed batch.

A prompt's last state is where each of its completions begins, and its last inputs are what their convolution reads
before their first token. transformers' mixers call one function for the convolution and one for the scan, both named
in their module. `read_layouts` gives the mixers of one model a `forward` whose names mean the functions below; model
files and other models stay as they are. A plain call, one without `prefix_layout`, is the mixer's own.

The scan runs twice: over all prompts, then over all completions, each padded to the longest of those that are about as
long. Prompts are padded in front, where a state of zeros stays so whatever the decay; completions behind, where
nothing reads the state any more.

Shape suffixes: T packed tokens, S segments, K width of the convolution, D channels, P padded segments, L their length.
"""

import inspect
from collections.abc import Callable
from functools import cache, partial
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .attention import IMPLEMENTATION, AttentionPlan
from .layout import PackedBatch

_CONVOLUTION = "causal_conv1d_fn"
# A scan -> its keywords for the state that it begins with, and for whether it gives the last one. Its arguments of
# three and more dimensions have tokens in the second one; where all these are zero, a state of zeros stays so.
_SCANS = {
    "torch_chunk_gated_delta_rule": ("initial_state", "output_final_state"),
    "chunk_kimi_delta_attention": ("initial_state", "output_final_state"),
    "mamba2_chunk_scan": ("initial_states", "return_final_states"),
}
# Scans that take no state, so their mixers are left alone.
_STATELESS = {"mamba_inner_fn", "mamba_selective_scan"}
# Convolution, scan and projection in one kernel that knows no states; a mixer takes its other path when it gives None.
_SHORTCUT = "mamba2_split_conv1d_scan_combined"


def read_layouts(causal_lm: PreTrainedModel) -> int:
    """Lets a model's attention and its mixers read packed batches; plain calls stay what they are.

    Returns:
        How many mixers it has.
    """
    causal_lm.set_attn_implementation(IMPLEMENTATION)
    found = 0
    for module in causal_lm.modules():
        if shared := _shared_class(_own_class(module)):
            module.__class__, found = shared, found + 1
    return found


def read_rows(causal_lm: PreTrainedModel, attention: str | dict[str, Any]) -> None:
    """Undoes `read_layouts`: the model has its own classes, and the implementation of attention that it had."""
    causal_lm.set_attn_implementation(attention)
    for module in causal_lm.modules():
        if type(module) is not (own := _own_class(module)):
            module.__class__ = own


def mixer_difference(causal_lm: PreTrainedModel, batch: PackedBatch) -> float:
    """Returns by how much a mixer's outputs and gradients on a packed batch differ from those on rows, each alone.

    The largest of both, relative to their size; 0 for a model without mixers. Log-probs in half precision hide what a
    lost state does in one layer, and say nothing about a kernel's gradients.
    """
    mixer = next((module for module in causal_lm.modules() if _own_class(module) is not type(module)), None)
    if mixer is None:
        return 0.0
    assert batch.kv_index is not None and batch.cu_seq_k is not None and batch.segments is not None
    weight = causal_lm.get_input_embeddings().weight
    shape = (1, batch.input_ids.shape[1], causal_lm.config.get_text_config().hidden_size)
    generator = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(shape, generator=generator).to(weight) for _ in range(2))
    with torch.enable_grad():
        x.requires_grad_()
        packed = mixer(hidden_states=x, prefix_layout=AttentionPlan(batch, "dense"))
        alone = [mixer(hidden_states=x[:, row]) for row in batch.kv_index.split(batch.cu_seq_k.diff().tolist())]
        own = torch.cat([out[:, -length:] for out, (length, _) in zip(alone, batch.segments, strict=True)], 1)
        pairs = [(packed, own), [torch.autograd.grad((out * upstream).sum(), x)[0] for out in (packed, own)]]
    return max(float((a - b).detach().float().norm() / b.detach().float().norm()) for a, b in pairs)


def _own_class(module: nn.Module) -> Any:
    return getattr(type(module), "without_states", type(module))


@cache
def _shared_class(own: Any) -> Any:
    """Returns a mixer's class with a `forward` for packed batches beside its own; None if it isn't a mixer's."""
    forward = inspect.unwrap(own.forward)
    called = forward.__code__.co_names if isinstance(forward, FunctionType) else ()
    names: dict[str, Any] = {
        name: partial(_scan, forward.__globals__[name], *_SCANS[name]) for name in _SCANS if name in called
    }
    if _CONVOLUTION in called:
        names[_CONVOLUTION] = partial(_convolve, forward.__globals__[_CONVOLUTION])
    if not names or _STATELESS.intersection(called):
        return None
    names[_SHORTCUT] = lambda *args, **kwargs: None
    packed = FunctionType(
        forward.__code__, {**forward.__globals__, **names}, "forward", forward.__defaults__, forward.__closure__
    )
    packed.__kwdefaults__ = forward.__kwdefaults__

    def either(self: nn.Module, *args: Any, prefix_layout: AttentionPlan | None = None, **kwargs: Any) -> Any:
        if prefix_layout is None:
            return own.forward(self, *args, **kwargs)
        if prefix_layout.mixed is not None:
            prefix_layout.mixed.append(type(self).__name__)
        return packed(self, *args, prefix_layout=prefix_layout, **kwargs)

    return type(own.__name__, (own,), {"forward": either, "without_states": own, "__module__": own.__module__})


# ---- The convolution ------------------------------------------------------------------------------------------------


class _Histories(NamedTuple):
    """The packed row with K - 1 inputs before each segment, the last ones of its prompt."""

    length: int  # of that row
    tokens: Tensor  # what stands there, as places in the packed row ...
    places: Tensor  # ... and where; elsewhere are zeros
    own: Tensor  # (T,) where each token stands

    @classmethod
    def of(cls, batch: PackedBatch, width: int) -> "_Histories":
        assert batch.segments is not None
        bounds = np.cumsum([0, *(length for length, _ in batch.segments)])
        before: list[np.ndarray] = []  # tokens before each segment
        tokens, places, own, start = [], [], [], 0
        for i, (length, context) in enumerate(batch.segments):
            read = np.arange(bounds[context], bounds[context + 1]) if context != i else np.arange(0)
            read = np.concatenate([before[context], read])[-width:] if context != i else read
            before.append(read)
            tokens += [read[len(read) - min(width, len(read)) :], np.arange(bounds[i], bounds[i + 1])]
            places.append(np.arange(start + width - len(tokens[-2]), start + width + length))
            own.append(np.arange(start + width, start + width + length))
            start += width + length
        device = batch.input_ids.device
        parts = (torch.from_numpy(np.concatenate(x)).to(device, non_blocking=True) for x in (tokens, places, own))
        return cls(start, *parts)


def _convolve(
    own: Callable[..., Tensor],
    x_1DT: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    prefix_layout: AttentionPlan,
    **kwargs: Any,
) -> Tensor:
    """Convolves every segment after the last inputs of its prompt; (1, D, T)."""
    width = weight.shape[-1] - 1
    row = prefix_layout.once(("histories", width), lambda: _Histories.of(prefix_layout.batch, width))
    filled = x_1DT.new_zeros(1, x_1DT.shape[1], row.length)
    filled = filled.index_copy(2, row.places, x_1DT.index_select(2, row.tokens))
    return own(filled, weight, bias, activation=activation).index_select(2, row.own)


# ---- The scan -------------------------------------------------------------------------------------------------------


class _Padded(NamedTuple):
    """Segments of about one length, each padded to the longest."""

    segments: int  # P
    length: int  # L
    tokens: Tensor  # their tokens, as places in the packed row ...
    places: Tensor  # ... and in the padded rows, one after the other
    prompts: Tensor | None  # (P,) where the state of each one's prompt stands; None for those that begin with none


class _Rounds(NamedTuple):
    """How a batch is scanned."""

    prompts: list[_Padded]  # and completions of an empty prompt
    completions: list[_Padded]
    order: Tensor  # (T,) where each token stands in the outputs, one after the other

    @classmethod
    def of(cls, batch: PackedBatch) -> "_Rounds":
        assert batch.segments is not None
        lengths, contexts = np.array(batch.segments).T
        starts = np.cumsum(lengths) - lengths
        first = contexts == np.arange(len(contexts))
        assert first[contexts].all(), "a segment's prompt begins with no state"
        device = batch.input_ids.device
        rounds: tuple[list[_Padded], list[_Padded]] = [], []
        stands, tokens = np.zeros(len(contexts), dtype=np.int64), []  # of a prompt among the states
        for begins, found in ((True, rounds[0]), (False, rounds[1])):
            chosen = np.flatnonzero(first == begins)
            # Rows of one group are longer than half of its longest: less than half of the places are padding.
            groups = np.frexp(lengths[chosen].max() / lengths[chosen])[1] if len(chosen) else chosen
            for group in np.unique(groups):
                rows = chosen[groups == group]
                stands[rows] = np.arange(len(rows)) + sum(of.segments for of in found)
                size, count = lengths[rows], int(lengths[rows].max())
                within = np.concatenate([np.arange(n) for n in size])
                tokens.append(np.repeat(starts[rows], size) + within)
                shift = np.arange(len(rows)) * count + (count - size if begins else 0)
                places = np.repeat(shift, size) + within
                index = [tokens[-1], places, *([] if begins else [stands[contexts[rows]]])]
                moved = [torch.from_numpy(x).to(device, non_blocking=True) for x in index]
                found.append(_Padded(len(rows), count, *moved, *([None] if begins else [])))
        order = torch.from_numpy(np.argsort(np.concatenate(tokens))).to(device, non_blocking=True)
        return cls(*rounds, order)


def _scan(
    own: Callable[..., Any],
    begins: str,
    ends: str,
    *args: Any,
    prefix_layout: AttentionPlan,
    **kwargs: Any,
) -> Any:
    """Scans every segment from the last state of its prompt; (1, T, heads, size), and None for a state."""
    rounds = prefix_layout.once("rounds", lambda: _Rounds.of(prefix_layout.batch))
    length = len(rounds.order)
    wants_state = kwargs.pop(ends, False)
    kwargs.pop(begins, None)
    outs, states = [], []

    def run(part: _Padded, **state: Any) -> Any:
        def pad(x: Any) -> Any:
            if not isinstance(x, Tensor) or x.ndim < 3 or x.shape[:2] != (1, length):
                return x
            rows = x.new_zeros(part.segments * part.length, *x.shape[2:])
            rows = rows.index_copy(0, part.places, x[0].index_select(0, part.tokens))
            return rows.view(part.segments, part.length, *x.shape[2:])

        found = own(*map(pad, args), **{name: pad(x) for name, x in kwargs.items()}, **state)
        out, last = found if isinstance(found, tuple) else (found, None)
        outs.append(out.flatten(0, 1).index_select(0, part.places))
        return last

    for part in rounds.prompts:
        states.append(run(part, **{ends: True}))
    for part in rounds.completions:
        assert part.prompts is not None
        run(part, **{begins: torch.cat(states).index_select(0, part.prompts), ends: False})
    out = torch.cat(outs).index_select(0, rounds.order)[None]
    return (out, None) if wants_state or ends == "output_final_state" else out
