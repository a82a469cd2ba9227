"""What the data tests share: TRL's own preparation as the oracle, and stand-ins for the quirks of real templates."""

from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from trl import DPOTrainer

from dpo_peft import DataError

# Strips the text of a turn, opens with BOS, closes turns with its own end token.
LLAMA3_LIKE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n\n{{ m['content'] | trim }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)
# Folds the system turn into the user's, calls the assistant "model", insists on alternating turns.
GEMMA_LIKE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set head = messages[0]['content'] + '\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set head = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "<|im_start|>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{% if loop.first %}{{ head }}{% endif %}{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
# Puts an empty think block before the last answer only, and in the generation prompt when thinking is turned off.
THINK_LIKE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# ChatML that marks what the model writes, so that transformers can say which tokens those are.
GENERATION = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|im_end|>\n{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# "user a end assistant b end": every word one token of word_tokenizer.
WORDS_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} end {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def word_tokenizer(bos: bool = False, eos_appended: bool = False) -> PreTrainedTokenizerFast:
    """Words by whitespace: <unk> 0, <s> 1, </s> 2, a 3, b 4, c 5, d 6, user 7, assistant 8, end 9, system 10, …"""
    words = ["<unk>", "<s>", "</s>", "a", "b", "c", "d", "user", "assistant", "end", "system", "tool"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    single = ("<s> " if bos else "") + "$A" + (" </s>" if eos_appended else "")
    if bos or eos_appended:
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = WORDS_TEMPLATE
    return tokenizer


def trl_prepare(dataset: Dataset, tokenizer: Any, max_length: int | None = None) -> Dataset:
    """What TRL's trainer makes of a dataset: prompt_ids, chosen_ids, rejected_ids."""
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    args = SimpleNamespace(dataset_num_proc=None, max_length=max_length, truncation_mode="keep_start")
    return DPOTrainer._prepare_dataset(trainer, dataset, tokenizer, args, "train")


def assert_same_as_trl(prepared: Dataset, theirs: Dataset) -> None:
    assert len(prepared) == len(theirs)
    for ours, row in zip(prepared, theirs, strict=True):
        assert ours["prompt_ids"] == row["prompt_ids"], ours["row"]
        assert ours["completion_ids"] == [row["chosen_ids"], row["rejected_ids"]], ours["row"]


def turns(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    """Alternating user and assistant messages."""
    head = [{"role": "system", "content": system}] if system is not None else []
    return head + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def pair(prompt: str = "Name a color:", chosen: str = " blue", rejected: str = " seven") -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def chat_pair(prompt: str = "Name a color.", chosen: str = "Blue.", rejected: str = "Seven.") -> dict[str, Any]:
    return {"prompt": turns(prompt), "chosen": answer(chosen), "rejected": answer(rejected)}


def assert_third_row_refused(prepared: Any, field: str, problem: str, remedy: str) -> None:
    """Reading the stream stops at its row 2, with the field, what is wrong and what to do."""
    with pytest.raises(DataError) as error:
        list(prepared)
    assert type(error.value) is DataError
    where, _, rest = str(error.value).partition(": ")
    assert where == f"eval row 2, field '{field}'"
    assert problem in rest.split("Remedy: ")[0] and remedy in rest.split("Remedy: ")[1]
