"""The files that a run leaves beside its adapter: metrics.json, recipe.yaml, curves.png and the model card.

All of them are made to be published: local paths are shown by their last part, and no token is in them.
"""

import json
import math
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from ..config import OBJECTIVE_OPTIONS
from ..data import DataReport
from ..files import strict
from ..losses import find_objective
from ..losses.registry import shown_name
from ..model.adapter_source import TrainedWith
from ..model.loading import StorageReport, storage_report
from .card import BUNDLED, Figures, RunSummary, Sample, figures_of, framework_versions, save_model_card
from .citations import cited
from .curves import plot_training_curves
from .recipe import changed_options, lora_options, plain, public, write_recipe

_SHOWN_OPTIONS = (
    "learning_rate",
    "lr_scheduler_type",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "truncation_mode",
    "seed",
)


@dataclass
class SavedRun:
    """What a trainer knows of its run when it saves.

    Attributes:
        model: the trained model.
        args: the `DPOConfig`.
        trained: how the adapter was trained.
        reference: what the policy was compared with, in one sentence.
        log_history: `trainer.state.log_history`.
        data_reports: dataset name to what became of its rows.
        data_sources: dataset name to Hub ids or files and their licence, see `recipe.data_source`.
        command_options: options of `dpo-peft train` that are no part of `args`; empty for a run from Python.
        model_name: Hub id or folder that the trainer was given; empty for a model that was given itself.
        continued: that was an adapter, which went on training.
        has_chat_template: the tokenizer has one.
        warnings: named warnings that were raised: step, name and message of each.
        card: what only a person can say of the card: licence, languages, datasets.
    """

    model: PeftModel
    args: Any
    trained: TrainedWith
    reference: str
    log_history: Sequence[Mapping[str, Any]]
    data_reports: Mapping[str, DataReport]
    data_sources: Mapping[str, tuple[list[str], str | None]] = field(default_factory=dict)
    command_options: Mapping[str, Any] = field(default_factory=dict)
    model_name: str = ""
    continued: bool = False
    has_chat_template: bool = True
    warnings: Sequence[Mapping[str, Any]] = ()
    card: Mapping[str, Any] = field(default_factory=dict)

    @property
    def lora(self) -> Any:
        """The trained adapter's config."""
        return self.model.peft_config[self.model.active_adapters[0]]

    @property
    def base_model(self) -> str:
        """Hub id or folder of the base."""
        return self.lora.base_model_name_or_path or self.model.config.model_type

    @cached_property
    def storage(self) -> StorageReport:
        """Where the model's bytes are."""
        return storage_report(self.model)

    @property
    def curved(self) -> bool:
        """There are steps to be drawn."""
        return any("loss" in entry for entry in self.log_history)


def save_results(folder: str | Path, run: SavedRun) -> None:
    """Write `metrics.json` (figures, full log, data counts, what was run where), `recipe.yaml`, `curves.png` and
    `README.md` into `folder`, the adapter's."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    figures = figures_of(run.log_history)
    facts = _facts(run)
    metrics = {**figures, **facts, "log_history": list(run.log_history)}
    (folder / "metrics.json").write_text(json.dumps(strict(metrics), indent=2, default=str) + "\n")
    _save_recipe(folder / "recipe.yaml", run)
    if run.curved:
        plot_training_curves(run.log_history, folder / "curves.png", start_loss=_start_loss(run.args.loss_type))
    save_model_card(_summary(folder, run, figures, facts), folder)


def _facts(run: SavedRun) -> dict[str, Any]:
    facts = {
        "options": changed_options(run.args),
        "objective": _named_objective(run.args),
        "beta": run.args.beta,
        "reward": run.trained.reward,
        "reference": run.reference,
        "base_model": _shown_base(run.base_model),
        "adapter": _adapter(run.lora),
        "quantization": run.trained.quantization,
        "environment": environment(run.args.device),
        "seconds": next((e["train_runtime"] for e in reversed(run.log_history) if "train_runtime" in e), None),
        "data": {name: asdict(report) for name, report in run.data_reports.items()},
        "storage_bytes": asdict(run.storage),
        "versions": framework_versions(),
    }
    return {**facts, **({"warnings": plain(list(run.warnings))} if run.warnings else {})}


def environment(device: torch.device) -> dict[str, Any]:
    """Where a run took place: Python, platform, device and package versions."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"device": properties.name, "gpu_memory_gib": round(properties.total_memory / 2**30, 1)}
    else:
        threads = torch.get_num_threads()
        found["device"] = f"{device.type}, {threads} thread{'s' * (threads > 1)}"
    return {**found, "versions": framework_versions()}


def _shown_base(name: str) -> str:
    bundled = Path(name).is_dir() and Path(name).resolve() == BUNDLED.resolve()
    return "dpo_peft.quickstart" if bundled else public(name, is_path=True)


def _adapter(lora: Any) -> dict[str, Any]:
    facts = {
        "rank": lora.r,
        "alpha": lora.lora_alpha,
        "dropout": lora.lora_dropout,
        "target modules": plain(lora.target_modules),
        "modules to save": plain(lora.modules_to_save),
        "use_rslora": lora.use_rslora,
        "use_dora": lora.use_dora,
    }
    return {name: value for name, value in facts.items() if value not in (None, False) or name == "dropout"}


def _save_recipe(path: Path, run: SavedRun) -> None:
    """From the command line its own options; from Python what the run shows of them."""
    notes = []
    if run.command_options:
        source = dict(run.command_options)
    else:
        source = {"model_name_or_path": run.model_name or run.base_model, "dtype": run.trained.dtype}
        source |= {} if run.continued else lora_options(run.lora)
        if not run.model_name:
            notes.append("model_name_or_path: the model was given in Python; this is its base.")
        for option, name in (("dataset_name", "train"), ("eval_dataset_name", "eval")):
            names = run.data_sources.get(name, ([], None))[0]
            if len(names) == 1:
                source[option] = names[0]
            elif name in run.data_reports:
                notes.append(f"{option}: not known, the rows were given in Python. Put in your own.")
        if not run.trained.quantization and run.args.quantize_base is None:
            source["quantize_base"] = False
        if run.lora.init_lora_weights is not True and not run.continued:
            notes.append(f"init_lora_weights was {run.lora.init_lora_weights!r}: not an option of the command line.")
    write_recipe(path, changed_options(run.args), source, notes)


def _summary(folder: Path, run: SavedRun, figures: Figures, facts: Mapping[str, Any]) -> RunSummary:
    options = {name: plain(getattr(run.args, name)) for name in (*_SHOWN_OPTIONS, *OBJECTIVE_OPTIONS)}
    shown = {name: options[name] for name in _SHOWN_OPTIONS if options[name] is not None}
    shown |= {name: options[name] for name, default in OBJECTIVE_OPTIONS.items() if options[name] != default}
    lora = run.lora
    steps, samples = read_samples(folder / "samples.jsonl")
    papers = [find_objective(name).paper for name in run.args.loss_type]
    options |= {"sync_ref_model": run.args.sync_ref_model}
    datasets, evaluated, licence = _datasets(run)
    seconds = _facts_of_time(facts)
    rows = {
        f"Rows ({name})": f"{report.kept_rows} of {report.source_rows}" for name, report in run.data_reports.items()
    }
    return RunSummary(
        name=str(run.args.hub_model_id or folder.resolve().name),
        base_model=run.base_model,
        beta=run.args.beta,
        dtype=run.trained.dtype,
        reward=run.trained.reward,
        objective=facts["objective"],
        datasets=run.card.get("datasets") or datasets,
        eval_dataset=evaluated,
        licence=run.card.get("licence"),
        languages=run.card.get("languages") or (),
        papers=cited(
            papers,
            options,
            run.trained.reward == "log_ratio",
            bool(run.trained.quantization),
            lora.use_rslora,
            lora.use_dora,
        ),
        reference=run.reference,
        quantization=run.trained.quantization,
        quantization_report=str(run.storage),
        lora=facts["adapter"],
        hyperparameters=shown,
        facts={**rows, **({"Licence of the data": licence} if licence else {}), **seconds},
        curves="curves.png" if run.curved else None,
        samples=samples,
        sample_steps=steps,
        warnings=run.warnings,
        has_chat_template=run.has_chat_template,
        **figures,
    )


def _datasets(run: SavedRun) -> tuple[list[str], str, str | None]:
    """Names of the training data, name of what was evaluated on, and the data's licence."""
    (trained, licence), (evaluated, _) = (run.data_sources.get(name, ([], None)) for name in ("train", "eval"))
    trained = [run.command_options["dataset_name"]] if "dataset_name" in run.command_options else trained
    if trained and "eval" in run.data_reports and run.command_options:
        evaluated = [run.command_options.get("eval_dataset_name", trained[0])]
    return trained, evaluated[0] if len(evaluated) == 1 else "held-out preference pairs", licence


def _facts_of_time(facts: Mapping[str, Any]) -> dict[str, str]:
    seconds, where = facts["seconds"], facts["environment"]
    memory = f" ({where['gpu_memory_gib']} GiB)" if "gpu_memory_gib" in where else ""
    return {} if seconds is None else {"Training": f"{seconds:.0f} s on {where['device']}{memory}"}


def read_samples(path: Path) -> tuple[tuple[int, int], list[Sample]]:
    """The first and the last step of a samples.jsonl, and what was written at both; nothing where there is none."""
    if not path.is_file():
        return (0, 0), []
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
    steps = sorted({row["step"] for row in rows})
    if len(steps) < 2:
        return (0, 0), []
    written = {(row["step"], row["prompt_number"]): row for row in rows}  # of a repeated step the newest
    first, last = steps[0], steps[-1]
    numbers = [number for step, number in sorted(written) if step == first and (last, number) in written]
    samples = [
        Sample(written[first, n]["prompt"], written[first, n]["completion"], written[last, n]["completion"])
        for n in numbers
    ]
    return (first, last), samples


def _start_loss(loss_type: list[str]) -> float | None:
    """The loss before training, when the policy is its reference: of DPO as such it is known."""
    return math.log(2) if loss_type in (["sigmoid"], ["trajectory"]) else None


def _named_objective(args: Any) -> str:
    """Names, weights and sources of the losses. What the lecture note calls them helps no reader of a card."""
    weights = args.loss_weights or [1.0] * len(args.loss_type)
    parts = []
    for name, weight in zip(args.loss_type, weights, strict=True):
        share = f"{weight:g} × " if len(weights) > 1 else ""
        source = re.sub(r" *\((its )?note [^)]*\)", "", find_objective(name).source)
        parts.append(f"{share}`{shown_name(name)}`" + (f" ({source})" if source else ""))
    return " + ".join(parts)
