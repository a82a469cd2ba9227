"""`dpo-peft chat` as it is used: typed lines in a terminal, Ctrl-C and Ctrl-D, and prompts from a script."""

import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import REPO
from reward_helpers import train_bundled

from dpo_peft import cli
from dpo_peft.model.adapter_source import load_trained

NEW = 16  # tokens of a completion
GREEDY = ["--temperature", "0", "--max_new_tokens", str(NEW)]


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bundled")
    train_bundled(folder, steps=3, learning_rate=4e-3)
    return str(folder)


@pytest.fixture(scope="module")
def plain(bundled: str) -> Callable[..., str]:
    """`plain(text, on)`: the greedy text by PEFT's own calls on the model in 4 bits."""
    trained = load_trained(bundled, with_reference=False)

    def complete(text: str, on: bool, new: int = NEW) -> str:
        message = [{"role": "user", "content": text}]
        ids = trained.tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        how = {"max_new_tokens": new, "do_sample": False}
        if on:
            out = trained.model.generate(**ids, **how)
        else:
            with trained.model.disable_adapter():
                out = trained.model.generate(**ids, **how)
        return trained.tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)

    return complete


def interruptible() -> None:
    """So that Ctrl-C is a signal, also where the tests run in the background, which ignores it."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Typist:
    """A program in a terminal of its own."""

    def __init__(self, *words: str):
        self.end, other = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dpo_peft.cli", *words],
            stdin=other,
            stdout=other,
            stderr=other,
            env={**os.environ, "PYTHONPATH": str(REPO), "TERM": "dumb"},
            start_new_session=True,
            preexec_fn=interruptible,
        )
        os.close(other)
        self.seen = ""

    def until(self, pattern: str) -> str:
        """Returns what is shown up to and with a pattern."""
        deadline = time.monotonic() + 120
        while not (found := re.search(pattern, self.seen)):
            assert time.monotonic() < deadline, self.seen
            if select.select([self.end], [], [], 1)[0]:
                self.seen += os.read(self.end, 4096).decode().replace("\r\n", "\n")
        shown, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return shown

    def type(self, text: str) -> None:
        os.write(self.end, text.encode())


def test_a_session_in_a_terminal(bundled: str, plain: Callable[..., str]) -> None:
    text = "Tell me about the hotel by the sea."
    typist = Typist("chat", bundled, *GREEDY)
    typist.until("/quit leaves.\nadapter> ")
    typist.type(f"{text}\n")
    assert plain(text, True) in typist.until("adapter> ")
    typist.type("/reset\n/base\n")
    typist.until("base> ")
    typist.type(f"{text}\n")
    assert plain(text, False) in typist.until("base> ")
    typist.type("/both\n")
    typist.until("both> ")
    typist.type("/reset\n")
    typist.until("both> ")
    typist.type(f"{text}\n")
    assert f"[adapter]\n{plain(text, True)}\n[base]\n{plain(text, False)}\n" in typist.until("both> ")
    assert plain(text, True) != plain(text, False)
    typist.type("/quite\n")
    assert "not a command" in typist.until("both> ")
    typist.type("\x03")  # with nothing running
    typist.until("/quit or Ctrl-D leaves.\nboth> ")
    typist.type("\x04")
    assert typist.process.wait(60) == 0


def test_ctrl_c_stops_the_completion_alone(
    bundled: str, capsys: Any, monkeypatch: Any, plain: Callable[..., str]
) -> None:
    """The signal's exception comes while a piece is shown; the next line is completed as ever."""
    from dpo_peft.cli import chat

    text, real, calls = "Tell me about the hotel by the sea.", chat._print, []

    def interrupted(on: bool, piece: str) -> None:
        real(on, piece)
        calls.append(piece)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(chat, "_print", interrupted)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{text}\n/reset\n{text}\n"))
    assert cli.main(["chat", bundled, *GREEDY]) == 0
    out = capsys.readouterr().out
    stopped, rest = out.split("(Stopped.)\n")
    assert plain(text, True) in rest and plain(text, True) not in stopped


def test_scripts_get_completions_alone(bundled: str, capsys: Any, monkeypatch: Any, plain: Callable[..., str]) -> None:
    texts = ["Tell me about the hotel.", "And the film?"]
    monkeypatch.setattr(sys, "stdin", io.StringIO(texts[1] + "\n"))
    assert cli.main(["chat", bundled, *GREEDY, "--prompt", texts[0], "--prompt", "-"]) == 0
    assert capsys.readouterr().out == "".join(f"{plain(text, True)}\n" for text in texts)
    words = ["--temperature", "0", "--max_new_tokens", "5", "--adapter_off", "--json", f"--prompt={texts[0]}"]
    assert cli.main(["chat", bundled, *words]) == 0
    result = json.loads(capsys.readouterr().out)
    (one,) = result["completions"]
    assert one["completion"] == plain(texts[0], False, 5) and one["tokens"] == 5 and one["finished"] is False
    assert result["adapter_on"] is False and "greedy" in result["decoding"]


def test_what_a_terminal_would_obey_is_spelled(bundled: str, capsys: Any, monkeypatch: Any) -> None:
    from dpo_peft.chat import session

    monkeypatch.setattr(session.Pieces, "_text", lambda self: "\x1b]0;title\x07\x1b[31mred\r"[: 3 * len(self.ids)])
    assert cli.main(["chat", bundled, "--prompt", "Hi", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == "\\x1b]0;title\\x07\\x1b[31mred\\x0d\n"


def test_memory_that_runs_out_is_one_sentence(bundled: str, capsys: Any, monkeypatch: Any) -> None:
    from dpo_peft.chat import session
    from dpo_peft.model.adapter_source import AdapterSource

    def full(*given: Any, **named: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 139 GiB, of which ...")

    monkeypatch.setattr(session.Pieces, "put", full)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello.\nHello again.\n"))
    assert cli.main(["chat", bundled]) == 0
    out = capsys.readouterr().out
    assert out.count("Out of memory: ") == 2 and "0 of a completion don't fit. Shorten them (max_new_tokens)" in out
    monkeypatch.setattr(AdapterSource, "load", full)
    assert cli.main(["chat", bundled, "--prompt", "Hello."]) == 3
    error = capsys.readouterr().err
    assert error.startswith("dpo-peft: CUDA out of memory. Tried to allocate 2.00 GiB. Close other programs")
    assert error.count("\n") == 1


def test_commands_that_are_wrong_change_nothing(bundled: str, capsys: Any, monkeypatch: Any) -> None:
    lines = ["/set temperature 0", "/set temperature -1", "/set top_p 0.5", "/set seed x", "/set color red", "/set"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join([*lines, "/help"])))
    assert cli.main(["chat", bundled]) == 0
    out = capsys.readouterr().out
    for message in (
        "temperature=-1.0 must",
        "no effect with temperature=0",
        "seed='x' is not a number",
        "'color' can't be set",
    ):
        assert message in out
    assert out.count("Greedy as given, at most 120 new tokens, seed 0.") == 2 and "/system TEXT" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--json"], "without prompt"),
        (["--prompt", ""], "prompt is empty"),
        (["--reference", "x"], "not an option"),
        (["--max_new_tokens", "0"], "max_new_tokens=0"),
    ],
)
def test_wrong_options(words: list[str], message: str, tmp_path: Path, capsys: Any) -> None:
    assert cli.main(["chat", str(tmp_path), *words]) == 2
    assert message in capsys.readouterr().err
