"""Templates that write today's date: one date per run, kept with the tokenizer, told by the summary and the cache."""

import json
from datetime import date
from pathlib import Path

import pytest
from data_helpers import chat_pair, word_tokenizer
from datasets import Dataset
from peft import LoraConfig

from dpo_peft import DPOConfig
from dpo_peft.data import clock, prepare_dataset, rows_digest
from dpo_peft.objective import TrainingObjective
from dpo_peft.training.building import Preparation
from dpo_peft.training.resume import RunState, trajectory

TEMPLATE = (
    "{%% if strftime_now is defined %%}<|im_start|>system\n%s<|im_end|>\n{%% endif %%}"
    "{%% for m in messages %%}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{%% endfor %%}"
    "{%% if add_generation_prompt %%}<|im_start|>assistant\n{%% endif %%}"
)


@pytest.fixture
def today(monkeypatch):
    """Sets the clock."""

    def turn_to(day):
        fixed = type("Day", (date,), {"today": classmethod(lambda cls: date.fromisoformat(day))})
        monkeypatch.setattr(clock, "date", fixed)

    turn_to("2026-03-01")
    return turn_to


def prompt_of(rows, tokenizer):
    prepared, summary = prepare_dataset(rows, tokenizer)
    return tokenizer.decode(prepared[0]["prompt_ids"]), summary


@pytest.mark.parametrize(
    ("written", "first"),
    [
        ("{{ strftime_now('%d %b %Y') }}", "01 Mar 2026"),
        ('{{ "Date: " + strftime_now( "%Y-%m-%d" ) }}', "Date: 2026-03-01"),
        ("{{ strftime_now('%A é') + strftime_now('%H') }}", "Sunday é00"),
    ],
)
def test_the_date_of_the_first_use_stays(make_tokenizer, today, written, first):
    tokenizer = make_tokenizer(chat_template=TEMPLATE % written)
    rows = Dataset.from_list([chat_pair()])
    prompt, summary = prompt_of(rows, tokenizer)
    assert f"system\n{first}<|im_end|>" in prompt
    assert summary.date == "2026-03-01" and "date in the chat template: 2026-03-01" in str(summary)
    today("2026-03-02")
    assert prompt_of(Dataset.from_list([chat_pair()]), tokenizer)[0] == prompt
    later = prompt_of(rows, make_tokenizer(chat_template=TEMPLATE % written))  # not the first's cache
    assert later[0] != prompt and later[1].date == "2026-03-02"


@pytest.mark.parametrize("name", ["llama3_2", "gptoss", "muse_glimmer"])
def test_saved_tokenizer_keeps_the_date(template_tokenizer, today, tmp_path, name):
    tokenizer, rows = template_tokenizer(name), Dataset.from_list([chat_pair()])
    prompt, _ = prompt_of(rows, tokenizer)
    assert "01 Mar 2026" in prompt or "2026-03-01" in prompt
    tokenizer.save_pretrained(tmp_path / "checkpoint-5")
    today("2026-03-02")
    loaded = type(tokenizer).from_pretrained(tmp_path / "checkpoint-5")
    assert prompt_of(rows, loaded)[0] == prompt
    resumed = template_tokenizer(name)
    clock.keep_date(resumed, str(tmp_path), None)
    assert prompt_of(rows, resumed)[0] == prompt


def test_named_checkpoint_comes_before_the_folder(make_tokenizer, tmp_path):
    for folder, day in (("other/checkpoint-1", "2026-01-01"), ("run/checkpoint-1", "2026-02-02")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "tokenizer_config.json").write_text(json.dumps({clock.KEY: day}))
    tokenizer = make_tokenizer(chat_template=TEMPLATE % "{{ strftime_now('%d') }}")
    clock.keep_date(tokenizer, str(tmp_path / "run"), str(tmp_path / "other/checkpoint-1"))
    assert clock.template_date(tokenizer) == "2026-01-01"


def test_the_trainer_takes_over_the_date_of_its_checkpoints(make_tokenizer, today, tmp_path):
    tokenizer, again = (make_tokenizer(chat_template=TEMPLATE % "{{ strftime_now('%d') }}") for _ in range(2))
    args = DPOConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False)
    Preparation(args, TrainingObjective(["sigmoid"]), tokenizer)
    assert clock.template_date(tokenizer) == "2026-03-01"
    tokenizer.save_pretrained(tmp_path / "checkpoint-2")
    today("2026-03-02")
    Preparation(args, TrainingObjective(["sigmoid"]), again)
    assert clock.template_date(again) == "2026-03-01"


@pytest.mark.parametrize("days", [("2026-03-01", "2026-03-02"), ("2026-03-01", "2026-03-01"), (None, None)])
def test_resuming_under_another_date_says_how_to_keep_it(make_tokenizer, today, tmp_path, caplog, days):
    """A checkpoint that only `train` is given comes after the rows were made."""
    trajectories = []
    for day in days:
        today(day or "2026-03-05")
        tokenizer = make_tokenizer(chat_template=TEMPLATE % ("{{ strftime_now('%d') }}" if day else ""))
        args = DPOConfig(output_dir=str(tmp_path / "run"), report_to="none", use_cpu=True, bf16=False)
        made = Preparation(args, TrainingObjective(["sigmoid"]), tokenizer)
        made.training(Dataset.from_list([chat_pair()]))
        assert made.told_by.get(clock.KEY) == day
        trajectories.append(trajectory(args, LoraConfig(), made.told_by, "base"))
    (tmp_path / "optimizer.pt").touch()
    (tmp_path / "run_state.json").write_text(json.dumps({"trajectory": trajectories[0]}))
    with caplog.at_level("WARNING"):
        RunState(args, None, [], lambda: trajectories[1]).compare(tmp_path)
    said = "give it as DPOConfig(resume_from_checkpoint=...), and its date is used again" in caplog.text
    assert said is (days[0] != days[1]) and ("'2026-03-01' before, '2026-03-02' now" in caplog.text) is said


def test_a_date_that_the_row_gives_is_used(template_tokenizer, today):
    row = {**chat_pair(), "chat_template_kwargs": {"date_string": "9 May 1990"}}
    assert "Today Date: 9 May 1990" in prompt_of(Dataset.from_list([row]), template_tokenizer("llama3_2"))[0]


def test_templates_without_a_clock_have_no_date(make_tokenizer, today):
    tokenizer = make_tokenizer()
    assert prompt_of(Dataset.from_list([chat_pair()]), tokenizer)[1].date is None
    assert clock.KEY not in tokenizer.init_kwargs


def test_a_stream_has_the_same_date_in_every_pass(make_tokenizer, today):
    tokenizer = make_tokenizer(chat_template=TEMPLATE % "{{ strftime_now('%d %b %Y') }}")
    rows = Dataset.from_list([chat_pair()])
    stream, summary = prepare_dataset(rows.to_iterable_dataset(), tokenizer)
    first = list(stream)
    today("2026-03-02")
    assert list(stream) == first and summary.date == "2026-03-01"
    assert rows_digest(Dataset.from_list(first)) == rows_digest(Dataset.from_list(list(stream)))


def test_a_damaged_checkpoint_gives_no_date_and_stops_nothing(tmp_path: Path) -> None:
    """Whether it is whole is asked where the run is resumed."""
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }} " + str(tokenizer.chat_template)
    for number, text in enumerate(['{"chat_template_date": "2024-', '["2024"]', f'{{"{clock.KEY}": "soon"}}', "\x00"]):
        (tmp_path / f"checkpoint-{number}").mkdir()
        (tmp_path / f"checkpoint-{number}" / "tokenizer_config.json").write_text(text, "utf-8")
    clock.keep_date(tokenizer, str(tmp_path), None)
    assert clock.KEY not in tokenizer.init_kwargs
