"""Checks the metadata of a model card by the Hub's rules, without asking it.

The rules are those of the Hub's card specification (`modelcard.md` of hub-docs; its lists are in hub_names.yaml).
The Hub itself checks once more when a card is pushed; these tell an offline run, and say the remedy.
"""

import difflib
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import validate_repo_id

from ..model.gguf import gguf_place

_NAMES = yaml.safe_load(Path(__file__).with_name("hub_names.yaml").read_text("utf-8"))
HUB_LICENSES, RELATIONS, TEXT_TASKS, KNOWN_KEYS = (
    frozenset(_NAMES[kind].split()) for kind in ("licenses", "relations", "tasks", "keys")
)
_TEXTS = ("library_name", "license_name", "license_link", "thumbnail")
_LISTS = ("tags", "language", "metrics")
_RESULT = (("task", "type"), ("dataset", "type"), ("dataset", "name"))
# Metric of an evaluation -> its type and name in the Hub's model-index.
MODEL_INDEX = {
    "rewards/accuracies": ("accuracy", "Preference accuracy"),
    "accuracies/length_balanced": ("accuracy", "Preference accuracy, balanced by length"),
    "accuracies/length_only": ("accuracy", "Accuracy of picking the longer completion, for comparison"),
    "rewards/margins": ("reward_margin", "Reward margin, nats"),
    "kl": ("kl_divergence", "KL to the reference, nats per completion"),
    "loss": ("loss", "Loss"),
}


def read_head(readme: str) -> dict[str, Any]:
    """Returns the metadata of a card: YAML between the first two `---` lines; empty if there is none. A ValueError
    where it is not a YAML mapping."""
    found = REGEX_YAML_BLOCK.search(readme)
    if found is None:
        return {}
    try:
        head = yaml.safe_load(found[2])
    except yaml.YAMLError as error:
        raise ValueError(f"the metadata is not valid YAML: {' '.join(str(error).split())}") from error
    if head is not None and not isinstance(head, dict):
        raise ValueError("the metadata must be `key: value` lines between two lines of ---")
    return head or {}


def is_repo_id(name: Any) -> bool:
    """Returns whether a name has the form of a repository of the Hub."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def hub_repo(name: str) -> str | None:
    """Returns the repository of the Hub that a name can only mean, or that holds the GGUF file of the name; None for
    what lies on this disk, which is taken from there."""
    place, file = gguf_place(name)
    return None if os.path.exists(name) or not is_repo_id(place) or (file and "/" not in place) else place


def gguf_arguments(name: str) -> str:
    """Returns, as Python source, by what `from_pretrained` finds a GGUF file; the folder of one here is not told."""
    place, file = gguf_place(name)
    return f"{json.dumps(place if hub_repo(name) else 'FOLDER')}, gguf_file={json.dumps(file['gguf_file'])}"


def problems(readme: str) -> list[str]:
    """Returns what the Hub would refuse in a card, or would not understand; each with the remedy. Empty: nothing."""
    try:
        head = read_head(readme)
    except ValueError as error:
        return [f"{error}."]
    if not head:
        return ["there is no metadata: the card must begin with `key: value` lines between two lines of ---."]
    found = [problem for key, value in head.items() if (problem := _problem(key, value, head))]
    return found + (_model_index(head["model-index"]) if "model-index" in head else [])


def _problem(key: str, value: Any, head: Mapping[str, object]) -> str | None:
    """Returns what is wrong with one value, with the remedy; None if nothing is."""
    values = value if isinstance(value, list) else [value]
    if key not in KNOWN_KEYS:
        # An unknown key is allowed; one that is nearly a known one was meant to be it.
        near = difflib.get_close_matches(str(key), KNOWN_KEYS, n=1, cutoff=0.8)
        return f"{key!r} is not a key of the Hub's metadata: did you mean {near[0]!r}?" if near else None
    if key == "license":
        if unknown := [name for name in values if name not in HUB_LICENSES]:
            return f"license: {unknown[0]!r} is not one of the Hub's. Use 'other' with its name as license_name."
        if "other" in values and not isinstance(head.get("license_name"), str):
            return "license: 'other' needs a license_name."
    if key in ("base_model", "datasets") and (bad := [name for name in values if not is_repo_id(name)]):
        return f"{key}: {bad[0]!r} is not a name of the Hub. Leave it out."
    if key == "datasets" and not isinstance(value, list):
        return "datasets must be a list."
    if key == "base_model_relation" and value not in (None, *RELATIONS):
        return f"base_model_relation: {value!r} must be one of {', '.join(sorted(RELATIONS))}."
    if key == "pipeline_tag" and value not in (None, *TEXT_TASKS):
        return f"pipeline_tag: {value!r} is not a task of language models on the Hub, such as text-generation."
    if key in _TEXTS and not _text(value):
        return f"{key} must be text."
    if key in _LISTS and (not all(map(_text, values)) or (key == "tags" and not isinstance(value, list))):
        return f"{key} must be a list of texts. (In YAML, write 'no' in quotes.)"
    if key == "language" and (bad := [code for code in values if not re.fullmatch(r"[a-z]{2,3}(-\w+)?|code", code)]):
        return f"language: {bad[0]!r} is not an ISO 639 code, such as en."
    return None


def _model_index(index: object) -> list[str]:
    """Checks a list of models; each has a name and results; each result a task, a dataset and metrics."""
    if not isinstance(index, list) or not index:
        return ["model-index must be a list with an entry for the model."]
    found: list[str] = []
    for model in index:
        name, results = _in(model, "name"), _in(model, "results")
        if not _text(name):
            found.append("an entry needs a name")
        elif not isinstance(results, list) or not results:
            found.append(f"{name} needs a list of results")
        else:
            found += [f"result {i} {problem}" for i, result in enumerate(results, 1) for problem in _result(result)]
    return [f"model-index: {problem}." for problem in found]


def _result(result: object) -> list[str]:
    found = [f"needs {part}.{key}" for part, key in _RESULT if not _text(_in(_in(result, part), key))]
    metrics = _in(result, "metrics")
    if not isinstance(metrics, list) or not metrics:
        return [*found, "needs metrics"]
    for metric in metrics:
        kind, value = _in(metric, "type"), _in(metric, "value")
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not _text(kind):
            found.append("has a metric without type")
        elif not number and not _text(value):
            found.append(f"has {value!r} as the value of {kind}")
    return found


def _in(mapping: object, key: str) -> Any:
    return mapping.get(key) if isinstance(mapping, Mapping) else None


def _text(value: object) -> bool:
    return isinstance(value, str) and bool(value)
