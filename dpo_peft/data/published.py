"""Rows as others publish them, one entry of `PUBLISHED` for each: by which columns they are known, how one is read.

An entry makes a row of our columns (`formats.py`) of a row of theirs. Columns that it doesn't name stay beside the new
ones, so a system prompt, tools or a text that nobody reads are seen by what comes after.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import DataError, OptionError
from .converters import SHAREGPT_ROLES, from_hh, from_oasst_tree, from_tulu, marked_turns
from .fields import Messages, NoValue, Row, RowProblem, Values, first_message, from_json, shown
from .formats import ASKING_ROLES

logger = logging.getLogger(__name__)

PROMPT_NAMES = ("prompt", "instruction", "question", "query", "input")  # of a text, the first that is there
WON = {"model_a": (1.0, 0.0), "model_b": (0.0, 1.0)}
TIES = ("tie", "tie (bothbad)", "both_bad", "bothbad")
THUMBS = {
    **dict.fromkeys(("1", "true", "up", "thumbs_up", "thumbs up", "positive", "good", "like", "yes", "👍"), True),
    **dict.fromkeys(("0", "-1", "false", "down", "thumbs_down", "thumbs down", "negative", "bad", "dislike"), False),
    **dict.fromkeys(("no", "👎"), False),
}
THUMB_NAMES = ("thumb", "thumbs", "feedback", "vote", "rating")
REPLY_NAMES = ("answer", "response", "completion", "output")


@dataclass(frozen=True)
class Published:
    """Rows as others publish them."""

    what: str  # they are, for messages
    columns: tuple[str, ...]  # that `convert` reads, and those that are known to be no part of what is trained on
    convert: Callable[[Row], Values] = dict  # to our columns; raises `RowProblem` or `DataError` for a malformed row
    signs: tuple[str, ...] | None = None  # columns that are there where rows can be nothing else; None: `columns`
    unless: tuple[str, ...] = ()  # columns that are not there then
    also: Callable[[Row], bool] = bool  # whether the first row shows it, too; `_never`: only if the user asks for it
    # All rows to ours instead, where one of theirs is not one of ours; only if the user asks for it.
    convert_all: Callable[[Iterable[Row]], Iterator[Values]] | None = None

    def detects(self, have: set[str], first: Row) -> bool:
        """Says whether rows with these columns and this first row can be nothing else."""
        signs = self.columns if self.signs is None else self.signs
        return have.issuperset(signs) and not have.intersection(self.unless) and self.also(first)


def find_published(columns: Iterable[str], first: Row) -> str:
    """Returns the name of the entry for rows with these columns and this first row; "" if there is none."""
    have = set(columns)
    ours = "prompt" in have and bool(have & {"chosen", "completion", "completions"}) and not _has_dicts(first)
    return "" if ours else next((name for name, one in PUBLISHED.items() if one.detects(have, first)), "")


def convert_row(row: Row, name: str) -> Values:
    """Returns a row in our columns, with those that the entry of this name doesn't read. Raises `RowProblem`."""
    entry = PUBLISHED[name]
    try:
        found = entry.convert(row)
    except DataError as error:
        empty = next((column for column in entry.columns if column in row and row[column] is None), "")
        problem, field = (NoValue, empty) if empty else (RowProblem, entry.columns[0])
        raise problem(field, str(error).rstrip("."), f"these are read as {entry.what}, so repair the row") from None
    return {**{column: value for column, value in row.items() if column not in entry.columns}, **found}


def convert_dataset(rows: Any, dataset_format: str) -> Any:
    """Returns a dataset (or stream) in our columns: of the rows that an entry of `PUBLISHED` reads. Raises
    `OptionError` if there is no such entry, `DataError` for a malformed row."""
    from datasets import Dataset

    if dataset_format not in PUBLISHED:
        raise OptionError(f"dataset_format={dataset_format!r} is not one of {', '.join(PUBLISHED)}.")
    entry = PUBLISHED[dataset_format]
    if entry.convert_all is not None:
        return Dataset.from_list(list(entry.convert_all(rows)))

    first = next(iter(rows), None)
    if first is not None and find_published(first, first) == dataset_format:
        return rows  # it is read so by itself

    def convert(row: Row, number: int) -> Values:
        try:
            return convert_row(row, dataset_format)
        except RowProblem as problem:
            raise problem.located("dataset", number) from None

    return rows.map(convert, with_indices=True, remove_columns=[c for c in entry.columns if c in (first or {})])


# ---- Values ---------------------------------------------------------------------------------------------------------


def as_messages(value: object, field: str) -> Messages:
    """Returns messages of role and content: of a text, which is a turn of the assistant's, of one message or several.

    Raises `RowProblem` for anything else.
    """
    if value is None:
        raise NoValue(field, "holds nothing", "fill it in, or remove the row")
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    if not isinstance(value, Mapping | list):
        raise RowProblem(field, f"expected text or messages, found {shown(value, 40)}", "repair the row")
    return [_message(turn, field) for turn in (value if isinstance(value, list) else [value])]


def _message(turn: object, field: str) -> dict[str, Any]:
    if not isinstance(turn, Mapping) or turn.get("value") is None and turn.get("role") is None:
        remedy = "store {role, content} or {from, value}"
        raise RowProblem(field, f"expected a message, found {shown(turn, 60)}", remedy)
    if turn.get("role") is not None:
        return dict(turn)
    if (role := SHAREGPT_ROLES.get(speaker := shown(turn.get("from"), 40))) is None:
        raise RowProblem(field, f"unknown speaker {speaker!r}", f"use one of {', '.join(SHAREGPT_ROLES)}")
    return {"role": role, "content": turn["value"]}


def _named(row: Row, names: Iterable[str]) -> Any:
    return next((row[name] for name in names if name in row), None)


def _has_dicts(row: Row) -> bool:
    return isinstance(row.get("completions"), list) and "response" in first_message(row["completions"])


def _rated(prompt: Any, texts: Sequence[Any], scores: Sequence[Any]) -> Values:
    """Returns completions with scores, higher is better; without those that nobody rated, if two are left."""
    rated = [(text, score) for text, score in zip(texts, scores, strict=True) if None not in (text, score)]
    if len(rated) < 2:
        raise NoValue("ratings", f"only {len(rated)} of {len(texts)} completions are rated", "rate two of them")
    return {"prompt": prompt, "completions": [text for text, _ in rated], "scores": [float(s) for _, s in rated]}


def _pair(row: Row, prompt: Any) -> Values:
    return {"prompt": prompt, "chosen": row.get("chosen"), "rejected": row.get("rejected")}


def _no_verdict(column: str, value: object, wanted: str) -> RowProblem:
    problem = NoValue if value is None else RowProblem
    return problem(column, f"{shown(value, 40)!r} is no verdict", f"store {wanted}, or remove the row")


# ---- One function a format ------------------------------------------------------------------------------------------


def _conversation(row: Row, column: str) -> Values:
    """Reads turns in `column` and what follows them in `chosen` and `rejected`, each a text, a message or several."""
    turns, chosen, rejected = (as_messages(row.get(name), name) for name in (column, "chosen", "rejected"))
    if chosen and chosen[0].get("role") in ASKING_ROLES:  # whole conversations
        return {"chosen": chosen, "rejected": rejected}
    if turns and turns[-1].get("role") == "assistant":
        if turns[-1].get("content") != chosen[0].get("content"):
            problem = "ends with a turn of the assistant's that is not the chosen one"
            raise RowProblem(column, problem, "end it with the user's turn, or remove the row")
        turns = turns[:-1]
    return {"prompt": turns, "chosen": chosen, "rejected": rejected}


def _alpaca(row: Row) -> Values:
    parts = [row.get("instruction"), row.get("input") or ""]
    prompt = None if parts[0] is None else "\n\n".join(str(part) for part in parts if str(part).strip())
    output = row.get("output")
    if isinstance(output, list) and row.get("chosen") is None:
        return {"prompt": prompt, "completions": output, "ranks": list(range(len(output)))}
    return _pair(row, prompt)


def _openai(row: Row) -> Values:
    asked: Row = row.get("input") or {}
    sides = {"chosen": row.get("preferred_output"), "rejected": row.get("non_preferred_output")}
    return {"prompt": asked.get("messages"), **sides, **({"tools": tools} if (tools := asked.get("tools")) else {})}


def _ultrafeedback(row: Row) -> Values:
    completions = row.get("completions") or []
    scores = [one.get("fine-grained_score", one.get("overall_score")) for one in completions]
    return _rated(_named(row, PROMPT_NAMES), [one.get("response") for one in completions], scores)


def _distilabel(row: Row) -> Values:
    return _rated(_named(row, PROMPT_NAMES), row.get("generations") or [], row.get("ratings") or [])


def _distilabel_orca(row: Row) -> Values:
    scores = [0.0, 0.0] if row.get("status") == "tie" else [1.0, 0.0]
    return _rated(row.get("input"), [row.get("chosen"), row.get("rejected")], scores)


def _verdict(prompt: str, a: str, b: str, column: str, a_wins: Any, b_wins: Any) -> Callable[[Row], Values]:
    """Returns what reads two texts, and a column that says which of them is better."""

    def convert(row: Row) -> Values:
        if (found := row.get(column)) not in (a_wins, b_wins):
            raise _no_verdict(column, found, f"{a_wins} where {a} is better, {b_wins} where {b} is")
        return _rated(row.get(prompt), [row.get(a), row.get(b)], [found == a_wins, found == b_wins])

    return convert


def _arena(row: Row) -> Values:
    winner = row.get("winner")
    if winner not in WON and winner not in TIES:
        raise _no_verdict("winner", winner, f"one of {', '.join([*WON, *TIES])}")
    both = [row.get("conversation_a"), row.get("conversation_b")]
    if None in both:
        raise NoValue("conversation_a", "one of the conversations is missing", "remove the row")
    return {"completions": both, "scores": list(WON.get(winner, (0.5, 0.5)))}


def _helpsteer_preference(row: Row) -> Values:
    """Reads HelpSteer2's and HelpSteer3's: the sign of a preference from -3 (the first is better) to 3."""
    strength = _named(row, ("preference_strength", "overall_preference"))
    both = [_named(row, names) for names in (("response_1", "response1"), ("response_2", "response2"))]
    scores = [None, None] if strength is None else [-strength, strength]
    return _rated(marked_turns(_named(row, ("prompt", "context"))), both, scores)


def _helpsteer(rows: Iterable[Row]) -> Iterator[Values]:
    """Yields a row for each prompt, of all responses to it, with their `helpfulness` as scores."""
    by_prompt: dict[str, list[Row]] = {}
    for row in rows:
        by_prompt.setdefault(row["prompt"], []).append(row)
    alone = sum(len(same) < 2 for same in by_prompt.values())
    logger.info("HelpSteer: %d of %d prompts have one response, and are left out.", alone, len(by_prompt))
    for prompt, same in by_prompt.items():
        if len(same) > 1:
            yield _rated(marked_turns(prompt), [row["response"] for row in same], [row["helpfulness"] for row in same])


def _thumbs(row: Row) -> Values:
    column = next(name for name in THUMB_NAMES if name in row)
    thumb = row[column]
    label = THUMBS.get(str(thumb).strip().lower())
    if label is None:
        raise _no_verdict(column, thumb, "'up' or 'down'")
    return {"prompt": _named(row, PROMPT_NAMES), "completion": _named(row, REPLY_NAMES), "label": label}


def _is_thumbs(first: Row) -> bool:
    thumb, reply = _named(first, THUMB_NAMES), _named(first, REPLY_NAMES)
    names = [sum(name in first for name in group) for group in (THUMB_NAMES, REPLY_NAMES, PROMPT_NAMES)]
    return names == [1, 1, 1] and isinstance(reply, str) and str(thumb).strip().lower() in THUMBS


def _pandalm(row: Row) -> Values:
    votes = [row.get(f"annotator{number}") for number in (1, 2, 3)]
    if None in votes:
        raise NoValue(f"annotator{votes.index(None) + 1}", "holds nothing", "remove the row")
    both = [row.get("response1"), row.get("response2")]
    return _rated(_alpaca(row)["prompt"], both, [votes.count(1), votes.count(2)])


def _texts(first: Row) -> bool:
    return all(isinstance(first.get(name), str | None) for name in ("question", "input", "chosen", "rejected"))


def _never(first: Row) -> bool:
    return False


PAIR, TALKS = ("chosen", "rejected"), ("prompt", "messages", "conversations")
SHP = ("history", "human_ref_A", "human_ref_B", "labels")
LLMBAR = ("input", "output_1", "output_2", "label")
JUDGEBENCH = ("question", "response_A", "response_B", "label")
PUBLISHED: dict[str, Published] = {
    "openai": Published("OpenAI's preference rows", ("input", "preferred_output", "non_preferred_output"), _openai),
    "sharegpt": Published(
        "ShareGPT rows", ("conversations", *PAIR), lambda row: _conversation(row, "conversations"), unless=("prompt",)
    ),
    "messages": Published(
        "messages beside two completions",
        ("messages", *PAIR),
        lambda row: _conversation({**row, "messages": from_json(row, "messages")}, "messages"),
        unless=("prompt", "conversations"),
        also=lambda first: not isinstance(first["messages"], str) or first["messages"].lstrip().startswith("["),
    ),
    "ultrafeedback": Published(
        "OpenBMB UltraFeedback rows",
        (*PROMPT_NAMES[:2], "completions", "models", "correct_answers", "incorrect_answers"),
        _ultrafeedback,
        signs=("completions",),
        also=lambda first: _has_dicts(first) and bool({"prompt", "instruction"} & first.keys()),
    ),
    "distilabel": Published(
        "distilabel generations with ratings",
        (
            *(*PROMPT_NAMES, "generations", "ratings", "rationales", "labelling_prompt", "raw_labelling_response"),
            *("raw_generation_responses", *PAIR),
        ),
        _distilabel,
        signs=("generations", "ratings"),
    ),
    "distilabel_orca": Published(
        "distilabel Orca pairs",
        (
            *("input", *PAIR, "status", "generations", "order", "rating", "rationale", "labelling_model"),
            *("labelling_prompt", "raw_labelling_response", "original_chosen", "original_rejected"),
        ),
        _distilabel_orca,
        signs=("input", *PAIR),
        unless=(*TALKS, "instruction", "question"),
        also=_texts,
    ),
    "orca": Published(
        "Orca pairs",
        ("question", *PAIR),
        lambda row: _pair(row, row.get("question")),
        unless=(*TALKS, "instruction", "input"),
        also=_texts,
    ),
    "alpaca": Published(
        "Alpaca-like rows",
        ("instruction", "input", *PAIR, "output"),
        _alpaca,
        signs=("instruction",),
        unless=(*TALKS, "question", "generations", "response1"),
        also=lambda first: set(PAIR) <= first.keys() or isinstance(first.get("output"), list),
    ),
    "shp": Published("Stanford Human Preferences", SHP, _verdict(*SHP, 1, 0)),
    "llmbar": Published("LLMBar comparisons", LLMBAR, _verdict(*LLMBAR, 1, 2)),
    "judgebench": Published("JudgeBench pairs", JUDGEBENCH, _verdict(*JUDGEBENCH, "A>B", "B>A")),
    "arena": Published(
        "arena votes",
        ("conversation_a", "conversation_b", "winner", "full_conversation"),
        _arena,
        signs=("conversation_a", "conversation_b", "winner"),
    ),
    "helpsteer2": Published(
        "HelpSteer2 preferences",
        (
            *("prompt", "response_1", "response_2", "preference_strength", "preference_statement"),
            *("preference_elaboration", "three_most_similar_preferences", "all_preferences_unprocessed"),
        ),
        _helpsteer_preference,
        signs=("prompt", "response_1", "response_2", "preference_strength"),
    ),
    "helpsteer3": Published(
        "HelpSteer3 preferences",
        ("context", "response1", "response2", "overall_preference", "individual_preference"),
        _helpsteer_preference,
        signs=("context", "response1", "response2", "overall_preference"),
    ),
    "helpsteer": Published(
        "HelpSteer ratings, one response a row", ("prompt", "response", "helpfulness"), convert_all=_helpsteer
    ),
    "thumbs": Published(
        *("thumbs up and down", (*PROMPT_NAMES, *REPLY_NAMES, *THUMB_NAMES), _thumbs, ()),
        unless=PAIR,
        also=_is_thumbs,
    ),
    "pandalm": Published(
        "PandaLM comparisons",
        ("instruction", "input", "response1", "response2", "annotator1", "annotator2", "annotator3"),
        _pandalm,
        signs=("instruction", "response1", "response2", "annotator1"),
    ),
    "tulu": Published("Tulu human evaluation", ("prompt", "completion_a", "completion_b", "preference"), from_tulu),
    "hh": Published("HH transcripts as messages", PAIR, from_hh, also=_never),
    "oasst_tree": Published(
        "Open-Assistant trees",
        ("message_tree_id", "prompt"),
        signs=("message_tree_id",),
        also=lambda first: isinstance(first.get("prompt"), Mapping),
        convert_all=lambda trees: (row for tree in trees for row in from_oasst_tree(tree)),
    ),
}
