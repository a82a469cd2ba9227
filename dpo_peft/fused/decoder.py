"""The layers of a model with LoRA, written out: transformers' function in fewer passes over memory.

A layer is four projections (`lora.py`) with element-wise kernels between them (`elementwise.py`, `heads.py`). Llama's:

    [q, k, v] = P1(norm(x));  o = attention(...);  h = x + P2(o);  [gate, up] = P3(norm(h));  out = h + P4(swiglu)

`DecoderLayer` says in what others differ. Where a half of a layer is nothing of the kind (experts, states), the
model's own modules run in its place. A checkpointed layer keeps its input alone, or also what attention gave, which is
not computed again then. Its recomputation stops before the last product where nothing follows it, whose result the
backward pass doesn't need: a quarter of the layer's weights less. `model.py` walks over the layers.

Shape suffixes: T tokens, H hidden size, N outputs of a projection, A attention heads, D head size.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .attention import Attended, Attention, Kind
from .elementwise import Norm, RMSNorm
from .heads import Angles, Heads, queries_keys_values
from .lora import Projection, ProjectionPass
from .own import Own, Surroundings
from .products import (
    ActivateProjectAdd,
    NormAdd,
    NormProject,
    ProjectAdd,
    activate_project_add,
    activate_project_backward,
)


@dataclass
class SelfAttention:
    """What the attention of a layer is made of."""

    qkv: Projection
    heads: Heads
    scaling: float
    window: int | None  # of sliding attention
    out: Projection
    rope: str | None = "all"  # which of the model's kinds of angles turn its heads; None: no positions
    extra: dict[str, Any] = field(default_factory=dict)  # keywords of `AttentionBackend.takes`

    @property
    def kind(self) -> Kind:
        """Returns what `bind` is to make for it."""
        return self.window, tuple(self.extra)


@dataclass
class FeedForward:
    """What the dense half of a layer is made of."""

    gate_up: Projection
    down: Projection
    activation: str = "silu"


@dataclass
class DecoderLayer:
    """What one layer is made of: x + post(mixer(norm(x))), and to that the same with the second half."""

    norm: Norm | None
    mixer: SelfAttention | Own
    mlp_norm: Norm | None
    mlp: FeedForward | Own
    post_norm: Norm | None = None
    mlp_post_norm: Norm | None = None
    times: float = 1.0  # factor of what both halves add
    scalar: Tensor | None = None  # factor of the layer's output
    parallel: bool = False  # both halves read norm(x)

    @property
    def projections(self) -> list[Projection]:
        """Returns them in the order of `LayerPass`."""
        mixer = [self.mixer.qkv, self.mixer.out] if isinstance(self.mixer, SelfAttention) else []
        return mixer + ([self.mlp.gate_up, self.mlp.down] if isinstance(self.mlp, FeedForward) else [])

    @property
    def own(self) -> list[Own]:
        """Returns the halves that the model's own modules compute."""
        return [half for half in (self.mixer, self.mlp) if isinstance(half, Own)]

    @property
    def ends_in_product(self) -> bool:
        """Whether nothing follows the last product but the sum with the residual stream."""
        return isinstance(self.mlp, FeedForward) and self.mlp_post_norm is None and self.scalar is None


@dataclass
class LayerPass:
    """A layer in one pass over the model: its adapters as they are now, and the batch's layout."""

    layer: DecoderLayer
    parts: list[ProjectionPass]  # as `DecoderLayer.projections`
    attention: Attention | None
    angles: tuple[Angles | None, Angles | None]  # of queries and of keys
    around: Surroundings
    given: tuple[Tensor, Tensor] | None = None  # keys and values of the tokens before the queries
    gives: bool = False  # whether its own are kept, for other passes
    keeps: bool = False  # whether what attention gave is kept, for when the layer is computed again
    attended: Attended | None = field(init=False, default=None)
    keys_values: tuple[Tensor, Tensor] | None = field(init=False, default=None)
    parameters: tuple[Tensor, ...] = field(init=False)  # the adapters' masters, those of the last projection last

    def __post_init__(self) -> None:
        own = [p for half in self.layer.own for p in half.trained()]
        self.parameters = (*own, *(p for part in self.parts for p in part.parameters))

    def mix(self, x_TH: Tensor) -> Tensor:
        """Returns the residual stream after the layer's first half."""
        layer, mixer = self.layer, self.layer.mixer
        if isinstance(mixer, Own):
            (y_TH,) = mixer(self.around, _norm(x_TH, layer.norm), x_TH)
            return self._add(x_TH, y_TH, layer.post_norm)
        qkv, x_TH = NormProject.apply(x_TH, layer.norm, self.parts[0], *self.parts[0].parameters)
        residual_TH, times = (x_TH, layer.times) if layer.post_norm is None else (None, 1.0)
        y_TH = ProjectAdd.apply(residual_TH, self.attend(mixer, qkv), self.parts[1], times, *self.parts[1].parameters)
        return y_TH if layer.post_norm is None else self._add(x_TH, y_TH, layer.post_norm)

    def attend(self, mixer: SelfAttention, qkv: Tensor) -> Tensor:
        """Returns what attention makes of q, k and v, (T, N) to (T, A * D)."""
        assert self.attention is not None
        q, k, v, *gate = queries_keys_values(qkv, mixer.heads, *self.angles, self.attention.places)
        if self.gives:
            self.keys_values = k, v
        if self.given is not None:
            k, v = (self.attention.joined(*pair) for pair in zip(self.given, (k, v), strict=True))
        reads = q, k, v, mixer.scaling, mixer.window
        if self.attended is not None:
            out = self.attended.resume(q, k, v)
        elif self.keeps:
            self.attended = Attended(self.attention.attend, *reads, **mixer.extra)
            out = self.attended.out
        else:
            out = self.attention.attend(*reads, **mixer.extra)
        for gate_TAD in gate:
            out = out * torch.sigmoid(gate_TAD)
        return out.flatten(1)

    def until_down(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the residual stream after the first half, and [gate, up]."""
        part, norm = self.parts[-2], self.layer.mlp_norm
        if self.layer.parallel:
            gate_up, x_TH = NormProject.apply(x_TH, norm, part, *part.parameters)
            return self.mix(x_TH), gate_up
        gate_up, x_TH = NormProject.apply(self.mix(x_TH), norm, part, *part.parameters)
        return x_TH, gate_up

    def __call__(self, x_TH: Tensor) -> tuple[Tensor, ...]:
        """Returns the layer's output, and what its routers gave; everything that the backward pass needs is kept."""
        layer, mlp, logits = self.layer, self.layer.mlp, []
        if isinstance(mlp, Own):
            x_TH = self.mix(x_TH)
            y_TH, *logits = mlp(self.around, _norm(x_TH, layer.mlp_norm), x_TH)
            x_TH = self._add(x_TH, y_TH, layer.mlp_post_norm)
        else:
            x_TH, gate_up = self.until_down(x_TH)
            residual_TH, times = (x_TH, layer.times) if layer.mlp_post_norm is None else (None, 1.0)
            down = self.parts[-1]
            y_TH = ActivateProjectAdd.apply(residual_TH, gate_up, down, mlp.activation, times, *down.parameters)
            x_TH = y_TH if layer.mlp_post_norm is None else self._add(x_TH, y_TH, layer.mlp_post_norm)
        return x_TH if layer.scalar is None else x_TH * layer.scalar, *logits

    def _add(self, residual_TH: Tensor, y_TH: Tensor, norm: Norm | None) -> Tensor:
        if norm is not None:
            return NormAdd.apply(residual_TH, y_TH, norm)
        return torch.add(residual_TH, y_TH, alpha=self.layer.times)


def _norm(x_TH: Tensor, norm: Norm | None) -> Tensor:
    return x_TH if norm is None else RMSNorm.apply(x_TH, norm)


class Checkpointed(torch.autograd.Function):
    """A layer that keeps its input alone (Chen et al. 2016), and whose recomputation ends before its last product."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, layer: LayerPass, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x_TH)
        ctx.layer = layer
        return without_keeping(layer, x_TH)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        layer: LayerPass = ctx.layer
        x_TH = ctx.saved_tensors[0].detach().requires_grad_(ctx.needs_input_grad[0])
        inputs, mlp = [x_TH, *layer.parameters], layer.layer.mlp
        down_grads: list[Tensor | None] = []
        with torch.enable_grad():
            if layer.layer.ends_in_product and isinstance(mlp, FeedForward) and grad_outputs[0] is not None:
                outputs: tuple[Tensor, ...] = layer.until_down(x_TH)
                part = layer.parts[-1]
                grad_gate_up, down_grads = activate_project_backward(
                    grad_outputs[0], outputs[1].detach(), part, mlp.activation, layer.layer.times
                )
                grad_outputs = (grad_outputs[0], grad_gate_up)
                inputs = inputs[: len(inputs) - len(part.parameters)]
            else:
                outputs = layer(x_TH)
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        given = [(y, g) for y, g in zip(outputs, grad_outputs, strict=True) if y.requires_grad and g is not None]
        ys, gs = zip(*given, strict=True) if given else ((), ())
        found = iter(torch.autograd.grad(ys, wanted, gs, allow_unused=True) if wanted else ())
        grad_x_TH, *grads = [next(found) if tensor.requires_grad else None for tensor in inputs]
        return grad_x_TH, None, *grads, *down_grads


def without_keeping(layer: LayerPass, x_TH: Tensor) -> tuple[Tensor, ...]:
    mlp = layer.layer.mlp
    with torch.no_grad():
        if not layer.layer.ends_in_product or not isinstance(mlp, FeedForward):
            return layer(x_TH)
        residual_TH, gate_up = layer.until_down(x_TH)
        times = layer.layer.times
        return (activate_project_add(residual_TH, gate_up, layer.parts[-1], mlp.activation, times, in_place=True),)
