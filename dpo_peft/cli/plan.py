"""The command `dpo-peft plan`: what training would take of a GPU, from the model's config alone."""

import math
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from ..config import DPOConfig
from ..config_checks import check_option_names
from ..errors import OptionError
from ..losses import find_objective
from ..planning.steps import GIB, PRESETS, RESERVE, Lora, MemoryModel, Shape
from ..planning.tables import Card, Pace, Work, build_plan, is_hopper, parse_card, render
from .options import check_unknown, parser_text, read_config_file, refuse_instead_of_exit, show, split_config_word
from .train import DataArguments, ModelArguments

EXAMPLES = [
    "dpo-peft plan --config recipes/dpo_qlora_8b.yaml --gpu RTX4090",
    "dpo-peft plan --model_name_or_path Qwen/Qwen3-8B --gpu 24GB --lora_r 64",
    "dpo-peft plan --shape 70b --gpu H100 --optim adamw_8bit",
    "dpo-peft plan --shape 8b --gpu 24GB --pairs 60000 --pairs_per_second 4 --json",
]
_ELEMENT = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 2}


@dataclass
class PlanArguments:
    """What the prediction is for."""

    _argument_group_name = "the prediction"
    gpu: str | None = field(
        default=None, metadata={"help": "A card by name or size: H100, A100-40GB, RTX4090, 24GB, 23.5GiB."}
    )
    shape: str | None = field(
        default=None, metadata={"help": f"Instead of a model, one of these shapes: {', '.join(PRESETS)}."}
    )
    prompt_tokens: int = field(default=200, metadata={"help": "Mean length of a prompt."})
    answer_tokens: int = field(default=300, metadata={"help": "Mean length of an answer."})
    answers: int = field(default=2, metadata={"help": "Answers of a prompt: 2 for pairs."})
    pairs: int | None = field(default=None, metadata={"help": "Samples of the dataset, for the time of an epoch."})
    pairs_per_second: float | None = field(default=None, metadata={"help": "Throughput: samples in a second."})
    tokens_per_second: float | None = field(
        default=None, metadata={"help": "Throughput: tokens of packed samples in a second."}
    )
    json: bool = field(default=False, metadata={"help": "Print JSON, sizes in bytes."})


def plan(argv: Sequence[str]) -> None:
    """`dpo-peft plan`: print the plan. Loads no weights and needs no GPU.

    Args:
        argv: options; those of training count where they change memory, the others are ignored.

    Raises:
        OptionError: an unknown option or card, an impossible value, or a model whose memory can't be predicted.
    """
    options = _parse(argv)
    _check_numbers(options)
    card = _card(options)
    pace = _pace(options)
    model, name = _memory_model(options)
    work = _work(options)
    result = {"model": name, **_about_model(model), **build_plan(model, work, card, _checkpoints(options), pace)}
    show(result, render(result, _about(name, model), work), options.json)


# ---- Options --------------------------------------------------------------------------------------------------------


def _parse(argv: Sequence[str]) -> Namespace:
    """Every option by name. No `DPOConfig` is made: that asks for the hardware of training."""
    from transformers import HfArgumentParser

    argv = split_config_word(argv)
    every = (PlanArguments, DPOConfig, DataArguments, ModelArguments)
    known = {f.name for group in every for f in fields(group)}
    from_file = check_option_names(read_config_file(argv), known | {"env"})
    if "--config" in argv:
        at = argv.index("--config")
        argv = argv[:at] + argv[at + 2 :]
    about = "Predict what a run takes of a GPU, from the model's config alone: no weights are read, no GPU is needed."
    words = "[--config FILE.yaml] [--gpu CARD] [--option value ...]"
    parser = HfArgumentParser(every, **parser_text("plan", words, about, EXAMPLES))
    refuse_instead_of_exit(parser)
    parser.set_defaults(**{name: value for name, value in from_file.items() if name != "env"})
    options, unknown = parser.parse_known_args(argv)
    # The command line overrides the file: a shape there stands for the model that the file names.
    if options.shape != from_file.get("shape") and options.model_name_or_path == from_file.get("model_name_or_path"):
        options.model_name_or_path = ""
    check_unknown(unknown, lambda given: check_option_names(given, known))
    return options


def _check_numbers(options: Namespace) -> None:
    at_least_1 = "prompt_tokens answer_tokens answers pairs lora_r max_length".split()
    at_least_1 += "per_device_train_batch_size gradient_accumulation_steps".split()
    for name in at_least_1:
        value = getattr(options, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise OptionError(f"{name}={value!r} must be a whole number at least 1.")
    for name in ("pairs_per_second", "tokens_per_second", "num_train_epochs"):
        value = getattr(options, name)
        if value is not None and not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
            raise OptionError(f"{name}={value!r} must be a number above 0.")


def _card(options: Namespace) -> Card | None:
    if options.checkpoint_layers not in (None, "auto"):
        raise OptionError("checkpoint_layers has no effect here, the plan finds how many: leave it out.")
    card = None if options.gpu is None else parse_card(options.gpu)
    if options.max_memory_gib is None:
        return card
    limit = options.max_memory_gib
    if not isinstance(limit, (int, float)) or not math.isfinite(limit) or limit <= 0:
        raise OptionError(f"max_memory_gib={limit!r} must be a number above 0.")
    limited = Card(f"max_memory_gib={limit:g}", limit * GIB + RESERVE)
    return limited if card is None or limited.total < card.total else card


def _pace(options: Namespace) -> Pace | None:
    given = [name for name in ("pairs_per_second", "tokens_per_second") if getattr(options, name) is not None]
    if len(given) == 2:
        raise OptionError("pairs_per_second and tokens_per_second are given: give one throughput.")
    if given and options.pairs is None:
        raise OptionError(f"{given[0]} has no effect without pairs, the number of samples: give --pairs too.")
    if options.pairs is None:
        return None
    if not given:
        raise OptionError("pairs has no effect without a throughput: give --pairs_per_second or --tokens_per_second.")
    speed = options.pairs_per_second or options.tokens_per_second / _work(options).sample[0]
    return Pace(options.pairs, speed, options.num_train_epochs)


def _work(options: Namespace) -> Work:
    most = getattr(options, "max_tokens_per_microbatch", None)
    if not (most in (None, "auto") or str(most).isdecimal() and int(most) > 0):
        raise OptionError(f"max_tokens_per_microbatch={most!r} must be a whole number from 1, 'auto' or None.")
    per_device = options.per_device_train_batch_size
    cached = options.precompute_ref_log_probs or not _needs_reference(options)
    return Work(
        prompt=options.prompt_tokens,
        answer=options.answer_tokens,
        answers=options.answers,
        batch=per_device * options.gradient_accumulation_steps,
        micro_batch=per_device,
        shared=options.share_prompts,
        max_length=options.max_length,
        max_tokens=None if most in (None, "auto") else int(most),
        reference_passes=0 if cached else 1,
    )


def _needs_reference(options: Namespace) -> bool:
    names = [options.loss_type] if isinstance(options.loss_type, str) else options.loss_type
    return any(find_objective(name).needs_reference for name in names)


def _checkpoints(options: Namespace) -> bool:
    return options.gradient_checkpointing not in (False, "False", "false")


# ---- The model ------------------------------------------------------------------------------------------------------


def _memory_model(options: Namespace) -> tuple[MemoryModel, str]:
    """The model's memory, and its name."""
    optimizer = str(getattr(options.optim, "value", options.optim))
    weight_bytes = _ELEMENT[options.dtype]
    mixed = options.bf16 or (options.bf16 is None and not options.fp16) or options.fp16
    settings: dict[str, Any] = {
        "optimizer": optimizer,
        "weight_bytes": weight_bytes,
        "element": 2 if mixed else weight_bytes,
    }
    if options.shape is not None:
        if options.model_name_or_path:
            raise OptionError("shape has no effect with model_name_or_path: give one of them.")
        if options.shape.lower() not in PRESETS:
            raise OptionError(f"shape={options.shape!r} is not one of {', '.join(PRESETS)}.")
        name, shape = PRESETS[options.shape.lower()]
        recognised, adapter = True, None
        settings["quantize"] = options.quantize_base is not False
    else:
        name, adapter = _base_of(options)
        config = _read_config(name, options, of_adapter=adapter is not None)
        shape = Shape.of(config, options.trust_remote_code)
        recognised = _recognised(config)
        settings |= _quantization(config, name, options)
    if adapter is not None:
        lora = _adapter_of(shape, adapter, options.model_name_or_path)
    else:
        saved = options.lora_modules_to_save or ()
        lora = Lora.of(shape, options.lora_r, options.lora_target_modules, options.use_dora, saved)
    plain = options.use_dora or lora.others or settings["element"] != weight_bytes or not options.share_prompts
    wanted = getattr(options, "fused_layers", None)
    settings["fused"] = recognised and not plain and wanted is not False
    settings["packed"] = settings["fused"] and is_hopper(options.gpu)
    settings["offload"] = options.activation_offloading in (True, "True", "true")
    settings["reference"] = _reference(options, shape, lora, adapter is not None)
    return MemoryModel.of_shape(shape, lora, **settings), name


def _recognised(config: Any) -> bool:
    from ..fused.recognition import MODEL_TYPES

    return config.model_type in MODEL_TYPES and getattr(config, "hidden_act", None) == "silu"


def _base_of(options: Namespace) -> tuple[str, Any]:
    """The base's name, and the adapter's config if the model is an adapter."""
    from ..model.loading import is_adapter
    from ..reference.frozen_adapter import check_adapter, read_config

    name = options.model_name_or_path
    if not name:
        raise OptionError(
            f"model_name_or_path is missing: give a folder or Hub id, or --shape, one of {', '.join(PRESETS)}."
        )
    if not is_adapter(name, revision=options.model_revision):
        return name, None
    adapter = read_config(name, revision=options.model_revision)
    check_adapter(adapter)
    if not adapter.base_model_name_or_path:
        raise OptionError(f"The adapter {name!r} does not say which base it belongs to: give the base's name.")
    return adapter.base_model_name_or_path, adapter


def _read_config(name: str, options: Namespace, of_adapter: bool) -> Any:
    from transformers import AutoConfig

    revision = None if of_adapter else options.model_revision
    try:
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=options.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise OptionError(f"The config of model_name_or_path={name!r} can't be read: {error}") from error


def _quantization(config: Any, name: str, options: Namespace) -> dict[str, bool]:
    """Whether the linear layers are in 4 bits, as `modeling.load_base` loads them, and with double quantisation."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return {"quantize": options.quantize_base is not False}
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    if not stored.get("load_in_4bit"):
        raise OptionError(
            f"The weights of {name!r} are stored quantised ({stored.get('quant_method', 'unknown')}): their size is "
            "not known to the planner. Give the model that they were made from."
        )
    return {"quantize": True, "nested": bool(stored.get("bnb_4bit_use_double_quant"))}


def _adapter_of(shape: Shape, config: Any, folder: str) -> Lora:
    targets = config.target_modules
    if config.rank_pattern or isinstance(targets, str) or config.trainable_token_indices:
        raise OptionError(
            f"The adapter {folder!r} has a rank_pattern, a regular expression for targets, or trained tokens: its "
            "size is not known to the planner. Give its base, with lora_r and lora_target_modules near to it."
        )
    return Lora.of(shape, config.r, sorted(targets), config.use_dora, config.modules_to_save or ())


def _reference(options: Namespace, shape: Shape, lora: Lora, trained_before: bool) -> Lora | None:
    """The frozen adapter that is the reference; None: the adapter switched off, or no reference."""
    if not _needs_reference(options):
        return None
    if options.reference not in (None, "initial", "base"):
        from ..reference.frozen_adapter import read_config

        return _adapter_of(shape, read_config(options.reference), options.reference)
    own = options.reference != "base" and (trained_before or options.sync_ref_model)
    return lora if own else None


# ---- About it -------------------------------------------------------------------------------------------------------


def _about_model(model: MemoryModel) -> dict[str, Any]:
    shape = model.shape
    return {
        "weights": shape.weights,
        "layers": shape.layers,
        "trained_weights": model.trained,
        "optimizer": model.optimizer,
        "fused_layers": model.fused,
    }


def _about(name: str, model: MemoryModel) -> str:
    shape = model.shape
    stored = "NF4" if model.quantized else "not quantised"
    ranks = sorted(set(model.lora.ranks.values()))
    layers = "fused layers" if model.fused else "the model's own layers"
    return (
        f"{name}: {shape.weights / 1e9:,.2f} billion weights, {shape.layers} layers, {stored}. LoRA of rank "
        f"{', '.join(map(str, ranks)) or 'none'}: {model.trained:,} trained weights, {model.optimizer}. Computed by "
        f"{layers}."
    )
