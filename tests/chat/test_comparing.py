"""Before and after: completions are plain PEFT's, alone or in a batch, and the rewards those of `ImplicitReward`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from reward_helpers import plain_log_ratio, train_bundled
from transformers import AutoModelForCausalLM

from dpo_peft import ImplicitReward, OptionError, quickstart
from dpo_peft.chat import Comparison, compare_completions
from dpo_peft.cli import compare as command
from dpo_peft.cli import main
from dpo_peft.data.prompts import read_prompts
from dpo_peft.pairs.engines import Sampling

TEXTS = ["Hi.", "Tell me about the sea, and of the old man in it.", "And?", "What is it that the cat saw on the mat?"]


@pytest.fixture(scope="module")
def reward(adapter: str) -> ImplicitReward:
    return ImplicitReward(adapter, beta=0.5, quantize=False, dtype="float32")


def compared(reward: ImplicitReward, texts: list[str] = TEXTS, **how: Any) -> Comparison:
    sampling = Sampling(how.pop("max_new_tokens", 16), how.pop("temperature", 0.0))
    prompts = read_prompts(Dataset.from_dict({"prompt": texts}), "texts", as_chat=True)[0]
    return compare_completions(reward, prompts, sampling, **how)


def test_completions_and_rewards_are_those_of_plain_peft(
    reward: ImplicitReward, adapter: str, base_folder: str
) -> None:
    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32).eval()

    base, tuned, tokenizer = load(), PeftModel.from_pretrained(load(), adapter).eval(), reward.tokenizer
    found = compared(reward, batch_size=3)
    for row, text in zip(found.rows, TEXTS, strict=True):
        message = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        for model, written, scored in ((base, row.before, row.before_reward), (tuned, row.after, row.after_reward)):
            out = model.generate(**ids, max_new_tokens=16, do_sample=False, pad_token_id=0)[0]
            prompt, new = ids["input_ids"][0].tolist(), out[ids["input_ids"].shape[1] :].tolist()
            assert written == tokenizer.decode(new, skip_special_tokens=True)
            assert scored == pytest.approx(0.5 * plain_log_ratio(tuned, prompt, new), abs=1e-4)
        assert not row.same


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_row_does_not_depend_on_its_batch(reward: ImplicitReward, temperature: float) -> None:
    together = compared(reward, temperature=temperature, seed=4, batch_size=4).lines()
    one_by_one = compared(reward, temperature=temperature, seed=4, batch_size=1).lines()
    for left, right in zip(together, one_by_one, strict=True):
        assert {**left, "before_reward": 0, "after_reward": 0} == {**right, "before_reward": 0, "after_reward": 0}
        assert left["after_reward"] == pytest.approx(right["after_reward"], abs=1e-4)
    if temperature:
        other = compared(reward, temperature=temperature, seed=5).lines()
        assert [row["after"] for row in other] != [row["after"] for row in together]


def test_identical_completions_are_counted_and_have_one_reward(
    base_folder: str, make_adapter: Callable[..., str]
) -> None:
    fresh = ImplicitReward(make_adapter(), beta=0.5, quantize=False, dtype="float32")
    for name, parameter in fresh.model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    figures = compared(fresh).figures()
    assert (figures["same"], figures["higher"], figures["lower"], figures["share_higher"]) == (4, 0, 0, 0.0)
    assert figures["mean_before_reward"] == figures["mean_after_reward"] == 0


def test_another_adapter_stands_on_the_left(reward: ImplicitReward, make_adapter: Callable[..., str]) -> None:
    other = make_adapter(8, r=2)
    left = [row.before for row in compared(reward, against=other).rows]
    its_own = compared(ImplicitReward(other, beta=1.0, quantize=False, dtype="float32"))
    assert left == [row.after for row in its_own.rows]
    assert left != [row.before for row in compared(reward).rows]
    assert compared(reward, against=other).before == f"the adapter {other}"


def test_prompts_beyond_the_context_are_left_out_and_counted(reward: ImplicitReward, caplog: Any) -> None:
    long = ["word " * 400, "Hi."]
    found = compared(reward, long)
    assert [row.row for row in found.rows] == [1] and found.figures()["too_long"] == 1
    assert "1 of 2 prompts are left out" in caplog.text
    with pytest.raises(OptionError, match="no room"):
        compared(reward, long[:1])


# ---- The command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bundled")
    train_bundled(folder, steps=3)
    return str(folder)


def test_the_command_on_four_bits(bundled: str, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    """Its rewards are those that `ImplicitReward` gives for the written texts, a public call on the same adapter."""
    monkeypatch.setenv("COLUMNS", "90")
    output, test = tmp_path / "out.jsonl", quickstart.test_file()
    options = ["--limit", "4", "--max_new_tokens", "60"]
    assert main(["compare", bundled, "--prompts", test, *options, "--output", str(output)]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines()[:-4])) <= 90 and " | " in shown
    rows = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    done = [row for row in rows if row["before_finished"] and row["after_finished"]]
    reward = ImplicitReward(bundled)
    for side in ("before", "after"):
        scores = reward([row["prompt"] for row in done], [row[side] for row in done])
        assert scores == pytest.approx([row[f"{side}_reward"] for row in done], abs=1e-3)
    higher = sum(row["after_reward"] > row["before_reward"] for row in rows)
    assert done and f"higher reward for {higher} of 4 prompts" in shown and higher >= 3
    assert main(["compare", bundled, "--prompts", test, *options, "--output", str(output)]) == 2  # is there
    capsys.readouterr()
    assert main(["compare", bundled, "--prompts", test, *options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == rows


def test_lines_of_a_text_file(bundled: str, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("Tell me about the hotel.\n\nAnd the film?\n", "utf-8")
    how = ["--max_new_tokens", "12", "--json"]
    assert main(["compare", bundled, "--prompts", str(file), *how]) == 0
    from_file = json.loads(capsys.readouterr().out)
    given = ["--prompt", "Tell me about the hotel.", "--prompt=And the film?"]
    assert main(["compare", bundled, *given, *how]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == from_file["rows"]
    assert from_file["rows"][0]["prompt"] == [{"role": "user", "content": "Tell me about the hotel."}]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "either prompts"),
        (["--prompts", "none.txt"], "no such file"),
        (["--prompt", "Hi", "--limit", "0"], "limit=0"),
        (["--prompt", "Hi", "--temperature", "-1"], "temperature"),
        (["--prompt"], "needs a value"),
    ],
)
def test_wrong_options(words: list[str], message: str, adapter: str, capsys: Any) -> None:
    assert main(["compare", adapter, *words]) == 2
    assert message in capsys.readouterr().err


def test_columns_count_wide_letters_and_spell_controls() -> None:
    wrapped = command._wrapped("日本語のテキスト" * 4 + " \x1b[31mred", 20)
    assert all(command._cells(line) <= 20 for line in wrapped)
    assert "".join(wrapped).replace(" ", "") == "日本語のテキスト" * 4 + "\\x1b[31mred"
