"""The bytes that a plain fused layer keeps and needs, by its shape; T tokens, S keys that its segments read."""

from collections.abc import Mapping
from typing import NamedTuple

from .shapes import Shape


class FusedLayer(NamedTuple):
    """A decoder layer, computed by the folder `fused`."""

    shape: Shape
    element: int  # bytes of a number
    packed: bool  # attention reads the packed row as it is; else keys and values are gathered
    ranks: Mapping[str, int]  # by group

    def kept(self, T: float, S: float) -> float:
        """Returns the bytes that it keeps for its backward if it isn't checkpointed."""
        shape, e = self.shape, self.element
        H, Q, G = shape.hidden, shape.q, shape.kv
        attention = self.attended(T) + e * T * Q + 2 * e * (T if self.packed else S) * G  # and q; k and v gathered
        # The layer's input, the residual after attention, gate and up; the input of norms on q and k.
        return attention + e * T * (2 * H + shape.groups["up"].outputs + (Q + 2 * G) * shape.qk_norm)

    def attended(self, T: float) -> float:
        """Returns the bytes of what attention gives: its output and its float32 log-sum-exp."""
        return T * (self.element * self.shape.q + 4 * self.shape.heads)

    def forward(self, T: float) -> float:
        """Returns the bytes that it needs to compute tokens of which it keeps nothing."""
        groups = self.shape.groups  # the residual stream before and after, gate and up, and their product
        return self.element * T * (2 * self.shape.hidden + groups["up"].outputs + groups["down"].inputs)

    def phases(self, T: float, S: float) -> dict[str, float]:
        """Returns the bytes that its backward needs beside what is kept, by phase; the largest counts."""
        shape, e = self.shape, self.element
        H, Q, G = shape.hidden, shape.q, shape.kv
        N = Q + 2 * G
        gradient = e * T * 2 * H  # of the layer's output and of the residual stream
        # The flash kernel: gradients of output and of q, the latter also in float32; of k and v for every query head.
        flash = T * (e * 2 * Q + 4 * Q) + 2 * e * S * (Q + (G if G < Q else 0))
        if self.packed:  # gradients of output, q, k and v, and a float32 number per query
            flash = T * (e * (2 * Q + 2 * G) + 4 * shape.heads)
        extended = {name: e * T * (one.inputs + self.ranks[name]) for name, one in shape.groups.items()}
        return {
            "down": gradient + extended["down"],  # gradient of [activation, ranks], the activation after that
            "up": gradient + 2 * extended["up"],  # normed input and its gradient, with ranks
            "o": gradient + 2 * extended["o"],
            "attention": gradient + flash,
            "qkv": gradient + 2 * extended["qkv"] + e * T * N,
        }
