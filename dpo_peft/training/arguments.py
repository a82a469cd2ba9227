"""What the trainer's constructor is given: each argument is checked before anything is loaded.

All checks raise `OptionError` with the argument's name and the remedy.
"""

import json
import logging
import math
import re
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import nn
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
)

from ..config import DPOConfig, objective_options
from ..credentials import find_secret
from ..data import DataReport
from ..data.formats import IMAGE_COLUMNS
from ..data.image_rows import holds_places, undecoded
from ..data.images import Images
from ..data.unread import SAMPLED
from ..distributed import check_launch
from ..errors import OptionError, refuse
from ..forward import PackedBatch
from ..forward.rotary import fix_rope, fixed_rope_length, rope_length
from ..manifests import settle
from ..model.gguf import from_named
from ..model.loading import check_checkpoint, hub_place
from ..model.training_record import read_training
from ..objective import TrainingObjective
from ..wings import required, wing
from .metrics import metric_names

logger = logging.getLogger(__name__)

AnyDataset: TypeAlias = Dataset | IterableDataset
_POSITIONS = re.compile(r"\b(wpe|\w*pos(ition)?_?emb\w*|embed_positions?)\b")  # names of tables of positions


def autocast_dtype(args: DPOConfig) -> torch.dtype | None:
    """Returns what is computed in under mixed precision; None without."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


def check_constructor(
    model: object,
    ref_model: object,
    args: DPOConfig | None,
    train_dataset: object,
    eval_dataset: object,
    tokenizer: object,
    quantization_config: object,
    own_metrics: bool,
) -> tuple[str, DPOConfig, PreTrainedTokenizerBase, Images | None, TrainingObjective]:
    """Checks what the trainer's constructor is given, and fills in what is not.

    The arguments are the trainer's; `own_metrics`: a `compute_metrics` adds metrics that are not known here. Returns
    the model's name (empty for one made in code), the options, the tokenizer, the processor of images if one is given
    or rows need it, and the objective.
    """
    if not isinstance(model, str | PreTrainedModel | PeftModel):
        raise OptionError(
            f"model is a {type(model).__name__}; pass a Hub id or folder as str, a causal LM, or a PeftModel."
        )
    name = model if isinstance(model, str) else model.config._name_or_path
    if args is None:
        args = DPOConfig(output_dir=f"{name.rstrip('/').split('/')[-1] or 'model'}-DPO")
    elif not isinstance(args, DPOConfig):
        raise OptionError(f"args is a {type(args).__name__}; pass a dpo_peft.DPOConfig.")
    if (evaluation := wing("evaluation") if args.log_file is None else required("evaluation", "log_file")) is not None:
        evaluation.open_log(args)
    _check_model(model, ref_model, args, quantization_config)
    check_launch(args)
    _check_datasets(args, train_dataset, eval_dataset)
    if tokenizer is None:
        load = load_processor if hold_images(train_dataset) else load_tokenizer
        tokenizer = load(name, args.model_init_kwargs, args.trust_remote_code)
    images = Images(tokenizer) if isinstance(tokenizer, ProcessorMixin) else None
    tokenizer = tokenizer if images is None else images.tokenizer
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise OptionError(
            f"processing_class is a {type(tokenizer).__name__}; pass a tokenizer, or the processor of a model of text "
            "and images."
        )
    if any(find_secret(str(token)) for token in tokenizer.special_tokens_map.values()):
        raise OptionError(
            "processing_class has a secret among its special tokens, which would be saved (transformers takes "
            "use_auth_token for one): load it with token=... instead."
        )
    if isinstance(model, str):
        init_kwargs: Any = args.model_init_kwargs
        check_checkpoint(model, quantization_config, args.quantize_base is not False, init_kwargs)
    objective = TrainingObjective(args.loss_type, args.loss_weights, **objective_options(args))
    drawn = args.train_sampling_strategy == "random" and not args.accelerator_config.use_seedable_sampler
    if args.precompute_ref_log_probs and objective.needs_mismatched and drawn:
        raise OptionError(
            "accelerator_config: use_seedable_sampler=False draws an order of the rows that can't be told ahead, and "
            f"precompute_ref_log_probs needs it for loss_type {', '.join(args.loss_type)}: leave it out, or set "
            "train_sampling_strategy='sequential'."
        )
    if args.metric_for_best_model is not None and args.eval_strategy != "no" and not own_metrics:
        _check_best_metric(args, args.metric_for_best_model, eval_dataset, objective)
    return name, args, tokenizer, images, objective


def _check_model(model: object, ref_model: object, args: DPOConfig, quantization_config: object) -> None:
    loaded, quantize = not isinstance(model, str), args.quantize_base
    no_effect = "has no effect on a model that is loaded already: pass"
    refuse(
        {
            "ref_model is not accepted: the reference is the model itself, with the adapter switched off or a frozen "
            "copy of it, so a second model would only cost memory. Leave ref_model out. For another reference than "
            "the model as it comes in, set reference='base' or the folder of an adapter.": ref_model is not None,
            f"model_init_kwargs {no_effect} the model's name.": loaded and args.model_init_kwargs is not None,
            f"quantization_config {no_effect} the model's name.": loaded and quantization_config is not None,
            f"quantize_base=True {no_effect} its name.": (
                loaded and quantize and not getattr(model, "is_loaded_in_4bit", False)
            ),
            "quantize_base=False contradicts quantization_config: give one of them.": (
                quantize is False and quantization_config is not None
            ),
            f"{args.n_gpu} GPUs are visible to one process: show it one by CUDA_VISIBLE_DEVICES=0.": args.n_gpu > 1,
        }
    )


def _check_datasets(args: DPOConfig, train_dataset: object, eval_dataset: object) -> None:
    evaluated = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
    streamed = any(isinstance(dataset, IterableDataset) for dataset in (train_dataset, *evaluated))
    refuse(
        {
            "`train_dataset` is required: pass a datasets.Dataset with preference rows.": train_dataset is None,
            f"train_dataset is a {type(train_dataset).__name__}; pass a datasets.Dataset or IterableDataset, such as "
            "datasets.load_dataset(..., split='train').": not isinstance(train_dataset, AnyDataset),
            "A streaming train_dataset has no length: set max_steps.": (
                isinstance(train_dataset, IterableDataset) and args.max_steps <= 0
            ),
            "precompute_ref_log_probs is not supported with IterableDataset, as a stream can't be read ahead: set "
            "cache_ref_log_probs instead.": (streamed and args.precompute_ref_log_probs),
            f"eval_strategy={args.eval_strategy.value!r} needs an eval_dataset: pass one or set 'no'.": (
                args.eval_strategy != "no" and eval_dataset is None
            ),
            f"sample_prompts={args.sample_prompts} takes the prompts of eval_dataset: pass one (on the command line "
            "by eval_strategy and eval_dataset_name), or leave it out.": args.sample_prompts and eval_dataset is None,
            "accelerator_config: dispatch_batches=True can't cut packed batches; leave it out.": (
                args.accelerator_config.dispatch_batches
            ),
        }
    )
    # With a stream, accelerate cuts batches along their first dimension by default; a packed batch has none.
    args.accelerator_config.dispatch_batches = False


def _check_best_metric(args: DPOConfig, chosen: str, eval_dataset: object, objective: TrainingObjective) -> None:
    """Refuses a `metric_for_best_model` that no evaluation reports: it would be missed after the first one."""
    tokens = args.ref_cache_tokens or objective.reads_reference_tokens or not args.caches_reference
    names = metric_names(objective.kind, bool(objective.needs_reference and tokens), objective.needs_mismatched)
    name = f"eval_{chosen.removeprefix('eval_')}"
    sets = [f"eval_{one}_" for one in eval_dataset] if isinstance(eval_dataset, dict) else ["eval_"]
    if name not in {prefix + metric for prefix in sets for metric in names}:
        remedy = f"set one of {', '.join(sorted(sets[0] + metric for metric in names))}"
        if sets != ["eval_"]:
            remedy += f", or of another evaluation dataset ({', '.join(sets)})"
        raise OptionError(f"metric_for_best_model={name!r} is not what an evaluation reports: {remedy}.")


def load_tokenizer(name: str, init_kwargs: object = None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Returns the tokenizer that comes with a model; with an adapter, its own or that of its base. It is looked for
    where `init_kwargs`, those of the model, say that the model is."""
    tokenizer: PreTrainedTokenizerBase = _load(AutoTokenizer, "tokenizer", name, init_kwargs, trust_remote_code)
    return tokenizer


def load_processor(name: str, init_kwargs: object = None, trust_remote_code: bool = False) -> ProcessorMixin:
    """Returns the processor of images that comes with a model, as `load_tokenizer`."""
    processor = _load(AutoProcessor, "processor", name, init_kwargs, trust_remote_code)
    if not isinstance(processor, ProcessorMixin):
        raise OptionError(
            f"The rows hold images, and {name!r} comes with no processor of images: take a model of text and images, "
            "or remove the images from the rows."
        )
    return processor


def hold_images(dataset: object) -> bool:
    """Returns whether rows of a dataset have images: a column of them, or messages with some."""
    if not isinstance(dataset, AnyDataset):
        return False
    some: list[dict[str, Any]] = list(islice(undecoded(dataset), SAMPLED))
    return any(row.keys() & IMAGE_COLUMNS or any(map(holds_places, row.values())) for row in some)


def _load(auto: Any, kind: str, name: str, init_kwargs: object, trust_remote_code: bool) -> Any:
    settle(Path(name))
    where = hub_place(init_kwargs)
    config = Path(name, "adapter_config.json")
    if config.is_file() and not Path(name, "tokenizer_config.json").is_file():
        adapter = json.loads(config.read_text())
        name = adapter.get("base_model_name_or_path") or name
        where = {key: value for key, value in where.items() if key != "revision"}  # which is the adapter's
        where |= {"revision": adapter["revision"]} if adapter.get("revision") else {}
    try:
        return from_named(auto, name, trust_remote_code=trust_remote_code, **where)
    except (OSError, ValueError, ImportError) as error:
        raise OptionError(
            f"No {kind} can be loaded from {name!r}: {error}. Give the right model, or the {kind} as processing_class."
        ) from error


def check_optimizer(optimizer: torch.optim.Optimizer | None, model: nn.Module) -> None:
    """Refuses a given optimizer that would leave some of the adapter untrained."""
    if optimizer is None:
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    if missing:
        raise OptionError(
            f"optimizers: the optimizer lacks {len(missing)} of the adapter's weights (such as {missing[0]}), which "
            "would not be trained. Build it over the trainable weights of a PeftModel and pass that as model."
        )


def check_collator(collate: Callable[[Sequence[Any]], dict[str, Any]], row: dict[str, Any]) -> None:
    """Refuses a collator that can't lay out a prepared row, or makes something else of it."""
    try:
        PackedBatch(**collate([row]))
    except (KeyError, TypeError) as error:
        raise OptionError(
            f"data_collator={type(collate).__name__} does not turn prepared rows ({', '.join(row)}) into the fields "
            f"of PackedBatch ({type(error).__name__}: {error}). Leave it out, or wrap dpo_peft.data.collator's "
            "PreferenceCollator."
        ) from error


def check_callbacks(callbacks: Sequence[TrainerCallback]) -> None:
    """Refuses TRL's callback that reads the texts of prompts from the evaluation dataset."""
    for callback in callbacks:
        if type(callback).__name__ == "LogCompletionsCallback":
            raise OptionError(
                "LogCompletionsCallback reads prompts as text from the evaluation dataset, which holds tokens here: "
                "leave it out, and set sample_prompts to see completions at every evaluation."
            )


def check_fits(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, rows: Any, of: Any) -> None:
    """Refuses prepared rows with tokens that the model does not embed, or longer than its learned positions.

    A tokenizer may be longer than the embeddings, as long as no row holds its last tokens. `rows` are a dataset that
    `prepare_dataset` made, `of` is its summary.
    """
    embedded, stream = model.get_input_embeddings().weight.shape[0], isinstance(rows, IterableDataset)
    remedy = "resize it by model.resize_token_embeddings(len(tokenizer)), or pass the tokenizer that belongs to it."
    if len(tokenizer) > embedded and stream:
        raise OptionError(f"The tokenizer has {len(tokenizer)} tokens and the model embeds {embedded}: {remedy}")
    if len(tokenizer) > embedded:
        for row in rows:
            if (largest := max(map(max, [row["prompt_ids"] or [0], *row["completion_ids"]]))) >= embedded:
                raise OptionError(
                    f"Row {row['row']} of {of.name} has the token {tokenizer.convert_ids_to_tokens(largest)!r} "
                    f"({largest}) and the model embeds {embedded}: {remedy}"
                )
    made_for, learned = positions(model)
    longest = longest_row(rows, of)
    fixed_for = fixed_rope_length(model)
    if fixed_for is not None and longest != math.inf and fixed_for < (rope_length(model.config, longest) or 0):
        logger.warning(
            "The rows of %s have up to %d tokens, and the rotary frequencies of this run are those of rows of up to "
            "%d: beyond, log-probs mean little. Give the rows to the trainer as its eval_dataset, or set max_length.",
            *(of.name, longest, fixed_for),
        )
    if made_for is None or longest <= made_for:
        return
    if learned:
        length = "any number of" if longest == math.inf else f"up to {longest}"
        raise OptionError(
            f"The rows of {of.name} have {length} tokens, and the model has learned {made_for} positions: set "
            f"max_length={made_for} or less."
        )
    if not stream:
        logger.warning(
            "The rows of %s have up to %d tokens, and the model was made for %d (max_position_embeddings): beyond, "
            "its log-probs mean little. Set max_length, or the model's rope scaling.",
            *(of.name, longest, made_for),
        )


def longest_row(rows: AnyDataset, of: DataReport) -> float:
    """Returns how many tokens prepared rows have at most; of a stream, whose rows are not known, may have."""
    return (of.max_length or math.inf) if isinstance(rows, IterableDataset) else of.longest


def fix_rope_by_rows(model: PreTrainedModel | PeftModel, prepared: Sequence[tuple[AnyDataset, DataReport]]) -> None:
    """Fixes the frequencies of a model that chooses them by a batch's longest row, for the longest row of a run."""
    length = rope_length(model.config, max(longest_row(*one) for one in prepared))
    if length is None:
        return
    fix_rope(model, length)
    logger.info(
        "The model chooses its rotary frequencies by the longest row of a batch. In this run all rows get those of "
        "rows of %d tokens, in every batch. With longrope, serve it with a context (vLLM's max_model_len) %s.",
        *(length, "as long at least" if rope_length(model.config, 1) != length else "no longer than this"),
    )
    before = read_training(model.peft_config[model.active_adapters[0]]) if isinstance(model, PeftModel) else None
    if before is not None and before.rope_length not in (None, length):
        logger.warning(
            "The adapter was trained with the rotary frequencies of rows of %d tokens, and goes on with those of rows "
            "of %d: its log-probs are others. max_length decides how long rows are.",
            *(before.rope_length, length),
        )


def positions(model: PreTrainedModel | PeftModel) -> tuple[int | None, bool]:
    """Returns how many positions a model was made for, if it says so, and whether it has a table of them, which ends
    there."""
    made_for = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(made_for, int):
        return None, False
    tables = [*model.named_parameters(), *model.named_buffers()]
    # Some tables have a few rows more, for padding.
    return made_for, any(
        _POSITIONS.search(name) and table.ndim == 2 and 0 <= len(table) - made_for <= 8 for name, table in tables
    )


def longest_allowed(model: PreTrainedModel | PeftModel, max_length: int | None) -> int | None:
    """Returns the smaller one of `max_length` and the number of positions that a model has learned; None: any."""
    made_for, learned = positions(model)
    return min((one for one in (max_length, made_for if learned else None) if one is not None), default=None)


def check_dtype(model: PreTrainedModel | PeftModel, args: DPOConfig) -> None:
    """Refuses a quantized model whose other weights are in another 16-bit dtype than the run: autocast mixes none."""
    dtype, computed = model.get_input_embeddings().weight.dtype, autocast_dtype(args)
    quantized = getattr(model.config, "quantization_config", None) is not None
    if quantized and computed is not None and dtype not in (computed, torch.float32):
        own, name = (str(one).removeprefix("torch.") for one in (dtype, computed))
        option = "fp16" if dtype == torch.float16 else "bf16"
        raise OptionError(
            f"The quantized model is in {own} and the run computes in {name}: set {option}=True, or load the model "
            f"with dtype={name!r}."
        )


def data_source(dataset: Any) -> tuple[list[str], str | None]:
    """Returns where a dataset says that it comes from, Hub ids or names of files, and its license. Rows made in code
    have neither."""
    names: list[str] = []
    license_ = None
    for part in dataset.values() if isinstance(dataset, dict) else [dataset]:
        info = getattr(part, "info", None)
        for url in getattr(info, "download_checksums", None) or {}:
            found = re.match(r"hf://datasets/([^@]+)@", url)
            names.append(found[1] if found else re.split(r"[/\\]", url)[-1])
        # Rows of a Hub dataset are kept in a folder with its name.
        folders = [Path(file["filename"]).parts for file in getattr(part, "cache_files", None) or []]
        names += [name.replace("___", "/") for parts in folders for name in parts if name.count("___") == 1]
        license_ = license_ or getattr(info, "license", None) or None
    return list(dict.fromkeys(names)), license_
