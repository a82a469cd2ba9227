"""What a run does with the memory it has: how many layers are checkpointed, and how large micro-batches are.

The predictions are the planner's, of the model as it is loaded. Both are decided anew for every micro-batch, from its
own size: a long row checkpoints more layers, a short one none.
"""

import logging
from collections.abc import Sequence
from typing import Any

import psutil
import torch

from ..errors import OptionError
from ..forward import PackedBatch
from ..planning.steps import GIB, MemoryModel, plan_step

logger = logging.getLogger(__name__)

# Of the memory that is free: allocations leave gaps, and predictions are a few per cent off.
_USED_SHARE = 0.95
_USED_SHARE_OF_RAM = 0.7  # which others use too
_TIGHTENED = 0.9


class MemoryBudget:
    """Decides within a limit.

    Args:
        memory: of the loaded model; None if its shape is not known to the planner.
        limit: bytes that tensors may take.
        checkpoint_layers: a number of layers, or "auto": the fewest that keep a micro-batch within the limit.
        max_tokens: of a micro-batch; "auto": what makes a step cheapest within the limit.
        reference_passes: forward passes of the reference per micro-batch, 0 or 1.
    """

    def __init__(
        self,
        memory: MemoryModel | None,
        limit: float,
        checkpoint_layers: int | str,
        max_tokens: int | str | None,
        reference_passes: int,
    ):
        if max_tokens == "auto" and memory is None:
            raise OptionError(
                "max_tokens_per_microbatch='auto': the planner does not know this model's shape. Give a number."
            )
        if memory is not None and isinstance(checkpoint_layers, int) and checkpoint_layers > memory.shape.layers:
            raise OptionError(
                f"checkpoint_layers={checkpoint_layers}: the model has {memory.shape.layers} layers. Give at most "
                "that, or 'auto'."
            )
        self.memory, self.limit, self.layers, self.max_tokens = memory, limit, checkpoint_layers, max_tokens
        self.reference_passes = reference_passes
        if memory is not None and "auto" in (checkpoint_layers, max_tokens):
            self._check_room(memory)

    def _check_room(self, memory: MemoryModel) -> None:
        fixed = sum(memory.fixed.values())
        if fixed > self.limit:
            logger.warning(
                "Weights, adapter and optimizer alone take %.1f GiB of the %.1f GiB that there are: it will hardly "
                "fit. `dpo-peft plan` shows what does.",
                fixed / GIB,
                self.limit / GIB,
            )

    def checkpointed(self, batch: PackedBatch) -> int:
        """How many of the first layers keep their input alone in this micro-batch."""
        if isinstance(self.layers, int):
            return self.layers
        if self.memory is None:
            return 10**6  # all
        assert batch.kv_index is not None
        size = batch.input_ids.numel(), len(batch.kv_index), len(batch.target)
        return self.memory.checkpoint_layers_for(*size, self.limit)

    def tighten(self, held: float) -> bool:
        """After memory ran out while tensors held so many bytes: keep a tenth below that from now on.

        Returns:
            Whether that changes anything: the same micro-batches may fit with more layers checkpointed.
        """
        adjustable = self.memory is not None and self.memory.fused and self.layers == "auto"
        if not adjustable or held <= 0 or _TIGHTENED * held >= self.limit:
            return False
        self.limit = _TIGHTENED * held
        return True

    def microbatch_tokens(self, samples: Sequence[tuple[int, int, int]]) -> int:
        """Tokens of a micro-batch, for the rows of an optimizer step given by tokens, keys and predicted tokens."""
        if self.max_tokens != "auto":
            assert isinstance(self.max_tokens, int)
            return self.max_tokens
        assert self.memory is not None
        plan = plan_step(samples, self.memory, self.limit, reference_passes=self.reference_passes)
        return max(plan.max_tokens, 1)


def memory_limit(device: torch.device, max_memory_gib: float | None, loaded: float) -> float:
    """Bytes that tensors may take: the option's, or most of what is free now.

    Args:
        device: of the model.
        max_memory_gib: the option; None if it isn't set.
        loaded: bytes of tensors that are on the device already.
    """
    if max_memory_gib is not None:
        return max_memory_gib * GIB
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        # A process may have been given a share of the card, which `mem_get_info` does not know; nor do old releases.
        share = getattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)(device)
        return _USED_SHARE * min(free + torch.cuda.memory_reserved(device), share * total)
    return loaded + _USED_SHARE_OF_RAM * psutil.virtual_memory().available


def memory_model(model: Any, stored: Any, **options: Any) -> MemoryModel | None:
    """The planner's model of a loaded PEFT model; None if it is not one that the planner knows."""
    try:
        memory = MemoryModel.of_model(model, stored, **options)
        memory.peak(1, 1, 1, 0)
    except OptionError as error:
        logger.info("Memory can't be predicted: %s", error)
        return None
    return memory
