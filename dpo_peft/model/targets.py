"""Which layers of a model an adapter goes on, and which weights can't be quantized or adapted.

"all-linear" is the linear layers of the language model, and if asked for of what reads images, without its head,
routers and indexers, without layers whose weight the model reads itself, and without those whose output does not move
the log-probs of a short text: an adapter there would have no gradient. Experts that are one tensor for all are no
layers.
"""

import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import _find_minimal_target_modules, check_target_module_exists
from peft.utils import transformers_weight_conversion as conversion
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import OptionError
from ..forward.gguf import GgufLinear
from ..forward.images import check_takes_images, own_inputs
from ..forward.layout import Sample, pad_rows
from ..forward.modules import class_source, decoder_layers, eval_mode, text_decoder
from ..reference.frozen_adapter import adapter_layers, adapter_tensors
from .scope import check_layers

logger = logging.getLogger(__name__)

ALL_LINEAR = "all-linear"
_ROUTERS = ("gate", "classifier")  # of experts beside them; what has "router" in its name is one anywhere
_LIBRARIES = (
    "torch.",
    "transformers.integrations.",
    "transformers.pytorch_utils",
    "bitsandbytes.",
    "torchao.",
    f"{GgufLinear.__module__}.",
)

# A layer's weight in its parent's code: not its dtype or the like, nor a slice of it (Bloom's, where a flag is on).
_READ = re.compile(r"\bself\.(\w+)\.weight\b(?!\.(?:dtype|device|shape|size)\b|\[|, torch\.Tensor)")
_DTYPE_READ = re.compile(r"\bself\.(\w+)\.weight\.dtype\b")


def choose_targets(config: LoraConfig, model: PreTrainedModel, vision: Sample | None = None) -> dict[str, str]:
    """Puts the layers that "all-linear" means into an adapter's config; other targets stay as they are.

    `vision` is a tiny sample with images, if layers that read these are meant too. Returns the linear layers that are
    left out, name to reason; empty for other targets.

    Raises:
        OptionError: `vision` is given for other targets, or to a model that takes no images; a layer is named that the
            model doesn't have.
    """
    check_layers(config, len(decoder_layers(model)))
    if vision is not None:
        check_takes_images(model)
        if config.target_modules != ALL_LINEAR:
            raise OptionError(
                "lora_vision=True and target_modules are given: leave one of them out. What target_modules names in a "
                'tower or projector is adapted as it is; "all-linear" with lora_vision means all of it.'
            )
    if config.target_modules != ALL_LINEAR:
        return {}
    # A model that had an adapter before has its layers one step further inside.
    own = ((name, layer) for name, layer in model.named_modules() if is_linear(layer) and ".lora_" not in name)
    layers = {name.removesuffix(".base_layer"): layer for name, layer in own}
    left_out = unfit_layers(config, model, layers, vision is not None)
    fit = {name: layer for name, layer in layers.items() if name not in left_out}
    reached = _reached(model, fit, vision)
    left_out |= {name: "the log-probs of a short text do not depend on it" for name in fit if name not in reached}
    others = {name for name, _ in model.named_modules()} - reached
    if config.layers_to_transform is not None:
        config.target_modules = in_layers(config, model, reached)
    else:
        config.target_modules = reached if _renamed(model) else _shortest(reached, others)  # PEFT reads patterns anew
    return left_out


def in_layers(config: LoraConfig, model: PreTrainedModel, targets: set[str]) -> set[str]:
    """Returns the targets of some layers as PEFT finds them: by their last names, or by their whole names where other
    modules of these layers are called so too. Of whole names PEFT doesn't look at the layer."""
    config.target_modules = {name.rpartition(".")[2] for name in targets}
    found = {name for name, _ in model.named_modules() if check_target_module_exists(config, name) is True}
    return found & targets if found - targets or _renamed(model) else config.target_modules


def unfit_layers(
    config: LoraConfig, model: PreTrainedModel, layers: dict[str, nn.Module], vision: bool = False
) -> dict[str, str]:
    """Returns the linear layers that an adapter can't or should not go on, and why; `model` may be without numbers."""
    left_out = dict.fromkeys(_lost(model, config, layers), "PEFT would not find it again in the adapter's file")
    return left_out | dict(_unfit(model, layers, vision))


def _unfit(model: PreTrainedModel, layers: dict[str, nn.Module], vision: bool) -> Iterator[tuple[str, str]]:
    """Yields the linear layers that an adapter can't or should not go on, and why."""
    head, read, decoder = model.get_output_embeddings(), set(read_past(model)), model.get_decoder()
    composite = model.config.get_text_config() is not model.config
    inside = next((f"{name}." for name, part in model.named_modules() if composite and name and part is decoder), "")
    for name, layer in layers.items():
        kind: Any = type(layer)
        if layer is head:
            yield name, "it is the head"
        elif not vision and not name.startswith(inside):
            yield name, "it is outside the language model"
        elif "router" in name or _beside_experts(model, name):
            yield name, "it is a router"
        elif "indexer" in name:
            yield name, "it is an indexer"
        elif re.search(r"(^|\.)experts\.\d+(\.|$)", name):
            yield name, "it is an expert"
        elif name in read:
            yield name, "the model reads its weight itself"
        elif not computes_linear(kind):
            yield name, "it is no plain linear layer"


def _beside_experts(model: nn.Module, name: str) -> bool:
    """Whether a layer, or a module that it is in, is called like a router and stands beside experts."""
    parts = name.split(".")
    for at, own in enumerate(parts):
        if own in _ROUTERS or own.endswith("expert_gate"):
            beside = {child for child, _ in model.get_submodule(".".join(parts[:at])).named_children()} - {own}
            if any("expert" in child for child in beside):
                return True
    return False


def _lost(model: PreTrainedModel, config: LoraConfig, layers: Iterable[str]) -> list[str]:
    """Returns the layers whose tensors PEFT loads under another name (0.21: the shared experts of Laguna)."""
    loader = SimpleNamespace(config=model.config, base_model_prefix="base_model", get_base_model=lambda: model)
    keys = {f"base_model.model.{name}.lora_A.weight": name for name in layers}
    empty = {key: torch.empty(0) for key in keys}
    found = conversion.convert_peft_adapter_state_dict_for_transformers(loader, config, empty)
    return [name for key, name in keys.items() if key not in found]


def _reached(model: PreTrainedModel, layers: dict[str, nn.Module], vision: Sample | None = None) -> set[str]:
    """Returns which layers' outputs move the log-probs of a short text, or of one with images."""
    reached: set[str] = set()
    starts: list[Tensor] = []

    def start(module: nn.Module, args: object, output: Tensor) -> Tensor:
        starts.append(output.detach().requires_grad_())
        return starts[-1].clone()  # which may be changed in place

    def watch(name: str) -> Any:
        def note(gradient: Tensor) -> None:
            if gradient.any():
                reached.add(name)

        def hook(module: nn.Module, args: object, output: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            output = output if output.requires_grad else start(module, args, output)  # it has an input of its own
            output.register_hook(note)
            return output

        return hook

    embeddings = model.get_input_embeddings()
    hooks = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    hooks.append(embeddings.register_forward_hook(start))
    vocab = embeddings.weight.shape[0]
    ids = torch.arange(16, device=embeddings.weight.device)[None] * 7 % (vocab // 2) + vocab // 4
    rows: list[tuple[dict[str, Any], Any]] = [({"input_ids": ids}, slice(None))]
    if vision is not None:
        batch = pad_rows([vision]).to(ids.device)
        given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, **own_inputs(model, batch)}
        rows.append((given, batch.pred_pos))
    try:
        with torch.enable_grad(), eval_mode(model):
            for row, places in rows:
                starts.clear()
                logps = model(**row, use_cache=False).logits.flatten(0, 1)[places].float().log_softmax(-1)
                torch.autograd.grad(logps[:, 0].sum(), starts, allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
    return reached


def _shortest(targets: set[str], others: Iterable[str]) -> set[str] | str:
    """Returns the targets as PEFT finds them again: their names, which it shortens to common ends, or where these
    would not tell them from others (of a vision tower), one pattern."""
    kinds: dict[str, set[str]] = defaultdict(set)
    for name in targets:
        kinds[starred(name)].add(name)
    if len(_find_minimal_target_modules(targets, others)) <= len(kinds):
        return targets
    alike: dict[str, set[str]] = defaultdict(set)
    for name in others:
        alike[starred(name)].add(name)
    parts = []
    for kind, names in sorted(kinds.items()):
        whole = re.escape(kind).replace(r"\*", r"\d+")
        parts.append("|".join(map(re.escape, sorted(names))) if alike[kind] else whole)
    return "|".join(parts)


def starred(name: str) -> str:
    """Returns a module's or weight's name with a star for each number, such as that of its layer."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


# ---- How the targets are saved --------------------------------------------------------------------------------------


def _renamed(model: PreTrainedModel) -> Iterable[str]:
    """Returns the names of layers that PEFT takes for experts in a model of this type."""
    table = conversion._MODEL_TO_CONVERSION_PATTERN
    return conversion._MOE_TARGET_MODULE_MAPPING.get(table.get(model.config.model_type, ""), {})


@contextmanager
def targets_as_named(new: bool = False) -> Iterator[None]:
    """Inside, PEFT puts an adapter on the layers that its config names.

    In some mixtures of experts PEFT 0.21 takes `gate_proj`, `up_proj` and `down_proj` for the names of experts, as
    they were in transformers 4, and leaves dense layers of these names out. An adapter on such layers is saved with
    their weights as `target_parameters`, which PEFT takes as they are: with the same tensors, to the same effect. Here
    they are layers again.
    `new`: the adapter is not one from elsewhere, which may be on experts of transformers 4.
    """
    original = conversion.convert_peft_config_for_transformers
    saved: list[tuple[LoraConfig, Any, Any]] = []

    def convert(config: LoraConfig, model: nn.Module, conversions: Any) -> None:
        named = () if isinstance(config.target_modules, str) else config.target_parameters or ()
        ends = [name for name in named if name.endswith(".weight")]
        names = [name for name, layer in model.named_modules() if is_linear(layer)]
        ends = [end for end in ends if any(_ends(f"{name}.weight", end) for name in names)]
        if ends:
            saved.append((config, config.target_modules, config.target_parameters))
            config.target_modules = {*(config.target_modules or ()), *(end.removesuffix(".weight") for end in ends)}
            config.target_parameters = [name for name in config.target_parameters if name not in ends] or None
        elif not new:
            original(config, model=model, conversions=conversions)

    conversion.convert_peft_config_for_transformers = convert
    try:
        yield
    finally:
        conversion.convert_peft_config_for_transformers = original
        for config, modules, parameters in saved:
            config.target_modules, config.target_parameters = modules, parameters


def save_as_parameters(model: PeftModel, config: LoraConfig) -> None:
    """Changes a new adapter's config to what PEFT makes the same layers of, see `targets_as_named`."""
    base = model.get_base_model()
    wrapped = {name for name, is_layer in _adapted(model) if is_layer}
    taken = {name for name in wrapped if name.rpartition(".")[2] in _renamed(base)}
    if not taken:
        return
    others = {name for name, _ in base.named_modules() if ".lora_" not in name and not name.endswith("base_layer")}
    ends = _find_minimal_target_modules(taken, others - taken)
    config.target_parameters = sorted({*(config.target_parameters or ()), *(f"{end}.weight" for end in ends)})
    config.target_modules = _find_minimal_target_modules(wrapped - taken, others - wrapped) if wrapped > taken else []


def _adapted(model: PeftModel) -> Iterator[tuple[str, bool]]:
    """Yields the names of layers with an adapter, and of parameters with one (experts), and which of both it is."""
    for name, layer in adapter_layers(model):
        if hasattr(layer, "lora_A"):
            is_layer, name = not isinstance(layer, ParamWrapper), name.removeprefix("base_model.model.")
            yield name if is_layer else f"{name.replace('.base_layer', '')}.{layer.parameter_name}", is_layer


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def log_targets(model: PeftModel, given: object, left_out: dict[str, str]) -> None:
    """Says in one line what got an adapter, and what did not and why."""
    (adapter,) = model.active_adapters
    names = [name for name, _ in _adapted(model)]
    weights = sum(tensor.numel() for tensor in adapter_tensors(model, adapter).values())
    why: dict[str, set[str]] = defaultdict(set)
    for name, reason in left_out.items():
        why[reason].add(_short(name))
    text = "".join(f" Not on {', '.join(sorted(layers))} ({reason})." for reason, layers in why.items())
    if isinstance(given, list | set | tuple):
        unknown = sorted(end for end in given if not any(_ends(name, end) for name in names))
        text += f" No layer is called {', '.join(unknown)}." if unknown else ""
    kinds = ", ".join(dict.fromkeys(map(_short, names)))
    logger.info("LoRA on %d layers, %s weights: %s.%s", len(names), f"{weights:,}", kinds, text)


def _short(name: str) -> str:
    """Returns the last two parts of a layer's name that are no numbers."""
    return ".".join([part for part in name.split(".") if not part.isdigit()][-2:])


# ---- Layers ---------------------------------------------------------------------------------------------------------


def read_past(model: nn.Module) -> list[str]:
    """Returns the names of the linear layers whose weight the module around them reads itself: a state-space mixer
    (Mamba) in its scan, Gemma 3n to clamp it. What an adapter adds would be missed there, and 4 bits can't be read."""
    return _layers_read(model, _READ)


def dtype_read(model: PreTrainedModel) -> list[str]:
    """Returns the names of the linear layers beside the language model to whose dtype the module around them casts
    pixels (Gemma 4): in 4 bits it is that of packed bytes, and what stands before the layer gets another than its own.
    """
    others = {id(module) for module in text_decoder(model).modules()} | {id(model.get_output_embeddings())}
    return [name for name in _layers_read(model, _DTYPE_READ) if id(model.get_submodule(name)) not in others]


def _layers_read(model: nn.Module, pattern: re.Pattern[str]) -> list[str]:
    found = []
    for name, parent in model.named_modules():
        kind: Any = type(parent)
        read = _weights_read(kind, pattern)
        layers = parent.named_children() if read else ()
        found += [f"{name}.{child}".lstrip(".") for child, layer in layers if child in read and is_linear(layer)]
    return found


@cache
def _weights_read(kind: Any, pattern: re.Pattern[str]) -> set[str]:
    own = [base for base in kind.__mro__ if issubclass(base, nn.Module) and not base.__module__.startswith("torch.")]
    return {name for base in own for name in pattern.findall(class_source(base))}


def is_linear(layer: nn.Module) -> bool:
    """Whether a layer is a linear one, quantized or not."""
    return isinstance(layer, nn.Linear | Conv1D)


@cache
def computes_linear(kind: type[nn.Linear]) -> bool:
    """Whether a kind of linear layer computes what nn.Linear does (Falcon's), which routers and grouped ones don't."""
    if f"{kind.__module__}.".startswith(_LIBRARIES) or kind.forward is nn.Linear.forward:
        return True
    try:
        with torch.random.fork_rng(devices=[]):
            layer, x = kind(4, 3), torch.randn(2, 4)
            return torch.allclose(layer(x), F.linear(x, layer.weight, layer.bias), atol=1e-5)
    except Exception:  # its constructor or its output may be of any kind
        return False
