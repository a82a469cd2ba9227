"""Rotary frequencies that a model chooses by the longest row of a batch, fixed for all rows alike.

transformers does so for two kinds of scaling. `longrope` (Ding et al. 2024, arXiv:2402.13753; Phi-3 to Phi-4-mini with
128k) has short factors, and long ones if the batch reaches beyond `original_max_position_embeddings`. `dynamic` (NTK)
stretches by the batch's length beyond `max_position_embeddings`. So a row's log-probs would depend on its neighbors.
Here the lengths that may occur decide once, as vLLM decides by `max_model_len`: a model with its frequencies fixed
computes the same for a row in every batch, packed or padded, and in generation from the first token to the last.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..errors import OptionError
from .modules import unwrap


class _Scaling(NamedTuple):
    limit: int  # rows of up to so many tokens leave the frequencies as they are
    beyond: int  # the row length whose frequencies are taken for longer ones
    grows: bool = False  # still longer rows get others again


def _scalings(config: PreTrainedConfig) -> list[_Scaling]:
    """Returns the scalings of a text config that read the length of a batch."""
    given = getattr(config, "rope_parameters", None) or {}
    kinds = [part for part in given.values() if isinstance(part, dict)] or [given]  # some have one per kind of layer
    found = []
    for kind in kinds:
        name = kind.get("rope_type") or "default"
        if name == "longrope":
            limit = kind["original_max_position_embeddings"]
            found.append(_Scaling(limit, limit + 1))
        elif "dynamic" in name and not kind.get("alpha"):  # with alpha it is fixed
            # vLLM always takes those of the stretched context.
            limit = config.max_position_embeddings
            found.append(_Scaling(limit, int(limit * kind["factor"]), grows=True))
    return found


def rope_length(config: PreTrainedConfig, longest: float) -> int | None:
    """Returns the row length whose rotary frequencies rows of up to `longest` tokens get; None if the model's do not
    depend on it. Lengths that get the same frequencies give the same number.

    Raises:
        OptionError: there is no longest.
    """
    scalings = _scalings(config.get_text_config())
    if scalings and longest == math.inf:
        raise OptionError(
            "The model chooses its rotary frequencies by the longest row, which a stream doesn't tell: set max_length."
        )
    lengths = (max(of.beyond, int(longest)) if of.grows else of.beyond for of in scalings if longest > of.limit)
    return max([*lengths, *(of.limit for of in scalings)], default=None)


def fixed_rope_length(model: nn.Module) -> int | None:
    """Returns for which row length a model's rotary frequencies are fixed; None if they aren't."""
    return vars(unwrap(model)).get("rope_length")


def beyond_reach(model: nn.Module) -> int | None:
    """Returns a length at which a model's config says that frequencies change, if rows may have it and no part of the
    model was found to fix; the probe then looks whether they do."""
    causal_lm, length = unwrap(model), fixed_rope_length(model)
    limits = [of.limit for of in _scalings(causal_lm.config.get_text_config()) if of.limit < (length or 0)]
    return min(limits) + 1 if limits and not any(map(_moving, causal_lm.modules())) else None


def fix_rope(model: nn.Module, length: int | None) -> None:
    """Fixes the rotary frequencies at those of a row of `length` tokens; None lets each batch's longest row decide.

    Raises:
        OptionError: the model's code chooses them in a way of its own, and rows are on both sides of its limit.
    """
    causal_lm: Any = unwrap(model)
    if fixed_rope_length(model) == length:
        return
    causal_lm.rope_length = length
    for module in causal_lm.modules():
        moving = _moving(module)
        if moving:
            module.own_rope_type = module.rope_type = own = vars(module).get("own_rope_type", module.rope_type)
            for layer in moving:
                # The module takes what it would take in a batch of that length, and then nothing else any more.
                for end in (1, length or 1):
                    _angles(module, layer, [end - 1])
        if moving and length is not None:
            module.rope_type = dict.fromkeys(own, "default") if isinstance(own, dict) else "default"
            near, far = (_angles(module, moving[0], [0, 1, 2, end])[..., :3, :] for end in (3, length - 1))
            if not torch.equal(near, far):
                refuse_crossing(causal_lm, min(of.limit for of in _scalings(module.config)))


def refuse_crossing(causal_lm: nn.Module, limit: int, moved: str = "") -> NoReturn:
    """Raises the OptionError for rows on both sides of a limit that can't be fixed; `moved` says by how much."""
    raise OptionError(
        f"{type(causal_lm).__name__} chooses its rotary frequencies by the longest row of a batch, in a way that is "
        f"not known here, so a row's log-probs would depend on its neighbors{moved}. Set max_length={limit} or less: "
        "then all rows get the same."
    )


def _moving(module: nn.Module) -> list[str | None]:
    """Returns for which kinds of layers (None: for all) a module chooses frequencies by the batch's longest row."""
    own = vars(module).get("own_rope_type", vars(module).get("rope_type"))
    kinds = own if isinstance(own, dict) else {None: own}
    named = {layer: kind for layer, kind in kinds.items() if isinstance(kind, str)}
    return [layer for layer, kind in named.items() if kind == "longrope" or "dynamic" in kind]


def _angles(module: nn.Module, layer: str | None, positions: list[int]) -> Tensor:
    """Returns the cosines (1, positions, D) of a rotary module."""
    device = next(module.buffers()).device
    layer_type = {} if layer is None else {"layer_type": layer}
    found = module(torch.zeros(1, device=device), torch.tensor([positions], device=device), **layer_type)
    return found[0] if isinstance(found, tuple) else found


@contextmanager
def fixed_rope(model: nn.Module, length: int | None) -> Iterator[None]:
    """Inside, frequencies are fixed as by `fix_rope`; outside, they are what they were."""
    before = fixed_rope_length(model)
    fix_rope(model, length)
    try:
        yield
    finally:
        fix_rope(model, before)
