"""The quickstart's run on the bundled model, cut short: it learns, and what it saves is what it trained."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_peft import quickstart
from dpo_peft.cli import quickstart as command
from dpo_peft.quickstart import judging

# Plain PEFT, nothing of ours. The model stays in train mode (there is no dropout): in eval mode bitsandbytes may
# repack 4-bit weights with rounded scales on a CPU, and these are not the weights that were trained.
PLAIN_PEFT = """
import json, sys, torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer, BitsAndBytesConfig
folder, rows_file, out, beta = sys.argv[1:]
torch.set_num_threads(1)
nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                         bnb_4bit_compute_dtype=torch.float32)
model = AutoPeftModelForCausalLM.from_pretrained(folder, quantization_config=nf4, dtype=torch.float32).train()
tokenizer = AutoTokenizer.from_pretrained(folder)

def logp(prompt, answer):
    start = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    whole = tokenizer.apply_chat_template(prompt + answer, return_dict=True)["input_ids"]
    logps = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
    return float(sum(logps[i - 1, whole[i]] for i in range(len(start), len(whole))))

def rewards(row):
    return [logp(row["prompt"], row[name]) for name in ("chosen", "rejected")]

rows = [json.loads(line) for line in open(rows_file)]
with torch.no_grad():
    on = torch.tensor([rewards(row) for row in rows])
    with model.disable_adapter():
        off = torch.tensor([rewards(row) for row in rows])
torch.save(float(beta) * (on - off), out)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Twelve steps of the quickstart, evaluated on forty held-out pairs."""
    folder = tmp_path_factory.mktemp("quickstart")
    held_out = folder / "held_out.jsonl"
    held_out.write_text("\n".join(Path(quickstart.test_file()).read_text().splitlines()[:40]) + "\n")
    options = {"output_dir": folder / "out", "eval_dataset_name": held_out, "max_steps": 12, "eval_strategy": "epoch"}
    options |= {"lr_scheduler_type": "constant", "warmup_steps": 0, "learning_rate": 5e-4}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    trainer = command.build_trainer(*command.parse(words)[:3])
    trainer.train()
    trainer.save_model()
    return trainer


@pytest.mark.slow
def test_it_learns_from_chance(run: Any) -> None:
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    metrics = run.evaluate()
    assert losses[0] < 0.6932 and losses[-1] < 0.6
    assert metrics["eval_rewards/accuracies"] > 0.75
    assert abs(metrics["eval_accuracies/length_only"] - 0.5) < 0.25


@pytest.mark.slow
def test_plain_peft_in_a_new_process_reproduces_the_margins(run: Any, tmp_path: Path) -> None:
    folder = Path(run.args.output_dir)
    result = run.predict(run.eval_dataset)
    margins = torch.from_numpy(result.predictions[:, 0] - result.predictions[:, 1])
    paths = [str(folder), str(folder.parent / "held_out.jsonl"), str(tmp_path / "r")]
    arguments = [sys.executable, "-c", PLAIN_PEFT, *paths, str(run.args.beta)]
    plain_peft = subprocess.run(arguments, capture_output=True, text=True)
    assert plain_peft.returncode == 0, plain_peft.stderr
    plain = torch.load(tmp_path / "r")
    assert margins.abs().max() > 0.1
    torch.testing.assert_close(margins, plain[:, 0] - plain[:, 1], atol=1e-4, rtol=0, check_dtype=False)


def test_the_report_holds_the_run_s_own_figures(tmp_path: Path) -> None:
    prompts = quickstart.eval_prompts()[:2]
    before, after = (
        ["The tea was awful. It was a bad, dull place."],
        ["The tea was superb. It was a good, warm place."],
    )
    chance = {"eval_rewards/accuracies": 0.5}
    end = {"eval_rewards/accuracies": 0.9, "eval_accuracies/length_only": 0.5, "eval_rewards/margins": 1.0}
    figures = judging.judge(before * 2 + after, after * 3, chance, end)
    assert figures["reward_after"] == pytest.approx(quickstart.true_reward(after[0]))
    assert figures["reward_gain_in_std"] > 0 and figures["accuracy_after"] == 0.9
    judging.write_report(tmp_path, figures, prompts, before * 2, after * 2)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["figures"] == figures and report["samples"][0]["after"] == after[0]
    assert "accuracy_after | 0.900" in (tmp_path / "report.md").read_text()
