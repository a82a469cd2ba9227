"""Where answer-only adapters begin: the tokens are found in every prompt, where PEFT looks for them, and rows without
them are refused by name."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from data_helpers import GEMMA_LIKE, LLAMA3_LIKE, THINK_LIKE, answer, chat_pair, pair, turns, word_tokenizer
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from peft.tuners.lora.variants import calculate_alora_offsets
from transformers import AutoTokenizer

from dpo_peft import DataError, OptionError, answer_only, prepare_dataset
from dpo_peft.forward.scope import invocation_start

# Closes the user's turn itself, and has no generation prompt.
MISTRAL_LIKE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)
OWN = {"llama 3": LLAMA3_LIKE, "gemma": GEMMA_LIKE, "think": THINK_LIKE, "mistral": MISTRAL_LIKE, "chatml": None}
REAL = ("smollm2", "minimind-6400")
TEXTS = ("Name a color.", "the", "", " 7 ", "An and\n\n", "x!!", "<|im_end|>", "水")


@pytest.fixture(params=[*OWN, *REAL])
def tokenizer(request: Any, make_tokenizer: Callable[..., Any], tokenizer_dir: Any) -> Any:
    if request.param in REAL:
        return AutoTokenizer.from_pretrained(tokenizer_dir(request.param))
    made = make_tokenizer()
    made.chat_template = OWN[request.param] or made.chat_template
    return made


def conversations(tokenizer: Any) -> Dataset:
    """Pairs after one user turn, after several, and behind a system turn where the template takes one."""
    prompts = [turns(text or "a") for text in TEXTS]
    prompts += [turns(text or "b", "Fine.\n", "And a tree?") for text in TEXTS]
    if "no system" not in tokenizer.chat_template:
        prompts += [turns(text or "c", system="Be brief.\n") for text in TEXTS]
    return Dataset.from_list(
        [{"prompt": one, "chosen": answer(" the"), "rejected": answer("An answer\n")} for one in prompts]
    )


def peft_offsets(tokens: list[int], rows: torch.Tensor) -> list[int | None]:
    """What PEFT counts back from each row's end."""
    config = LoraConfig(alora_invocation_tokens=tokens, task_type="CAUSAL_LM")
    return calculate_alora_offsets({"default": config}, "default", rows)


def test_every_prompt_ends_with_the_tokens_and_peft_begins_there(tokenizer: Any) -> None:
    tokens, rows = answer_only(tokenizer), conversations(tokenizer)
    prepared, summary = prepare_dataset(rows, tokenizer, invocation=tokens, max_length=None)
    assert summary.kept_rows == len(rows)
    assert all(row["prompt_ids"][-len(tokens) :] == tokens for row in prepared)
    wholes = [row["prompt_ids"] + ids for row in prepared for ids in row["completion_ids"]]
    size, pad = max(map(len, wholes)), tokenizer.pad_token_id
    left = torch.tensor([[pad] * (size - len(ids)) + ids for ids in wholes])
    offsets = peft_offsets(tokens, left)
    starts = [invocation_start(row["prompt_ids"], tokens) for row in prepared for _ in row["completion_ids"]]
    assert [len(ids) - at for ids, at in zip(wholes, starts, strict=True)] == offsets
    # Control: where no text of the template's own is left, rows of the same texts are refused.
    with pytest.raises(DataError, match="row 0, field 'prompt': does not hold"):
        plain = Dataset.from_list([pair()] * 3)
        prepare_dataset(plain, tokenizer, invocation=tokens)


def test_the_tokens_are_those_that_the_template_adds(make_tokenizer: Callable[..., Any]) -> None:
    found = {}
    for name, template in OWN.items():
        made = make_tokenizer()
        made.chat_template = template or made.chat_template
        found[name] = made.decode(answer_only(made))
    assert found == {
        "llama 3": "<|im_start|>assistant\n\n",
        "gemma": "<|im_start|>model\n",
        "think": "<|im_start|>assistant\n",
        "mistral": " [/INST]",
        "chatml": "<|im_start|>assistant\n",
    }


def test_thinking_turned_off_in_a_row_lengthens_its_prompt_behind_the_tokens(make_tokenizer: Any) -> None:
    made = make_tokenizer()
    made.chat_template = THINK_LIKE
    tokens = answer_only(made)
    rows = Dataset.from_list([{**chat_pair(), "chat_template_kwargs": {"enable_thinking": False}}])
    (row,) = prepare_dataset(rows, made, invocation=tokens)[0]
    at = invocation_start(row["prompt_ids"], tokens)
    assert made.decode(row["prompt_ids"][at:]) == "<|im_start|>assistant\n<think>\n\n</think>\n\n"


@pytest.mark.parametrize("text", ["Answer:", "\nAnswer:", " the end", "!!", "\n\nAssistant:"])
def test_a_text_of_the_users_own_is_found_where_prompts_end_with_it(make_tokenizer: Any, text: str) -> None:
    made = make_tokenizer()
    tokens = answer_only(made, text)
    starts = ["Is it 7?", "the", "x"] if text[0].isspace() else ["Is it 7?\n", "the\n\n"]
    rows = Dataset.from_list([pair(start + text, " in", " an") for start in starts])
    prepared, _ = prepare_dataset(rows, made, invocation=tokens, as_chat=False)
    assert all(row["prompt_ids"][-len(tokens) :] == tokens for row in prepared)
    assert made.decode(tokens).strip() == text.strip()
    made.chat_template = None
    assert answer_only(made, text) == tokens
    with pytest.raises(OptionError, match='adapter_invocation="Answer:"'):
        answer_only(made)


def test_a_template_that_refuses_everything_is_named(make_tokenizer: Any) -> None:
    made = make_tokenizer()
    made.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(OptionError, match="never"):
        answer_only(made)
    made.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(OptionError, match="adapter_invocation: the chat template puts nothing"):
        answer_only(made)


def test_a_completion_where_the_adapter_would_begin_anew_is_refused(make_tokenizer: Any) -> None:
    """Its earlier turns would be the base's: PEFT acts from the last place on."""
    made = make_tokenizer()
    tokens = answer_only(made)
    several = {**chat_pair(), "rejected": [*answer("Blue?"), *turns("Sure?", "No.")]}
    for stream in (False, True):
        rows: Any = Dataset.from_list([chat_pair("a"), several])
        rows = IterableDataset.from_generator(lambda: iter([chat_pair("a"), several])) if stream else rows
        with pytest.raises(DataError, match=r"row 1, field 'rejected': holds .*assistant.*Remedy: put the earlier"):
            list(prepare_dataset(rows, made, invocation=tokens)[0])
        prepared, _ = prepare_dataset(rows, made)  # control
        whole = [ids for row in prepared for ids in row["completion_ids"]][-1]
        assert invocation_start(whole, tokens) is not None


def test_tokens_across_the_border_are_found() -> None:
    """[5, 6] stands in the prompt, and again where the prompt's last token meets the completion's first."""
    made = word_tokenizer()
    rows = Dataset.from_list([{"prompt_ids": [5, 6, 5], "chosen_ids": [6, 7], "rejected_ids": [7]}])
    with pytest.raises(DataError, match="row 0, field 'chosen_ids': holds"):
        prepare_dataset(rows, made, invocation=[5, 6])
    prepare_dataset(rows, made, invocation=[5])  # control: a single token can't
    assert peft_offsets([5, 6], torch.tensor([[5, 6, 5, 6, 7]])) == [
        3
    ]  # PEFT would begin in the middle of the prompt's end


def test_truncation_that_takes_the_tokens_is_counted(make_tokenizer: Any) -> None:
    """The prompt loses its start: its end is lost only where a completion leaves no room for it."""
    made = make_tokenizer()
    tokens = answer_only(made)
    rows = Dataset.from_list([chat_pair(), chat_pair(chosen="the " * 40)])
    whole, _ = prepare_dataset(rows, made, max_length=None)
    size = len(whole[1]["completion_ids"][0])
    kept, summary = prepare_dataset(rows, made, "t", size + len(tokens), "keep_end", invocation=tokens)
    assert summary.dropped == {} and kept[1]["prompt_ids"] == tokens
    kept, summary = prepare_dataset(rows, made, "t", size + len(tokens) - 1, "keep_end", invocation=tokens)
    assert summary.dropped == {"invocation_cut": 1} and list(kept["row"]) == [0]
    with pytest.raises(DataError, match=r"invocation_cut.*keep_start"):
        prepare_dataset(rows, made, "t", size + len(tokens) - 1, "keep_end", invocation=tokens, on_unusable="error")
    control, _ = prepare_dataset(rows, made, "t", size + len(tokens) - 1, "keep_end")
    assert len(control) == 2


def test_trajectories_of_one_turn_are_taken_and_of_several_refused(make_tokenizer: Any) -> None:
    made = make_tokenizer()
    tokens = answer_only(made)
    one = {"chosen": turns("Sure?", "Yes."), "rejected": turns("Sure?", "No.")}
    prepared, _ = prepare_dataset(Dataset.from_list([one]), made, data="trajectories", invocation=tokens)
    assert invocation_start(prepared[0]["prompt_ids"], tokens) is not None
    two = {"chosen": turns("Sure?", "Yes.", "Why?", "So."), "rejected": turns("Sure?", "No.", "Why?", "An.")}
    with pytest.raises(DataError, match="row 0, field 'chosen': holds"):
        prepare_dataset(Dataset.from_list([two]), made, data="trajectories", invocation=tokens)
