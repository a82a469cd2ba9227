"""Any objective, offline, on the quickstart's task: the bundled model learns to write positive reviews.

GPU:      none
Peak:     0.9 GiB of the machine's memory
Time:     one to two minutes on one CPU core, see the table
Command:  python recipes/objectives.py --config recipes/objectives/lists.yaml [--any_option value]
Expected:

| recipe         | objective       | time on one CPU core | held-out accuracy | mean true reward, up by | KL, nats |
|----------------|-----------------|----------------------|-------------------|-------------------------|----------|
| pairs          | sigmoid and sft | 1 minute             | 0.50 -> 0.99      | 1.6 std                 | 1.7      |
| lists          | multi_negative  | 1.5 minutes          | 0.50 -> 0.80      | 0.9 std                 | 0.5      |
| unpaired       | kto             | 2 minutes            | 0.50 -> 0.99      | 1.6 std                 | 1.7      |
| trajectories   | trajectory      | 1.5 minutes          | 0.50 -> 0.95      | 0.8 std                 | 0.4      |
| reference_free | simpo           | 1 minute             | 0.48 -> 0.69      | 1.7 std                 | 1.8      |

Std is the standard deviation of the true reward before training; samples stay as fluent as before. Accuracy is
over any two completions known to be a better and a worse one: of a pair, of a list, of all single completions.

The pairs that the package ships are turned into the kind of data that the objective learns from, and kept in the
output folder: `dpo_peft/quickstart/forms.py` says how. `--dataset_name` and `--eval_dataset_name` give other data.
Evaluation is on held-out rows of the same kind; the task and its true reward are those of recipes/quickstart.py.
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
from dpo_peft.losses import find_objective
from dpo_peft.quickstart.forms import MOST_LISTS, write_form
from dpo_peft.quickstart.judging import judge, show, train_between_samples, write_report

SAMPLES = 256  # fresh answers to held-out prompts, before and after
HELD_OUT_LISTS = 64


def main() -> None:
    if "--config" not in sys.argv:
        raise SystemExit(__doc__)
    started = time.time()
    trainer = build_trainer(sys.argv[1:])
    prompts = quickstart.eval_prompts()[:SAMPLES]
    run = train_between_samples(trainer, prompts)
    figures = judge(run.before, run.after, run.start, run.end)
    figures["kl_to_reference"] = run.kl
    figures["seconds"] = round(time.time() - started, 1)

    trainer.save_model()
    folder = Path(trainer.args.output_dir)
    title = f"{' + '.join(trainer.args.loss_type)} on the quickstart's task"
    write_report(folder, figures, prompts, run.before, run.after, title)
    show(figures, prompts, run.before, run.after, folder)


def build_trainer(argv: list[str], lists: int = MOST_LISTS, held_out_lists: int = HELD_OUT_LISTS):
    """The trainer that the options describe, on the bundled model and pairs unless they name others."""
    pairs = {
        "--dataset_name": (quickstart.train_file(), lists),
        "--eval_dataset_name": (quickstart.test_file(), held_out_lists),
    }
    bundled = {
        "--model_name_or_path": quickstart.model_path(),
        **{option: file for option, (file, _) in pairs.items()},
    }
    given = [word for option, value in bundled.items() if option not in argv for word in (option, value)]
    torch.manual_seed(0)
    data, args, model = cli.parse([*given, *argv])
    kind = find_objective(args.loss_type[0]).data
    for option, (file, most) in pairs.items():
        if option not in argv:
            setattr(data, option[2:], write_form(kind, file, args.output_dir, quickstart.model_path(), most))
    return cli.build_trainer(data, args, model)


if __name__ == "__main__":
    main()
