"""A run's options as others may see them, and the recipe that repeats it: `dpo-peft train --config recipe.yaml`.

What is written here is meant to be published: tokens and passwords are left out, and a local file or folder is shown
by the last part of its path.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from peft import LoraConfig
from transformers import PreTrainedTokenizerBase

from ..config import DPOConfig
from ..credentials import without_secrets
from ..data import answer_only
from ..files import write_atomically
from .card import ADAPTER_OPTIONS, shown_name

# They name files or folders here and repositories of others: a recipe for anybody leaves the second kind out.
_PATHS = (
    "output_dir logging_dir log_file ref_cache_dir reference resume_from_checkpoint dataset_name eval_dataset_name "
    "model_name_or_path path data_dir data_files"
).split()
_OF_ONE_USER = "push_to_hub overwrite_output_dir resume_from_checkpoint run_name disable_tqdm log_file".split()
_LOCAL = re.compile(r"^(~|\.{1,2}[/\\]|[A-Za-z]:[/\\]|\\\\|file:)")
# LoraConfig's names of what `dpo-peft train` has options for.
_LORA_OPTIONS = {name: name if name.startswith(("lora_", "use_")) else f"lora_{name}" for name in ADAPTER_OPTIONS}


def plain(value: object) -> Any:
    """Returns a value as JSON and YAML know it."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(plain(item) for item in value)
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value).removeprefix("torch.")


def public(value: object, is_path: bool = False) -> Any:
    """Returns a plain value without secrets, local paths by their last part.

    Args:
        value: text, number, list or mapping.
        is_path: the text names a file or folder, or a repository of the Hub.
    """
    if isinstance(value, Mapping):
        return {key: public(item, key in _PATHS) for key, item in without_secrets(value).items()}
    if isinstance(value, list):
        return [public(item, is_path) for item in value]
    if isinstance(value, str) and (is_path or os.path.isabs(value) or _LOCAL.match(value)):
        value = shown_name(value)
    return without_secrets(value)


def changed_options(args: DPOConfig) -> dict[str, Any]:
    """Returns the options of a run that differ from their defaults, fit to be published; `learning_rate` always, as
    its default has not always been the same."""
    as_default = {  # what the config makes of a default
        "activation_checkpointing": args.gradient_checkpointing,
        "bf16": not args.fp16,
        "dataloader_pin_memory": not args.use_cpu,
        "disable_tqdm": False,
        "debug": [],
        "do_eval": plain(args.eval_strategy) != "no",
        "report_to": [],
        "accelerator_config": plain(getattr(args, "accelerator_config", None)),
    }
    changed = {}
    for option in fields(args):
        value = plain(getattr(args, option.name))
        default = option.default if option.default_factory is MISSING else option.default_factory()
        as_it_was = value in (plain(default), as_default.get(option.name, MISSING))
        if option.name == "learning_rate" or (option.init and not as_it_was):
            changed[option.name] = value
    changed["output_dir"] = Path(args.output_dir).resolve().name
    return public(changed)


def lora_options(config: LoraConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Returns the options of `dpo-peft train` that describe an adapter; its scope by the tokenizer's template."""
    options = {option: plain(getattr(config, name)) for name, option in _LORA_OPTIONS.items()}
    options = {option: value for option, value in options.items() if value not in (None, False, 0.0)}
    if tokens := config.alora_invocation_tokens:
        options["adapter_scope"] = "completions"
        if not tokenizer.chat_template or answer_only(tokenizer) != tokens:
            options["adapter_invocation"] = tokenizer.decode(tokens)
    return options


def _is_local(value: object, is_path: bool = False) -> bool:
    """Returns whether a value names, or holds what names, a file or folder of this machine."""
    if isinstance(value, Mapping):
        return any(_is_local(item, key in _PATHS) for key, item in value.items())
    if isinstance(value, list):
        return any(_is_local(item, is_path) for item in value)
    return isinstance(value, str) and bool(
        os.path.isabs(value) or _LOCAL.match(value) or (is_path and os.path.exists(value))
    )


def write_recipe(
    path: Path, changed: Mapping[str, object], source: Mapping[str, object], notes: Sequence[str] = ()
) -> None:
    """Writes a config file for `dpo-peft train`.

    Args:
        path: the file.
        changed: see `changed_options`.
        source: the options beside those: model, data, adapter.
        notes: what the recipe can't say by options; comments.
    """
    options = public({**source, **changed})
    options = {k: v for k, v in options.items() if k not in _OF_ONE_USER and not k.startswith("hub_")}
    if isinstance(given := options.get("model_init_kwargs"), Mapping):
        # `dpo-peft train` has options of its own for these.
        own = {"dtype", "revision"} if "model_revision" in options else {"dtype"}
        options["model_init_kwargs"] = {name: value for name, value in given.items() if name not in own}
        if not options["model_init_kwargs"]:
            del options["model_init_kwargs"]
    local = [name for name, value in source.items() if name != "output_dir" and _is_local(value, name in _PATHS)]
    local += ["reference"] if options.get("reference") not in (None, "initial", "base") else []
    command = "dpo-peft train --config recipe.yaml"
    lines = [f"Repeats the run: {command}"]
    if local:
        lines = [
            f"Repeats the run, once you have put in where these are: {', '.join(local)}.",
            f"They are local and shown by the last part of their paths. Then: {command}",
        ]
    lines += notes
    text = yaml.safe_dump(options, sort_keys=False, allow_unicode=True, width=110)
    write_atomically(path, "".join(f"# {line}\n" for line in lines) + text)
