"""`dpo-peft train --dry_run`: everything that can be checked before weights are loaded, and what a run would do."""

import math
import os
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from ..config import DPOConfig
from ..data import DataReport
from ..errors import OptionError
from ..model.adapters import is_adapter
from ..model.base import base_config
from ..planning.memory import GIB, RESERVE
from ..planning.run import DEFAULTS, plan
from ..planning.sketch import Sketch
from ..training.arguments import check_constructor
from ..training.building import Preparation
from ..training.metrics import MetricStore
from ..training.resume import RunState
from .measure import sample


def dry_run(args: DPOConfig, model: Any, inputs: dict[str, Any], processes: int) -> tuple[dict[str, Any], str]:
    """Checks a run without its weights. Returns its figures, and a table of them for people.

    Args:
        args: the options of training.
        model: those of the model, a `ModelArguments`.
        inputs: the arguments of `DPOTrainer`.
        processes: how many will train.

    Raises:
        OptionError, DataError, CheckpointError: what would stop the run, with the remedy.
        PublishError: the Hub can't be reached, and push_to_hub is set.
    """
    name, train, evaluated = (inputs[one] for one in ("model", "train_dataset", "eval_dataset"))
    given = name, None, args, train, evaluated, None, inputs["quantization_config"]
    _, _, tokenizer, images, objective = check_constructor(*given, own_metrics=False)
    prepare = Preparation(args, objective, tokenizer, images, (name, inputs["peft_config"]))
    prepared, _ = prepare.training(train), prepare.evaluation(evaluated)
    resumed = RunState(args, MetricStore(), [], dict).chosen(args.resume_from_checkpoint)
    figures: dict[str, Any] = {
        "model": _model(name, args, inputs["peft_config"]),
        "rows": {one: _rows(report) for one, report in prepare.reports.items()},
        "steps": _steps(args, None if args.max_steps > 0 else len(prepared), processes),
        "memory": _memory(args, model, prepare.reports["train"], inputs["peft_config"]),
        "writes": str(Path(args.output_dir)),
        "resumes": resumed,
        "hub": _hub(args, name) if args.push_to_hub else None,
    }
    return figures, _table(figures, args, prepare.reports)


def _model(name: str, args: DPOConfig, lora: LoraConfig | None) -> dict[str, Any]:
    """Puts the adapter on the model without numbers: which layers get one, and how many weights it has."""
    if lora is None:
        return {"name": name, "adapter": "the one that is given is trained further"}
    config = base_config(name, args.model_init_kwargs, args.trust_remote_code)
    sketch = Sketch(config, lora, args.trust_remote_code, experts=args.lora_experts, vision=args.lora_vision)
    layers = {path.split(".lora_A")[0] for path, _ in sketch.adapted.named_parameters() if ".lora_A" in path}
    kinds = sorted({path.rsplit(".", 1)[-1] for path in layers})
    trained = sum(p.numel() for p in sketch.adapted.parameters() if p.requires_grad)
    return {"name": name, "weights": sketch.weights, "layers": len(layers), "kinds": kinds, "trained": trained}


def _rows(report: DataReport) -> dict[str, Any]:
    told = {"rows": report.source_rows, "kept": report.kept_rows, "dropped": dict(report.dropped)}
    return {**told, "format": report.format, "longest": report.longest, **sample(report)}


def _steps(args: DPOConfig, rows: int | None, processes: int) -> dict[str, Any]:
    """Returns how many steps there are, of how many rows; `rows` is None where max_steps says it."""
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    if rows is None:
        total = args.max_steps
    else:
        in_epoch = max(rows // batch if args.dataloader_drop_last else math.ceil(rows / batch), 1)
        total = math.ceil(args.num_train_epochs * in_epoch)
    several = {"processes": processes} if processes > 1 else {}
    return {"rows": batch, "total": total, "warmup": args.get_warmup_steps(total), **several}


def _memory(args: DPOConfig, model: Any, report: DataReport, lora: LoraConfig | None) -> dict[str, Any]:
    """Predicts the peak on this machine's GPU, or without one that of a micro-batch."""
    options = {one: getattr(model, one, getattr(args, one, default)) for one, default in DEFAULTS.items()}
    targets = lora and lora.target_modules
    options |= {"lora_target_modules": sorted(targets) if isinstance(targets, set) else None, **sample(report)}
    options["checkpoint_layers"] = "auto"
    if torch.cuda.is_available() and not args.use_cpu:
        options["gpu"] = f"{torch.cuda.mem_get_info()[1] / GIB:.2f}GiB"
    try:
        planned = plan(**options).figures
    except OptionError as error:
        return {"peak": None, "fits": None, "why": str(error)}
    step = planned["step"]
    if step is not None and not step["fits"]:
        raise OptionError(
            f"A single row takes {step['peak'] / GIB:.2f} GiB, and the GPU has {planned['gpu']['usable'] / GIB:.2f} "
            "for tensors. Take a smaller model, optim=adamw_8bit, a lower lora_r or max_length, or a larger GPU."
        )
    return {"peak": (step or planned)["peak"] + RESERVE, "fits": step and step["fits"], "why": ""}


def _hub(args: DPOConfig, name: str) -> str:
    """Asks whether the adapter can be published, as a run would."""
    from huggingface_hub import HfApi

    from ..hub.client import Hub

    base = str(name)
    if is_adapter(base) or os.path.isdir(base):
        raise OptionError(
            f"push_to_hub=True: the base, {base!r}, is a folder, which nobody else can load. Train without it, then "
            "`dpo-peft push FOLDER --base_model HUB_ID`."
        )
    wanted = args.hub_model_id or Path(args.output_dir).resolve().name
    hub = Hub(HfApi(token=args.hub_token), wanted, repeat="start the run again.")
    hub.repo_id = hub.own_repository()
    hub.check_base(base)
    return hub.repo_id


def _table(figures: dict[str, Any], args: DPOConfig, reports: dict[str, DataReport]) -> str:
    model, steps, memory = figures["model"], figures["steps"], figures["memory"]
    if "layers" in model:
        shown = f"{model['name']}: {model['weights']:,} weights; LoRA on {model['layers']} layers "
        shown += f"({', '.join(model['kinds'])}), {model['trained']:,} trained weights"
    else:
        shown = f"{model['name']}: {model['adapter']}"
    peak = f"not predicted. {memory['why']}"
    if memory["peak"]:
        peak = f"{memory['peak'] / GIB:.2f} GiB at the peak, predicted{'' if memory['fits'] else ' for a GPU'}"
    lines = [("model", shown)]
    for name, rows in figures["rows"].items():
        dropped = ", ".join(f"{count} {reason}" for reason, count in rows["dropped"].items())
        text = f"{rows['kept']:,} of {rows['rows']:,} rows ({rows['format']})" if rows["rows"] else "a stream"
        text += f", dropped: {dropped}" if dropped else ""
        text += f"; prompt {rows['prompt_tokens']} + {rows['answers']} x {rows['answer_tokens']} tokens on average"
        lines.append((name, f"{text}, longest {rows['longest']:,}, max_length {args.max_length}"))
        if cut := reports[name].rows_truncated:
            lines.append(("", f"{cut:,} rows are cut to max_length ({args.truncation_mode})"))
    total = f"{steps['total']:,} of {steps['rows']} rows"
    total += f" in {steps['processes']} processes" if "processes" in steps else ""
    total += "" if args.max_steps > 0 else f", {args.num_train_epochs:g} epochs"
    lines += [
        ("steps", f"{total}, {steps['warmup']} of warmup, to {args.learning_rate:g}"),
        ("loss", f"{', '.join(args.loss_type)}" + (f", beta {args.beta:g}" if args.beta is not None else "")),
        ("memory", peak),
        ("writes", f"{figures['writes']}: adapter, tokenizer, README.md, metrics.json, recipe.yaml, curves.png"),
    ]
    if figures["resumes"]:
        lines.append(("resumes", figures["resumes"]))
    if figures["hub"]:
        lines.append(("Hub", f"https://huggingface.co/{figures['hub']}"))
    table = "\n".join(f"  {head:<12}{text}" for head, text in lines)
    return f"Nothing was trained (dry_run), and nothing stands against it. The run:\n{table}"
