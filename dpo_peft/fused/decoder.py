"""The decoder of Llama-like models with LoRA, written out: transformers' function in fewer passes over memory.

A layer is four projections (`lora.py`) with element-wise kernels between them (`elementwise.py`):

    [q, k, v] = P1(norm(x));  o = attention(...);  h = x + P2(o);  [gate, up] = P3(norm(h));  out = h + P4(swiglu)

Each piece is an autograd function that keeps what only it has and recomputes what is cheap: norms and SwiGLU are never
kept. A checkpointed layer keeps its input alone. Its recomputation stops before the last product, whose result the
backward pass doesn't need: a quarter of the layer's weights less.

`FusedModel` reads the loaded model's own weights and adapters at every call, in whatever state they are; it holds no
copy. `recognition.py` says which models it is right for.

Shape suffixes: T tokens, H hidden size, N outputs of a projection, A attention heads, D head size.
"""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import save_on_cpu
from transformers import PreTrainedModel

from ..forward.attention import AttentionBackend
from ..forward.layout import PackedBatch
from ..forward.score import Decoder
from .attention import Attention, bind
from .elementwise import (
    Heads,
    Norm,
    RMSNorm,
    queries_keys_values,
    rms_norm,
    rms_norm_backward,
    swiglu,
    swiglu_backward_,
)
from .lora import Projection, ProjectionPass, prepare


@dataclass
class DecoderLayer:
    """What one layer is made of."""

    norm: Norm
    qkv: Projection
    heads: Heads
    scaling: float
    window: int | None  # of sliding attention
    out: Projection
    mlp_norm: Norm
    gate_up: Projection
    down: Projection

    @property
    def projections(self) -> tuple[Projection, ...]:
        """Returns them in the order of `LayerPass`."""
        return self.qkv, self.out, self.gate_up, self.down


@dataclass
class LayerPass:
    """A layer in one pass over the model: its adapters as they are now, and the batch's layout."""

    layer: DecoderLayer
    qkv: ProjectionPass
    out: ProjectionPass
    gate_up: ProjectionPass
    down: ProjectionPass
    attention: Attention
    angles: tuple[Tensor, Tensor]  # cos and sin, (T, D)

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """Returns the adapters' float32 masters, those of `down` last."""
        return tuple(p for part in (self.qkv, self.out, self.gate_up, self.down) for p in part.parameters)

    def until_down(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the residual stream after attention, and [gate, up]."""
        qkv, x_TH = _NormProject.apply(x_TH, self.layer.norm, self.qkv, *self.qkv.parameters)
        x_TH = _ProjectAdd.apply(x_TH, self.attend(qkv), self.out, *self.out.parameters)
        gate_up, x_TH = _NormProject.apply(x_TH, self.layer.mlp_norm, self.gate_up, *self.gate_up.parameters)
        return x_TH, gate_up

    def attend(self, qkv: Tensor) -> Tensor:
        """Returns what attention makes of q, k and v, (T, N) to (T, A * D)."""
        layer = self.layer
        q, k, v = queries_keys_values(qkv, layer.heads, *self.angles, self.attention.places)
        return self.attention.attend(q, k, v, layer.scaling, layer.window).flatten(1)

    def __call__(self, x_TH: Tensor) -> Tensor:
        """Returns the layer's output; everything that the backward pass needs is kept."""
        residual_TH, gate_up = self.until_down(x_TH)
        return _SwigluProjectAdd.apply(residual_TH, gate_up, self.down, *self.down.parameters)


# ---- The pieces -----------------------------------------------------------------------------------------------------


def _normed_input(x_TH: Tensor, norm: Norm, part: ProjectionPass) -> Tensor:
    extended = part.empty_input(x_TH)
    rms_norm(x_TH, norm, extended[:, : part.inputs])
    return part.fill_ranks(extended)


class _NormProject(torch.autograd.Function):
    """P(norm(x)), and x itself: the gradient of the residual stream comes back here, to be added in one pass."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, norm: Norm, part: ProjectionPass, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x_TH)
        ctx.norm, ctx.part = norm, part
        return part.forward(_normed_input(x_TH, norm, part)), x_TH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_TN, grad_residual_TH = grad_outputs
        (x_TH,), part = ctx.saved_tensors, ctx.part
        grad_extended = part.backward(grad_TN)
        extended = _normed_input(x_TH, ctx.norm, part)
        grads = part.parameter_grads(extended, grad_TN, grad_extended[:, part.inputs :])
        del extended
        grad_x_TH = None
        if ctx.needs_input_grad[0]:
            grad_x_TH = rms_norm_backward(x_TH, ctx.norm, part.add_ranks(grad_extended), grad_residual_TH)
        return grad_x_TH, None, None, *grads


class _ProjectAdd(torch.autograd.Function):
    """residual + P(x)."""

    @staticmethod
    def forward(ctx: Any, residual_TH: Tensor, x: Tensor, part: ProjectionPass, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.part = part
        return part.add_to(residual_TH, part.extend(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_TH,), (x,), part = grad_outputs, ctx.saved_tensors, ctx.part
        grad_extended = part.backward(grad_TH)
        grads = part.parameter_grads(part.extend(x), grad_TH, grad_extended[:, part.inputs :])
        return grad_TH, part.add_ranks(grad_extended), None, *grads


class _SwigluProjectAdd(torch.autograd.Function):
    """residual + P(silu(gate) * up)."""

    @staticmethod
    def forward(ctx: Any, residual_TH: Tensor, gate_up: Tensor, part: ProjectionPass, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.part = part
        return _swiglu_project_add(residual_TH, gate_up, part)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.part is None:
            raise RuntimeError("The layer's activations were used up by a first backward pass: run forward again.")
        grad_TH, (gate_up,) = grad_outputs[0], ctx.saved_tensors
        grad_gate_up, grads = _swiglu_project_backward(grad_TH, gate_up, ctx.part)
        ctx.part = None
        return grad_TH, grad_gate_up, None, *grads


def _swiglu_project_add(residual_TH: Tensor, gate_up: Tensor, part: ProjectionPass, in_place: bool = False) -> Tensor:
    extended = part.empty_input(gate_up)
    swiglu(gate_up, extended[:, : part.inputs])
    return part.add_to(residual_TH, part.fill_ranks(extended), in_place)


def _swiglu_project_backward(
    grad_TH: Tensor, gate_up: Tensor, part: ProjectionPass
) -> tuple[Tensor, list[Tensor | None]]:
    """Returns the gradients to [gate, up], which is overwritten by it, and to the adapter."""
    grad_extended = part.backward(grad_TH)
    grad_TR = grad_extended[:, part.inputs :].clone()
    swiglu_backward_(gate_up, part.add_ranks(grad_extended))
    # The buffer holds the product now, in the place of its gradient.
    return gate_up, part.parameter_grads(part.fill_ranks(grad_extended), grad_TH, grad_TR)


class _Checkpointed(torch.autograd.Function):
    """A layer that keeps its input alone (Chen et al. 2016), and whose recomputation ends before P4."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, layer: LayerPass, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(x_TH)
        ctx.layer = layer
        return _without_keeping(layer, x_TH)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        layer, part = ctx.layer, ctx.layer.down
        x_TH = ctx.saved_tensors[0].detach().requires_grad_(ctx.needs_input_grad[0])
        with torch.enable_grad():
            outputs = layer.until_down(x_TH)
        grad_gate_up, down_grads = _swiglu_project_backward(grad_outputs[0], outputs[1].detach(), part)
        inputs = [x_TH, *layer.parameters[: len(layer.parameters) - len(part.parameters)]]
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        found = iter(torch.autograd.grad(outputs, wanted, [grad_outputs[0], grad_gate_up]) if wanted else ())
        grad_x_TH, *grads = [next(found) if tensor.requires_grad else None for tensor in inputs]
        return grad_x_TH, None, *grads, *down_grads


def _without_keeping(layer: LayerPass, x_TH: Tensor) -> Tensor:
    with torch.no_grad():
        residual_TH, gate_up = layer.until_down(x_TH)
        return _swiglu_project_add(residual_TH, gate_up, layer.down, in_place=True)


# ---- The model ------------------------------------------------------------------------------------------------------


class FusedModel(Decoder):
    """A recognized model's decoder, as a backend of `completion_logps`.

    Args:
        causal_lm: the transformers model inside the PEFT model.
        layers: from `recognize`.
        backend: of attention.
    """

    def __init__(self, causal_lm: PreTrainedModel, layers: list[DecoderLayer], backend: AttentionBackend):
        self.backbone = causal_lm.base_model
        self.layers = layers
        self.backend = backend
        self.attention = backend.name
        self.norm = Norm(self.backbone.norm.weight, self.backbone.norm.variance_epsilon)
        # The last layers' activations are freed first, so the first ones are checkpointed.
        self.checkpointed: Callable[[PackedBatch], int] = lambda batch: 0
        self.offload = False
        self._only: tuple[str, ...] | None = None  # adapters in the place of the active one

    def __str__(self) -> str:
        return f"fused, {self.attention}"

    def reference(self, adapter: str | None) -> "FusedModel":
        """Returns the same with the frozen `adapter` in the place of the active one, or with none."""
        other = copy.copy(self)
        other._only = () if adapter is None else (adapter,)
        return other

    def hidden_states(self, batch: PackedBatch) -> Tensor:
        """Returns the normed hidden states that predict, (N, H), for a shared batch on the model's device."""
        # Frozen, also where a hook for plain checkpointing asks for its gradient.
        x_TH = self.backbone.embed_tokens(batch.input_ids[0]).detach()
        with torch.autocast(x_TH.device.type, enabled=False):
            cos, sin = self.backbone.rotary_emb(x_TH[None], position_ids=batch.position_ids)
            x_TH = self._decode(x_TH, batch, (cos[0], sin[0]))
            return RMSNorm.apply(x_TH.index_select(0, batch.pred_pos), self.norm)

    def _decode(self, x_TH: Tensor, batch: PackedBatch, angles: tuple[Tensor, Tensor]) -> Tensor:
        projections = [p for layer in self.layers for p in layer.projections]
        parts = prepare(projections, x_TH.dtype, x_TH.device, self._only)
        attention = bind(self.backend, batch, {layer.window for layer in self.layers})
        checkpointed = self.checkpointed(batch) if torch.is_grad_enabled() else 0
        for i, layer in enumerate(self.layers):
            qkv, out, gate_up, down = parts[4 * i : 4 * i + 4]
            one = LayerPass(layer, qkv, out, gate_up, down, attention[layer.window], angles)
            if i < checkpointed:
                # Copied while the GPU waits: a hundredth of the time that a layer takes on many tokens.
                with save_on_cpu(pin_memory=x_TH.is_cuda) if self.offload else nullcontext():
                    x_TH = _Checkpointed.apply(x_TH, one, *one.parameters)
            elif torch.is_grad_enabled():
                x_TH = one(x_TH)
            else:
                x_TH = _without_keeping(one, x_TH)
        return x_TH
