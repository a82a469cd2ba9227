"""Pairs of scored answers against hand-worked ones; prompts from rows; judges; work that survives being killed."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from dpo_peft import cli_pairs  # type: ignore[attr-defined]
from dpo_peft.data import prepare_dataset
from dpo_peft.data.prompts import Prompt, encode_prompts, read_prompts
from dpo_peft.errors import DataError, OptionError
from dpo_peft.losses import load_function
from dpo_peft.pairs import PairsOptions, make_pairs
from dpo_peft.pairs.building import Candidate, build_pairs, seed_of, summarize
from dpo_peft.pairs.judges import RewardModel, judge_answers, source_of
from dpo_peft.pairs.worklog import WorkLog


def candidates(*scores: float | None) -> list[Candidate]:
    return [Candidate(f"answer {i}", score) for i, score in enumerate(scores)]


def texts(built: Any) -> list[tuple[str, str]]:
    return [(chosen.text, rejected.text) for chosen, rejected in built.pairs]


# ---- Building -------------------------------------------------------------------------------------------------------


def test_best_against_worst() -> None:
    built = build_pairs(candidates(0.5, 2.0, -1.0, 2.0), PairsOptions(), 0)
    assert texts(built) == [("answer 1", "answer 2")]


def test_every_two_of_different_reward_widest_first() -> None:
    rules = PairsOptions(method="all", min_margin=1.0)
    built = build_pairs(candidates(0.0, 3.0, 1.0, 3.0), rules, 0)
    assert texts(built) == [
        ("answer 1", "answer 0"),  # 3
        ("answer 3", "answer 0"),  # 3
        ("answer 1", "answer 2"),  # 2
        ("answer 3", "answer 2"),  # 2
        ("answer 2", "answer 0"),  # 1: not below the margin
    ]
    assert built.no_pair == {"equal rewards": 1}
    short = build_pairs(candidates(0.0, 3.0, 1.0, 3.0), PairsOptions(method="all", max_pairs=2, min_margin=1.5), 0)
    assert texts(short) == texts(built)[:2]
    assert short.no_pair == {"beyond max_pairs": 2, "margin below min_margin": 1, "equal rewards": 1}


def test_what_is_no_answer_is_counted_by_reason() -> None:
    given = [
        Candidate("good", 3.0),
        Candidate("good", 9.0),  # the same text, whatever its score
        Candidate(" \n", 9.0),
        Candidate("cut off", 9.0, finished=False),
        Candidate("unjudged", None),
        Candidate("bad", 1.0),
    ]
    built = build_pairs(given, PairsOptions(), 0)
    assert texts(built) == [("good", "bad")]
    assert built.unused == {"same text as another": 1, "empty": 1, "unfinished": 1, "no reward": 1}
    assert texts(build_pairs(given, PairsOptions(require_finished=False), 0)) == [("cut off", "bad")]
    said = [Candidate([{"role": "assistant", "content": text}], score) for text, score in (("a", 1.0), ("a", 2.0))]
    assert build_pairs(said, PairsOptions(), 0).unused == {"same text as another": 1}


@pytest.mark.parametrize(
    ("scores", "rules", "reason"),
    [
        ((1.0, 1.0, 1.0), PairsOptions(), "equal rewards"),
        ((1.0, 1.4), PairsOptions(min_margin=0.5), "margin below min_margin"),
        ((1.0,), PairsOptions(), "fewer than two different completions"),
        ((), PairsOptions(method="all"), "fewer than two different completions"),
        ((1.0, None), PairsOptions(method="rso"), "fewer than two different completions"),
        ((2.0, 2.0), PairsOptions(method="rso"), "equal rewards"),
    ],
)
def test_why_a_prompt_has_no_pair(scores: Any, rules: PairsOptions, reason: str) -> None:
    summary = summarize([(build_pairs(candidates(*scores), rules, 0), None)], {})
    assert summary["prompts_without_pairs"] == {reason: 1} and summary["pairs"] == 0


@pytest.mark.parametrize(("how", "pairs"), [("first_round", 2), ("tournament", 3)])
def test_rejection_sampling_then_pairs_of_the_accepted(how: str, pairs: int) -> None:
    given = candidates(0.1, 0.9, 0.2, 0.8, 0.3, 0.7, 0.4, 0.6)
    rules = PairsOptions(method="rso", rso_accept=4, rso_beta=0.2, rso_pairs=how, seed=5)
    seen = Counter[str]()
    for number in range(400):
        built = build_pairs(given, rules, number)
        accepted = [c.text for c in built.accepted]
        assert len(set(accepted)) == 4 and len(built.pairs) == pairs
        assert all(chosen.reward > rejected.reward for chosen, rejected in built.pairs)
        assert {c.text for two in built.pairs for c in two} <= set(accepted)
        seen.update(accepted)
        assert built == build_pairs(given, rules, number)  # the prompt's number decides
    assert seen["answer 1"] == 400 and seen["answer 0"] < 60 < seen["answer 7"]  # the best always, others by reward


def test_seeds_of_near_numbers_are_unrelated() -> None:
    seeds = [seed_of(s, i, k) for s in range(4) for i in range(50) for k in range(8)]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)
    ones = sum(f"{seed:063b}".count("1") for seed in seeds) / (63 * len(seeds))
    assert abs(ones - 0.5) < 4 * 0.5 / (63 * len(seeds)) ** 0.5
    assert seed_of(1, 23) != seed_of(12, 3)


def test_the_summary_by_hand() -> None:
    long = [Candidate("a long answer", 3.0), Candidate("short", 1.0)]
    even = [Candidate("same len", 0.0), Candidate("len same", -2.0), Candidate("", 5.0)]
    prompts = enumerate((long, even, candidates(1.0, 1.0)))
    results = [(build_pairs(given, PairsOptions(), number), None) for number, given in prompts]
    assert summarize([*results, (build_pairs([], PairsOptions(), 3), "too long")], {"no prompt": 2}) == {
        "prompts": 6,
        "prompts_with_pairs": 2,
        "prompts_without_pairs": {"no prompt": 2, "equal rewards": 1, "too long": 1},
        "candidates": 7,
        "candidates_unused": {"empty": 1},
        "pairs": 2,
        "pairs_refused": {"equal rewards": 1},
        "reward": {
            "candidates": pytest.approx(9 / 7),
            "candidates_std": pytest.approx((sum((x - 9 / 7) ** 2 for x in (3, 1, 0, -2, 5, 1, 1)) / 7) ** 0.5),
            "chosen": 1.5,
            "rejected": -0.5,
            "margin": 2.0,
        },
        "longer_chosen": 0.75,  # one longer, one equal
    }


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"method": "worst"}, "method='worst'"),
        ({"rso_pairs": "league"}, "rso_pairs='league'"),
        ({"min_margin": -1.0}, "min_margin=-1.0"),
        ({"min_margin": float("nan")}, "min_margin=nan"),
        ({"max_pairs": 0}, "max_pairs=0"),
        ({"rso_beta": 0.0}, "rso_beta=0.0"),
        ({"rso_beta": float("nan")}, "rso_beta=nan"),
        ({"rso_accept": 1}, "rso_accept=1"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_options_out_of_range(changed: dict[str, Any], named: str) -> None:
    with pytest.raises(OptionError, match=named):
        PairsOptions(**changed)


# ---- Prompts --------------------------------------------------------------------------------------------------------

USER, ANSWER = [{"role": "user", "content": "say one"}], [{"role": "assistant", "content": "one"}]
OTHER = [{"role": "assistant", "content": "two"}]
HH = "\n\nHuman: hi\n\nAssistant:"


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "say one"}, "say one"),
        ({"prompt": USER, "source": "x"}, USER),
        ({"prompt": "say one", "chosen": " one", "rejected": " two", "margin": 1.0}, "say one"),
        ({"chosen": "say one", "rejected": "say two"}, "say"),
        ({"chosen": USER + ANSWER, "rejected": USER + OTHER}, USER),
        ({"prompt": "say one", "chosen": USER + ANSWER, "rejected": USER + OTHER}, USER),
        ({"prompt": USER, "chosen": ANSWER, "rejected": [OTHER, ANSWER]}, USER),
        ({"chosen": HH + " a", "rejected": HH + " b"}, HH),
    ],
)
def test_the_prompt_of_any_row(row: dict[str, Any], prompt: Any) -> None:
    (found,), skipped = read_prompts(Dataset.from_list([row]), "rows")
    assert found.example.prompt == prompt and not skipped and found.completions is None


def test_prompts_have_the_ids_that_training_has(make_tokenizer: Any) -> None:
    """For every kind of row: against `prepare_dataset`, on a tokenizer that puts BOS before texts."""
    tokenizer = make_tokenizer(add_bos=True)
    tools = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}]
    continued = [*USER, {"role": "assistant", "content": "Well, "}]
    kinds: list[list[dict[str, Any]]] = [
        [{"prompt": "say the ", "chosen": "one", "rejected": "two"}],
        [{"prompt": USER, "chosen": ANSWER, "rejected": OTHER, "tools": json.dumps(tools)}],
        [{"prompt": continued, "chosen": ANSWER, "rejected": OTHER}],
        [{"chosen": "say the one", "rejected": "say the two"}],
    ]
    for rows in kinds:
        dataset = Dataset.from_list(rows)
        prompts, _ = read_prompts(dataset, "rows")
        expected = prepare_dataset(dataset, tokenizer, name="rows")[0]
        assert encode_prompts(tokenizer, prompts, "rows") == [list(row["prompt_ids"]) for row in expected]


def test_text_becomes_a_users_message_if_wanted() -> None:
    rows = Dataset.from_list([{"prompt": "say one", "completions": ["one", "two"], "scores": [1.0, None]}])
    (found,), _ = read_prompts(rows, "rows", "scores", as_chat=True)
    assert found.example.prompt == USER and found.completions == [ANSWER, OTHER] and found.scores == [1.0, None]
    assert found.completion("x") == [{"role": "assistant", "content": "x"}] and found.fields == {"prompt": USER}


def test_rows_without_a_prompt_are_counted() -> None:
    rows = [{"chosen": "say one", "rejected": "say two"}, {"chosen": "same", "rejected": "same"}]
    prompts, skipped = read_prompts(Dataset.from_list(rows), "rows")
    assert len(prompts) == 1 and sum(skipped.values()) == 1


@pytest.mark.parametrize(
    ("rows", "column", "message"),
    [
        ([{"question": "x"}], None, "no column 'prompt'.*--column_map question:prompt on"),
        ([{"prompt": "x"}, {"prompt": None}], None, "row 1, field 'prompt'"),
        ([{"prompt": []}], None, "empty conversation"),
        ([{"prompt": "x"}], "scores", "there is no column"),
        ([{"prompt": "x", "completions": ["a", "b"], "s": [1.0]}], "s", "1 scores for 2 completions"),
        ([{"prompt": "x", "completions": ["a", "b"], "s": [1.0, float("inf")]}], "s", r"row 0, field 's\[1\]'"),
        ([{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}], None, "no column 'prompt'"),
    ],
)
def test_rows_that_cannot_be_read(rows: list[dict[str, Any]], column: str | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_prompts(Dataset.from_list(rows), "rows", column)


def test_a_text_before_completions_of_messages_is_the_user_s_turn() -> None:
    ((found,), _) = read_prompts(Dataset.from_list([{"prompt": "x", "completions": [ANSWER, OTHER]}]), "rows")
    assert found.fields == {"prompt": [{"role": "user", "content": "x"}]} and found.completions == [ANSWER, OTHER]


def test_messages_need_a_chat_template(make_tokenizer: Any) -> None:
    prompts, _ = read_prompts(Dataset.from_list([{"prompt": USER}]), "rows")
    with pytest.raises(DataError, match="no chat template"):
        encode_prompts(make_tokenizer(chat_template=None), prompts, "rows")


# ---- Judges ---------------------------------------------------------------------------------------------------------


def prompts_of(*rows: dict[str, Any]) -> list[Prompt]:
    return read_prompts(Dataset.from_list(list(rows)), "rows")[0]


def judge(function: Any, completions: list[Any]) -> Any:
    return judge_answers(function, prompts_of(*[{"prompt": "p"}] * len(completions)), completions)


def test_a_judge_is_called_as_trl_calls_it() -> None:
    seen = {}

    def reward(prompts: Any, completions: Any, **kwargs: Any) -> list[float | None]:
        seen.update(prompts=prompts, completions=completions, **kwargs)
        return [1, None, torch.tensor(0.5)]  # type: ignore[list-item]

    p, q = prompts_of({"prompt": "p", "answer": 7}, {"prompt": "q", "answer": 8})
    assert judge_answers(reward, [p, p, q], ["a", "b", "c"], [[1], [2], [3]]) == [1.0, None, 0.5]
    assert seen == {
        "prompts": ["p", "p", "q"],
        "completions": ["a", "b", "c"],
        "completion_ids": [[1], [2], [3]],
        "answer": [7, 7, 8],
    }


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda **_: [1.0], OptionError, "returned 1 values for 2 completions"),
        (lambda **_: 1.0, OptionError, "returned a float"),
        (lambda **_: ["good", "bad"], OptionError, "returned 'good'"),
        (lambda **_: [1.0, float("nan")], DataError, "gave nan to a completion of prompt 1"),
        (lambda **_: {}["x"], OptionError, "failed: KeyError"),
        (lambda x: [1.0, 2.0], OptionError, "failed: TypeError"),
    ],
)
def test_a_judge_that_errs(function: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        judge(function, ["a", "b"])


def test_a_function_by_its_path(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def reward(completions, **_):\n    return [float(len(c)) for c in completions]\n\nLIMIT = 3\n")
    function = load_function(f"{file}:reward", "reward")
    assert judge(function, ["a", "bcd"]) == [1.0, 3.0]
    before = source_of(function)
    file.write_text(file.read_text() + "# changed\n")
    assert before != source_of(load_function(f"{file}:reward", "reward")) and source_of(len) is None
    assert judge(load_function("dpo_peft.quickstart:review_reward", "reward"), ["x", ANSWER]) == [0.0, 0.0]
    for path, message in (
        ("reward", "package.module:function"),
        (f"{file}:nothing", "no such name"),
        (f"{file}:LIMIT", "it is a int"),
        (f"{tmp_path}/other.py:reward", "no such file"),
        ("no_such_module_here:reward", "No module named"),
    ):
        with pytest.raises(OptionError, match=message):
            load_function(path, "reward")


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: Any, make_tokenizer: Any) -> str:
    """Folder of a random Llama with one output."""
    folder = str(tmp_path_factory.mktemp("reward"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_labels=1, initializer_range=0.2, pad_token_id=0,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(folder)
    make_tokenizer(add_bos=True).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("chat", [True, False])
def test_a_reward_model_gives_what_plain_transformers_gives(reward_model: str, chat: bool) -> None:
    """Row by row without padding; the judge sorts, pads and batches."""
    draw = random.Random(0)
    answers = ["word " * draw.randint(1, 12) + str(i) for i in range(7)]
    prompts = prompts_of({"prompt": USER if chat else "say the one"}) * 7
    completions = [[{"role": "assistant", "content": a}] if chat else a for a in answers]
    found = judge_answers(RewardModel(reward_model, batch_size=3), prompts, completions)
    model = LlamaForSequenceClassification.from_pretrained(reward_model).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    for answer, completion, reward in zip(answers, completions, found, strict=True):
        said = tokenizer.apply_chat_template([*USER, *completion])["input_ids"] if chat else None
        ids = said or tokenizer("say the one" + answer).input_ids
        assert ids[0] == (3 if chat else 1)  # the template has no BOS, the tokenizer puts one before a text
        assert reward == pytest.approx(float(model(torch.tensor([ids])).logits), abs=1e-5)
    assert len(set(found)) == 7


def test_a_reward_model_that_is_none(tmp_path: Path, base_folder: str, reward_model: str) -> None:
    with pytest.raises(OptionError, match="can't be loaded"):
        RewardModel(str(tmp_path))
    config = LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "two")  # two labels
    AutoTokenizer.from_pretrained(reward_model).save_pretrained(tmp_path / "two")
    with pytest.raises(OptionError, match="has 2 outputs"):
        RewardModel(str(tmp_path / "two"))


def test_pairs_from_python(tmp_path: Path) -> None:
    """Under today's name and that of 0.1; what stops it by Ctrl-C says what is kept."""
    row = {"prompt": "a?", "completions": [" x", " y"], "scores": [1.0, 3.0]}
    (tmp_path / "given.jsonl").write_text(json.dumps(row) + "\n")
    given: dict[str, Any] = {"prompts": str(tmp_path / "given.jsonl"), "output": str(tmp_path / "pairs.jsonl")}
    result = make_pairs(PairsOptions(**given, score_column="scores"))
    assert result["pairs"] == 1 and result["output"] == given["output"]
    assert json.loads((tmp_path / "pairs.jsonl").read_text())["chosen"] == " y"
    with pytest.raises(OptionError, match="is there already"):
        cli_pairs.make_pairs(cli_pairs.PairsOptions(**given, score_column="scores"))
    (tmp_path / "stop.py").write_text("def reward(**_):\n    raise KeyboardInterrupt\n")
    judged = PairsOptions(**given, reward=f"{tmp_path / 'stop.py'}:reward", overwrite=True)
    with pytest.raises(KeyboardInterrupt, match="0 of 1 prompts are in .*pairs.jsonl.unfinished"):
        make_pairs(judged)


# ---- Work that is written as it goes --------------------------------------------------------------------------------

HEADER = {"model": "m", "temperature": 1.0, "reward": None}


KEYS = [f"item {number}" for number in range(5)]


def chunk(*numbers: int) -> dict[str, dict[str, Any]]:
    return {KEYS[number]: {"n": number, "text": "ä\n" * number} for number in numbers}


@pytest.mark.attack("killed while writing")
def test_work_goes_on_from_any_byte_of_the_file(tmp_path: Path) -> None:
    """The file cut anywhere, as a kill or a power cut leaves it: whole chunks are kept, the rest is done again."""
    path = tmp_path / "work"
    log = WorkLog(path, HEADER, KEYS)
    ends = [path.stat().st_size]
    for numbers in ((0, 1), (2, 3), (4,)):
        log.append(chunk(*numbers))
        ends.append(path.stat().st_size)
    whole = path.read_bytes()
    for size in sorted({*range(0, len(whole), 7), *(end + more for end in ends for more in (-1, 0))}):
        path.write_bytes(whole[:size])
        log = WorkLog(path, HEADER, KEYS)
        chunks = sum(size >= end for end in ends[1:])
        assert len(log.done) == (0, 2, 4, 5)[chunks]
        for numbers in ((0, 1), (2, 3), (4,))[chunks:]:
            log.append(chunk(*numbers))
        assert path.read_bytes() == whole
        assert [(record["key"], record["n"]) for record in log.records()] == list(zip(KEYS, range(5), strict=True))


@pytest.mark.attack("damaged or mixed files")
def test_a_record_belongs_to_the_item_that_it_names(tmp_path: Path) -> None:
    """Whatever the order of the chunks, and where two processes wrote the same one: places don't count."""
    path = tmp_path / "work"
    log = WorkLog(path, HEADER, KEYS)
    for numbers in ((3, 4), (0, 1), (3, 4), (2,)):
        log.append(chunk(*numbers))
    for again in (log, WorkLog(path, HEADER, KEYS)):
        assert [record["n"] for record in again.records()] == [0, 1, 2, 3, 4]
    with pytest.raises(OptionError, match="line 2 is of an item that isn't there.*delete it to begin anew"):
        WorkLog(path, HEADER, KEYS[:3])


def test_records_of_older_files_are_those_of_the_first_items(tmp_path: Path) -> None:
    path = tmp_path / "work"
    lines = [json.dumps(HEADER), *(json.dumps([*chunk(*numbers).values()]) for numbers in ((0, 1), (2,)))]
    path.write_text("".join(f"{line}\n" for line in lines))
    log = WorkLog(path, HEADER, KEYS)
    assert list(log.done) == KEYS[:3]
    log.append(chunk(3, 4))
    assert [record["n"] for record in WorkLog(path, HEADER, KEYS).records()] == [0, 1, 2, 3, 4]
    with pytest.raises(
        OptionError, match="line 4 is of an item that isn't there"
    ):  # more records than items: two runs wrote there
        path.write_text("".join(f"{line}\n" for line in [*lines, lines[1]]))
        WorkLog(path, HEADER, KEYS[:3])


def test_other_options_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "work"
    WorkLog(path, HEADER, KEYS).append(chunk(0))
    for changed, message in (
        ({"temperature": 0.5}, r"1 chunk of .* temperature = 1.0, and now it is 0.5"),
        ({"seed": 3}, "seed = None, and now it is 3"),
    ):
        with pytest.raises(OptionError, match=message):
            WorkLog(path, {**HEADER, **changed}, KEYS)
    with pytest.raises(OptionError, match="temperature"):
        WorkLog(path, {"model": "m", "reward": None}, KEYS)
    assert len(WorkLog(path, HEADER, KEYS).done) == 1


@pytest.mark.attack("damaged or mixed files")
def test_damage_above_the_last_line_is_not_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "work"
    log = WorkLog(path, HEADER, KEYS)
    log.append(chunk(0))
    log.append(chunk(1))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\0\0\0\n" + lines[2])
    with pytest.raises(OptionError, match="line 2 is damaged"):
        WorkLog(path, HEADER, KEYS)
    path.write_bytes(b"something else\n")
    with pytest.raises(OptionError, match="no work file"):
        WorkLog(path, HEADER, KEYS)
