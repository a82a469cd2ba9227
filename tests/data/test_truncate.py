"""Truncation by hand, rows that carry no signal, and the report's arithmetic (traps T11, T12)."""

import random

import pytest
from data_helpers import chat_pair, pair, trl_prepare
from datasets import Dataset
from trl.trainer.dpo_trainer import DataCollatorForPreference

from dpo_peft.data import REASONS, TRUNCATION_MODES, prepare_dataset
from dpo_peft.data.formats import Encoded
from dpo_peft.data.truncate import fit
from dpo_peft.errors import DataError

P, A, B = [1, 2, 3, 4], [11, 12, 13], [21, 22, 23, 24, 25]


@pytest.mark.parametrize(
    ("mode", "max_length", "expected"),
    [
        ("keep_start", None, Encoded(P, [A, B])),
        ("keep_start", 9, Encoded(P, [A, B])),
        ("keep_start", 8, Encoded(P, [A, B[:4]], completions_cut=1, ends_lost=1)),
        ("keep_start", 5, Encoded(P, [A[:1], B[:1]], completions_cut=2, ends_lost=2)),
        ("keep_start", 4, "prompt_too_long"),
        ("keep_start", 2, "prompt_too_long"),
        ("keep_end", 8, Encoded(P[1:], [A, B], prompt_cut=1)),
        ("keep_end", 6, Encoded(P[3:], [A, B], prompt_cut=3)),
        ("keep_end", 5, Encoded(P[3:], [A, B[1:]], prompt_cut=3, completions_cut=1)),
        ("keep_end", 2, Encoded(P[3:], [A[2:], B[4:]], prompt_cut=3, completions_cut=2)),
        ("trim_prompt", 8, Encoded(P[1:], [A, B], prompt_cut=1)),
        ("trim_prompt", 6, Encoded(P[3:], [A, B], prompt_cut=3)),
        ("trim_prompt", 5, "completion_too_long"),
    ],
)
def test_fit_by_hand(mode, max_length, expected):
    assert fit(Encoded(P, [A, B]), max_length, mode) == expected


def test_keep_end_of_equal_ends():
    assert fit(Encoded([1], [[5, 6, 7], [4, 6, 7]]), 3, "keep_end") == "identical_after_truncation"
    assert fit(Encoded([1], [[5, 6, 7], [4, 6, 7]]), 4, "keep_end") == Encoded([1], [[5, 6, 7], [4, 6, 7]])


@pytest.mark.parametrize("max_length", [40, 60, 90])
def test_keep_start_is_trl(make_tokenizer, max_length):
    """Ids after TRL's preparation and its collator's cut, rows that TRL drops or keeps without signal included."""
    rng = random.Random(1)
    rows = [
        chat_pair(*("".join(rng.choices("ab c", k=rng.randint(1, 60))).strip() + "x" for _ in range(3)))
        for _ in range(40)
    ]
    rows[7] = chat_pair("q", "a" * 90 + "b", "a" * 90 + "c")  # the same after the cut: TRL keeps it, we count it
    tokenizer, dataset = make_tokenizer(), Dataset.from_list(rows)
    prepared, report = prepare_dataset(dataset, tokenizer, max_length=max_length, max_unusable_share=1.0)
    theirs = trl_prepare(dataset, tokenizer, max_length)
    assert report.dropped["identical_after_truncation"] == 1
    assert len(theirs) == report.kept_rows + 1
    batch = DataCollatorForPreference(pad_token_id=0, max_length=max_length)(list(theirs))
    wanted = [
        (row[keep.bool()].tolist(), int(mask.sum()))
        for row, keep, mask in zip(batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True)
    ]
    wanted = [pair for pair in zip(wanted[: len(theirs)], wanted[len(theirs) :], strict=True) if pair[0] != pair[1]]
    ours = [tuple((row["prompt_ids"] + ids, len(ids)) for ids in row["completion_ids"]) for row in prepared]
    assert ours == wanted
    cut = [
        len(ids)
        for row in theirs
        for ids in (row["prompt_ids"] + row["chosen_ids"], row["prompt_ids"] + row["rejected_ids"])
    ]
    assert report.ends_lost == report.completions_trimmed == sum(n > max_length for n in cut) - 2


UNUSABLE = {
    "identical_completions": (pair(chosen=" blue", rejected=" blue</s>"), 64, "keep_start"),
    "identical_after_truncation": (pair(chosen=" bluest", rejected=" bluer"), 16, "keep_start"),
    "empty_completion": (pair(rejected=" </s> "), 64, "keep_start"),
    "prompt_too_long": (pair(prompt="x" * 16), 16, "keep_start"),
    "completion_too_long": (pair(chosen="x" * 16), 16, "trim_prompt"),
}


@pytest.mark.parametrize("reason", UNUSABLE)
def test_rows_without_signal_are_counted_or_refused(make_tokenizer, reason):  # T11
    row, max_length, mode = UNUSABLE[reason]
    options = dict(tokenizer=make_tokenizer(), max_length=max_length, truncation_mode=mode)
    good = pair("q:", " a", " b")
    dataset = Dataset.from_list([good, row, good])
    prepared, report = prepare_dataset(dataset, **options)
    assert prepared["row"][:] == [0, 2]
    assert report.dropped == {reason: 1} and report.dropped_rows == {reason: [1]}
    assert (report.source_rows, report.kept_rows) == (3, 2)
    assert f"dropped 1: {reason}, {REASONS[reason][0]} (row 1)" in str(report)
    with pytest.raises(DataError, match=f"train row 1: {reason}: .*Remedy: .*on_unusable='drop'"):
        prepare_dataset(dataset, **options, on_unusable="error")


def test_rows_without_signal_of_other_formats(make_tokenizer):
    ids = {"prompt_ids": [5], "chosen_ids": [7, 2], "rejected_ids": [8, 2]}
    rows = [ids, {**ids, "chosen_ids": [2, 2]}, {**ids, "chosen_ids": []}, {**ids, "rejected_ids": [7, 2]}]
    prepared, report = prepare_dataset(Dataset.from_list(rows), make_tokenizer(), max_unusable_share=0.75)
    assert report.dropped == {"empty_completion": 2, "identical_completions": 1}
    assert prepared[0] == {"prompt_ids": [5], "completion_ids": [[7, 2], [8, 2]], "row": 0}
    chats = [chat_pair(), chat_pair(chosen=" \n"), {**chat_pair(), "rejected": []}, chat_pair(chosen="Seven.")]
    report = prepare_dataset(Dataset.from_list(chats), make_tokenizer(), max_unusable_share=0.75)[1]
    assert report.dropped == {"empty_completion": 2, "identical_completions": 1}
    texts = [
        {"chosen": "a b", "rejected": "a c"},
        {"chosen": "x", "rejected": "y"},
        {"chosen": "a", "rejected": "a b"},
    ]
    report = prepare_dataset(Dataset.from_list(texts), make_tokenizer(), max_unusable_share=0.75)[1]
    assert report.dropped == {"no_common_prompt": 1, "empty_completion": 1}


def test_none_left_is_always_an_error(make_tokenizer):  # T12
    dataset = Dataset.from_list([pair(prompt="x" * 40)] * 16)
    with pytest.raises(DataError) as error:
        prepare_dataset(dataset, make_tokenizer(), max_length=32, max_unusable_share=1.0)
    assert "16 of 16 rows are unusable, none is left: 16× prompt_too_long" in str(error.value)
    assert "raise max_length or use truncation_mode='keep_end'" in str(error.value)
    theirs = trl_prepare(dataset, make_tokenizer(), 32)  # the peer goes on with nothing
    assert len(theirs) == 0
    assert len(prepare_dataset(dataset, make_tokenizer(), max_length=32, truncation_mode="keep_end")[0]) == 16


@pytest.mark.parametrize(("bad", "share", "fails"), [(5, 0.5, False), (6, 0.5, True), (6, 0.6, False), (1, 0.0, True)])
def test_share_of_unusable_rows(make_tokenizer, bad, share, fails):  # T12
    dataset = Dataset.from_list([pair(chosen="")] * bad + [pair()] * (10 - bad))
    if fails:
        with pytest.raises(DataError, match=f"{bad} of 10 rows are unusable, more than max_unusable_share={share:g}"):
            prepare_dataset(dataset, make_tokenizer(), max_unusable_share=share)
    else:
        assert len(prepare_dataset(dataset, make_tokenizer(), max_unusable_share=share)[0]) == 10 - bad


def test_row_of_a_hundred_thousand_tokens(make_tokenizer):
    tokenizer = make_tokenizer()
    dataset = Dataset.from_list([pair(), pair(chosen=" x" * 100_000, rejected=" y")])
    prepared, report = prepare_dataset(dataset, tokenizer, max_length=512)
    assert len(prepared[1]["completion_ids"][0]) == 512 - len(prepared[1]["prompt_ids"])
    assert (report.ends_lost, report.completions_trimmed, report.rows_truncated, report.longest) == (1, 1, 1, 512)
    report = prepare_dataset(dataset, tokenizer, max_length=512, truncation_mode="trim_prompt")[1]
    assert report.dropped == {"completion_too_long": 1}
    prompt = Dataset.from_list([pair(prompt="x " * 100_000)])
    prepared, report = prepare_dataset(prompt, tokenizer, max_length=512, truncation_mode="trim_prompt")
    assert report.longest == 512 and report.prompts_trimmed == 1 and report.ends_lost == 0


def test_report_by_hand(make_tokenizer):
    ids = [
        {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 2], "rejected_ids": [9, 9, 9, 2], "source": "web"},
        {"prompt_ids": [5], "chosen_ids": [8, 2], "rejected_ids": [9, 2], "source": "web"},
        {"prompt_ids": [5], "chosen_ids": [8, 2], "rejected_ids": [8, 2], "source": "web"},
    ]
    report = prepare_dataset(Dataset.from_list(ids), make_tokenizer(), name="eval", max_length=6)[1]
    assert str(report) == (
        "eval: 2 of 3 rows kept (ids format)\n"
        "  dropped 1: identical_completions, all completions are the same (row 2)\n"
        "  tokens: 13 (4 prompt, 9 completion; 17 with the prompt repeated), longest 6 (max_length 6, keep_start)\n"
        "  truncated: 1 rows (0 prompts, 1 completions, 1 of them lost their end token)\n"
        "  unused columns: source"
    )
    report.kept_rows += 1
    with pytest.raises(DataError, match="3 kept \\+ 1 dropped rows are not the 3 source rows"):
        report.check()


@pytest.mark.parametrize("mode", TRUNCATION_MODES)
@pytest.mark.parametrize("seed", range(4))
def test_random_rows_keep_the_invariants(make_tokenizer, mode, seed):
    rng = random.Random(seed)
    words = ["the", " the", "!", "!!", " and", "\n", "\n\n", "é", "日本", " ", "</s>", "<s>", "x", "ing", "ring"]

    def text(low, high):
        return "".join(rng.choices(words, k=rng.randint(low, high)))

    rows = [pair(text(1, 12), text(0, 12), text(0, 12)) for _ in range(200)]
    tokenizer = make_tokenizer(add_bos=bool(seed % 2))
    limit = rng.choice([6, 10, 16])
    options = dict(truncation_mode=mode, max_unusable_share=1.0)
    prepared, report = prepare_dataset(Dataset.from_list(rows), tokenizer, max_length=limit, **options)
    whole = prepare_dataset(Dataset.from_list(rows), tokenizer, max_length=None, **options)[0]
    untouched = {row["row"]: row for row in whole}
    assert report.kept_rows + sum(report.dropped.values()) == report.source_rows == 200
    assert set(report.dropped) <= set(REASONS) and len(prepared) == report.kept_rows
    assert prepared.column_names == ["prompt_ids", "completion_ids", "row"]
    assert prepared["row"][:] == sorted(prepared["row"][:])
    for row in prepared:
        full = untouched[row["row"]]
        prompt, (chosen, rejected) = row["prompt_ids"], row["completion_ids"]
        assert prompt and chosen and rejected and chosen != rejected
        assert len(prompt) + max(len(chosen), len(rejected)) <= limit
        kept_end = mode != "keep_start"
        assert prompt == (full["prompt_ids"][-len(prompt) :] if kept_end else full["prompt_ids"])
        for ids, all_ids in zip((chosen, rejected), full["completion_ids"], strict=True):
            assert ids == (all_ids[-len(ids) :] if kept_end else all_ids[: len(ids)])
            assert mode != "trim_prompt" or ids == all_ids
    for row in whole:
        source = rows[row["row"]]
        assert (
            row["prompt_ids"][row["prompt_ids"][0] == 1 :]
            == tokenizer(source["prompt"].removeprefix("<s>"), add_special_tokens=False)["input_ids"]
        )
        for ids, completion in zip(row["completion_ids"], (source["chosen"], source["rejected"]), strict=True):
            bare = completion
            while bare.rstrip().endswith("</s>"):
                bare = bare.rstrip().removesuffix("</s>")
            assert tokenizer.decode(ids) == bare + "</s>"
