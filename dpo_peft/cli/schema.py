"""The JSON schema of a config file of `dpo-peft train`, made of the classes of options, for editors.

`python -m dpo_peft.cli.schema` writes it, and the help of the commands, anew.
"""

import fnmatch
import json
import math
from dataclasses import MISSING, Field
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import transformers

from ..config import DPOConfig
from ..config_checks import INHERITED, NOT_OFFERED, Rule
from ..losses import REGISTRY
from . import help
from .help import all_fields, own_words
from .train import DataArguments, ModelArguments, OutputArguments

SCHEMA = Path(__file__).parents[2] / "docs" / "config.schema.json"  # in a checkout
_PLAIN = {bool: "boolean", int: "integer", float: "number", str: "string", dict: "object", type(None): "null"}


def schema() -> dict[str, Any]:
    """Returns a JSON schema (2020-12): types, choices, ranges, defaults and help of every option."""
    properties = {
        f.name: _of_field(f, hint)
        for f, hint in all_fields([DataArguments, ModelArguments, OutputArguments, DPOConfig])
    }
    losses = {"anyOf": [{"enum": [*REGISTRY]}, {"type": "string", "pattern": ":"}]}
    properties["loss_type"]["anyOf"] = [losses, {"type": "array", "items": losses, "minItems": 1}]
    del properties["loss_type"]["type"]
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
    help.KEPT.write_text(json.dumps(help.made(), indent=1, ensure_ascii=False) + "\n", "utf-8")
    SCHEMA.write_text(json.dumps(schema(), indent=1, ensure_ascii=False) + "\n", "utf-8")
