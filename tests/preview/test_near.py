"""Near duplicates against a comparison of all with all, and by hand."""

import random
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from dpo_peft.preview import look
from dpo_peft.preview.advice import advise, leak_advice
from dpo_peft.preview.near import COMMON, SHOWN, SIMILAR, apart, jaccard, shingles, similar

WORDS = [f"w{n}" for n in range(60)]


def threes(text: str) -> set[tuple[str, ...]]:
    words = text.lower().split()
    return {tuple(words[at : at + 3]) for at in range(len(words) - 2)}


def alike(one: str, other: str) -> float:
    return len(threes(one) & threes(other)) / len(threes(one) | threes(other))


def texts(number: int, seed: int) -> list[str]:
    """Random texts; a third of them are others with a few words changed."""
    draw, made = random.Random(seed), list[str]()
    for n in range(number):
        words = draw.choices(WORDS, k=draw.randint(8, 60))
        if n % 3 == 2:
            words = draw.choice(made).split()
            for _ in range(draw.randint(0, 4)):
                words[draw.randrange(len(words))] = draw.choice(WORDS)
        made.append(" ".join(words))
    return made


@pytest.mark.parametrize("threshold", [0.5, 0.8, 1.0])
def test_none_is_missed_and_none_is_made_up(threshold: float) -> None:
    """What a comparison of all with all finds, with the same rule of what is kept."""
    for seed in range(4):
        made = texts(150, seed)
        kept, expected = list[int](), list[int]()
        for i, text in enumerate(made):
            near = any(alike(text, made[j]) >= threshold for j in kept)
            (expected if near else kept).append(i)
        found = similar([shingles(text) for text in made], threshold=threshold)
        assert [i for i, _ in found] == expected and len(expected) > 5
        assert all(alike(made[i], made[j]) >= threshold for i, j in found)
        known, others = made[:90], made[90:]
        found = similar([shingles(t) for t in others], [shingles(t) for t in known], threshold)
        assert [i for i, _ in found] == [
            i for i, text in enumerate(others) if any(alike(text, one) >= threshold for one in known)
        ]


def test_shingles_and_similarity_by_hand() -> None:
    assert len(shingles("The cat, the CAT: the cat")) == 2  # the-cat-the and cat-the-cat
    assert [len(shingles(text)) for text in ("", "one", "one two", "one two three four")] == [0, 1, 1, 2]
    assert (shingles("One  two!") == shingles("one two")).all() and shingles("one") != shingles("one", salt=1 << 63)
    assert len(shingles("我喜欢猫")) == 2  # no blanks: four letters are two threes
    assert jaccard(shingles("a b c d e"), shingles("a b c d x")) == 2 / 4


def test_a_template_says_nothing() -> None:
    """Prompts that share a long instruction are as different as their questions."""
    start = " ".join(f"rule{n}" for n in range(40))
    made = [f"{start} question {n} about {n * 7}" for n in range(COMMON + 1)]
    assert alike(made[0], made[1]) > SIMILAR
    assert similar([shingles(text) for text in made]) == []
    assert len(similar([shingles(text) for text in made[:50]])) == 49  # too few to be told from copies


def pair(prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_rows_are_near_in_all_their_parts() -> None:
    prompt, chosen, rejected = (" ".join(f"{side}{n}" for n in range(40)) for side in "pcr")
    rows = [
        pair(prompt, chosen, rejected),
        pair(prompt + " please", chosen, rejected.replace("r7 ", "R7, ")),  # near
        pair(prompt, "yes it is", "no it is not"),  # the same prompt alone
        pair(prompt, chosen, rejected),  # an exact one, which is counted as such
        pair(prompt, rejected, chosen),  # the opposite, which is too
        pair("yes it is", "p q r s", "t u v w"),  # words of a completion in a prompt
    ]
    seen = look(Dataset.from_list(rows))
    texts = [
        ["p36 p37 p38 p39 [please] | c0 c1 c2 … r3 r4 r5 r6 [R7,] r8 r9 r10 r11 …"],
        ["p36 p37 p38 p39 [] | c0 c1 c2 … r3 r4 r5 r6 [r7] r8 r9 r10 r11 …"],
    ]
    found = {"rows": 1, "first": [(1, 0)], "texts": [[one[0] for one in texts]]}
    assert seen.facts["repeats"]["near_duplicates"] == found
    assert any("nearly an earlier one (rows 1 and 0)" in line for line in advise(seen.facts))
    held_out = [
        pair(prompt + " now", "a b c d", "e f g h"),
        pair("z", "a", "b"),
        pair(prompt, rejected, chosen + " x"),
    ]
    leak = seen.leak(look(Dataset.from_list(held_out), name="eval"))
    assert (leak["rows"], leak["first"]) == (1, [(2, 0)])
    prompts, whole = (leak[name].pop("texts") for name in ("near_prompts", "near_rows"))
    assert leak["near_prompts"] == {"rows": 1, "first": [(0, 0)]} and leak["near_rows"] == {
        "rows": 1,
        "first": [(2, 0)],
    }
    assert prompts == [["p36 p37 p38 p39 [now] …", "p36 p37 p38 p39 [] …"]]  # without the completions
    assert [len(text) <= SHOWN for text in whole[0]] == [True, True] and whole[0][0].endswith("…")
    assert len(leak_advice(leak, "eval")) == 2 and "nearly a prompt" in leak_advice(leak, "eval")[1]


def test_what_differs_of_two_texts_by_hand() -> None:
    one, other = "a b c d e f g h i j k l m n o", "a b c d e F g h i j k l m n o p"
    assert apart(one, other) == ["b c d e [f] g h i j … l m n o [] …", "b c d e [F] g h i j … l m n o [p] …"]
    assert apart("我喜欢猫,因为", "我喜欢狗,因为") == ["我喜欢[猫],因为 …", "我喜欢[狗],因为 …"]  # no blanks
    assert apart("a  b\nc", "a b c") == ["(the same words)"] * 2
    assert {len(text) for text in apart("x" * 500, "y" * 500)} == {SHOWN + 1}


def test_nothing_to_compare() -> None:
    empty = np.empty(0, np.uint32)
    assert similar([]) == similar([empty, empty]) == similar([empty], [shingles("a b c")]) == []
