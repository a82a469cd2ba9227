"""What of Axolotl's options is more than another name."""

from ..errors import OptionError
from .made import Given, Made, names

LOSSES = {"dpo": "sigmoid", "ipo": "ipo", "orpo": "orpo", "kto": "kto", "simpo": "simpo"}


def read_axolotl(made: Made) -> None:
    """Adds our options for what of a config is more than another name. Raises an OptionError for another training."""
    given = made.given
    if (rl := str(given.get("rl")).lower()) not in LOSSES:
        raise OptionError(f"rl={given.get('rl')!r} is no training from preferences: {', '.join(LOSSES)} are.")
    losses = given.get("dpo_loss_type") if rl == "dpo" else None
    made.put("loss_type", losses or LOSSES[rl], "dpo_loss_type" if losses else "rl")
    if rl != "dpo" and "dpo_loss_type" in given:
        made.leave("dpo_loss_type", f"no effect with rl: {rl}")
    if "dpo_loss_weights" in given:
        made.put("loss_weights", given["dpo_loss_weights"], "dpo_loss_weights")
    if "ipo" in (losses or [LOSSES[rl]]):
        made.put("ipo_length_normalize", True, "TRL's IPO is a mean over tokens")
    if rl == "simpo" and (weight := given.get("cpo_alpha", 1.0)):
        made.put("loss_type", ["simpo", "sft"], "rl, with the likelihood of the chosen that cpo_alpha weighs")
        made.put("loss_weights", [1.0, float(weight)], "cpo_alpha")
    elif "cpo_alpha" in given:
        made.leave("cpo_alpha", f"no effect with rl: {rl}")
    if rl == "simpo" and made.value("simpo_gamma") is None:
        made.put("simpo_gamma", 0.5, "Axolotl's default")
    for key, value in given.get("trl", {}).items():
        if key == "beta":
            made.put("beta", value, "trl.beta")
        else:
            made.leave(f"trl.{key}", "not offered", value)
    _model(made)
    made.optimizer("optimizer")
    made.datasets([_part(made, part) for part in given.get("datasets", [])], "datasets")
    if tests := given.get("test_datasets"):
        made.put("eval_dataset_name", [part.get("path") for part in tests], "test_datasets")
        if any({*part} - {"path", "ds_type", "type"} for part in tests):
            made.leave(
                "test_datasets", "their paths are taken; columns and splits are read as those of the training rows"
            )
    made.evaluation(given.get("val_set_size"), "val_set_size")
    for key, name in (("evals_per_epoch", "eval"), ("saves_per_epoch", "save")):
        if key in given and (times := given[key] * float(made.value("num_train_epochs"))) > 1:
            made.put(f"{name}_strategy", "steps", key)
            made.put(f"{name}_steps", round(1 / times, 6), f"{key}, as a share of all steps")
        elif key in given:
            made.put(f"{name}_strategy", "epoch", key)
    if made.value("eval_strategy") and not (given.get("val_set_size") or given.get("test_datasets")):
        made.leave("evals_per_epoch" if "evals_per_epoch" in given else "eval_strategy", "no rows are held out")
        for name in ("eval_strategy", "eval_steps"):
            made.options.pop(name, None)
    wandb = given.get("use_wandb") or given.get("wandb_project")
    trackers = [name for name, on in (("tensorboard", given.get("use_tensorboard")), ("wandb", wandb)) if on]
    made.put("report_to", trackers or "none", "its tracker")
    if "wandb_name" in given:
        made.put("run_name", given["wandb_name"], "wandb_name")
    if "wandb_project" in given:
        made.leave("wandb_project", f"set it in the shell: WANDB_PROJECT={given['wandb_project']}")


def _model(made: Made) -> None:
    given = made.given
    adapter = given.get("adapter")
    if adapter not in ("lora", "qlora"):
        made.leave("adapter", "a LoRA is trained: the reference is the same model without it", adapter or "none")
    four = bool(given.get("load_in_4bit", adapter == "qlora"))
    if given.get("load_in_8bit"):
        made.put("load_in_8bit", True, "adapter, load_in_8bit")
    elif adapter in ("lora", "qlora") or "load_in_4bit" in given:
        made.put("load_in_4bit", four, "adapter, load_in_4bit")
    if "lora_model_dir" in given:
        made.put("model_name_or_path", given["lora_model_dir"], "lora_model_dir, which names its base")
    if given.get("lora_target_linear"):
        made.put("lora_target_modules", ["all-linear"], "lora_target_linear")
    made.dropout()
    for key in ("bf16", "fp16", "tf32"):
        if given.get(key) == "auto":
            made.leave(key, "chosen by the GPU")
        elif key in given:
            made.put(key, given[key], key)
    checkpointing = given.get("gradient_checkpointing")
    if isinstance(checkpointing, bool):
        made.put("gradient_checkpointing", checkpointing, "gradient_checkpointing")
    elif checkpointing is not None:
        made.put("gradient_checkpointing", True, f"gradient_checkpointing: {checkpointing}")
    if given.get("group_by_length"):
        made.put("train_sampling_strategy", "group_by_length", "group_by_length")


def _part(made: Made, part: Given) -> Given:
    """Returns a part of a mixture for one of Axolotl's datasets."""
    path, data_files, kind = part.get("path"), part.get("data_files"), part.get("type")
    if path in ("json", "csv", "parquet") and data_files:
        path, data_files = data_files, None
        path = path[0] if isinstance(path, list) and len(path) == 1 else path
    columns: Given = {}
    taken = {
        "path",
        "data_files",
        "type",
        "split",
        "name",
        "ds_type",
        "field_messages",
        "field_chosen",
        "field_rejected",
    }
    dataset_format = None
    if isinstance(kind, dict):
        columns = {value: key.removeprefix("field_") for key, value in kind.items() if key.startswith("field_")}
        for key in kind:
            trivial = kind[key] in ("{prompt}", "{chosen}", "{rejected}", "{completion}", "", None)
            if not key.startswith("field_") and not trivial:
                made.leave(f"type.{key}", "the model's chat template renders the rows", kind[key])
    elif kind is not None:
        style, _, rest = str(kind).partition(".")
        name = rest or ("chatml" if style in ("chatml", "llama3") else style)
        if style == "chat_template" and name in ("chat_template", "default"):
            columns = {part.get("field_messages", "messages"): "prompt"}
        elif name in (types := names()["axolotl"]["types"]):
            columns = dict(types[name])
        elif not (style == "chat_template" and name == "argilla"):
            made.leave("type", "not known: the columns are read as they are", kind)
        if style in ("chatml", "llama3"):
            made.leave(
                "type", f"the columns are mapped; the template is the model's own, and not {style} by force", kind
            )
    columns |= {part[key]: key.removeprefix("field_") for key in ("field_chosen", "field_rejected") if key in part}
    properties = part.get("message_property_mappings") or {}
    if (properties.get("role"), properties.get("content")) == ("from", "value"):
        dataset_format, taken = "sharegpt", taken | {"message_property_mappings"}
        columns = {old: "conversations" if new == "prompt" else new for old, new in columns.items()}
    same = {"message_property_mappings": {"role": "role", "content": "content"}}
    if all(theirs == [role] for role, theirs in (part.get("roles") or {}).items()):
        taken = taken | {"roles"}
    for key in part.keys() - taken:
        if part[key] not in (None, same.get(key)):
            made.leave(f"datasets.{key}", "not offered for one dataset", part[key])
    renamed = {old: new for old, new in columns.items() if old != new}
    split = part.get("split")
    return {
        "path": path,
        "name": part.get("name"),
        "data_files": data_files,
        "dataset_format": dataset_format,
        "split": None if split == "train" else split,
        "column_map": renamed,
    }
