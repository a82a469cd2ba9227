"""How fast a run trains: tokens a second, the share of the bound and the peak of memory, for every training log.

No step waits for it: tokens are counted from shapes, and the clock is read where a log has just waited for the GPU to
read its metrics.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from ..config import DPOConfig
from ..distributed import gather_over_processes, world_size
from ..forward.gguf import GgufLinear
from ..forward.modules import decoder_layers, first_adapted, unwrap
from ..model.experts import expert_weights, experts_per_token
from ..objective import TrainingObjective

Clock = Callable[[], float]  # seconds
PRODUCT = (8192, 4096, 8192)  # of the matrices that a GPU's rate is measured with: as large as those of an 8B model


def passes_over_weights(objective: TrainingObjective, args: DPOConfig) -> int:
    """Returns how many products with each frozen weight a token needs: of the policy's forward pass, of the backward
    pass, which goes on to the layer's input alone, and of the reference, unless there is none or it is cached (also
    while the cache is still being filled)."""
    return 2 + int(objective.needs_reference and not args.caches_reference)


def weights_per_token(model: PeftModel) -> tuple[float, int] | None:
    """Returns how many frozen weights multiply each token, and how many more, the head's, each predicted one.

    Of experts, those that a token is sent to. None where that isn't known: experts that are not found or whose choice
    the config doesn't tell, and models with a tower for images, which sees no tokens.
    """
    text = model.config.get_text_config(decoder=True)
    chosen, experts = experts_per_token(text), expert_weights(model)
    if text is not model.config or (chosen is None) is not (not experts):
        return None
    head, embedded = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    weights = float(_parameters(model))
    weights -= model.num_parameters(only_trainable=True, exclude_embeddings=True)
    for weight in experts.values():
        packed = getattr(weight, "quant_state", None)
        size = math.prod(weight.shape if packed is None else packed.shape)
        weights -= size * (1 - min(1.0, (chosen or 0) / len(weight)))
    return weights - (0 if head is embedded else head.numel()), head.numel()


def _parameters(model: PeftModel) -> int:
    """Counts the weights beside embeddings as transformers does, which counts bytes where they are in GGUF blocks."""
    blocks = [layer for layer in model.modules() if isinstance(layer, GgufLinear)]
    more = sum(layer.in_features * layer.out_features - layer.blocks.numel() for layer in blocks)
    return int(model.num_parameters(exclude_embeddings=True)) + more


def share_below(model: PeftModel) -> float:
    """Returns the share of the decoder layers that are below the first one with an adapter."""
    return first_adapted(model) / len(decoder_layers(unwrap(model)))


def computed_once(tokens: float, given: float, below: float) -> float:
    """Returns how many tokens' way through all layers policy and reference share, forward only: that of `given` ones,
    left to the base, and of others the part `below` the first adapter."""
    return given + below * (tokens - given)


class Throughput:
    """Measures a run, from one training log to the next.

    Tokens are those of the forward pass as they are laid out, of all processes together: a prompt that is shared once,
    and padding not at all. They count once, however often they pass over the weights. The time is that of the steps,
    reading the data included; evaluations, samples, checkpoints and what loggers take are left out, and so are the
    steps of the run before it was resumed.

    The bound is the speed at which the dense products with frozen weights alone would take the whole time, all of them
    at the rate of large bfloat16 products, which is measured as a run begins. They are 2 FLOPs for each pass
    (`passes_over_weights`), weight and token, the head's weights for predicted tokens only. What policy and reference
    have in common needs one pass: prompts of answer-only adapters, layers below the first adapter. Attention, LoRA,
    recomputed layers, norms and unpacking 4-bit weights are no part of it, though they take time: 1 is out of reach.
    """

    def __init__(self, model: PeftModel, objective: TrainingObjective, args: DPOConfig, clock: Clock = perf_counter):
        self._device, self._clock = args.device, clock
        self._passes, self._weights = passes_over_weights(objective, args), weights_per_token(model)
        self._below = share_below(model)
        self.parameters = _parameters(model)
        self.rate: float | None = None  # FLOP/s of all GPUs; None where the share of the bound is not known
        self.tokens = self.predicted = self.seconds = 0.0  # of all steps since `begin` that a log has told of
        self.peak = 0.0  # bytes of the fullest GPU, the highest so far; 0 without one

    def begin(self) -> None:
        """Begins a run, or resumes one."""
        self.rate = gpu_rate(self._device) if self._device.type == "cuda" and self._weights is not None else None
        self.tokens = self.predicted = self.seconds = 0.0
        self._counted: list[float | Tensor] = [0, 0, 0]
        self._since, self._left, self._started = 0.0, 0.0, False

    def count(self, entry: Mapping[str, Any]) -> None:
        """Counts the micro-batches of an entry of the training loop (see `accumulation.py`) that is about to run."""
        if not self._started:
            self._since, self._started = self._clock(), True
        for batch in entry["packs"]:
            mask = batch.get("attention_mask")
            self._counted[0] += batch["input_ids"].numel() if mask is None else mask.sum()  # stays on the GPU
            self._counted[1] += batch["target"].numel()
            if mask is None and batch.get("alora_offsets"):
                self._counted[2] += batch["input_ids"].numel() - batch["alora_offsets"][0]

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Inside is no training, and the time doesn't count, but for what a log waits for: the end of the step."""
        self._left = self._clock()
        yield
        self._since += self._clock() - self._left

    def figures(self) -> dict[str, float]:
        """Returns what a training log gets, of the steps since the last one; all processes must call it.

        `tokens_per_second`; `share_of_bound`, between 0 and 1, where it is known; on GPUs `peak_memory_gib`, GiB of
        tensors on the fullest one, the highest since the process began.
        """
        own = [float(number) for number in self._counted]
        now = self._clock()
        seconds, self._since, self._left, self._counted = now - self._since, now, now, [0, 0, 0]
        peak = torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else 0
        of_each = gather_over_processes((*own, peak))
        tokens, predicted, given = (sum(one[i] for one in of_each) for i in range(3))
        self.tokens, self.predicted = self.tokens + tokens, self.predicted + predicted
        self.seconds, self.peak = self.seconds + seconds, max(one[3] for one in of_each)
        share = self.share_of_bound(tokens, predicted, seconds, given)
        found = {"tokens_per_second": tokens / seconds, "share_of_bound": share, "peak_memory_gib": self.peak / 2**30}
        return {name: figure for name, figure in found.items() if figure}

    def share_of_bound(self, tokens: float, predicted: float, seconds: float, given: float = 0) -> float | None:
        """Returns the share of the bound that so much work in so long is; None where it is not known. `given` tokens
        are the base's alone."""
        if self.rate is None or self._weights is None:
            return None
        of_all, of_head = self._weights
        once = of_all * computed_once(tokens, given, self._below)
        products = once + self._passes * (of_all * tokens - once + of_head * predicted)
        return 2 * products / seconds / self.rate


def gpu_rate(device: torch.device) -> float | None:
    """Returns the rate of large bfloat16 matrix products, FLOP/s of all GPUs of the run; None if there is no memory to
    measure it. It takes some 50 ms."""
    m, k, n = PRODUCT
    try:
        # No random numbers: those of the run would be others.
        a, b = (torch.linspace(-1, 1, r * c, device=device).view(r, c).bfloat16() for r, c in ((m, k), (k, n)))
        seconds = seconds_of(lambda: a @ b, device)
    except torch.OutOfMemoryError:
        return None
    return 2 * m * k * n / seconds * world_size()


def seconds_of(work: Callable[[], object], device: torch.device, times: int = 5, repeats: int = 4) -> float:
    """Returns how long work takes on a device: the best of `times`, each the mean of `repeats`."""
    best = math.inf
    wait: Callable[[], object] = torch.cuda.synchronize if device.type == "cuda" else int
    for _ in range(times):
        wait()
        start = perf_counter()
        for _ in range(repeats):
            work()
        wait()
        best = min(best, (perf_counter() - start) / repeats)
    return best
