"""Rows of text in the chat template: when, and that what was chosen is kept with the adapter."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from data_helpers import LLAMA3_LIKE, chat_pair, pair
from datasets import Dataset
from trainer_helpers import options, ours, text_pairs

from dpo_peft import DPOConfig, DPOTrainer, ImplicitReward
from dpo_peft.data import prepare_dataset
from dpo_peft.data.prompts import read_prompts
from dpo_peft.errors import DataError, OptionError
from dpo_peft.model.adapter_source import AdapterSource
from dpo_peft.model.training_record import RECORD, read_training
from dpo_peft.reward.rows import prepare_rows

TEXT = Dataset.from_list([pair(chosen="Blue.", rejected="Seven.", prompt="Name a color.")] * 3)
CHAT = Dataset.from_list([chat_pair()] * 3)


@pytest.mark.parametrize("template", [None, LLAMA3_LIKE])
def test_the_template_decides_if_nothing_is_given(
    template: str | None, make_tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = make_tokenizer(chat_template=template)
    with caplog.at_level(logging.INFO, "dpo_peft"):
        found, report = prepare_dataset(TEXT, tokenizer, as_chat=None)
    assert report.as_chat == (template is not None) == ("go into the chat template" in caplog.text)
    expected = prepare_dataset(TEXT if template is None else CHAT, tokenizer)[0]
    assert list(found) == list(expected)


@pytest.mark.parametrize(
    "prompt", ["<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "Question: why?\nAnswer:", "### Response:\n"]
)
def test_prompts_that_are_rendered_already_stay(
    prompt: str, make_tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = make_tokenizer()
    mixed = Dataset.from_list([pair(prompt)] * 3 + [pair("Plain.")])
    with caplog.at_level(logging.INFO, "dpo_peft"):
        found, report = prepare_dataset(mixed, tokenizer, as_chat=None)
    assert report.as_chat is False and "stay as they are" in caplog.text
    assert list(found) == list(prepare_dataset(mixed, tokenizer)[0])
    # Most prompts count: one that speaks of tokens changes nothing.
    most = Dataset.from_list([pair(prompt)] + [pair("Plain.")] * 3)
    assert prepare_dataset(most, tokenizer, as_chat=None)[1].as_chat is True
    if "<|im_start|>" in prompt:
        with pytest.raises(DataError, match="as_chat is true, and the prompts hold '<|im_"):
            prepare_dataset(mixed, tokenizer, as_chat=True)


def test_as_chat_without_effect_or_template_is_refused(tmp_path: Path, tiny_llama: Any, make_tokenizer: Any) -> None:
    with pytest.raises(OptionError, match="as_chat=True has no effect"):
        ours(tiny_llama(), CHAT, make_tokenizer(), tmp_path, as_chat=True)
    with pytest.raises(DataError, match="as_chat is true, and the tokenizer has no chat template"):
        prepare_dataset(TEXT, make_tokenizer(chat_template=None), as_chat=True)


@pytest.mark.parametrize("given", [None, False])
def test_an_adapter_reads_text_as_it_was_trained(
    given: bool | None, tmp_path: Path, tiny_llama: Any, make_tokenizer: Any
) -> None:
    """By scoring, pairs, the reward and a resumed run; one without the record was trained on text as it is."""
    tiny_llama().save_pretrained(tmp_path / "model")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    given_options = options(tmp_path / "out", as_chat=given, max_steps=2, save_strategy="steps", save_steps=1)

    def trainer(**changed: Any) -> DPOTrainer:
        args = DPOConfig(quantize_base=False, **{**given_options, **changed})
        return DPOTrainer(
            str(tmp_path / "model"), args=args, train_dataset=text_pairs(8), eval_dataset=text_pairs(2, 1)
        )

    run = trainer()
    chat = given is None
    as_trained = prepare_dataset(text_pairs(8), tokenizer, as_chat=chat)[0]
    assert list(run.train_dataset) == list(as_trained)
    assert list(run.eval_dataset) == list(prepare_dataset(text_pairs(2, 1), tokenizer, as_chat=chat)[0])
    run.train()
    run.save_model()
    setup = read_training(tmp_path / "out")
    assert setup is not None and setup.as_chat is chat
    assert list(prepare_rows(text_pairs(8), tokenizer, setup, None).prepared) == list(as_trained)
    row = text_pairs(8)[0]
    reward = ImplicitReward(AdapterSource(str(tmp_path / "out")))
    text = reward([row["prompt"]], [row["chosen"]])
    messages = reward([[{"role": "user", "content": row["prompt"]}]], [row["chosen"]])
    assert (text == messages) is chat
    prompts, _ = read_prompts(text_pairs(8), "prompts", as_chat=setup.as_chat, tokenizer=tokenizer)
    assert prompts[0].example.kind == ("chat" if chat else "text")
    # Resumed without the option: as its checkpoints record it.
    again = trainer(as_chat=None, resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    assert list(again.train_dataset) == list(as_trained)
    config = tmp_path / "out" / "adapter_config.json"
    old = json.loads(config.read_text())
    del old["auto_mapping"][RECORD]["as_chat"]
    config.write_text(json.dumps(old))
    assert read_training(tmp_path / "out").as_chat is False
