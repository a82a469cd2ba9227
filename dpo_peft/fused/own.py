"""Halves of a layer that the model's own modules compute: mixtures of experts, and mixers with states.

Shape suffixes: T tokens, H hidden size, X experts.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..forward.attention import AttentionPlan
from ..forward.scope import acting
from ..reference.adapter_off import reference_mode
from ..reference.frozen_adapter import adapter_layers, holds_adapter


class Surroundings(NamedTuple):
    """What the model's own modules find around them in one pass over the model."""

    device: str
    autocast: torch.dtype | None  # None: it is off
    plan: AttentionPlan
    only: tuple[str, ...] | None  # adapters in the place of the active one
    acts_on: tuple[int, ...] | None  # last positions that an answer-only adapter acts on (`scope.acting`)

    @classmethod
    def now(
        cls, device: str, plan: AttentionPlan, only: tuple[str, ...] | None, acts_on: tuple[int, ...] | None
    ) -> "Surroundings":
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return cls(device, dtype, plan, only, acts_on)


@dataclass
class Own:
    """Modules of the model that run as they are.

    Args:
        modules: all that run.
        call: computes the half from the plan, the normed input and the residual stream, (1, T, H) each.
        routers: those whose output's logits are recorded, and where these stand in it.
    """

    modules: nn.ModuleList
    call: Callable[[AttentionPlan, Tensor, Tensor], Any]
    routers: Sequence[tuple[nn.Module, int]] = ()

    def trained(self) -> list[Tensor]:
        """Returns what gets a gradient."""
        return [parameter for parameter in self.modules.parameters() if parameter.requires_grad]

    def __call__(self, around: Surroundings, normed_TH: Tensor, residual_TH: Tensor) -> list[Tensor]:
        """Returns what they compute, (T, H), and the logits (T, X) of their routers."""
        logits: list[Tensor] = []
        with ExitStack() as stack:
            stack.enter_context(torch.autocast(around.device, around.autocast, enabled=around.autocast is not None))
            stack.enter_context(exchanged(self.modules, around.only))
            stack.enter_context(acting(self.modules, around.acts_on))
            for router, index in self.routers:
                stack.callback(router.register_forward_hook(_recorder(logits, index)).remove)
            out = self.call(around.plan, normed_TH[None], residual_TH[None])
        out = out[0] if isinstance(out, tuple) else out
        return [out[0].to(normed_TH.dtype), *logits]


def _recorder(logits: list[Tensor], index: int) -> Callable[..., None]:
    def record(module: nn.Module, inputs: Any, output: Any) -> None:
        found = output[index] if isinstance(output, tuple) else output
        logits.append(found.reshape(-1, found.shape[-1]))

    return record


@contextmanager
def exchanged(modules: nn.ModuleList, only: tuple[str, ...] | None) -> Iterator[None]:
    """Inside, the adapter `only` is on in the place of the active one, or none, where they hold none of it; None
    changes nothing."""
    if only is None:
        yield
        return
    adapter = next(
        (name for name in only if any(holds_adapter(layer, name) for _, layer in adapter_layers(modules))), None
    )
    with reference_mode(modules, adapter):
        yield
