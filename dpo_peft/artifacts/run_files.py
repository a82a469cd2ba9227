"""The files that a run leaves beside its adapter: metrics.json, recipe.yaml, curves.png and the model card.

All of them are made to be published: local paths are shown by their last part, and no token is in them.
"""

import json
import platform
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from peft import LoraConfig

from ..config import objective_options
from ..data import DataSummary
from ..files import as_list, strict, write_atomically
from ..manifests import SAVING
from ..model.adapters import is_adapter
from ..model.loading import storage_report
from ..model.training_record import read_training
from ..training.pictures import PICTURES
from ..wings import wing
from .card import (
    BUNDLED,
    RunSummary,
    Sample,
    adapter_facts,
    figures_of,
    framework_versions,
    save_model_card,
    shown_name,
)
from .citations import cited
from .curves import initial_loss, plot_training_curves
from .recipe import changed_options, lora_options, plain, public, write_recipe
from .rows_kept import length_counts, write_worst_pairs

if TYPE_CHECKING:
    from ..trainer import DPOTrainer

# Written into output_dir as the run goes on; they go with the adapter wherever it is saved.
_BESIDE = ("samples.jsonl", "eval_examples.jsonl", PICTURES)
_SHOWN_OPTIONS = (
    "learning_rate lr_scheduler_type num_train_epochs max_steps per_device_train_batch_size "
    "gradient_accumulation_steps max_length truncation_mode seed"
).split()


class SaveResults:
    """Writes what people need to judge a run beside its adapter: `SaveResults(trainer).save(folder)`.

    Of the trainer it reads, beside what transformers' trainer has and its parts:

    - `data_reports`: dataset name to what became of its rows;
    - `prepare.evaluated`: name to prepared rows of what is evaluated on;
    - `data_sources`: dataset name to Hub ids or files, and their license;
    - `command_options`: the options of `dpo-peft train` that are no part of `args`; None for a run from Python;
    - `model_name`: Hub id or folder that the trainer was given; empty for a model made in code;
    - `warnings_raised`: step, name and message of the named warnings of the training.

    `model_name`, `dataset_name` and `tags` are of the card: its title, the training data, and further tags.
    """

    def __init__(
        self,
        trainer: "DPOTrainer",
        model_name: str | None = None,
        dataset_name: str | Sequence[str] | None = None,
        tags: str | Sequence[str] | None = None,
    ):
        self.trainer, self.args = trainer, trainer.args
        self.title, self.dataset_names, self.tags = model_name or "", as_list(dataset_name), as_list(tags)
        self.log_history = trainer.state.log_history
        self.lora: LoraConfig = trainer.model.peft_config[trainer.policy_adapter]
        trained = read_training(self.lora)
        assert trained is not None  # the trainer's constructor records it
        self.trained = trained
        self.base_model = self.lora.base_model_name_or_path or trainer.model.config.model_type
        self.command_options = trainer.command_options or {}
        self.storage = storage_report(trainer.model)
        source = trainer.reference.source
        described = trainer.reference.describe()
        self.reference = described.replace(source, public(source, is_path=True)) if source else described

    def save(self, folder: str | Path) -> None:
        """Writes `metrics.json` (figures, full log, data counts, what was run where), `recipe.yaml`, `curves.png` and
        `README.md` into the adapter's folder, and copies the samples and held-out rows there."""
        folder, written = Path(folder), Path(self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        for name in _BESIDE:
            if folder.resolve() != written.resolve() and (written / name).is_file():
                shutil.copy(written / name, folder / name)  # with its mode
        facts = self.facts()
        evaluated = self.trainer.prepare.evaluated
        write_worst_pairs(folder, evaluated, self.trainer.tokenizer, self.trainer.images)
        metrics = {**figures_of(self.log_history), **facts, "log_history": self.log_history}
        if (evaluation := wing("evaluation")) is not None:
            metrics["verdict"] = evaluation.verdict(metrics)._asdict()
        write_atomically(folder / "metrics.json", json.dumps(strict(metrics), indent=2, default=str) + "\n")
        write_recipe(folder / "recipe.yaml", changed_options(self.args), *self._recipe_source())
        curved = any("loss" in entry for entry in self.log_history)
        if curved:
            plot_training_curves(self.log_history, folder / "curves.png", start_loss=initial_loss(self.args.loss_type))
        save_model_card(self._summary(folder, metrics, "curves.png" if curved else None), folder)

    def facts(self) -> dict[str, Any]:
        """Returns what metrics.json says beside the figures."""
        trainer = self.trainer
        prepared = {"train": trainer.train_dataset, **trainer.prepare.evaluated}
        bundled = Path(self.base_model).is_dir() and Path(self.base_model).resolve() == BUNDLED.resolve()
        facts = {
            "options": changed_options(self.args),
            "objective": self._objective(),
            "beta": self.args.beta,
            "reward": self.trained.reward,
            "reference": self.reference,
            "base_model": "dpo_peft.quickstart" if bundled else public(self.base_model, is_path=True),
            "adapter": adapter_facts(vars(self.lora)),
            "quantization": self.trained.quantization,
            "environment": environment(self.args.device),
            "steps": trainer.state.global_step,
            "epochs": trainer.state.epoch or 0.0,
            "rows_used": self._rows_used(),
            "seconds": next((e["train_runtime"] for e in reversed(self.log_history) if "train_runtime" in e), None),
            "data": {name: asdict(report) for name, report in trainer.data_reports.items()},
            "lengths": {name: counts for name, rows in prepared.items() if (counts := length_counts(rows))},
            "storage_bytes": asdict(self.storage),
            "versions": framework_versions(),
        }
        return facts | ({"warnings": plain(trainer.warnings_raised)} if trainer.warnings_raised else {})

    def _rows_used(self) -> int:
        """Returns how many different training rows the steps had."""
        args, train = self.args, self.trainer.data_reports.get("train")
        taken = self.trainer.state.global_step * args.train_batch_size * args.gradient_accumulation_steps
        return min(taken * args.world_size, train.kept_rows if train else 0)

    def _objective(self) -> str:
        """Names, weights and sources of the losses. Where this package derives them helps no reader of a card."""
        objective, parts = self.trainer.objective, []
        for name, part, weight in zip(objective.names, objective.parts, objective.weights, strict=True):
            share = f"{weight:g} × " if len(objective.weights) > 1 else ""
            source = re.sub(r" *\(docs/derivations[^)]*\)", "", part.source)
            parts.append(f"{share}`{public(name)}`{f' ({source})' if source else ''}")
        return " + ".join(parts)

    def _recipe_source(self) -> tuple[Mapping[str, object], list[str]]:
        """Returns the recipe's options of model, data and adapter: from the command line its own; from Python what
        the run shows of them, with notes on the rest."""
        if self.command_options:
            return self.command_options, []
        trainer, name = self.trainer, self.trainer.model_name
        continued = bool(name) and is_adapter(name)
        notes = []
        source = {"model_name_or_path": name or self.base_model, "dtype": self.trained.dtype}
        source |= {} if continued else lora_options(self.lora, trainer.tokenizer)
        if not name:
            notes.append("model_name_or_path: the model was given in Python; this is its base.")
        for option, split in (("dataset_name", "train"), ("eval_dataset_name", "eval")):
            names, _ = trainer.data_sources[split]
            if len(names) == 1:
                source[option] = names[0]
            elif split in trainer.data_reports:
                notes.append(f"{option}: not known, the rows were given in Python. Put in your own.")
        if not self.trained.quantization and self.args.quantize_base is None:
            source["quantize_base"] = False
        if self.lora.init_lora_weights is not True and not continued:
            notes.append(f"init_lora_weights was {self.lora.init_lora_weights!r}: not an option of the command line.")
        return source, notes

    def _summary(self, folder: Path, facts: Mapping[str, Any], curves: str | None) -> RunSummary:
        args, trained, trainer = self.args, self.trained, self.trainer
        defaults = {f.name: f.default for f in fields(args)}
        shown = {name: plain(value) for name in _SHOWN_OPTIONS if (value := getattr(args, name)) is not None}
        of_losses = {name: value for name, value in objective_options(args).items() if name != "beta"}
        shown |= {name: value for name, value in of_losses.items() if value != defaults[name]}
        place = folder.parent.parent if folder.parent.name == SAVING else folder  # where it will lie
        steps, samples = read_samples(folder / "samples.jsonl")
        datasets, evaluated = self._datasets()
        license_of_data = trainer.data_sources["train"][1]
        return RunSummary(
            name=args.hub_model_id or str(place.resolve()),
            base_model=self.base_model,
            beta=args.beta,
            dtype=trained.dtype,
            reward=trained.reward,
            objective=facts["objective"],
            datasets=datasets,
            eval_dataset=evaluated,
            papers=cited(
                [part.paper for part in trainer.objective.parts],
                vars(args),
                log_ratio=trained.reward == "log_ratio",
                quantized=bool(trained.quantization),
                rslora=self.lora.use_rslora,
                dora=self.lora.use_dora,
            ),
            reference=self.reference,
            quantization=trained.quantization,
            quantization_report=str(self.storage),
            lora=facts["adapter"],
            hyperparameters=shown,
            facts={
                **({"Verdict": _judged(**facts["verdict"])} if "verdict" in facts else {}),
                **({"Not the base as published": self._changed()} if trained.base_changed else {}),
                "Steps": f"{facts['steps']:,} ({facts['epochs']:.3g} epochs, {facts['rows_used']:,} different rows)",
                **{f"Rows ({name})": _rows(report) for name, report in trainer.data_reports.items()},
                **_images(trainer),
                **({"License of the data": license_of_data} if license_of_data else {}),
                **_time_spent(facts),
            },
            curves=curves,
            samples=samples,
            sample_steps=steps,
            warnings=trainer.warnings_raised,
            has_chat_template=trainer.tokenizer.chat_template is not None,
            reads_images=trainer.images is not None,
            title=self.title,
            tags=self.tags,
            **figures_of(self.log_history),
        )

    def _changed(self) -> str:
        return (
            f"{self.trained.base_changed} of the model that was trained differ from {shown_name(self.base_model)}. "
            "The adapter fits that changed model alone: save it (`save_pretrained`) and load the adapter on it."
        )

    def _datasets(self) -> tuple[list[str], str]:
        """Returns the names of the training data, and the name of what was evaluated on."""
        trained, evaluated = (self.trainer.data_sources[name][0] for name in ("train", "eval"))
        if options := self.command_options:
            mixed = [part["path"] for part in options.get("datasets") or ()]
            trained = as_list(options.get("dataset_name")) or mixed or trained
            if "eval" in self.trainer.data_reports:
                evaluated = as_list(options.get("eval_dataset_name")) or trained
        evaluated_on = evaluated[0] if len(evaluated) == 1 else "held-out preference pairs"
        return self.dataset_names or trained, evaluated_on


def environment(device: torch.device) -> dict[str, Any]:
    """Returns where a run took place: Python, platform, device and package versions."""
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


def _rows(report: DataSummary) -> str:
    cut = f", {report.rows_truncated:,} of them truncated" if report.rows_truncated else ""
    return f"{report.kept_rows:,} of {report.source_rows:,} in the file could be used{cut}"


def _images(trainer: "DPOTrainer") -> dict[str, str]:
    """Returns how many of the training rows have images, and how many tokens these take in the first thousand."""
    rows = trainer.train_dataset
    if trainer.images is None or not isinstance(rows, Dataset):
        return {}
    some = rows.select(range(min(len(rows), 1000)))
    tokens = [row["prompt_ids"].count(trainer.images.token) for row in some if row["images"]]
    mean = sum(tokens) / max(len(tokens), 1)
    each = f", {mean:,.0f} image tokens each on average, {max(tokens):,} at most" if tokens else ""
    with_images = sum(map(bool, rows["images"]))
    return {"Rows with images": f"{with_images:,} of {len(rows):,} for training{each}"}


def _judged(headline: str, level: str, reasons: Sequence[str]) -> str:
    """Returns a verdict for the card."""
    return " ".join([f"{level}. {headline}", *reasons])


def _time_spent(facts: Mapping[str, Any]) -> dict[str, str]:
    seconds, where = facts["seconds"], facts["environment"]
    memory = f" ({where['gpu_memory_gib']} GiB)" if "gpu_memory_gib" in where else ""
    return {} if seconds is None else {"Training": f"{seconds:.0f} s on {where['device']}{memory}"}


def read_samples(path: Path) -> tuple[tuple[int, int], list[Sample]]:
    """Returns the first and the last step of a samples.jsonl, and what was written at both; nothing where there is
    none."""
    if not path.is_file():
        return (0, 0), []
    written: dict[int, dict[int, dict[str, Any]]] = {}  # step -> prompt -> row; of a repeated step the newest
    for line in path.read_text("utf-8").split("\n"):
        if line.strip():
            row = json.loads(line)
            written.setdefault(row["step"], {})[row["prompt_number"]] = row
    if len(written) < 2:
        return (0, 0), []
    first, last = min(written), max(written)
    both = [(row, written[last][number]) for number, row in sorted(written[first].items()) if number in written[last]]
    return (first, last), [Sample(old["prompt"], old["completion"], new["completion"]) for old, new in both]
