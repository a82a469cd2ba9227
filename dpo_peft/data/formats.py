"""The formats of rows: `detect_format` names one for all rows of a dataset; `parse.py` reads them.

A format is a way to give the prompt and, after it, a way to give the completions. `register` adds one from outside.

| prompt        | columns                                                                                   |
|---------------|-------------------------------------------------------------------------------------------|
| text          | `prompt`: text; completions as text                                                       |
| text_implicit | none: answers are texts that start alike                                                  |
| transcript    | none: answers are raw HH texts, "\\n\\nHuman: … \\n\\nAssistant: …"                           |
| chat          | `prompt` and answers: lists of {role, content}; `tools`, `chat_template_kwargs`           |
| chat_implicit | answers are whole conversations that start alike (a text `prompt` is then unused)         |
| ids           | `prompt_ids` and answers: token ids, used as they are                                     |

| answers | columns                                                                       | for                       |
|---------|-------------------------------------------------------------------------------|---------------------------|
| (pair)  | `chosen`, `rejected`                                                          | every objective           |
| (pair)  | `chosen`, `rejected` as a list of answers                                     | lists, singles            |
| _ranked | `completions` with `ranks` (lower is better) or `scores` (higher is better)   | lists                     |
| _label  | `completion` and `label`; a whole conversation in `messages` (chat_implicit)  | singles                   |

With ids the columns are `chosen_ids`, `rejected_ids`, `completions_ids` and `completion_ids`. A pair may carry a
`preference` (probability in [0, 1] that chosen is the better one) and a `margin`, where the objective reads them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import DataError, OptionError
from .fields import RowProblem, read_text

Row = Mapping[str, Any]

DATA_KINDS = ("pairs", "lists", "singles", "trajectories")
DISCOUNT_UNITS = ("turn", "token")
LABEL_COLUMNS = ("preference", "margin")
CHAT_COLUMNS = ("tools", "chat_template_kwargs")
GRADE_COLUMNS = ("ranks", "scores")
ASKING_ROLES = ("user", "system", "developer")
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"

LISTS = "an objective that learns from lists (loss_type 'multi_negative' or 'plackett_luce')"
SINGLES = "an objective that learns from single judged answers (loss_type 'kto' or 'apo_zero_unpaired')"
PAIRS = (
    "prompt/chosen/rejected as text or lists of messages, chosen/rejected that start alike (implicit prompt), raw HH "
    "transcripts, or prompt_ids/chosen_ids/rejected_ids"
)
ACCEPTED = {
    "pairs": PAIRS,
    "trajectories": "chosen/rejected as whole conversations, or prompt/chosen/rejected as messages, text or ids",
    "lists": f"prompt/completions with ranks or scores, or (rejected may be a list) {PAIRS}",
    "singles": f"prompt/completion/label, messages/label, or (rejected may be a list) {PAIRS}",
}


@dataclass(frozen=True)
class Wanted:
    """What the objective learns from; the arguments of the same names of `prepare_dataset`."""

    data: str = "pairs"
    label_columns: tuple[str, ...] = ()
    discount_unit: str = "turn"
    single_best: bool = False

    def __post_init__(self) -> None:
        if self.data not in DATA_KINDS:
            raise OptionError(f"data={self.data!r} is unknown. Use one of {', '.join(DATA_KINDS)}.")
        if self.discount_unit not in DISCOUNT_UNITS:
            raise OptionError(f"discount_unit={self.discount_unit!r} is unknown. Use one of 'turn' and 'token'.")
        if not isinstance(self.label_columns, tuple) or not set(self.label_columns) <= set(LABEL_COLUMNS):
            raise OptionError(f"label_columns={self.label_columns!r} must hold nothing but {LABEL_COLUMNS}.")

    @property
    def graded(self) -> bool:
        """Says whether each completion of a row has a grade of its own."""
        return self.data in ("lists", "singles")


PLAIN_PAIRS = Wanted()


@dataclass(frozen=True)
class Example:
    """One prompt with K completions before tokenization, the best first.

    `kind` is "text" (str), "chat" (lists of messages) or "ids" (lists of int) and holds for prompt and completions.
    `fields` are the names of the completions in messages, `grades` one number each (higher is better) for lists and
    singles. `continues` says that the completions go on with the prompt's last message instead of starting a new one.
    """

    kind: str
    prompt: Any
    completions: list[Any]
    fields: tuple[str, ...]
    grades: list[float] | None = None
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    continues: bool = False


@dataclass(frozen=True)
class RowFormat:
    """A way to write preference rows. `register` adds one; `parse.py` makes those that the table above lists.

    Args:
        name: what the summary calls it.
        kind: what its examples hold: "text", "chat" or "ids" (see `Example`).
        columns: those that `read` reads. The summary names the others as unused.
        read: one row to an `Example` of this kind, or to the name of the reason (of `REASONS`) why it can't teach
            anything. Raises `RowProblem(field, problem, remedy)` for a malformed row.
        detect: whether a dataset with these columns and this first row is of this format.
    """

    name: str
    kind: str
    columns: tuple[str, ...]
    read: Callable[[Row], "Example | str"]
    detect: Callable[[set[str], Row], bool] = lambda columns, first: False


REGISTERED: dict[str, RowFormat] = {}


def register(row_format: RowFormat) -> None:
    """Adds a format for rows, or replaces the one of that name. It is asked before the package's own formats."""
    REGISTERED[row_format.name] = row_format


def split_format(fmt: str) -> tuple[str, str]:
    """Returns how a format gives prompt and completions: "chat_ranked" -> ("chat", "ranked"), "ids" -> (…, "pair")."""
    base, _, answers = fmt.rpartition("_")
    return (base, answers) if answers in ("ranked", "label") else (fmt, "pair")


def used_columns(fmt: str) -> tuple[str, ...]:
    """Returns the columns that rows of a format are read from, labels of a pair apart."""
    base, answers = split_format(fmt)
    end = "_ids" if base == "ids" else ""
    prompt = (f"prompt{end}",) if base in ("text", "chat", "ids") else ()
    if answers == "pair":
        given: tuple[str, ...] = (f"chosen{end}", f"rejected{end}")
    elif answers == "ranked":
        given = (f"completions{end}", *GRADE_COLUMNS)
    else:
        given = ("messages" if base == "chat_implicit" else f"completion{end}", "label")
    return prompt + given + (CHAT_COLUMNS if base.startswith("chat") else ())


def detect_format(name: str, columns: list[str], first: Row, wanted: Wanted = PLAIN_PAIRS) -> str:
    """Names the format of dataset `name` from its columns and its first row.

    Raises `DataError` when there is none, or none that the objective can learn from.
    """
    have, data = set(columns), wanted.data
    _refuse_raw_formats(name, have, first)
    answers = _detect_answers(name, have, first, data)
    _refuse_unread_labels(name, have, wanted)
    if answers == "ranked":
        return _detect_ranked(name, have, first)
    if answers == "label":
        return _detect_label(name, have, first)
    if have.intersection(("prompt_ids", "chosen_ids", "rejected_ids")) and not {"chosen", "rejected"} <= have:
        _need(name, have, ("prompt_ids", "chosen_ids", "rejected_ids"), data)
        return "ids"
    _need(name, have, ("chosen", "rejected"), data)
    rejected = first.get("rejected")
    if wanted.graded and is_several(rejected, kind_of(first.get("chosen"))):
        rejected = rejected[0] if rejected else first["chosen"]
    base = _detect_base(name, have, {**first, "rejected": rejected}, ("chosen", "rejected"))
    if base == "transcript" and data == "trajectories":
        raise DataError(
            f"{name}: raw HH transcripts hold their turns as one text. Convert them first: "
            "dataset.map(dpo_peft.data.from_hh), or dataset_format='hh' on the command line."
        )
    return base


def _detect_answers(name: str, have: set[str], first: Row, data: str) -> str:
    """Returns how the rows give their completions, if that suits `data`."""
    paired = {"chosen", "rejected"} <= have or {"chosen_ids", "rejected_ids"} <= have
    lists, judged = have & {"completions", "completions_ids"}, have & {"completion", "completion_ids", "messages"}
    needs = None
    if lists and data == "lists" and (not paired or have.intersection(GRADE_COLUMNS)):
        return "ranked"
    if lists and not paired:
        needs = f"{sorted(lists)[0]!r} (ranked or scored lists) needs {LISTS}"
    elif "label" in have and judged and not paired:
        if data == "singles":
            return "label"
        needs = f"'label' (one judged answer per row) needs {SINGLES}"
    elif data in ("pairs", "trajectories"):
        several = [column for column in ("rejected", "rejected_ids") if _list_of_answers(first.get(column))]
        needs = f"{several[0]!r} as a list of answers needs {LISTS}" if several else None
    elif data == "singles" and judged and not paired:
        needs = "a judged answer needs a 'label' column (True for desirable)"
    if needs:
        raise DataError(f"{name}: {needs}. The objective that was chosen learns from {data}: {ACCEPTED[data]}.")
    return "pair"


def is_several(value: Any, kind: str) -> bool:
    """Says whether `value` holds a list of completions where one is possible; `kind` says what a completion is."""
    return isinstance(value, list) and (kind == "text" or not value or isinstance(value[0], list))


def _list_of_answers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], (str, list))


def _detect_ranked(name: str, have: set[str], first: Row) -> str:
    column = "completions" if "completions" in have else "completions_ids"
    grades = [grade for grade in GRADE_COLUMNS if grade in have]
    if len(grades) != 1:
        found = "both are there" if grades else "there is neither"
        raise DataError(
            f"{name}: {column!r} needs one of 'ranks' (lower is better) and 'scores' (higher is better), and {found}. "
            "Add or remove a column, e.g. dataset.remove_columns('ranks')."
        )
    if column == "completions_ids":
        _need(name, have, ("prompt_ids",), "lists")
        return "ids_ranked"
    answers = first.get(column)
    if not isinstance(answers, list) or not answers:
        what = "an empty list" if isinstance(answers, list) else type(answers).__name__
        problem = RowProblem(column, f"expected a list of answers, found {what}", "give every row its answers")
        raise problem.located(name, 0)
    return _detect_base(name, have, {"prompt": first.get("prompt"), column: answers[0]}, (column,)) + "_ranked"


def _detect_label(name: str, have: set[str], first: Row) -> str:
    if "completion" in have:
        return _detect_base(name, have, first, ("completion",)) + "_label"
    if "completion_ids" in have:
        _need(name, have, ("prompt_ids",), "singles")
        return "ids_label"
    return "chat_implicit_label"


def _detect_base(name: str, have: set[str], first: Row, answers: tuple[str, ...]) -> str:
    """Returns how the rows give their prompt; `first` holds one completion in each of the columns `answers`."""
    kinds = [kind_of(first.get(column)) for column in answers]
    prompt = kind_of(first.get("prompt")) if "prompt" in have else None
    if set(kinds) == {"text"}:
        return _detect_text(name, have, prompt, first, answers)
    if set(kinds) == {"list"}:
        return _detect_chat(name, prompt, first, answers)
    for column, kind in zip(answers, kinds, strict=True):  # something odd: let the readers say what
        if kind not in ("text", "list"):
            try:
                read_text(first, column)
            except RowProblem as problem:
                raise problem.located(name, 0) from None
    raise DataError(
        f"{name}: 'chosen' is {kinds[0]} but 'rejected' is {kinds[-1]}. Give both as text or both as lists of "
        "messages."
    )


def _detect_text(name: str, have: set[str], prompt: str | None, first: Row, answers: tuple[str, ...]) -> str:
    if prompt == "list":
        raise DataError(
            f"{name}: 'prompt' is a list of messages but {_names(answers)} hold text. Make the answers "
            'messages too: [{"role": "assistant", "content": text}].'
        )
    if prompt:
        return "text"
    questions = sorted(have & {"instruction", "question", "query", "input"})
    if questions:
        raise DataError(
            f"{name}: no 'prompt' column, but {', '.join(map(repr, questions))} looks like one. Alpaca-like rows: "
            "dataset.map(dpo_peft.data.from_alpaca); otherwise rename the column to 'prompt'."
        )
    if answers == ("completion",):
        raise DataError(f"{name}: no 'prompt' column. Add it: one answer alone doesn't show where its prompt ends.")
    return "transcript" if all(first[column].startswith(HUMAN) for column in answers) else "text_implicit"


def _detect_chat(name: str, prompt: str | None, first: Row, answers: tuple[str, ...]) -> str:
    if prompt == "list":
        return "chat"
    if prompt is None and answers != ("completion",):
        return "chat_implicit"
    # Some public sets repeat the question as text beside two whole conversations.
    opening = first[answers[0]][0] if first[answers[0]] else None
    if answers != ("completion",) and isinstance(opening, Mapping) and opening.get("role") in ASKING_ROLES:
        return "chat_implicit"
    found = f"'prompt' is {prompt}" if prompt else "there is no 'prompt'"
    raise DataError(
        f"{name}: {found} but {_names(answers)} hold lists of messages. Make the prompt a list of messages too: "
        '[{"role": "user", "content": text}].'
    )


def _names(columns: tuple[str, ...]) -> str:
    return " and ".join(map(repr, columns))


def _refuse_raw_formats(name: str, have: set[str], first: Row) -> None:
    """Refuses formats that need a converter or a vision model, before anything else is said."""
    vision = sorted(have & {"image", "images"})
    if vision:
        raise DataError(
            f"{name}: column {vision[0]!r} holds images, and vision models are not supported. Remove the column if "
            f"the text alone is meant: dataset.remove_columns({vision!r})."
        )
    ready = have & {"chosen", "completions", "completion", "messages"}  # converters leave the raw columns beside these
    convert = "dataset.map(dpo_peft.data.from_{})".format
    raw = None
    if "conversations" in have and "prompt" not in have:
        raw = "ShareGPT rows", convert("sharegpt")
    elif {"response1", "response2"} <= have and not ready:
        raw = "PandaLM comparisons", f"dataset.filter(dpo_peft.data.pandalm_decided).{convert('pandalm')[8:]}"
    elif {"completion_a", "completion_b"} <= have and not ready:
        raw = "Tulu human evaluation", convert("tulu")
    elif "message_tree_id" in have and not ready:
        raw = "Open-Assistant trees", "Dataset.from_list([row for tree in trees for row in from_oasst_tree(tree)])"
    elif isinstance(first.get("output"), list) and not ready:
        raw = "Alpaca-like rows with a ranked list of outputs", convert("alpaca")
    if raw:
        raise DataError(f"{name}: {raw[0]}. Convert them first: {raw[1]}, or dataset_format on the command line.")


def _refuse_unread_labels(name: str, have: set[str], wanted: Wanted) -> None:
    for column in LABEL_COLUMNS:
        if column in have and (wanted.graded or column not in wanted.label_columns):
            raise DataError(
                f"{name}: column {column!r} would have no effect with this loss_type. Remove it: "
                f"dataset.remove_columns({column!r}), or choose a loss_type that reads it."
            )


def _need(name: str, have: set[str], wanted: tuple[str, ...], data: str) -> None:
    missing = [column for column in wanted if column not in have]
    if missing:
        raise DataError(
            f"{name}: column {', '.join(map(repr, missing))} is missing; the columns are {sorted(have)}. Accepted: "
            f"{ACCEPTED[data]}. Rename with dataset.rename_column(old, new)."
        )


def kind_of(value: Any) -> str:
    if isinstance(value, str):
        return "text"
    return "list" if isinstance(value, list) else type(value).__name__
