"""The command `dpo-peft plan`: what training would take of a GPU, from the model's config alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..config import DPOConfig
from ..errors import OptionError
from ..model.gguf import is_gguf
from ..planning.gpus import SOLD_AS
from ..planning.memory import GIB, HEAD_PHASE, LAYER_PHASE, RESERVE
from ..planning.run import DEFAULTS, Plan, PlanOptions
from ..planning.run import plan as make_plan
from .launch import LaunchArguments
from .mixture import DataArguments
from .options import option, parse_groups, show
from .train import ModelArguments, target_modules

EXAMPLES = [
    "dpo-peft plan --config dpo_qlora_8b --gpu RTX4090",
    "dpo-peft plan --model_name_or_path Qwen/Qwen3-8B --gpu 24GB --lora_r 64",
    "dpo-peft plan --shape 70b --gpu H100 --optim adamw_8bit",
    "dpo-peft plan --shape 70b --gpu RTX4090 --optim adamw_8bit --stream_layers auto",
    "dpo-peft plan --shape 8b --gpu 24GB --pairs 60000 --pairs_per_second 4 --json",
]
LENGTHS = ("prompt_tokens", "answer_tokens", "answers")  # what is read off the dataset if none is given
LABELS = {
    "quantized_weights": "4-bit weights and their constants",
    "unquantized_weights": "weights not in 4 bits",
    "shard": "shard of the base",
    "open_layers": "layers that are present",
    "adapter": "adapter, float32 masters",
    "adapter_working_copy": "adapter, copy that computes",
    "optimizer_state": "optimizer state",
    "gradients": "gradients of the adapter, float32",
    "reference_adapter": "reference",
    "saved_activations": "saved activations",
    "layer_backward": "backward of one layer",
    "dequantized_weights": "dequantized weights of one product",
    "head": "head and its logits",
    "index_tensors": "index tensors and rotary angles",
}


@dataclass
class PlanArguments(PlanOptions):
    """What the prediction is for, and how it is printed."""

    json: bool = option(False, "Print JSON, sizes in bytes.")


def plan(argv: Sequence[str]) -> None:
    """Predict what a run takes of a GPU, from the model's config and the lengths of the dataset's rows: no weights are
    read, no GPU is needed."""
    usage = "[--config FILE.yaml] [--gpu GPU] [--option value ...]"
    # Options are read by name; those of training count where they change memory. No `DPOConfig` is made: that asks for
    # the hardware of training.
    groups = (PlanArguments, DPOConfig, DataArguments, ModelArguments)
    options, from_file = parse_groups(argv, groups, "plan", usage, plan.__doc__, EXAMPLES, [LaunchArguments])
    # The command line overrides the file: a shape there stands for the model that the file names.
    if options.shape != from_file.get("shape") and options.model_name_or_path == from_file.get("model_name_or_path"):
        options.model_name_or_path = ""
    names = target_modules(options.lora_target_modules)
    if isinstance(names, str) and names != "all-linear":
        raise OptionError("lora_target_modules: what a pattern finds is not known to the planner, give names.")
    options.lora_target_modules = None if names == "all-linear" else names
    if options.load_in_8bit:
        raise OptionError("load_in_8bit: the size of an 8-bit base is not known to the planner, leave it out.")
    if options.load_in_4bit is False:
        options.quantize_base = False
    told = ""
    if all(getattr(options, name) == DEFAULTS[name] for name in LENGTHS):
        from .measure import found_lengths

        found, told = found_lengths(options)
        vars(options).update(found)
    planned = make_plan(**{name: getattr(options, name) for name in DEFAULTS})
    if told and not found:
        told += " A prompt of {prompt_tokens} and {answers} x {answer_tokens} tokens are assumed.".format(
            **vars(options)
        )
    figures, text = planned.figures, render(planned)
    if told:
        figures, text = {**figures, "lengths": told}, f"{text}\n\n{told}"
    show(figures, text, options.json)


def render(plan: Plan) -> str:
    """Returns the plan as tables for people."""
    parts = [_about(plan)]
    if plan.figures["gpu"]:
        parts += [_fits(plan), _step(plan)]
    if "placement" in plan.figures:
        parts.append(_placement(plan.figures["placement"], plan))
    parts += [_components(plan), _methods(plan)]
    if time := plan.figures["time"]:
        each = f"An epoch of {time['samples']:,} samples at {time['samples_per_second']:,.4g} a second"
        whole = "" if time["epochs"] == 1 else f"; {time['epochs']:g} epochs: {_duration(time['seconds'])}"
        parts.append(f"{each}: {_duration(time['seconds_per_epoch'])}{whole}.")
    return "\n\n".join(parts)


def _about(plan: Plan) -> str:
    shape, model = plan.model.shape, plan.model
    layers = "fused layers" if model.fused else "the model's own layers"
    ranks = ", ".join(map(str, model.ranks)) or "none"
    kind = "in GGUF blocks" if is_gguf(str(plan.figures["model"])) else "NF4"
    return (
        f"{plan.figures['model']}: {shape.weights / 1e9:,.2f} billion weights, {shape.layers} layers, "
        f"{kind if model.quantized else 'not quantized'}. LoRA of rank {ranks}: {model.trained:,} trained weights, "
        f"{model.optimizer}. Computed by {layers}."
    )


def _fits(plan: Plan) -> str:
    gpu, rows, o = plan.figures["gpu"], plan.figures["fits"], plan.options
    lines = [
        f"{gpu['name']}: {_gib(gpu['total'])} GiB, {_gib(gpu['reserved'])} of it for CUDA and the allocator: "
        f"{_gib(gpu['usable'])} GiB for tensors.\n",
        f"{'What fits in one micro-batch':<34}{'tokens':>10}{'samples':>10}{'longest row':>13}",
    ]
    for row in rows:
        name = f"  {row['checkpoint_layers']} of {plan.model.layers} layers checkpointed"
        lines.append(f"{name:<34}{row['tokens']:>10,}{row['samples']:>10,}{row['longest_row']:>13,}")
    each = "prompt" if o.share_prompts else "prompt with each completion"
    lines.append(
        f"  A sample: {each} of {o.prompt_tokens:,} + {o.answers} x {o.answer_tokens:,} tokens. Longest row: prompt + "
        "one completion, of a sample that is alone."
    )
    longest = rows[-1]["longest_row"]
    if o.max_length is not None and longest < o.max_length:
        lines.append(
            f"  max_length={o.max_length:,} does not fit: a sample of that length may run out of memory. Set it to at "
            f"most {longest:,}."
        )
    return "\n".join(lines)


def _step(plan: Plan) -> str:
    step = plan.figures["step"]
    title = f"An optimizer step of {step['samples']:,} samples ({step['tokens']:,} tokens)"
    if not step["fits"]:
        said = (
            f"{title}: a single sample does not fit, it takes {_gib(step['peak'])} GiB. Take a larger GPU or a "
            "smaller model, optim=adamw_8bit, a lower lora_r, or shorter samples."
        )
        return "\n".join([said, *map(_remedy, plan.figures["remedies"])])
    low, high = min(step["checkpoint_layers"]), max(step["checkpoint_layers"])
    which = f"{low}" if low == high else f"{low} to {high}"
    number = "1 micro-batch" if step["micro_batches"] == 1 else f"{step['micro_batches']:,} micro-batches"
    most = f"{number} of at most {step['max_tokens']:,} tokens"
    keeping = f", of which up to {max(step['attended'])} keep what attention gave" if any(step["attended"]) else ""
    return f"{title}: {most}, {which} of {plan.model.layers} layers checkpointed{keeping}."


def _remedy(found: dict[str, Any]) -> str:
    speed = f"about {found['samples_per_second']:.2g} samples a second."
    if "fsdp" in found:
        number = found["num_processes"]
        return f"  It fits with the layers sharded over {number} GPUs, fsdp=full_shard num_processes={number}: {speed}"
    memory = f"{_gib(found['pinned_memory'])} GiB of the CPU's memory"
    return f"  It fits with {found['layers']} layers in {memory}, stream_layers={found['stream_layers']}: {speed}"


def _placement(found: dict[str, Any], plan: Plan) -> str:
    layers, processes = plan.model.layers, plan.options.num_processes
    if not found["layers"]:
        return "All layers fit on the GPU: none is streamed."
    where = f"{found['layers']} of {layers} layers lie in the CPU's memory, {_gib(found['pinned_memory'])} GiB, pinned"
    where += f" by {processes} processes" if processes > 1 else ""
    if found["shards"] > 1:
        where = f"The {layers} layers are sharded over {found['shards']} GPUs"
    said = f"{where}. {_gib(found['bytes_per_pass'])} GiB come to a GPU in each pass over the model"
    if "lost" not in found:
        return f"{said}."
    hidden = f"hidden from micro-batches of {math.ceil(found['hiding_tokens']):,} tokens on"
    rate = "0.6 of its large products'" if found["measured"] else f"half of an {found['speed_of']}'s, not measured"
    speed = (
        "{samples_per_second:,.3g} samples a second, {samples_per_second_without_waiting:,.3g} without the wait for"
    )
    return (
        f"{said}, at {found['bandwidth'] / 1e9:,.4g} GB/s beside the work: {hidden}.\n"
        f"  Expected at {found['flops'] / 1e12:,.3g} TFLOP/s, {rate}: "
        f"{speed.format(**found)} layers. {found['lost']:.0%} are lost."
    )


def _components(plan: Plan) -> str:
    micro, parts, peak = (plan.figures[name] for name in ("micro_batch", "components", "peak"))
    lines = [
        f"GiB in a micro-batch of {micro['tokens']:,} tokens ({micro['samples']:,} samples), "
        f"{micro['checkpoint_layers']} layers checkpointed"
    ]
    head, layer = (sum(parts[name] for name in names) for names in (HEAD_PHASE, LAYER_PHASE))
    left_out = LAYER_PHASE if head > layer else HEAD_PHASE
    for name, size in parts.items():
        note = "   at another time than the peak, not added" if name in left_out else ""
        lines.append(f"  {LABELS[name]:<38}{_gib(size):>8}{note}")
    lines.append(f"  {'peak':<38}{_gib(peak):>8}")
    if not plan.figures["gpu"]:
        need = math.ceil((peak + RESERVE) / SOLD_AS / GIB)
        lines.append(f"  With {_gib(RESERVE)} GiB for CUDA and the allocator: a GPU of {need:,} GB or more.")
    return "\n".join(lines)


def _methods(plan: Plan) -> str:
    lines = [f"{'GiB without activations':<28}{'models':>8}{'weights':>10}{'training':>10}{'total':>10}"]
    for row in plan.figures["methods"]:
        sizes = "".join(f"{_gib(row[name]):>10}" for name in ("weights", "training", "total"))
        lines.append(f"  {row['method']:<26}{row['models']:>8}{sizes}")
    lines.append(
        "  Training: gradients, optimizer state, float32 masters, adapters. PPO and DPO in bfloat16 with AdamW."
    )
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f}"
