"""Malformed rows and datasets of lists, single judged completions, labels, trajectories: where, what, and the remedy.

Rows come in as streams of plain Python rows, as Arrow itself would refuse some of them.
"""

import math

import pytest
from data_helpers import answer, assert_third_row_refused, chat_pair, pair, turns
from datasets import Dataset, IterableDataset

from dpo_peft.data import from_alpaca, from_oasst_tree, from_tulu, prepare_dataset
from dpo_peft.errors import DataError

RANKED = {"prompt": "a", "completions": [" b", " c"], "ranks": [0, 1]}
SCORED = {"prompt": "a", "completions": [" b", " c"], "scores": [0.5, 0.25]}
RANKED_CHAT = {"prompt": turns("a"), "completions": [answer("b"), answer("c")], "ranks": [0, 1]}
RANKED_IDS = {"prompt_ids": [5], "completions_ids": [[6, 2], [7, 2]], "ranks": [0, 1]}
SEVERAL = {"prompt": "a", "chosen": " b", "rejected": [" c", " d"]}
SEVERAL_CHAT = {"prompt": turns("a"), "chosen": answer("b"), "rejected": [answer("c"), answer("d")]}
SEVERAL_IDS = {"prompt_ids": [5], "chosen_ids": [6, 2], "rejected_ids": [[7, 2], [8, 2]]}
JUDGED = {"prompt": "a", "completion": " b", "label": True}
JUDGED_CHAT = {"prompt": turns("a"), "completion": answer("b"), "label": True}
JUDGED_MESSAGES = {"messages": turns("a", "b"), "label": True}
JUDGED_IDS = {"prompt_ids": [5], "completion_ids": [6, 2], "label": True}
SOFT = {**pair(), "preference": 0.75, "margin": 1.0}
TURNS = {"chosen": turns("a", "b"), "rejected": turns("a", "c")}
TURNS_CHAT = {"prompt": turns("a"), "chosen": answer("b"), "rejected": answer("c")}

# (data, good first rows, changes of the bad row, field named, words of the problem, words of the remedy)
BAD_ROWS = {
    "ranks too few": ("lists", RANKED, {"ranks": [0]}, "ranks", "1 ranks for 2 completions", "each completion one"),
    "scores too many": ("lists", SCORED, {"scores": [1, 2, 3]}, "scores", "3 scores for 2", "each completion one"),
    "ranks none": ("lists", RANKED, {"ranks": None}, "ranks", "a list of completions, found nothing", "store a list"),
    "a rank none": ("lists", RANKED, {"ranks": [0, None]}, "ranks[1]", "a number, found nothing", "store a number"),
    "score nan": ("lists", SCORED, {"scores": [math.nan, 1]}, "scores[0]", "a finite number, found nan", "number"),
    "score infinite": ("lists", SCORED, {"scores": [1, math.inf]}, "scores[1]", "finite number, found inf", "number"),
    "score text": ("lists", SCORED, {"scores": ["9", 1]}, "scores[0]", "a number, found str (9)", "store a number"),
    "rank boolean": ("lists", RANKED, {"ranks": [True, 0]}, "ranks[0]", "a number, found a boolean", "a number"),
    "ranks missing": ("lists", RANKED, {"ranks": ...}, "scores", "is missing", "give every row"),
    "one answer": ("lists", RANKED, {"completions": [" b"], "ranks": [0]}, "completions", "holds 1", "at least 2"),
    "no answers": ("lists", RANKED, {"completions": [], "ranks": []}, "completions", "holds 0", "at least 2"),
    "completions text": (
        "lists",
        RANKED,
        {"completions": " b"},
        "completions",
        "a list of completions, found str",
        "list",
    ),
    "an answer none": (
        "lists",
        RANKED,
        {"completions": [" b", None]},
        "completions[1]",
        "text, found nothing",
        "text",
    ),
    "answer surrogate": ("lists", RANKED, {"completions": ["\ud800", "b"]}, "completions[0]", "surrogate", "repair"),
    "a message as answer": (
        "lists",
        RANKED_CHAT,
        {"completions": [answer("b")[0], answer("c")]},
        "completions[0]",
        "found one dict",
        "store [{",
    ),
    "user as answer": (
        "lists",
        RANKED_CHAT,
        {"completions": [answer("b"), turns("c")]},
        "completions[1]",
        "starts with a 'user' turn",
        "move shared turns",
    ),
    "no content": (
        "lists",
        RANKED_CHAT,
        {"completions": [answer("b"), [{"role": "assistant"}]]},
        "completions[1][0]",
        "has no 'content'",
        "give the text",
    ),
    "id too large in a list": (
        "lists",
        RANKED_IDS,
        {"completions_ids": [[6], [99999]]},
        "completions_ids[1]",
        "id 99999, outside",
        "the tokenizer that",
    ),
    "rejected empty": ("lists", SEVERAL, {"rejected": []}, "rejected", "holds 0 completions", "at least one"),
    "rejected holds none": ("lists", SEVERAL, {"rejected": [None]}, "rejected[0]", "text, found nothing", "as text"),
    "rejected number": ("lists", SEVERAL, {"rejected": 3}, "rejected", "text, found int (3)", "as text"),
    "chosen a list": ("lists", SEVERAL, {"chosen": [" b"]}, "chosen", "text, found list", "as text"),
    "chosen missing": ("lists", SEVERAL, {"chosen": ...}, "chosen", "is missing", "give every row"),
    "rejected chats empty": (
        "lists",
        SEVERAL_CHAT,
        {"rejected": []},
        "rejected",
        "holds 0 completions",
        "at least one",
    ),
    "rejected chats mixed": (
        "lists",
        SEVERAL_CHAT,
        {"rejected": [answer("b"), "c"]},
        "rejected[1]",
        "messages, found str",
        "store [{",
    ),
    "rejected ids mixed": (
        "lists",
        SEVERAL_IDS,
        {"rejected_ids": [[6], 7]},
        "rejected_ids[1]",
        "token ids, found int",
        "list of int",
    ),
    "label none": ("singles", JUDGED, {"label": None}, "label", "found nothing (None)", "store True"),
    "label two": ("singles", JUDGED, {"label": 2}, "label", "True or False, found int (2)", "store True"),
    "label text": ("singles", JUDGED, {"label": "good"}, "label", "found str (good)", "store True"),
    "label float": ("singles", JUDGED, {"label": 1.0}, "label", "found float (1.0)", "store True"),
    "label missing": ("singles", JUDGED_MESSAGES, {"label": ...}, "label", "is missing", "give every row"),
    "completion none": ("singles", JUDGED, {"completion": None}, "completion", "text, found nothing", "as text"),
    "completion text": ("singles", JUDGED_CHAT, {"completion": "b"}, "completion", "found str (b)", "store [{"),
    "judged user": ("singles", JUDGED_CHAT, {"completion": turns("b")}, "completion", "starts with a 'user'", "move"),
    "ids of a judged completion": (
        "singles",
        JUDGED_IDS,
        {"completion_ids": [6.5]},
        "completion_ids",
        "holds float",
        "list of int",
    ),
    "no prompt ids": ("singles", JUDGED_IDS, {"prompt_ids": []}, "prompt_ids", "is empty", "one prompt token"),
    "ends with user": (
        "singles",
        JUDGED_MESSAGES,
        {"messages": turns("a", "b", "c")},
        "messages",
        "ends with a 'user' turn: no completion is judged",
        "end the conversation with the judged",
    ),
    "only the answer": (
        "singles",
        JUDGED_MESSAGES,
        {"messages": answer("b")},
        "messages",
        "no turn before the judged one",
        "end the conversation",
    ),
    "no messages": ("singles", JUDGED_MESSAGES, {"messages": []}, "messages", "is an empty conversation", "end the"),
    "preference none": ("pairs", SOFT, {"preference": None}, "preference", "found nothing (None)", "store a number"),
    "preference nan": ("pairs", SOFT, {"preference": math.nan}, "preference", "finite number, found nan", "number"),
    "preference above": ("pairs", SOFT, {"preference": 1.5}, "preference", "1.5 is no probability", "0.5 a tie"),
    "preference below": ("pairs", SOFT, {"preference": -1}, "preference", "-1 is no probability", "0.5 a tie"),
    "preference boolean": ("pairs", SOFT, {"preference": True}, "preference", "found a boolean (True)", "number"),
    "preference text": ("pairs", SOFT, {"preference": "tie"}, "preference", "found str (tie)", "store a number"),
    "preference missing": ("pairs", SOFT, {"preference": ...}, "preference", "is missing", "give every row"),
    "margin none": ("pairs", SOFT, {"margin": None}, "margin", "found nothing (None)", "store a number"),
    "margin infinite": ("pairs", SOFT, {"margin": -math.inf}, "margin", "finite number, found -inf", "a number"),
    "list among pairs": ("pairs", pair(), {"rejected": ["c"]}, "rejected", "text, found list", "as text"),
    "lists among pairs": ("pairs", chat_pair(), {"rejected": [answer("c")]}, "rejected[0]", "found list", "use {"),
    "assistant first": (
        "trajectories",
        TURNS,
        {"rejected": [*answer("Welcome"), *turns("a", "c")]},
        "rejected[0]",
        "is an assistant turn, and no template shows",
        "begin the conversation with",
    ),
    "assistant first in the prompt": (
        "trajectories",
        TURNS_CHAT,
        {"prompt": [*answer("Welcome"), *turns("a")]},
        "prompt[0]",
        "is an assistant turn",
        "begin the conversation with",
    ),
    "empty conversation": ("trajectories", TURNS, {"chosen": []}, "chosen", "an empty conversation", "remove the row"),
    "empty prompt": ("trajectories", TURNS_CHAT, {"prompt": []}, "prompt", "an empty conversation", "one message"),
    "one goes on, one does not": (
        "trajectories",
        TURNS_CHAT,
        {"prompt": turns("a", "b"), "rejected": turns("c", "d")},
        "prompt",
        "so the completions go on with it",
        "end the prompt with the user's turn",
    ),
    "message as text": ("trajectories", TURNS, {"chosen": ["a"]}, "chosen[0]", "expected a message", "use {"),
    "preference of trajectories": (
        "trajectories",
        {**TURNS, "preference": 1},
        {"preference": 3},
        "preference",
        "3 is no probability",
        "0.5 a tie",
    ),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_malformed_row(make_tokenizer, case):
    data, good, changes, field, problem, remedy = BAD_ROWS[case]
    bad = {key: value for key, value in {**good, **changes}.items() if value is not ...}
    labels = ("preference", "margin") if data in ("pairs", "trajectories") else ()
    stream = IterableDataset.from_generator(lambda: iter([good, good, bad]))
    given = [value for change in changes.values() for value in (change if isinstance(change, list) else [change])]
    on_unusable = "error" if None in given else "drop"  # see test_malformed.py
    options = {"data": data, "label_columns": labels, "on_unusable": on_unusable}
    prepared, _ = prepare_dataset(stream, make_tokenizer(), name="eval", **options)
    assert_third_row_refused(prepared, field, problem, remedy)


@pytest.mark.parametrize("case", ["ranks too few", "one answer", "preference above", "label two", "assistant first"])
def test_malformed_rows_of_a_dataset_are_found_before_tokenizing(make_tokenizer, monkeypatch, case):
    data, good, changes, field, problem, _ = BAD_ROWS[case]
    monkeypatch.setattr("dpo_peft.data.worker.RowWorker.record_batch", None)
    labels = ("preference", "margin") if data == "pairs" else ()
    good = {**good, "label": 1} if "label" in good else good  # Arrow columns have one type
    dataset = Dataset.from_list([good, {**good, **changes}, good])
    with pytest.raises(DataError) as error:
        prepare_dataset(dataset, make_tokenizer(), name="eval", data=data, label_columns=labels)
    assert str(error.value).startswith(f"eval row 1, field '{field}': ") and problem in str(error.value)


UNRANKED = {"prompt": "a", "completions": ["b", "c"]}
LISTS, SINGLES = "'multi_negative' or 'plackett_luce'", "'kto' or 'apo_zero_unpaired'"
WRONG_DATA = {
    "pairs of an unranked list": ("pairs", UNRANKED, f"'completions'.*{LISTS}.*learns from pairs: "),
    "singles of an unranked list": ("singles", UNRANKED, f"'completions'.*{LISTS}"),
    "pairs of several rejected": ("pairs", SEVERAL, f"'rejected' as a list.*{LISTS}"),
    "trajectories of several rejected": ("trajectories", SEVERAL_CHAT, f"'rejected' as a list.*{LISTS}"),
    "pairs of several rejected ids": ("pairs", SEVERAL_IDS, f"'rejected_ids' as a list.*{LISTS}"),
    "pairs of judged": ("pairs", JUDGED, f"'label'.*{SINGLES}"),
    "lists of judged": ("lists", JUDGED_MESSAGES, f"'label'.*{SINGLES}.*learns from lists: "),
    "trajectories of judged": ("trajectories", JUDGED_IDS, f"'label'.*{SINGLES}"),
    "lists of nothing": ("lists", {"text": "a"}, "column 'chosen', 'rejected' is missing.*completions with ranks"),
    "singles without label": ("singles", {"prompt": "a", "completion": " b"}, "needs a 'label' column"),
    "no grades": ("lists", {"prompt": "a", "completions": ["b", "c"]}, "'ranks'.*'scores'.*there is neither"),
    "both grades": ("lists", {**RANKED, "scores": [1, 2]}, "both are there.*remove_columns"),
    "answers a text": ("lists", {**RANKED, "completions": "b"}, "row 0, field 'completions'.*found str"),
    "first list empty": ("lists", {**RANKED, "completions": []}, "row 0, field 'completions'.*an empty list"),
    "no prompt ids": ("lists", {"completions_ids": [[5], [6]], "ranks": [0, 1]}, "column 'prompt_ids' is missing"),
    "judged without prompt": ("singles", {"completion": "b", "label": True}, "no 'prompt' column. Add it"),
    "judged chat without prompt": ("singles", {"completion": answer("b"), "label": True}, "there is no 'prompt'"),
    "tree": (
        "lists",
        {"message_tree_id": "x", "prompt": {"text": "a"}},
        "Open-Assistant.*--dataset_format oasst_tree",
    ),
}


@pytest.mark.parametrize("case", WRONG_DATA)
def test_dataset_that_does_not_suit_the_objective(make_tokenizer, case):
    data, row, words = WRONG_DATA[case]
    with pytest.raises(DataError, match=f"^train.*{words}"):
        prepare_dataset(Dataset.from_list([row]), make_tokenizer(), data=data)


REPLY = {"role": "assistant", "text": "b"}


@pytest.mark.parametrize(
    ("convert", "row", "words"),
    [
        (
            from_tulu,
            {"id": 3, "preference": "c-is-better"},
            "row with id 3, field 'preference': 'c-is-better' is none",
        ),
        (from_tulu, {"preference": None}, "field 'preference': expected str, found NoneType"),
        (from_tulu, {"preference": "tie", "prompt": 1}, "field 'prompt': expected str, found int"),
        (from_oasst_tree, {"prompt": "a"}, "field 'prompt': expected Mapping, found str"),
        (from_oasst_tree, {"prompt": {"role": "cat", "text": "a"}}, "unknown role 'cat'. Use one of prompter"),
        (from_oasst_tree, {"prompt": {"role": "prompter"}}, "field 'text': expected str, found NoneType"),
        (
            from_oasst_tree,
            {"prompt": {"role": "prompter", "text": "a", "replies": [{**REPLY, "rank": 0}, {**REPLY, "rank": "x"}]}},
            "field 'rank': expected int, found str",
        ),
        (from_alpaca, {"instruction": "a", "output": ["b", 3]}, "field 'output': expected str, found int"),
    ],
)
def test_converters_refuse(convert, row, words):
    with pytest.raises(DataError, match=words):
        convert(row)
