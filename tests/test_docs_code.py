"""Code and messages on the pages: Python compiles and imports what there is, commands have the options that they are
given, messages are those of the package, and what is marked by `<!-- run -->` runs, on the bundled model."""

import argparse
import ast
import importlib
import re
import shlex
from functools import lru_cache
from pathlib import Path

import pytest
from parsers import parser_of
from paths import REPO

from dpo_peft import files
from dpo_peft.cli import COMMANDS
from dpo_peft.quickstart import model_path, train_file

PAGES = [REPO / "README.md", REPO / "CONTRIBUTING.md", REPO / "recipes" / "README.md", *(REPO / "docs").glob("*.md")]
FENCE = re.compile(r"^(<!-- run -->\n)?```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
CODE = [(page, *found) for page in PAGES for found in FENCE.findall(page.read_text("utf-8"))]
PYTHON = [(page, text) for page, _, kind, text in CODE if kind == "python"]
RUN = [(page, text) for page, mark, _, text in CODE if mark]
# What stands for a model of the Hub, and makes a run short.
STAND_INS = [
    (r'model="[^"]+"', f"model={model_path()!r}"),
    (r"DPOConfig\(", "DPOConfig(use_cpu=True, bf16=False, max_steps=1, report_to='none', "),
    (r"per_device_train_batch_size=\d+", "per_device_train_batch_size=2"),
]


def commands_of(text: str) -> list[str]:
    """Every `dpo-peft COMMAND ...` of a page, in code blocks and in a line's code; a backslash joins lines."""
    fenced = "".join(re.sub("^", "    ", code, flags=re.MULTILINE) for _, _, code in FENCE.findall(text))
    joined = re.sub(r"\\\n\s*", "", text + fenced)
    found = re.findall(r"^    (?:\$ |  )*(dpo-peft [a-z].*)$", joined, re.MULTILINE)
    return found + re.findall(r"`(dpo-peft [a-z][^`]*)`", text.replace("\n", " "))


@lru_cache
def parser(command: str) -> argparse.ArgumentParser:
    return parser_of(command)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_have_the_options_that_they_are_given(page: Path) -> None:
    bad = []
    for line in commands_of(page.read_text("utf-8")):
        words = shlex.split(re.split(r"[|;>]|&&", line)[0].replace("'", "").replace('"', ""), comments=True)
        command, given = words[1], [word.split("=")[0] for word in words[2:] if word.startswith("--")]
        if command == "help":
            continue
        if command not in COMMANDS:
            bad.append(f"{line}: no command {command!r}")
            continue
        known = {"--config", "--help", "--help_all", *parser(command)._option_string_actions}
        unknown = [name for name in given if f"--{name[2:].replace('-', '_')}" not in known]
        bad += [f"{line}: {command} has no {name}" for name in unknown if name != "--any_option"]
        bad += [f"{line}: no {word}" for word in words if word.startswith("recipes/") and not (REPO / word).exists()]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize(("page", "code"), PYTHON, ids=[page.name for page, _ in PYTHON])
def test_python_compiles_and_imports_what_there_is(page: Path, code: str) -> None:
    without_gaps = re.sub(r"^ *\.\.\.$", "", code.replace(", ...)", ")"), flags=re.MULTILINE)
    for node in ast.walk(ast.parse(without_gaps)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dpo_peft"):
            module = importlib.import_module(node.module or "")
            assert not [alias.name for alias in node.names if not hasattr(module, alias.name)]


@pytest.mark.slow
@pytest.mark.parametrize(("page", "code"), RUN, ids=[page.name for page, _ in RUN])
def test_what_is_marked_runs(page: Path, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for pattern, text in STAND_INS:
        code = re.sub(pattern, text, code)
    dataset = files.read_rows(train_file(), "train").select(range(4))
    exec(compile(code, page.name, "exec"), {"dataset": dataset})
    assert list(tmp_path.rglob("adapter_model.safetensors")), "no adapter was saved"


def messages() -> list[str]:
    """Every text of the package, adjacent ones joined, with what differs left out."""
    found = []
    for path in sorted((REPO / "dpo_peft").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[sdrgf]|%\.\d\w", "\0", node.value))
    return [re.sub(r"'?\0'?", "\0", text) for text in found]


def test_troubleshooting_quotes_messages_of_the_package() -> None:
    """`...` stands for what differs. A message that was reworded is to be reworded there too."""
    known, bad = messages(), []
    for _, kind, text in FENCE.findall((REPO / "docs" / "troubleshooting.md").read_text("utf-8")):
        parts = [part.strip(" .'") for part in re.split(r"'?\.\.\.'?", text.strip())] if kind == "text" else []
        bad += [part for part in parts if len(part) > 3 and not any(part in message for message in known)]
    assert not bad, bad
