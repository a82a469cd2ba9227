"""Files as people have them, through the command line's own path: parse, read, prepare.

What is trained is compared with what a reader of the file would expect, written down by hand. Where a file stops, the
option that the message advises is given literally, and compared again.
"""

import csv
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from dpo_peft import quickstart
from dpo_peft.cli import train as cli
from dpo_peft.cli.mixture import load_datasets
from dpo_peft.data import published
from dpo_peft.errors import DataError, OptionError
from dpo_peft.objective import TrainingObjective
from dpo_peft.training.building import Preparation

Q, GOOD, BAD = "Name a color of the sky at noon.", "It is blue on clear days.", "Seven, as far as I know."
Q2, GOOD2, BAD2 = "What do cows drink?", "Water, like other animals.", "Only milk from a shop."
SYSTEM = "Speak like a pirate."


def opened(*turns: tuple[str, str]) -> str:
    """What the bundled model's template makes of turns, up to where the model writes; by hand."""
    return "\n".join(f"<|im_start|>{role}\n{text}<|im_end|>" for role, text in turns) + "\n<|im_start|>assistant\n"


def trained(prompt: str, *completions: str, end: str = "<|im_end|>") -> tuple[str, ...]:
    return (prompt, *(text + end for text in completions))


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def model(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def said(**turns: str) -> list[dict[str, str]]:
    """ShareGPT's messages."""
    return [{"from": speaker, "value": text} for speaker, text in turns.items()]


ONE = trained(opened(("user", Q)), GOOD, BAD)
TWO = trained(opened(("user", Q2)), GOOD2, BAD2)
BOTH = [ONE, TWO]
WITH_SYSTEM = [trained(opened(("system", SYSTEM), ("user", Q)), GOOD, BAD), TWO]
EARLIER = opened(("user", "Hello there, friend."), ("assistant", "Hello! What is it?"), ("user", Q))
HISTORY = [trained(EARLIER, GOOD, BAD), TWO]
RAW = [trained(Q, " " + GOOD, " " + BAD), trained(Q2, " " + GOOD2, " " + BAD2)]


@dataclass
class File:
    """A file, what is trained of it, and whether it stops first."""

    rows: list[dict[str, Any]] | str | bytes
    expected: list[tuple[str, ...]]
    options: str = ""
    stops: bool = False
    name: str = "rows.jsonl"
    dropped: dict[str, int] = field(default_factory=dict)


def each(make: Callable[[str, str, str], dict[str, Any]]) -> list[dict[str, Any]]:
    return [make(Q, GOOD, BAD), make(Q2, GOOD2, BAD2)]


def hh(question: str, reply: str) -> str:
    return f"\n\nHuman: {question}\n\nAssistant: {reply}"


TEXT = each(lambda q, good, bad: {"prompt": q, "chosen": good, "rejected": bad})
CHAT = each(lambda q, good, bad: {"prompt": [user(q)], "chosen": [model(good)], "rejected": [model(bad)]})
FILES: dict[str, File] = {
    # ---- Our own columns
    "text": File(TEXT, BOTH),
    "text, raw if asked": File(
        [{**row, **{side: " " + row[side] for side in ("chosen", "rejected")}} for row in TEXT], RAW, "--as_chat false"
    ),
    "text that is rendered already": File(
        each(lambda q, good, bad: {"prompt": opened(("user", q)), "chosen": good, "rejected": bad}), BOTH
    ),
    "text that ends with an open turn": File(
        each(lambda q, g, b: {"prompt": f"Q: {q}\nA:", "chosen": " " + g, "rejected": " " + b}),
        [trained(f"Q: {q}\nA:", " " + g, " " + b) for q, g, b in ((Q, GOOD, BAD), (Q2, GOOD2, BAD2))],
    ),
    "csv": File("csv", BOTH, name="rows.csv"),
    "tsv": File("tsv", BOTH, name="rows.tsv"),
    "a JSON list": File(json.dumps(TEXT), BOTH, name="rows.json"),
    "a glob": File(TEXT, BOTH, name="part-*.jsonl"),
    "messages in lists": File(CHAT, BOTH),
    "text with a system column": File([{**TEXT[0], "system": SYSTEM}, {**TEXT[1], "system": ""}], WITH_SYSTEM),
    "messages with a system column": File(
        [{**CHAT[0], "system_prompt": SYSTEM}, {**CHAT[1], "system_prompt": None}], WITH_SYSTEM
    ),
    "text with a history": File(
        [{**TEXT[0], "history": [["Hello there, friend.", "Hello! What is it?"]]}, {**TEXT[1], "history": []}], HISTORY
    ),
    "a null in a cell": File([*TEXT, {**TEXT[0], "chosen": None}], BOTH, dropped={"missing_value": 1}),
    "prompt of messages, completions of text": File(
        each(lambda q, good, bad: {"prompt": [user(q)], "chosen": good, "rejected": bad}), BOTH
    ),
    "prompt of text, completions of messages": File(
        each(lambda q, good, bad: {"prompt": q, "chosen": [model(good)], "rejected": [model(bad)]}), BOTH
    ),
    "UltraFeedback, binarized": File(
        each(
            lambda q, good, bad: {
                "prompt": q,
                "chosen": [user(q), model(good)],
                "rejected": [user(q), model(bad)],
                "messages": [user(q), model(good)],
                "score_chosen": 8.0,
                "score_rejected": 2.0,
            }
        ),
        BOTH,
    ),
    "completions with scores, and a tie": File(
        [
            {"prompt": Q, "completions": [BAD, "In between these two.", GOOD], "scores": [1.0, 2.0, 3.0]},
            {"prompt": Q2, "completions": [GOOD2, BAD2], "scores": [4.0, 4.0]},
        ],
        [ONE],
        dropped={"no_ranking": 1},
    ),
    "HH transcripts": File(each(lambda q, g, b: {"chosen": hh(q, g), "rejected": hh(q, b)}), BOTH),
    "HH transcripts by name": File(
        each(lambda q, g, b: {"chosen": hh(q, g), "rejected": hh(q, b)}), BOTH, "--dataset_format hh"
    ),
    # ---- Messages beside the completions
    "messages beside texts": File(each(lambda q, g, b: {"messages": [user(q)], "chosen": g, "rejected": b}), BOTH),
    "messages beside dicts": File(
        each(lambda q, g, b: {"messages": [user(q)], "chosen": model(g), "rejected": model(b)}), BOTH
    ),
    "messages beside lists": File(
        each(lambda q, g, b: {"messages": [user(q)], "chosen": [model(g)], "rejected": [model(b)]}), BOTH
    ),
    "OpenAI's preference rows": File(
        each(
            lambda q, g, b: {
                "input": {"messages": [user(q)], "tools": [], "parallel_tool_calls": True},
                "preferred_output": [model(g)],
                "non_preferred_output": [model(b)],
            }
        ),
        BOTH,
    ),
    # ---- ShareGPT and Alpaca
    "ShareGPT": File(
        each(lambda q, g, b: {"conversations": said(human=q), "chosen": said(gpt=g)[0], "rejected": said(gpt=b)[0]}),
        BOTH,
    ),
    "ShareGPT with system": File(
        [
            {
                "conversations": said(human=q),
                "chosen": said(gpt=g)[0],
                "rejected": said(gpt=b)[0],
                "system": system,
            }
            for q, g, b, system in ((Q, GOOD, BAD, SYSTEM), (Q2, GOOD2, BAD2, ""))
        ],
        WITH_SYSTEM,
    ),
    "ShareGPT with history in its turns": File(
        [
            {
                "conversations": [
                    *said(human="Hello there, friend.", gpt="Hello! What is it?"),
                    *said(human=Q),
                ],
                "chosen": model(GOOD),
                "rejected": model(BAD),
            }
        ],
        HISTORY[:1],
    ),
    "instruction and input": File(
        each(lambda q, g, b: {"instruction": "Read this.", "input": q, "chosen": g, "rejected": b}),
        [trained(opened(("user", f"Read this.\n\n{q}")), g, b) for q, g, b in ((Q, GOOD, BAD), (Q2, GOOD2, BAD2))],
    ),
    "LLaMA-Factory's alpaca": File(
        [
            {
                "instruction": Q,
                "input": "",
                "output": [GOOD, BAD],
                "system": "",
                "history": [["Hello there, friend.", "Hello! What is it?"]],
            },
            {"instruction": Q2, "input": "", "output": [GOOD2, BAD2], "system": "", "history": []},
        ],
        HISTORY,
    ),
    # ---- As published
    "Orca pairs": File(
        [
            {"system": SYSTEM, "question": Q, "chosen": GOOD, "rejected": BAD},
            {"system": "", "question": Q2, "chosen": GOOD2, "rejected": BAD2},
        ],
        WITH_SYSTEM,
    ),
    "distilabel Orca": File(
        [
            {
                "system": system,
                "input": q,
                "chosen": g,
                "rejected": b,
                "generations": [g, b],
                "order": ["chosen", "rejected"],
                "labelling_prompt": [user("Judge these two, please."), model("The first one is much better.")],
                "raw_labelling_response": "Assistant 1 is better, by a lot. 9 2",
                "rating": [9.0, 2.0],
                "rationale": "The first one is right and the other is not.",
                "status": status,
            }
            for q, g, b, system, status in (
                (Q, GOOD, BAD, SYSTEM, "unchanged"),
                (Q2, GOOD2, BAD2, "", "tie"),
            )
        ],
        WITH_SYSTEM[:1],
        dropped={"no_ranking": 1},
    ),
    "distilabel generations": File(
        [
            {"instruction": Q, "generations": [BAD, GOOD, None], "ratings": [2.0, 5.0, None], "model": "a b c d e"},
            {"instruction": Q2, "generations": [GOOD2, BAD2, "x"], "ratings": [3.0, 1.0, 2.0], "model": "a"},
        ],
        BOTH,
        "--unneeded_columns model",
    ),
    "OpenBMB UltraFeedback": File(
        each(
            lambda q, g, b: {
                "source": "evol_instruct",
                "instruction": q,
                "models": ["m1", "m2"],
                "completions": [
                    {
                        "response": text,
                        "model": "m",
                        "custom_system_prompt": "Be as helpful as you can.",
                        "critique": "This could be improved in many ways.",
                        "overall_score": 10.0,
                        "fine-grained_score": score,
                    }
                    for text, score in ((b, 2.0), (g, 4.75))
                ],
                "correct_answers": ["None"],
                "incorrect_answers": ["None"],
            }
        ),
        BOTH,
    ),
    "HelpSteer": File(
        [
            {
                "prompt": q,
                "response": text,
                "helpfulness": score,
                "correctness": 3,
                "coherence": 4,
                "complexity": 1,
                "verbosity": 2,
            }
            for q, texts in ((Q, ((BAD, 1), (GOOD, 4))), (Q2, ((GOOD2, 3), (BAD2, 0))))
            for text, score in texts
        ],
        BOTH,
        stops=True,
    ),
    "HelpSteer2 preference": File(
        [
            {"prompt": Q, "response_1": BAD, "response_2": GOOD, "preference_strength": 2, "split": "train"},
            {"prompt": Q2, "response_1": GOOD2, "response_2": BAD2, "preference_strength": -1, "split": "train"},
        ],
        BOTH,
    ),
    "HelpSteer2 preference of several turns": File(
        [
            {
                "prompt": f"Hello there, friend.\n\n<extra_id_1>Assistant\nHello! What is it?\n<extra_id_1>User\n{Q}",
                "response_1": BAD,
                "response_2": GOOD,
                "preference_strength": 2,
            },
            {"prompt": Q2, "response_1": GOOD2, "response_2": BAD2, "preference_strength": -1},
        ],
        HISTORY,
    ),
    "HelpSteer3 preference": File(
        [
            {"context": [user(Q)], "response1": GOOD, "response2": BAD, "overall_preference": -3, "domain": "general"},
            {"context": [user(Q2)], "response1": BAD2, "response2": GOOD2, "overall_preference": 1, "domain": "code"},
        ],
        BOTH,
    ),
    "SHP": File(
        [
            {"history": Q, "human_ref_A": GOOD, "human_ref_B": BAD, "labels": 1, "score_A": 9, "score_B": 2},
            {"history": Q2, "human_ref_A": BAD2, "human_ref_B": GOOD2, "labels": 0, "score_A": 2, "score_B": 9},
        ],
        BOTH,
    ),
    "RewardBench": File(
        [
            {"prompt": Q, "chosen": GOOD, "rejected": BAD, "subset": "alpacaeval-easy", "chosen_model": "m1", "id": 0},
            {"prompt": Q2, "chosen": GOOD2, "rejected": BAD2, "subset": "hep-cpp", "chosen_model": "human", "id": 1},
        ],
        BOTH,
    ),
    "LLMBar": File(
        [
            {"input": Q, "output_1": GOOD, "output_2": BAD, "label": 1},
            {"input": Q2, "output_1": BAD2, "output_2": GOOD2, "label": 2},
        ],
        BOTH,
    ),
    "JudgeBench": File(
        [
            {"pair_id": "e3", "source": "law", "question": q, "response_A": a, "response_B": b, "label": label}
            for q, a, b, label in ((Q, GOOD, BAD, "A>B"), (Q2, BAD2, GOOD2, "B>A"))
        ],
        BOTH,
    ),
    "arena votes": File(
        [
            {
                "model_a": "m1",
                "model_b": "m2",
                "winner": winner,
                "conversation_a": [user(q), model(a)],
                "conversation_b": [user(q), model(b)],
            }
            for q, a, b, winner in (
                (Q, GOOD, BAD, "model_a"),
                (Q2, BAD2, GOOD2, "model_b"),
                (Q, GOOD, BAD2, "tie (bothbad)"),
            )
        ],
        BOTH,
        dropped={"no_ranking": 1},
    ),
    "PandaLM votes": File(
        [
            {
                "idx": 0,
                "instruction": q,
                "input": "",
                "response1": one,
                "response2": two,
                "annotator1": votes[0],
                "annotator2": votes[1],
                "annotator3": votes[2],
            }
            for q, one, two, votes in (
                (Q, GOOD, BAD, (1, 1, 2)),
                (Q2, BAD2, GOOD2, (2, 0, 2)),
                (Q2, BAD2, GOOD, (1, 0, 2)),
            )
        ],
        BOTH,
        dropped={"no_ranking": 1},
    ),
    "thumbs": File(
        [{"question": Q, "answer": GOOD, "thumb": "up"}, {"question": Q2, "answer": BAD2, "thumb": "down"}],
        [trained(opened(("user", Q)), GOOD), trained(opened(("user", Q2)), BAD2)],
        "--loss_type kto",
    ),
    "thumbs for pairs": File(
        [{"question": Q, "answer": GOOD, "thumb": 1}, {"question": Q2, "answer": BAD2, "thumb": 0}],
        [trained(opened(("user", Q)), GOOD), trained(opened(("user", Q2)), BAD2)],
        stops=True,
    ),
    "feedback": File(
        [
            {"prompt": Q, "response": GOOD, "feedback": "positive"},
            {"prompt": Q2, "response": BAD2, "feedback": "negative"},
        ],
        [trained(opened(("user", Q)), GOOD), trained(opened(("user", Q2)), BAD2)],
        "--loss_type kto",
    ),
    # ---- Names of one's own
    "question, good, bad": File(
        each(lambda q, g, b: {"question": q, "good": g, "bad": b}),
        BOTH,
        "--column_map question:prompt good:chosen bad:rejected",
    ),
    "question, good, bad without a map": File(
        each(lambda q, g, b: {"question": q, "good": g, "bad": b}), BOTH, stops=True
    ),
    "a user's message": File(each(lambda q, g, b: {"user_message": q, "chosen": g, "rejected": b}), BOTH, stops=True),
    "a context beside the prompt": File(
        each(lambda q, g, b: {"prompt": "Answer by the text.", "context": q, "chosen": g, "rejected": b}),
        [
            trained(opened(("user", f"Answer by the text.\n\n{q}")), g, b)
            for q, g, b in ((Q, GOOD, BAD), (Q2, GOOD2, BAD2))
        ],
        stops=True,
    ),
    "a dialog beside the prompt": File(
        [
            {**TEXT[0], "dialog": [user("Hello there, friend."), model("Hello! What is it?")]},
            {**TEXT[1], "dialog": []},
        ],
        HISTORY,
        stops=True,
    ),
    "a comment that isn't needed": File(
        [{**row, "comment": "I like this one much better."} for row in TEXT], BOTH, "--unneeded_columns comment"
    ),
    "a margin that isn't read": File([{**row, "margin": 1.0} for row in TEXT], BOTH, "--loss_type ipo", stops=True),
}


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(quickstart.model_path())


def write(folder: Path, file: File) -> str:
    path = folder / file.name.replace("*", "1")
    if file.rows in ("csv", "tsv"):
        with open(path, "w", encoding="utf-8", newline="") as stream:
            table = csv.DictWriter(stream, list(TEXT[0]), delimiter="\t" if file.rows == "tsv" else ",")
            table.writeheader()
            table.writerows(TEXT)
    elif isinstance(file.rows, str):
        path.write_text(file.rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in file.rows))
    return str(folder / file.name)


def prepare(words: list[str], folder: Path) -> tuple[Dataset, Any]:
    """What `dpo-peft train` makes of a file before the model is loaded."""
    fixed = ["--model_name_or_path", quickstart.model_path(), "--output_dir", str(folder / "out"), "--use_cpu", "true"]
    data, args, _ = cli.parse([*fixed, *words])
    rows, _ = load_datasets(data, evaluate=False)
    preparation = Preparation(args, TrainingObjective(args.loss_type), tokenizer())
    return preparation.training(rows), preparation.reports["train"]


def readable(prepared: Dataset) -> list[tuple[str, ...]]:
    decode = tokenizer().decode
    return [(decode(row["prompt_ids"]), *map(decode, row["completion_ids"])) for row in prepared]


ADVICE = re.compile(
    r"--(column_map|dataset_format|unneeded_columns|as_chat|loss_type)((?: [\w:]+?)+?)(?= on the|[.,;]|$)"
)


def play(file: File, folder: Path) -> tuple[list[tuple[str, ...]], Any]:
    """What is trained of a file; where it stops, with the first option that the message advises."""
    words = ["--dataset_name", write(folder, file), *file.options.split()]
    if file.stops:
        with pytest.raises((DataError, OptionError)) as caught:
            prepare(words, folder)
        advised = ADVICE.search(str(caught.value))
        assert advised, caught.value
        words += [f"--{advised[1]}", *advised[2].split()]
    prepared, report = prepare(words, folder)
    return readable(prepared), report


@pytest.mark.parametrize("case", FILES)
def test_a_file_trains_on_what_a_reader_expects(case: str, tmp_path: Path) -> None:
    found, report = play(FILES[case], tmp_path)
    assert found == FILES[case].expected
    assert report.dropped == FILES[case].dropped


@pytest.mark.parametrize(
    ("case", "broken"),
    [
        ("SHP", {"human_ref_A": "human_ref_B", "human_ref_B": "human_ref_A"}),
        (
            "OpenAI's preference rows",
            {"preferred_output": "non_preferred_output", "non_preferred_output": "preferred_output"},
        ),
    ],
)
def test_a_converter_that_swaps_is_noticed(
    case: str, broken: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = next(one for one in published.PUBLISHED.values() if set(broken) <= set(one.columns))
    convert = entry.convert
    object.__setattr__(
        entry, "convert", lambda row: convert({**row, **{new: row[old] for old, new in broken.items()}})
    )
    try:
        assert play(FILES[case], tmp_path)[0] != FILES[case].expected
    finally:
        object.__setattr__(entry, "convert", convert)


def test_a_lost_system_prompt_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpo_peft.data.reading.SYSTEM_COLUMNS", ())
    with pytest.raises(DataError, match="'system' holds text that is not read"):
        play(FILES["Orca pairs"], tmp_path)
    found, _ = play(
        FILES["Orca pairs"].__class__(**{**vars(FILES["Orca pairs"]), "options": "--unneeded_columns system"}),
        tmp_path,
    )
    assert found != WITH_SYSTEM


@pytest.mark.slow
@pytest.mark.parametrize("case", ["Orca pairs", "thumbs", "question, good, bad", "LLaMA-Factory's alpaca"])
def test_a_file_is_trained_on(case: str, tmp_path: Path) -> None:
    """One step of the whole command, on what a reader expects."""
    file = FILES[case]
    words = ["--dataset_name", write(tmp_path, file), *file.options.split(), "--max_steps", "1", "--use_cpu", "true"]
    places = ["--model_name_or_path", quickstart.model_path(), "--output_dir", str(tmp_path / "out")]
    trainer = cli.train([*places, *words, "--bf16", "false", "--report_to", "none"])
    assert trainer.state.global_step == 1
    assert readable(trainer.train_dataset) == file.expected


def test_the_table_of_formats_is_that_of_the_package() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (.*) \| (yes|no) \|$", page, re.MULTILINE)
    own = [
        (name, entry.what, "no" if entry.convert_all or entry.also is published._never else "yes")
        for name, entry in published.PUBLISHED.items()
    ]
    assert rows == own
