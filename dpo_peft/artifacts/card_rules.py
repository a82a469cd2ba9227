"""What the Hub accepts as the metadata of a model card, checked without asking it.

The rules are those of the Hub's card specification (`modelcard.md` of hub-docs, and its lists of licenses and tasks).
The Hub itself checks once more when a card is pushed; these tell an offline run, and say the remedy.
"""

import difflib
import math
import re
from collections.abc import Mapping
from typing import Any

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

# License names that the Hub's metadata takes as they are; any other is `other`, with its name beside it.
HUB_LICENSES = frozenset(
    """afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
    bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
    cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0
    etalab-2.0 eupl-1.1 eupl-1.2 gemma gfdl gpl gpl-2.0 gpl-3.0 intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr
    llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 open-mdw
    openrail openrail++ osl-3.0 other pddl postgresql unknown unlicense wtfpl zlib""".split()
)
RELATIONS = ("adapter", "finetune", "merge", "quantized")
TEXT_TASKS = frozenset(
    """text-generation text-classification token-classification question-answering table-question-answering
    zero-shot-classification translation summarization feature-extraction fill-mask sentence-similarity text-ranking
    image-text-to-text""".split()
)
KNOWN_KEYS = frozenset(
    """language license license_name license_link library_name tags datasets metrics base_model base_model_relation
    pipeline_tag model-index model_name new_version thumbnail widget inference co2_eq_emissions eval_results
    extra_gated_prompt extra_gated_fields extra_gated_heading extra_gated_description extra_gated_button_content
    extra_gated_eu_disallowed quantized_by prompt_template instance_prompt arxiv""".split()
)


def read_head(readme: str) -> dict[str, Any]:
    """The metadata of a card: YAML between the first two `---` lines; empty if there is none.

    Raises:
        ValueError: it is not a YAML mapping.
    """
    found = re.match(r"\A---[ \t]*\r?\n(.*?)^---[ \t]*$", readme, flags=re.DOTALL | re.MULTILINE)
    if found is None:
        return {}
    try:
        head = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        raise ValueError(f"the metadata is not valid YAML: {' '.join(str(error).split())}") from error
    if head is not None and not isinstance(head, dict):
        raise ValueError("the metadata must be `key: value` lines between two lines of ---")
    return head or {}


def problems(readme: str) -> list[str]:
    """What the Hub would refuse in a card, or would not understand; each with the remedy. Empty: nothing."""
    try:
        head = read_head(readme)
    except ValueError as error:
        return [f"{error}."]
    if not head:
        return ["there is no metadata: the card must begin with `key: value` lines between two lines of ---."]
    found = [*_keys(head), *_license(head), *_names(head), *_texts(head)]
    if "model-index" in head:
        found += _model_index(head["model-index"])
    return found


def _keys(head: Mapping[str, Any]) -> list[str]:
    """An unknown key is allowed; one that is nearly a known one was meant to be it."""
    close = {key: difflib.get_close_matches(str(key), KNOWN_KEYS, n=1, cutoff=0.8) for key in head}
    return [
        f"{key!r} is not a key of the Hub's metadata: did you mean {near[0]!r}?"
        for key, near in close.items()
        if key not in KNOWN_KEYS and near
    ]


def _license(head: Mapping[str, Any]) -> list[str]:
    if "license" not in head:
        return []
    given = head["license"] if isinstance(head["license"], list) else [head["license"]]
    unknown = [name for name in given if name not in HUB_LICENSES]
    if unknown:
        return [f"license: {unknown[0]!r} is not one of the Hub's. Use 'other' with its name as license_name."]
    if "other" in given and not isinstance(head.get("license_name"), str):
        return ["license: 'other' needs a license_name."]
    return []


def _names(head: Mapping[str, Any]) -> list[str]:
    """Repositories that are named."""
    found = []
    for key in ("base_model", "datasets"):
        if key not in head:
            continue
        given = head[key] if isinstance(head[key], list) else [head[key]]
        found += [f"{key}: {name!r} is not a name of the Hub. Leave it out." for name in given if not is_repo_id(name)]
        if key == "datasets" and not isinstance(head[key], list):
            found.append("datasets must be a list.")
    relation = head.get("base_model_relation")
    if relation is not None and relation not in RELATIONS:
        found.append(f"base_model_relation: {relation!r} must be one of {', '.join(RELATIONS)}.")
    return found


def is_repo_id(name: Any) -> bool:
    """Whether a name has the form of a repository of the Hub."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _texts(head: Mapping[str, Any]) -> list[str]:
    found = []
    for key in ("library_name", "license_name", "license_link", "thumbnail"):
        if key in head and not (isinstance(head[key], str) and head[key]):
            found.append(f"{key} must be text.")
    task = head.get("pipeline_tag")
    if task is not None and task not in TEXT_TASKS:
        found.append(f"pipeline_tag: {task!r} is not a task of language models on the Hub, such as text-generation.")
    for key in ("tags", "language", "metrics"):
        given = head.get(key, [])
        given = [given] if key != "tags" and isinstance(given, str) else given
        if not isinstance(given, list) or not all(isinstance(item, str) and item for item in given):
            found.append(f"{key} must be a list of texts. (In YAML, write 'no' in quotes.)")
        elif key == "language" and (
            bad := [code for code in given if not re.fullmatch(r"[a-z]{2,3}(-\w+)?|code", code)]
        ):
            found.append(f"language: {bad[0]!r} is not an ISO 639 code, such as en.")
    return found


def _model_index(index: Any) -> list[str]:
    """A list of models; each has a name and results; each result a task, a dataset and metrics."""
    if not isinstance(index, list) or not index:
        return ["model-index must be a list with an entry for the model."]
    found = []
    for model in index:
        if not isinstance(model, Mapping) or not _text(model.get("name")):
            found.append("model-index: an entry needs a name.")
            continue
        results = model.get("results")
        if not isinstance(results, list) or not results:
            found.append(f"model-index: {model['name']} needs a list of results.")
            continue
        for number, result in enumerate(results, 1):
            found += [f"model-index: result {number} {what}." for what in _result(result)]
    return found


def _result(result: Any) -> list[str]:
    if not isinstance(result, Mapping):
        return ["is not a mapping"]
    found = [] if _text(_in(result, "task", "type")) else ["needs task.type"]
    for key in ("type", "name"):
        if not _text(_in(result, "dataset", key)):
            found.append(f"needs dataset.{key}")
    metrics = result.get("metrics")
    if not isinstance(metrics, list) or not metrics:
        return [*found, "needs metrics"]
    for metric in metrics:
        if not _text(_in({"metric": metric}, "metric", "type")):
            found.append("has a metric without type")
        elif not _figure(metric.get("value")):
            found.append(f"has {metric.get('value')!r} as the value of {metric['type']}")
    return found


def _in(mapping: Mapping[str, Any], *keys: str) -> Any:
    value: Any = mapping
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _figure(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return (number and math.isfinite(value)) or _text(value)
