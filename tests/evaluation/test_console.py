"""What a run shows: lines as they were written down by hand, bars that no line tears, and the same in a file."""

import fcntl
import logging
import os
import pty
import re
import struct
import sys
import termios
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tqdm.auto import tqdm
from trainer_helpers import id_pairs, ours
from transformers import PrinterCallback, ProgressCallback, TrainerControl, TrainerState

from dpo_peft import OptionError
from dpo_peft.evaluation.console import Columns, Console, PlainConsole, figure, span
from dpo_peft.evaluation.log_file import SHOWN
from dpo_peft.evaluation.samples import Conversation

LOGS = {
    "loss": 0.69314,
    "grad_norm": 1.25,
    "learning_rate": 2e-5,
    "rewards/margins": -0.01234,
    "rewards/accuracies": 0.875,
    "kl": 12.3456,
    "tokens_per_second": 12345.4,
    "share_of_bound": 0.574,
    "peak_memory_gib": 15.3,
    "epoch": 0.5,
}
EVALUATED = {
    "eval_hard_loss": 0.5,
    "eval_hard_rewards/margins": 1.5,
    "eval_hard_rewards/accuracies": 0.9,
    "eval_hard_kl": 3.0,
    "eval_hard_accuracies/length_only": 0.47,
    "eval_hard_runtime": 62.34,
    "epoch": 0.5,
}
LEFT = 103 * 60.0

# With a GPU at 80 columns the last in importance, epoch and the gradient's norm, are left out.
AT_80 = """\
     step    loss  margin    acc     KL       lr   tok/s  bound    GiB    left
1200/5000  0.6931  -0.012  0.875  12.35  2.0e-05  12,345    57%  15.30   1h43m
     hard  0.5000  1.5000  0.900  3.000  length alone 0.470, 62.3 s, step 1200"""
AT_120 = """\
     step  epoch    loss  margin    acc     KL    grad       lr   tok/s  bound    GiB    left
1200/5000  0.500  0.6931  -0.012  0.875  12.35  1.2500  2.0e-05  12,345    57%  15.30   1h43m
     hard         0.5000  1.5000  0.900  3.000  length alone 0.470, 62.3 s, step 1200"""
# Without a reference there is no KL; numbers that are not finite, large or small; no accuracy in a batch of ties.
ODD = """\
step  epoch    loss  margin    acc    grad       lr   tok/s    left
 1/9      -     nan   12346      -   1e-05        -       -       -"""


def lines(columns: Columns) -> str:
    found = [columns.head, columns.training(1200, LOGS, LEFT), columns.evaluation(1200, "eval_hard", EVALUATED)]
    return "\n".join(found)


def test_lines_fit_80_and_120_columns() -> None:
    assert lines(Columns(5000, ["hard"], 80)) == AT_80
    assert lines(Columns(5000, ["hard"], 120)) == AT_120
    for width in (40, 60, 80):
        longest = max(map(len, lines(Columns(10**6, ["a" * 40], width)).split("\n")[:2]))
        assert longest <= width


def test_lines_of_odd_figures() -> None:
    logs = {"loss": float("nan"), "rewards/margins": 12345.6, "grad_norm": 1.2e-5}
    columns = Columns(9, [], None, without=["KL", "bound", "GiB"])
    assert f"{columns.head}\n{columns.training(1, logs)}" == ODD


@pytest.mark.parametrize(
    ("value", "width", "text"),
    [
        (0.69314, 6, "0.6931"), (-0.69314, 6, "-0.693"), (123.456, 6, "123.46"), (123456.7, 6, "123457"),
        (1234567.0, 6, "1e+06"), (0.0, 6, "0.0000"), (0.00002, 6, "2e-05"), (float("inf"), 6, "inf"),
        (float("nan"), 6, "nan"), (None, 6, "-"), (0.5, 5, "0.500"), (1.0, 5, "1.000"),
    ],
)  # fmt: skip
def test_figures(value: float | None, width: int, text: str) -> None:
    assert figure(value, width) == text


def test_times() -> None:
    assert [span(s) for s in (0.4, 99, 100, 5400, 6000, 359_000, 360_000)] == [
        "0s", "99s", "2m", "90m", "1h40m", "99h43m", "100h"
    ]  # fmt: skip


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_time_left_by_hand(capsys: pytest.CaptureFixture) -> None:
    """Resumed at step 2 of 10: what came before the first step is no part of it, an evaluation is."""
    clock, args = Clock(), SimpleNamespace(device=torch.device("cpu"))
    console: Any = PlainConsole(SimpleNamespace(rate=None), [], clock=clock)
    state, control = TrainerState(max_steps=10, global_step=2, is_world_process_zero=True), TrainerControl()
    console.on_train_begin(args, state, control)
    clock.now += 50
    for step in (3, 4):
        console.on_step_begin(args, state, control)
        clock.now += 4
        state.global_step = step
    console.on_log(args, state, control, logs=LOGS)
    clock.now += 30
    console.on_step_begin(args, state, control)
    clock.now += 2
    state.global_step = 5
    console.on_log(args, state, control, logs=LOGS)
    shown = [line.split()[-1] for line in capsys.readouterr().out.splitlines()]
    assert shown == ["left", "24s", "67s"]  # 8 s for 2 steps, 6 are left; 40 s for 3, 5 are left


# ---- Bars -----------------------------------------------------------------------------------------------------------


def screen(written: str) -> list[str]:
    """What stands on a terminal of any width after a text: carriage returns go back, ESC [A goes up."""
    rows, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[A|\r|\n|[^\r\n\x1b]+", written):
        if part == "\r":
            column = 0
        elif part == "\n":
            row, column = row + 1, 0
            rows += [""] * (row + 1 - len(rows))
        elif part == "\x1b[A":
            row -= 1
        else:
            rows[row] = rows[row].ljust(column)[:column] + part + rows[row][column + len(part) :]
            column += len(part)
    return [text.rstrip() for text in rows if text.strip()]


def drive(console: Any, process_zero: bool = True) -> None:
    """Two steps with a log each, and an evaluation of two batches."""
    args: Any = SimpleNamespace(device=torch.device("cpu"))
    state, control = TrainerState(max_steps=2, is_world_process_zero=process_zero), TrainerControl()
    console.on_train_begin(args, state, control)
    for step in (1, 2):
        console.on_step_begin(args, state, control)
        state.global_step = step
        console.on_step_end(args, state, control)
        console.on_log(args, state, control, logs=LOGS)
    console.evaluating = "hard"
    for _ in range(2):
        console.on_prediction_step(args, state, control, eval_dataloader=[1, 2])
    console.on_log(args, state, control, logs=EVALUATED)
    console.on_evaluate(args, state, control)
    console.on_train_end(args, state, control)


PACE: Any = SimpleNamespace(rate=None)


def test_no_line_tears_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal, of which all is read: the lines stand whole above the one bar that is left."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with os.fdopen(theirs, "w", closefd=True) as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setattr(tqdm, "monitor_interval", 0)
        drive(Console(PACE, ["eval_hard"]))
        terminal.flush()
        monkeypatch.undo()
    written = b""
    try:
        while part := os.read(ours, 65536):
            written += part
    except OSError:  # the end
        os.close(ours)
    text = written.decode()
    assert "hard: 100%" in text, "the evaluation's bar bears its name"
    *shown, bar = screen(text)
    head, one, two, held = shown
    assert head.split()[:3] == ["step", "loss", "margin"] or head.split()[1] == "epoch"
    assert one.split()[0] == "1/2" and two.split()[0] == "2/2" and held.startswith("hard")
    assert bar.startswith("train: 100%")


def test_a_file_gets_lines_and_no_bars(capsys: pytest.CaptureFixture) -> None:
    drive(Console(PACE, ["eval_hard"]))
    barred = capsys.readouterr()
    assert "\r" not in barred.out + barred.err
    drive(PlainConsole(PACE, ["eval_hard"]))
    assert capsys.readouterr().out == barred.out and len(barred.out.splitlines()) == 4


def test_one_process_shows(capsys: pytest.CaptureFixture) -> None:
    for kind in (Console, PlainConsole):
        drive(kind(PACE, ["eval_hard"]), process_zero=False)
    assert capsys.readouterr() == ("", "")


# ---- In a run -------------------------------------------------------------------------------------------------------


class Mine(ProgressCallback):
    """A callback of a user's."""


@pytest.mark.parametrize(("disable", "kind"), [(False, Console), (True, PlainConsole)])
def test_ours_stands_where_the_default_one_stood(tiny_llama, make_tokenizer, tmp_path, disable, kind) -> None:
    trainer = ours(tiny_llama(), id_pairs(4), make_tokenizer(), tmp_path, disable_tqdm=disable, callbacks=[Mine()])
    callbacks = trainer.callback_handler.callbacks
    assert [type(one) for one in callbacks if isinstance(one, ProgressCallback | PrinterCallback)] == [Mine, kind]
    trainer.remove_callback(Mine)
    trainer.remove_callback(PrinterCallback if disable else ProgressCallback)  # as users write it
    assert not any(isinstance(one, ProgressCallback | PrinterCallback) for one in callbacks)


def test_log_file_holds_what_is_shown(tiny_llama, make_tokenizer, tmp_path, capsys, caplog) -> None:
    """News and lines, each with the time; a second run is added behind the first."""
    path = tmp_path / "logs" / "run.log"
    for run in (1, 2):
        trainer = ours(
            tiny_llama(),
            id_pairs(4),
            make_tokenizer(),
            tmp_path / str(run),
            log_file=str(path),
            eval_dataset=id_pairs(3),
            eval_strategy="steps",
            eval_steps=2,
            max_steps=2,
            logging_steps=1,
        )
        trainer.train()
    SHOWN.info("a name \x1b[31m in red")
    text = path.read_text("utf-8")
    stamped = re.findall(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (.*)$", text, re.M)
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 10 and [line for line in stamped if line in shown] == shown
    assert sum(line.startswith("Reference: ") for line in stamped) == 2
    assert "\x1b" not in text and "\r" not in text and "\\x1b[31m in red" in text
    assert len(stamped) == len([line for line in text.splitlines() if not line.startswith(" ")])
    ours(tiny_llama(), id_pairs(4), make_tokenizer(), tmp_path / "3")  # closes it
    size = path.stat().st_size
    logging.getLogger("dpo_peft").warning("not in it")
    assert path.stat().st_size == size
    with pytest.raises(OptionError, match=r"log_file=.*can't be written to.*another file"):
        ours(tiny_llama(), id_pairs(4), make_tokenizer(), tmp_path / "4", log_file=str(tmp_path))


# ---- Prompts of samples ---------------------------------------------------------------------------------------------

ROLE = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
TEMPLATES = {
    "a head and a tail": "{% for m in messages %}" + ROLE + "{% endfor %}{{ '<|im_start|>assistant\n' }}",
    "a system prompt by default": "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}" + ROLE + "{% endfor %}{{ '<|im_start|>assistant\n' }}",
    "no system": "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + '.' }}{% else %}{{ raise_exception('no') }}{% endif %}"
    "{% endfor %}",
}


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_is_shown_as_its_conversation(make_tokenizer, name: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATES[name]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    shown = Conversation(tokenizer)

    def of(*turns: dict[str, str]) -> str:
        text = tokenizer.apply_chat_template(list(turns), add_generation_prompt=True, tokenize=False)
        return shown(tokenizer(text, add_special_tokens=False).input_ids)

    words = turn("user", "say the user and more"), turn("assistant", "a the"), turn("user", "more")
    assert of(words[0]) == "say the user and more"
    assert of(*words) == "user: say the user and more\nassistant: a the\nuser: more"
    if name != "no system":
        assert of(turn("system", "a more"), words[0]) == "system: a more\nuser: say the user and more"
    plain = tokenizer("the user and more").input_ids
    assert shown(plain) == tokenizer.decode(plain, skip_special_tokens=True)
