"""Rows and templates that somebody made to hang a run, to fill its memory, or to change how others are rendered."""

import inspect
import json
import threading
import time
from typing import Any

import pytest
from data_helpers import chat_pair
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from dpo_peft import rowfiles
from dpo_peft.data import chat, limits, prepare_dataset
from dpo_peft.data.fields import RESERVED_KWARGS
from dpo_peft.data.prompts import encode_completions, encode_prompts, read_prompts
from dpo_peft.errors import DataError
from dpo_peft.files import read_rows

ENDLESS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n"
    "{% if 'loop' in m.content %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    "{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
LOOPS = [{"role": "user", "content": "loop"}]


@pytest.fixture
def endless(make_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A tokenizer whose template never ends on some rows."""
    monkeypatch.setattr(chat, "TEMPLATE_SECONDS", 0.3)
    return make_tokenizer(chat_template=ENDLESS)


@pytest.mark.attack("hostile rows")
@pytest.mark.parametrize("workers", [None, 2])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_template_cannot_hang_a_run(endless: Any, workers: int | None, streaming: bool) -> None:
    if streaming and workers:
        pytest.skip("a stream is prepared in one process")
    rows = [chat_pair(), {**chat_pair(), "prompt": LOOPS}]
    dataset = IterableDataset.from_generator(lambda: iter(rows)) if streaming else Dataset.from_list(rows)
    with pytest.raises(DataError, match=r"train row 1, field 'prompt': .*takes more than 0.3 s, and may never end"):
        list(prepare_dataset(dataset, endless, num_proc=workers)[0])
    assert len(prepare_dataset(Dataset.from_list(rows[:1]), endless)[0]) == 1  # the control


@pytest.mark.attack("hostile rows")
def test_scoring_and_sampling_are_limited_too(endless: Any) -> None:
    prompts, _ = read_prompts(Dataset.from_list([{"prompt": LOOPS}]), "prompts")
    with pytest.raises(DataError, match="prompts row 0, .*may never end"):
        encode_prompts(endless, prompts, "prompts")
    with pytest.raises(Exception, match="may never end"):
        encode_completions(endless, [{"prompt": LOOPS, "completion": [{"role": "assistant", "content": "x"}]}])


@pytest.mark.attack("hostile rows")
def test_the_limit_is_of_computing_and_ends_with_what_it_limits() -> None:
    with limits.limited_time(0.05):
        time.sleep(0.2)  # waiting for others costs nothing
    until = time.process_time() + 0.2
    while time.process_time() < until:
        pass
    with pytest.raises(TimeoutError), limits.limited_time(0.05):
        try:
            while True:
                pass
        except Exception:  # what a template catches does not keep it alive
            pytest.fail("caught inside")


def test_another_thread_is_not_limited() -> None:
    """Signals come to the main thread alone."""
    done: list[bool] = []

    def work() -> None:
        with limits.limited_time(0.01):
            until = time.thread_time() + 0.05
            while time.thread_time() < until:
                pass
        done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]


def nested(depth: int) -> Any:
    return json.loads('{"a":' * depth + "1" + "}" * depth)


@pytest.mark.attack("hostile rows")
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("tools", json.dumps([nested(150)]), "nested more than 100 levels"),
        ("tools", "[" * 50_000 + "]" * 50_000, "no valid JSON"),
        ("chat_template_kwargs", json.dumps({"x": nested(150)}), "nested more than 100 levels"),
        ("prompt", [{"role": "user", "content": "x" * 2_000}], "too large"),
        ("prompt", [{"role": "user", "content": "x"}] * 900, "too large"),
        ("chosen", json.dumps([{"role": "assistant", "content": nested(150)}]), "nested more than 100|messages"),
        ("prompt", [{"role": "user", "content": [{"type": "image", "image": "x" * 900}]}], "there is no file"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_size_and_depth_are_bounded(
    make_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, field: str, value: Any, message: str
) -> None:
    if message == "too large":
        monkeypatch.setattr(limits, "MOST_CHARACTERS", 1_000)
        monkeypatch.setattr(limits, "MOST_VALUES", 3_000)
    rows: Any = [chat_pair(), {**chat_pair(), field: value}]
    with pytest.raises(DataError, match=rf"row 1, field '{field}.*({message})"):
        list(prepare_dataset(IterableDataset.from_generator(lambda: iter(rows)), make_tokenizer())[0])


@pytest.mark.attack("hostile rows")
def test_values_in_each_other_are_bounded(make_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Arrow holds them, to 64 levels by itself."""
    monkeypatch.setattr(limits, "DEEPEST", 20)
    rows = Dataset.from_list([{**chat_pair(), "tools": [nested(30)]}])
    with pytest.raises(DataError, match="row 0, field 'tools': is nested more than 20 levels deep"):
        prepare_dataset(rows, make_tokenizer())


@pytest.mark.attack("hostile rows")
def test_a_number_beyond_all_bounds(make_tokenizer: Any) -> None:
    rows = [{"prompt": "a", "chosen": " b", "rejected": " c", "margin": value} for value in (1.0, 10**400)]
    stream, _ = prepare_dataset(
        IterableDataset.from_generator(lambda: iter(rows)), make_tokenizer(), label_columns=["margin"]
    )
    with pytest.raises(DataError, match="row 1, field 'margin': expected a finite number"):
        list(stream)


@pytest.mark.attack("hostile rows")
def test_a_line_without_an_end(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rowfiles, "LONGEST_LINE", 1_000)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n{"prompt": "' + "x" * 2_000)
    with pytest.raises(DataError, match=r"rows.jsonl, line 2: has more than 1,000 bytes. Remedy: write one row"):
        read_rows(str(tmp_path / "rows.jsonl"))


RENDERING = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {
    "self",
    "documents",
    "kwargs",
}


@pytest.mark.attack("hostile rows")
@pytest.mark.parametrize("name", [*sorted(RENDERING), "eos_token", "image_token", "strftime_now", "raise_exception"])
def test_no_argument_of_rendering_comes_from_a_row(make_tokenizer: Any, name: str) -> None:
    """All that the installed transformers has, but the documents, which are data."""
    assert name in RESERVED_KWARGS or name == "image_token"
    row = {**chat_pair(), "chat_template_kwargs": json.dumps({name: "x"})}
    with pytest.raises(DataError, match=f"field 'chat_template_kwargs': '{name}' is set by the pipeline"):
        prepare_dataset(Dataset.from_list([row]), make_tokenizer())
