"""`dpo-peft quickstart`: a real 4-bit DPO run, offline, on the small language model that the package ships.

The task is controlled sentiment (Rafailov et al. 2023, section 6): write reviews, the more positive the better. Its
true reward is a documented function of the text, so the run can be judged by more than its own loss. The pairs were
sampled from the model itself and ranked by that reward.
"""

import os
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..quickstart import config_file, eval_prompts, model_path, test_file, train_file
from . import train
from .mixture import DataArguments
from .options import option, parse_options, show
from .train import ModelArguments, OutputArguments

if TYPE_CHECKING:
    from ..config import DPOConfig
    from ..trainer import DPOTrainer

SAMPLES = 256  # fresh completions of held-out prompts, before and after
EXAMPLES = [
    "dpo-peft quickstart",
    "dpo-peft quickstart --beta 0.2 --output_dir outputs/beta-0.2",
    "dpo-peft quickstart --json > figures.json",
]


@dataclass
class QuickstartArguments:
    """What the help shows of the options; all those of `dpo-peft train` are taken."""

    output_dir: str = option("outputs/quickstart", "Where adapter, model card, curves and report go.")
    beta: float = option(0.5, "Strength of the pull to the reference.")
    max_steps: int = option(-1, "Stop after so many steps; all 78 if negative.")
    json: bool = option(False, "Print the figures as one JSON object on stdout, everything else on stderr.")


def quickstart(argv: Sequence[str]) -> None:
    """Train the bundled model in 4 bits with DPO, offline: 2 minutes, 1 GB of memory, 2 CPU cores. Prints samples
    before and after with their true reward. Takes every option of `dpo-peft train`; these first:"""
    if asked := [word for word in argv if word == "-h" or word.startswith("--help")]:
        parse_options(asked, QuickstartArguments, "quickstart", quickstart.__doc__, EXAMPLES)
    started = time.time()
    # Threads that wait by spinning make a step ten times slower as soon as anything else runs on the machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported
    data, args, model, output = parse(argv)
    from ..quickstart import judging

    prompts = [prompt for prompt, _ in zip(eval_prompts() * SAMPLES, range(SAMPLES), strict=False)]
    with redirect_stdout(sys.stderr) if output.json else nullcontext(), train._claimed(args):
        trainer = build_trainer(data, args, model)
        run = judging.train_between_samples(trainer, prompts)
        figures = judging.judge(run.before, run.after, run.start, run.end)
        figures["kl_to_reference"] = run.kl
        figures["seconds"] = round(time.time() - started, 1)
        trainer.save_model()
        folder = Path(trainer.args.output_dir)
        judging.write_report(folder, figures, prompts, run.before, run.after)
    if output.json:
        show({"output_dir": str(folder), **figures}, "", as_json=True)
    else:
        judging.show(figures, prompts, run.before, run.after, folder)


def parse(argv: Sequence[str]) -> tuple[DataArguments, "DPOConfig", ModelArguments, OutputArguments]:
    """Returns the options of `dpo-peft train`, over those of the bundled file, model and pairs."""
    if argv and not argv[0].startswith("-"):
        argv = ["--output_dir", *argv]
    bundled = {
        "--config": config_file(),
        "--model_name_or_path": model_path(),
        "--dataset_name": train_file(),
        "--eval_dataset_name": test_file(),
    }
    chosen = {word.split("=")[0] for word in argv}
    given = [word for name, value in bundled.items() if name not in chosen for word in (name, value)]
    return train._parse([*given, *argv])


def build_trainer(data: DataArguments, args: "DPOConfig", model: ModelArguments) -> "DPOTrainer":
    """Returns the trainer that the options describe, with the adapter that seed 0 gives."""
    import torch

    torch.manual_seed(0)
    return train.build_trainer(data, args, model)
