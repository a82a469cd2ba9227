"""Where the frozen layers lie: in shards over the processes, or in the CPU's memory, and on the GPU while they run.

A base that is too large for one card needs to be there as a whole at no time: its decoder layers are computed one
after the other, in the forward pass and again, in the opposite order, in the backward pass. So the frozen weights of
a layer are laid end to end into one flat tensor of bytes, of which the layer's own tensors are views. When the layer
is about to run its bytes are brought in, the next layer's are on their way, and all others' are given back. The views
stay as they are: what reads shapes and dtypes sees no difference, nor does a packed 4-bit weight, whose bytes nobody
interprets on the way.

Two ways to bring bytes in: PyTorch's `fully_shard` (FSDP2) gathers them from all processes; or they are copied from
pinned CPU memory, on a stream of their own. Adapter, norms, biases, embeddings and head stay where they are.
"""

import logging
import os
import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeAlias, cast

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..distributed import serve_while_waiting, world_size
from ..errors import OptionError
from ..forward.modules import decoder_layers, unwrap
from ..reference.fingerprint import base_parts

logger = logging.getLogger(__name__)

_ALIGNMENT = 256  # bytes; views start at multiples of it
SMALL = 1024  # elements of a quantization constant that stays resident: codes and offsets
_FORWARD, _BACKWARD = 2, 1  # passes
_AT_ONCE = ("merge_adapter", "unmerge_adapter", "merge_and_unload", "save_pretrained")  # they read all layers


class Streamed:
    """The bytes of one layer, which lie in the CPU's memory and are copied when they are needed: `flat` is (n,) uint8
    on its device, with an empty storage unless they are there.

    Args:
        home: (n,) uint8, on the CPU.
        device: where they are needed.
        stream: for copies, while the GPU computes; None on a CPU, where they are done at once.
    """

    def __init__(self, home: Tensor, device: torch.device, stream: Any = None):
        self.home = home if stream is None else home.pin_memory()
        self.flat, self.stream = home.new_empty(home.shape, device=device), stream
        self._arrived: Any = None  # an event, while they are there or on their way
        self.flat.untyped_storage().resize_(0)

    def prefetch(self) -> None:
        """Begins to bring them in."""
        if self._arrived is not None:
            return
        self.flat.untyped_storage().resize_(self.home.nbytes)
        if self.stream is None:
            self.flat.copy_(self.home)
            self._arrived = True
            return
        # The memory may be that of another layer, whose last work is queued: the copy waits for it.
        self.stream.wait_stream(torch.cuda.current_stream(self.flat.device))
        with torch.cuda.stream(self.stream):
            self.flat.copy_(self.home, non_blocking=True)
            self._arrived = self.stream.record_event()

    def open(self) -> None:
        """Brings them in, if that has not begun yet; work that is queued from here on may read them."""
        self.prefetch()
        if self.stream is not None:
            torch.cuda.current_stream(self.flat.device).wait_event(self._arrived)

    def close(self) -> None:
        """Gives the memory back, as soon as what is queued by now is done."""
        if self._arrived is not None:
            self.open()  # a copy that is under way must not meet the next owner of its memory
            self.flat.untyped_storage().resize_(0)
            self._arrived = None


class _Flat(nn.Module):
    """What `fully_shard` is given: a module with one parameter."""

    def __init__(self, flat: Tensor):
        super().__init__()
        self.flat = nn.Parameter(flat, requires_grad=False)


class Sharded:
    """The same of bytes, all of them, on the device, of which each process of a mesh holds its part, under
    `torch.distributed.fsdp.fully_shard`. The mesh has one dimension; or two, of which the second shards."""

    def __init__(self, flat: Tensor, mesh: DeviceMesh):
        from torch.distributed.fsdp import fully_shard

        # Never called: `unshard` and `reshard` are. FSDP2 frees and fills the storage of one and the same tensor.
        self.module = cast(Any, fully_shard(_Flat(flat), mesh=mesh))
        self.module.unshard()
        self.flat = self.module.flat.detach()
        self._coming: Any = None
        self.module.reshard()

    def prefetch(self) -> None:
        """See `Streamed`."""
        if self._coming is None:
            self._coming = self.module.unshard(async_op=True)

    def open(self) -> None:
        """See `Streamed`."""
        self.prefetch()
        self._coming.wait()

    def close(self) -> None:
        """See `Streamed`."""
        if self._coming is not None:
            self._coming.wait()
            self._coming = None
            self.module.reshard()


Bytes: TypeAlias = Streamed | Sharded


class _Turns:
    """Whose pass comes next.

    All processes gather in one order, whatever each is doing: one may have more micro-batches than another, or find
    the reference's log-probs in its cache, or complete a sample. So before a pass they agree on what comes next, and
    one that has nothing to do serves the others' gathers; so it does while it waits for them at a meeting
    (`distributed.py`). A pass that is left early, as memory ran out or the gradient ended, is served to its end.
    """

    def __init__(self) -> None:
        self._group: dist.ProcessGroup | None = None
        self._sharded: list[weakref.ref[Placement]] = []  # made in the same order in all processes
        self._running: weakref.ref[Placement] | None = None  # whose pass is under way

    def join(self, placement: "Placement") -> None:
        if self._group is None:
            self._group = dist.new_group(backend="gloo")
            serve_while_waiting(self)
        self._sharded.append(weakref.ref(placement))

    def serve(self) -> None:
        """Takes part in the others' passes until no process has one to do. All processes must call it."""
        self._until(0)

    def wait_for(self, placement: "Placement", direction: int) -> None:
        at = self._sharded.index(weakref.ref(placement))
        self._until(2 * at + direction)
        self._running = self._sharded[at]

    def _until(self, wanted: int) -> None:
        while True:
            if self._running is not None and (running := self._running()) is not None:
                running.finish()
            if (agreed := self._agree(wanted)) == wanted:
                return
            at, direction = (agreed - 1) // 2, 2 - agreed % 2
            self._running, other = self._sharded[at], self._sharded[at]()
            assert other is not None, "another process uses a sharded model that this one has dropped"
            other.begin(direction)

    def _agree(self, wanted: int) -> int:
        """Returns the largest of what the processes want: forward passes come before backward ones."""
        flag = torch.tensor([wanted])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return int(flag)


_TURNS = _Turns()


class Placement:
    """Brings the layers in, in the order in which passes over the model need them; all processes do, of `shards`."""

    def __init__(self, layers: Sequence[Bytes], shards: int = 1):
        self.layers, self.shards = layers, shards
        self._direction, self._at = 0, len(layers) - 1  # the pass under way, and how many layers it has behind it
        if shards > 1:
            _TURNS.join(self)

    @property
    def nbytes(self) -> int:
        """Returns the bytes of all layers together."""
        return sum(layer.flat.numel() for layer in self.layers)

    def arrive(self, index: int) -> None:
        """Makes a layer's weights present; to be called before it runs, and before its backward pass does."""
        # In a backward pass: of autograd itself, or of a checkpointed layer's second forward pass inside it.
        backward = torch._C._current_graph_task_id() != -1
        direction, place = (_BACKWARD, len(self.layers) - 1 - index) if backward else (_FORWARD, index)
        if direction != self._direction or place < self._at:
            if self.shards > 1:
                _TURNS.wait_for(self, direction)
            self.begin(direction)
        self._go_to(place)

    def begin(self, direction: int) -> None:
        """Begins a pass."""
        self._direction, self._at = direction, -1

    def finish(self) -> None:
        """Brings in what is left of the pass under way."""
        self._go_to(len(self.layers) - 1)

    def _go_to(self, place: int) -> None:
        while self._at < place:
            self._at += 1
            order = self.layers if self._direction == _FORWARD else self.layers[::-1]
            for layer in (*order[: self._at], *order[self._at + 2 :]):
                layer.close()
            order[self._at].open()
            if self._at + 1 < len(order):
                order[self._at + 1].prefetch()


class Leave(torch.autograd.Function):
    """Passes a layer's output on. Its backward, which comes before the layer's, makes the layer's weights present."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, placement: Placement, index: int) -> Tensor:
        """Returns `x`."""
        ctx.placement, ctx.index = placement, index
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        """Returns the gradient as it is."""
        ctx.placement.arrive(ctx.index)
        return grad_outputs[0], None, None


# ---- Placing a model ------------------------------------------------------------------------------------------------


def shard(model: nn.Module, device: torch.device, by_machine: bool = False) -> Placement:
    """Gives each process its part of every decoder layer's frozen weights; all processes must call it, with the same
    PEFT model or transformers causal LM, in CPU memory or on the process's `device`. `by_machine`: the processes of
    each machine hold the whole base between them, and gather from each other alone; without effect where a machine has
    one process. Raises `OptionError` for a base that is stored in another way than in 4, 16 or 32 bits."""
    machine = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    shape = (world_size() // machine, machine) if by_machine and 1 < machine < world_size() else (world_size(),)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    placed = _place(model, device, None, lambda flat: Sharded(flat.to(device), mesh), shape[-1])
    logger.info(
        "The base's %d decoder layers, %.1f MiB, are sharded: each process holds one part in %d.",
        *(len(placed.layers), placed.nbytes / 2**20, placed.shards),
    )
    return placed


def stream(model: nn.Module, device: torch.device, number: int) -> Placement:
    """Keeps the frozen weights of `number` decoder layers in CPU memory, and copies them to `device` as they run. The
    layers are spread evenly over the model, so that each copy has as much computation to hide behind. Raises
    `OptionError` as `shard`, or where there are fewer layers."""
    count = len(decoder_layers(unwrap(model)))
    if number > count:
        raise OptionError(f"stream_layers={number}: the model has {count} layers. Give at most that, or 'auto'.")
    side = torch.cuda.Stream(device) if device.type == "cuda" else None
    indices = [i * count // number for i in range(number)]
    placed = _place(model, device, indices, lambda flat: Streamed(flat.cpu(), device, side))
    logger.info(
        "%d of the base's %d decoder layers, %.1f MiB, are streamed from CPU memory.",
        *(number, count, placed.nbytes / 2**20),
    )
    return placed


def _place(
    model: nn.Module, device: torch.device, indices: Sequence[int] | None, lay: Any, shards: int = 1
) -> Placement:
    causal_lm = unwrap(model)
    layers = list(decoder_layers(causal_lm))
    frozen = [frozen_tensors(layer) for layer in layers]
    uses = Counter(id(tensor) for tensors in frozen for tensor in tensors)
    frozen = [[tensor for tensor in tensors if uses[id(tensor)] == 1] for tensors in frozen]  # others stay
    chosen = range(len(layers)) if indices is None else indices
    laid = []
    for index in chosen:
        one: Bytes = lay(_flatten(frozen[index]))
        one.open()
        _view(one.flat, frozen[index])
        one.close()
        laid.append(one)
    _move(causal_lm, device, {id(tensor) for index in chosen for tensor in frozen[index]})
    placement = Placement(laid, shards)
    for i, index in enumerate(chosen):
        _attach(layers[index], placement, i)
    vars(causal_lm)["_placement"] = placement
    for whole in (causal_lm, *([model.base_model] if isinstance(model, PeftModel) else [])):
        vars(whole).update(dict.fromkeys(_AT_ONCE, _refused))
    vars(model)["to"] = lambda *_, **__: model  # it is there; the trainer would copy what is elsewhere just now
    return placement


def _refused(*_: object, **__: object) -> None:
    why = "The base's layers come and go (fsdp, stream_layers): it can't be merged or saved as a whole"
    raise OptionError(f"{why}. Save the adapter (`save_model`), and merge it by `dpo-peft merge`.")


def placement_of(model: nn.Module) -> Placement | None:
    """Returns what brings in a model's layers; None if they are there at all times."""
    return vars(unwrap(model)).get("_placement")


def frozen_tensors(layer: nn.Module) -> list[Tensor]:
    """Returns what comes and goes of a layer: matrices, and the large quantization constants of 4-bit ones."""
    from bitsandbytes.nn import Params4bit

    found = []
    for name, tensor in base_parts(layer):
        if not isinstance(tensor, Tensor):
            continue
        if type(tensor) not in (Tensor, nn.Parameter, Params4bit) or tensor.dtype == torch.int8:
            raise OptionError(
                f"A base stored as {type(tensor).__name__} can't be sharded or streamed ({name}): load it in 4 bits "
                "(quantize_base, the default), or in 16."
            )
        if tensor.ndim > 1 or (".quant." in name and tensor.numel() > SMALL):
            found.append(tensor)
    return found


def aligned(size: int) -> int:
    """Returns the bytes that a tensor of `size` bytes takes in its layer's."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _flatten(tensors: Sequence[Tensor]) -> Tensor:
    parts = [tensor.detach().contiguous().view(-1).view(torch.uint8) for tensor in tensors]
    return torch.cat([nn.functional.pad(part, (0, -part.numel() % _ALIGNMENT)) for part in parts])


def _view(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    """Makes the tensors views of their bytes in `flat`."""
    start = 0
    for tensor in tensors:
        shape, size = tensor.shape, tensor.nbytes
        # Set as a whole, without reading it: PyTorch does the same for a parameter that moves to another device.
        tensor.data = flat.narrow(0, start, size).view(tensor.dtype).view(shape)
        start += aligned(size)


def _attach(layer: nn.Module, placement: Placement, index: int) -> None:
    """Lets the layer itself, called as the model calls it, bring its weights in."""

    def bring_layer_in(*_: object) -> None:
        placement.arrive(index)

    def layer_leaves(module: nn.Module, inputs: object, output: Any) -> Any:
        return tuple(map(leaving, output)) if isinstance(output, tuple) else leaving(output)

    def leaving(x: Any) -> Any:
        return Leave.apply(x, placement, index) if isinstance(x, Tensor) and x.requires_grad else x

    layer.register_forward_pre_hook(bring_layer_in)
    layer.register_forward_hook(layer_leaves)
    vars(layer).update(bring_in=bring_layer_in, leaving=leaving)


def _move(model: nn.Module, device: torch.device, but: set[int]) -> None:
    """Moves all tensors to the device but those of `but`, which come."""
    constants = (tensor for name, tensor in base_parts(model) if isinstance(tensor, Tensor) and ".quant." in name)
    for tensor in (*model.parameters(), *model.buffers(), *constants):
        if id(tensor) not in but:
            tensor.data = tensor.data.to(device)
    if hasattr(model, "hf_device_map"):
        vars(model)["hf_device_map"] = {"": device}
