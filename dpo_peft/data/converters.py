"""Public row formats to ours, one row at a time, for `dataset.map(from_…)`. Each returns new columns only.

A row that can't be converted raises `DataError`; rows without a signal are left for `prepare_dataset` to count.
"""

import re
from collections.abc import Mapping
from typing import Any

from ..errors import DataError
from .fields import Row, shown
from .formats import ASSISTANT, HUMAN

Message = dict[str, str]

OURS = {role: role for role in ("user", "assistant", "system", "tool")}
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", **OURS}
OASST_ROLES = {"prompter": "user", "assistant": "assistant"}
TULU_PREFERENCES = {
    "a-is-better": 1.0,
    "a-is-slightly-better": 0.75,
    "tie": 0.5,
    "b-is-slightly-better": 0.25,
    "b-is-better": 0.0,
}


def from_sharegpt(row: Row) -> dict[str, list[Message]]:
    """Converts `conversations`, `chosen` and `rejected` with messages as {from, value}, and an optional `system`."""
    prompt = [_sharegpt_message(message, "conversations") for message in _get(row, "conversations", list)]
    if row.get("system"):
        prompt.insert(0, {"role": "system", "content": _get(row, "system")})
    chosen, rejected = (_sharegpt_message(row.get(column), column) for column in ("chosen", "rejected"))
    return {"prompt": prompt, "chosen": [chosen], "rejected": [rejected]}


def from_alpaca(row: Row) -> dict[str, list[Any]]:
    """Converts `instruction`, optional `input`, `system` and `history` ([[question, answer], …]), and its completions.

    These are texts: `chosen` and `rejected`, or a list in `output` from the best to the worst, which becomes
    `completions` and `ranks`.
    """
    prompt, instruction = list[Message](), _instruction(row)
    if row.get("system"):
        prompt.append({"role": "system", "content": _get(row, "system")})
    for turn in _get(row, "history", list) if row.get("history") else []:
        if not isinstance(turn, list | tuple) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise DataError(
                f"{_where(row)}, field 'history': expected [question, answer], two texts, found {shown(turn, 40)}. "
                "Repair the row or filter it out."
            )
        prompt += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), turn, strict=True)]
    prompt.append({"role": "user", "content": instruction})
    if isinstance(row.get("output"), list) and "chosen" not in row:
        return {"prompt": prompt, **_ranked([_get({"output": text}, "output") for text in row["output"]])}
    return {"prompt": prompt, "chosen": _reply(_get(row, "chosen")), "rejected": _reply(_get(row, "rejected"))}


def from_hh(row: Row) -> dict[str, list[Message]]:
    """Converts raw HH transcripts to two whole conversations (implicit prompt)."""
    return {column: _turns(_get(row, column), column) for column in ("chosen", "rejected")}


def pandalm_decided(row: Row) -> bool:
    """Says whether more annotators prefer one response than prefer the other."""
    return _pandalm_votes(row) != 0


def from_pandalm(row: Row) -> dict[str, list[Message]]:
    """Converts `instruction`, `input`, two responses and three votes (0 tie, 1, 2) on these: the majority wins."""
    votes = _pandalm_votes(row)
    if not votes:
        raise DataError(f"{_where(row)}: the annotators are tied. Filter first: dataset.filter(pandalm_decided).")
    first, second = _get(row, "response1"), _get(row, "response2")
    chosen, rejected = (first, second) if votes > 0 else (second, first)
    prompt = [{"role": "user", "content": _instruction(row)}]
    return {"prompt": prompt, "chosen": _reply(chosen), "rejected": _reply(rejected)}


def from_tulu(row: Row) -> dict[str, Any]:
    """Converts `prompt`, `completion_a`, `completion_b` and `preference` in words: `chosen` is a."""
    preference = TULU_PREFERENCES.get(_get(row, "preference"))
    if preference is None:
        raise DataError(
            f"{_where(row)}, field 'preference': {row.get('preference')!r} is none of {', '.join(TULU_PREFERENCES)}. "
            "Repair the row or filter it out."
        )
    prompt = [{"role": "user", "content": _get(row, "prompt")}]
    first, second = (_reply(_get(row, field)) for field in ("completion_a", "completion_b"))
    return {"prompt": prompt, "chosen": first, "rejected": second, "preference": preference}


def from_oasst_tree(row: Row) -> list[dict[str, list[Any]]]:
    """Converts a message tree to rows of `prompt`, `completions`, `ranks`, one for each group of ranked replies.

    For a list of trees: `Dataset.from_list([row for tree in trees for row in from_oasst_tree(tree)])`. A group needs
    two ranked replies of the assistant's; a reply without a rank is left out.
    """
    rows: list[dict[str, list[Any]]] = []
    waiting: list[tuple[Any, list[Message]]] = [(_get(row, "prompt", Mapping), [])]
    while waiting:
        message, path = waiting.pop(0)
        role = OASST_ROLES.get(_get(message, "role"))
        if role is None:
            raise DataError(f"{_where(row)}: unknown role {message['role']!r}. Use one of {', '.join(OASST_ROLES)}.")
        path = [*path, {"role": role, "content": _get(message, "text")}]
        replies = _get(message, "replies", list) if message.get("replies") else []
        ranked = [reply for reply in replies if role == "user" and _row(reply).get("rank") is not None]
        if len(ranked) > 1:
            texts, ranks = [_get(one, "text") for one in ranked], [_get(one, "rank", int) for one in ranked]
            rows.append({"prompt": path, **_ranked(texts, ranks)})
        waiting += [(reply, path) for reply in replies]
    return rows


def _ranked(texts: list[str], ranks: list[int] | None = None) -> dict[str, list[Any]]:
    """Returns completions with ranks (lower is better); without, they stand from the best to the worst."""
    return {"completions": [_reply(text) for text in texts], "ranks": ranks or list(range(len(texts)))}


def _pandalm_votes(row: Row) -> int:
    votes = [_get(row, f"annotator{number}", int) for number in (1, 2, 3)]
    return votes.count(1) - votes.count(2)


def _sharegpt_message(message: object, field: str) -> Message:
    if not isinstance(message, Mapping) or not isinstance(message.get("value"), str):
        raise DataError(
            f"field {field!r}: expected a dict with from and value, found {shown(message, 60)}. Repair the row."
        )
    role = SHAREGPT_ROLES.get(speaker := shown(message.get("from"), 40))
    if role is None:
        raise DataError(f"field {field!r}: unknown speaker {speaker!r}. Use one of {', '.join(SHAREGPT_ROLES)}.")
    return {"role": role, "content": message["value"]}


def _turns(transcript: str, field: str) -> list[Message]:
    if not transcript.startswith(HUMAN):
        raise DataError(
            f"field {field!r}: a transcript starts with {HUMAN!r}, found {transcript[:40]!r}. Repair the row."
        )
    turns: list[Message] = []
    for part in transcript.replace(ASSISTANT, HUMAN + ASSISTANT).split(HUMAN)[1:]:
        role, text = ("assistant", part[len(ASSISTANT) :]) if part.startswith(ASSISTANT) else ("user", part)
        if part or not turns:
            turns.append({"role": role, "content": text.strip()})
    return turns


def _instruction(row: Row) -> str:
    instruction = _get(row, "instruction")
    extra = _get(row, "input") if row.get("input") else ""
    return f"{instruction}\n\n{extra}" if extra.strip() else instruction


def _reply(text: str) -> list[Message]:
    return [{"role": "assistant", "content": text}]


def _get(row: Row, field: str, kind: type = str) -> Any:
    value = _row(row).get(field)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise DataError(
            f"{_where(row)}, field {field!r}: expected {kind.__name__}, found {type(value).__name__} "
            f"({shown(value, 40)}). Repair the row or filter it out."
        )
    return value


def _row(row: Row) -> Row:
    if not isinstance(row, Mapping):
        raise DataError(f"expected a row (a dict), found {type(row).__name__} ({shown(row, 40)}). Filter it out.")
    return row


def _where(row: Row) -> str:
    names = [name for name in ("idx", "id", "message_tree_id") if name in row]
    return f"row with {names[0]} {shown(row[names[0]], 40)}" if names else "row"


def marked_turns(prompt: Any) -> Any:
    """Returns the turns of a prompt that marks them as HelpSteer's do (`<extra_id_1>Assistant`); another as it is."""
    if not isinstance(prompt, str) or "<extra_id_1>" not in prompt:
        return prompt
    first, *rest = re.split(r"\n*<extra_id_1>(User|Assistant)\n", prompt)
    turns = [("User", first)] * bool(first.strip()) + list(zip(rest[::2], rest[1::2], strict=True))
    return [{"role": role.lower(), "content": text} for role, text in turns if text.strip()]
