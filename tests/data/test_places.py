"""What a template leaves out is tried once for each place of a turn; what a row's texts share is tokenized once.

The oracles: every row tried by itself, and `apply_chat_template(tokenize=True)` of every conversation.
"""

import random
from typing import Any

import pytest
from data_helpers import turns
from datasets import Dataset
from tokenizers import AddedToken

from dpo_peft.data import prepare_dataset
from dpo_peft.data.chat import UNENDED, Chat
from dpo_peft.data.formats import Example
from dpo_peft.data.tokenize import Borders, plain_ids
from dpo_peft.errors import DataError

HEAD = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
TAIL = "{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
# What is shown depends on the turn before, on a later turn, on an earlier one.
TEMPLATES = {
    "the turn before": "{% if loop.first or messages[loop.index0 - 1].role == 'tool' %}{{ m.name }}{% endif %}",
    "a later turn": "{% if messages[loop.index0 + 1:] | selectattr('role', 'equalto', 'user') | list %}{{ m.name }}"
    "{% endif %}",
    "an earlier turn": "{% if messages[: loop.index0] | selectattr('role', 'equalto', 'tool') | list %}{{ m.name }}"
    "{% endif %}",
    "nothing": "",
}


def agent(random_: random.Random, most: int = 12) -> list[dict[str, Any]]:
    """A conversation with an order of roles of its own, and names here and there."""
    roles = ["system", "user"][random_.random() < 0.5 :]
    while len(roles) < most and random_.random() < 0.8:
        roles += ["assistant", *random_.choice((["tool"], ["tool", "tool"], ["user"]))]
    return [
        {"role": role, "content": random_.choice("abcde"), **({"name": "n"} if random_.random() < 0.6 else {})}
        for role in roles
    ]


def pair(prompt: list[dict[str, Any]]) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": turns("x", "yes")[1:], "rejected": turns("x", "no")[1:]}


@pytest.mark.parametrize("name", TEMPLATES)
def test_each_row_says_what_it_would_say_alone(make_tokenizer: Any, name: str) -> None:
    tokenizer, random_ = make_tokenizer(chat_template=HEAD + TEMPLATES[name] + TAIL), random.Random(0)
    rows = [pair(agent(random_)) for _ in range(60)]
    wanted: dict[str, int] = {}
    for row in rows:
        chat = Chat(
            tokenizer, Example("chat", row["prompt"], [row["chosen"], row["rejected"]], ("chosen", "rejected"))
        )
        for key in set().union(*(keys for part in chat.check() for keys in part)) - {UNENDED}:
            wanted[key] = wanted.get(key, 0) + 1
    summary = prepare_dataset(Dataset.from_list(rows), tokenizer)[1]
    assert summary.left_out == wanted and bool(wanted)


@pytest.mark.parametrize("shown", ["m.role != 'tool' or messages[loop.index0 - 1].role != 'tool'", "loop.index > 2"])
def test_a_turn_that_is_lost_in_one_place_is_found_there(make_tokenizer: Any, shown: str) -> None:
    template = f"{HEAD}{{% if {shown} %}}{{{{ m['content'] }}}}{{% endif %}}".replace("{{{{", "{{") + TAIL.replace(
        "{{ m['content'] }}", ""
    )
    tool = {"role": "tool", "content": "5"}
    good = [{"role": "system", "content": ""}, *turns("", "b")[1:], tool, *turns("c")]
    lost = [*good[:3], {"role": "tool", "content": "6"}, *turns("c")] if "tool" in shown else turns("a", "b", "c")
    with pytest.raises(DataError, match=r"train row 2, field 'prompt\[\d\]': the chat template leaves the '\w+' turn"):
        prepare_dataset(
            Dataset.from_list([pair(good), pair(good), pair(lost)]), make_tokenizer(chat_template=template)
        )


def test_an_order_of_roles_that_was_not_seen_costs_no_renderings_of_its_own(
    make_tokenizer: Any, monkeypatch: Any
) -> None:
    tokenizer, random_, calls = make_tokenizer(chat_template=HEAD + TAIL), random.Random(1), []
    rows = [pair([{**m, "name": "n"} for m in agent(random_, 40)]) for _ in range(200)]
    assert len({str([m["role"] for m in row["prompt"]]) for row in rows}) > 120
    original = type(tokenizer).apply_chat_template
    monkeypatch.setattr(
        type(tokenizer), "apply_chat_template", lambda *args, **given: calls.append(0) or original(*args, **given)
    )
    prepare_dataset(Dataset.from_list(rows), tokenizer, max_length=None)
    assert (
        len(calls) < 200 * 10
    )  # prompt and both sides of each, and the rows with a new place; every row by itself: 18


WORDS = ["a", "the", " ", "\n", "\n\n", "7", "é", "😀", "<|im_end|>", "<|im_start|>", "</s>", "it's", "  x"]


@pytest.mark.parametrize("name", ["smollm2", "minimind-6400", "own"])
@pytest.mark.parametrize("opening", ["assistant\n", "assistant", "\n"])
def test_ids_are_those_of_the_whole_text(make_tokenizer: Any, tokenizer_dir: Any, name: str, opening: str) -> None:
    """Also where texts spell special tokens, and begin or end with blanks."""
    if name == "own":
        tokenizer = make_tokenizer()
    else:
        tokenizer = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tokenizer_dir(name))
    tokenizer.chat_template = (HEAD + TAIL).replace("<|im_start|>assistant\n", "<|im_start|>" + opening)
    random_, borders = random.Random(2), Borders(tokenizer)

    def text() -> str:
        return "".join(random_.choices(WORDS, k=random_.randint(1, 9)))

    cut = 0
    for _ in range(150):
        prompt = turns(*(text() for _ in range(random_.choice((1, 3, 5)))))
        sides = [turns("", text())[1:] for _ in range(3)]
        chat = Chat(tokenizer, Example("chat", prompt, sides, ("a", "b", "c")), borders)
        for messages, opens in ((prompt, True), *((prompt + side, False) for side in sides)):
            wanted = tokenizer.apply_chat_template(messages, add_generation_prompt=opens, tokenize=True)["input_ids"]
            assert chat.ids(messages, "prompt", add_generation_prompt=opens) == wanted
        cut += bool(chat.start[0])
    assert cut == 150  # nothing was tokenized in one piece


@pytest.mark.parametrize("other", ["x<|im_start|>", "e<|im", "|im_start|>y<|im_start|>"])
def test_a_token_that_another_reaches_into_is_no_border(make_tokenizer: Any, other: str) -> None:
    tokenizer = make_tokenizer()
    text = "ae" + "<|im_start|>user"
    assert Borders(tokenizer).last(text) == (2, "<|im_start|>")
    tokenizer.add_tokens([AddedToken(other, normalized=False)])
    assert Borders(tokenizer).last(text) == (0, "")


@pytest.mark.parametrize("option", ["lstrip", "single_word", "normalized"])
def test_a_token_that_takes_from_what_is_before_it_is_no_border(make_tokenizer: Any, option: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<turn>", special=True, **{option: True})]})
    assert Borders(tokenizer).last("a <turn>user") == (0, "")
    assert Borders(tokenizer).last("a <turn>user</s>b")[1] == "</s>"
    if option == "lstrip":  # what would go wrong
        whole = plain_ids(tokenizer, "a <turn>b")
        assert whole != plain_ids(tokenizer, "a ") + plain_ids(tokenizer, "<turn>b")
