"""Commands and messages on the pages: commands have the options that they are given, those within a line too, and
messages are those of the package. `test_docs_run.py` runs the blocks."""

import argparse
import ast
import re
import shlex
from functools import lru_cache
from pathlib import Path

import pytest
from pages import PAGES, blocks_of
from parsers import parser_of
from paths import REPO

from dpo_peft.cli import COMMANDS


def commands_of(text: str) -> list[str]:
    """Every `dpo-peft COMMAND ...` of a page, in blocks, run or not, and in a line's code."""
    typed = [line for block in blocks_of(text) for line in block.commands]
    inline = re.findall(r"`(dpo-peft [a-z][^`]*)`", text.replace("\n", " "))
    return [command for line in typed if (command := line.rpartition(" | ")[2]).startswith("dpo-peft ")] + inline


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
    for block in blocks_of((REPO / "docs" / "troubleshooting.md").read_text("utf-8")):
        parts = [part.strip(" .'") for part in re.split(r"'?\.\.\.'?", block.text.strip())]
        bad += [part for part in parts if len(part) > 3 and not any(part in message for message in known)]
    assert not bad, bad
