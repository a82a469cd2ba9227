"""What `dpo-peft plan` says: the figures as a dict for machines, and as tables for people. And cards by name."""

import difflib
import math
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..errors import OptionError
from .memory import GIB, HEAD_PHASE, LAYER_PHASE, RESERVE, MemoryModel
from .shapes import Shape
from .steps import StepPlan, plan_step

# GiB that CUDA reports in all, which is less than is printed on the box.
CARDS = {
    "T4": 14.56, "V100-16GB": 15.77, "V100-32GB": 31.73, "A10": 22.03, "A10G": 22.03, "L4": 22.03, "A30": 23.5,
    "RTX3060": 11.75, "RTX3080": 9.75, "RTX3090": 23.68, "RTX4070": 11.72, "RTX4080": 15.69, "RTX4090": 23.63,
    "RTX5080": 15.5, "RTX5090": 31.36, "RTXA6000": 47.4, "RTX6000Ada": 47.4, "RTXPRO6000": 94.9, "A40": 44.4,
    "L40": 44.4, "L40S": 44.4, "A100-40GB": 39.39, "A100-80GB": 79.15, "H100": 79.1, "H100-NVL": 93.1,
    "H200": 139.7, "GH200": 94.5, "B200": 178.3,
}  # fmt: skip
HOPPER = ("H100", "H200", "GH200")  # cards that attention's own kernels run on
SOLD_AS = 0.98  # of a card that is sold as 24 GB, what CUDA reports of 24 GiB

# Training every weight with AdamW in mixed precision: gradients 2, float32 masters 4, moments 8 bytes per weight.
FULL_TRAINING = 14

LABELS = {
    "quantized_weights": "4-bit weights and their constants",
    "unquantized_weights": "weights not in 4 bits",
    "adapter": "adapter, float32 masters",
    "adapter_working_copy": "adapter, copy that computes",
    "optimizer_state": "optimizer state",
    "gradients": "gradients of the adapter, float32",
    "reference_adapter": "reference",
    "saved_activations": "saved activations",
    "layer_backward": "backward of one layer",
    "dequantized_weights": "dequantised weights of one product",
    "head": "head and its logits",
    "index_tensors": "index tensors and rotary angles",
}


class Card(NamedTuple):
    """A GPU."""

    name: str
    total: float  # bytes

    @property
    def usable(self) -> float:
        """Bytes that tensors can take."""
        return max(self.total - RESERVE, 0.0)


def parse_card(text: str) -> Card:
    """A card by name ("H100", "rtx 4090", "A100-40GB") or size ("24GB" as it is sold, "23.5GiB" exactly).

    Raises:
        OptionError: no such card, or a size that no card has.
    """
    size = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(GB|GiB|G)?\s*", text, flags=re.IGNORECASE)
    if size:
        number = float(size[1])
        exact = (size[2] or "").lower() == "gib"
        if not 1 <= number <= 10000:
            raise OptionError(f"gpu={text!r}: a card has 1 to 10000 GB.")
        return Card(text.strip(), number * GIB * (1 if exact else SOLD_AS))
    known = {_plain(name): name for name in CARDS}
    if _plain(text) not in known:
        close = [known[name] for name in known if name.startswith(_plain(text) or " ")]
        close = close or [known[name] for name in difflib.get_close_matches(_plain(text), known, n=3, cutoff=0.5)]
        hint = f"Did you mean {' or '.join(close)}?" if close else f"Known: {', '.join(CARDS)}."
        raise OptionError(f"gpu={text!r} is not a card that is known here. {hint} Or give its size, as in --gpu 24GB.")
    name = known[_plain(text)]
    return Card(name, CARDS[name] * GIB)


def _plain(name: str) -> str:
    return re.sub(r"nvidia|geforce|[^a-z0-9]", "", name.lower())


@dataclass(frozen=True)
class Work:
    """What is trained on: lengths in tokens, and how many samples an optimizer step and a micro-batch have."""

    prompt: int  # mean
    answer: int  # mean
    answers: int = 2  # of a prompt
    batch: int = 16  # samples of an optimizer step
    micro_batch: int = 8  # samples of a micro-batch, where no card says how many fit
    shared: bool = True  # whether a prompt stands once for all its answers
    max_length: int | None = None
    max_tokens: int | None = None  # of a micro-batch
    reference_passes: int = 1

    @property
    def sample(self) -> tuple[int, int, int]:
        """T, S and P of a sample of mean lengths."""
        predicted = self.answers * self.answer
        if not self.shared:
            tokens = predicted + self.answers * self.prompt
            return tokens, tokens, predicted
        tokens = self.prompt + predicted
        return tokens, tokens + self.answers * self.prompt, predicted


@dataclass(frozen=True)
class Pace:
    """A measured throughput, and what there is to train on."""

    samples: int
    samples_per_second: float
    epochs: float = 1.0

    @property
    def seconds_per_epoch(self) -> float:
        return self.samples / self.samples_per_second


def is_hopper(gpu: str | None) -> bool:
    """Whether a card's name is that of one of NVIDIA's Hopper generation."""
    return gpu is not None and _plain(gpu).startswith(tuple(map(_plain, HOPPER)))


def build_plan(model: MemoryModel, work: Work, card: Card | None, checkpointing: bool, pace: Pace | None) -> dict:
    """All figures, sizes in bytes.

    Args:
        model: predicts the memory.
        work: what is trained on.
        card: None: a micro-batch of `work.micro_batch` samples is predicted, whatever it takes.
        checkpointing: without a card, whether every layer is checkpointed.
        pace: None: no times.
    """
    layers = model.shape.layers
    plan: dict[str, Any] = {"gpu": None, "fits": [], "step": None}
    tokens, keys, predicted = (work.micro_batch * n for n in work.sample)
    checkpointed = layers if checkpointing else 0
    if card is not None:
        plan["gpu"] = {"name": card.name, "total": card.total, "reserved": RESERVE, "usable": card.usable}
        choices = [0, layers // 2, layers] if model.fused else [0, layers]
        plan["fits"] = [_largest(model, work, card.usable, n) for n in choices]
        step = plan_step(
            [work.sample] * work.batch,
            model,
            card.usable,
            max_tokens=work.max_tokens,
            reference_passes=work.reference_passes,
        )
        plan["step"] = _step(step, work)
        _, tokens, keys, predicted, checkpointed, _ = step.micro_batches[0]
    plan["micro_batch"] = {
        "samples": tokens // work.sample[0],
        "tokens": tokens,
        "keys": keys,
        "predicted": predicted,
        "checkpoint_layers": checkpointed,
    }
    plan["components"] = model.components(tokens, keys, predicted, checkpointed)
    plan["peak"] = model.peak(tokens, keys, predicted, checkpointed)
    plan["time"] = _time(pace)
    plan["methods"] = compare_methods(model)
    return plan


def _largest(model: MemoryModel, work: Work, limit: float, checkpointed: int) -> dict[str, int]:
    tokens, keys, predicted = work.sample
    most = model.largest_tokens(limit, checkpointed, keys / tokens, predicted / tokens)
    row = model.longest_row(limit, checkpointed, work.answers)
    return {"checkpoint_layers": checkpointed, "tokens": most, "samples": most // tokens, "longest_row": row}


def _step(step: StepPlan, work: Work) -> dict[str, Any]:
    return {
        "samples": work.batch,
        "tokens": work.batch * work.sample[0],
        "micro_batches": len(step.micro_batches),
        "max_tokens": step.max_tokens,
        "checkpoint_layers": [batch.checkpoint_layers for batch in step.micro_batches],
        "peak": max(batch.peak for batch in step.micro_batches),
        "fits": step.fits,
    }


def _time(pace: Pace | None) -> dict[str, float] | None:
    if pace is None:
        return None
    return {
        "samples": pace.samples,
        "samples_per_second": pace.samples_per_second,
        "seconds_per_epoch": pace.seconds_per_epoch,
        "epochs": pace.epochs,
        "seconds": pace.epochs * pace.seconds_per_epoch,
    }


def compare_methods(model: MemoryModel) -> list[dict[str, Any]]:
    """The note's comparison (1.1 and 9.1) for this model, without activations.

    PPO holds policy, value function, reference and reward model, and trains the first two; DPO as published holds
    policy and reference. Both in bfloat16, trained in full. Value function and reward model have a head of one output.
    """
    shape = model.shape
    language = shape.weights
    scalar = _backbone(shape) + shape.hidden
    fixed = model.fixed
    weights = fixed["quantized_weights"] + fixed["unquantized_weights"]
    rows = [
        ("PPO (RLHF)", 4, 2 * (2 * language + 2 * scalar), FULL_TRAINING * (language + scalar)),
        ("DPO, every weight trained", 2, 2 * 2 * language, FULL_TRAINING * language),
        ("here", 1, weights, sum(fixed.values()) - weights),
    ]
    return [
        {"method": method, "models": models, "weights": held, "training": training, "total": held + training}
        for method, models, held, training in rows
    ]


def _backbone(shape: Shape) -> int:
    return shape.weights if shape.tied else shape.weights - shape.vocab * shape.hidden


# ---- For people -----------------------------------------------------------------------------------------------------


def render(plan: dict[str, Any], about: str, work: Work) -> str:
    """The plan as text, `about` in front."""
    parts = [about]
    if plan["gpu"]:
        parts += [_card_text(plan), _fits_text(plan, work), _step_text(plan, work)]
    parts += [_components_text(plan), _methods_text(plan["methods"])]
    if plan["time"]:
        parts.append(_time_text(plan["time"]))
    return "\n\n".join(parts)


def _card_text(plan: dict[str, Any]) -> str:
    gpu = plan["gpu"]
    return (
        f"{gpu['name']}: {_gib(gpu['total'])} GiB, {_gib(gpu['reserved'])} of it for CUDA and the allocator: "
        f"{_gib(gpu['usable'])} GiB for tensors."
    )


def _fits_text(plan: dict[str, Any], work: Work) -> str:
    layers = max(row["checkpoint_layers"] for row in plan["fits"])
    lines = [f"{'What fits in one micro-batch':<34}{'tokens':>10}{'samples':>10}{'longest row':>13}"]
    for row in plan["fits"]:
        name = f"  {row['checkpoint_layers']} of {layers} layers checkpointed"
        lines.append(f"{name:<34}{row['tokens']:>10,}{row['samples']:>10,}{row['longest_row']:>13,}")
    each = "prompt" if work.shared else "prompt with each answer"
    lines.append(
        f"  A sample: {each} of {work.prompt:,} + {work.answers} x {work.answer:,} tokens. Longest row: prompt + one "
        "answer, of a sample that is alone."
    )
    longest = plan["fits"][-1]["longest_row"]
    if work.max_length is not None and longest < work.max_length:
        lines.append(
            f"  max_length={work.max_length:,} does not fit: a sample of that length may run out of memory. Set it to "
            f"at most {longest:,}."
        )
    return "\n".join(lines)


def _step_text(plan: dict[str, Any], work: Work) -> str:
    step = plan["step"]
    title = f"An optimizer step of {step['samples']:,} samples ({step['tokens']:,} tokens)"
    if not step["fits"]:
        return (
            f"{title}: a single sample does not fit, it takes {_gib(step['peak'])} GiB. Take a larger card or a "
            "smaller model, optim=adamw_8bit, a lower lora_r, or shorter samples."
        )
    layers = max(row["checkpoint_layers"] for row in plan["fits"])
    low, high = min(step["checkpoint_layers"]), max(step["checkpoint_layers"])
    which = f"{low}" if low == high else f"{low} to {high}"
    number = "1 micro-batch" if step["micro_batches"] == 1 else f"{step['micro_batches']:,} micro-batches"
    return f"{title}: {number} of at most {step['max_tokens']:,} tokens, {which} of {layers} layers checkpointed."


def _components_text(plan: dict[str, Any]) -> str:
    micro, parts = plan["micro_batch"], plan["components"]
    title = (
        f"GiB in a micro-batch of {micro['tokens']:,} tokens ({micro['samples']:,} samples), "
        f"{micro['checkpoint_layers']} layers checkpointed"
    )
    head, layer = (sum(parts[name] for name in names) for names in (HEAD_PHASE, LAYER_PHASE))
    left_out = LAYER_PHASE if head > layer else HEAD_PHASE
    lines = [title]
    for name, size in parts.items():
        note = "   at another time than the peak, not added" if name in left_out else ""
        lines.append(f"  {LABELS[name]:<38}{_gib(size):>8}{note}")
    lines.append(f"  {'peak':<38}{_gib(plan['peak']):>8}")
    if not plan["gpu"]:
        need = math.ceil((plan["peak"] + RESERVE) / SOLD_AS / GIB)
        lines.append(f"  With {_gib(RESERVE)} GiB for CUDA and the allocator: a card of {need:,} GB or more.")
    return "\n".join(lines)


def _methods_text(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'GiB without activations':<28}{'models':>8}{'weights':>10}{'training':>10}{'total':>10}"]
    for row in rows:
        sizes = "".join(f"{_gib(row[name]):>10}" for name in ("weights", "training", "total"))
        lines.append(f"  {row['method']:<26}{row['models']:>8}{sizes}")
    lines.append(
        "  Training: gradients, optimizer state, float32 masters, adapters. PPO and DPO in bfloat16 with AdamW."
    )
    return "\n".join(lines)


def _time_text(time: dict[str, float]) -> str:
    text = (
        f"An epoch of {time['samples']:,} samples at {time['samples_per_second']:,.4g} a second: "
        f"{_duration(time['seconds_per_epoch'])}."
    )
    return text if time["epochs"] == 1 else f"{text[:-1]}; {time['epochs']:g} epochs: {_duration(time['seconds'])}."


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f}"
