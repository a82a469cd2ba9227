"""The files that a run leaves beside its adapter: metrics.json, curves.png and the model card."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft import PeftModel

from .card import Figures, RunSummary, figures_of, framework_versions, save_model_card
from .data import DataReport
from .losses import REGISTRY
from .modeling import storage_report
from .objective_options import OBJECTIVE_OPTIONS
from .plots import plot_training_curves
from .trained import quantization_options

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


def save_results(
    folder: str | Path,
    model: PeftModel,
    options: Mapping[str, Any],
    log_history: Sequence[Mapping[str, Any]],
    data_reports: Mapping[str, DataReport],
    has_chat_template: bool,
    reference: str,
) -> None:
    """Write `metrics.json` (figures, full log, data counts), `curves.png` and `README.md` into `folder`.

    Args:
        folder: the adapter's folder.
        model: the trained model; its storage is reported.
        options: the run's options, as `DPOConfig.to_dict()` gives them.
        log_history: `trainer.state.log_history`.
        data_reports: dataset name to what became of its rows.
        has_chat_template: whether the tokenizer has one.
        reference: what the policy was compared with, in one sentence.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    figures = figures_of(log_history)
    contents = {
        **figures,
        "data": {name: asdict(report) for name, report in data_reports.items()},
        "storage_bytes": asdict(storage_report(model)),
        "versions": framework_versions(),
        "log_history": list(log_history),
    }
    (folder / "metrics.json").write_text(json.dumps(_strict(contents), indent=2) + "\n")
    trained = any("loss" in entry for entry in log_history)
    if trained:
        plot_training_curves(log_history, folder / "curves.png", start_loss=_start_loss(options))
    summary = _summary(folder, model, options, figures, data_reports, has_chat_template, trained, reference)
    save_model_card(summary, folder)


def _summary(
    folder: Path,
    model: PeftModel,
    options: Mapping[str, Any],
    figures: Figures,
    data_reports: Mapping[str, DataReport],
    has_chat_template: bool,
    trained: bool,
    reference: str,
) -> RunSummary:
    lora = model.peft_config[model.active_adapters[0]]
    objectives = [REGISTRY[name] for name in options["loss_type"]]
    shown = {name: options[name] for name in _SHOWN_OPTIONS if options.get(name) is not None}
    shown |= {name: options[name] for name, default in OBJECTIVE_OPTIONS.items() if options[name] != default}
    quantization = getattr(model.config, "quantization_config", None)
    return RunSummary(
        name=str(options.get("hub_model_id") or folder.resolve().name),
        base_model=lora.base_model_name_or_path or model.config.model_type,
        beta=options["beta"],
        reward=objectives[0].reward,
        objective=_named_objective(options),
        reference=reference,
        quantization=quantization_options(quantization),
        quantization_report=str(storage_report(model)),
        lora={
            "rank": lora.r,
            "alpha": lora.lora_alpha,
            "dropout": lora.lora_dropout,
            "target modules": lora.target_modules,
        },
        hyperparameters=shown,
        facts={
            f"Rows ({name})": f"{report.kept_rows} of {report.source_rows}" for name, report in data_reports.items()
        },
        curves="curves.png" if trained else None,
        has_chat_template=has_chat_template,
        **figures,
    )


def _start_loss(options: Mapping[str, Any]) -> float | None:
    """The loss before training, when the policy is its reference: of DPO as such it is known."""
    plain = options["loss_type"] in (["sigmoid"], ["trajectory"])
    return math.log(2) if plain else None


def _named_objective(options: Mapping[str, Any]) -> str:
    weights = options["loss_weights"] or [1.0] * len(options["loss_type"])
    parts = []
    for name, weight in zip(options["loss_type"], weights, strict=True):
        share = f"{weight:g} × " if len(weights) > 1 else ""
        parts.append(f"{share}`{name}` ({REGISTRY[name].source})")
    return " + ".join(parts)


def _strict(value: Any) -> Any:
    """JSON has no NaN or infinity: they become null."""
    if isinstance(value, Mapping):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
