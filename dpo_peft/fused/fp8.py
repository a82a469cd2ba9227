"""A projection whose frozen weight is multiplied in FP8 (e4m3): one byte a number, sums in float32.

    y = s_x s_W q(x) q(W)^T + u B^T        dx = s_dy s_W q(dy) q(W) + du A

W has one scale for all of the projection, x and dy one a row: a token's result must not depend on what else is in its
batch, or rewards would move with how rows are packed. What trains stays in bfloat16: B is small and could vanish
under W's scale. While B = 0, u B^T adds nothing: policy and reference are equal bit for bit.

Shape suffixes: T tokens, K inputs, N outputs, R adapter ranks.
"""

import torch
from torch import Tensor

from .elementwise import E4M3, LARGEST, quantize_rows, weight_into
from .lora import ProjectionPass

MULTIPLE = 16  # of which torch wants inputs and outputs to be


class FP8Pass(ProjectionPass):
    """The pass of a projection in FP8: see the module."""

    def rounded(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Returns W in e4m3, (N, K), and its scale, a float32 number on the device of `like`."""
        projection = self.projection
        if projection.scale is None:
            projection.scale = self.weight(like)[:, : self.inputs].abs().max().float() / LARGEST
        weight_NK = torch.empty(sum(projection.outputs), self.inputs, dtype=E4M3, device=like.device)
        for base, rows in zip(projection.bases, weight_NK.split(projection.outputs), strict=True):
            weight_into(base, None, rows, projection.scale)
        return weight_NK, projection.scale

    def forward(self, extended: Tensor) -> Tensor:
        """See the base class."""
        y_TN = product(extended[:, : self.inputs], *self.rounded(extended))
        if self.projection.bias_N is not None:
            y_TN += self.projection.bias_N
        return y_TN if self.b_NR is None else y_TN.addmm_(extended[:, self.inputs :], self.b_NR.T)

    def add_to(
        self, residual_TN: Tensor | None, extended: Tensor, in_place: bool = False, times: float = 1.0
    ) -> Tensor:
        """See the base class. Here the sum is a pass of its own."""
        y_TN = self.forward(extended)
        if residual_TN is None:
            return y_TN if times == 1 else y_TN.mul_(times)
        return (residual_TN.add_ if in_place else residual_TN.add)(y_TN, alpha=times)

    def backward(self, grad_TN: Tensor) -> Tensor:
        """See the base class."""
        weight_NK, scale = self.rounded(grad_TN)
        out = self.empty_input(grad_TN)
        out[:, : self.inputs] = product(grad_TN, weight_NK.T.contiguous(), scale)
        out[:, self.inputs :] = 0 if self.b_NR is None else grad_TN @ self.b_NR
        return out


def product(x_TK: Tensor, weight_NK: Tensor, scale: Tensor) -> Tensor:
    """Returns x W^T, (T, N), in the dtype of x, for contiguous W / scale in e4m3."""
    rounded_TK, scales_T1 = quantize_rows(x_TK)
    scales_1N = scale.expand(1, len(weight_NK)).contiguous()
    return torch._scaled_mm(rounded_TK, weight_NK.T, scale_a=scales_T1, scale_b=scales_1N, out_dtype=x_TK.dtype)
