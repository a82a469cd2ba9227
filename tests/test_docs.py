"""docs/objectives.md has an entry for every loss, with the registry's own words and numbers."""

import re

import pytest
from paths import REPO

from dpo_peft.config import OBJECTIVE_OPTIONS
from dpo_peft.losses import REGISTRY

DOC = (REPO / "docs" / "objectives.md").read_text(encoding="utf-8")
ENTRIES = dict(re.findall(r"^#### `(\w+)`\n(.*?)(?=^#|\Z)", DOC, flags=re.MULTILINE | re.DOTALL))


def test_entries_are_those_of_the_registry() -> None:
    assert sorted(ENTRIES) == sorted(REGISTRY)


@pytest.mark.parametrize("name", REGISTRY)
def test_an_entry_says_what_the_registry_says(name: str) -> None:
    entry, text = REGISTRY[name], " ".join(ENTRIES[name].split())
    beta = "none" if entry.default_beta is None else f"{entry.default_beta:g}"
    for said in (entry.formula, entry.use_when, f"beta: {beta}. {entry.why_beta}", entry.source):
        assert " ".join(said.split()) in text, said
    named = set(re.findall(r"options: (.*?) - source", text)[0].replace("`", "").split(", ")) - {"none"}
    assert named == set(entry.options) - {"beta"}


def test_every_objective_has_a_row_of_results() -> None:
    """The table of the quickstart's task, at the default beta of each."""
    for name in REGISTRY:
        assert re.search(rf"^\| `{name}`[, ].*\|", DOC.partition("## Measured")[2], flags=re.MULTILINE), name


def test_every_option_is_explained() -> None:
    assert not [option for option in OBJECTIVE_OPTIONS if f"`{option}" not in DOC]
