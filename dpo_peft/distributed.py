"""Training in several processes, each with the whole adapter: its gradients cross, and what is gathered of the base.

There is no wrapper around the model. Every process reads the same global micro-batch in the same order, keeps its
share of the rows, and divides its losses by the items of the whole optimizer batch; after the last micro-batch the
gradients are summed. So a step is that of one process with the same global batch, an uneven last batch included.
Where the base is sharded (`model.placement`), a process that waits for the others takes part in their gathers.

Every function but the checks is the identity in a single process. Those that communicate are collectives: all
processes must call them, in the same order.
"""

import heapq
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from .errors import OptionError, refuse

T = TypeVar("T")
BUCKET_BYTES = 64 * 2**20  # gradients cross in flat pieces of at most this size: few messages, little extra memory

_SPLIT_BY = ("DeepSpeed", "Megatron-LM")
_TAKEN = "DPO_PEFT_FSDP"  # what accelerate's variables of FSDP asked for, after they were taken out
_SPLITS_MODEL = {"tp": "tensor", "cp": "context", "sp": "sequence", "dp_shard": "sharded data"}
_OFFERED = ("NO", "MULTI_CPU", "MULTI_GPU")
_ON = ("1", "true", "yes", "y", "on")
_SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")  # device maps
_REMEDY = (
    "Launch with recipes/accelerate/ddp.yaml: every process holds the whole model and only LoRA's small gradients "
    "cross. For a base that is too large for one card launch with recipes/accelerate/fsdp2.yaml (or set "
    "fsdp='full_shard'): its frozen layers are sharded. Or set stream_layers='auto'."
)
# Options that all processes must agree on, or they would not take the same step.
_SAME_OPTIONS = (
    "seed data_seed per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps max_steps "
    "num_train_epochs learning_rate max_grad_norm eval_steps save_steps max_length loss_type loss_weights beta "
    "reference sync_ref_model ref_model_mixup_alpha ref_model_sync_steps"
).split()


class Serves(Protocol):
    """What a process does for the others while it waits for them."""

    def serve(self) -> None:
        """Takes part in what the others do together, until all of them come to wait."""


_serving: list["weakref.ref[Serves]"] = []


def serve_while_waiting(server: Serves) -> None:
    """Has a process serve the others before each meeting, for as long as `server` lives. All must call it alike."""
    _serving.append(weakref.ref(server))


def meet() -> None:
    """Comes to where all processes wait for each other; every collective here begins with it.

    To be called before those of others, where the processes may have something different behind them.
    """
    for server in _serving:
        if (alive := server()) is not None:
            alive.serve()


def wait_for_all() -> None:
    """Waits until all processes are here."""
    if world_size() > 1:
        meet()
        dist.barrier()


def world_size() -> int:
    """Returns the number of processes; 1 if they aren't connected."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Returns the index of this process; 0 if there is only one."""
    return dist.get_rank() if world_size() > 1 else 0


def _device() -> torch.device | str:
    """Returns where tensors must lie to be sent."""
    on_cpu = "gloo" in dist.get_backend() or dist.get_backend() == "mpi"
    return "cpu" if on_cpu else torch.device("cuda", torch.cuda.current_device())


# ---- Values ---------------------------------------------------------------------------------------------------------


def sum_over_processes(values: Sequence[float]) -> list[float]:
    """Returns sums, one per value, in float64 (whole numbers are exact below 2**53).

    Args:
        values: as many in every process.
    """
    if world_size() == 1 or not values:
        return [float(value) for value in values]
    meet()
    sums = torch.tensor(values, dtype=torch.float64, device=_device())
    dist.all_reduce(sums)
    return sums.tolist()


def gather_over_processes(value: T) -> list[T]:
    """Returns each process's value in the order of ranks; anything that can be pickled, tensors on the CPU."""
    if world_size() == 1:
        return [value]
    meet()
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def any_process(flag: bool) -> bool:
    """Returns whether any process has set the flag: what stops one must stop all, or they wait for it for ever."""
    return sum_over_processes([flag])[0] > 0


def check_same(name: str, value: object) -> None:
    """Refuses a value that differs between the processes.

    Raises:
        OptionError: in all of them, with the values by rank.
    """
    values = gather_over_processes(value)
    if any(other != values[0] for other in values):
        raise OptionError(
            f"{name} differs between the processes (by rank: {values}): start all of them with the same options and "
            "the same data. Each takes its share of every batch by itself."
        )


# ---- Weights --------------------------------------------------------------------------------------------------------


def copy_from_first(parameters: Iterable[nn.Parameter]) -> None:
    """Gives every process the trainable weights of rank 0: without a seed each has drawn an adapter of its own."""
    if world_size() == 1:
        return
    meet()
    for parameter in parameters:
        if parameter.requires_grad:
            sent = parameter.detach().to(_device()).contiguous()
            dist.broadcast(sent, src=0)
            parameter.data.copy_(sent)


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replaces each gradient by its sum over the processes.

    A process without a gradient, because its share of the batch was empty, counts as zeros and gets the sum. A
    gradient that no process has stays None.

    Args:
        parameters: the same in every process and in the same order; the frozen ones are passed over.
    """
    if world_size() == 1:
        return
    meet()
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    present = torch.tensor([p.grad is not None for p in trainable], dtype=torch.int32, device=_device())
    dist.all_reduce(present)
    for parameter, processes in zip(trainable, present.tolist(), strict=True):
        if processes and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for bucket in _buckets([parameter.grad for parameter in trainable if parameter.grad is not None]):
        flat = torch.cat([grad.reshape(-1) for grad in bucket]).to(_device())
        dist.all_reduce(flat)
        for grad, part in zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True):
            grad.copy_(part.view_as(grad))


def _buckets(grads: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yields groups of one dtype and device and at most `BUCKET_BYTES`, the same in every process."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for grad in grads:
        kinds.setdefault((grad.dtype, grad.device), []).append(grad)
    for kind in kinds.values():
        bucket: list[Tensor] = []
        size = 0
        for grad in kind:
            if bucket and size + grad.nbytes > BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
            bucket.append(grad)
            size += grad.nbytes
        yield bucket


# ---- Data -----------------------------------------------------------------------------------------------------------


def longest_first(order: Sequence[int], sizes: Sequence[float], number: int) -> list[list[int]]:
    """Spreads items over bins that are level: each item goes into the emptiest one (Graham 1969).

    Args:
        order: items as indices into `sizes`, the largest first.
        sizes: of all items.
        number: of bins.
    """
    bins: list[list[int]] = [[] for _ in range(number)]
    loads: list[tuple[float, int]] = [(0, b) for b in range(number)]  # a heap
    for i in order:
        load, b = loads[0]
        bins[b].append(i)
        heapq.heapreplace(loads, (load + sizes[i], b))
    return bins


def shares(sizes: Sequence[int], processes: int) -> list[list[int]]:
    """Returns for each process which rows of a batch are its own, in their order, level by size; of rows of one size
    every `processes`-th. It depends on the sizes alone, so each process finds the same."""
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    return [sorted(share) for share in longest_first(order, sizes, processes)]


class ShareCollator:
    """Keeps this process's rows of a global batch and collates them, with their places in it as `order`.

    A small batch may leave none: then `{"empty": True}`.

    Args:
        collator: of rows.
        size: of a row, in tokens.
    """

    def __init__(self, collator: Callable[[list[Any]], dict[str, Any]], size: Callable[[Any], int]):
        self.collator, self.size = collator, size
        # Read here: a data loader's workers are processes of their own, which are not connected.
        self.rank = rank()
        self.world_size = world_size()

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        """Collates this process's part of a global batch's rows."""
        share = shares([self.size(row) for row in rows], self.world_size)[self.rank]
        return {**self.collator([rows[i] for i in share]), "order": share} if share else {"empty": True}


def unshard(dataloader: Any, dataset: Any = None) -> None:
    """Makes a data loader that accelerate prepared for this process give every batch to every process, in one order.

    Accelerate gives each process other batches and fills the last ones up with rows from the start of the dataset;
    after this the loader's batches, length, and count of remaining rows are those of a single process.

    Args:
        dataloader: from `Accelerator.prepare`, not iterated yet; changed in place.
        dataset: what the loader was made from. Needed for a stream: accelerate has replaced it by a part of it.

    Raises:
        OptionError: a stream that is split between the processes already, or that isn't given.
    """
    if world_size() == 1:
        return
    if isinstance(dataloader.dataset, IterableDataset):
        if dataset is None or getattr(dataset, "_distributed", None) is not None:
            raise OptionError(
                "A streaming dataset must be whole in every process: don't use split_dataset_by_node or shard, each "
                "process takes its share of every batch by itself."
            )
        # Past the setter, which refuses any change; iterators read the attribute when they are made.
        object.__setattr__(getattr(dataloader, "base_dataloader", dataloader), "dataset", dataset)
        return
    shard = dataloader.batch_sampler
    # One process of one; with even_batches it would still repeat rows to fill the last batch.
    shard.num_processes, shard.process_index, shard.even_batches = 1, 0, False


# ---- How the processes were launched --------------------------------------------------------------------------------


def check_launch(args: Any, env: Mapping[str, str] | None = None) -> None:
    """Refuses to start in a way that isn't offered: all processes must hold the whole model and know of each other.

    Args:
        args: a `DPOConfig`, which has connected the processes.
        env: the environment that the launcher has set; `os.environ` if None.

    Raises:
        OptionError: what was asked for, and the remedy.
    """
    env = os.environ if env is None else env
    for what in _splits(args, env):
        raise OptionError(f"{what}. {_REMEDY}")
    launched = int(env.get("WORLD_SIZE") or 1)
    if launched > 1 and args.world_size == 1:
        raise OptionError(
            f"WORLD_SIZE={launched} says that {launched} processes were launched, but they are not connected and each "
            "would train alone: on a machine without a GPU pass use_cpu=True; for a single process unset WORLD_SIZE."
        )
    if args.fsdp and args.world_size == 1:
        raise OptionError(
            f"fsdp={args.fsdp!r} shards the base over several processes, and there is one: start several (`dpo-peft "
            "train --num_processes 2`), or leave it out. On one GPU, stream_layers keeps layers in the CPU's memory."
        )
    if args.world_size > 1:
        device_map = (args.model_init_kwargs or {}).get("device_map")
        refuse(
            {
                "accelerator_config: split_batches=True has no effect: per_device_train_batch_size is per process, "
                "and every batch is shared out already. Leave it out.": args.accelerator_config.split_batches,
                "average_tokens_across_devices=False is not available: losses are means over the whole optimizer "
                "batch, whatever the number of processes. Leave it out.": not args.average_tokens_across_devices,
                f"model_init_kwargs: device_map={device_map!r} would spread each process's model over all cards: "
                "leave it out, every process loads it on its own card.": device_map in _SPREADS,
            }
        )
        check_same("The options", {name: str(getattr(args, name)) for name in _SAME_OPTIONS})


def sharding(fsdp: object, env: MutableMapping[str, str]) -> str | None:
    """Returns how the base is to be sharded: None, "full_shard", or "hybrid_shard" (within each machine).

    Accelerate's variables are taken out of `env`: it would wrap the model, and shard the adapter with it.

    Args:
        fsdp: the option of `TrainingArguments`.
        env: the environment, in which accelerate's launcher says what its config file says.

    Raises:
        OptionError: another way to shard.
    """
    if env.get("ACCELERATE_USE_FSDP", "").lower() in _ON:
        if env.get("FSDP_VERSION") != "2" or env.get("FSDP_OFFLOAD_PARAMS", "").lower() in _ON:
            raise OptionError(
                "accelerate's config asks for FSDP 1, or for FSDP with parameters on the CPU. Set fsdp_version: 2 and "
                "fsdp_offload_params: false in it, as `dpo-peft recipes fsdp2` shows; or, to keep layers in the CPU's "
                "memory, leave FSDP out and set stream_layers."
            )
        hybrid = env.get("FSDP_SHARDING_STRATEGY") in ("HYBRID_SHARD", "4")
        env.update({"ACCELERATE_USE_FSDP": "false", _TAKEN: "hybrid_shard" if hybrid else "full_shard"})
    words = str("full_shard" if fsdp is True else fsdp or "").lower().replace("auto_wrap", "").split()
    if not words or words == ["false"]:
        return env.get(_TAKEN)
    if words not in (["full_shard"], ["hybrid_shard"], ["true"]):
        raise OptionError(
            f"fsdp={fsdp!r}: the frozen base is sharded over all processes by 'full_shard', or over those of each "
            "machine by 'hybrid_shard'. To keep layers in the CPU's memory leave it out, and set stream_layers."
        )
    return words[0].replace("true", "full_shard")


def _splits(args: Any, env: Mapping[str, str]) -> Iterator[str]:
    """Yields what was asked for by which a process would hold less than the whole model, as sentences."""

    def is_set(variable: str) -> bool:
        return env.get(variable, "").lower() in _ON

    for name in _SPLIT_BY:
        if is_set(variable := f"ACCELERATE_USE_{name.upper().replace('-', '_')}"):
            yield f"{name} is not offered ({variable} is set, by accelerate's config)"
    if args.deepspeed:
        yield "deepspeed is not offered"
    from_env = env if is_set("ACCELERATE_USE_PARALLELISM_CONFIG") else {}
    for short, name in _SPLITS_MODEL.items():
        asked = int(from_env.get(f"PARALLELISM_CONFIG_{short.upper()}_SIZE") or 1)
        size = max(asked, getattr(args.parallelism_config, f"{short}_size", 1))  # 1: there is no such config
        if size > 1:
            yield f"parallelism_config: {name} parallelism ({short}_size={size}) is not offered"
    for option in ("tp_plan", "tp_size", "device_mesh", "distributed_config"):
        if (args.model_init_kwargs or {}).get(option) is not None:
            yield f"model_init_kwargs: {option} splits the model, which is not offered"
    kind = args.distributed_state.distributed_type.value
    if kind not in _OFFERED:
        yield f"Training over {kind} is not offered"
