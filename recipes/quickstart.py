"""The quickstart: a real 4-bit DPO run, offline, on the small language model that the package ships.

GPU:      none
Peak:     0.9 GiB of the machine's memory
Time:     about 1.5 minutes on 2 CPU cores
Command:  make quickstart            or            python recipes/quickstart.py [--any_option value]
Expected: held-out preference accuracy 0.99, mean true reward up by 2.5 of its standard deviations at the start,
          samples still fluent, KL below 10 nats per answer

The task is controlled sentiment (Rafailov et al. 2023, section 6): write reviews, the more positive the better. Its
true reward is a documented function of the text, so the run can be judged by more than its own loss. The pairs were
sampled from the model itself and ranked by that reward.
"""

import os
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Threads that wait by spinning make a step ten times slower as soon as anything else runs on the machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from dpo_peft.cli.options import show_progress

show_progress()  # before torch is imported

import torch

from dpo_peft import quickstart
from dpo_peft.cli import train as cli
from dpo_peft.quickstart.judging import judge, show, train_between_samples, write_report

HERE = Path(__file__).parent
SAMPLES = 256  # fresh answers to held-out prompts, before and after


def main() -> None:
    started = time.time()
    trainer = build_trainer(sys.argv[1:])
    prompts = [prompt for prompt, _ in zip(quickstart.eval_prompts() * SAMPLES, range(SAMPLES), strict=False)]
    run = train_between_samples(trainer, prompts)
    figures = judge(run.before, run.after, run.start, run.end)
    figures["kl_to_reference"] = run.kl
    figures["seconds"] = round(time.time() - started, 1)

    trainer.save_model()
    folder = Path(trainer.args.output_dir)
    write_report(folder, figures, prompts, run.before, run.after)
    show(figures, prompts, run.before, run.after, folder)


def build_trainer(argv: list[str]):
    data_and_model = {
        "--config": str(HERE / "quickstart.yaml"),
        "--model_name_or_path": quickstart.model_path(),
        "--dataset_name": quickstart.train_file(),
        "--eval_dataset_name": quickstart.test_file(),
    }
    given = [word for option, value in data_and_model.items() if option not in argv for word in (option, value)]
    torch.manual_seed(0)
    return cli.build_trainer(*cli.parse([*given, *argv]))


if __name__ == "__main__":
    main()
