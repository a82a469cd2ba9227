"""A short real run that reports to trackers, in a process of its own: `python logged_run.py BASE FOLDER TRACKER...`.

The trackers keep everything in FOLDER; what the trainer logged itself is FOLDER/log.json.
"""

import json
import os
import sys
from pathlib import Path


def main(base: str, folder: str, *trackers: str) -> None:
    os.environ.pop("WANDB_DISABLED", None)
    os.environ.update(
        WANDB_MODE="offline",
        WANDB_SILENT="true",
        WANDB_DIR=folder,
        TRACKIO_DIR=f"{folder}/trackio",
        TENSORBOARD_LOGGING_DIR=f"{folder}/tensorboard",
    )
    import torch
    from trainer_helpers import ours, text_pairs
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    trainer = ours(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        text_pairs(12),
        AutoTokenizer.from_pretrained(base),
        f"{folder}/run",
        max_steps=3,
        eval_dataset={"near": text_pairs(6, seed=1), "far": text_pairs(6, seed=2)},
        eval_strategy="steps",
        eval_steps=3,
        report_to=list(trackers),
        run_name="reported",
        beta=0.25,
        sample_prompts=1,
        sample_max_new_tokens=4,
    )
    trainer.train()
    Path(folder, "log.json").write_text(json.dumps(trainer.state.log_history))


if __name__ == "__main__":
    main(*sys.argv[1:])
