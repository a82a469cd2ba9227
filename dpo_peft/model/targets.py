"""Which layers of a model an adapter goes on, and which weights can't be quantized or adapted."""

import inspect
import re
from functools import cache

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

# A layer's weight in its parent's code: not its dtype or the like, nor a slice of it (Bloom's, where a flag is on).
_READ = re.compile(r"\bself\.(\w+)\.weight\b(?!\.(?:dtype|device|shape|size)\b|\[|, torch\.Tensor)")


def read_past(model: nn.Module) -> list[str]:
    """Returns the names of the linear layers whose weight the module around them reads itself: a state-space mixer
    (Mamba) in its scan, Gemma 3n to clamp it. What an adapter adds would be missed there, and 4 bits can't be read."""
    found = []
    for name, parent in model.named_modules():
        read = _weights_read(type(parent))
        layers = parent.named_children() if read else ()
        found += [f"{name}.{child}" for child, layer in layers if child in read and is_linear(layer)]
    return found


@cache
def _weights_read(kind: type[nn.Module]) -> set[str]:
    own = [base for base in kind.__mro__ if issubclass(base, nn.Module) and not base.__module__.startswith("torch.")]
    return {name for base in own for name in _READ.findall(inspect.getsource(base))}


def is_linear(layer: nn.Module) -> bool:
    """Whether a layer is a linear one, quantized or not."""
    return isinstance(layer, nn.Linear | Conv1D)


@cache
def computes_linear(kind: type[nn.Linear]) -> bool:
    """Whether a kind of linear layer computes what nn.Linear does (Falcon's), which routers and grouped ones don't."""
    if kind.forward is nn.Linear.forward:
        return True
    try:
        with torch.random.fork_rng(devices=[]):
            layer, x = kind(4, 3), torch.randn(2, 4)
            return torch.allclose(layer(x), F.linear(x, layer.weight, layer.bias), atol=1e-5)
    except Exception:  # its constructor or its output may be of any kind
        return False
