"""What a chat template leaves out of messages, never ends, or opens before the model writes (templates of TRL)."""

import logging

import pytest
from data_helpers import answer, chat_pair, turns
from datasets import Dataset

from dpo_peft.data import prepare_dataset
from dpo_peft.errors import DataError

PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def prepare(rows, tokenizer, **options):
    return prepare_dataset(Dataset.from_list(rows), tokenizer, load_from_cache_file=False, **options)


def texts(rows, tokenizer, **options):
    """Prompt, chosen and rejected of the first row as text, and the summary."""
    prepared, summary = prepare(rows, tokenizer, **options)
    return *map(tokenizer.decode, [prepared[0]["prompt_ids"], *prepared[0]["completion_ids"]]), summary


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
@pytest.mark.parametrize("name", ["qwen2_5", "llama3", "phi3"])
def test_reasoning_that_the_template_leaves_out_is_an_error(template_tokenizer, name, key):
    odd = {**chat_pair(), "rejected": [{**answer("Seven.")[0], key: "I guess"}]}
    with pytest.raises(DataError) as error:
        prepare([chat_pair(), odd], template_tokenizer(name))
    text = str(error.value)
    assert f"train row 1, field 'rejected[0]': the chat template leaves '{key}' out" in text
    assert "Remedy: use a chat template that renders it, or put the text into 'content'" in text
    assert f"remove '{key}' from the messages" in text


def test_rows_that_differ_in_lost_reasoning_alone_are_no_identical_pair(template_tokenizer):
    sides = {side: [{**answer("42")[0], "reasoning_content": side}] for side in ("chosen", "rejected")}
    with pytest.raises(DataError, match=r"field 'chosen\[0\]': the chat template leaves 'reasoning_content' out"):
        prepare([{**chat_pair(), **sides}], template_tokenizer("qwen2_5"))


@pytest.mark.parametrize("name", ["qwen3", "glm4moe", "qwen3_5_think", "gptoss"])
def test_reasoning_that_the_template_renders_is_trained_on(template_tokenizer, name):
    row = {**chat_pair(), "chosen": [{**answer("Blue.")[0], "reasoning_content": "as the sky"}]}
    _, chosen, _, summary = texts([row], template_tokenizer(name))
    assert "as the sky" in chosen and not summary.left_out


def test_keys_without_text_of_the_model_are_counted(make_tokenizer):
    user = {**turns("Name a color.")[0], "name": "Ann"}
    history = [user, {"role": "assistant", "content": "Which?", "thinking": "hm", "weight": 1}, *turns("Any.")]
    tool = [{"role": "tool", "content": "5", "tool_call_id": "abc"}]
    rows = [
        chat_pair(),
        {**chat_pair(), "prompt": history},
        {**chat_pair(), "prompt": [user]},
        {**chat_pair(), "prompt": [*turns("a", "b"), *tool]},
    ]
    summary = prepare(rows, make_tokenizer(chat_template=PLAIN))[1]
    wanted = {"assistant.thinking": 1, "assistant.weight": 1, "tool.tool_call_id": 1, "user.name": 2}
    assert summary.left_out == wanted
    assert "left out by the chat template: " in str(summary) and "user.name (2 rows)" in str(summary)


def test_keys_that_a_template_reads_are_not_counted(make_tokenizer):
    strict = PLAIN.replace(
        "{{ m['content'] }}",
        "{% if m.tool_call_id is defined and m.tool_call_id | length != 9 %}{{ raise_exception('id') }}{% endif %}"
        "{{ m['name'] | upper if m.name else '' }}{% if m.flags %}!{% endif %}{{ m['content'] }}",
    )
    user = {**turns("Hi")[0], "name": "Ann", "flags": [1]}
    tool = {"role": "tool", "content": "5", "tool_call_id": "abcdefghi"}
    prompt, _, _, summary = texts(
        [{**chat_pair(), "prompt": [user, *answer("b"), tool]}], make_tokenizer(chat_template=strict)
    )
    assert "ANN!Hi" in prompt and not summary.left_out


def test_empty_keys_hold_nothing_to_leave_out(make_tokenizer):
    row = {**chat_pair(), "chosen": [{**answer("Blue.")[0], "reasoning_content": " ", "name": ""}]}
    assert prepare([row, chat_pair()], make_tokenizer(chat_template=PLAIN))[1].left_out == {}
    later = {**chat_pair(), "chosen": [{**answer("Blue.")[0], "reasoning_content": "hm", "name": ""}]}
    with pytest.raises(DataError, match=r"train row 1, field 'chosen\[0\]'"):  # of another shape than row 0
        prepare([row, later], make_tokenizer(chat_template=PLAIN))


@pytest.mark.parametrize("cut", ["m['content'].split('</think>')[-1]", "'' if m.tool_calls else m['content']"])
def test_content_that_the_template_cuts_is_an_error_in_completions(make_tokenizer, cut):
    template = PLAIN.replace("m['content'] }}", f"({cut}) if m['role'] == 'assistant' else m['content'] }}}}").replace(
        "<|im_end|>", "{% if m.tool_calls %}{{ m.tool_calls }}{% endif %}<|im_end|>"
    )
    call = [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]
    said = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nBlue.", "tool_calls": call}
    tokenizer = make_tokenizer(chat_template=template)
    with pytest.raises(DataError, match=r"row 1, field 'chosen\[0\]': the chat template leaves 'content' of the"):
        prepare([chat_pair(), {**chat_pair(), "chosen": [said]}], tokenizer)
    earlier = {**chat_pair(), "prompt": [*turns("Hi"), said, *turns("And?")]}  # given: thoughts are usually cut there
    assert prepare([earlier], tokenizer)[1].left_out == {"assistant.content": 1}


@pytest.mark.parametrize("turns_lost", [5, 150])
def test_what_is_left_out_of_every_turn_costs_no_rendering_each(make_tokenizer, monkeypatch, turns_lost):
    prompt = [{**message, "name": "n", "thinking": "t"} for message in turns(*["a"] * (2 * turns_lost + 1))]
    tokenizer, calls = make_tokenizer(chat_template=PLAIN), []
    original = type(tokenizer).apply_chat_template
    monkeypatch.setattr(
        type(tokenizer), "apply_chat_template", lambda *args, **kwargs: calls.append(0) or original(*args, **kwargs)
    )
    summary = prepare([{**chat_pair(), "prompt": prompt}], tokenizer, max_length=None)[1]
    assert len(summary.left_out) == 4 and len(calls) <= 30


@pytest.mark.parametrize("name", ["glm4moe", "plain"])
def test_turns_that_the_template_never_ends_are_counted_and_warned_of_once(
    template_tokenizer, make_tokenizer, caplog, name
):
    endless = "{% for m in messages %}{{ m['role'] | upper }}: {{ m['content'] }}\n{% endfor %}ASSISTANT:"
    endless = endless.replace("ASSISTANT:", "{% if add_generation_prompt %}ASSISTANT:{% endif %}")
    tokenizer = make_tokenizer(chat_template=endless) if name == "plain" else template_tokenizer(name)
    rows = [chat_pair(), chat_pair("Hi", "Ho", "Ha"), {**chat_pair(), "prompt": turns("a", "b", "c")}]
    with caplog.at_level(logging.WARNING, "dpo_peft"):
        prepared, summary = prepare_dataset(Dataset.from_list(rows).to_iterable_dataset(), tokenizer, "endless")
        for _ in range(2):
            assert len(list(prepared)) == 3 and summary.unended == 6
    assert "6 completions end without an end token" in str(summary)
    assert [r.getMessage()[:50] for r in caplog.records] == ["endless: the chat template ends the assistant's tu"]


@pytest.mark.parametrize("name", ["glm4moe_training", "qwen2_5", "llama3", "gptoss", "deepseek_r1_distill", "gemma3"])
def test_turns_that_the_template_ends_are_not_counted(template_tokenizer, caplog, name):
    assert prepare([chat_pair()], template_tokenizer(name))[1].unended == 0 and not caplog.records


OPEN = "<｜Assistant｜><think>\n"
R1 = "<｜end▁of▁sentence｜>"


@pytest.mark.parametrize(
    ("name", "content", "opened", "wanted"),
    [
        ("deepseek_r1_distill", "42", OPEN, f"\n</think>\n\n42{R1}"),
        ("deepseek_r1_distill", "<think>\nsixes\n</think>\n\n42", OPEN, f"sixes\n</think>\n\n42{R1}"),
        ("deepseek_r1_distill", "sixes\n</think>\n\n42", OPEN, f"sixes\n</think>\n\n42{R1}"),  # as it was generated
        ("deepseek_r1_distill_training", "<think>\nsixes\n</think>\n\n42", OPEN, f"sixes\n</think>\n\n42{R1}"),
        ("deepseekv3", "42", OPEN, f"\n</think>\n\n42{R1}"),
        ("nemotron_3_nano", "42", "assistant\n<think>\n", "</think>42<|im_end|>\n"),
        (
            "nemotron_3_nano",
            "<think>\nsixes\n</think>\n\n42",
            "assistant\n<think>\n",
            "sixes\n</think>\n\n42<|im_end|>\n",
        ),
        ("nemotron_3_nano", "sixes\n</think>\n42", "assistant\n<think>\n", "sixes\n</think>\n42<|im_end|>\n"),
        ("qwen3_5_think", "42", "assistant\n<think>\n", "\n</think>\n\n42<|im_end|>\n"),
    ],
)
def test_a_block_that_the_generation_prompt_opens_belongs_to_the_prompt(
    template_tokenizer, name, content, opened, wanted
):
    tokenizer = template_tokenizer(name)
    row = chat_pair("6 times 7?", content, "41")
    prompt, chosen, rejected, summary = texts([chat_pair(), row][1:], tokenizer)
    fed = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
    assert prompt == tokenizer.decode(tokenizer(fed, add_special_tokens=False)["input_ids"])
    assert prompt.endswith(opened) and chosen == wanted and "</think>" in rejected and not summary.left_out


def test_thoughts_that_an_own_template_closes_before_the_text_come_back(make_tokenizer):
    """As DeepSeek V3.1: the generation prompt opens the block, earlier turns show its end alone."""
    template = PLAIN.replace(
        "{{ m['content'] }}",
        "{{ '</think>' if m['role'] == 'assistant' else '' }}{{ m['content'].split('</think>')[-1] }}",
    ).replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
    tokenizer = make_tokenizer(chat_template=template)
    prompt, chosen, rejected, _ = texts([chat_pair("q", "<think>hm</think>Blue.", "Red.")], tokenizer)
    assert prompt.endswith("assistant\n<think>")
    assert (chosen, rejected) == ("hm</think>Blue.<|im_end|>\n", "</think>Red.<|im_end|>\n")


@pytest.mark.parametrize("key", ["chat_template", "strftime_now", "messages", "raise_exception", "eos_token"])
def test_template_arguments_that_replace_what_is_rendered_are_refused(make_tokenizer, key):
    row = {**chat_pair(), "chat_template_kwargs": {key: "{{ messages }}"}}
    with pytest.raises(DataError, match=f"row 0, field 'chat_template_kwargs': '{key}' is set by the pipeline"):
        prepare([row], make_tokenizer())


@pytest.mark.parametrize("parts", [[""], ["", " \n"]])
def test_empty_parts_are_an_empty_completion(make_tokenizer, parts):
    template = PLAIN.replace(
        "{{ m['content'] }}",
        "{% if m.content is string %}{{ m.content }}{% else %}{{ m.content | join('', 'text') }}{% endif %}",
    )

    def said(*texts):
        return [{"role": "assistant", "content": [{"type": "text", "text": text} for text in texts]}]

    rows = [{**chat_pair(), "chosen": said("Blue."), "rejected": said("Red", ".")}]
    rows.append({**rows[0], "rejected": said(*parts)})
    prepared, summary = prepare(rows, make_tokenizer(chat_template=template))
    assert summary.dropped == {"empty_completion": 1} and prepared["row"][:] == [0]
