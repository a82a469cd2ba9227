"""Lists of graded answers and single judged completions: every format by hand, the order, rows without signal."""

import pytest
import trl
from data_helpers import answer, turns, word_tokenizer
from datasets import Dataset, IterableDataset

from dpo_peft.data import prepare_dataset
from dpo_peft.errors import DataError, OptionError

# Words: a 3, b 4, c 5, d 6, </s> 2; in a conversation "user a end assistant b end": user 7, assistant 8, end 9.
CHAT = [7, 3, 9, 8]  # "user a end assistant"
TEXT = {"prompt": "a b", "chosen": " c", "rejected": [" d", " d d"]}
CHOSEN_FIRST = [1.0, 0.0, 0.0]
LISTS = {
    "text": (TEXT, [3, 4], [[5, 2], [6, 2], [6, 6, 2]], CHOSEN_FIRST),
    "text with one rejected": ({**TEXT, "rejected": " d"}, [3, 4], [[5, 2], [6, 2]], [1.0, 0.0]),
    "text, implicit prompt": (
        {"chosen": "a b c", "rejected": ["a b d", "a b d d"]},
        [3, 4],
        [[5, 2], [6, 2], [6, 6, 2]],
        CHOSEN_FIRST,
    ),
    "transcript": (
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": ["\n\nHuman: a\n\nAssistant: c"]},
        [0, 3, 0],
        [[4, 2], [5, 2]],
        [1.0, 0.0],
    ),
    "chat": (
        {"prompt": turns("a"), "chosen": answer("b"), "rejected": [answer("c"), answer("d d")]},
        CHAT,
        [[4, 9], [5, 9], [6, 6, 9]],
        CHOSEN_FIRST,
    ),
    "chat with one rejected": (
        {"prompt": turns("a"), "chosen": answer("b"), "rejected": answer("c")},
        CHAT,
        [[4, 9], [5, 9]],
        [1.0, 0.0],
    ),
    "chat, implicit prompt": (
        {"chosen": turns("a", "b"), "rejected": [turns("a", "c"), turns("a", "d d")]},
        CHAT,
        [[4, 9], [5, 9], [6, 6, 9]],
        CHOSEN_FIRST,
    ),
    "ids": (
        {"prompt_ids": [3], "chosen_ids": [4, 2], "rejected_ids": [[5, 2], [6, 2]]},
        [3],
        [[4, 2], [5, 2], [6, 2]],
        CHOSEN_FIRST,
    ),
    "ids with one rejected": (
        {"prompt_ids": [3], "chosen_ids": [4, 2], "rejected_ids": [5, 2]},
        [3],
        [[4, 2], [5, 2]],
        [1.0, 0.0],
    ),
    # Ranks: lower is better; the two equal ones stay in their order.
    "ranked text": (
        {"prompt": "a", "completions": [" b", " c", " d"], "ranks": [2, 0, 0]},
        [3],
        [[5, 2], [6, 2], [4, 2]],
        [0.0, 0.0, -2.0],
    ),
    "ranks from one": (
        {"prompt": "a", "completions": [" b", " c"], "ranks": [1, 2]},
        [3],
        [[4, 2], [5, 2]],
        [-1.0, -2.0],
    ),
    "scored text": (
        {"prompt": "a", "completions": [" b", " c", " d"], "scores": [0.5, -1.5, 7.25]},
        [3],
        [[6, 2], [4, 2], [5, 2]],
        [7.25, 0.5, -1.5],
    ),
    "ranked chat": (
        {"prompt": turns("a"), "completions": [answer("b"), answer("c d")], "ranks": [1, 0]},
        CHAT,
        [[5, 6, 9], [4, 9]],
        [0.0, -1.0],
    ),
    "scored chat, implicit prompt": (
        {"completions": [turns("a", "b"), turns("a", "c d")], "scores": [1, 2]},
        CHAT,
        [[5, 6, 9], [4, 9]],
        [2.0, 1.0],
    ),
    "ranked ids": (
        {"prompt_ids": [3], "completions_ids": [[4, 2], [5, 2]], "ranks": [1, 0]},
        [3],
        [[5, 2], [4, 2]],
        [0.0, -1.0],
    ),
}
SINGLES = {
    "text": ({"prompt": "a", "completion": " b", "label": True}, [3], [[4, 2]], [1.0]),
    "number as label": ({"prompt": "a", "completion": " b", "label": 0}, [3], [[4, 2]], [0.0]),
    "chat": ({"prompt": turns("a"), "completion": answer("b"), "label": False}, CHAT, [[4, 9]], [0.0]),
    "messages": (
        {"messages": turns("a", "b", "c", "d"), "label": True},
        [7, 3, 9, 8, 4, 9, 7, 5, 9, 8],
        [[6, 9]],
        [1.0],
    ),
    "messages that end with two turns": (
        {"messages": [*turns("a"), *answer("b"), *answer("c")], "label": True},
        CHAT,
        [[4, 9, 8, 5, 9]],
        [1.0],
    ),
    "messages with a tool": (
        {"messages": [*turns("a", "b"), {"role": "tool", "content": "c"}, *answer("d")], "label": True},
        [7, 3, 9, 8, 4, 9, 11, 5, 9, 8],
        [[6, 9]],
        [1.0],
    ),
    "ids": ({"prompt_ids": [3], "completion_ids": [4, 2], "label": True}, [3], [[4, 2]], [1.0]),
    "pair": ({"prompt": "a", "chosen": " b", "rejected": " c"}, [3], [[4, 2], [5, 2]], [1.0, 0.0]),
    "list": (TEXT, [3, 4], [[5, 2], [6, 2], [6, 6, 2]], CHOSEN_FIRST),
    "conversations": (
        {"chosen": turns("a", "b"), "rejected": turns("a", "c")},
        CHAT,
        [[4, 9], [5, 9]],
        [1.0, 0.0],
    ),
}


def as_dataset(rows):
    return IterableDataset.from_generator(lambda: iter(rows))


@pytest.mark.parametrize(
    ("data", "case"), [("lists", case) for case in LISTS] + [("singles", case) for case in SINGLES]
)
@pytest.mark.parametrize("stream", [False, True], ids=["dataset", "stream"])
def test_by_hand(data, case, stream):
    row, prompt_ids, completion_ids, grades = (LISTS if data == "lists" else SINGLES)[case]
    dataset = as_dataset([row]) if stream else Dataset.from_list([row])
    prepared, report = prepare_dataset(dataset, word_tokenizer(), data=data)
    wanted = {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "row": 0, "grades": grades}
    assert list(prepared) == [wanted] and prepared.column_names == list(wanted)
    assert report.completions == len(grades) and report.prompt_tokens == len(prompt_ids)
    assert report.unshared_tokens == len(prompt_ids) * len(grades) + sum(map(len, completion_ids))
    counts = (grades.count(1.0), grades.count(0.0)) if data == "singles" else (0, 0)
    assert (report.desirable, report.undesirable) == counts


@pytest.mark.parametrize("case", SINGLES)
@pytest.mark.parametrize("stream", [False, True], ids=["dataset", "stream"])
def test_unpaired_by_hand(case, stream):
    row, prompt_ids, completion_ids, grades = SINGLES[case]
    dataset = as_dataset([row, row]) if stream else Dataset.from_list([row, row])
    prepared, report = prepare_dataset(dataset, word_tokenizer(), data="singles", unpair=True)
    assert list(prepared) == [
        {"prompt_ids": prompt_ids, "completion_ids": [ids], "row": number, "grades": [grade]}
        for ids, grade in zip(completion_ids, grades, strict=True)
        for number in (0, 1)
    ]
    assert (report.kept_rows, report.completions) == (2 * len(grades), 2 * len(grades))
    assert (report.desirable, report.undesirable) == (2 * grades.count(1.0), 2 * grades.count(0.0))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", ["text", "implicit", "chat"])
def test_unpaired_in_the_order_of_trl(kind):
    """1003 pairs, of which one teaches nothing: TRL takes 1000 at a time, all chosen ones first."""
    words, ones = "abcd", range(1003)
    texts = [(words[i % 4], words[(i + 1) % 4] * (1 + i % 3), words[(i + 2) % 4]) for i in ones]
    columns = [("prompt", "chosen", "rejected")[i] for i in range(3)]
    rows = [dict(zip(columns, [a, f" {' '.join(b)}", f" {c}"], strict=True)) for a, b, c in texts]
    if kind == "implicit":
        rows = [{side: f"{row['prompt']} d{row[side]}" for side in columns[1:]} for row in rows]
    if kind == "chat":
        rows = [{"prompt": turns(a), "chosen": answer(" ".join(b)), "rejected": answer(c)} for a, b, c in texts]
    paired = Dataset.from_list(rows) if kind != "implicit" else Dataset.from_list(rows).map(trl.extract_prompt)
    expected, _ = prepare_dataset(trl.unpair_preference_dataset(paired), word_tokenizer(), data="singles")
    same = {**rows[0], "rejected": rows[0]["chosen"]}
    prepared, report = prepare_dataset(Dataset.from_list([*rows, same]), word_tokenizer(), data="singles", unpair=True)
    for column in ("prompt_ids", "completion_ids", "grades"):
        assert prepared[column][:] == expected[column][:]
    assert report.dropped_rows == {"identical_completions": [1003]} and len(prepared) == 2006


def test_unpaired_singles_alone():
    with pytest.raises(OptionError, match="unpair=True has no effect on data='pairs'"):
        prepare_dataset(Dataset.from_list([TEXT]), word_tokenizer(), unpair=True)


def ranked(completions, ranks):
    return {"prompt": "a", "completions": completions, "ranks": ranks}


WITHOUT_SIGNAL = {
    "no_ranking": ranked([" b", " c", " d"], [1, 1, 1]),
    "no_single_best": ranked([" b", " c", " d"], [0, 0, 1]),
    "same_text_ranked_apart": ranked([" b", " c", " b</s>"], [0, 1, 2]),  # the end token stands once in both
    "identical_completions": ranked([" b", " b"], [0, 1]),
    "empty_completion": ranked([" b", " "], [0, 1]),
    "identical_after_truncation": ranked([" b d", " b b b c c", " b b b d d"], [2, 0, 1]),
}


@pytest.mark.parametrize("reason", WITHOUT_SIGNAL)
def test_list_without_signal(reason):
    good = ranked([" b", " c"], [0, 1])
    dataset = Dataset.from_list([good, WITHOUT_SIGNAL[reason]])
    options = dict(data="lists", max_length=4)
    prepared, report = prepare_dataset(dataset, word_tokenizer(), single_best=True, **options)
    assert report.dropped_rows == {reason: [1]} and prepared["row"][:] == [0]
    with pytest.raises(DataError, match=f"train row 1: {reason}: "):
        prepare_dataset(dataset, word_tokenizer(), single_best=True, on_unusable="error", **options)
    # Without the need for one best, and without a limit, ties and long answers are fine.
    usable = reason in ("no_single_best", "identical_after_truncation")
    prepared = prepare_dataset(dataset, word_tokenizer(), data="lists")[0]
    assert len(prepared) == 1 + usable


def test_equal_answers_with_the_same_grade_stay():
    row = {"prompt": "a", "chosen": " b", "rejected": [" c", " c"]}
    prepared, _ = prepare_dataset(Dataset.from_list([row]), word_tokenizer(), data="lists", single_best=True)
    assert prepared[0]["completion_ids"] == [[4, 2], [5, 2], [5, 2]]


def test_same_text_as_desirable_and_undesirable_is_dropped_and_one_answer_is_not():
    rows = [
        {"prompt": "a", "chosen": " b", "rejected": [" b"]},
        {"prompt": "a", "chosen": " b", "rejected": [" c", " b"]},
        {"prompt": "a", "chosen": " b", "rejected": [" c"]},
    ]
    _, report = prepare_dataset(Dataset.from_list(rows), word_tokenizer(), data="singles", max_unusable_share=0.9)
    assert report.dropped_rows == {"identical_completions": [0], "same_text_ranked_apart": [1]}
    single = [{"prompt": "a", "completion": " b", "label": True}] * 3  # K = 1: nothing to be identical with
    prepared, report = prepare_dataset(Dataset.from_list(single), word_tokenizer(), data="singles")
    assert len(prepared) == 3
    assert "completions: 3 desirable, 0 undesirable; with one kind alone there is nothing to compare" in str(report)


def test_rows_of_one_set_may_have_any_number_of_answers():
    rows = [ranked([" b"] + [" c" + " d" * i for i in range(m)], [0] + [1] * m) for m in range(1, 8)]
    prepared, report = prepare_dataset(Dataset.from_list(rows), word_tokenizer(), data="lists", single_best=True)
    assert [len(row["completion_ids"]) for row in prepared] == list(range(2, 9))
    assert report.prompt_tokens == 7 and report.completions == sum(range(2, 9))


def test_truncation_cuts_all_answers_beside_one_prompt():
    row = {"prompt": "a a a", "completions": [" b b b", " c", " d d"], "ranks": [1, 0, 2]}
    made = {
        mode: prepare_dataset(
            Dataset.from_list([row]), word_tokenizer(), data="lists", max_length=5, truncation_mode=mode
        )
        for mode in ("keep_start", "keep_end", "trim_prompt")
    }
    assert made["keep_start"][0][0]["completion_ids"] == [[5, 2], [4, 4], [6, 6]]
    assert made["keep_start"][1].ends_lost == 2
    for mode in ("keep_end", "trim_prompt"):
        prepared = made[mode][0][0]
        assert (prepared["prompt_ids"], prepared["completion_ids"]) == ([3], [[5, 2], [4, 4, 4, 2], [6, 6, 2]])


def test_a_list_has_the_pairs_ids(make_tokenizer):
    """Chosen and one rejected as a list of two: nothing but the grades is new."""
    rows = [{"prompt": turns("Hi", "Ho", "the in"), "chosen": answer("\nyes"), "rejected": answer("and on")}]
    pairs, _ = prepare_dataset(Dataset.from_list(rows), make_tokenizer())
    for data in ("lists", "singles"):
        lists, _ = prepare_dataset(Dataset.from_list(rows), make_tokenizer(), data=data)
        assert lists.remove_columns("grades")[:] == pairs[:]


def test_ids_of_a_list_do_not_depend_on_its_other_answers():
    rows = [ranked([" b", " c d", " d"], [2, 0, 1])]
    whole = prepare_dataset(Dataset.from_list(rows), word_tokenizer(), data="lists")[0][0]
    pairs = [{"prompt": "a", "chosen": c, "rejected": " x"} for c in (" c d", " d", " b")]
    alone = prepare_dataset(Dataset.from_list(pairs), word_tokenizer())[0]
    assert whole["completion_ids"] == [row["completion_ids"][0] for row in alone]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"data": "triples"}, "data='triples' is unknown. Use one of pairs, lists, singles, trajectories"),
        ({"discount_unit": "word"}, "discount_unit='word' is unknown"),
        ({"label_columns": ("score",)}, "label_columns=\\('score',\\) must hold nothing but"),
        ({"label_columns": "margin"}, "label_columns="),
    ],
)
def test_wrong_option(options, words):
    with pytest.raises(OptionError, match=words):
        prepare_dataset(Dataset.from_list([TEXT]), word_tokenizer(), **options)


# ---- Completions that nobody judged ---------------------------------------------------------------------------------

UNLABELED = {
    "several texts": (
        [{"prompt": "a", "completions": [" b", " ", " b", " c d"]}, {"prompt": "b", "completions": [" c"]}],
        [([3], [4, 2], 0, 0), ([3], [4, 2], 0, 2), ([3], [5, 6, 2], 0, 3), ([4], [5, 2], 1, 0)],
        {"empty_completion": 1},
    ),
    "several chats, none in the first row": (
        [{"prompt": turns("a"), "completions": []}, {"prompt": turns("a"), "completions": [answer("b"), answer("c")]}],
        [(CHAT, [4, 9], 1, 0), (CHAT, [5, 9], 1, 1)],
        {},
    ),
    "several ids": (
        [{"prompt_ids": [3], "completions_ids": [[4, 2], [5, 2]]}],
        [([3], [4, 2], 0, 0), ([3], [5, 2], 0, 1)],
        {},
    ),
    "one": ([{"prompt": "a", "completion": " b"}], [([3], [4, 2], 0, 0)], {}),
    "messages": ([{"messages": turns("a", "b")}], [(CHAT, [4, 9], 0, 0)], {}),
    "labels are not read": ([{"prompt": "a", "completions": [" b"], "ranks": [0]}], [([3], [4, 2], 0, 0)], {}),
}


@pytest.mark.parametrize("case", UNLABELED)
def test_each_unlabeled_completion_is_a_row_of_its_own(case):
    rows, wanted, dropped = UNLABELED[case]
    prepared, report = prepare_dataset(Dataset.from_list(rows), word_tokenizer(), data="unlabeled")
    assert prepared.column_names == ["prompt_ids", "completion_ids", "row", "completion"]
    assert [(r["prompt_ids"], *r["completion_ids"], r["row"], r["completion"]) for r in prepared] == wanted
    assert report.dropped == dropped and report.source_rows == len(wanted) + sum(dropped.values())


@pytest.mark.parametrize("data", ["pairs", "singles", "trajectories"])
@pytest.mark.parametrize("grades", [{"ranks": [1, 0, 2]}, {"scores": [0.5, 2.0, -1.0]}])
def test_the_best_and_the_worst_of_a_ranked_list_are_a_pair(data: str, grades: dict[str, list[float]]) -> None:
    """The second of three is the best one, the third the worst; equal grades teach nothing."""
    tied = {name: [values[0]] * 3 for name, values in grades.items()}
    ranked = [{"prompt": "a", "completions": [" b", " c", " d"], **given} for given in (grades, tied)]
    found, report = prepare_dataset(as_dataset(ranked), word_tokenizer(), data=data)
    pair = {"prompt": "a", "chosen": " c", "rejected": " d"}
    assert list(found) == list(prepare_dataset(as_dataset([pair]), word_tokenizer(), data=data)[0])
    assert next(iter(found))["completion_ids"] == [[5, 2], [6, 2]]


def test_unlabeled_completions_are_named_by_row_and_number():
    rows = [{"prompt": "a", "completions": [" b"]}, {"prompt": "a", "completions": [" b", None]}]
    with pytest.raises(DataError, match=r"train row 1, field 'completions\[1\]': expected text, found nothing"):
        prepare_dataset(Dataset.from_list(rows), word_tokenizer(), data="unlabeled", on_unusable="error")
    with pytest.raises(DataError, match="column 'completion' is missing.*prompt/completions or messages"):
        prepare_dataset(Dataset.from_list([TEXT]), word_tokenizer(), data="unlabeled")
    with pytest.raises(OptionError, match="'unlabeled' needs a datasets.Dataset"):
        prepare_dataset(as_dataset(rows), word_tokenizer(), data="unlabeled")
