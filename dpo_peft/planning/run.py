"""What a run takes of a GPU, from its options: `plan` does what `dpo-peft plan` prints."""

from contextlib import suppress
from dataclasses import MISSING, dataclass, fields, replace
from types import SimpleNamespace
from typing import Any, NamedTuple

from peft import LoraConfig, PeftConfig
from transformers import PretrainedConfig

from ..config import DPOConfig
from ..config_checks import Rule, check_option_names, free, number, whole
from ..errors import OptionError
from ..losses import find_objective
from ..model.adapters import check_adapter, is_adapter, read_config
from ..model.base import base_config
from ..model.checkpoint_formats import FORMATS
from ..model.gguf import blocks_in, is_gguf
from ..model.scope import layer_numbers
from ..training.packing import Size, size_of
from .gpus import Gpu, is_hopper, of_size, parse_gpu
from .memory import GIB, RESERVE, MemoryModel
from .placing import cut, needs_reference, place, price, remedies
from .shapes import PRESETS, Lora, NotPlainError, Shape
from .sketch import Sketch

ELEMENT = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 2}  # bytes
# Training every weight with AdamW in mixed precision: gradients 2, float32 masters 4, moments 8 bytes per weight.
FULL_TRAINING = 14


@dataclass
class PlanOptions:
    """What the prediction is for, beside the options of training."""

    _argument_group_name = "the prediction"  # the heading in the help
    gpu: str | None = free(
        None, "A GPU by name or size: H100, A100-40GB, RTX4090, 24GB, 23.5GiB; or a file of `bench`."
    )
    shape: str | None = free(None, f"Instead of a model, one of these shapes: {', '.join(PRESETS)}.")
    prompt_tokens: int = whole(200, 1, "Mean length of a prompt.")
    answer_tokens: int = whole(300, 1, "Mean length of a completion.")
    answers: int = whole(2, 1, "Completions of a prompt: 2 for pairs.")
    num_processes: int = whole(1, 1, "GPUs, with a process each; with fsdp='hybrid_shard', those of a machine.")
    layer_gb_per_second: float | None = number(
        None,
        "Rate in 10^9 bytes at which layers come to a GPU, from the CPU's memory or the other GPUs. Default: that of "
        "PCIe, or of NVLink where the GPU has it.",
        above=0,
    )
    pairs: int | None = whole(None, 1, "Samples of the dataset, for the time of an epoch.")
    pairs_per_second: float | None = number(None, "Throughput: samples in a second.", above=0)
    tokens_per_second: float | None = number(None, "Throughput: tokens of packed samples in a second.", above=0)


FIELDS = (*fields(DPOConfig), *fields(PlanOptions))
# Every option that `plan` takes, and its default: of training, of the prediction, and of the model that is trained.
DEFAULTS: dict[str, object] = {
    **{f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in FIELDS},
    **{"model_name_or_path": "", "model_revision": None, "dtype": "bfloat16", "lora_r": 16, "use_dora": False},
    **dict.fromkeys(
        "lora_target_modules lora_modules_to_save lora_alpha lora_dropout use_rslora lora_layers_to_transform".split()
    ),
    "adapter_scope": "all",
}
# What those may be whose fields don't say it.
RULES = {
    **dict.fromkeys(("lora_r", "per_device_train_batch_size", "gradient_accumulation_steps"), Rule((int,), minimum=1)),
    "num_train_epochs": Rule((int, float), above=0),
    "dtype": Rule(choices=list(ELEMENT)),
    "adapter_scope": Rule(choices=["all", "completions"]),
}


class Plan(NamedTuple):
    """A prediction."""

    figures: dict[str, Any]  # what `dpo-peft plan --json` prints: sizes in bytes, times in seconds
    options: SimpleNamespace  # all that it was made with
    model: MemoryModel


def plan(**options: object) -> Plan:
    """Predicts what a run takes of a GPU. Loads no weights and needs no GPU.

    Args:
        options: those of `PlanOptions`, and of training, the model and its adapter by their names in `dpo-peft train`.
            `shape` or `model_name_or_path` is needed. Without `gpu` and `max_memory_gib`, one micro-batch of
            `per_device_train_batch_size` samples is predicted, whatever it takes.

    Raises:
        OptionError: an unknown option or GPU, an impossible value, or a model whose memory can't be predicted.
    """
    o = SimpleNamespace(**{**DEFAULTS, **check_option_names(options, set(DEFAULTS))})
    _check(o)
    gpu = _gpu(o)
    name, model, weights = _model(o)
    if is_gguf(name) and model.quantized:
        share = blocks_in(name) / model.quantized  # of what they take in NF4
        placed = tuple(share * size for size in model.layer_bytes)
        model = replace(model, quantized=share * model.quantized, layer_bytes=placed)
    sample = _sample(o)
    tokens, time = sample.tokens, _time(o, sample.tokens)
    model = place(o, model, gpu, sample)
    T, S, P, given, _ = (o.per_device_train_batch_size * n for n in sample)
    checkpointed, attended = model.layers if o.gradient_checkpointing else 0, 0
    given *= model.fused
    fits: list[dict[str, int]] = []
    step = None
    if gpu is not None:
        for layers in [0, model.layers // 2, model.layers] if model.fused else [0, model.layers]:
            most = model.largest_tokens(gpu.usable, layers, S / T, P / T, given / T)
            longest = model.longest_row(gpu.usable, layers, o.answers)
            fits.append(
                {"checkpoint_layers": layers, "tokens": most, "samples": most // tokens, "longest_row": longest}
            )
        number = o.per_device_train_batch_size * o.gradient_accumulation_steps
        best = cut(o, model, gpu, sample)
        _, T, S, P, given, checkpointed, attended, *_ = best.micro_batches[0]
        step = {
            "samples": number,
            "tokens": number * tokens,
            "micro_batches": len(best.micro_batches),
            "max_tokens": best.max_tokens,
            "checkpoint_layers": [batch.checkpoint_layers for batch in best.micro_batches],
            "attended": [batch.attended for batch in best.micro_batches],
            "peak": max(batch.peak for batch in best.micro_batches),
            "fits": best.fits,
        }
    size = {"tokens": T, "keys": S, "predicted": P, "given": given}
    size |= {"checkpoint_layers": checkpointed, "attended": attended}
    figures = {
        "model": name,
        "weights": weights,
        "layers": model.layers,
        "trained_weights": model.trained,
        "optimizer": model.optimizer,
        "fused_layers": model.fused,
        "gpu": gpu and {"name": gpu.name, "total": gpu.total, "reserved": RESERVE, "usable": gpu.usable},
        "fits": fits,
        "step": step,
        "micro_batch": {"samples": T // tokens, **size},
        "components": model.components(**size),
        "peak": model.peak(**size),
        "time": time,
        "methods": compare_methods(replace(model, streamed=0, shards=1)),
    }
    if o.fsdp or o.stream_layers is not None:
        figures["placement"] = price(o, model, gpu, sample)
    if gpu is not None and step is not None and not step["fits"]:
        figures["remedies"] = remedies(o, model, gpu, sample)
    return Plan(figures, o, model)


# ---- Options --------------------------------------------------------------------------------------------------------


def _check(o: SimpleNamespace) -> None:
    if o.checkpoint_layers not in (None, "auto"):
        raise OptionError("checkpoint_layers has no effect here, the plan finds how many: leave it out.")
    if str(o.max_tokens_per_microbatch).isdecimal():  # a command line gives text
        o.max_tokens_per_microbatch = int(o.max_tokens_per_microbatch)
    rules = {f.name: f.metadata.get("rule") for f in FIELDS} | RULES
    for name, rule in rules.items():
        if rule is not None:
            rule.check(name, getattr(o, name))
    o.loss_type = [o.loss_type] if isinstance(o.loss_type, str) else o.loss_type
    for name in o.loss_type:
        find_objective(name)  # refuses one that there is not


def _gpu(o: SimpleNamespace) -> Gpu | None:
    """The smaller one of the GPU and the limit."""
    given = None if o.gpu is None else parse_gpu(o.gpu)
    o.gpu = given and given.name  # a file's
    if o.max_memory_gib is None:
        return given
    part = of_size(f"max_memory_gib={o.max_memory_gib:g}", o.max_memory_gib * GIB + RESERVE)
    if given is None:
        return part
    return given if given.total <= part.total else part._replace(like=given.like, measured=given.measured)


def _sample(o: SimpleNamespace) -> Size:
    """Returns the size of a row of mean lengths."""
    row: dict[str, Any] = {"prompt_ids": range(o.prompt_tokens)}
    row["completion_ids"] = [range(o.answer_tokens)] * o.answers
    if o.adapter_scope == "completions":
        row["adapter_start"] = o.prompt_tokens
    return size_of(row, o.share_prompts)


def _time(o: SimpleNamespace, tokens: int) -> dict[str, float] | None:
    """The time of the run, at `tokens` a sample; None without a throughput."""
    given = [name for name in ("pairs_per_second", "tokens_per_second") if getattr(o, name) is not None]
    if len(given) == 2:
        raise OptionError("pairs_per_second and tokens_per_second are given: give one throughput.")
    if given and o.pairs is None:
        raise OptionError(f"{given[0]} has no effect without pairs, the number of samples: give --pairs too.")
    if o.pairs is None:
        return None
    if not given:
        raise OptionError("pairs has no effect without a throughput: give --pairs_per_second or --tokens_per_second.")
    speed = o.pairs_per_second or o.tokens_per_second / tokens
    epoch = {"samples": o.pairs, "samples_per_second": speed, "seconds_per_epoch": o.pairs / speed}
    return {**epoch, "epochs": o.num_train_epochs, "seconds": o.num_train_epochs * epoch["seconds_per_epoch"]}


# ---- The model ------------------------------------------------------------------------------------------------------


def _model(o: SimpleNamespace) -> tuple[str, MemoryModel, int]:
    """The base's name, the model's memory, and its number of weights."""
    adapter, shape, config = None, None, None
    stored = {"quantize": o.quantize_base is not False}
    if o.shape is not None:
        if o.model_name_or_path:
            raise OptionError("shape has no effect with model_name_or_path: give one of them.")
        if o.shape.lower() not in PRESETS:
            raise OptionError(f"shape={o.shape!r} is not one of {', '.join(PRESETS)}.")
        name, shape = PRESETS[o.shape.lower()]
        config, recognized = shape.config(), True
    else:
        from ..fused.recognition import MODEL_TYPES

        name, adapter = _base_of(o)
        revision = o.model_revision if adapter is None else None
        config = base_config(name, {"revision": revision}, o.trust_remote_code)
        recognized = config.get_text_config(decoder=True).model_type in MODEL_TYPES
        stored |= _stored(config, name)
        with suppress(NotPlainError):
            shape = Shape.of(config, o.trust_remote_code)
    layers = config.get_text_config(decoder=True).num_hidden_layers
    lora = _lora_config(o, layers) if adapter is None else adapter
    reference = None
    if needs_reference(o) and o.reference not in (None, "initial", "base"):
        reference = read_config(o.reference)
    elif needs_reference(o) and o.reference != "base" and (adapter is not None or o.sync_ref_model):
        reference = lora  # a frozen copy; else it is the adapter switched off
    if getattr(lora, "alora_invocation_tokens", None):
        o.adapter_scope = "completions"
    element = 2 if o.bf16 is not False or o.fp16 else ELEMENT[o.dtype]
    plain = o.use_dora or o.lora_modules_to_save or element != ELEMENT[o.dtype] or not o.share_prompts
    fused = recognized and not plain and o.fused_layers is not False
    options = {
        "weight_bytes": ELEMENT[o.dtype],
        "optimizer": str(getattr(o.optim, "value", o.optim)),
        "element": element,
        "fused": fused,
        "packed": fused and is_hopper(o.gpu),
        "offload": o.activation_offloading,
        "first": min(lora.layers_to_transform or [0]),
        **stored,
    }
    if fused and shape is not None and not (o.lora_experts or o.lora_vision):
        ours, its = Lora.read(shape, lora), None if reference is None else Lora.read(shape, reference)
        if ours is not None and (its is None) is (reference is None):
            model = MemoryModel.of_shape(shape, ours, reference=its, **options)
            if config.get_text_config(decoder=True) is config:
                return name, model, shape.weights
            # The layers of its decoder are fused; tower and projector are stored beside them.
            whole = Sketch(config, lora, o.trust_remote_code)
            small, rest = whole.stored(stored["quantize"], stored.get("nested", True), ELEMENT[o.dtype])
            return name, replace(model, quantized=small, unquantized=rest), whole.weights
    sketch = Sketch(config, lora, o.trust_remote_code, experts=o.lora_experts, vision=o.lora_vision)
    frozen = Sketch(config, reference, o.trust_remote_code).trained if reference is not None else 0
    row = o.prompt_tokens + o.answer_tokens
    return name, MemoryModel.of_sketch(sketch, reference=frozen, row=row, **options), sketch.weights


def _lora_config(o: SimpleNamespace, layers: int) -> LoraConfig:
    """The adapter that the options describe."""
    config = LoraConfig(
        r=o.lora_r,
        target_modules=list(o.lora_target_modules) if o.lora_target_modules else "all-linear",
        use_dora=o.use_dora,
        modules_to_save=list(o.lora_modules_to_save) if o.lora_modules_to_save else None,
        task_type="CAUSAL_LM",
    )
    # PEFT takes it beside names alone, which "all-linear" becomes once the model is there.
    config.layers_to_transform = layer_numbers(o.lora_layers_to_transform, layers)
    return config


def _base_of(o: SimpleNamespace) -> tuple[str, PeftConfig | None]:
    """The base's name, and the adapter's config if the model is an adapter."""
    name = o.model_name_or_path
    if not name:
        raise OptionError(
            f"model_name_or_path is missing: give a folder or Hub id, or --shape, one of {', '.join(PRESETS)}."
        )
    if not is_adapter(name, revision=o.model_revision):
        return name, None
    adapter = read_config(name, revision=o.model_revision)
    check_adapter(adapter)
    if not adapter.base_model_name_or_path:
        raise OptionError(f"The adapter {name!r} does not say which base it belongs to: give the base's name.")
    return adapter.base_model_name_or_path, adapter


def _stored(config: PretrainedConfig, name: str) -> dict[str, bool]:
    """How a base that is stored in 4 bits is quantized; empty for one that isn't, or that is dequantized first."""
    if is_gguf(name):
        return {"quantize": blocks_in(name) > 0}
    stored = getattr(config, "quantization_config", None) or {}
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    method = stored.get("quant_method", "unknown")
    if not stored or (method in FORMATS and FORMATS[method].is_read):
        return {}
    if not stored.get("load_in_4bit"):
        raise OptionError(
            f"The weights of {name!r} are stored quantized ({method}): their size is not known to the planner. Give "
            "the model that they were made from."
        )
    return {"quantize": True, "nested": bool(stored.get("bnb_4bit_use_double_quant"))}


# ---- Other methods --------------------------------------------------------------------------------------------------


def compare_methods(model: MemoryModel) -> list[dict[str, str | float]]:
    """Compares with PPO and full DPO in bytes, without activations.

    PPO holds policy, value function, reference and reward model, and trains the first two; DPO as published holds
    policy and reference. Both in bfloat16, trained in full. Value function and reward model have a head of one output.
    """
    shape, fixed = model.shape, model.fixed
    language = shape.weights
    scalar = language - (0 if shape.tied else shape.vocab * shape.hidden) + shape.hidden
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
