"""How much GPU memory training takes, predicted from shapes: `MemoryModel`. docs/planning.md explains the figures.

Every number that isn't the size of a tensor stands in the block of constants below.

Symbols: T tokens, S gathered keys (of a pair with prompt p and completions a, b: p + (p+a) + (p+b)), P predicted
tokens, H hidden size, F width of the MLP, Q and G widths of all query and all key heads, V vocabulary, R ranks of a
group of linear layers together, e bytes of an element that is computed with.
"""

import copy
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..errors import OptionError
from ..forward.modules import first_adapted
from .fused_layer import FusedLayer
from .layers import active_weights, aligned, layer_bytes, placed_bytes
from .shapes import GROUPS, Lora, NotPlainError, Shape
from .sketch import LayerCost, Sketch, nf4_bytes

if TYPE_CHECKING:
    from peft import PeftModel

    from ..model.loading import StorageReport

GIB = 2**30

# ---- Constants ------------------------------------------------------------------------------------------------------

# What a process takes of a GPU besides tensors: CUDA's context, library workspaces, the allocator's rounding.
RESERVE = 0.6 * GIB

# Bytes of optimizer state per trained weight. 8-bit state has a float32 scale per 256 values.
_8BIT = 1 + 4 / 256
OPTIMIZERS = {
    **dict.fromkeys("adamw_torch adamw_torch_fused adamw_torch_xla adamw_anyprecision stable_adamw".split(), 8),
    **dict.fromkeys("paged_adamw_32bit schedule_free_adamw schedule_free_radam".split(), 8),
    **dict.fromkeys("adamw_bnb_8bit adamw_8bit adamw_torch_8bit paged_adamw_8bit".split(), 2 * _8BIT),
    **dict.fromkeys("ademamix paged_ademamix_32bit grokadamw".split(), 12),
    **dict.fromkeys("ademamix_8bit paged_ademamix_8bit".split(), 3 * _8BIT),
    **dict.fromkeys("lion_32bit paged_lion_32bit rmsprop rmsprop_bnb rmsprop_bnb_32bit adagrad".split(), 4),
    **dict.fromkeys("lion_8bit paged_lion_8bit rmsprop_bnb_8bit".split(), _8BIT),
    **dict.fromkeys("adafactor schedule_free_sgd".split(), 4),
    "adamw_torch_4bit": 2 * (0.5 + 4 / 128),
    "sgd": 0,
}

CHUNK_ROWS = 1024  # rows of logits that the head has at a time
# Bytes per logit beside these in e bytes: fused kernels compute in place; else float32 logits and their exponentials.
HEAD_PLAIN = 8
MARGIN = 1.03  # on what the model's own layers keep: kernels differ a little from those that fake tensors run

# ---- One micro-batch ------------------------------------------------------------------------------------------------

# Components that don't exist at the same time: the head is done before the last layer's backward begins.
LAYER_PHASE = ("layer_backward", "dequantized_weights")
HEAD_PHASE = ("head",)


@dataclass(frozen=True)
class MemoryModel:
    """Predicts bytes of GPU memory: fixed ones, and those of a micro-batch.

    `fused` layers are those of the folder `fused`; others are those of transformers with PEFT under autocast. Plain
    fused ones are counted by their `Shape`; all others, and fused ones of other kinds, which keep less, by what the
    model's own layers keep in a `Sketch`.
    """

    shape: Shape | Sketch
    lora: Lora  # of a `Shape`
    quantized: float  # bytes of weights in 4 bits
    unquantized: float  # bytes of the base's other weights
    trained: int  # trained weights; their masters are float32
    reference: float = 0  # bytes of a frozen adapter
    optimizer: str = "adamw_torch_fused"
    element: int = 2  # e
    fused: bool = True
    packed: bool = False  # attention reads the packed row as it is; else keys and values are gathered
    offload: bool = False  # the inputs of checkpointed layers are in the CPU's memory
    chunk_rows: int = CHUNK_ROWS
    row: float | None = None  # tokens of a row, by which attention that keeps its probabilities keeps more; a sketch's
    layer_bytes: tuple[float, ...] = field(default=(), compare=False)  # of each decoder layer, what can come and go
    streamed: int = 0  # of these layers, so many lie in the CPU's memory, spread evenly
    shards: int = 1  # processes over which all of these layers are sharded
    first: int = 0  # the first layer with an adapter: fused layers below keep nothing, nor do they compute twice

    @classmethod
    def of_sketch(
        cls,
        sketch: Sketch,
        *,
        quantize: bool = True,
        nested: bool = True,
        weight_bytes: int = 2,
        reference: int = 0,
        **options: Any,
    ) -> "MemoryModel":
        """Predicts for a model that isn't loaded, of any family; `reference` is the weights of a frozen adapter.

        Others are as for `of_shape`.
        """
        small, rest = sketch.stored(quantize, nested, weight_bytes)
        layers = layer_bytes(sketch, quantize, nested, weight_bytes)
        return cls(sketch, Lora({}), small, rest, sketch.trained, 4 * reference, layer_bytes=layers, **options)

    @classmethod
    def of_shape(
        cls,
        shape: Shape,
        lora: Lora | None = None,
        *,
        quantize: bool = True,
        nested: bool = True,
        weight_bytes: int = 2,
        reference: Lora | None = None,
        **options: Any,
    ) -> "MemoryModel":
        """Predicts for a model that isn't loaded, with fused layers.

        Args:
            shape: of the base.
            lora: the adapter; rank 16 on every linear layer if None.
            quantize: whether linear layers but the head are in NF4.
            nested: whether with double quantization.
            weight_bytes: of a weight that isn't quantized.
            reference: a frozen adapter beside the trained one.
            options: the fields `optimizer`, `element`, `fused`, `packed`, `offload`, `chunk_rows`, `row`, `streamed`,
                `shards`.
        """
        lora = lora or Lora.of(shape)
        sizes = [linear.weights for linear in shape.linears]
        small = shape.layers * sum(nf4_bytes(size, nested) for size in sizes)
        placed = sum(placed_bytes(size, nested) if quantize else aligned(weight_bytes * size) for size in sizes)
        return cls(
            shape,
            lora,
            quantized=small if quantize else 0,
            unquantized=weight_bytes * (shape.unquantized_weights if quantize else shape.weights),
            trained=lora.weights(shape),
            reference=4 * reference.weights(shape) if reference else 0,
            layer_bytes=(placed,) * shape.layers,
            **options,
        )

    @classmethod
    def of_model(cls, model: "PeftModel", stored: "StorageReport", **options: Any) -> "MemoryModel":
        """Predicts for a loaded PEFT model, the adapter to train active.

        Args:
            model: not only of plain layers.
            stored: `storage_report(model)`, whose bytes are taken.
            options: as for `of_shape`, and `layer_bytes`.

        Raises:
            OptionError: a model whose memory can't be predicted.
        """
        stored_bytes = stored.quantized, stored.unquantized, stored.trainable_count, stored.reference_adapter
        first = first_adapted(model)
        try:
            if not options.get("fused", True):
                raise NotPlainError("its own layers run")
            shape = Shape.of(model.config)
        except NotPlainError:
            adapter = copy.copy(model.peft_config[model.active_adapters[0]])
            adapter.target_parameters = None
            adapter.target_modules = {
                name.removeprefix("base_model.model.")
                for name, module in model.named_modules()
                if hasattr(module, "lora_A") and not hasattr(module, "parameter_name")  # of experts
            }
            return cls(Sketch(model.config, adapter), Lora({}), *stored_bytes, first=first, **options)
        ranks = {linear.name: 0 for linear in shape.linears}
        for path, module in model.named_modules():
            if hasattr(module, "lora_A") and (name := path.rsplit(".", 1)[-1]) in ranks:
                ranks[name] = max([ranks[name], *(module.r.get(adapter, 0) for adapter in module.active_adapters)])
        lora = Lora({name: rank for name, rank in ranks.items() if rank})
        lora = Lora(lora.ranks, stored.trainable_count - lora.weights(shape))
        return cls(shape, lora, *stored_bytes, first=first, **options)

    @property
    def layers(self) -> int:
        """How many decoder layers there are."""
        return self.shape.layers

    @property
    def placed(self) -> tuple[float, ...]:
        """Bytes of each layer that comes and goes; none if all are there at all times."""
        count = len(self.layer_bytes)
        if self.shards > 1:
            return self.layer_bytes
        return tuple(self.layer_bytes[i * count // self.streamed] for i in range(self.streamed))

    @property
    def token_flops(self) -> float:
        """Floating-point operations of a token's way through the decoder layers; attention's own are not counted."""
        if isinstance(self.shape, Sketch):
            return 2 * active_weights(self.shape)
        return 2 * self.layers * sum(linear.weights for linear in self.shape.linears)

    @property
    def ranks(self) -> list[int]:
        """Which ranks layers have."""
        if isinstance(self.shape, Sketch):
            return sorted({self.shape.lora.r, *self.shape.lora.rank_pattern.values()})
        return sorted(set(self.lora.ranks.values()))

    @cached_property
    def fixed(self) -> dict[str, float]:
        """Bytes that are there whatever the micro-batch; an OptionError for an optimizer whose state isn't known."""
        if self.optimizer not in OPTIMIZERS:
            raise OptionError(
                f"optim={self.optimizer!r}: how much memory it takes is not known to the planner. Use one of "
                f"{', '.join(OPTIMIZERS)}."
            )
        away = sum(self.placed)
        of_quantized = min(away, self.quantized)
        return {
            "quantized_weights": self.quantized - of_quantized,
            "unquantized_weights": self.unquantized - (away - of_quantized),
            **self._present,
            "adapter": 4 * self.trained,
            "adapter_working_copy": self._working_copy(),
            "optimizer_state": OPTIMIZERS[self.optimizer] * self.trained,
            "gradients": 4 * self.trained,
            "reference_adapter": self.reference,
        }

    @property
    def _present(self) -> dict[str, float]:
        """Bytes that there are of layers that come and go: this process's shards, and the layers that are open."""
        if not (placed := self.placed):
            return {}
        # The one that runs and the next; and FSDP2 gathers into a buffer, from which it copies.
        two = max(sum(placed[i : i + 2]) for i in range(len(placed)))
        if self.shards == 1:
            return {"open_layers": two}
        return {"shard": sum(-(-one // self.shards) for one in placed), "open_layers": two + max(placed)}

    def components(
        self, tokens: float, keys: float, predicted: float, checkpoint_layers: int, given: float = 0, attended: int = 0
    ) -> dict[str, float]:
        """Returns the bytes by component when a micro-batch of T, S and P is back-propagated; their sum is above the
        peak, see there.

        Of the first `checkpoint_layers` layers the input alone is kept, in `attended` of them what attention gave too;
        of the first `given` tokens, which an answer-only adapter leaves to the base, the keys and values that these
        layers read.
        """
        T, S, P, shape, e = tokens, keys, predicted, self.shape, self.element
        own, read = T - given, S - given
        per_logit = e if self.fused else e + HEAD_PLAIN
        states = 3 * e * P * shape.hidden  # before and after the final norm, and the gradient
        return {
            **self.fixed,
            "saved_activations": self._saved(own, read, checkpoint_layers, given, attended),
            "layer_backward": max(self._backward(own, read), self._forward(max(given, own)) if given else 0),
            "dequantized_weights": self._scratch,
            "head": min(self.chunk_rows, P) * shape.vocab * per_logit + states,
            # int64: ids, positions, segments, contexts, samples and places per token, sources of keys, targets; the
            # angles of positions; log-probs and their gradients.
            "index_tensors": 8 * (8 * T + S + 3 * P) + 2 * e * T * shape.head_dim + 16 * P,
        }

    def peak(self, *size: Any, **more: Any) -> float:
        """Returns the bytes at the worst moment: all components, of the head and a layer's backward the larger."""
        parts = self.components(*size, **more)
        head, layer = (sum(parts[name] for name in phase) for phase in (HEAD_PHASE, LAYER_PHASE))
        return sum(parts.values()) - min(head, layer)

    def checkpoint_layers_for(
        self, tokens: float, keys: float, predicted: float, limit: float, given: float = 0
    ) -> int:
        """Returns the fewest layers to checkpoint so that the peak is within `limit` bytes; all if none is enough.

        Layers that aren't fused are checkpointed all or none, as transformers does it.
        """
        own, read = tokens - given, keys - given
        others = self.peak(tokens, keys, predicted, 0, given) - self._saved(own, read, 0, given)

        def fits(layers: int) -> bool:
            return others + self._saved(own, read, layers, given) <= limit

        if not self.fused:
            return 0 if fits(0) else self.layers
        return bisect_left(range(self.layers), True, key=fits)  # the peak never grows with checkpointed layers

    def largest_tokens(
        self,
        limit: float,
        checkpoint_layers: int,
        keys_per_token: float = 1.5,
        predicted_share: float = 0.75,
        given_share: float = 0,
    ) -> int:
        """Returns the most tokens of a micro-batch whose peak is within `limit` bytes; 0 if there is no room for one.
        `keys_per_token`, `predicted_share` and `given_share` are those of S, P and given tokens in T."""
        S, P, given = keys_per_token, predicted_share, given_share
        return _largest(lambda n: self.peak(n, n * S, n * P, checkpoint_layers, n * given) <= limit)

    def longest_row(self, limit: float, checkpoint_layers: int, answers: int = 2) -> int:
        """Returns the longest prompt + completion, in tokens, of which one sample with `answers` completions fits
        however prompt and completions share it."""

        def fits(n: int) -> bool:
            of_this_row = replace(self, row=n)
            all_completion = of_this_row.peak(answers * n, answers * n, answers * n, checkpoint_layers)
            all_prompt = of_this_row.peak(n, (answers + 1) * n, answers, checkpoint_layers)
            return max(all_completion, all_prompt) <= limit

        return _largest(fits)

    # ---- The parts ----

    @cached_property
    def _ranks(self) -> dict[str, int]:
        """R by group, as the fused layers round it up: to a multiple of 8."""
        assert isinstance(self.shape, Shape)
        ranks = dict.fromkeys(GROUPS, 0)
        for linear in self.shape.linears:
            ranks[linear.group] += self.lora.ranks.get(linear.name, 0)
        return {name: -(-rank // 8) * 8 for name, rank in ranks.items()}

    def _working_copy(self) -> float:
        if isinstance(self.shape, Sketch):  # autocast casts every trained weight once a pass
            return self.element * self.trained if self.element < 4 else 0
        # A of a group stacked, (R, inputs), and its Bs block by block, (outputs, R).
        sizes = (self._ranks[name] * (inputs + outputs) for name, (inputs, outputs) in self.shape.groups.items())
        return self.element * self.shape.layers * sum(sizes)

    @cached_property
    def _scratch(self) -> float:
        """The bytes of the largest weights that are dequantized for one product."""
        if isinstance(self.shape, Sketch):  # one linear layer, or expert, at a time
            return self.shape.unpacked(self.element) if self.quantized else 0
        groups = self.shape.groups.items()
        return self.element * max((inputs + self._ranks[name]) * outputs for name, (inputs, outputs) in groups)

    def _saved(self, T: float, S: float, checkpoint_layers: int, given: float = 0, attended: int = 0) -> float:
        """Returns the bytes of saved activations; of `given` tokens keys and values alone."""
        below = self.first if self.fused else 0  # the first layer that keeps anything
        checkpointed = max(checkpoint_layers - below, 0)
        read = checkpointed * 2 * self.element * given * self._kv
        # The last layers are the ones that keep everything: it is freed before the first checkpointed layer is
        # recomputed, which then has as much again. So one layer at least counts in full.
        if isinstance(self.shape, Shape):
            input_of_one, kept = self.element * T * self.shape.hidden, self.layer.kept(T, S)
            input_of_one, others = 0.0 if self.offload else input_of_one, self.shape.layers - below - checkpointed
            read += attended * self.layer.attended(T)
            return read + checkpointed * input_of_one + max(others * kept, kept - input_of_one)
        costs = self.shape.costs
        whole = [self._own(one, T, S) for one in costs.layers[below:]]
        held = [0.0 if self.offload else one.inputs.at(T) for one in costs.layers[below:]]
        first = checkpointed
        # Before the backward pass; and when a checkpointed layer is recomputed and those after it are done.
        moments = [sum(held[:first]) + sum(whole[first:]), *(sum(held[:i]) + whole[i] for i in range(first))]
        return read + MARGIN * self.element / 2 * (max(moments) + costs.rest.at(T))

    @cached_property
    def layer(self) -> FusedLayer:
        """A fused layer of a `Shape`."""
        assert isinstance(self.shape, Shape)
        return FusedLayer(self.shape, self.element, self.packed, self._ranks)

    def _forward(self, T: float) -> float:
        """Returns the bytes that a layer needs to compute tokens of which it keeps nothing."""
        if isinstance(self.shape, Shape):
            return self.layer.forward(T)
        return self.element / 2 * max(self._own(one, T, T) for one in self.shape.costs.layers)

    def _own(self, layer: LayerCost, T: float, S: float) -> float:
        """Returns what one of the model's own layers keeps, with keys and values gathered."""
        unpacked = layer.unpacked if self.quantized else 0
        return layer.kept.at(T, self.row) + layer.keys.per_token * max(S - T, 0) + unpacked

    def _backward(self, T: float, S: float) -> float:
        """Returns the bytes that a layer's backward needs beside what is kept."""
        if isinstance(self.shape, Shape):
            return max(self.layer.phases(T, S).values())
        more = max(S - T, 0)
        layers = set(self.shape.costs.layers)
        return self.element / 2 * max(one.backward.at(T, self.row) + one.keys.per_token * more for one in layers)

    @property
    def _kv(self) -> float:
        """The elements of a token's keys in a layer."""
        if isinstance(self.shape, Shape):
            return self.shape.kv
        return max(one.keys.per_token for one in self.shape.costs.layers) / (2 * self.element)


def _largest(fits: Callable[[int], bool]) -> int:
    """Returns the largest n from 0 that fits, of a size that fits only if all smaller ones do."""
    return bisect_left(range(2**40), True, key=lambda n: not fits(n + 1))
