"""Conversations: golden renderings, what templates do to them, and TRL as the oracle (traps T14, T26)."""

import json

import pytest
from data_helpers import (
    GEMMA_LIKE,
    LLAMA3_LIKE,
    THINK_LIKE,
    answer,
    assert_same_as_trl,
    chat_pair,
    trl_prepare,
    turns,
)
from datasets import Dataset

from dpo_peft.data import prepare_dataset
from dpo_peft.errors import DataError

TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "d", "parameters": {"type": "object", "properties": {}}},
}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}],
}


def prepare_texts(tokenizer, row, **options):
    """The row's prompt, chosen and rejected as text again, and the report."""
    prepared, report = prepare_dataset(Dataset.from_list([row]), tokenizer, **options)
    ids = [prepared[0]["prompt_ids"], *prepared[0]["completion_ids"]]
    return *(tokenizer.decode(x) for x in ids), report


def test_golden_chatml(make_tokenizer):
    row = {"prompt": turns("Hi", "Ho", "Hm?", system="Be kind."), "chosen": answer("Yes."), "rejected": answer("No.")}
    prompt, chosen, rejected, report = prepare_texts(make_tokenizer(), row)
    assert prompt == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n"
        "<|im_start|>user\nHm?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (chosen, rejected) == ("Yes.<|im_end|>\n", "No.<|im_end|>\n")
    assert report.format == "chat"


@pytest.mark.parametrize("as_json", [True, False])
def test_golden_tools_and_system(make_tokenizer, as_json):  # T26
    tools = [TOOL]
    row = {"prompt": turns("Rain?", system="S"), "chosen": [CALL], "rejected": answer("No idea.")}
    row["tools"] = json.dumps(tools) if as_json else tools
    # Arrow keeps an empty "properties" struct out of a list column, so the list form has one property.
    if not as_json:
        row["tools"][0] = {"type": "function", "function": {"name": "weather"}}
    prompt, chosen, rejected, _ = prepare_texts(make_tokenizer(), row)
    shown = json.dumps(tools if as_json else row["tools"], separators=(", ", ": "))
    assert prompt == (
        f"<|im_start|>system\ntools: {shown}<|im_end|>\n<|im_start|>system\nS<|im_end|>\n"
        "<|im_start|>user\nRain?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert chosen == json.dumps(CALL["tool_calls"]) + "<|im_end|>\n"
    assert rejected == "No idea.<|im_end|>\n"


def test_golden_tools_of_a_real_template(tokenizer_dir):  # T26
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir("minimind-6400"))
    history = [*turns("Rain?", system="S"), CALL, {"role": "tool", "content": "dry"}]
    row = {"prompt": history, "chosen": answer("It is dry."), "rejected": answer("It rains.")}
    prompt, chosen, rejected, _ = prepare_texts(tokenizer, {**row, "tools": json.dumps([TOOL])})
    assert prompt.startswith("<|im_start|>system\nS\n\n# Tools\n\nYou may call one or more functions")
    assert json.dumps(TOOL) in prompt
    assert prompt.endswith(
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\ndry\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    assert (chosen, rejected) == ("It is dry.<|im_end|>\n", "It rains.<|im_end|>\n")


@pytest.mark.parametrize(
    ("template", "row", "field"),
    [
        ("{% for m in messages %}{{ m['content'] }}|{% endfor %}", {"tools": json.dumps([TOOL])}, "tools"),
        (
            "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}|{% endfor %}",
            {"prompt": turns("Hi", system="Be kind.")},
            "prompt[0]",
        ),
        ("{% for m in messages %}{{ m['content'] }}|{% endfor %}", {"chosen": [CALL]}, "chosen[0]"),
        (
            "{% for m in messages %}{{ m['content'] }}|{% endfor %}",
            {"chosen": [{**CALL, "content": "Let me see."}]},
            "chosen[0]",
        ),
    ],
)
def test_what_the_template_leaves_out_is_an_error(make_tokenizer, template, row, field):  # T26
    rows = [{**chat_pair(), "tools": None}, {**chat_pair(), **row}]
    with pytest.raises(DataError) as error:
        prepare_dataset(Dataset.from_list(rows), make_tokenizer(chat_template=template))
    assert f"train row 1, field '{field}'" in str(error.value) and "leaves" in str(error.value)
    assert "Remedy: use a" in str(error.value)


def test_a_turn_that_the_template_rewrites_is_not_left_out(make_tokenizer):
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{{ m['content'].replace('/no_think', '') | upper }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    row = {**chat_pair(), "prompt": turns("Hi", system="/no_think")}
    assert prepare_texts(make_tokenizer(chat_template=template), row)[1] == "BLUE.<|im_end|>\n"


def test_llama3_like_template_strips_and_needs_no_pad(make_tokenizer):
    tokenizer = make_tokenizer(add_bos=True, chat_template=LLAMA3_LIKE)
    tokenizer.pad_token = None
    prompt, chosen, rejected, _ = prepare_texts(tokenizer, chat_pair("  Hi \n", "  Blue. ", "\nRed."))
    assert prompt == "<s><|im_start|>user\n\nHi<|im_end|><|im_start|>assistant\n\n"  # BOS once
    assert (chosen, rejected) == ("Blue.<|im_end|>", "Red.<|im_end|>")


def test_gemma_like_template_folds_the_system_turn(make_tokenizer):
    tokenizer = make_tokenizer(chat_template=GEMMA_LIKE)
    row = {**chat_pair(), "prompt": turns("Hi", system="Be kind.")}
    prompt, chosen, _, _ = prepare_texts(tokenizer, row)
    assert prompt == "<s><|im_start|>user\nBe kind.\n\nHi<|im_end|>\n<|im_start|>model\n"
    assert chosen == "Blue.<|im_end|>\n"


def test_template_refusal_names_row_and_roles_before_tokenizing(make_tokenizer, monkeypatch):
    twice = {**chat_pair(), "prompt": [*turns("Hi"), *turns("Ho")]}
    monkeypatch.setattr("dpo_peft.data.worker.RowWorker.record_batch", None)  # the second pass must not be reached
    with pytest.raises(DataError) as error:
        prepare_dataset(Dataset.from_list([chat_pair(), twice]), make_tokenizer(chat_template=GEMMA_LIKE), name="eval")
    assert "eval row 1, field 'prompt'" in str(error.value)
    assert "refuses this conversation (user, user)" in str(error.value) and "must alternate" in str(error.value)
    assert "Remedy: reorder, merge" in str(error.value)


def test_empty_think_block_of_the_last_answer(make_tokenizer):
    """As qwen3: the block is part of the completion, or of the prompt when thinking is turned off."""
    tokenizer = make_tokenizer(chat_template=THINK_LIKE)
    row = {**chat_pair(), "prompt": turns("a", "b", "c")}
    prompt, chosen, _, _ = prepare_texts(tokenizer, row)
    assert prompt.endswith(
        "<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
    )
    assert chosen == "<think>\n\n</think>\n\nBlue.<|im_end|>\n"
    off = {**row, "chat_template_kwargs": {"enable_thinking": False}}
    prompt, chosen, _, _ = prepare_texts(tokenizer, off)
    assert prompt.endswith("<think>\n\n</think>\n\n") and chosen == "Blue.<|im_end|>\n"


def test_generation_prompt_that_training_drops_is_an_error(make_tokenizer):  # T14
    lost = THINK_LIKE.replace("{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}", "")
    row = {**chat_pair(), "chat_template_kwargs": {"enable_thinking": False}}
    tokenizer = make_tokenizer(chat_template=lost)
    with pytest.raises(DataError) as error:
        prepare_dataset(Dataset.from_list([row]), tokenizer)
    message = str(error.value)
    assert "train row 0, field 'chosen': the prompt's tokens are not the start" in message
    assert "'<think>\\n\\n</thi" in message and "'Blue.<|im_end|>" in message and "chat template" in message
    theirs = trl_prepare(Dataset.from_list([row]), tokenizer)[0]["prompt_ids"]  # the peer trains on another prompt
    assert tokenizer.decode(theirs).endswith("<|im_start|>assistant\n")


def test_token_that_crosses_the_generation_prompt(make_tokenizer):  # T14: text is a prefix, tokens are not
    tokenizer = make_tokenizer()
    prompt, chosen, rejected, report = prepare_texts(tokenizer, chat_pair(chosen="\nBlue.", rejected="Red."))
    assert prompt.endswith("assistant\n") and chosen == "\nBlue.<|im_end|>\n"
    assert report.boundary_resplits == 1  # "\n\n" is one token of this tokenizer


def test_prompt_that_ends_with_the_assistant_is_continued(make_tokenizer):
    row = {"prompt": turns("Color?", "The sky is"), "chosen": answer(" blue."), "rejected": answer(" seven.")}
    prompt, chosen, rejected, _ = prepare_texts(make_tokenizer(), row)
    assert prompt == "<|im_start|>user\nColor?<|im_end|>\n<|im_start|>assistant\nThe sky is"
    assert (chosen, rejected) == (" blue.<|im_end|>\n", " seven.<|im_end|>\n")


def test_implicit_conversation(make_tokenizer):
    row = {"chosen": turns("Hi", "Ho", "Hm?", "Yes."), "rejected": turns("Hi", "Ho", "Hm?", "No.")}
    explicit = {"prompt": turns("Hi", "Ho", "Hm?"), "chosen": answer("Yes."), "rejected": answer("No.")}
    tokenizer = make_tokenizer()
    assert prepare_texts(tokenizer, row)[:3] == prepare_texts(tokenizer, explicit)[:3]
    # Some public sets repeat the question as text beside whole conversations.
    *texts, report = prepare_texts(tokenizer, {**row, "prompt": "Hm?"})
    assert tuple(texts) == prepare_texts(tokenizer, explicit)[:3]
    assert report.format == "chat_implicit" and report.unused_columns == ("prompt",)


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        (turns("Hi", "Yes."), turns("Hello", "No."), "no_common_prompt"),
        (turns("Hi", "Ho", "Hm?", "Yes."), turns("Hi", "Ho", "Ha?", "No."), "transcripts_differ"),
        (turns("Hi", "Ho", "Hm?", "Yes."), turns("Hi", "No."), "transcripts_differ"),
        (turns("Hi", "Yes."), turns("Hi", "Yes."), "identical_completions"),
        (turns("Hi", "Yes."), turns("Hi", " "), "empty_completion"),
    ],
)
def test_implicit_conversations_without_signal(make_tokenizer, chosen, rejected, reason):
    good = {"chosen": turns("Hi", "Yes."), "rejected": turns("Hi", "No.")}
    rows = [good, {"chosen": chosen, "rejected": rejected}]
    prepared, report = prepare_dataset(Dataset.from_list(rows), make_tokenizer())
    assert report.dropped == {reason: 1} and report.dropped_rows == {reason: [1]} and prepared["row"][:] == [0]


def test_null_fields_that_arrow_adds_are_not_rendered(make_tokenizer):
    """A tool call beside a plain answer makes Arrow add content=None and tool_calls=None to the others."""
    silent = {"role": "assistant", "tool_calls": CALL["tool_calls"]}
    rows = [
        {**chat_pair(), "chosen": [silent], "chat_template_kwargs": {"a": 1}},
        {**chat_pair(), "chat_template_kwargs": {"b": 2}},
    ]
    dataset = Dataset.from_list(rows)
    assert dataset[1]["chosen"][0]["tool_calls"] is None and dataset[1]["chat_template_kwargs"]["a"] is None
    template = (
        "{{ a is defined }}{{ b is defined }}{% for m in messages %}{{ m['role'] }}:"
        "{% if 'tool_calls' in m %}{{ m['tool_calls'][0]['function']['name'] }}{% endif %}"
        "{% if 'content' in m %}{{ m['content'] }}{% endif %};{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokenizer = make_tokenizer(chat_template=template)
    prepared, _ = prepare_dataset(dataset, tokenizer)
    texts = [[tokenizer.decode(ids) for ids in [r["prompt_ids"], *r["completion_ids"]]] for r in prepared]
    assert texts[0] == ["TrueFalseuser:Name a color.;assistant:", "weather;", "Seven.;"]
    assert texts[1] == ["FalseTrueuser:Name a color.;assistant:", "Blue.;", "Seven.;"]


@pytest.mark.parametrize("template", ["chatml", LLAMA3_LIKE, GEMMA_LIKE, THINK_LIKE])
def test_same_ids_as_trl_with_every_template(make_tokenizer, template):
    options = {} if template == "chatml" else {"chat_template": template}
    tokenizer = make_tokenizer(**options)
    rows = [
        chat_pair(),
        {**chat_pair(), "prompt": turns("a", "b", "c", system="Sei nett: äöü")},
        {"prompt": turns("x"), "chosen": answer("the one\n\nthe two "), "rejected": answer("日本 and on")},
    ]
    dataset = Dataset.from_list(rows)
    assert_same_as_trl(prepare_dataset(dataset, tokenizer)[0], trl_prepare(dataset, tokenizer))


def test_same_ids_as_trl_with_tools_and_template_kwargs(make_tokenizer):
    rows = [{**chat_pair(), "tools": json.dumps([TOOL])}]
    dataset = Dataset.from_list(rows)
    tokenizer = make_tokenizer()
    assert_same_as_trl(prepare_dataset(dataset, tokenizer)[0], trl_prepare(dataset, tokenizer))
    dataset = Dataset.from_list([{**chat_pair(), "chat_template_kwargs": {"enable_thinking": False}}])
    tokenizer = make_tokenizer(chat_template=THINK_LIKE)
    assert_same_as_trl(prepare_dataset(dataset, tokenizer)[0], trl_prepare(dataset, tokenizer))


def test_null_arguments_that_arrow_adds_to_tool_calls_are_not_rendered(make_tokenizer):
    def call(**arguments):
        return {**CALL, "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": arguments}}]}

    calls = call(city="Rome"), call(town="Oslo")
    dataset = Dataset.from_list([{**chat_pair(), "chosen": [message]} for message in calls])
    assert dataset[0]["chosen"][0]["tool_calls"][0]["function"]["arguments"] == {"city": "Rome", "town": None}
    tokenizer = make_tokenizer()
    chosen = tokenizer.decode(prepare_dataset(dataset, tokenizer)[0][0]["completion_ids"][0])
    assert '"arguments": {"city": "Rome"}' in chosen and "town" not in chosen


def test_completion_of_several_turns_is_as_in_trl_and_reported(make_tokenizer):
    row = {"prompt": turns("Rain?"), "chosen": [CALL, {"role": "tool", "content": "dry"}, *answer("No.")]}
    dataset, tokenizer = Dataset.from_list([{**row, "rejected": answer("Yes.")}]), make_tokenizer()
    prepared, report = prepare_dataset(dataset, tokenizer)
    assert_same_as_trl(prepared, trl_prepare(dataset, tokenizer))
    assert report.foreign_turns == 1 and "1 completions hold user or tool turns" in str(report)


def test_no_chat_template_is_found_up_front(make_tokenizer, monkeypatch):
    monkeypatch.setattr("dpo_peft.data.worker.RowWorker.check_batch", None)
    with pytest.raises(DataError, match="train: .*no chat template. Set tokenizer.chat_template"):
        prepare_dataset(Dataset.from_list([chat_pair()]), make_tokenizer(chat_template=None))
