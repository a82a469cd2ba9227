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

from dpo_peft.data import converters, prepare_dataset
from dpo_peft.errors import DataError

# Words, with everything that a message or a row may bring.
TEMPLATE = (
    "{% for tool in tools or [] %}tool {{ tool | tojson }} {% endfor %}{% for m in messages %}{{ m['role'] }} "
    "{{ m['content'] or '' }} {% for call in m['tool_calls'] or [] %}{{ call | tojson }} {% endfor %}end {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
ROWS = 10_000
BATCH = 20  # rows of a dataset, after one that is whole
SEEDS = range(10)

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


@pytest.mark.attack("hostile rows")
@pytest.mark.slow
@pytest.mark.sampled(10, slow=5)
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


# ---- Rows of public formats ----------------------------------------------------------------------------------------

TREE = {"role": "prompter", "text": "q", "replies": [
    {"role": "assistant", "text": "a", "rank": 0, "replies": [{"role": "prompter", "text": "w", "replies": []}]},
    {"role": "assistant", "text": "b", "rank": 1, "replies": None},
]}  # fmt: skip
PUBLIC: dict[str, dict[str, Any]] = {
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
PUBLIC["pandalm_decided"] = PUBLIC["from_pandalm"]


def slots(value: Any) -> list[tuple[Any, Any]]:
    """Every place inside a row: what holds it, and under which key."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in inner for place in ((value, key), *slots(item))]


@pytest.mark.attack("hostile rows")
@pytest.mark.parametrize("name", PUBLIC)
def test_broken_rows_are_converted_or_refused(name: str) -> None:
    random_, convert, fates = random.Random(3), getattr(converters, name), {"made": 0, "refused": 0}
    convert(PUBLIC[name])
    for _ in range(1_500):
        row: Any = copy.deepcopy(PUBLIC[name])
        for _ in range(random_.randint(0, 2)):
            holder, key = random_.choice(slots(row))
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
