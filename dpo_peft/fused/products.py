"""The pieces of a decoder layer: its matrix products with what is element-wise around them, as autograd functions.

Each keeps what only it has and recomputes what is cheap: norms and activations are never kept.

Shape suffixes: T tokens, H hidden size, N outputs of a projection.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .elementwise import Norm, activate, activate_backward_, rms_norm, rms_norm_backward
from .lora import ProjectionPass


def _normed_input(x_TH: Tensor, norm: Norm | None, part: ProjectionPass) -> Tensor:
    if norm is None:
        return part.extend(x_TH)
    extended = part.empty_input(x_TH)
    rms_norm(x_TH, norm, extended[:, : part.inputs])
    return part.fill_ranks(extended)


class NormProject(torch.autograd.Function):
    """P(norm(x)), and x itself: the gradient of the residual stream comes back here, to be added in one pass."""

    @staticmethod
    def forward(
        ctx: Any, x_TH: Tensor, norm: Norm | None, part: ProjectionPass, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
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
            grad_x_TH = part.add_ranks(grad_extended)
            if ctx.norm is not None:
                grad_x_TH = rms_norm_backward(x_TH, ctx.norm, grad_x_TH, grad_residual_TH)
            else:
                grad_x_TH = grad_x_TH + grad_residual_TH
        return grad_x_TH, None, None, *grads


class ProjectAdd(torch.autograd.Function):
    """residual + P(x) times a number; or P(x) alone."""

    @staticmethod
    def forward(
        ctx: Any, residual_TH: Tensor | None, x: Tensor, part: ProjectionPass, times: float, *parameters: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.part, ctx.times, ctx.adds = part, times, residual_TH is not None
        return part.add_to(residual_TH, part.extend(x), times=times)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_TH,), (x,), part = grad_outputs, ctx.saved_tensors, ctx.part
        times_TH = grad_TH if ctx.times == 1 else grad_TH * ctx.times
        grad_extended = part.backward(times_TH)
        grads = part.parameter_grads(part.extend(x), times_TH, grad_extended[:, part.inputs :])
        return grad_TH if ctx.adds else None, part.add_ranks(grad_extended), None, None, *grads


class ActivateProjectAdd(torch.autograd.Function):
    """residual + P(act(gate) * up) times a number; or without the residual."""

    @staticmethod
    def forward(
        ctx: Any,
        residual_TH: Tensor | None,
        gate_up: Tensor,
        part: ProjectionPass,
        activation: str,
        times: float,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.part, ctx.activation, ctx.times, ctx.adds = part, activation, times, residual_TH is not None
        return activate_project_add(residual_TH, gate_up, part, activation, times)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.part is None:
            raise RuntimeError("The layer's activations were used up by a first backward pass: run forward again.")
        grad_TH, (gate_up,) = grad_outputs[0], ctx.saved_tensors
        grad_gate_up, grads = activate_project_backward(grad_TH, gate_up, ctx.part, ctx.activation, ctx.times)
        ctx.part = None
        return grad_TH if ctx.adds else None, grad_gate_up, None, None, None, *grads


def activate_project_add(
    residual_TH: Tensor | None,
    gate_up: Tensor,
    part: ProjectionPass,
    activation: str,
    times: float,
    in_place: bool = False,
) -> Tensor:
    """Computes `ActivateProjectAdd` without a gradient; into the residual if `in_place`."""
    extended = part.empty_input(gate_up)
    activate(gate_up, extended[:, : part.inputs], activation)
    return part.add_to(residual_TH, part.fill_ranks(extended), in_place, times)


def activate_project_backward(
    grad_TH: Tensor, gate_up: Tensor, part: ProjectionPass, activation: str, times: float
) -> tuple[Tensor, list[Tensor | None]]:
    """Returns the gradients to [gate, up], which is overwritten by it, and to the adapter."""
    grad_TH = grad_TH if times == 1 else grad_TH * times
    grad_extended = part.backward(grad_TH)
    grad_TR = grad_extended[:, part.inputs :].clone()
    activate_backward_(gate_up, part.add_ranks(grad_extended), activation)
    # The buffer holds the product now, in the place of its gradient.
    return gate_up, part.parameter_grads(part.fill_ranks(grad_extended), grad_TH, grad_TR)


class NormAdd(torch.autograd.Function):
    """residual + norm(y): where a layer's norm stands behind its product, which then can't add the residual itself."""

    @staticmethod
    def forward(ctx: Any, residual_TH: Tensor, y_TH: Tensor, norm: Norm) -> Tensor:
        ctx.save_for_backward(y_TH)
        ctx.norm = norm
        return rms_norm(y_TH, norm, None, residual_TH)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_TH = grad_outputs[0].contiguous()
        return grad_TH, rms_norm_backward(ctx.saved_tensors[0], ctx.norm, grad_TH), None
