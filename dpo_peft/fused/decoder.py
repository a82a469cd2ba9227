"""The decoder of Llama-like models with LoRA, written out: transformers' function in fewer passes over memory.

A layer is four projections (`lora.py`) with element-wise kernels between them (`elementwise.py`):

    [q, k, v] = P1(norm(x));  o = attention(...);  h = x + P2(o);  [gate, up] = P3(norm(h));  out = h + P4(swiglu)

Each layer is one autograd function. It keeps x, o, h, [gate, up] and what attention keeps for its own gradient, and
recomputes what is cheap: norms and SwiGLU are never kept. A checkpointed layer keeps x alone. Its recomputation stops
before the last product, whose result the backward pass doesn't need: a quarter of the layer's weights less.

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
        """Returns the adapters' float32 masters."""
        return tuple(p for part in (self.qkv, self.out, self.gate_up, self.down) for p in part.parameters)

    def until_down(self, x_TH: Tensor, differentiable: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Computes all but the last product.

        Returns:
            Attention's output (T, A * D) and `x_TH` itself, both with the graph from `x_TH` and the adapters of q, k
            and v to attention if `differentiable`; then the residual stream after attention, and [gate, up].
        """
        layer = self.layer
        with torch.set_grad_enabled(differentiable):
            qkv, x_TH = _NormProject.apply(x_TH, layer.norm, self.qkv, *self.qkv.parameters)
            q, k, v = queries_keys_values(qkv, layer.heads, *self.angles, self.attention.places)
            attended = self.attention.attend(q, k, v, layer.scaling, layer.window).flatten(1)
        with torch.no_grad():
            residual_TH = self.out.add_to(x_TH, self.out.extend(attended))
            gate_up = self.gate_up.forward(_normed_input(residual_TH, layer.mlp_norm, self.gate_up))
        return attended, x_TH, residual_TH, gate_up


class _Layer(torch.autograd.Function):
    """A layer that keeps its activations, or its input alone (Chen et al. 2016) and computes them again."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, layer: LayerPass, keep: bool, *parameters: Tensor) -> Tensor:
        if keep:  # here the graph of attention starts
            x_TH = x_TH.detach().requires_grad_(ctx.needs_input_grad[0])
        *attention, residual_TH, gate_up = layer.until_down(x_TH, differentiable=keep)
        ctx.save_for_backward(x_TH, *([*attention, residual_TH, gate_up] if keep else ()))
        del attention  # a layer that doesn't keep it has the room
        ctx.layer = layer
        extended = layer.down.empty_input(gate_up)
        swiglu(gate_up, extended[:, : layer.down.inputs])
        return layer.down.add_to(residual_TH, layer.down.fill_ranks(extended), in_place=not keep)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_TH,), layer = grad_outputs, ctx.layer
        if layer is None:  # [gate, up] was overwritten by its gradient
            raise RuntimeError("The layer's activations were used up by a first backward pass: run forward again.")
        x_TH, *kept = ctx.saved_tensors
        if kept:
            ctx.layer = None
        else:
            x_TH = x_TH.detach().requires_grad_(ctx.needs_input_grad[0])
            kept = layer.until_down(x_TH, differentiable=True)
        attended, x_again_TH, residual_TH, gate_up = kept

        part = layer.down
        grad_extended = part.backward(grad_TH)
        grad_TR = grad_extended[:, part.inputs :].clone()
        swiglu_backward_(gate_up, part.add_ranks(grad_extended))
        # [gate, up] is its gradient now, and the buffer holds the product in the place of its own.
        down_grads = part.parameter_grads(part.fill_ranks(grad_extended), grad_TH, grad_TR)
        del grad_extended  # the widest matrix of the pass

        mlp_norm = layer.layer.mlp_norm
        grad_TH, gate_up_grads = _norm_project_backward(gate_up, residual_TH, mlp_norm, layer.gate_up, grad_TH)

        part = layer.out
        grad_extended = part.backward(grad_TH)
        out_grads = part.parameter_grads(part.extend(attended), grad_TH, grad_extended[:, part.inputs :])

        inputs = [x_TH, *layer.qkv.parameters]
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        grads = part.add_ranks(grad_extended), grad_TH
        found = iter(torch.autograd.grad([attended, x_again_TH], wanted, grads) if wanted else ())
        grad_x_TH, *qkv_grads = [next(found) if tensor.requires_grad else None for tensor in inputs]
        return grad_x_TH, None, None, *qkv_grads, *out_grads, *gate_up_grads, *down_grads


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
        (grad_TN, grad_residual_TH), (x_TH,) = grad_outputs, ctx.saved_tensors
        to_x = ctx.needs_input_grad[0]
        grad_x_TH, grads = _norm_project_backward(grad_TN, x_TH, ctx.norm, ctx.part, grad_residual_TH, to_x)
        return grad_x_TH, None, None, *grads


def _norm_project_backward(
    grad_TN: Tensor, x_TH: Tensor, norm: Norm, part: ProjectionPass, grad_residual_TH: Tensor, to_x: bool = True
) -> tuple[Tensor, list[Tensor | None]]:
    """Returns the gradients of P(norm(x)) to x, with that of the residual stream, and to the adapters."""
    grad_extended = part.backward(grad_TN)
    grads = part.parameter_grads(_normed_input(x_TH, norm, part), grad_TN, grad_extended[:, part.inputs :])
    if not to_x:
        return grad_residual_TH, grads
    return rms_norm_backward(x_TH, norm, part.add_ranks(grad_extended), grad_residual_TH), grads


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
        checkpointed = self.checkpointed(batch) if torch.is_grad_enabled() else len(self.layers)
        for i, layer in enumerate(self.layers):
            qkv, out, gate_up, down = parts[4 * i : 4 * i + 4]
            one = LayerPass(layer, qkv, out, gate_up, down, attention[layer.window], angles)
            # Copied while the GPU waits: a hundredth of the time that a layer takes on many tokens.
            offload = self.offload and i < checkpointed
            with save_on_cpu(pin_memory=x_TH.is_cuda) if offload else nullcontext():
                x_TH = _Layer.apply(x_TH, one, i >= checkpointed, *one.parameters)
        return x_TH
