"""A run of an answer-only adapter of some layers, from rows to rewards: what was trained, PEFT alone finds again."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from data_helpers import chat_pair
from datasets import Dataset
from peft import AutoPeftModelForCausalLM
from reward_helpers import plain_log_ratio
from trainer_helpers import lora, ours, step_logs
from transformers import AutoTokenizer

from dpo_peft import DataError, ImplicitReward, OptionError, answer_only
from dpo_peft.model.adapter_source import AdapterSource
from dpo_peft.model.generation import end_tokens
from dpo_peft.reward.judgments import score_dataset

WORDS = "the cat sat on a mat and saw another thing in one old tree".split()
ROWS = Dataset.from_list(
    [chat_pair(f"{a}, {b}?", f"The {a}.", f"An {b} and {a}!") for a, b in zip(WORDS, WORDS[1:], strict=False)]
)
HELD_OUT = ROWS.select(range(3))


def config_for(tokenizer: Any) -> Any:
    config = lora(alora_invocation_tokens=answer_only(tokenizer))
    config.layers_to_transform = [1]
    return config


@pytest.fixture(scope="module")
def run(base_folder: str, tmp_path_factory: Any) -> Any:
    """Checkpointed, sampled greedily at each evaluation, saved."""
    folder, tokenizer = tmp_path_factory.mktemp("run"), AutoTokenizer.from_pretrained(base_folder)
    how = {"max_steps": 4, "learning_rate": 2e-2, "beta": 0.5, "save_strategy": "steps", "save_steps": 2}
    how |= {"eval_strategy": "steps", "eval_steps": 2, "sample_prompts": 3, "sample_temperature": 0.0}
    how |= {"sample_max_new_tokens": 8, "gradient_checkpointing": True, "quantize_base": False}
    how |= {"model_init_kwargs": {"dtype": "float32"}, "eval_dataset": HELD_OUT}
    trainer = ours(base_folder, ROWS, tokenizer, folder, peft_config=config_for(tokenizer), **how)
    trainer.train()
    trainer.save_model()
    plain = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return SimpleNamespace(folder=folder, trainer=trainer, plain=plain, tokenizer=tokenizer, how=how)


def test_it_learns_and_is_saved_as_peft_reads_it(run: Any) -> None:
    logs = step_logs(run.trainer)
    assert logs[0]["rewards/margins"] == 0.0 < logs[-1]["rewards/margins"]
    config = json.loads((run.folder / "adapter_config.json").read_text())
    assert config["alora_invocation_tokens"] == answer_only(run.tokenizer) and config["layers_to_transform"] == [1]
    card = (run.folder / "README.md").read_text("utf-8")
    assert "| acts on | completions alone, from the tokens" in card and "| layers | 1 |" in card
    recipe = (run.folder / "recipe.yaml").read_text("utf-8")
    assert "adapter_scope: completions" in recipe and "lora_layers_to_transform:\n- 1\n" in recipe


@torch.no_grad()
def test_samples_of_a_checkpointed_run_are_those_of_peft(run: Any) -> None:
    samples = [json.loads(line) for line in (run.folder / "samples.jsonl").read_text().splitlines()]
    assert [one["step"] for one in samples] == [0] * 3 + [2] * 3 + [4] * 3
    ends, different = end_tokens(run.plain, run.tokenizer), False
    for row, sample in zip(run.trainer.prepare.evaluated["eval"], samples[-3:], strict=True):
        ids, base = [*row["prompt_ids"]], [*row["prompt_ids"]]
        for _ in range(sample["tokens"]):
            ids.append(int(run.plain(torch.tensor([ids])).logits[0, -1].argmax()))
            with run.plain.disable_adapter():
                base.append(int(run.plain(torch.tensor([base])).logits[0, -1].argmax()))
        written = ids[len(row["prompt_ids"]) :]
        assert run.tokenizer.decode(written, skip_special_tokens=True) == sample["completion"]
        assert (written[-1] in ends) == sample["finished"]
        different |= ids != base
    assert different  # control: the adapter acts


def test_rewards_are_those_of_peft(run: Any) -> None:
    """Of a dataset, of texts that are called, and of the trainer's own evaluation."""
    _, scored = score_dataset(AdapterSource(str(run.folder)), HELD_OUT)
    reward, expected = ImplicitReward(str(run.folder)), []
    for row, found in zip(run.trainer.prepare.evaluated["eval"], scored.scores, strict=True):
        expected.append([0.5 * plain_log_ratio(run.plain, row["prompt_ids"], ids) for ids in row["completion_ids"]])
        assert [one.reward for one in found] == pytest.approx(expected[-1], abs=1e-4)
    called = reward([row["prompt"] for row in HELD_OUT], [row["chosen"] for row in HELD_OUT])
    assert called == pytest.approx([chosen for chosen, _ in expected], abs=1e-4)
    margin = sum(chosen - rejected for chosen, rejected in expected) / len(expected)
    logged = [entry for entry in run.trainer.state.log_history if "eval_rewards/margins" in entry][-1]
    assert logged["eval_rewards/margins"] == pytest.approx(margin, abs=1e-4)
    run.plain.peft_config["default"].alora_invocation_tokens, kept = None, answer_only(run.tokenizer)
    first = run.trainer.prepare.evaluated["eval"][0]
    off = plain_log_ratio(run.plain, first["prompt_ids"], first["completion_ids"][0])
    run.plain.peft_config["default"].alora_invocation_tokens = kept
    assert off == 0.0 != pytest.approx(expected[0][0], abs=1e-3)  # control: PEFT leaves it off without the tokens


def test_what_has_no_place_to_begin_is_not_scored(run: Any) -> None:
    reward = ImplicitReward(str(run.folder))
    with pytest.raises(DataError, match=r"implicit reward of prompt: does not hold .*Remedy"):
        reward(["Name a color:"], [" blue"])
    with pytest.raises(DataError, match="score row 0, field 'prompt': does not hold"):
        score_dataset(
            AdapterSource(str(run.folder)), Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
        )


@pytest.mark.parametrize("name", ["alora_invocation_tokens", "layers_to_transform"])
def test_a_run_resumes_with_its_scope_and_layers_alone(run: Any, base_folder: str, tmp_path: Path, name: str) -> None:
    other = config_for(run.tokenizer)
    setattr(other, name, None)
    how = {name: value for name, value in run.how.items() if not name.startswith("sample_")} | {"max_steps": 5}
    trainer = ours(base_folder, ROWS, run.tokenizer, tmp_path / name, peft_config=other, **how)
    with pytest.raises(OptionError, match=rf"Resuming with other options: .*peft_config\.{name}: "):
        trainer.train(resume_from_checkpoint=str(run.folder / "checkpoint-4"))
