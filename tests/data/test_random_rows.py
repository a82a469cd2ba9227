"""Ten thousand rows that a seeded generator broke: each is kept, counted as dropped, or refused by name.

No traceback, and the counts add up: a refused row is taken out as its message says, and the rest is read again.
"""

import copy
import math
import random
import re
from typing import Any

import pytest
from data_helpers import answer, turns, word_tokenizer
from datasets import IterableDataset

from dpo_peft.data import prepare_dataset
from dpo_peft.errors import DataError

# Words, with everything that a message or a row may bring.
TEMPLATE = (
    "{% for tool in tools or [] %}tool {{ tool | tojson }} {% endfor %}{% for m in messages %}{{ m['role'] }} "
    "{{ m['content'] or '' }} {% for call in m['tool_calls'] or [] %}{{ call | tojson }} {% endfor %}end {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
ROWS = 10_000
BATCH = 20  # rows of a dataset, after one that is whole
SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 10))]

CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
PAIR = {"prompt": "a", "chosen": " b", "rejected": " c"}
WHOLE: dict[str, tuple[str, dict[str, Any]]] = {  # what it is -> what the objective learns from, a whole row
    "text": ("pairs", PAIR),
    "implicit text": ("pairs", {"chosen": "a b c", "rejected": "a b d"}),
    "labels": ("pairs", {**PAIR, "preference": 0.75, "margin": 1.0}),
    "chat": ("pairs", {"prompt": turns("a"), "chosen": answer("b"), "rejected": answer("c")}),
    "tools": (
        "pairs",
        {"prompt": turns("a"), "chosen": answer("b"), "rejected": answer("c"), "tools": [TOOL]},
    ),
    "implicit chat": ("pairs", {"chosen": turns("a", "b"), "rejected": turns("a", "c")}),
    "transcripts": (
        "pairs",
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
    ),
    "ids": ("pairs", {"prompt_ids": [5, 6], "chosen_ids": [4, 2], "rejected_ids": [3, 2]}),
    "ranked": ("lists", {"prompt": "a", "completions": [" b", " c", " d"], "ranks": [0, 1, 2]}),
    "scored chat": (
        "lists",
        {"prompt": turns("a"), "completions": [answer("b"), answer("c")], "scores": [0.5, 0.25]},
    ),
    "several rejected": ("lists", {"prompt": "a", "chosen": " b", "rejected": [" c", " d"]}),
    "judged": ("singles", {"prompt": "a", "completion": " b", "label": True}),
    "judged messages": ("singles", {"messages": turns("a", "b"), "label": False}),
    "trajectories": ("trajectories", {"chosen": turns("a", "b"), "rejected": turns("a", "c")}),
}


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no text")


JUNK: list[Any] = [
    None, True, False, 0, -1, 7, 10**30, 0.5, -0.0, math.nan, math.inf, "", " ", "a", " b", "\n", "a\x00b", "\ud800",
    "\u202e", "7", "null", "[]", "{}", '[{"role": "user", "content": "a"}]', "a b " * 40, [], {}, [None], [[]], [""],
    [0], ["a", "b"], [5, 4], [10**9], {"a": None}, {"role": "user", "content": "a"}, {"from": "human", "value": "a"},
    [{"role": "user"}], [{"role": "assistant", "content": "b"}], [{"role": "user", "content": [{"type": "image"}]}],
    [{"role": "assistant", "content": None, "tool_calls": [CALL]}], turns("a", "b", "c"), b"a", (1, 2), object,
    10**400, -(10**5000), Unprintable(),
]  # fmt: skip
NAMES = ("prompt", "chosen", "rejected", "completions", "label", "margin", "tools", "chat_template_kwargs", "extra")


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of everything inside a row."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in inner for place in ((*path, key), *places(item, (*path, key)))]


def broken(row: dict[str, Any], random_: random.Random) -> dict[str, Any]:
    """A copy of a row in which up to three things were exchanged, removed, repeated or added; at times none."""
    row = copy.deepcopy(row)
    for _ in range(random_.choice((0, 1, 1, 1, 2, 3))):
        found = places(row)
        if not found or random_.random() < 0.1:
            row[random_.choice(NAMES)] = copy.deepcopy(random_.choice(JUNK))
            continue
        *path, last = random_.choice(found)
        holder: Any = row
        for key in path:
            holder = holder[key]
        action = random_.random()
        if action < 0.6:
            holder[last] = copy.deepcopy(random_.choice(JUNK))
        elif action < 0.8:
            del holder[last]
        elif isinstance(holder, list):
            holder.insert(last, copy.deepcopy(holder[last]))
        else:
            holder[random_.choice(NAMES)] = copy.deepcopy(holder[last])
    return row


def judge(rows: list[dict[str, Any]], data: str) -> tuple[int, int, list[str]]:
    """How many rows are kept and dropped, and the messages of those that were refused one after the other."""
    refused: list[str] = []
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    while True:
        stream = IterableDataset.from_generator(lambda rows=rows: iter(rows))
        try:
            labels = ("preference", "margin") if "margin" in rows[0] else ()
            prepared, summary = prepare_dataset(
                stream, tokenizer, data=data, label_columns=labels, max_unusable_share=1.0
            )
            kept = list(prepared)
        except DataError as error:
            refused.append(str(error))
            named = re.match(r"train row (\d+), field '[^']+': .+ Remedy: .+\.$", str(error), re.DOTALL)
            assert named, f"names no row, field and remedy: {error}"
            number = int(named[1])
            assert 0 < number < len(rows), f"blames a row that is whole, or is not there: {error}"
            rows = rows[:number] + rows[number + 1 :]
            continue
        for row in kept:
            assert row["completion_ids"] and all(row["completion_ids"])
            assert len(row["completion_ids"]) == 1 or len(set(map(tuple, row["completion_ids"]))) > 1
        assert summary.source_rows == len(rows) == summary.kept_rows + summary.dropped_total
        assert summary.kept_rows == len(kept)
        return len(kept), summary.dropped_total, refused


@pytest.mark.parametrize("seed", SEEDS)
def test_broken_rows_are_kept_counted_or_refused_by_name(seed: int) -> None:
    random_ = random.Random(seed)
    fates = {"kept": 0, "dropped": 0, "refused": 0}
    left = ROWS // len(SEEDS)
    while left:
        what = random_.choice(sorted(WHOLE))
        data, whole = WHOLE[what]
        rows = [broken(whole, random_) for _ in range(min(BATCH, left))]
        kept, dropped, refused = judge([whole, *rows], data)
        assert kept + dropped + len(refused) == len(rows) + 1, what
        for fate, count in zip(fates, (kept - 1, dropped, len(refused)), strict=True):
            fates[fate] += count
        left -= len(rows)
    assert sum(fates.values()) == ROWS // len(SEEDS)
    assert min(fates.values()) > 20, fates  # the generator makes all kinds
