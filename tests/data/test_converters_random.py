"""Rows of public formats that a seeded generator broke: each is converted or refused by a `DataError`."""

import copy
import random
from typing import Any

import pytest
from test_random_rows import JUNK

from dpo_peft.data import converters
from dpo_peft.errors import DataError

TREE = {"role": "prompter", "text": "q", "replies": [
    {"role": "assistant", "text": "a", "rank": 0, "replies": [{"role": "prompter", "text": "w", "replies": []}]},
    {"role": "assistant", "text": "b", "rank": 1, "replies": None},
]}  # fmt: skip
WHOLE: dict[str, dict[str, Any]] = {
    "from_sharegpt": {
        "system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
        "chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"},
    },
    "from_alpaca": {
        "instruction": "q", "input": "i", "system": "s", "history": [["q", "a"], ["r", "b"]], "output": ["a", "b"],
    },
    "from_hh": {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
    "from_pandalm": {
        "idx": 1, "instruction": "q", "input": "", "response1": "a", "response2": "b",
        "annotator1": 1, "annotator2": 2, "annotator3": 1,
    },
    "from_tulu": {"id": 2, "prompt": "q", "completion_a": "a", "completion_b": "b", "preference": "tie"},
    "from_oasst_tree": {"message_tree_id": "x", "prompt": TREE},
}  # fmt: skip
WHOLE["pandalm_decided"] = WHOLE["from_pandalm"]


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every place inside a row: what holds it, and under which key."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in inner for place in ((value, key), *places(item))]


@pytest.mark.parametrize("name", WHOLE)
def test_broken_rows_are_converted_or_refused(name: str) -> None:
    random_, convert, fates = random.Random(3), getattr(converters, name), {"made": 0, "refused": 0}
    convert(WHOLE[name])
    for _ in range(1_500):
        row: Any = copy.deepcopy(WHOLE[name])
        for _ in range(random_.randint(0, 2)):
            holder, key = random_.choice(places(row))
            holder[key] = copy.deepcopy(random_.choice(JUNK))
        if random_.random() < 0.05:
            row = random_.choice(JUNK)
        try:
            convert(row)
            fates["made"] += 1
        except DataError as error:
            assert "Repair" in str(error) or "ilter" in str(error) or "Use one of" in str(error), error
            fates["refused"] += 1
    assert min(fates.values()) > 100, fates
