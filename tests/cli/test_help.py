"""The help: kept as data and true to the options, short by default, whole on demand; and the schema of a config."""

import json
import re
from dataclasses import fields
from typing import Any

import pytest
import yaml
from paths import REPO
from write_help import SCHEMA, kept_help, schema

from dpo_peft import DPOConfig, cli
from dpo_peft.cli import help
from dpo_peft.cli.options import recipe_files
from dpo_peft.config_checks import NOT_AVAILABLE

RENEW = "renew it: python dev/write_help.py"


def test_the_kept_help_is_what_the_options_say() -> None:
    kept = json.loads(help.KEPT.read_text("utf-8"))
    for command, told in kept_help().items():
        # Names, and how many are left out, depend on the version of transformers; what comes first has its own words.
        for one in (kept.get(command, {}), told):
            one.pop("left_out", None)
            one.pop("names", None)
        assert kept[command] == told, f"{help.KEPT} is behind on {command}; {RENEW}"


@pytest.mark.parametrize("width", [80, 112])
def test_help_is_short(width: int) -> None:
    for command in cli.COMMANDS:
        kept = help.kept(command)
        assert kept is not None, RENEW
        lines = help.render(kept, width=width).split("\n")
        assert len(lines) <= 120, command
        assert any(line.lstrip().startswith("--config FILE.yaml") for line in lines)
        assert max(len(line) for line in lines[: lines.index("examples:")]) <= width


def test_all_options_are_found_once_and_refused_ones_never(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    first = capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        cli.main(["train", "--help-all"])
    whole = capsys.readouterr().out
    assert end.value.code == 0
    hidden = {*NOT_AVAILABLE, *help.words()["hidden"].split()}
    for f in fields(DPOConfig):
        number = sum(line.split()[:1] == [f"--{f.name}"] for line in whole.splitlines())
        assert number == (f.name not in hidden), f.name
        assert f.name not in hidden or f"--{f.name} " not in first
    assert not {"Trainer", "TRL", "trl"} & {*re.findall(r"\w+", first)}


def test_words_are_for_options_that_there_are(capsys: pytest.CaptureFixture) -> None:
    """A name in help.yaml that has gone would be a text that nobody reads; names to come are named here."""
    with pytest.raises(SystemExit):
        cli.main(["train", "--help=json"])
    groups = json.loads(capsys.readouterr().out)["groups"]
    known = {entry["option"] for entries in groups.values() for entry in entries}
    named = {name for group in help.words()["first"].values() for name in group}
    assert named - known <= {"column_map", "as_chat", "eval_share", "log_file"}
    assert {entry["option"] for entry in groups.get("others", [])}.isdisjoint(DPOConfig.__annotations__)


def fitting(value: Any, rule: dict[str, Any]) -> bool:
    """Whether a value keeps what a schema of ours says: types, choices, bounds."""
    if "anyOf" in rule:
        return any(fitting(value, one) for one in rule["anyOf"])
    if "pattern" in rule and not (isinstance(value, str) and re.search(rule["pattern"], value)):
        return False
    if "enum" in rule:
        return value in rule["enum"]
    kinds = {"string": str, "boolean": bool, "array": list, "object": dict, "null": type(None)}
    numbers = {"integer": int, "number": (int, float)}
    types = [rule["type"]] if isinstance(rule["type"], str) else rule["type"]
    typed = any(
        isinstance(value, numbers[one]) and not isinstance(value, bool)
        if one in numbers
        else isinstance(value, kinds[one])
        for one in types
    )
    if typed and isinstance(value, int | float) and not isinstance(value, bool):
        return rule.get("minimum", value) <= value <= rule.get("maximum", value) and not (
            value <= rule.get("exclusiveMinimum", value - 1) or value >= rule.get("exclusiveMaximum", value + 1)
        )
    return typed


def test_the_schema_is_that_of_the_options_and_knows_every_recipe() -> None:
    kept, made = json.loads(SCHEMA.read_text("utf-8")), schema()
    if kept.pop("$comment") == made.pop("$comment"):  # the version of transformers, whose options are among them
        assert kept == json.loads(json.dumps(made)), RENEW
    for path in [path for path in recipe_files().values() if path.parent.name != "accelerate"]:
        for name, value in yaml.safe_load(path.read_text("utf-8")).items():
            assert fitting(value, made["properties"][name]), (path.name, name, value)
    for name, value in {"beta": 0, "lora_r": "x", "truncation_mode": "middle", "loss_type": "sigmod"}.items():
        assert not fitting(value, made["properties"][name]), name
    for name, value in {"eval_strategy": False, "learning_rate": "1e-5", "loss_type": ["sigmoid", "sft"]}.items():
        assert fitting(value, made["properties"][name]), name
    assert "fsdp" not in made["properties"] and str(REPO) not in json.dumps(made)
