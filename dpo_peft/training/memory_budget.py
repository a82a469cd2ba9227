"""What a run does with the memory it has: how many layers are checkpointed, and how large micro-batches are.

The predictions are the planner's (`planning`, a wing), of the model as it is loaded. Both are decided anew for every
micro-batch, from its own size: a long row checkpoints more layers, a short one none. Without the planner every layer
is checkpointed.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import psutil
import torch
from peft import PeftModel

from ..config import DPOConfig
from ..distributed import gather_over_processes
from ..errors import OptionError
from ..forward import ForwardPlan, PackedBatch
from ..forward.modules import decoder_layers, unwrap
from ..model.loading import StorageReport, storage_report
from ..model.placement import aligned, frozen_tensors, placement_of, shard, stream
from ..wings import required, wing
from .arguments import autocast_dtype

logger = logging.getLogger(__name__)

GIB = 2**30
# Of the memory that is free: allocations leave gaps, and predictions are a few per cent off.
_USED_SHARE = 0.95
_USED_SHARE_OF_RAM = 0.7  # which others use too
_TIGHTENED = 0.9
KEYS_OF_PAIRS = 3  # at most so many keys a token: the prompt is read by itself and by both completions
NO_PLANNER = "the memory planner, the folder dpo_peft/planning, is not installed"


class MemoryBudget:
    """Decides within a limit.

    Args:
        memory: `planning.MemoryModel` of the loaded model; None if the planner does not know its shape or isn't there.
        limit: bytes that tensors may take.
        checkpoint_layers: a number of layers, or "auto": the fewest that keep a micro-batch within the limit.
        max_tokens: of a micro-batch; "auto": what makes a step cheapest within the limit.
        reference_passes: forward passes of the reference per micro-batch, 0 or 1.
        waiting: of layers that come and go, what `planning.plan_step` takes of their time.
    """

    def __init__(
        self,
        memory: Any,
        limit: float,
        checkpoint_layers: int | str,
        max_tokens: int | str | None,
        reference_passes: int,
        waiting: Mapping[str, Any] | None = None,
    ):
        if max_tokens == "auto" and memory is None:
            why = "the planner does not know this model's shape" if wing("planning") else NO_PLANNER
            raise OptionError(f"max_tokens_per_microbatch='auto': {why}. Give a number.")
        if memory is not None and isinstance(checkpoint_layers, int) and checkpoint_layers > memory.layers:
            raise OptionError(
                f"checkpoint_layers={checkpoint_layers}: the model has {memory.layers} layers. Give at most that, or "
                "'auto'."
            )
        self.memory, self.layers, self.max_tokens = memory, checkpoint_layers, max_tokens
        self.reference_passes, self.waiting = reference_passes, waiting or {}
        self._keep_within(limit)
        automatic = memory is not None and "auto" in (checkpoint_layers, max_tokens)
        if memory is not None and automatic and (fixed := sum(memory.fixed.values())) > limit:
            logger.warning(
                "Weights, adapter and optimizer alone take %.1f GiB of the %.1f GiB that there are: it will hardly "
                "fit. `dpo-peft plan` shows what does.",
                *(fixed / GIB, limit / GIB),
            )

    def _keep_within(self, limit: float) -> None:
        self.limit, self._unchecked = limit, 0
        if self.memory is not None and self.memory.fused and self.layers == "auto":
            # Tokens that fit without a checkpoint, all of them predicted: most micro-batches of pairs have fewer.
            self._unchecked = self.memory.largest_tokens(limit, 0, KEYS_OF_PAIRS, 1.0)

    def checkpointed(self, batch: PackedBatch) -> tuple[int, int]:
        """Returns how many of the first layers are checkpointed in this micro-batch, and how many of these keep what
        attention gave."""
        if isinstance(self.layers, int):
            return self.layers, 0
        if self.memory is None:
            return 10**6, 0  # all
        tokens, keys, predicted, given, scores = _size(batch)
        if tokens <= self._unchecked and keys <= KEYS_OF_PAIRS * self._unchecked:
            return 0, 0
        planning = required("planning", "checkpoint_layers='auto'")
        return planning.checkpoints_for(self.memory, tokens, keys, predicted, self.limit, given, scores)

    def peak(self, batch: PackedBatch) -> float:
        """Returns the bytes that tensors take at the worst moment of a micro-batch, as `memory` predicts it."""
        assert self.memory is not None
        layers, attended = self.checkpointed(batch)
        *size, given, _ = _size(batch)
        return self.memory.peak(*size, layers, given, attended)

    def tighten(self, held: float) -> bool:
        """Keeps a tenth below the bytes that tensors `held` when memory ran out, from now on. Returns whether that
        changes anything: the same micro-batches may fit with more layers checkpointed."""
        adjustable = self.memory is not None and self.memory.fused and self.layers == "auto"
        if not adjustable or held <= 0 or _TIGHTENED * held >= self.limit:
            return False
        self._keep_within(_TIGHTENED * held)
        return True

    def microbatch_tokens(self, samples: Sequence[tuple[float, ...]]) -> int:
        """Returns the tokens of a micro-batch, for an optimizer step's rows by tokens, keys, predicted and given
        tokens."""
        if self.max_tokens != "auto":
            assert isinstance(self.max_tokens, int)
            return self.max_tokens
        planning, passes = required("planning", "max_tokens_per_microbatch='auto'"), self.reference_passes
        plan = planning.plan_step(samples, self.memory, self.limit, reference_passes=passes, **self.waiting)
        return max(plan.max_tokens, 1)


def _size(batch: PackedBatch) -> tuple[int, int, int, int, float]:
    """Returns the tokens, keys, predicted and given tokens and scores of a packed batch (`packing.Size`)."""
    assert batch.kv_index is not None and batch.segments is not None
    tokens = batch.input_ids.numel()
    given = tokens - batch.alora_offsets[0] if batch.alora_offsets else 0
    scores = sum(
        length * (length / 2 + (batch.segments[context][0] if context != i else 0))
        for i, (length, context) in enumerate(batch.segments)
        if context != i or not given
    )
    return tokens, len(batch.kv_index), len(batch.target), given, scores


def memory_limit(device: torch.device, max_memory_gib: float | None, loaded: float) -> float:
    """Returns the bytes that tensors may take: the option's, or most of what is free beside `loaded` bytes of them.
    Raises `OptionError` where the option is set and nothing predicts what stays below it."""
    if max_memory_gib is not None:
        if wing("planning") is None:
            raise OptionError(f"max_memory_gib={max_memory_gib} has no effect: {NO_PLANNER}. Leave it out.")
        return max_memory_gib * GIB
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        # A process may have been given a share of the GPU, which `mem_get_info` does not know.
        share = torch.cuda.get_per_process_memory_fraction(device)
        return _USED_SHARE * min(free + torch.cuda.memory_reserved(device), share * total)
    return loaded + _USED_SHARE_OF_RAM * psutil.virtual_memory().available


def layers_to_stream(model: PeftModel, args: DPOConfig, frozen: str | None) -> int:
    """Returns how many decoder layers' frozen weights stay in CPU memory: the option's, or what the GPU can't hold.
    The same in all processes, whatever each has free; all of them must call it, with the model in the CPU's memory.
    `frozen` is the reference's adapter, if it has one."""
    if isinstance(args.stream_layers, int):
        return args.stream_layers
    layers, number = decoder_layers(unwrap(model)), 0
    if args.device.type != "cpu":  # whose memory they lie in anyway
        stored = storage_report(model, reference=frozen)
        limit = memory_limit(args.device, args.max_memory_gib, 0)
        package, kind = wing("fused"), model.config.get_text_config(decoder=True).model_type
        fused = args.fused_layers is not False and package is not None and kind in package.recognition.MODEL_TYPES
        sizes = tuple(sum(aligned(part.nbytes) for part in frozen_tensors(layer)) for layer in layers)
        memory = _predicted(model, args, stored, fused, layer_bytes=sizes)
        number = len(layers) if memory is None else _fewest(memory, limit, args)
    number = max(gather_over_processes(number))
    logger.info("stream_layers='auto': %d of %d decoder layers are streamed.", number, len(layers))
    return number


def _fewest(memory: Any, limit: float, args: DPOConfig) -> int:
    planning = required("planning", "stream_layers='auto'")
    most = float(args.per_device_train_batch_size * args.gradient_accumulation_steps * 2 * (args.max_length or 10**6))
    if isinstance(args.max_tokens_per_microbatch, int):
        most = min(most, args.max_tokens_per_microbatch)
    passes = int(not args.caches_reference)
    return planning.layers_to_stream(memory, limit, _pace(args), args.max_length, most, passes)


def _pace(args: DPOConfig) -> Any:
    """Returns how fast this process's GPU is, as far as its name tells."""
    gpu = torch.cuda.get_device_properties(args.device)
    return required("planning", "stream_layers").of_size(gpu.name, gpu.total_memory).pace(bool(args.fsdp))


def _predicted(
    model: PeftModel, args: DPOConfig, stored: StorageReport, fused: bool, packed: bool = False, **more: Any
) -> Any:
    """Returns the planner's memory of a model; None where it can't be predicted."""
    try:
        if (planning := wing("planning")) is None:
            raise OptionError(f"{NO_PLANNER}.")
        found = planning.MemoryModel.of_model(
            model,
            stored,
            optimizer=str(getattr(args.optim, "value", args.optim)),
            element=(autocast_dtype(args) or model.get_input_embeddings().weight.dtype).itemsize,
            fused=fused,
            packed=packed,
            offload=args.activation_offloading,
            row=args.max_length,
            **more,
        )
        if fused or "auto" in (args.max_tokens_per_microbatch, args.stream_layers):
            found.peak(1, 1, 1, 0)  # what its layers keep is found out when it is needed
        return found if found.fixed else None
    except OptionError as error:  # not a model that the planner knows, or not an optimizer
        logger.info("Memory can't be predicted: %s", error)
        return None


def _where_layers_are(model: PeftModel) -> dict[str, Any]:
    """Returns what the planner is told of layers that come and go."""
    if (placement := placement_of(model)) is None:
        return {}
    sizes = tuple(layer.flat.numel() for layer in placement.layers)
    streamed = len(sizes) if placement.shards == 1 else 0
    return {"layer_bytes": sizes, "streamed": streamed, "shards": placement.shards}


def place_layers(model: PeftModel, args: DPOConfig, frozen: str | None) -> None:
    """Shards or streams the base's decoder layers, as the options say, and moves the rest to the device."""
    if args.fsdp:
        shard(model, args.device, by_machine=args.fsdp == "hybrid_shard")
    else:
        stream(model, args.device, layers_to_stream(model, args, frozen))


def plan_memory(
    model: PeftModel, args: DPOConfig, plan: ForwardPlan, frozen: str | None, needs_reference: bool
) -> MemoryBudget:
    """Decides how memory is used, and tells fused layers how many of them are checkpointed.

    `plan` says how batches are laid out and scored, and `frozen` is the reference's adapter, if it has one. Raises
    `OptionError` for an option that has no effect on this model or device.
    """
    fused, layers = plan.fused, args.checkpoint_layers if args.gradient_checkpointing else 0
    assert layers is not None
    for_fused = {
        "checkpoint_layers": args.gradient_checkpointing and layers != "auto",
        "activation_offloading": args.activation_offloading,
        "max_memory_gib": args.max_memory_gib is not None and args.max_tokens_per_microbatch != "auto",
    }
    if fused is None and (given := [name for name, on in for_fused.items() if on]):
        raise OptionError(
            f"{', '.join(given)}: for fused layers, and here the model's own run ({plan.unfused or plan.reason}). "
            "Leave it out."
        )
    if args.activation_offloading and args.device.type == "cpu":
        raise OptionError("activation_offloading has no effect on a CPU: leave it out.")
    stored = storage_report(model, reference=frozen)
    limit = memory_limit(args.device, args.max_memory_gib, stored.quantized + stored.unquantized + stored.trainable)
    packed = fused is not None and fused.attention == "packed"
    memory = _predicted(model, args, stored, fused is not None, packed, **_where_layers_are(model))
    passes = int(needs_reference and not args.caches_reference)  # of the reference, per micro-batch
    waiting = {}
    if memory is not None and memory.placed and args.device.type == "cuda":
        pace = _pace(args)
        waiting = {"copy_tokens": pace.copy_tokens(memory), "least_tokens": pace.least_tokens(memory)}
    budget = MemoryBudget(memory, limit, layers, args.max_tokens_per_microbatch, passes, waiting)
    if fused is not None:
        fused.checkpointed, fused.offload = budget.checkpointed, args.activation_offloading
    return budget
