"""`preference` and `margin`: read, swapped, counted, refused where nothing reads them."""

import pytest
from data_helpers import turns, word_tokenizer
from datasets import Dataset

from dpo_peft.data import prepare_dataset
from dpo_peft.errors import DataError

BOTH = ("preference", "margin")
PAIR = {"prompt": "a", "chosen": " b", "rejected": " c"}
B, C = [4, 2], [5, 2]


def prepare(rows, **options):
    return prepare_dataset(Dataset.from_list(rows), word_tokenizer(), **options)


@pytest.mark.parametrize(
    ("preference", "margin", "expected"),
    [
        (1, 2, ([B, C], 1.0, 2.0)),
        (0.75, -1.5, ([B, C], 0.75, -1.5)),
        (0.5, 1.0, ([B, C], 0.5, 1.0)),
        (0.25, 3.0, ([C, B], 0.75, -3.0)),  # the other answer is the more likely one
        (0, 0, ([C, B], 1.0, 0.0)),
    ],
)
@pytest.mark.parametrize("data", ["pairs", "trajectories"])
def test_by_hand(preference, margin, expected, data):
    prepared, report = prepare([{**PAIR, "preference": preference, "margin": margin}], label_columns=BOTH, data=data)
    assert prepared.column_names[3:5] == ["preference", "margin"]
    assert {str(prepared.features[column].dtype) for column in BOTH} == {"float64"}
    row = prepared[0]
    assert (row["completion_ids"], row["preference"], row["margin"]) == expected
    assert (report.swapped, report.ties) == (int(preference < 0.5), int(preference == 0.5))


def test_steps_are_swapped_with_their_answers():
    rows = [{"chosen": turns("a", "b"), "rejected": turns("a", "c d", "a", "d"), "preference": 0.1}]
    row = prepare(rows, label_columns=BOTH, data="trajectories")[0][0]
    assert row["completion_ids"] == [[5, 6, 9, 7, 3, 9, 8, 6, 9], [4, 9]]
    assert row["steps"] == [[0, 0, 0, -1, -1, -1, -1, 1, 1], [0, 0]]
    assert row["preference"] == 0.9


def test_a_swapped_row_is_the_pair_the_other_way_round():
    rows = [{**PAIR, "preference": p / 8, "margin": float(p)} for p in range(9)]
    swapped = [
        {
            "prompt": "a",
            "chosen": row["rejected"],
            "rejected": row["chosen"],
            "preference": 1 - row["preference"],
            "margin": -row["margin"],
        }
        for row in rows
    ]
    ours, theirs = prepare(rows, label_columns=BOTH)[0], prepare(swapped, label_columns=BOTH)[0]
    for one, other in zip(ours, theirs, strict=True):
        assert one["preference"] == other["preference"] >= 0.5
        if one["preference"] > 0.5:  # of a tie either order is right
            assert one == other


def test_report_lines():
    rows = [{**PAIR, "preference": p} for p in (0.5, 0.2, 0.9, 0.5, 0.1, 0.0)] + [
        {**PAIR, "rejected": " b", "preference": 0.5}  # dropped: counted as such, not as a tie
    ]
    report = prepare(rows, label_columns=BOTH)[1]
    assert "\n  3 rows swapped: preference below 0.5\n  2 ties: preference 0.5" in str(report)
    assert report.dropped == {"identical_completions": 1} and report.unused_columns == ()


@pytest.mark.parametrize("data", ["pairs", "trajectories", "lists", "singles"])
@pytest.mark.parametrize("column", BOTH)
def test_a_label_that_nothing_reads_is_refused(column, data):
    others = tuple(name for name in BOTH if name != column) if data in ("pairs", "trajectories") else ()
    with pytest.raises(DataError, match=f"^train: column '{column}' would have no effect.*remove_columns"):
        prepare([{**PAIR, column: 0.5}], label_columns=others, data=data)
    assert len(prepare([PAIR], label_columns=others, data=data)[0]) == 1


@pytest.mark.parametrize("column", BOTH)
def test_readable_labels_are_optional(column):
    assert prepare([PAIR], label_columns=BOTH)[0].column_names == ["prompt_ids", "completion_ids", "row"]
    prepared = prepare([{**PAIR, column: 0.75}], label_columns=BOTH)[0]
    assert prepared.column_names == ["prompt_ids", "completion_ids", "row", column]
    assert prepared[0][column] == 0.75
