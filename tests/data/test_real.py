"""Whole public sets through the pipeline, with the counts their descriptions promise, and TRL's ids as the oracle."""

import gzip
import json
from collections import Counter

import pytest
from data_helpers import assert_same_as_trl, trl_prepare, turns
from datasets import Dataset, IterableDataset
from transformers import AutoTokenizer

from dpo_peft.data import (
    from_alpaca,
    from_hh,
    from_oasst_tree,
    from_pandalm,
    from_sharegpt,
    from_tulu,
    pandalm_decided,
    prepare_dataset,
)
from dpo_peft.errors import DataError

pytestmark = pytest.mark.slow

ASSISTANT = "\n\nAssistant:"


@pytest.fixture(scope="module", params=["smollm2", pytest.param("minimind-6400", marks=pytest.mark.rare)])
def tokenizer(request, tokenizer_dir):
    return AutoTokenizer.from_pretrained(tokenizer_dir(request.param))


@pytest.fixture(scope="module")
def minimind(tokenizer_dir):
    return AutoTokenizer.from_pretrained(tokenizer_dir("minimind-6400"))


@pytest.fixture(scope="module")
def hh(data_dir):
    with gzip.open(data_dir / "hh-harmless-base-test" / "test.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def pandalm(data_dir):
    return json.loads((data_dir / "pandalm-testset" / "testset-v1.json").read_text(encoding="utf-8"))


def test_whole_of_hh(hh, tokenizer):
    """2,312 pairs: 5 whose transcripts differ before the last reply, 4 with an empty chosen reply."""
    prepared, report = prepare_dataset(Dataset.from_list(hh), tokenizer, max_length=None)
    assert (report.format, report.source_rows, report.kept_rows) == ("transcript", 2312, 2303)
    assert report.dropped == {"empty_completion": 4, "transcripts_differ": 5}
    assert report.dropped_rows["empty_completion"] == [86, 516, 925, 1103]
    assert report.dropped_rows["transcripts_differ"] == [1254, 1688, 1950, 1952, 2036]
    kept = set(prepared["row"][:])
    assert kept == set(range(2312)) - {row for rows in report.dropped_rows.values() for row in rows}
    for row in prepared.select(range(0, 2303, 7)):
        source, texts = hh[row["row"]], [tokenizer.decode(ids) for ids in row["completion_ids"]]
        prompt = tokenizer.decode(row["prompt_ids"])
        assert prompt.endswith(ASSISTANT)
        assert [prompt + text for text in texts] == [source[c] + tokenizer.eos_token for c in ("chosen", "rejected")]
        assert row["prompt_ids"] == tokenizer(prompt)["input_ids"]


@pytest.mark.parametrize("mode", ["keep_start", "keep_end", "trim_prompt"])
def test_hh_cut_to_128_tokens(hh, minimind, mode):
    prepared, report = prepare_dataset(
        Dataset.from_list(hh[:500]), minimind, max_length=128, truncation_mode=mode, max_unusable_share=0.9
    )
    report.check()
    assert report.source_rows == 500 and report.longest == 128
    assert all(len(r["prompt_ids"]) + max(map(len, r["completion_ids"])) <= 128 for r in prepared)
    ended = sum(ids[-1] == minimind.eos_token_id for row in prepared for ids in row["completion_ids"])
    assert ended == report.completions - report.ends_lost
    assert (report.ends_lost > 0) == (mode == "keep_start")


def test_hh_as_conversations_agrees_on_what_is_usable(hh, minimind):
    rows = hh[1200:1260] + hh[1680:1690] + hh[1945:1955] + hh[2030:2040] + hh[80:90] + hh[510:520]
    texts = prepare_dataset(Dataset.from_list(rows), minimind, max_length=None)
    chats = prepare_dataset(Dataset.from_list([from_hh(row) for row in rows]), minimind, max_length=None)
    assert chats[1].dropped == texts[1].dropped == {"empty_completion": 2, "transcripts_differ": 5}
    assert chats[0]["row"][:] == texts[0]["row"][:]


def test_hh_as_stream(hh, minimind):
    rows = hh[:300]
    prepared, report = prepare_dataset(Dataset.from_list(rows), minimind)
    stream, stream_report = prepare_dataset(IterableDataset.from_generator(lambda: iter(rows)), minimind)
    assert list(stream) == list(prepared) and stream_report == report


def test_trl_cuts_hh_inside_the_reply(hh, minimind):
    """Why raw transcripts have a reader of their own: the common start of both texts ends within the answer."""
    theirs = trl_prepare(Dataset.from_list(hh[:200]), minimind)
    inside = sum(not minimind.decode(row["prompt_ids"]).endswith(ASSISTANT) for row in theirs)
    assert inside > 20


@pytest.mark.parametrize(("file", "rows", "systems"), [("dpo_en_demo", 299, 80), ("dpo_zh_demo", 300, 64)])
def test_demo_sets_have_trl_ids(data_dir, tokenizer, file, rows, systems):
    raw = json.loads((data_dir / "llama-factory-demo" / f"{file}.json").read_text(encoding="utf-8"))
    dataset = Dataset.from_list(raw).map(from_sharegpt)
    assert sum(row["prompt"][0]["role"] == "system" for row in dataset) == systems
    prepared, report = prepare_dataset(dataset, tokenizer, max_length=None)
    assert (report.source_rows, report.kept_rows, report.dropped) == (rows, rows, {})
    assert report.completions == 2 * rows and report.boundary_resplits == 0
    assert report.unused_columns == ("conversations",)
    assert_same_as_trl(prepared, trl_prepare(dataset, tokenizer))
    assert report.total_tokens == sum(len(r["prompt_ids"]) + sum(map(len, r["completion_ids"])) for r in prepared)
    # Cut to 512 tokens: the rows TRL keeps, less those that it keeps without signal.
    cut, cut_report = prepare_dataset(dataset, tokenizer, max_length=512)
    cut_report.check()
    theirs = [row for row in prepared if len(row["prompt_ids"]) < 512]  # TRL's own rule, on what are TRL's ids
    assert len(theirs) == cut_report.kept_rows + cut_report.dropped.get("identical_after_truncation", 0)
    assert cut_report.dropped["prompt_too_long"] == rows - len(theirs)
    assert len(cut) == cut_report.kept_rows and cut_report.longest == 512


def test_demo_set_as_text_has_trl_ids(data_dir, tokenizer):
    raw = json.loads((data_dir / "llama-factory-demo" / "dpo_en_demo.json").read_text(encoding="utf-8"))
    rows = [
        {"prompt": r["conversations"][-1]["value"] + "\n", **{c: r[c]["value"] for c in ("chosen", "rejected")}}
        for r in raw
    ]
    dataset = Dataset.from_list(rows)
    prepared, report = prepare_dataset(dataset, tokenizer, max_length=None)
    theirs = trl_prepare(dataset, tokenizer)
    differing = [
        (ours, row)
        for ours, row in zip(prepared, theirs, strict=True)
        if (ours["prompt_ids"], ours["completion_ids"])
        != (row["prompt_ids"], [row["chosen_ids"], row["rejected_ids"]])
    ]
    # Only where a token crosses the border, and there TRL's prompt is not what generation feeds.
    assert len(differing) <= report.boundary_resplits < 10
    for ours, row in differing:
        assert len(row["prompt_ids"]) < len(ours["prompt_ids"])


def test_pandalm(pandalm, minimind):
    """999 comparisons: six responses are the JSON value true, some are empty, many votes are tied."""
    stream = IterableDataset.from_generator(lambda: iter(pandalm))
    with pytest.raises(DataError, match="row with idx 157, field 'response1': expected str, found bool"):
        list(stream.filter(pandalm_decided).map(from_pandalm))
    sides = ("response1", "response2")
    boolean = [row["idx"] for row in pandalm if any(isinstance(row[side], bool) for side in sides)]
    assert len(boolean) == 6 and 157 <= min(boolean) and max(boolean) <= 164
    decided = [row for row in pandalm if row["idx"] not in boolean and pandalm_decided(row)]
    prepared, report = prepare_dataset(Dataset.from_list(decided).map(from_pandalm), minimind, max_length=None)
    empty = sum(not row[side].strip() for row in decided for side in sides)
    same = sum(row["response1"] == row["response2"] for row in decided)
    assert report.source_rows == len(decided) and report.dropped == {"empty_completion": empty} and same == 0
    assert len(prepared) == len(decided) - empty


def test_alpaca_like_set(data_dir, minimind):
    """1,100 pairs, 6 of them with chosen equal to rejected."""
    path = data_dir / "rasbt-instruction-preference" / "instruction-data-with-preference.json"
    dataset = Dataset.from_list(json.loads(path.read_text(encoding="utf-8"))).map(from_alpaca)
    prepared, report = prepare_dataset(dataset, minimind)
    assert (report.source_rows, report.kept_rows, report.dropped) == (1100, 1094, {"identical_completions": 6})


def test_ranked_alpaca_like_set(data_dir, minimind):
    """775 ranked lists of 2 to 10 answers, 6 of them with the same text twice; 392 with a history."""
    raw = json.loads((data_dir / "oasst-ranked-zh" / "oaast_rm_zh.json").read_text(encoding="utf-8"))
    dataset = Dataset.from_list(raw).map(from_alpaca)
    assert sum(len(row["prompt"]) > 1 for row in dataset) == 392
    prepared, report = prepare_dataset(dataset, minimind, max_length=None, data="lists", single_best=True)
    assert (report.source_rows, report.kept_rows) == (775, 769)
    assert report.dropped == {"identical_completions": 3, "same_text_ranked_apart": 3}
    repeated = [row for row, source in enumerate(raw) if len(set(source["output"])) < len(source["output"])]
    assert sorted(row for rows in report.dropped_rows.values() for row in rows) == repeated
    sizes = Counter(len(source["output"]) for source in raw)
    assert sizes == {2: 434, 3: 263, 4: 63, 5: 12, 6: 1, 8: 1, 10: 1}
    assert Counter(map(len, prepared["completion_ids"])) == sizes - Counter(
        len(raw[row]["output"]) for row in repeated
    )
    for row in prepared:
        texts = [minimind.decode(ids) for ids in row["completion_ids"]]
        assert texts == [text.lstrip("\n") + "<|im_end|>\n" for text in raw[row["row"]]["output"]]
        assert row["grades"] == [-float(rank) for rank in range(len(texts))]


def test_message_trees(data_dir, minimind):
    """100 trees with 212 ranked groups, 754 ordered pairs; each answer is ranked once in its group."""
    lines = (data_dir / "oasst-en-tree" / "en_100_tree.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for line in lines for row in from_oasst_tree(json.loads(line))]
    sizes = Counter(len(row["completions"]) for row in rows)
    assert (len(lines), len(rows)) == (100, 212) and sizes == {2: 57, 3: 117, 4: 27, 5: 3, 6: 6, 8: 1, 9: 1}
    pairs = [(len(row["prompt"]) > 1, len(row["ranks"]) * (len(row["ranks"]) - 1) // 2) for row in rows]
    assert (sum(n for _, n in pairs), sum(n for several, n in pairs if several)) == (754, 316)
    assert all(row["prompt"] == turns(*(m["content"] for m in row["prompt"])) for row in rows)
    assert all(row["prompt"][-1]["role"] == "user" for row in rows)
    prepared, report = prepare_dataset(Dataset.from_list(rows), minimind, max_length=None, data="lists")
    assert (report.kept_rows, report.dropped, report.completions) == (212, {}, sum(k * n for k, n in sizes.items()))
    for row in prepared:
        source = rows[row["row"]]
        best = [minimind.decode(ids) for ids in row["completion_ids"]]
        wanted = sorted(zip(source["ranks"], source["completions"], strict=True), key=lambda pair: pair[0])
        assert best == [messages[0]["content"].lstrip("\n") + "<|im_end|>\n" for _, messages in wanted]
        assert row["grades"] == [-float(rank) for rank, _ in wanted]


def test_graded_human_judgments(data_dir, minimind):
    """1150 = 188 + 235 + 376 + 191 + 160, 39 of them of two equal answers."""
    lines = (data_dir / "tulu-human-eval" / "tulu1_human_eval.jsonl").read_text(encoding="utf-8").splitlines()
    raw = [json.loads(line) for line in lines]
    dataset = Dataset.from_list(raw).map(from_tulu)
    assert Counter(dataset["preference"][:]) == {1.0: 188, 0.75: 235, 0.5: 376, 0.25: 191, 0.0: 160}
    prepared, report = prepare_dataset(dataset, minimind, max_length=None, label_columns=("preference",))
    unconverted = Dataset.from_list(raw)  # whose words of preference stand in the column of the labels
    assert prepare_dataset(unconverted, minimind, max_length=None, label_columns=("preference",))[0][:] == prepared[:]
    same = [i for i, row in enumerate(raw) if row["completion_a"] == row["completion_b"]]
    assert (len(same), report.source_rows, report.kept_rows) == (39, 1150, 1111)
    assert report.dropped == {"identical_completions": 39} and report.dropped_rows["identical_completions"] == same[:5]
    left = Counter(row["preference"] for i, row in enumerate(raw) if i not in same)
    assert report.ties == left["tie"] == 337
    assert report.swapped == left["b-is-slightly-better"] + left["b-is-better"] == 351
    assert Counter(prepared["preference"][:]) == {
        1.0: left["a-is-better"] + left["b-is-better"],
        0.75: left["a-is-slightly-better"] + left["b-is-slightly-better"],
        0.5: left["tie"],
    }
    for row in prepared.select(range(0, 1111, 11)):
        source = raw[row["row"]]
        better = "b" if source["preference"].startswith("b") else "a"
        assert (
            minimind.decode(row["completion_ids"][0]) == source[f"completion_{better}"].lstrip("\n") + "<|im_end|>\n"
        )


def test_judged_answers(data_dir, minimind):
    """300 rows, 150 of each kind; 77 conversations of several turns."""
    raw = json.loads((data_dir / "llama-factory-demo" / "kto_en_demo.json").read_text(encoding="utf-8"))
    prepared, report = prepare_dataset(Dataset.from_list(raw), minimind, max_length=None, data="singles")
    assert (report.kept_rows, report.desirable, report.undesirable) == (300, 150, 150)
    assert sum(len(row["messages"]) > 2 for row in raw) == 77
    for row in prepared:
        source = raw[row["row"]]
        assert row["grades"] == [float(source["label"])] and len(row["completion_ids"]) == 1
        text = source["messages"][-1]["content"].lstrip("\n")
        assert minimind.decode(row["completion_ids"][0]) == text + "<|im_end|>\n"
        prompt = minimind.apply_chat_template(source["messages"][:-1], add_generation_prompt=True)["input_ids"]
        assert row["prompt_ids"] == prompt
    pairs = json.loads((data_dir / "llama-factory-demo" / "dpo_en_demo.json").read_text(encoding="utf-8"))
    dataset = Dataset.from_list(pairs).map(from_sharegpt)
    report = prepare_dataset(dataset, minimind, max_length=None, data="singles")[1]
    assert (report.kept_rows, report.completions, report.desirable, report.undesirable) == (299, 598, 299, 299)


def test_hh_as_trajectories(hh, tokenizer):
    """The 5 pairs whose transcripts differ before the last reply are usable; 4 empty replies stay unusable."""
    rows = [from_hh(row) for row in hh]
    prepared, report = prepare_dataset(Dataset.from_list(rows), tokenizer, max_length=None, data="trajectories")
    assert (report.source_rows, report.kept_rows, report.dropped) == (2312, 2308, {"empty_completion": 4})
    differing = [1254, 1688, 1950, 1952, 2036]
    assert set(differing) < set(prepared["row"][:])
    for row in prepared:
        if row["row"] % 7 and row["row"] not in differing:
            continue
        source, prompt_ids, sides = rows[row["row"]], row["prompt_ids"], row["completion_ids"]
        shared = next((i for i, (a, b) in enumerate(zip(*sides, strict=False)) if a != b), min(map(len, sides)) - 1)
        assert shared == 0
        for side, ids, steps in zip(("chosen", "rejected"), sides, row["steps"], strict=True):
            assert prompt_ids + ids == tokenizer.apply_chat_template(source[side])["input_ids"]
            written = [m["content"] for m in source[side] if m["role"] == "assistant"]
            assert len(ids) == len(steps) and max(steps) == len(written) - 1
            first, *later = sorted(set(steps) - {-1})
            scored = {
                step: tokenizer.decode([t for t, s in zip(ids, steps, strict=True) if s == step])
                for step in (first, *later)
            }
            assert (written[first] + "<|im_end|>\n").endswith(scored[first])  # less what both say alike
            assert all(scored[step] == written[step] + "<|im_end|>\n" for step in later)
    one_turn = [i for i, row in enumerate(rows) if len(row["chosen"]) == len(row["rejected"]) == 2]
    assert {s for row in prepared if row["row"] in one_turn[:50] for steps in row["steps"] for s in steps} == {0}
