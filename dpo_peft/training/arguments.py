"""What the trainer's constructor is given: each argument is checked before anything is loaded.

All functions raise `OptionError` with the argument's name and the remedy.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..config import DPOConfig
from ..errors import OptionError

AnyDataset = Dataset | IterableDataset


def autocast_dtype(args: DPOConfig) -> torch.dtype | None:
    """Returns what is computed in under mixed precision; None without."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


def name_of(model: Any) -> str:
    """Hub id or folder of a model; empty for one made in code."""
    if isinstance(model, str):
        return model
    if not isinstance(model, (PreTrainedModel, PeftModel)):
        raise OptionError(
            f"model is a {type(model).__name__}; pass a Hub id or folder as str, a causal LM, or a PeftModel."
        )
    return model.config._name_or_path


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


def check_arguments(model: Any, ref_model: Any, args: Any, quantization_config: Any) -> None:
    """Refuse arguments of the wrong type, contradictory ones and those without effect."""
    if ref_model is not None:
        raise OptionError(
            "ref_model is not accepted: the reference is the model itself, with the adapter switched off or a frozen "
            "copy of it, so a second model would only cost memory. Leave ref_model out. For another reference than "
            "the model as it comes in, set reference='base' or the folder of an adapter."
        )
    if not isinstance(args, DPOConfig):
        raise OptionError(f"args is a {type(args).__name__}; pass a dpo_peft.DPOConfig.")
    if not isinstance(model, str):
        unused = {"model_init_kwargs": args.model_init_kwargs, "quantization_config": quantization_config}
        for option, value in unused.items():
            if value is not None:
                raise OptionError(f"{option} has no effect on a model that is loaded already: pass the model's name.")
        if args.quantize_base and not getattr(model, "is_loaded_in_4bit", False):
            raise OptionError("quantize_base=True has no effect on a model that is loaded already: pass its name.")
    elif args.quantize_base is False and quantization_config is not None:
        raise OptionError("quantize_base=False contradicts quantization_config: give one of them.")
    if args.n_gpu > 1:
        raise OptionError(f"{args.n_gpu} GPUs are visible to one process: show it one by CUDA_VISIBLE_DEVICES=0.")


def check_datasets(args: DPOConfig, train_dataset: Any, eval_dataset: Any) -> None:
    """Refuse datasets that the options can't be used with."""
    if train_dataset is None:
        raise OptionError("train_dataset is missing: pass a datasets.Dataset with preference rows.")
    if not isinstance(train_dataset, AnyDataset):
        raise OptionError(
            f"train_dataset is a {type(train_dataset).__name__}; pass a datasets.Dataset or IterableDataset, such as "
            "datasets.load_dataset(..., split='train')."
        )
    if isinstance(train_dataset, IterableDataset) and args.max_steps <= 0:
        raise OptionError("A streaming train_dataset has no length: set max_steps.")
    evaluated = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
    streamed = any(isinstance(dataset, IterableDataset) for dataset in (train_dataset, *evaluated))
    if streamed and args.precompute_ref_log_probs:
        raise OptionError("precompute_ref_log_probs can't read a stream ahead: set cache_ref_log_probs instead.")
    if args.eval_strategy != "no" and eval_dataset is None:
        raise OptionError(f"eval_strategy={args.eval_strategy.value!r} needs an eval_dataset: pass one or set 'no'.")
    if args.sample_prompts and eval_dataset is None:
        raise OptionError(
            f"sample_prompts={args.sample_prompts} takes the prompts of eval_dataset: pass one (on the command line "
            "by eval_strategy and eval_dataset_name), or leave it out."
        )
    # With a stream, accelerate cuts batches along their first dimension by default; a packed batch has none.
    if args.accelerator_config.dispatch_batches:
        raise OptionError("accelerator_config: dispatch_batches=True can't cut packed batches; leave it out.")
    args.accelerator_config.dispatch_batches = False


def check_best_metric(args: DPOConfig, eval_dataset: Any, names: set[str]) -> None:
    """Refuse a `metric_for_best_model` that no evaluation reports: it would be missed after the first one.

    Args:
        names: of the metrics of each evaluation dataset, without `eval_`.
    """
    if args.metric_for_best_model is None or args.eval_strategy == "no":
        return
    name = f"eval_{args.metric_for_best_model.removeprefix('eval_')}"
    sets = [f"eval_{one}_" for one in eval_dataset] if isinstance(eval_dataset, dict) else ["eval_"]
    if name in {prefix + metric for prefix in sets for metric in names}:
        return
    remedy = f"set one of {', '.join(sorted(sets[0] + metric for metric in names))}"
    if len(sets) > 1 or sets[0] != "eval_":
        remedy += f", or of another evaluation dataset ({', '.join(sets)})"
    raise OptionError(f"metric_for_best_model={name!r} is not what an evaluation reports: {remedy}.")


def check_optimizer(optimizer: Any, model: nn.Module) -> None:
    """Refuse a given optimizer that would leave some of the adapter untrained."""
    if optimizer is None:
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    if missing:
        raise OptionError(
            f"optimizers: the optimizer lacks {len(missing)} of the adapter's weights (such as {missing[0]}), which "
            "would not be trained. Build it over the trainable weights of a PeftModel and pass that as model."
        )


def load_tokenizer(name: str, args: DPOConfig) -> Any:
    """The tokenizer that comes with a model; with an adapter's folder, its own or that of its base."""
    name = _with_tokenizer(name)
    init_kwargs = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
    try:
        return AutoTokenizer.from_pretrained(
            name, revision=init_kwargs.get("revision", "main"), trust_remote_code=args.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise OptionError(
            f"No tokenizer can be loaded from {name!r}: {error}. Give the right model, or the tokenizer as "
            "processing_class."
        ) from error


def _with_tokenizer(name: str) -> str:
    config = Path(name, "adapter_config.json")
    if not config.is_file() or Path(name, "tokenizer_config.json").is_file():
        return name
    return json.loads(config.read_text()).get("base_model_name_or_path") or name


def check_tokenizer(tokenizer: Any) -> None:
    """Refuse what is not a tokenizer."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise OptionError(
            f"processing_class is a {type(tokenizer).__name__}; pass a tokenizer. Processors of images or audio are "
            "not supported."
        )


def check_vocabulary(model: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer whose ids go beyond the embeddings."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise OptionError(
            f"The tokenizer has {len(tokenizer)} tokens and the model embeds {rows}: resize the model by "
            "model.resize_token_embeddings(len(tokenizer)), or pass the tokenizer that belongs to it."
        )
