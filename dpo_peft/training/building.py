"""What the trainer is built of: the model with its adapter and reference, prepared rows, the plan for memory."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, enable_full_determinism, set_seed
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..config import DPOConfig
from ..data import DataReport, prepare_dataset, rows_digest
from ..data.clock import KEY as DATE
from ..data.clock import keep_date
from ..data.collator import keep_rows, with_keys
from ..data.images import Images
from ..data.prepare import STREAM_PATIENCE
from ..distributed import ShareCollator, world_size
from ..errors import OptionError, ReferenceMismatchError
from ..forward import has_routers
from ..forward.rotary import fixed_rope_length
from ..forward.scope import invocation_tokens
from ..model.adapter_source import plain_fingerprint
from ..model.adapters import check_adapter, is_adapter, read_config
from ..model.experts import has_packed_experts
from ..model.loading import attach_adapter, disable_dropout, hub_place, load_model
from ..model.placement import placement_of
from ..model.rebuilding import BaseAsGiven, base_as_given, base_class, check_class, quantization_options
from ..model.training_record import TrainedWith, read_training
from ..objective import TrainingObjective
from ..reference.adapter_off import Reference
from ..reference.frozen_adapter import freeze_copy
from .arguments import (
    AnyDataset,
    autocast_dtype,
    check_collator,
    check_dtype,
    check_fits,
    data_source,
    fix_rope_by_rows,
)
from .memory_budget import place_layers
from .packing import tokens_of
from .results import asks_to_resume

logger = logging.getLogger(__name__)

Collate = Callable[[Sequence[dict[str, Any]]], dict[str, Any]]


def row_options(args: Any, objective: TrainingObjective) -> dict[str, Any]:
    """Returns what options and objective say of rows, by the names that `prepare_dataset` has for them."""
    names = ("max_length", "truncation_mode", "on_unusable", "max_unusable_share", "discount_unit", "as_chat")
    return {
        **{name: getattr(args, name) for name in names},
        **{name: getattr(objective, name) for name in ("data", "label_columns", "single_best")},
        "unneeded_columns": args.unneeded_columns or (),
        "unpair": args.unpair_preferences,
    }


class Preparation:
    """Prepares the datasets of a run, and remembers what became of their rows.

    Args:
        objective: which labels it reads, and which kind of data.
        images: the model's processor, if rows may hold images.
        adapter: the model and the config of a new adapter, as the trainer was given them.
    """

    def __init__(
        self,
        args: DPOConfig,
        objective: TrainingObjective,
        tokenizer: PreTrainedTokenizerBase,
        images: Images | None = None,
        adapter: tuple[object, PeftConfig | None] = (None, None),
    ):
        self.invocation = _invocation(*adapter, args)
        self.args, self.objective, self.tokenizer, self.images = args, objective, tokenizer, images
        keep_date(tokenizer, args.output_dir, args.resume_from_checkpoint)
        self.reports: dict[str, DataReport] = {}  # dataset name to what became of its rows
        self.sources: dict[str, tuple[list[str], str | None]] = {}  # "train" and "eval" to where rows come from
        self.evaluated: dict[str, AnyDataset] = {}  # the trainer's own, by metric prefix ("eval", "eval_<name>")
        self.as_chat = args.as_chat  # whether texts are read as turns: the option, or the choice for training rows
        if args.as_chat is None and asks_to_resume(args.resume_from_checkpoint):
            self.as_chat = _recorded_as_chat(args.output_dir, args.resume_from_checkpoint)
        self._model: PreTrainedModel | PeftModel | None = None

    def __call__(self, rows: AnyDataset, name: str) -> AnyDataset:
        """Returns a dataset prepared (see `prepare_dataset`)."""
        args, objective = self.args, self.objective
        with args.main_process_first(desc=f"preparing the {name} dataset"):
            prepared, report = prepare_dataset(
                rows,
                self.tokenizer,
                name=name,
                num_proc=args.dataset_num_proc,
                images=self.images,
                invocation=self.invocation,
                **{**row_options(args, objective), "as_chat": self.as_chat},
            )
        self.reports[name] = report
        streamed = f"{name}: a stream in {report.format} format, whose rows are counted as they are read."
        logger.info("%s", report if report.source_rows else streamed)
        if self._model is not None:
            check_fits(self._model, self.tokenizer, prepared, report)
        return prepared

    def training(self, rows: AnyDataset) -> AnyDataset:
        """Returns the training dataset prepared."""
        self.sources["train"] = data_source(rows)
        self._training = self(rows, "train")
        chosen = self.reports["train"].as_chat
        if self.args.as_chat and chosen is None:
            raise OptionError("as_chat=True has no effect: the training rows have no prompts of text. Leave it out.")
        self.as_chat = self.as_chat if chosen is None else chosen
        return self._training

    def fit(self, model: PreTrainedModel | PeftModel, collate: Collate | None = None) -> None:
        """Refuses rows that the model has no embeddings or positions for, now and in datasets that come later; and a
        given collator that is not made for prepared rows. Where the longest row of a batch would decide the rotary
        frequencies, the longest of all does."""
        self._model = model
        token = getattr(model.config, "image_token_id", None)
        if self.images is not None and token not in (None, self.images.token):
            raise OptionError(
                f"processing_class puts images at the token {self.images.token}, and the model at {token}: pass the "
                "processor that belongs to it."
            )
        if collate is not None:
            check_collator(collate, next(iter(self._training)))
        fix_rope_by_rows(model, [(rows, self.reports[name]) for name, rows in self._prepared()])
        for name, rows in self._prepared():
            check_fits(model, self.tokenizer, rows, self.reports[name])

    def _prepared(self) -> Iterable[tuple[str, AnyDataset]]:
        return {"train": self._training, **self.evaluated}.items()

    def count(self, name: str, ended: bool) -> DataReport:
        """Returns the summary of a dataset; those of streams hold what worker processes have counted so far. Raises
        `DataError` for a stream that drops more than `max_unusable_share` of its rows, judged once it has `ended` or a
        hundred of them are read."""
        for one in self.reports.values():
            one.gather()
        report = self.reports[name]
        if ended or report.source_rows >= STREAM_PATIENCE:
            report.check_share(self.args.max_unusable_share if self.args.on_unusable == "drop" else None)
        return report

    @cached_property
    def told_by(self) -> dict[str, str]:
        """Returns what the training rows are told by, under the names that a difference is reported with."""
        date = self.reports["train"].date
        return {"train_dataset": rows_digest(self._training), **({DATE: date} if date else {})}

    def evaluation(self, rows: AnyDataset | Mapping[str, AnyDataset] | None) -> Any:
        """Returns the evaluation dataset, or the dict of several by name, prepared."""
        self.sources["eval"] = data_source(rows)
        if isinstance(rows, Mapping):
            self.evaluated = {f"eval_{name}": self(part, f"eval_{name}") for name, part in rows.items()}
            return {name: self.evaluated[f"eval_{name}"] for name in rows}
        self.evaluated = {} if rows is None else {"eval": self(rows, "eval")}
        return self.evaluated.get("eval")


def _invocation(model: object, peft_config: PeftConfig | None, args: DPOConfig) -> tuple[int, ...]:
    """Returns the tokens that the adapter to be trained acts from, before its model is loaded."""
    if peft_config is not None:
        check_adapter(peft_config)
    configs = {"": peft_config}
    if isinstance(model, PeftModel):
        configs = {"": model.peft_config[model.active_adapters[0]]}
    elif isinstance(model, str) and is_adapter(model, **(where := hub_place(args.model_init_kwargs))):
        configs = {"": read_config(model, **where)}
    return invocation_tokens(configs, "")


def _recorded_as_chat(output_dir: str | None, checkpoint: str | bool | None) -> bool | None:
    """Returns how a run that is resumed reads rows of text: as its checkpoints record it."""
    named = [Path(checkpoint)] if isinstance(checkpoint, str) else []
    for folder in [*named, *sorted(Path(str(output_dir)).glob("checkpoint-*"))]:
        with suppress(ReferenceMismatchError, OSError, ValueError):  # a damaged one is named where the run is resumed
            if (record := read_training(folder)) is not None:
                return record.as_chat
    return None


class NoEvaluation:
    """Stands for `evaluation.Evaluation` in a copy of the package without that folder: nothing is kept or said."""

    parts: Sequence[TrainerCallback] = ()
    warnings_raised: list[dict[str, Any]] = []

    def __init__(self, *_: object): ...

    def under_way(self, *_: object) -> AbstractContextManager[None]:
        """Returns a context without effect."""
        return nullcontext()

    def add(self, *_: object) -> None:
        """Does nothing."""

    begin = finish = renew = add


def collators(
    args: DPOConfig, objective: TrainingObjective, collate: Collate, images: Images | None = None
) -> tuple[Collate, Collate]:
    """Returns what lays out a micro-batch, and what the data loader makes of this process's rows."""
    size = partial(tokens_of, shared=getattr(collate, "shared", True))
    if args.caches_reference:
        collate = partial(with_keys, collate=collate)
    # Mismatched completions come from the whole optimizer batch, and a token budget packs all of it: its rows are laid
    # out when all are there. So are single rows, which `full_determinism` takes whatever the batch options say.
    if args.full_determinism:
        logger.info("full_determinism: each row is a micro-batch of its own, whatever the batch options (slower).")
    if objective.needs_mismatched or args.max_tokens_per_microbatch is not None or args.full_determinism:
        return collate, partial(keep_rows, images=images)
    return collate, collate if world_size() == 1 else ShareCollator(collate, size)


def loading_options(args: DPOConfig, quantized: bool) -> dict[str, Any]:
    """Returns `model_init_kwargs` with the dtype in which the run computes where none is given; also in place of the
    other 16-bit dtype where the base is quantized, as autocast does not mix the two."""
    assert not isinstance(args.model_init_kwargs, str)
    options, computed = dict(args.model_init_kwargs or {}), autocast_dtype(args)
    given = options.pop("dtype", options.pop("torch_dtype", None))
    name = str(given).removeprefix("torch.")
    if computed is not None and (given is None or (quantized and name in ("bfloat16", "float16"))):
        if given is not None and name != str(computed).removeprefix("torch."):
            logger.info("The base is loaded in %s instead of %s: the run computes in it (bf16, fp16).", computed, name)
        given = computed
    return options if given is None else {**options, "dtype": given}


def build_model(
    model: str | PreTrainedModel | PeftModel,
    args: DPOConfig,
    quantization_config: QuantizationConfigMixin | None,
    peft_config: PeftConfig | None,
    needs_reference: bool,
    images: Images | None = None,
) -> tuple[PeftModel, Reference, BaseAsGiven]:
    """Returns the PEFT model to train, loaded if it is given by name, the reference inside it, and in what its base
    differs from what its name gives."""
    if args.lora_vision and (images is None or not images.seen):
        raise OptionError("lora_vision=True, and there are no images: leave it out, or pass a processor.")
    reentrant = args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
    if args.lora_vision and reentrant:
        raise OptionError(
            "gradient_checkpointing_kwargs: with use_reentrant=True adapters in a tower may get no gradient. Leave it "
            "out, or lora_vision."
        )
    if (args.lora_vision or args.lora_experts) and invocation_tokens({"": peft_config}, ""):
        raise OptionError(
            "lora_vision, lora_experts: not with an answer-only adapter (adapter_scope). Leave them out."
        )
    # The adapter's start is drawn at random; and cuBLAS reads how it should work when it is first used.
    (enable_full_determinism if args.full_determinism else set_seed)(args.seed)
    name = model if isinstance(model, str) else None
    placed = args.fsdp or args.stream_layers is not None
    if isinstance(model, str):
        quantize = args.quantize_base is not False
        init_kwargs = loading_options(args, quantize or quantization_config is not None)
        device = torch.device("cpu") if placed else args.device
        model = load_model(model, quantization_config, quantize, init_kwargs, args.trust_remote_code, device)
    check_class(model)
    if placement_of(model) is not None:
        raise OptionError(
            "model: an earlier trainer shards or streams its layers (fsdp, stream_layers). Load it again: its name or "
            "folder, or that of an adapter that was saved."
        )
    by_name = name is not None and not isinstance(model, PeftModel)
    as_given = BaseAsGiven(base_class(model)) if by_name else base_as_given(model)
    if as_given.base_changed:
        logger.warning(
            "The model is not what the files of %r hold: %s differ. The adapter will fit the changed model alone, and "
            "its config names %r. To find it again, save the model (save_pretrained) and pass that folder.",
            *(model.config._name_or_path, as_given.base_changed, model.config._name_or_path),
        )
    check_dtype(model, args)
    continued = isinstance(model, PeftModel)
    seen = images.probe_samples()[0] if images is not None and args.lora_vision else None
    experts = args.lora_experts
    model, reference = attach_adapter(model, peft_config, args.reference, needs_reference, experts, seen)
    if continued and reference.choice == "initial" and reference.adapter is not None:
        reference = replace(reference, source=name)  # where the adapter came from, so that it is found again
    if args.sync_ref_model and reference.adapter is None:
        reference = replace(reference, adapter=freeze_copy(model))
    if args.disable_dropout and (found := disable_dropout(model)):
        logger.info("disable_dropout=True: turned off %s.", ", ".join(found))
    if args.gradient_checkpointing:
        model.enable_input_require_grads()
    if placed:
        place_layers(model, args, reference.adapter)
    return model, reference, as_given


def router_coef(model: PeftModel, args: DPOConfig) -> float:
    """Returns the weight of the routers' auxiliary loss: the option's, or the one in the model's config; 0 for a model
    without routers. Raises `OptionError` for an option that can't have an effect."""
    given, name = args.router_aux_loss_coef, type(model.get_base_model()).__name__
    coef = getattr(model.config.get_text_config(), "router_aux_loss_coef", None) if given is None else given
    dtype = autocast_dtype(args)
    with torch.autocast(args.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        routed = bool(coef) and has_routers(model)
    if not coef or (given is None and not routed):
        return 0.0
    if not routed:
        raise OptionError(
            f"router_aux_loss_coef={coef}: {name} is not a mixture of experts that gives its routers' logits, so it "
            "has no auxiliary loss. Leave the option out."
        )
    if args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
        raise OptionError(
            "gradient_checkpointing_kwargs: with use_reentrant=True the routers' auxiliary loss has no gradient. "
            "Leave it out, or set router_aux_loss_coef=0.0."
        )
    logger.info("The routers' auxiliary loss is added to the loss, times %g (router_aux_loss_coef).", coef)
    return float(coef)


def trained_with(
    model: PeftModel, args: DPOConfig, objective: TrainingObjective, as_given: BaseAsGiven, as_chat: bool | None
) -> TrainedWith:
    """Returns what the adapter's config records of its training."""
    base = model.get_base_model()
    return TrainedWith(
        loss_type=objective.names,
        beta=args.beta,
        reward=objective.parts[0].reward,
        max_length=args.max_length,
        truncation_mode=args.truncation_mode,
        precision=str(autocast_dtype(args) or "no").removeprefix("torch."),
        dtype=str(base.get_input_embeddings().weight.dtype).removeprefix("torch."),
        quantization=quantization_options(getattr(base.config, "quantization_config", None)),
        discount_gamma=args.discount_gamma,
        ld_alpha=args.ld_alpha,
        plain_fingerprint=plain_fingerprint(model),
        experts_quantized=has_packed_experts(base),
        rope_length=fixed_rope_length(model),
        as_chat=as_chat,
        **vars(as_given),
    )
