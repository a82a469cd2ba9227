"""A model's parts, and the mode that its modules are in."""

import ast
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel


def unwrap(model: nn.Module) -> PreTrainedModel:
    """Returns the transformers causal LM inside a PEFT model (its layers stay adapted), or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Puts every module into eval mode inside, and each back into its own mode outside, exceptions or not."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag


def text_decoder(causal_lm: Any) -> Any:
    """Returns the decoder of a model's text, without a head: Llama 4's `get_decoder` gives a model that has one."""
    decoder = causal_lm.get_decoder()
    return decoder.model if hasattr(decoder, "lm_head") else decoder


def decoder_layers(causal_lm: Any) -> nn.ModuleList:
    """Returns the list of a language model's layers."""
    lists = [module for module in text_decoder(causal_lm).modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=lambda one: sum(p.numel() for p in one.parameters()))


def first_adapted(model: nn.Module) -> int:
    """Returns the number of the first decoder layer that has a LoRA adapter; 0 if none has."""
    layers = enumerate(decoder_layers(unwrap(model)))
    return next((i for i, layer in layers if any(hasattr(one, "lora_A") for one in layer.modules())), 0)


def bring_in(module: nn.Module) -> None:
    """Makes the weights of a decoder layer present, if they come and go (`model.placement`)."""
    if (arrive := vars(module).get("bring_in")) is not None:
        arrive()


def leaving(module: nn.Module, x: Tensor) -> Tensor:
    """Returns what a decoder layer gave, whose backward pass will find the layer's weights present."""
    leave = vars(module).get("leaving")
    return x if leave is None else leave(x)


@cache
def class_source(kind: type) -> str:
    """Returns a class's code. `inspect` would parse the module for each of its classes (0.7 s for a mixture's)."""
    return _classes(kind.__module__).get(kind.__qualname__) or inspect.getsource(kind)


@cache
def _classes(module: str) -> dict[str, str]:
    text = inspect.getsource(sys.modules[module])
    lines, found = text.split("\n"), (node for node in ast.parse(text).body if isinstance(node, ast.ClassDef))
    return {node.name: "\n".join(lines[node.lineno - 1 : node.end_lineno]) for node in found}
