"""What a run does with the memory it has: how many layers are checkpointed, and how large micro-batches are.

The predictions are the planner's (`planning`, a wing), of the model as it is loaded. Both are decided anew for every
micro-batch, from its own size: a long row checkpoints more layers, a short one none. Without the planner every layer
is checkpointed.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Protocol

import psutil
import torch
from peft import PeftModel

from ..errors import OptionError
from ..forward import PackedBatch
from ..model.loading import StorageReport
from ..wings import wing

logger = logging.getLogger(__name__)

GIB = 2**30
# Of the memory that is free: allocations leave gaps, and predictions are a few per cent off.
_USED_SHARE = 0.95
_USED_SHARE_OF_RAM = 0.7  # which others use too
_TIGHTENED = 0.9
NO_PLANNER = "the memory planner, the folder dpo_peft/planning, is not installed"


class Memory(Protocol):
    """What is read of `planning.MemoryModel`."""

    @property
    def fused(self) -> bool: ...

    @property
    def layers(self) -> int: ...

    @property
    def fixed(self) -> Mapping[str, float]: ...

    def checkpoint_layers_for(self, tokens: float, keys: float, predicted: float, limit: float) -> int: ...


class MemoryBudget:
    """Decides within a limit.

    Args:
        memory: of the loaded model; None if its shape is not known to the planner, or there is no planner.
        limit: bytes that tensors may take.
        checkpoint_layers: a number of layers, or "auto": the fewest that keep a micro-batch within the limit.
        max_tokens: of a micro-batch; "auto": what makes a step cheapest within the limit.
        reference_passes: forward passes of the reference per micro-batch, 0 or 1.
    """

    def __init__(
        self,
        memory: Memory | None,
        limit: float,
        checkpoint_layers: int | str,
        max_tokens: int | str | None,
        reference_passes: int,
    ):
        if max_tokens == "auto" and memory is None:
            why = "the planner does not know this model's shape" if wing("planning") else NO_PLANNER
            raise OptionError(f"max_tokens_per_microbatch='auto': {why}. Give a number.")
        if memory is not None and isinstance(checkpoint_layers, int) and checkpoint_layers > memory.layers:
            raise OptionError(
                f"checkpoint_layers={checkpoint_layers}: the model has {memory.layers} layers. Give at most that, or "
                "'auto'."
            )
        self.memory, self.limit, self.layers, self.max_tokens = memory, limit, checkpoint_layers, max_tokens
        self.reference_passes = reference_passes
        automatic = memory is not None and "auto" in (checkpoint_layers, max_tokens)
        if memory is not None and automatic and (fixed := sum(memory.fixed.values())) > limit:
            logger.warning(
                "Weights, adapter and optimizer alone take %.1f GiB of the %.1f GiB that there are: it will hardly "
                "fit. `dpo-peft plan` shows what does.",
                fixed / GIB,
                limit / GIB,
            )

    def checkpointed(self, batch: PackedBatch) -> int:
        """Returns how many of the first layers keep their input alone in this micro-batch."""
        if isinstance(self.layers, int):
            return self.layers
        if self.memory is None:
            return 10**6  # all
        assert batch.kv_index is not None
        size = batch.input_ids.numel(), len(batch.kv_index), len(batch.target)
        return self.memory.checkpoint_layers_for(*size, self.limit)

    def tighten(self, held: float) -> bool:
        """Keeps a tenth below the bytes that tensors `held` when memory ran out, from now on.

        Returns:
            Whether that changes anything: the same micro-batches may fit with more layers checkpointed.
        """
        adjustable = self.memory is not None and self.memory.fused and self.layers == "auto"
        if not adjustable or held <= 0 or _TIGHTENED * held >= self.limit:
            return False
        self.limit = _TIGHTENED * held
        return True

    def microbatch_tokens(self, samples: Sequence[tuple[int, int, int]]) -> int:
        """Returns the tokens of a micro-batch, for an optimizer step's rows by tokens, keys and predicted tokens."""
        if self.max_tokens != "auto":
            assert isinstance(self.max_tokens, int)
            return self.max_tokens
        planning = wing("planning")
        assert planning is not None  # `memory` came from it
        plan = planning.plan_step(samples, self.memory, self.limit, reference_passes=self.reference_passes)
        return max(plan.max_tokens, 1)


def memory_limit(device: torch.device, max_memory_gib: float | None, loaded: float) -> float:
    """Returns the bytes that tensors may take: the option's, or most of what is free now.

    Args:
        device: of the model.
        max_memory_gib: the option; None if it isn't set.
        loaded: bytes of tensors that are on the device already.

    Raises:
        OptionError: the option is set, and nothing predicts what stays below it.
    """
    if max_memory_gib is not None:
        if wing("planning") is None:
            raise OptionError(f"max_memory_gib={max_memory_gib} has no effect: {NO_PLANNER}. Leave it out.")
        return max_memory_gib * GIB
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        # A process may have been given a share of the GPU, which `mem_get_info` does not know; nor do old releases.
        share = getattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)(device)
        return _USED_SHARE * min(free + torch.cuda.memory_reserved(device), share * total)
    return loaded + _USED_SHARE_OF_RAM * psutil.virtual_memory().available


def memory_model(model: PeftModel, stored: StorageReport, **options: object) -> Memory | None:
    """Returns the planner's model of a loaded PEFT model; None if it is not one that the planner knows."""
    planning = wing("planning")
    if planning is None:
        logger.info("Memory can't be predicted: %s.", NO_PLANNER)
        return None
    try:
        memory: Memory = planning.MemoryModel.of_model(model, stored, **options)
        memory.checkpoint_layers_for(1, 1, 1, 0)
    except OptionError as error:
        logger.info("Memory can't be predicted: %s", error)
        return None
    return memory
