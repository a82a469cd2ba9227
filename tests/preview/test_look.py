"""What is found in rows, against rows that were made for it and counted by hand."""

from typing import Any

import pytest
from data_helpers import GEMMA_LIKE, turns, word_tokenizer
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dpo_peft import DataError
from dpo_peft.preview import look
from dpo_peft.preview.advice import advise, leak_advice
from dpo_peft.preview.style import APOLOGY, FORMS, compare_forms, compare_lengths, forms_of, script
from dpo_peft.preview.template import default_system, describe_template, family_of, stop_tokens
from dpo_peft.quickstart import model_path

LIST = "Sure:\n- one\n- two"


def pair(prompt: str, chosen: str, rejected: str, **others: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **others}


def test_repeats_and_contradictions() -> None:
    rows = [
        pair("p", "a", "b"),
        pair("p", "b", "a"),  # the opposite of 0
        pair("p", "a", "b"),  # repeats 0, the opposite of 1
        pair("q", "a", "b"),  # another prompt
        pair("r", "b", "a"),
        pair("r", "same", "same"),
        pair("s", " ", "x"),
    ]
    found = look(Dataset.from_list(rows))
    facts = found.facts
    assert (facts["rows"], facts["usable"]) == (7, 5)
    assert {reason: one["first"] for reason, one in facts["unusable"].items()} == {
        "identical_completions": [5],
        "empty_completion": [6],
    }
    assert facts["repeats"]["duplicates"] == {"rows": 1, "first": [(2, 0)]}
    assert facts["repeats"]["contradictions"] == {"rows": 2, "first": [(1, 0), (2, 1)]}
    assert (facts["repeats"]["prompts"], facts["repeats"]["most_rows_of_a_prompt"]) == (3, 3)
    assert facts["repeats"]["rows_that_share_a_prompt"] == 3
    other = look(Dataset.from_list([pair("z", "a", "b"), pair("r", "c", "d"), pair("p", "c", "d")]), name="eval")
    leak = found.repeats.leak(other.repeats)
    assert (leak["rows"], leak["of"], leak["first"]) == (2, 3, [(1, 4), (2, 0)])
    assert "2 of 3 rows of eval" in leak_advice(leak, "eval")[0]
    assert leak_advice(found.repeats.leak(look(Dataset.from_list([pair("z", "a", "b")])).repeats), "eval") == []


def test_what_contradicts_in_lists_and_singles() -> None:
    texts = ["a", "b", "c"]
    lists = [{"prompt": "p", "completions": texts, "ranks": ranks} for ranks in ([1, 2, 3], [2, 3, 1], [1, 1, 2])]
    found = look(Dataset.from_list(lists), data="lists").facts["repeats"]
    assert found["contradictions"]["first"] == [(1, 0), (2, 1)]  # c before a; a before c
    singles = [("a", True), ("a", False), ("b", True), ("b", True)]
    rows = [{"prompt": "p", "completion": text, "label": label} for text, label in singles]
    found = look(Dataset.from_list(rows), data="singles").facts["repeats"]
    assert (found["contradictions"]["first"], found["duplicates"]["first"]) == ([(1, 0)], [(3, 2)])


def test_a_preference_turns_a_pair_around() -> None:
    rows = [
        pair("p", "aa", "b", preference=0.9),
        pair("p", "aa", "b", preference=0.1),
        pair("q", "aa", "b", preference=0.5),
    ]
    facts = look(Dataset.from_list(rows), label_columns=("preference",)).facts
    assert facts["repeats"]["contradictions"]["first"] == [(1, 0)]
    assert facts["bias"]["length"]["length_only"]["value"] == 0.5  # one of two: the tie says nothing


def test_lengths_by_hand() -> None:
    chosen = ["aaa", "aaaa", "aaaaa", "a", "aa"]
    rows = [pair("p" * number, text, "bb") for number, text in enumerate(chosen, 1)]
    facts = look(Dataset.from_list(rows)).facts
    assert facts["lengths"]["unit"] == "characters"
    assert facts["lengths"]["chosen"] == {"mean": 3.0, "min": 1, "median": 3, "p90": 5, "p99": 5, "max": 5}
    length = facts["bias"]["length"]
    assert length["longer"]["value"] == pytest.approx(3 / 5) and length["shorter"] == pytest.approx(1 / 5)
    # Wilson of 3 of 5: center (0.6 + 1.96²/10) / (1 + 1.96²/5), half 1.96 sqrt(0.24/5 + 1.96²/100) / (same)
    assert (length["longer"]["low"], length["longer"]["high"]) == pytest.approx((0.23072, 0.88238), abs=1e-4)
    assert length["length_only"]["value"] == pytest.approx(0.7)  # the tie counts half
    assert length["mean_difference"] == pytest.approx(1.0)


def test_lengths_of_singles_are_compared_across_rows() -> None:
    bias = compare_lengths([[5], [1], [3], [3]], [[1.0], [1.0], [0.0], [0.0]])
    assert bias is not None
    assert (bias.longer.value, bias.shorter, bias.length_only.value) == (0.5, 0.5, 0.5)
    assert compare_lengths([[5], [1]], [[1.0], [1.0]]) is None


@pytest.mark.parametrize(
    ("chosen", "rejected", "both", "notable"),
    [
        (8, 0, 0, True),  # 8 / sqrt(8) = 2.83 is beyond 2.69, which 5 % / 7 forms makes of 1.96
        (7, 0, 0, False),  # 2.65 is not
        (0, 8, 0, True),
        (20, 20, 30, False),  # equal shares
        (9, 1, 60, False),  # 8 / sqrt(10) = 2.53
        (12, 1, 60, True),  # 11 / sqrt(13) = 3.05
    ],
)
def test_a_form_counts_when_it_is_more_than_noise(chosen: int, rejected: int, both: int, notable: bool) -> None:
    texts = [(LIST, "no")] * chosen + [("no", LIST)] * rejected + [(LIST, LIST)] * both
    texts += [("no", "no")] * (100 - len(texts))
    better, worse = ([forms_of(one[side], "p") for one in texts] for side in (0, 1))
    form = compare_forms(better, worse, paired=True)["lists"]
    assert (form.better, form.worse) == pytest.approx(((chosen + both) / 100, (rejected + both) / 100))
    assert form.notable is notable
    assert not any(one.notable for name, one in compare_forms(better, worse, paired=True).items() if name != "lists")


def test_a_rare_form_is_not_notable_however_many_rows() -> None:
    better = [forms_of(LIST if number < 60 else "no", "p") for number in range(2000)]  # 3 %
    assert not compare_forms(better, [forms_of("no", "p")] * 2000, paired=True)["lists"].notable


@pytest.mark.parametrize(
    ("name", "having", "lacking"),
    [
        ("lists", ["1. a\n2. b", "* a\n* b", "x\n • a\n • b"], ["- one dash", "a - b\nc - d", "1.5 m\n2.5 m"]),
        ("headings", ["# A\ntext", "a\n### B"], ["#hash", "a # b"]),
        ("bold", ["a **b** c"], ["2 ** 3 ** 4", "*a*"]),
        ("code blocks", ["```py\nx\n```"], ["`x`"]),
        (
            "refusal or apology first",
            ["I'm sorry, but", "I’m sorry", "I cannot help", "As an AI", "很抱歉，我", "Sorry!"],
            ["I see. I'm sorry", "Unfortunately for him it rained", "I can do that"],
        ),
        ("a question last", ["Is it? ", 'He said "why?"', "好吗？"], ["Why? Because."]),
        ("another script than the prompt", ["你好"], ["Hello", "123"]),
    ],
)
def test_each_form(name: str, having: list[str], lacking: list[str]) -> None:
    has = FORMS[name]
    assert [text for text in having if not has(text, "A prompt")] == []
    assert [text for text in lacking if has(text, "A prompt")] == []


def test_scripts() -> None:
    texts = {"Hello": "LATIN", "naïve Ünï": "LATIN", "привет, Bob": "CYRILLIC", "日本語のテキスト": "CJK", "12!": ""}
    assert {text: script(text) for text in texts} == texts
    assert APOLOGY.match("“Sorry")


def test_bias_is_told_with_both_shares() -> None:
    rows = [pair(f"p{n}", LIST if n < 61 else "plain", LIST if n < 12 else "plain") for n in range(100)]
    rows = [row if row["chosen"] != row["rejected"] else {**row, "chosen": row["chosen"] + "."} for row in rows]
    said = " ".join(advise(look(Dataset.from_list(rows)).facts))
    assert "chosen has lists in 61%, rejected in 12%: the model will learn lists" in said
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    assert "chosen has lists in 12%, rejected in 61%: the model will unlearn lists" in " ".join(
        advise(look(Dataset.from_list(swapped)).facts)
    )
    even = [pair(f"p{n}", f"text {n} a", f"text {n} b") for n in range(100)]
    assert advise(look(Dataset.from_list(even)).facts) == []


def test_what_would_stop_training_does_not_stop_the_look() -> None:
    rows = [pair("p", "a", "b", system="You are a pirate, speak so."), pair("p", None, "b", system="x")]
    found = look(Dataset.from_list(rows))
    assert found.facts["usable"] == 1 and found.facts["columns"]["unread"] == ["system"]
    assert found.facts["unusable"]["missing_value"]["first"] == [1]
    assert any("'system' holds text that is not read" in stop for stop in found.stops)
    with pytest.raises(DataError, match="empty"):
        look(Dataset.from_list([]))


# ---- With a tokenizer -----------------------------------------------------------------------------------------------


def test_tokens_by_hand() -> None:
    tokenizer = word_tokenizer()
    rows = [pair("a b c", " d d a", " c"), pair("a", " b", " c"), pair("a b c d a", " b", " c")]
    found = look(Dataset.from_list(rows), tokenizer, stop_tokens=[2], max_length=5)
    facts = found.facts
    assert facts["unusable"]["prompt_too_long"]["first"] == [2] and facts["usable"] == 2
    assert facts["lengths"]["prompt"]["mean"] == 3.0  # of 3, 1 and 5 tokens, before anything is cut
    assert facts["lengths"]["chosen"]["max"] == 4 and facts["longest"] == 7
    # Kept: 3 + (2, 2) and 1 + (2, 2)
    wanted = {"rows_truncated": 1, "ends_lost": 1, "total_tokens": 12, "unshared_tokens": 16, "longest": 5}
    assert {name: facts["tokens"][name] for name in wanted} == wanted
    assert facts["template"]["completions_without_stop"] == 0
    assert "row 0: 3 tokens of prompt, 2, 2 of completion" in found.rendered(1)[0]
    assert "[2 tokens cut]" in found.rendered(1)[0]
    never = look(Dataset.from_list(rows[:2]), tokenizer, stop_tokens=[9], max_length=None)
    assert never.facts["template"]["completions_without_stop"] == 4
    assert any("would not learn to stop" in sentence for sentence in advise(never.facts))


DEFAULT = "{% if messages[0]['role'] != 'system' %}<s>system\nBe kind.</s>\n{% endif %}"
TURNS = "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
FIRST = "{% set s = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
DATED = FIRST + "<s>system\nToday: now\n{{ s }}</s>\n"
OTHERS = "{% for m in messages if m['role'] != 'system' %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"


@pytest.mark.parametrize(
    ("template", "expected"),
    [(DEFAULT + TURNS, "Be kind."), (TURNS, ""), (DATED + OTHERS, "Today: now"), (GEMMA_LIKE, "")],
)
def test_the_system_prompt_that_a_template_adds(template: str, expected: str) -> None:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = template
    if template == GEMMA_LIKE:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    assert default_system(tokenizer) == expected


def test_the_template_of_a_model() -> None:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model_path())
    stops = stop_tokens(str(model_path()), tokenizer)
    assert describe_template(tokenizer, stops) == {
        "family": "chatml",
        "default_system": "",
        "date": None,
        "stops": ["<|im_end|>"],
    }
    assert family_of("<start_of_turn>user") == "gemma" and family_of("plain") == ""
    rows = [pair("<start_of_turn>user Hello.", "A treat.", "Rain.")]
    facts = look(Dataset.from_list(rows), tokenizer, stop_tokens=stops).facts
    assert any("another template (gemma)" in sentence for sentence in advise(facts))
    assert turns("x")[0]["role"] == "user"
