"""A model without its weights: its sizes, what of it is quantized and adapted, and what its layers keep.

The model is built as for training, but on the meta device, which holds shapes and no numbers. So every family is
known that can be built. What its layers keep for their backward pass, and need beside it, is counted by running them
on fake tensors (torch's `FakeTensorMode`) for two numbers of tokens: all sizes are linear in that.
"""

import copy
import weakref
from functools import cached_property
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import build_glob_alternation
from transformers.quantizers.auto import AutoHfQuantizer

from ..errors import OptionError
from ..forward.experts import GROUP_BYTES
from ..forward.modules import decoder_layers, text_decoder
from ..model.adapters import misfits_refused
from ..model.base import all_linear_quantized, class_of, fitted, nf4_config
from ..model.experts import expert_weights, experts_in_4_bits
from ..model.targets import in_layers, is_linear, starred, targets_as_named, unfit_layers

ROW = 64  # tokens of a row on fake tensors, some of whose layers take them one by one
# bitsandbytes: weights share a scale in blocks of 64, scales one in blocks of 256; code tables are float32.
NF4_BLOCK, NF4_NESTED_BLOCK = 64, 256
NF4_CODES, NF4_NESTED_CODES = 4 * 16, 4 * 256


def nf4_bytes(weights: int, nested: bool = True, experts: int = 1) -> int:
    """Returns the bytes of a weight in NF4 with its constants.

    Args:
        weights: how many numbers it has; of a mixture's, those of one expert.
        nested: whether its scales are quantized too (double quantization).
        experts: which share the code tables.
    """
    blocks = -(-weights // NF4_BLOCK)
    if not nested:
        return experts * (-(-weights // 2) + 4 * blocks) + NF4_CODES
    scales = blocks + 4 * -(-blocks // NF4_NESTED_BLOCK) + 4  # and an offset
    return experts * (-(-weights // 2) + scales) + NF4_CODES + NF4_NESTED_CODES


class Line(NamedTuple):
    """Bytes that grow with tokens, and with how many of them are in a row."""

    fixed: float
    per_token: float
    per_pair: float  # of tokens in a row
    row: float  # tokens of a row for which `per_token` holds

    def at(self, tokens: float, row: float | None = None) -> float:
        """Returns the bytes of so many tokens, in rows of so many."""
        more = 0.0 if row is None else max(row - self.row, 0.0)
        return self.fixed + tokens * (self.per_token + self.per_pair * more)


class LayerCost(NamedTuple):
    """What a decoder layer takes, in a base that computes in 16 bits."""

    inputs: Line  # what it keeps if it is checkpointed
    kept: Line  # what it keeps if not
    backward: Line  # what its backward pass needs beside that
    keys: Line  # of `kept`, keys and values
    unpacked: int = 0  # bytes of experts that are unpacked as a whole, if they are in 4 bits, and kept


class Costs(NamedTuple):
    """What the layers of a model take."""

    layers: tuple[LayerCost, ...]
    rest: Line  # what is kept outside of them
    idle: frozenset[str]  # the kinds of adapter weights that get no gradient


class Sketch:
    """A base and an adapter on it, without numbers.

    Args:
        config: the base's.
        lora: the adapter's options; "all-linear" means what it means in training.
        trust_remote_code: run code that ships with the model.
        row: tokens of a row in the run on fake tensors.
        experts, vision: whether the adapter is on experts too, or on what reads images. Its weights count there, not
            what it keeps.

    Raises:
        OptionError: a model that can't be built, or an adapter that does not fit it.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        lora: LoraConfig,
        trust_remote_code: bool = False,
        row: int = ROW,
        experts: bool = False,
        vision: bool = False,
    ):
        self.row, self.experts, self.vision = row, experts, vision
        self.config, self.lora, self.trust = copy.deepcopy(config), copy.deepcopy(lora), trust_remote_code
        for part in (self.config, self.config.get_text_config(decoder=True)):
            vars(part).pop("quantization_config", None)
        try:
            self.kind = class_of(self.config, trust_remote_code)
            self.base = self._build()
            self.layers = len(decoder_layers(self.base))
        except Exception as error:  # of the model's own code
            raise _unpredictable(config, "it can't be built from its config", error) from error
        embedding, head = self.base.get_input_embeddings(), self.base.get_output_embeddings()
        self.vocab, self.hidden = head.weight.shape
        self.tied = head.weight is embedding.weight
        text = self.config.get_text_config(decoder=True)
        per_head = vars(text).get("head_dim") or vars(text).get("global_head_dim")
        self.head_dim = per_head or self.hidden // (vars(text).get("num_attention_heads") or 1)
        self.weights = sum(parameter.numel() for parameter in self.base.parameters())

    def _build(self) -> PreTrainedModel:
        config = copy.deepcopy(self.config)  # building a model writes into it
        with torch.device("meta"):
            if hasattr(self.kind, "from_config"):
                model = self.kind.from_config(config, dtype=torch.bfloat16, trust_remote_code=self.trust)
            else:
                model = self.kind._from_config(config, dtype=torch.bfloat16)
        if whole := model._get_dtype_plan(torch.bfloat16):  # weights that stay in float32
            named = build_glob_alternation(list(whole))[0]
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                tensor.data = tensor.data.float() if named.search(name) else tensor.data
        return model

    # ---- What is stored ----

    @cached_property
    def quantized(self) -> dict[str, tuple[int, int]]:
        """Which weights are in 4 bits by default: how many experts are in each, 1 in a linear layer, of which size."""
        quantization = fitted(nf4_config(torch.bfloat16), self.config, self.kind, self.trust)
        with all_linear_quantized(quantization), experts_in_4_bits():
            model = self._build()
            quantizer: Any = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
        quantizer.preprocess_model(model, device_map=None)
        names = dict(self.base.named_parameters())
        small = [(name, w) for name, w in names.items() if quantizer.param_needs_quantization(model, name)]
        return {name: (w.shape[0], w[0].numel()) if w.ndim == 3 else (1, w.numel()) for name, w in small}

    def stored(self, quantize: bool, nested: bool, weight_bytes: int) -> tuple[int, int]:
        """Returns the bytes of weights in 4 bits and of the others; tied ones count once."""
        small = self.quantized if quantize else {}
        rest = [w for name, w in self.base.named_parameters() if name not in small]
        of_rest = sum(w.numel() * (4 if w.dtype == torch.float32 else weight_bytes) for w in rest)
        return sum(nf4_bytes(size, nested, number) for number, size in small.values()), of_rest

    def unpacked(self, element: int) -> int:
        """Returns the bytes of the largest weight, or group of experts, that is unpacked at a time."""
        group = GROUP_BYTES["cuda"] if any(number > 1 for number, _ in self.quantized.values()) else 0
        return max(group, *(element * size for _, size in self.quantized.values()))

    # ---- The adapter ----

    @cached_property
    def adapted(self) -> PeftModel:
        """The base with the adapter on every layer that it may go on."""
        config, model = copy.deepcopy(self.lora), self._build()
        if config.target_modules == "all-linear":
            layers = {name: layer for name, layer in model.named_modules() if is_linear(layer)}
            fit = {*layers} - unfit_layers(config, model, layers, self.vision).keys()
            config.target_modules = fit if config.layers_to_transform is None else in_layers(config, model, fit)
        elif not isinstance(config.target_modules, str):
            names = {part for path, layer in model.named_modules() if is_linear(layer) for part in _ends(path)}
            names |= {"embed_tokens", *(part for path, _ in model.named_parameters() for part in _ends(path))}
            if wrong := sorted({*(config.target_modules or ())} - names):
                known = sorted({name for name in names if "." not in name})
                raise OptionError(f"lora_target_modules: {wrong[0]!r} is not one of {', '.join(known)}.")
        config.init_lora_weights = True
        with misfits_refused("The adapter does not fit the model: "), targets_as_named(new=True):
            return get_peft_model(model, config)

    @cached_property
    def trained(self) -> int:
        """How many weights the adapter has, without those of layers that no gradient reaches where it is on all; which
        are these is not known of layers that images alone reach."""
        weights = {name: p.numel() for name, p in self.adapted.named_parameters() if p.requires_grad}
        idle = self.costs.idle if self.lora.target_modules == "all-linear" and not self.vision else ()
        shapes = [weight.shape for weight in expert_weights(self.base).values()] if self.experts else []
        on_experts = sum(self.lora.r * shape[0] * (shape[1] + shape[2]) for shape in shapes)
        kept = (n for name, n in weights.items() if "lora_" not in name or starred(name) not in idle)
        return on_experts + sum(kept)

    # ---- What layers keep ----

    @cached_property
    def costs(self) -> Costs:
        """What the layers take, and which adapter weights are idle; an OptionError where layers can't be run without
        numbers."""
        base = self.adapted.get_base_model()
        layers = decoder_layers(base)
        kinds = [_kind_of_layer(layer) for layer in layers]
        needed = max(kinds.index(kind) for kind in kinds) + 1  # the first layers, with one of each kind among them
        config = base.config.get_text_config(decoder=True)
        if config.num_hidden_layers == len(layers) and not getattr(config, "hidden_size_per_layer_input", None):
            _keep_first(text_decoder(base), layers, needed)
            config.num_hidden_layers = needed
        try:
            sizes = (1, self.row), (2, self.row), (1, 2 * self.row)
            runs = [_run(self.adapted, kinds[:needed], *size) for size in sizes]
        except Exception as error:  # what depends on numbers can't be run without them
            raise _unpredictable(config, "its layers can't be run without numbers", error) from error
        of = {}
        for kind, layer in zip(kinds, layers, strict=True):
            inputs, kept, backward, keys = (
                _line(self.row, *sizes) for sizes in zip(*(run.of[kind] for run in runs), strict=True)
            )
            of[kind] = LayerCost(inputs, kept, backward, keys, _unpacked(layer))
        names = {starred(name): False for name, p in self.adapted.named_parameters() if p.requires_grad}
        names |= {starred(name): True for name, p in self.adapted.named_parameters() if p.grad is not None}
        idle = frozenset(name for name, reached in names.items() if not reached)
        return Costs(tuple(of[kind] for kind in kinds), _line(self.row, *(run.rest for run in runs)), idle)


# ---- A run on fake tensors ------------------------------------------------------------------------------------------


class _Live(TorchDispatchMode):
    """Counts the bytes of all tensors that are made inside and still there."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = self.keys = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func)
        if "scaled_dot_product" in name and "backward" not in name:
            self.keys += sum(tensor.nbytes for tensor in args[1:3])
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (key := (storage := tensor.untyped_storage())._cdata) not in self.seen:
                self.seen.add(key)
                self.now += (size := storage.nbytes())
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, key, size)
        return result

    def _gone(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


class _Sizes(NamedTuple):
    """Bytes of a run: of each kind of layer its input, what it keeps, its backward pass, keys; and of the rest."""

    of: dict[str, list[float]]
    rest: float


def _run(model: PeftModel, kinds: list[str], rows: int, row: int) -> _Sizes:
    """Runs layers forward and backward on rows of fake tokens."""
    base: Any = model.get_base_model()
    decoder, layers, live = text_decoder(base), decoder_layers(base), _Live()
    saved: dict[int, int] = {}
    before: list[tuple[int, int]] = []
    inputs, kept, keys, backward = ([0.0] * len(kinds) for _ in range(4))
    window = [-1, 0]  # the layer whose backward pass it is, and what there was at its start

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    def enter(number: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            given = args[0] if args else kwargs["hidden_states"]
            inputs[number] = given.nbytes
            before.append((sum(saved.values()), live.keys))

        return hook

    def leave(number: int) -> Any:
        def begin(gradient: Tensor) -> None:
            close()
            window[:] = [number, live.now - gradient.nbytes]
            live.most = live.now

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            (output if isinstance(output, Tensor) else output[0]).register_hook(begin)
            kept[number] = sum(saved.values()) - before[-1][0]
            keys[number] = live.keys - before[-1][1]

        return hook

    def close() -> None:
        if window[0] >= 0:
            backward[window[0]] = max(backward[window[0]], live.most - window[1])

    handles = [layer.register_forward_pre_hook(enter(i), with_kwargs=True) for i, layer in enumerate(layers)]
    handles += [layer.register_forward_hook(leave(i)) for i, layer in enumerate(layers)]
    model.train()
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        _without_numbers(model, fake)
        own = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}
        ids = torch.zeros(rows, row, dtype=torch.long)
        handles.append(base.get_input_embeddings().register_forward_hook(lambda m, a, out: out.requires_grad_()))
        with live, torch.autocast("cpu", torch.bfloat16):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                states = decoder(input_ids=ids, use_cache=False).last_hidden_state
            total = sum(saved.values())
            states.backward(torch.ones_like(states))
            close()
    for handle in handles:
        handle.remove()
    of: dict[str, list[float]] = {}
    for kind, *cost in zip(kinds, inputs, kept, backward, keys, strict=True):
        of[kind] = [*map(max, cost, of.get(kind, cost))]
    return _Sizes(of, total - sum(kept))


def _without_numbers(model: nn.Module, fake: FakeTensorMode) -> None:
    """Puts fake tensors of the CPU in the place of all that are on the meta device."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in stores:
            for name, tensor in tensors.items():
                if tensor is None or tensor.device.type == "cpu" and id(tensor) in made:
                    continue
                if id(tensor) not in made:
                    dtype = torch.float32 if tensor.requires_grad else tensor.dtype
                    new = torch.empty(tensor.shape, dtype=dtype, device="cpu")
                    trained = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if trained else new
                tensors[name] = made[id(tensor)]


def _unpredictable(config: PretrainedConfig, why: str, error: Exception) -> OptionError:
    first = str(error).strip().partition("\n")[0][:200]
    return OptionError(
        f"The memory of a {config.model_type} model can't be predicted: {why} ({type(error).__name__}: {first}). For "
        "an estimate, give `dpo-peft plan` a --shape that is near in size."
    )


def _line(row: int, short: float, twice: float, long: float) -> Line:
    """Returns how a size grows, from those of one row, of two, and of one that is twice as long; never less."""
    slope = max(twice - short, 0.0) / row
    return Line(max(short - slope * row, 0.0), slope, max(long - twice, 0.0) / (2 * row * row), row)


def _unpacked(layer: nn.Module) -> int:
    """Returns the bytes of experts whose family computes by the whole weights, not by groups (see `Experts`)."""
    modules = [module for module in layer.modules() if not hasattr(module, "has_gate")]
    whole = {id(weight) for module in modules for weight in module.parameters(recurse=False)}
    return sum(2 * weight.numel() for weight in expert_weights(layer).values() if id(weight) in whole)


def _keep_first(decoder: nn.Module, layers: nn.ModuleList, number: int) -> None:
    for module in decoder.modules():
        for name, child in list(module.named_children()):
            if child is layers:
                setattr(module, name, layers[:number])


def _kind_of_layer(layer: nn.Module) -> str:
    """Returns what tells layers apart: classes, sizes and switches of their modules."""
    parts = []
    for name, module in layer.named_modules():
        switches = {k: v for k, v in vars(module).items() if isinstance(v, bool | int | str) and k[0] != "_"}
        switches.pop("layer_idx", None), switches.pop("layer_id", None)
        sizes = [(own, tuple(p.shape)) for own, p in module.named_parameters(recurse=False)]
        parts.append(f"{name} {type(module).__name__} {sizes} {sorted(switches.items())}")
    return "\n".join(parts)


def _ends(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[-number:]) for number in range(1, len(parts) + 1)]
