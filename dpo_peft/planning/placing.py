"""Where a run's options put the base's layers, what that costs in time, and where to put them if they don't fit."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from ..distributed import sharding
from ..errors import OptionError
from ..losses import find_objective
from ..training.packing import Size
from .gpus import Gpu
from .memory import MemoryModel
from .steps import StepPlan, copies_of, hiding_tokens, layers_to_stream, plan_step

MOST_GPUS = 64  # of those that are tried


def needs_reference(o: SimpleNamespace) -> bool:
    """Returns whether an objective of the run has a reference."""
    return any(find_objective(name).needs_reference for name in o.loss_type)


def reference_passes(o: SimpleNamespace) -> int:
    """Returns how many forward passes the reference has in a micro-batch."""
    return int(needs_reference(o) and not o.precompute_ref_log_probs)


def place(o: SimpleNamespace, model: MemoryModel, gpu: Gpu | None, sample: Size) -> MemoryModel:
    """Returns the model with its layers where the options put them; an OptionError where these exclude or need each
    other."""
    o.fsdp = sharding(o.fsdp, {})
    if o.fsdp and o.stream_layers is not None:
        raise OptionError(f"stream_layers={o.stream_layers!r} with fsdp: the layers are sharded already. Set one.")
    if o.fsdp and o.num_processes == 1:
        raise OptionError(f"fsdp={o.fsdp!r} shards the base over several processes: give num_processes too.")
    if o.layer_gb_per_second is not None and not (o.fsdp or o.stream_layers):
        raise OptionError("layer_gb_per_second has no effect without stream_layers or fsdp: set one.")
    if o.fsdp:
        return replace(model, shards=o.num_processes)
    if o.stream_layers == "auto":
        if gpu is None:
            raise OptionError("stream_layers='auto' depends on the GPU: give gpu too, or a number of layers.")
        return replace(model, streamed=_enough(o, model, gpu, sample))
    if (number := o.stream_layers or 0) > model.layers:
        raise OptionError(
            f"stream_layers={number}: the model has {model.layers} layers. Give at most that, or 'auto'."
        )
    return replace(model, streamed=number)


def _enough(o: SimpleNamespace, model: MemoryModel, gpu: Gpu, sample: Size) -> int:
    pace = gpu.pace(False, o.layer_gb_per_second)
    most = sample[0] * o.per_device_train_batch_size * o.gradient_accumulation_steps
    if isinstance(o.max_tokens_per_microbatch, int):
        most = min(most, o.max_tokens_per_microbatch)
    return layers_to_stream(model, gpu.usable, pace, o.max_length, most, reference_passes(o))


def cut(o: SimpleNamespace, model: MemoryModel, gpu: Gpu, sample: Size) -> StepPlan:
    """Returns how an optimizer step of equal samples is run."""
    number = o.per_device_train_batch_size * o.gradient_accumulation_steps
    options: dict[str, Any] = {"reference_passes": reference_passes(o)}
    if isinstance(o.max_tokens_per_microbatch, int):
        options["max_tokens"] = o.max_tokens_per_microbatch
    if model.placed:
        pace = gpu.pace(model.shards > 1, o.layer_gb_per_second)
        options |= {"copy_tokens": pace.copy_tokens(model), "least_tokens": pace.least_tokens(model)}
    return plan_step([sample] * number, model, gpu.usable, **options)


def price(o: SimpleNamespace, model: MemoryModel, gpu: Gpu | None, sample: Size) -> dict[str, Any]:
    """Returns where layers lie, and what it costs: the memory of all processes, and the samples per second of all."""
    size = sum(model.placed)
    sharded = model.shards > 1
    pinned = sum(2 ** math.ceil(math.log2(one)) for one in model.placed)  # PyTorch rounds up
    found: dict[str, Any] = {
        "layers": len(model.placed),
        "shards": model.shards,
        "pinned_memory": 0 if sharded else o.num_processes * pinned,
        "bytes_per_pass": size - size / model.shards if sharded else size,
    }
    if gpu is None or not (step := cut(o, model, gpu, sample)).fits:
        return found
    pace, passes = gpu.pace(sharded, o.layer_gb_per_second), reference_passes(o)
    samples = o.num_processes * sum(len(batch.samples) for batch in step.micro_batches)
    seconds, working = (
        pace.seconds(one, model, passes) for one in (step, step._replace(cost=step.cost - step.waiting))
    )
    checkpointed = min(batch.checkpoint_layers for batch in step.micro_batches) / model.layers
    copies = copies_of(model, 1 + passes)
    return {
        **found,
        "speed_of": gpu.like,
        "measured": gpu.measured is not None,
        "flops": pace.flops,
        "bandwidth": pace.bandwidth,
        "samples_per_second": samples / seconds,
        "samples_per_second_without_waiting": samples / working,
        "lost": 1 - working / seconds,
        "hiding_tokens": hiding_tokens(pace.copy_tokens(model), checkpointed, 1 + passes, copies),
    }


def remedies(o: SimpleNamespace, model: MemoryModel, gpu: Gpu, sample: Size) -> list[dict[str, Any]]:
    """Returns where layers could be instead, so that a sample fits: options, and what `price` says of them."""
    o = SimpleNamespace(**{**vars(o), "layer_gb_per_second": None})
    found = []
    some = replace(model, shards=1, streamed=_enough(o, model, gpu, sample))
    if cut(o, some, gpu, sample).fits:
        found.append({"stream_layers": some.streamed, **price(o, some, gpu, sample)})
    for number in range(max(o.num_processes, 2), MOST_GPUS + 1):
        several = replace(model, shards=number, streamed=0)
        if cut(o, several, gpu, sample).fits:
            o.num_processes = number
            found.append({"fsdp": "full_shard", "num_processes": number, **price(o, several, gpu, sample)})
            break
    return found
