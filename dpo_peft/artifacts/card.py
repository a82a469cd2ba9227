"""Writes the model card of a trained adapter: plain data in, a README.md out that the Hub accepts.

Knows no trainer. Names of local folders stay out of the metadata, and their paths out of the card altogether: the card
is published, the machine it was written on is not. `card_rules.problems` says whether the Hub would take it.
"""

import json
import math
import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..errors import OptionError
from ..files import write_atomically
from ..model.gguf import is_gguf
from ..reference.adapter_off import ADAPTER_OFF
from ..training.metrics import NOISE_NOTE, within_noise
from ..version import __version__
from .card_rules import HUB_LICENSES, MODEL_INDEX, gguf_arguments, hub_repo, is_repo_id
from .citations import DPO, LORA, bibtex
from .rows_kept import spoken

TEMPLATE = Path(__file__).parent / "model_card.md"
# Of an `Objective`, as a reader should see it.
REWARDS = {"log_ratio": "β·log(π/π_ref)", "logp": "β·log π", "mean_logp": "β·log π per token"}
PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "accelerate")
# What a log entry holds besides figures of the training itself.
BOOKKEEPING = re.compile(
    r"^(epoch|step|total_flos|learning_rate|share_of.*|peak_.*|train_.*|.*(runtime|_second|ion_time))$"
)
TASKS = ("text-generation", "image-text-to-text")  # as the Hub calls them: of text, of images and text
BUNDLED = Path(__file__).parents[1] / "quickstart" / "model"  # the base that the package ships
BUNDLED_TEXT = "the small chat model that comes with `dpo-peft` (`dpo_peft.quickstart.model_path()`)"
LOCAL_TEXT = ", a model in a local folder"
LOCAL_NOTE = (
    "The base is a local folder, which `adapter_config.json` names: the example runs on the machine that has it. "
    "`dpo-peft push --base_model HUB_ID` publishes the adapter for a base that others can load."
)
# LoraConfig's names, and what a reader calls them.
ADAPTER_OPTIONS = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "layers_to_transform": "layers"}
_SPELLED = ("target_modules", "modules_to_save", "target_parameters")
ADAPTER_OPTIONS |= {name: name.replace("_", " ") for name in _SPELLED} | {
    name: name for name in ("use_rslora", "use_dora")
}
SAMPLES, SAMPLE_LENGTH = 3, 700  # shown in a card; characters of each


@dataclass(frozen=True)
class Sample:
    """Holds what the model wrote on a prompt before training and after."""

    prompt: str
    before: str
    after: str


@dataclass(frozen=True)
class RunSummary:
    """Holds what a card says about a run. Only facts of the run: what isn't known stays empty and is left out."""

    # The adapter's: a Hub id, or the name or path of its folder (shown by its last part, or seen from the current
    # folder where the base's path is relative to that too).
    name: str
    base_model: str  # Hub id or local path; a local base is called by its folder's name
    beta: float | None  # β of the loss; None if it has none
    dtype: str | None = None  # of the base's weights that are not quantized, for the example; None: as it was saved
    reward: str = "log_ratio"  # the implicit reward whose figures are shown: a key of `REWARDS`
    objective: str = "Direct Preference Optimization (DPO)"  # as a reader should see it
    datasets: Sequence[str] = ()  # Hub ids or paths of the training data; paths are called by their last part
    eval_dataset: str = "preference pairs"  # the same for what was evaluated on
    license: str | None = None  # of the adapter, as an SPDX id or a name of the Hub
    papers: Sequence[str] = (DPO, LORA)  # arXiv ids of what is cited, see `citations.cited`
    languages: Sequence[str] = ()  # ISO 639 codes
    quantization: Mapping[str, object] = field(default_factory=dict)  # arguments of `BitsAndBytesConfig`, if it was
    quantization_report: str = ""  # what was quantized and what was not, in one line
    reference: str = ADAPTER_OFF  # what the policy was compared with, in one sentence
    lora: Mapping[str, object] = field(default_factory=dict)  # options of the adapter (rank, alpha, …)
    hyperparameters: Mapping[str, object] = field(default_factory=dict)  # options of the training
    facts: Mapping[str, object] = field(default_factory=dict)  # further lines of the head: rows, time, device, …
    first: Mapping[str, float] = field(default_factory=dict)  # training metrics of the first log entry
    last: Mapping[str, float] = field(default_factory=dict)  # of the last one
    eval_first: Mapping[str, float] = field(default_factory=dict)  # metrics of the first evaluation, without `eval_`
    eval_last: Mapping[str, float] = field(default_factory=dict)
    curves: str | None = None  # file name of the curves' picture, relative to the card
    samples: Sequence[Sample] = ()  # what it wrote before and after; `SAMPLES` of them are shown
    sample_steps: tuple[int, int] = (0, 0)
    warnings: Sequence[Mapping[str, object]] = ()  # named warnings of the training: step, name and message of each
    versions: Mapping[str, str] = field(default_factory=lambda: framework_versions())  # by package
    has_chat_template: bool = True  # the tokenizer has one, so the example of use chats
    reads_images: bool = False  # it was trained with a processor of images, so the example shows one
    title: str = ""  # of the card; the last part of `name` if empty
    tags: Sequence[str] = ()  # of the metadata, beside the card's own


def adapter_facts(config: Mapping[str, object]) -> dict[str, object]:
    """Returns the options of a `LoraConfig` (its fields) as a reader should see them; what is off is left out."""
    facts = {shown: config.get(name) for name, shown in ADAPTER_OPTIONS.items()}
    facts = {name: sorted(value) if isinstance(value, list | set) else value for name, value in facts.items()}
    facts = {name: value for name, value in facts.items() if value not in (None, False) or name == "dropout"}
    if tokens := config.get("alora_invocation_tokens"):
        facts["acts on"] = f"completions alone, from the tokens {tokens} on: prompts are the base's (aLoRA)"
    return facts


def framework_versions() -> dict[str, str]:
    """Returns this version, and the installed one of each package; one that is not installed is left out."""
    return {"dpo-peft": __version__} | {package: version(package) for package in PACKAGES if find_spec(package)}


def figures_of(log_history: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Returns `first`, `last`, `eval_first` and `eval_last` of a `RunSummary`, from `trainer.state.log_history`.

    Several evaluation sets are logged one by one: the first (last) value of each metric counts. `eval_` is taken off.
    """
    train = [entry for entry in log_history if "loss" in entry]
    figures: dict[str, dict[str, float]] = {"first": {}, "last": {}, "eval_first": {}, "eval_last": {}}
    if train:
        figures["first"], figures["last"] = dict(train[0]), dict(train[-1])
    for entry in log_history:
        for key, value in entry.items():
            if key.startswith("eval_"):
                figures["eval_first"].setdefault(key.removeprefix("eval_"), value)
                figures["eval_last"][key.removeprefix("eval_")] = value
    return figures


def model_card(run: RunSummary) -> ModelCard:
    """Returns the card of a run. `str(card)` is the README, `card.data` its metadata, `card.save(path)` writes it.

    Raises:
        OptionError: name or base model is empty, or a figure is not a number.
    """
    for option in ("name", "base_model"):
        if not getattr(run, option):
            raise OptionError(f"RunSummary.{option} is empty. A card names the adapter and its base model.")
    columns, figures = figure_table(run)
    shown = run.samples[:SAMPLES]
    tables = [("Adapter", run.lora), ("Hyper-parameters", run.hyperparameters), ("Framework versions", run.versions)]
    return ModelCard.from_template(
        metadata(run),
        template_path=str(TEMPLATE),
        title=cell(title_of(run)),
        base=base_text(run.base_model),
        gguf=gguf_arguments(run.base_model) if is_gguf(run.base_model) else "",
        base_note="" if is_hub_id(run.base_model) else LOCAL_NOTE,
        objective=run.objective,
        data=", ".join(link(dataset, "datasets/") for dataset in run.datasets),
        reference=cell(run.reference),
        quantization=quantization_text(run),
        facts=[(cell(name), cell(value)) for name, value in run.facts.items()],
        adapter=_adapter_line(run),
        loading=[(name, python(value)) for name, value in run.quantization.items()],
        dtype=python(run.dtype) if run.dtype else "",
        has_chat_template=run.has_chat_template,
        reads_images=run.reads_images,
        beta="1" if run.beta is None else cell(run.beta),
        reward=REWARDS[run.reward],
        is_reward_model=run.reward == "log_ratio",
        columns=columns,
        figures=figures,
        noise=NOISE_NOTE.capitalize() if any(within_noise_of(run, key) for key in run.eval_last or run.last) else "",
        curves=run.curves,
        samples=[[quoted(text) for text in (spoken(s.prompt), s.before, s.after)] for s in shown],
        sample_steps=run.sample_steps,
        warnings=[{key: cell(w.get(key, "")) for key in ("step", "name", "message")} for w in run.warnings],
        bibtex=bibtex(run.papers),
        tables=[(heading, [(cell(k), cell(v)) for k, v in rows.items()]) for heading, rows in tables if rows],
    )


def _adapter_line(run: RunSummary) -> str:
    """Returns the example's line that says where the adapter is, see `for_repository`: a Hub id; else this folder, or
    its place seen from where the base's relative path leads to the base."""
    if is_hub_id(run.name):
        return f"adapter = {json.dumps(run.name)}"
    name = json.dumps(shown_name(run.name))
    below = os.path.relpath(run.name)
    if os.path.isdir(run.base_model) and not os.path.isabs(run.base_model) and not below.startswith(".."):
        return f"adapter = {json.dumps(Path(below).as_posix())}  # seen from where the base's folder lies"
    return f'adapter = "."  # this folder, {name}: run it here, or give its path'


def save_model_card(run: RunSummary, folder: str | Path) -> Path:
    """Writes the card as `README.md` into the folder and returns its path."""
    return write_atomically(Path(folder) / "README.md", str(model_card(run)))


def title_of(run: RunSummary) -> str:
    """Returns what the card calls the adapter."""
    return run.title or shown_name(run.name).split("/")[-1]


def metadata(run: RunSummary) -> ModelCardData:
    """Returns the YAML head. What the Hub would refuse (a path as base model, an unknown license) doesn't get in."""
    base = hub_repo(run.base_model)
    license, results = license_fields(run.license or ""), eval_results(run)
    quantized = ["qlora", "bitsandbytes", "4-bit"] if run.quantization.get("load_in_4bit") else []
    return ModelCardData(
        library_name="peft",
        pipeline_tag=TASKS[run.reads_images],
        tags=list(dict.fromkeys(["dpo-peft", "dpo", "preference-optimization", "lora", *quantized, *run.tags])),
        model_name=title_of(run) if results else None,
        eval_results=results or None,
        base_model=base,
        base_model_relation="adapter" if base else None,
        datasets=[dataset for dataset in run.datasets if is_hub_id(dataset)] or None,
        language=list(run.languages) or None,
        license=license.get("license"),
        license_name=license.get("license_name"),
    )


def license_fields(license: str) -> dict[str, str]:
    """Returns the metadata of a license: one that the Hub doesn't know is `other`, with its name beside it."""
    license = license.lower()
    if not license:
        return {}
    if license in HUB_LICENSES:
        return {"license": license, **({"license_name": "unnamed"} if license == "other" else {})}
    return {"license": "other", "license_name": re.sub(r"[^a-z0-9.]+", "-", license).strip("-")}


def eval_results(run: RunSummary) -> list[EvalResult]:
    """Returns the figures of the last evaluation as the Hub's model-index; nothing where there was none."""
    results, noise = [], f" ({NOISE_NOTE})"
    for key, value in run.eval_last.items():
        # Of several evaluation sets, each figure's name begins with the set's.
        metric = next((m for m in MODEL_INDEX if key == m or key.endswith(f"_{m}")), None)
        if metric is None or not math.isfinite(value):
            continue
        part = key.removesuffix(metric).rstrip("_")
        results.append(
            EvalResult(
                task_type=TASKS[run.reads_images],
                dataset_type=run.eval_dataset if is_hub_id(run.eval_dataset) else "preference",
                dataset_name=part or shown_name(run.eval_dataset),
                metric_type=MODEL_INDEX[metric][0],
                metric_name=MODEL_INDEX[metric][1] + (noise if within_noise_of(run, key) else ""),
                metric_value=float(value),
            )
        )
    order = [name for _, name in MODEL_INDEX.values()]
    place = {name + of: order.index(name) for name in order for of in ("", noise)}
    return sorted(results, key=lambda result: (result.dataset_name, place[str(result.metric_name)]))


def figure_table(run: RunSummary) -> tuple[list[str], list[list[str]]]:
    """Returns (column heads, rows of cells) of the metrics in the order of the log; empty columns are left out."""
    columns = {
        "first step": run.first,
        "last step": run.last,
        "evaluation, first": run.eval_first if dict(run.eval_first) != dict(run.eval_last) else {},
        "evaluation, last": run.eval_last,
    }
    columns = {head: figures for head, figures in columns.items() if figures}
    keys = [key for key in dict.fromkeys(k for f in columns.values() for k in f) if not BOOKKEEPING.match(key)]
    for head, figures in columns.items():
        for key in keys:
            if key in figures and (isinstance(figures[key], bool) or not isinstance(figures[key], int | float)):
                raise OptionError(f"The figure {key!r} ({head}) is {figures[key]!r}; a number is needed. Convert it.")
    rows = [[f"`{key}`", *(cell(f[key]) if key in f else "" for f in columns.values())] for key in keys]
    return list(columns), rows


def within_noise_of(run: RunSummary, key: str) -> bool:
    """Returns whether a metric of the last evaluation, or log, is an accuracy of margins that are within noise."""
    figures, part = run.eval_last or run.last, key.removesuffix("rewards/accuracies")
    margin, kl = (figures.get(f"{part}{name}") for name in ("rewards/margins", "kl"))
    return part != key and within_noise(margin, run.beta, kl, run.reward)


def quantization_text(run: RunSummary) -> str:
    if not run.quantization:
        return run.quantization_report or "not quantized."
    options = ", ".join(f"`{name}={value}`" for name, value in run.quantization.items())
    return ". ".join(part for part in (f"bitsandbytes, {options}", run.quantization_report.rstrip(".")) if part) + "."


def python(value: object) -> str:
    """Returns a plain value as Python source, text in double quotes."""
    return json.dumps(value) if isinstance(value, str) else repr(value)


def is_hub_id(name: str) -> bool:
    """Returns whether the name can only mean what is on the Hub, see `hub_repo`."""
    return hub_repo(name) is not None


def shown_name(name: str) -> str:
    """Returns a Hub id as it is; of anything else the last part of the path."""
    return name if is_hub_id(name) else re.split(r"[/\\]", name.rstrip("/\\"))[-1] or name


def link(name: str, kind: str = "") -> str:
    """Returns a Markdown link for a Hub id (`kind`: "" or "datasets/"), the plain name for the rest."""
    shown = shown_name(name)
    return f"[{shown}](https://huggingface.co/{kind}{hub_repo(name)})" if is_hub_id(name) else code(shown)


def code(text: str) -> str:
    """Returns text as a code span that nothing in it can end."""
    text, marks = " ".join(text.split()), "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{marks} {text} {marks}" if "`" in text else f"`{text}`"


def base_text(name: str) -> str:
    """Returns the base as the card's first sentence calls it."""
    if is_hub_id(name):
        return link(name)
    return BUNDLED_TEXT if Path(name).resolve() == BUNDLED.resolve() else link(name) + LOCAL_TEXT


def for_repository(text: str, name: str, repo_id: str, base: str, old_base: str) -> str:
    """Returns a card's text as it reads in a repository of the Hub, where its example loads the adapter from.

    Args:
        text: a card without its metadata. What was written into it by hand is kept.
        name: the adapter's in the title, where the example names none. A title that is not the adapter's name stays.
        repo_id, base: Hub ids of adapter and base.
        old_base: what the adapter called its base.
    """
    loaded = re.search(r'^adapter = "(.*?)"(?:  # this folder, "(.*)":)?.*$', text, flags=re.M)
    if loaded:
        name = loaded[2] or loaded[1].split("/")[-1]
        text = text.replace(loaded[0], f"adapter = {json.dumps(repo_id)}", 1)
    text = text.replace(BUNDLED_TEXT, link(base)).replace(f"{LOCAL_NOTE}\n\n", "")
    text = re.sub(rf"`[^`]+`{re.escape(LOCAL_TEXT)}", lambda _: link(base), text)
    text = text.replace(link(old_base), link(base)) if is_repo_id(old_base) else text
    text = re.sub(r'\(".*?", gguf_file=".*?"', lambda _: f"({gguf_arguments(base)}", text)
    return re.sub(rf"^# {re.escape(name)}$", f"# {repo_id.split('/')[-1]}", text, count=1, flags=re.M)


def quoted(text: str) -> str:
    """Returns text in a code block that nothing in it can end, wrapped, a long one cut; the cut is said."""
    left = len(text) - SAMPLE_LENGTH
    text = text if left <= 0 else f"{text[:SAMPLE_LENGTH]} [... {left} more characters]"
    lines = [part for line in text.splitlines() for part in textwrap.wrap(line, 100) or [""]]
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return "\n".join([f"{fence}text", *lines, fence])


def cell(value: object) -> str:
    """Returns a value in a Markdown table: floats to 4 digits, of paths the last part, all in one line, and no HTML or
    link of its own."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value, key=str) if isinstance(value, set | frozenset) else value
        return ", ".join(cell(item) for item in items)
    if isinstance(value, os.PathLike) or (isinstance(value, str) and os.path.isabs(value)):
        value = shown_name(os.fspath(value))
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;").replace("](", "]\\(")
