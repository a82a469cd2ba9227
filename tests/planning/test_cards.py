"""docs/cards.md holds what the planner says today, of shapes whose weights are as many as published."""

import importlib.util

import pytest
from paths import REPO

_spec = importlib.util.spec_from_file_location("cards", REPO / "dev" / "cards.py")
assert _spec is not None and _spec.loader is not None
cards = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cards)
PAGE = cards.PAGE.read_text("utf-8")


def test_the_page_lists_every_model_under_todays_head() -> None:
    assert PAGE.startswith(cards.HEAD)
    rows = PAGE.removeprefix(cards.HEAD).splitlines()
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == [*cards.MODELS]


@pytest.mark.parametrize("name", cards.MODELS)
@pytest.mark.sampled(15, slow=5)
def test_a_row_is_what_the_planner_says(name: str) -> None:
    """If this fails, write the page again: python dev/cards.py"""
    assert f"\n{cards.row(name)}\n" in PAGE


def test_a_wrong_shape_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    size = cards.MODELS["Qwen3 0.6B"]["size"]
    monkeypatch.setitem(cards.MODELS["Qwen3 0.6B"], "size", [*size[:2], size[2] + 1, *size[3:]])
    with pytest.raises(SystemExit, match="are counted"):
        cards.row("Qwen3 0.6B")
