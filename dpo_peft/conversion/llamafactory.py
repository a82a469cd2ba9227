"""What of LLaMA-Factory's options is more than another name, and its dataset_info.json."""

import json
from pathlib import Path
from typing import Any

from ..errors import OptionError
from .made import Given, Made

LOSSES = ("sigmoid", "hinge", "ipo", "orpo", "simpo")


def read_llamafactory(made: Made, folder: Path) -> None:
    """Adds our options for what of a config is more than another name; `folder` is where the config lies.

    Raises:
        OptionError: another training, a loss that isn't offered, or a dataset_info.json that can't be read.
    """
    given = made.given
    stage, loss = given.get("stage", "sft"), given.get("pref_loss", "sigmoid")
    if stage not in ("dpo", "kto"):
        raise OptionError(f"stage={stage!r} is no training from preferences: dpo and kto are.")
    if stage == "dpo" and loss not in LOSSES:
        raise OptionError(f"pref_loss={loss!r} is not offered: give one of {', '.join(LOSSES)}, or stage: kto.")
    made.put("loss_type", loss if stage == "dpo" else "kto", "stage, pref_loss" if stage == "dpo" else "stage")
    if stage == "kto" and "pref_loss" in given:
        made.leave("pref_loss", "no effect with stage: kto")
    if loss == "ipo":
        made.put("ipo_length_normalize", True, "LLaMA-Factory's IPO is a mean over tokens")
    if stage == "dpo" and loss == "simpo" and made.value("simpo_gamma") is None:
        made.put("simpo_gamma", 0.5, "LLaMA-Factory's default")
    if weight := given.get("pref_ftx"):
        made.put("loss_type", [made.value("loss_type"), "sft"], "stage, pref_loss, pref_ftx")
        made.put("loss_weights", [1.0, float(weight)], "pref_ftx")
    kind = given.get("finetuning_type", "lora")
    if kind != "lora":
        made.leave("finetuning_type", "a LoRA is trained: the reference is the same model without it", kind)
    bits = given.get("quantization_bit")
    made.put("load_in_8bit" if bits == 8 else "load_in_4bit", bits in (4, 8), "quantization_bit")
    if bits == 4:
        made.put("bnb_4bit_quant_type", given.get("quantization_type", "nf4"), "quantization_type")
        made.put("use_bnb_nested_quant", given.get("double_quantization", True), "double_quantization")
    if made.value("lora_alpha") is None:
        made.put("lora_alpha", 2 * made.value("lora_r"), "LLaMA-Factory's default")
    made.dropout()
    target = _words(given.get("lora_target", "all"))
    made.put("lora_target_modules", ["all-linear"] if target == ["all"] else target, "lora_target")
    if more := _words(given.get("additional_target")):
        made.put("lora_modules_to_save", more, "additional_target")
    if "adapter_name_or_path" in given:
        made.put("model_name_or_path", given["adapter_name_or_path"], "adapter_name_or_path, which names its base")
    made.put(
        "gradient_checkpointing", not given.get("disable_gradient_checkpointing"), "disable_gradient_checkpointing"
    )
    made.optimizer("optim")
    info = _dataset_info(given.get("dataset_dir", "data"), folder)
    made.datasets([_part(made, name, info) for name in _words(given.get("dataset"))], "dataset, dataset_dir")
    if tests := _words(given.get("eval_dataset")):
        made.put("eval_dataset_name", [_part(made, name, info)["path"] for name in tests], "eval_dataset")
    made.evaluation(given.get("val_size"), "val_size")


def _words(given: Any) -> list[str]:
    return [str(one).strip() for one in (given if isinstance(given, list) else str(given or "").split(",")) if one]


def _dataset_info(where: Any, folder: Path) -> tuple[Path, Given]:
    """Returns the folder that holds dataset_info.json, and what it says; nothing if it isn't found."""
    for place in (Path(where), folder / where, folder):
        try:
            return place, json.loads((place / "dataset_info.json").read_text("utf-8"))
        except OSError:
            continue
        except ValueError as error:
            raise OptionError(f"{place / 'dataset_info.json'} is not JSON: {error}") from error
    return Path(where), {}


def _part(made: Made, name: str, info: tuple[Path, Given]) -> Given:
    """Returns a part of a mixture for one of LLaMA-Factory's datasets."""
    place, known = info
    entry = known.get(name)
    if entry is None:
        made.leave(
            "dataset", f"{name!r} is not in a dataset_info.json of {place}: it is taken as a name or a file", name
        )
        return {"path": name}
    path = entry.get("hf_hub_url") or str(place / entry.get("file_name", name))
    columns, tags = entry.get("columns", {}), entry.get("tags", {})
    pairs = {columns.get(key, key): key for key in ("chosen", "rejected", "system", "tools") if key in columns}
    if label := columns.get("kto_tag"):
        pairs[label] = "label"
    dataset_format = None
    if entry.get("formatting", "alpaca") == "alpaca":
        prompt, query = columns.get("prompt", "instruction"), columns.get("query", "input")
        if label:
            pairs |= {prompt: "prompt", columns.get("response", "output"): "completion"}
            if "query" in columns:
                made.leave("dataset", f"{name}: the column {query!r} is not joined to the prompt", query)
        else:
            pairs |= {prompt: "instruction", query: "input"} if "query" in columns else {prompt: "instruction"}
            dataset_format = "alpaca"
            if "history" in columns:
                pairs[columns["history"]] = "history"
    else:
        messages = columns.get("messages", "conversations")
        plain = entry["formatting"] == "openai" or (tags.get("role_tag"), tags.get("content_tag")) == (
            "role",
            "content",
        )
        pairs[messages] = ("messages" if label else "prompt") if plain else "conversations"
        dataset_format = None if plain else "sharegpt"
        odd = {
            key: value
            for key, value in tags.items()
            if key not in ("role_tag", "content_tag") and value not in ("user", "assistant", "system", "human", "gpt")
        }
        if odd:
            made.leave("tags", f"{name}: roles of these names are not translated", odd)
    for key in entry.keys() & {"num_samples", "script_url", "cloud_file_name", "ms_hub_url", "om_hub_url"}:
        if not (key.endswith("hub_url") and "hf_hub_url" in entry):
            made.leave(f"{name}.{key}", "not offered: give the rows as a file or a Hub id", entry[key])
    for key in columns.keys() & {"images", "videos", "audios"}:
        made.leave(f"{name}.{key}", "only texts are trained", columns[key])
    split = entry.get("split")
    return {
        "path": path,
        "name": entry.get("subset"),
        "data_dir": entry.get("folder"),
        "dataset_format": dataset_format,
        "split": None if split == "train" else split,
        "column_map": {old: new for old, new in pairs.items() if old != new},
    }
