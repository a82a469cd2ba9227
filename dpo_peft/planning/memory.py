"""How much GPU memory training takes, predicted from shapes: `MemoryModel`. docs/planning.md explains the figures.

Every number that isn't the size of a tensor stands in the block of constants below.

Symbols: T tokens, S gathered keys (of a pair with prompt p and answers a, b: p + (p+a) + (p+b)), P predicted tokens,
H hidden size, F width of the MLP, Q and G widths of all query and all key heads, V vocabulary, R ranks of a group of
linear layers together, e bytes of an element that is computed with.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from ..errors import OptionError
from .shapes import GROUPS, Lora, Shape, nf4_bytes

GIB = 2**30

# ---- Constants ------------------------------------------------------------------------------------------------------

# What a process takes on a card besides tensors: CUDA's context, library workspaces, the allocator's rounding.
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
# Bytes per logit: in place in fused kernels; else float32 logits, their exponentials, and these in e bytes.
HEAD_FUSED, HEAD_PLAIN = 0, 8  # each + e

# Widths of the MLP that the backward of a plain one has at a time: gradients of the product, of its factors and of the
# activation's input, and one more for the adapter's share. An approximation; the fused layers' are counted.
PLAIN_MLP_GRADIENTS = 5

# Measured over predicted bytes of saved activations and of a layer's backward, to calibrate with; 1 as long as the
# sizes of tensors explain what is measured.
SAVED_FACTOR, BACKWARD_FACTOR = 1.0, 1.0


def optimizer_bytes(optimizer: str) -> float:
    """Bytes of state per trained weight.

    Raises:
        OptionError: an optimizer whose state isn't known here.
    """
    if optimizer not in OPTIMIZERS:
        raise OptionError(
            f"optim={optimizer!r}: how much memory it takes is not known to the planner. Use one of "
            f"{', '.join(OPTIMIZERS)}."
        )
    return OPTIMIZERS[optimizer]


class Stored(Protocol):
    """What is read of `modeling.StorageReport`: counted bytes of a loaded model."""

    quantized: int
    unquantized: int
    reference_adapter: int
    trainable_count: int


# ---- One micro-batch ------------------------------------------------------------------------------------------------

# Components that don't exist at the same time: the head is done before the last layer's backward begins.
LAYER_PHASE = ("layer_backward", "dequantized_weights")
HEAD_PHASE = ("head",)


@dataclass(frozen=True)
class MemoryModel:
    """Predicts bytes of GPU memory: fixed ones, and those of a micro-batch.

    With `fused` layers as those of `forward/fused.py`; else those of transformers with PEFT under autocast.
    """

    shape: Shape
    lora: Lora
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
        """Of a model that isn't loaded.

        Args:
            shape: of the base.
            lora: the adapter; rank 16 on every linear layer if None.
            quantize: whether linear layers but the head are in NF4.
            nested: whether with double quantisation.
            weight_bytes: of a weight that isn't quantised.
            reference: a frozen adapter beside the trained one.
            options: the fields `optimizer`, `element`, `fused`, `packed`, `offload`, `chunk_rows`.
        """
        lora = lora or Lora.of(shape)
        small = shape.layers * sum(nf4_bytes(linear.weights, nested) for linear in shape.linears)
        return cls(
            shape,
            lora,
            quantized=small if quantize else 0,
            unquantized=weight_bytes * (shape.unquantized_weights if quantize else shape.weights),
            trained=lora.weights(shape),
            reference=4 * reference.weights(shape) if reference else 0,
            **options,
        )

    @classmethod
    def of_model(cls, model: Any, stored: Stored, **options: Any) -> "MemoryModel":
        """Of a loaded PEFT model.

        Args:
            model: with the adapter to train active.
            stored: `storage_report(model)`, whose bytes are taken.
            options: as for `of_shape`.

        Raises:
            OptionError: not a plain decoder.
        """
        shape = Shape.of(model.config)
        ranks: dict[str, int] = {}
        for name, module in model.named_modules():
            if hasattr(module, "lora_A"):
                short = name.rsplit(".", 1)[-1]
                ranks[short] = max([ranks.get(short, 0), *(module.r.get(a, 0) for a in module.active_adapters)])
        ranks = {linear.name: ranks[linear.name] for linear in shape.linears if ranks.get(linear.name)}
        lora = Lora(ranks)
        return cls(
            shape,
            Lora(ranks, stored.trainable_count - lora.weights(shape)),
            quantized=stored.quantized,
            unquantized=stored.unquantized,
            trained=stored.trainable_count,
            reference=stored.reference_adapter,
            **options,
        )

    @cached_property
    def fixed(self) -> dict[str, float]:
        """Bytes that are there whatever the micro-batch."""
        return {
            "quantized_weights": self.quantized,
            "unquantized_weights": self.unquantized,
            "adapter": 4 * self.trained,
            "adapter_working_copy": self._working_copy(),
            "optimizer_state": optimizer_bytes(self.optimizer) * self.trained,
            "gradients": 4 * self.trained,
            "reference_adapter": self.reference,
        }

    def components(self, tokens: float, keys: float, predicted: float, checkpoint_layers: int) -> dict[str, float]:
        """Bytes by component when a micro-batch is back-propagated.

        Args:
            tokens, keys, predicted: T, S and P.
            checkpoint_layers: how many of the first layers keep their input alone.

        Returns:
            In the order of a table. Their sum is above the peak: see `peak`.
        """
        return {
            **self.fixed,
            "saved_activations": self._saved(tokens, keys, checkpoint_layers),
            "layer_backward": self._backward(tokens, keys),
            "dequantized_weights": self._scratch,
            "head": self._head(predicted),
            "index_tensors": self._index_tensors(tokens, keys, predicted),
        }

    def peak(self, tokens: float, keys: float, predicted: float, checkpoint_layers: int) -> float:
        """Bytes at the worst moment: all components, but of the head and a layer's backward only the larger."""
        return self._unsaved(tokens, keys, predicted) + self._saved(tokens, keys, checkpoint_layers)

    def checkpoint_layers_for(self, tokens: float, keys: float, predicted: float, limit: float) -> int:
        """The fewest layers to checkpoint so that the peak is within `limit` bytes; all of them if none is enough.

        Layers that aren't fused are checkpointed all or none, as transformers does it.
        """
        unsaved = self._unsaved(tokens, keys, predicted)
        if not self.fused:
            return 0 if unsaved + self._saved(tokens, keys, 0) <= limit else self.shape.layers
        low, high = 0, self.shape.layers
        while low < high:  # the peak never grows with the number of checkpointed layers
            middle = (low + high) // 2
            if unsaved + self._saved(tokens, keys, middle) <= limit:
                high = middle
            else:
                low = middle + 1
        return low

    def largest_tokens(
        self, limit: float, checkpoint_layers: int, keys_per_token: float = 1.5, predicted_share: float = 0.75
    ) -> int:
        """The most tokens of a micro-batch whose peak is within `limit` bytes; 0 if there is no room for one."""

        def fits(n: int) -> bool:
            return self.peak(n, n * keys_per_token, n * predicted_share, checkpoint_layers) <= limit

        return _largest(fits)

    def longest_row(self, limit: float, checkpoint_layers: int, answers: int = 2) -> int:
        """The longest prompt + answer, in tokens, of which one sample fits however prompt and answers share it."""

        def fits(n: int) -> bool:
            all_answer = self.peak(answers * n, answers * n, answers * n, checkpoint_layers)
            all_prompt = self.peak(n, (answers + 1) * n, answers, checkpoint_layers)
            return max(all_answer, all_prompt) <= limit

        return _largest(fits)

    # ---- The parts ----

    def _rank(self, group: str) -> int:
        """R; the fused layers round it up to a multiple of 8."""
        rank = self.lora.rank(self.shape, group)
        return -(-rank // 8) * 8 if self.fused else rank

    def _working_copy(self) -> float:
        if not self.fused:  # autocast casts every trained weight once a pass
            return self.element * self.trained if self.element < 4 else 0
        shape = self.shape
        # A of a group stacked, (R, inputs), and its Bs block by block, (outputs, R).
        sizes = (self._rank(g) * (shape.group(g)[0].inputs + shape.group_outputs(g)) for g in GROUPS)
        return self.element * shape.layers * sum(sizes)

    def _unsaved(self, T: float, S: float, P: float) -> float:
        """The peak but for saved activations."""
        layer = self._backward(T, S) + self._scratch
        return self._fixed + self._index_tensors(T, S, P) + max(layer, self._head(P))

    def _backward(self, T: float, S: float) -> float:
        return BACKWARD_FACTOR * max(self.phases(T, S).values())

    @cached_property
    def _fixed(self) -> float:
        return sum(self.fixed.values())

    def _saved(self, T: float, S: float, checkpoint_layers: int) -> float:
        kept, inputs = self._kept(T, S), self.element * T * self.shape.hidden
        others = self.shape.layers - checkpoint_layers
        # The last layers are the ones that keep everything: it is freed before the first checkpointed layer is
        # recomputed, which then has as much again. So one layer at least counts in full.
        held = 0.0 if self.offload else inputs
        saved = checkpoint_layers * held + max(others * kept, kept - held)
        if not self.fused:  # transformers' final norm keeps its input in float32 and its output
            saved += (4 + self.element) * T * self.shape.hidden
        return SAVED_FACTOR * saved

    def _kept(self, T: float, S: float) -> float:
        """Bytes that a layer keeps for its backward if it isn't checkpointed."""
        shape, e = self.shape, self.element
        H, Q, G, F = shape.hidden, shape.q, shape.kv, shape.intermediate
        # q, attention's output and its float32 log-sum-exp; k and v gathered.
        attention = T * (2 * e * Q + 4 * shape.heads) + 2 * e * (T if self.packed else S) * G
        if self.fused:
            # The layer's input, the residual after attention, gate and up; the input of norms on q and k.
            return attention + e * T * (2 * H + shape.group_outputs("up") + (Q + 2 * G) * shape.qk_norm)
        # Norms keep their input in float32. The activation keeps its inputs, and if gated also its output. Each
        # adapter keeps its input and what its A makes of it, in a copy of its own.
        adapters = sum(one.inputs + self.lora.ranks[one.name] for one in shape.linears if one.name in self.lora.ranks)
        return attention + T * (2 * 4 * H + e * (F * (3 if shape.gated else 1) + adapters))

    def phases(self, T: float, S: float) -> dict[str, float]:
        """Bytes that a layer's backward needs beside what is kept, phase by phase; the largest counts."""
        shape, e = self.shape, self.element
        H, Q, G, F = shape.hidden, shape.q, shape.kv, shape.intermediate
        N = Q + 2 * G
        gradient = e * T * 2 * H  # of the layer's output and of the residual stream
        extended = {group: e * T * (shape.group(group)[0].inputs + self._rank(group)) for group in GROUPS}
        # The flash kernel: gradients of output and of q, the latter also in float32; of k and v for every query head.
        flash = T * (e * 2 * Q + 4 * Q) + 2 * e * S * (Q + (G if G < Q else 0))
        if self.packed:  # gradients of output, q, k and v, and a float32 number per query
            flash = T * (e * (2 * Q + 2 * G) + 4 * shape.heads)
        if self.fused:
            return {
                "down": gradient + extended["down"],  # gradient of [activation, ranks], the activation after that
                "up": gradient + 2 * extended["up"],  # normed input and its gradient, with ranks
                "o": gradient + 2 * extended["o"],
                "attention": gradient + flash,
                "qkv": gradient + 2 * extended["qkv"] + e * T * N,
            }
        return {
            "mlp": gradient + e * T * PLAIN_MLP_GRADIENTS * F,
            "norm": gradient + 4 * T * 2 * H,  # float32 inside
            "attention": gradient + flash,
            "qkv": gradient + e * T * (N + 3 * H),
        }

    @cached_property
    def _scratch(self) -> float:
        if not self.quantized and not self.fused:
            return 0
        if not self.fused:  # one linear layer at a time
            return self.element * max(linear.weights for linear in self.shape.linears)
        groups = ((self.shape.group(g)[0].inputs + self._rank(g)) * self.shape.group_outputs(g) for g in GROUPS)
        return self.element * max(groups)

    def _head(self, P: float) -> float:
        rows = min(self.chunk_rows, P)
        # Hidden states before and after the final norm, and the gradient.
        states = 3 * self.element * P * self.shape.hidden
        return rows * self.shape.vocab * (self.element + (HEAD_FUSED if self.fused else HEAD_PLAIN)) + states

    def _index_tensors(self, T: float, S: float, P: float) -> float:
        # int64: ids, positions, segments, contexts, samples and places per token, sources of keys, targets; the
        # angles of positions; log-probs and their gradients.
        return 8 * (8 * T + S + 3 * P) + 2 * self.element * T * self.shape.head_dim + 16 * P


def _largest(fits: Callable[[int], bool]) -> int:
    """The largest n from 0 that fits, of a size that fits only if all smaller ones do."""
    if not fits(1):
        return 0
    high = 2
    while fits(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
