"""docs/objectives.md has an entry for every loss, with the registry's own words and numbers."""

import re

import pytest
from paths import REPO

from dpo_peft.config import OBJECTIVE_OPTIONS
from dpo_peft.losses import REGISTRY
from dpo_peft.losses.__main__ import entry
from dpo_peft.losses.registry import INPUTS

DOC = (REPO / "docs" / "objectives.md").read_text(encoding="utf-8")
ENTRIES = dict(re.findall(r"^#### `(\w+)`\n(.*?)(?=^#|\Z)", DOC, flags=re.MULTILINE | re.DOTALL))


def test_entries_are_those_of_the_registry() -> None:
    assert sorted(ENTRIES) == sorted(REGISTRY)


@pytest.mark.parametrize("name", REGISTRY)
def test_an_entry_begins_with_what_the_registry_says(name: str) -> None:
    """If this fails, put the output of `python -m dpo_peft.losses NAME` in the place of the entry's beginning."""
    assert f"#### `{name}`\n{ENTRIES[name]}".startswith(entry(REGISTRY[name]))


def test_every_input_of_a_loss_is_explained() -> None:
    table = DOC.partition("## Your own loss")[2]
    assert not [name for names in INPUTS.values() for name in names if name.replace("rejected", "chosen") not in table]


def test_every_objective_has_a_row_of_results() -> None:
    """The table of the quickstart's task, at the default beta of each."""
    for name in REGISTRY:
        assert re.search(rf"^\| `{name}`[, ].*\|", DOC.partition("## Measured")[2], flags=re.MULTILINE), name


def test_every_option_is_explained() -> None:
    assert not [option for option in OBJECTIVE_OPTIONS if f"`{option}" not in DOC]


def test_every_page_is_in_the_navigation() -> None:
    named = re.findall(r"^ +- .*: (\S+\.md)$", (REPO / "mkdocs.yml").read_text("utf-8"), flags=re.MULTILINE)
    left_out = sorted({page.name for page in (REPO / "docs").glob("*.md")} - set(named))
    assert not left_out, f"add to nav of mkdocs.yml: {left_out}"
