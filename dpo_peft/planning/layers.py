"""The layers of a base that is sharded or streamed: the bytes that come and go, and what multiplies a token."""

from torch import Tensor

from ..forward.modules import decoder_layers
from ..model.experts import expert_weights, experts_per_token
from ..model.placement import SMALL, aligned
from .sketch import NF4_BLOCK, NF4_NESTED_BLOCK, Sketch


def placed_bytes(weights: int, nested: bool = True, experts: int = 1) -> int:
    """Returns the bytes of a weight in NF4 that come and go with its layer (see `model.placement`): small constants
    stay.

    Args:
        weights: how many numbers it has; of a mixture's, those of one expert.
        nested: whether its scales are quantized too.
        experts: how many are in it.
    """
    blocks = -(-weights // NF4_BLOCK)
    constants = [(blocks, 1), (-(-blocks // NF4_NESTED_BLOCK), 4)] if nested else [(blocks, 4)]
    # Those of experts have a row for each, and count as matrices.
    large = (aligned(experts * number * each) for number, each in constants if number > SMALL or experts > 1)
    return aligned(experts * -(-weights // 2)) + sum(large)


def layer_bytes(sketch: Sketch, quantize: bool, nested: bool, weight_bytes: int) -> tuple[int, ...]:
    """Returns the bytes of each decoder layer that come and go; arguments are those of `Sketch.stored`."""
    names = {id(weight): name for name, weight in sketch.base.named_parameters()}
    small = sketch.quantized if quantize else {}

    def size(weight: Tensor) -> int:
        if (quantized := small.get(names[id(weight)])) is not None:
            number, of_one = quantized
            return placed_bytes(of_one, nested, number)
        return aligned(weight.numel() * max(weight_bytes, weight.itemsize)) if weight.ndim > 1 else 0

    return tuple(sum(map(size, layer.parameters())) for layer in decoder_layers(sketch.base))


def active_weights(sketch: Sketch) -> float:
    """Returns how many weights of the decoder layers multiply a token: of experts, those that it is sent to."""
    layers, chosen = decoder_layers(sketch.base), experts_per_token(sketch.config.get_text_config(decoder=True)) or 1
    experts = {id(weight): len(weight) for weight in expert_weights(sketch.base).values()}
    weights = [weight for weight in layers.parameters() if weight.ndim > 1]
    return sum(weight.numel() * min(1.0, chosen / experts.get(id(weight), 1)) for weight in weights)
