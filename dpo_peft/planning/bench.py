"""Measures the machine that it runs on: the rates of its arithmetic and memory, and a DPO run on random weights.

from dpo_peft.planning.bench import bench

bench("8b", minutes=5)  # what `dpo-peft bench` writes

Nothing is downloaded, and what is written names no user, machine or folder.
"""

import copy
import math
import platform
import random
import subprocess
import tempfile
import time
from datetime import date
from importlib.metadata import version
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
)

from ..config import DPOConfig
from ..errors import OptionError
from ..training.throughput import PRODUCT, seconds_of
from ..version import __version__
from .memory import GIB
from .shapes import PRESETS, Shape

SHAPES = {name: shape for name, (_, shape) in PRESETS.items()} | {"tiny": Shape.llama(64, 128, 2, 4, 2, 1000)}
LARGE = 12 * GIB  # a GPU of so much measures 8b where no shape is given, a smaller one 1b
# Lengths of the rows: log-normal, mean, coefficient of variation and longest, as UltraFeedback's are about. In tokens.
PROMPT, COMPLETION = (190, 1.0, 1024), (300, 0.7, 1024)
SAMPLES, CPU_SAMPLES, ROWS = 8, 2, 512  # of a step; in all, read over and over
FIRST_ID = 4  # below stand the special tokens
WARM, LEAST = 3, 3  # steps that don't count, and how many do at least
# Whatever the machine, the same steps.
OPTIONS: dict[str, Any] = {"max_steps": 100_000, "max_length": None, "train_sampling_strategy": "sequential"}
OPTIONS |= {"logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
OPTIONS |= {"max_tokens_per_microbatch": "auto"}


def bench(shape: str | None = None, minutes: float = 5) -> dict[str, Any]:
    """Measures this machine's first GPU, or its CPU where it has none.

    Args:
        shape: of the random model, one of `SHAPES`; by default what fits.
        minutes: about how long it may take in all.

    Returns:
        JSON values: `gpu` (None: a CPU), `versions`, `rates` in FLOP/s, bytes/s and weights/s, and the `run`.

    Raises:
        OptionError: an unknown shape, or a large one on a CPU.
    """
    end, device = time.monotonic() + 60 * minutes, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    has: Any = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    shape = shape or ("tiny" if has is None else "8b" if has.total_memory >= LARGE else "1b")
    if shape not in SHAPES:
        raise OptionError(f"shape={shape!r} is not one of {', '.join(SHAPES)}.")
    if has is None and shape != "tiny":
        raise OptionError(f"shape={shape!r} would take hours on a CPU: give --shape tiny.")
    about = has and {"name": has.name, "total": has.total_memory, "driver": driver()}
    versions = {"dpo-peft": __version__, "python": platform.python_version(), "CUDA": torch.version.cuda}
    versions |= {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")}
    found = {"date": date.today().isoformat(), "versions": versions, "gpu": about, "rates": rates(device)}
    return {**found, "run": train(shape, device, end)}


def driver() -> str:
    """Returns the version of the GPU's driver, as its own tool says it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "none found"


def rates(device: torch.device) -> dict[str, Any]:
    """Returns `flops` of large matrix products by format, and what is read or written, or unpacked, in a second."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    on_gpu = device.type == "cuda"
    m, k, n = PRODUCT if on_gpu else (512, 512, 512)
    a, b = torch.randn(m, k, device=device), torch.randn(k, n, device=device)
    formats = ("bfloat16", "float16", "tf32", "fp8") if on_gpu else ("float32",)
    products = {name: seconds for name in formats if (seconds := _product(name, a, b)) is not None}
    codes, state = quantize_4bit(a.bfloat16(), quant_type="nf4", compress_statistics=True)
    block = torch.empty(2**30 if on_gpu else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(block)
    found = {
        "flops": {name: 2 * m * k * n / seconds for name, seconds in products.items()},
        "nf4_weights_per_second": m * k / seconds_of(lambda: dequantize_4bit(codes, state), device),
        "copy_bytes_per_second": 2 * block.nbytes / seconds_of(lambda: target.copy_(block), device),
    }
    if on_gpu:
        pinned = torch.empty_like(block, device="cpu", pin_memory=True)
        seconds = seconds_of(lambda: target.copy_(pinned, non_blocking=True), device)
        found["host_to_device_bytes_per_second"] = block.nbytes / seconds
    return found


def _product(kind: str, a: torch.Tensor, b: torch.Tensor) -> float | None:
    """Returns the seconds of a product in a format; None where the GPU doesn't compute it."""
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, kind == "tf32"
    try:
        if kind != "fp8":
            x, y = (one.to(torch.float32 if kind == "tf32" else getattr(torch, kind)) for one in (a, b))
            return seconds_of(lambda: x @ y, a.device)
        x, y, one = a.to(torch.float8_e4m3fn), b.t().contiguous().to(torch.float8_e4m3fn).t(), a.new_ones(())
        return seconds_of(lambda: torch._scaled_mm(x, y, one, one, out_dtype=torch.bfloat16), a.device)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return None
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


# ---- A run ----------------------------------------------------------------------------------------------------------


def train(name: str, device: torch.device, end: float) -> dict[str, Any]:
    """Trains a shape by DPO, with rank 16 on all linear layers, until a time of the monotonic clock and for at least
    `WARM + LEAST` steps.

    Returns:
        What a second did, the share of the bound (see `Throughput`; None where unknown), and on a GPU the peak of
        memory beside what was predicted, bytes.
    """
    from ..trainer import DPOTrainer

    on_gpu, shape, dtype = device.type == "cuda", SHAPES[name], torch.float32
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        dtype = torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    how: dict[str, Any] = {"use_cpu": not on_gpu, "bf16": dtype == torch.bfloat16, "fp16": dtype == torch.float16}
    samples = SAMPLES if on_gpu else CPU_SAMPLES
    with tempfile.TemporaryDirectory() as folder:
        trainer = DPOTrainer(
            random_model(shape.config(), device, dtype),
            args=DPOConfig(folder, per_device_train_batch_size=samples, **OPTIONS, **how),
            train_dataset=Dataset.from_list(rows(ROWS, shape.vocab)),
            processing_class=_tokenizer(shape.vocab),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        watch = _Watch(trainer, end)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(watch)
        trainer.train()
    steps, tokens, predicted, seconds = (last - first for first, last in zip(watch.first, watch.last, strict=True))
    speed: dict[str, Any] = {"samples_per_second": steps * samples / seconds, "tokens_per_second": tokens / seconds}
    speed["share_of_bound"] = trainer.throughput.share_of_bound(tokens, predicted, seconds)
    memory = {"peak": trainer.throughput.peak, "predicted_peak": watch.predicted} if on_gpu else {}
    return {"shape": name, "dtype": str(dtype), "samples_per_step": samples, "steps": steps, **speed, **memory}


class _Watch(TrainerCallback):
    """Reads what was done before the first step that counts and at the last, and what was predicted; ends the run."""

    def __init__(self, trainer: Any, end: float):
        self.done, self.end = trainer.throughput, end
        self.first = self.last = (0, 0.0, 0.0, 0.0)
        self.predicted: float | None = None
        self.budget, fused = trainer.step.budget, trainer.forward_plan.fused
        if self.budget.memory is not None and fused is not None:
            fused.checkpointed = self.checkpointed

    def checkpointed(self, batch: Any) -> tuple[int, int]:
        """Returns how layers are checkpointed, and predicts the memory of a micro-batch."""
        self.predicted = max(self.predicted or 0.0, self.budget.peak(batch))
        return self.budget.checkpointed(batch)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Reads."""
        self.last = state.global_step, self.done.tokens, self.done.predicted, self.done.seconds
        self.first = self.last if state.global_step == WARM else self.first
        control.should_training_stop |= state.global_step >= WARM + LEAST and time.monotonic() > self.end


def rows(number: int, vocab: int) -> list[dict[str, list[int]]]:
    """Returns rows of random ids, the same every time."""
    draw, names = random.Random(0), {"prompt_ids": PROMPT, "chosen_ids": COMPLETION, "rejected_ids": COMPLETION}

    def ids(mean: float, variation: float, longest: int) -> list[int]:
        variance = math.log(1 + variation**2)
        length = int(draw.lognormvariate(math.log(mean) - variance / 2, math.sqrt(variance)))
        return draw.choices(range(FIRST_ID, vocab), k=max(8, min(longest, length)))

    return [{name: ids(*lengths) for name, lengths in names.items()} for _ in range(number)]


def _tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    special = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")}
    words = [*special.values(), *(f"t{i}" for i in range(FIRST_ID, vocab))]
    made = models.WordLevel({word: i for i, word in enumerate(words)}, special["unk_token"])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(made), **special)


def random_model(config: PretrainedConfig, device: torch.device | str, dtype: torch.dtype) -> PreTrainedModel:
    """Returns a Llama or its like with random weights, its decoder in NF4 with double quantization, made on the device
    in seconds: one layer is quantized, and the others are copies of it."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    how = {"quant_type": "nf4", "compress_statistics": True}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    made: dict[str, Any] = {}
    for layer in model.model.layers:
        for name, linear in [*layer.named_modules()]:
            if isinstance(linear, nn.Linear):
                sizes = linear.in_features, linear.out_features
                small = Linear4bit(*sizes, bias=False, compute_dtype=dtype, device="meta", **how)
                if name not in made:
                    weight = 0.02 * torch.randn(*reversed(sizes), device=device, dtype=dtype)
                    made[name] = Params4bit(weight, requires_grad=False, module=small, **how)._quantize(weight.device)
                small.weight = copy.deepcopy(made[name])
                small.weight.module, small.quant_state = small, small.weight.quant_state
                layer.set_submodule(name, small)
    for module in model.modules():
        if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            module.to_empty(device=device, recurse=False)
            nn.init.ones_(module.weight) if module.weight.ndim == 1 else nn.init.normal_(module.weight, std=0.02)
    model.tie_weights()
    with torch.device(device):  # its buffers are computed when it is made
        model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    model.is_loaded_in_4bit, model.config._name_or_path, model.name_or_path = True, "random", "random"
    return model
