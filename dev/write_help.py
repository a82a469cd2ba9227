"""The kept help of all commands, and the JSON schema of a config file, made of the classes of options.

    python dev/write_help.py

writes dpo_peft/cli/help.json and docs/config.schema.json.
"""

import fnmatch
import io
import json
import math
from contextlib import redirect_stdout, suppress
from dataclasses import MISSING, Field
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import transformers

from dpo_peft.cli import COMMANDS, help
from dpo_peft.cli.launch import LaunchArguments
from dpo_peft.cli.train import DataArguments, ModelArguments, OutputArguments
from dpo_peft.config import DPOConfig
from dpo_peft.config_checks import INHERITED, NOT_OFFERED, Rule
from dpo_peft.losses import REGISTRY

SCHEMA = Path(__file__).resolve().parents[1] / "docs" / "config.schema.json"
_PLAIN = {bool: "boolean", int: "integer", float: "number", str: "string", dict: "object", type(None): "null"}


def kept_help() -> dict[str, Any]:
    """Returns what cli/help.json should hold: of every command what comes first, and how much is left out."""
    told = {}
    for command in COMMANDS:
        printed = io.StringIO()
        with redirect_stdout(printed), suppress(SystemExit):
            name = command.replace("-", "_")
            getattr(import_module(f"dpo_peft.cli.{name}"), name)(["--help=json"])
        told[command] = json.loads(printed.getvalue())
        groups = told[command]["groups"]
        if command == "train":
            told[command]["names"] = " ".join(one["option"] for entries in groups.values() for one in entries)
        told[command]["groups"] = {
            title: [{name: one[name] for name in ("name", "help", "first")} for one in first]
            for title, entries in groups.items()
            if (first := [entry for entry in entries if entry["first"]])
        }
        told[command]["left_out"] = sum(not one["first"] for entries in groups.values() for one in entries)
    return told


def own_words() -> dict[str, str]:
    """Returns the texts of `help.yaml` by option, or by pattern of options."""
    said = help.words()
    named = [*said["more"].values(), *said["first"].values()]
    return {name: text for group in named for name, text in group.items() if text}


def schema() -> dict[str, Any]:
    """Returns a JSON schema (2020-12): types, choices, ranges, defaults and help of every option."""
    properties = {
        f.name: _of_field(f, hint)
        for f, hint in help.all_fields([DataArguments, ModelArguments, OutputArguments, LaunchArguments, DPOConfig])
    }
    losses = {"anyOf": [{"enum": [*REGISTRY]}, {"type": "string", "pattern": ":"}]}
    properties["loss_type"]["anyOf"] = [losses, {"type": "array", "items": losses, "minItems": 1}]
    del properties["loss_type"]["type"]
    properties["lora_layers_to_transform"]["type"].append("number")  # as YAML has a share
    texts = own_words()
    for name, made in properties.items():
        made["description"] = next(
            (text for pattern, text in texts.items() if fnmatch.fnmatch(name, pattern)), made["description"]
        )
    for name, (harmless, why) in NOT_OFFERED.items():
        properties[name] = {"enum": [*harmless], "description": why}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$comment": f"with the options of transformers {'.'.join(transformers.__version__.split('.')[:2])}",
        "title": "Options of `dpo-peft train`",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }


def _of_field(f: Field[Any], hint: Any) -> dict[str, Any]:
    rule: Rule = f.metadata.get("rule") or INHERITED.get(f.name, Rule())
    choices = rule.choices or f.metadata.get("choices")
    kinds = [*dict.fromkeys(_kinds(hint))]
    if f.default is None and "null" not in kinds:
        kinds.append("null")
    made: dict[str, Any] = {"type": kinds}
    if choices:
        made = {"enum": [*choices, *[None] * ("null" in kinds)]}
    elif rule.auto:
        # A number may stand as text, as it comes from a shell.
        made = {"anyOf": [{"type": "integer", "minimum": rule.minimum}, {"enum": ["auto", None]}]}
    else:
        bounds = {
            "exclusiveMinimum": rule.above,
            "minimum": rule.minimum,
            "maximum": rule.maximum,
            "exclusiveMaximum": rule.below,
        }
        made |= {name: bound for name, bound in bounds.items() if math.isfinite(bound)}
    if "number" in kinds:  # YAML reads 1e-5 as text, and it is taken as the number
        made = {"anyOf": [made, {"type": "string", "pattern": r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"}]}
    default = f.default_factory() if f.default_factory is not MISSING else f.default
    default = default.value if isinstance(default, Enum) else default
    told = {} if default is None or default is MISSING else {"default": default}
    return {**made, **told, "description": " ".join(str(f.metadata.get("help", "")).split()).replace("%%", "%")}


def _kinds(hint: Any) -> list[str]:
    """Returns what a type is called in JSON; an option of text that can be one of several may be `no` without quotes,
    which YAML reads as false."""
    if isinstance(hint, type) and issubclass(hint, Enum):
        return ["string", "boolean"]
    if get_origin(hint) is Literal:
        return [kind for value in get_args(hint) for kind in _kinds(type(value))]
    if get_origin(hint) is list or hint is list:
        return ["array"]
    if get_origin(hint) is dict:
        return ["object"]
    if hint in _PLAIN:
        return [_PLAIN[hint]]
    return [kind for part in get_args(hint) for kind in _kinds(part)] or ["object"]


if __name__ == "__main__":
    help.KEPT.write_text(json.dumps(kept_help(), indent=1, ensure_ascii=False) + "\n", "utf-8")
    SCHEMA.write_text(json.dumps(schema(), indent=1, ensure_ascii=False) + "\n", "utf-8")
