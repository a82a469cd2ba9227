"""The sizes of a decoder, read off its config, and of a LoRA adapter on it: no weights are loaded, and none are made.

What counts for memory is few: how wide the layers are, which linear layers they have (those are quantized and get
adapters), and how many weights there are beside them.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel, Qwen3Config

GROUPS = ("qkv", "o", "up", "down")  # linear layers with one input: they are dequantized and multiplied together

# Names that models give to the linear layers of a decoder layer. A name that isn't here is an error: a layer that is
# not understood would be counted wrong.
_ATTENTION = {
    "qkv": {"q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn"},
    "o": {"o_proj", "out_proj", "dense", "c_proj"},
}
_MLP = {
    "up": {"gate_proj", "up_proj", "gate_up_proj", "fc1", "c_fc", "dense_h_to_4h"},
    "down": {"down_proj", "fc2", "c_proj", "dense_4h_to_h"},
}


class Linear(NamedTuple):
    """A linear layer of each decoder layer; its weight is (outputs, inputs)."""

    name: str
    group: str  # one of GROUPS
    outputs: int
    inputs: int

    @property
    def weights(self) -> int:
        return self.outputs * self.inputs


class Group(NamedTuple):
    """Linear layers of a decoder layer that have one input."""

    inputs: int
    outputs: int  # of all of them


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder whose layers are all alike: attention, then an MLP."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool  # whether the head is the embedding
    linears: tuple[Linear, ...]  # of one layer
    others: int  # weights of norms and biases, over the whole model
    qk_norm: bool = False  # whether queries and keys are normalized

    @classmethod
    def llama(
        cls,
        hidden: int,
        intermediate: int,
        layers: int,
        heads: int,
        kv_heads: int,
        vocab: int,
        head_dim: int | None = None,
        tied: bool = False,
        qk_norm: bool = False,
    ) -> "Shape":
        """Makes a Llama's: no biases, two norms a layer and one at the end (`qk_norm`: two more of a head's size)."""
        head_dim = head_dim or hidden // heads
        q, kv = heads * head_dim, kv_heads * head_dim
        linears = (
            Linear("q_proj", "qkv", q, hidden),
            Linear("k_proj", "qkv", kv, hidden),
            Linear("v_proj", "qkv", kv, hidden),
            Linear("o_proj", "o", hidden, q),
            Linear("gate_proj", "up", intermediate, hidden),
            Linear("up_proj", "up", intermediate, hidden),
            Linear("down_proj", "down", hidden, intermediate),
        )
        others = layers * (2 * hidden + 2 * head_dim * qk_norm) + hidden
        return cls(hidden, intermediate, layers, heads, kv_heads, head_dim, vocab, tied, linears, others, qk_norm)

    @classmethod
    def of(cls, config: PretrainedConfig, trust_remote_code: bool = False) -> "Shape":
        """Reads the causal LM that a transformers config describes, built without storage on the meta device.

        Args:
            config: the model's config; of a model for text and images, the text part counts.
            trust_remote_code: run code that ships with the model.

        Raises:
            NotPlainError: no causal LM, or not a plain decoder (experts, layers that differ, other kinds of layers).
        """
        # Building a model writes into its config.
        config = copy.deepcopy(config.get_text_config(decoder=True))
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        except (ValueError, KeyError, AttributeError, TypeError, OSError) as error:
            first = str(error).strip().partition("\n")[0][:200]
            raise _refusal(config, f"it can't be built from its config ({type(error).__name__}: {first})") from error
        return _read(model, config)

    @cached_property
    def q(self) -> int:
        """Q, the width of all query heads."""
        return self.heads * self.head_dim

    @cached_property
    def kv(self) -> int:
        """G, the width of all key (or value) heads."""
        return self.kv_heads * self.head_dim

    @cached_property
    def groups(self) -> dict[str, Group]:
        """The groups of linear layers by name."""
        found = dict.fromkeys(GROUPS, Group(0, 0))
        for one in self.linears:
            found[one.group] = Group(one.inputs, found[one.group].outputs + one.outputs)
        return found

    @property
    def unquantized_weights(self) -> int:
        """Weights that stay as they are when the model is quantized; tied ones count once."""
        return (1 if self.tied else 2) * self.vocab * self.hidden + self.others

    @property
    def weights(self) -> int:
        """All weights; tied ones count once."""
        return self.layers * sum(linear.weights for linear in self.linears) + self.unquantized_weights

    def config(self) -> PretrainedConfig:
        """Returns the config of a Llama, or with norms on heads of a Qwen 3, of these sizes."""
        kind = Qwen3Config if self.qk_norm else LlamaConfig
        return kind(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocab,
            tie_word_embeddings=self.tied,
        )


# ---- Reading a model on the meta device ----------------------------------------------------------------------------


def _read(model: PreTrainedModel, config: PretrainedConfig) -> Shape:
    number = getattr(config, "num_hidden_layers", None)
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == number)
    if (layers := next(lists, None)) is None:
        raise _refusal(config, "it has no list of decoder layers")
    linears, *others = [_linears(layer, config) for layer in layers]
    if any(other != linears for other in others):
        raise _refusal(config, "its layers differ from each other")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding is None or head is None:
        raise _refusal(config, "it has no embedding or no head")
    known = {head, *layers.modules()}
    if strays := [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m not in known]:
        raise _refusal(config, f"it has linear layers outside of its decoder layers ({strays[0]})")
    heads = config.num_attention_heads
    vocab, hidden = embedding.weight.shape
    shape = Shape(
        hidden=hidden,
        intermediate=sum(linear.inputs for linear in linears if linear.group == "down"),
        layers=len(layers),
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or hidden // heads,
        vocab=vocab,
        tied=embedding.weight is head.weight,
        linears=linears,
        others=0,
        qk_norm=any(name.endswith("q_norm") for name, _ in layers[0].named_modules()),
    )
    _check_sizes(shape, config)
    return replace(shape, others=sum(parameter.numel() for parameter in model.parameters()) - shape.weights)


def _linears(layer: nn.Module, config: PretrainedConfig) -> tuple[Linear, ...]:
    found = []
    for path, module in layer.named_modules():
        if isinstance(module, nn.Linear):
            table = _ATTENTION if "attn" in path or "attention" in path else _MLP
            name = path.rsplit(".", 1)[-1]
            group = next((group for group, names in table.items() if name in names), None)
            if group is None or "expert" in path:
                raise _refusal(config, f"its layers hold {path}")
            found.append(Linear(name, group, module.out_features, module.in_features))
            continue
        # Norms are vectors; anything larger is an expert, a convolution, a table, ...
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 1:
                raise _refusal(config, f"its layers hold {path}.{name}, which is no linear layer")
    return tuple(found)


def _check_sizes(shape: Shape, config: PretrainedConfig) -> None:
    """Refuses linear layers of other sizes than attention and MLP of this shape have."""
    groups, hidden, mlp = shape.groups, shape.hidden, shape.intermediate
    uneven = {one.group for one in shape.linears if one.inputs != groups[one.group].inputs}
    heads = (hidden, shape.q + 2 * shape.kv), (shape.q, hidden)
    if uneven & {"qkv", "o"} or (groups["qkv"], groups["o"]) != heads:
        raise _refusal(config, "its attention is not that of plain heads")
    if "up" in uneven or groups["up"] not in ((hidden, mlp), (hidden, 2 * mlp)) or groups["down"].outputs != hidden:
        raise _refusal(config, "its MLP is not a plain one")


class NotPlainError(ValueError):
    """A model whose layers are not all alike, a plain attention and a plain MLP each."""


def _refusal(config: PretrainedConfig, reason: str) -> NotPlainError:
    return NotPlainError(f"{config.model_type}: {reason}")


# ---- The adapter ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lora:
    """A LoRA adapter: the rank of each linear layer that has one, and what else it trains."""

    ranks: Mapping[str, int]  # by the names of `Shape.linears`
    others: int = 0  # trained weights beside the factors on linear layers, over the whole model

    @classmethod
    def of(cls, shape: Shape, rank: int = 16) -> "Lora":
        """Makes one with the same rank on every linear layer but the head."""
        return cls({linear.name: rank for linear in shape.linears})

    @classmethod
    def read(cls, shape: Shape, config: LoraConfig) -> "Lora | None":
        """Reads PEFT's config; None if it trains something else too, or not the same in layers."""
        known, targets = [linear.name for linear in shape.linears], config.target_modules
        targets = known if targets == "all-linear" else targets
        more = [config.rank_pattern, config.use_dora, config.modules_to_save, config.trainable_token_indices]
        if any(more) or isinstance(targets, str) or not {*(targets or ())} <= {*known} or config.target_parameters:
            return None
        found = cls({name: config.r for name in known if name in (targets or ())})
        missing = shape.layers - len({*(config.layers_to_transform or range(shape.layers))})
        return cls(found.ranks, -missing * found.weights(shape) // shape.layers)

    def weights(self, shape: Shape) -> int:
        """Returns how many weights are trained."""
        factors = sum(self.ranks.get(one.name, 0) * (one.inputs + one.outputs) for one in shape.linears)
        return shape.layers * factors + self.others


# ---- By name --------------------------------------------------------------------------------------------------------

# Shapes by size, for planning without a config.
PRESETS: dict[str, tuple[str, Shape]] = {
    "1b": ("Llama 3.2 1B", Shape.llama(2048, 8192, 16, 32, 8, 128256, tied=True)),
    "3b": ("Llama 3.2 3B", Shape.llama(3072, 8192, 28, 24, 8, 128256, tied=True)),
    "7b": ("Llama 2 7B", Shape.llama(4096, 11008, 32, 32, 32, 32000)),
    "8b": ("Llama 3.1 8B", Shape.llama(4096, 14336, 32, 32, 8, 128256)),
    "13b": ("Llama 2 13B", Shape.llama(5120, 13824, 40, 40, 40, 32000)),
    "14b": ("Qwen3 14B", Shape.llama(5120, 17408, 40, 40, 8, 151936, head_dim=128, qk_norm=True)),
    "32b": ("Qwen3 32B", Shape.llama(5120, 25600, 64, 64, 8, 151936, head_dim=128, qk_norm=True)),
    "70b": ("Llama 3.1 70B", Shape.llama(8192, 28672, 80, 64, 8, 128256)),
    "405b": ("Llama 3.1 405B", Shape.llama(16384, 53248, 126, 128, 8, 128256)),
}
