"""Weights in FP8 or FP4, read as the 16-bit ones that they stand for: one by one, when they are loaded.

The loader of transformers takes a dict of tensors that it reads as it needs them. Here each of them is made of its
codes and scales at that moment, on the device where it goes, so that never more than one is there in 16 bits, and what
comes after (joining experts, 4 bits) is the same as for a checkpoint in 16 bits.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from ..errors import OptionError

# The 16 values of 4 bits (OCP Microscaling formats, E2M1): sign, two bits of exponent, one of mantissa.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# What a weight's scales are called, with its own name without "weight" before it; all are multiplied with.
_SCALES = ("weight_scale_inv", "weight_scale", "scale", "qscale_weight")
# Of activations and of the cache: they are not quantized here.
_UNUSED = re.compile(r".*\.(activation_scale|(input|[kv])_scale|input_scale_ub|qscale_act)")


class StoredWeight:
    """Stands for a 16-bit weight in the dict that transformers loads from, as a slice of a file does: `make` makes it
    of slices of the file, on the device, and a dtype."""

    def __init__(self, make: Callable[..., Tensor], *parts: Any):
        self.make, self.parts = make, parts

    def __getitem__(self, _: Any) -> "StoredWeight":
        return self

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Returns the weight."""
        return self.make(*(part[...].to(device) for part in self.parts), dtype=dtype or torch.bfloat16)


def weights_in_16_bits(name: str, stored: Mapping[str, Any], hub: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the weights of a checkpoint by the names that they have in 16 bits: slices of its files, or
    `StoredWeight`. `stored` is its `quantization_config`, and `hub` says where its files are found, such as a
    revision. Raises `OptionError` where there are no safetensors, or codes without scales."""
    slices: dict[str, Any] = {}
    if not (files := weight_files(name, hub)):
        raise OptionError(f"model={name!r} has no {SAFE_WEIGHTS_NAME}: save it in that form.")
    for file in files:
        opened = safe_open(file, "pt")
        slices |= {key: opened.get_slice(key) for key in opened.keys()}
    blocks = stored.get("weight_block_size")
    weights: dict[str, Any] = {key: part for key, part in slices.items() if not _UNUSED.fullmatch(key)}
    for key, part in slices.items():
        if key.endswith("_blocks") and (scales := f"{key.removesuffix('_blocks')}_scales") in slices:
            weights[key.removesuffix("_blocks")] = StoredWeight(from_mxfp4, part, slices[scales])
            del weights[key], weights[scales]
        elif part.get_dtype() in ("F8_E4M3", "F8_E5M2", "I8", "U8", "F4"):
            stem = key.removesuffix("weight")
            names = [f"{key}_scale_inv", f"{key}_scale", *(stem + scale for scale in _SCALES)]
            found = next((one for one in names if one in slices and one != key), None)
            if found is None:
                if key.endswith(("_scale", ".scale", "_scale_inv", "_scales")):  # E8M0 as bytes
                    continue
                raise OptionError(f"model={name!r}: {key} is in {part.get_dtype()} and has no scales: not known here.")
            weights[key] = StoredWeight(partial(from_scaled, size=blocks), part, slices[found])
            weights.pop(found, None)
    return weights


def weight_files(name: str, hub: Mapping[str, Any], **quiet: bool) -> list[str]:
    """Returns the safetensors of a model's folder or Hub id, found as `hub` says; none if it has none. `quiet` is for
    `cached_file`."""
    quiet["_raise_exceptions_for_missing_entries"] = False
    if (one := cached_file(name, SAFE_WEIGHTS_NAME, **hub, **quiet)) is not None:
        return [one]
    index = cached_file(name, SAFE_WEIGHTS_INDEX_NAME, **hub, **quiet)
    return [] if index is None else get_checkpoint_shard_files(name, index, **hub)[0]


def from_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns experts that are stored as published with gpt-oss.

    Args:
        blocks: (experts, outputs, inputs / 32, 16) uint8, two codes a byte, the lower half first.
        scales: (experts, outputs, inputs / 32) uint8, exponents of 2 with 127 added.
        dtype: of the result.

    Returns:
        (experts, inputs, outputs).
    """
    experts, outputs, groups, half = blocks.shape
    whole = torch.empty(experts, groups * half * 2, outputs, dtype=dtype, device=blocks.device)
    for one in range(experts):
        whole[one] = (_e2m1(blocks[one]) * _power(scales[one])[..., None]).reshape(outputs, -1).T
    return whole


def from_scaled(codes: Tensor, scales: Tensor, size: list[int] | None, dtype: torch.dtype) -> Tensor:
    """Returns codes times scales: one scale for all, for each output, or for each block of the last two dimensions.

    Args:
        codes: (..., outputs, inputs) in a float8 dtype; or bytes with two E2M1 codes each, (..., outputs, inputs / 2).
        scales: of one element, (outputs,), or with a size that fits the codes' or their blocks' in each dimension;
            bytes are exponents of 2 with 127 added.
        size: of the blocks; None: they divide the weight evenly. The last may be cut.
        dtype: of the result; the product is taken in float32.
    """
    floats = codes.is_floating_point() and codes.dtype != torch.float4_e2m1fn_x2  # two of them in a byte
    values = codes.float() if floats else _e2m1(codes.view(torch.uint8))
    factors = _power(scales) if scales.dtype == torch.uint8 else scales.float()
    if factors.ndim == 1 and factors.numel() > 1:
        factors = factors[:, None]
    if factors.numel() > 1:
        for dim in (-2, -1):
            length, number = values.shape[dim], factors.shape[dim]
            if number not in (1, length):
                block = size[dim] if size else length // number
                factors = factors.repeat_interleave(block, dim).narrow(dim, 0, length)
    return (values * (factors if factors.numel() > 1 else factors.reshape(()))).to(dtype)


def _e2m1(codes: Tensor) -> Tensor:
    table = torch.tensor([*_E2M1, *(-value for value in _E2M1)], device=codes.device)
    return table[torch.stack([codes & 15, codes >> 4], -1).long()].flatten(-2)


def _power(exponents: Tensor) -> Tensor:
    return torch.exp2(exponents.float() - 127)
