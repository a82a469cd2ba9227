"""The formats of rows: `detect_layout` finds that of a dataset, `parse.py` reads its rows. `register` adds one.

A format is a way to give the prompt and, after it, what is known of the completions: "chat", "text_ranked".

| prompt        | columns                                                                                   |
|---------------|-------------------------------------------------------------------------------------------|
| text          | `prompt`: text; completions as text                                                       |
| text_implicit | none: completions are texts that start alike                                              |
| transcript    | none: completions are raw HH texts, "\\n\\nHuman: … \\n\\nAssistant: …"                       |
| chat          | `prompt` and completions: lists of {role, content}; `tools`, `chat_template_kwargs`       |
| chat_implicit | completions are whole conversations that start alike (a text `prompt` is then unused)     |
| ids           | `prompt_ids` and completions: token ids, used as they are                                 |

| judged     | columns                                                                         | for             |
|------------|---------------------------------------------------------------------------------|-----------------|
| pair       | `chosen`, `rejected`                                                            | every objective |
| several    | `chosen`, `rejected` as a list of completions                                   | lists, singles  |
| ranked     | `completions` with `ranks` (lower is better) or `scores` (higher is better)     | every objective |
| label      | `completion` and `label`; a whole conversation in `messages` (chat_implicit)    | singles         |
| unlabeled  | `completion`, `completions` or `messages`: nobody judged them, they are scored  | unlabeled      |

With ids the columns are `chosen_ids`, `rejected_ids`, `completions_ids` and `completion_ids`. A pair may carry a
`preference` (probability in [0, 1] that chosen is the better one) and a `margin`, where the objective reads them.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..errors import DataError, OptionError
from .fields import Row, Values, first_message

# What the judgments of a row suit: the kinds of data that objectives learn from. The first is what it is scored as.
SUITS = {
    "pair": ("pairs", "trajectories", "lists", "singles"),
    "several": ("lists", "singles"),
    "ranked": ("lists", "pairs", "trajectories", "singles", "unlabeled"),  # but for lists: the best and the worst
    "label": ("singles", "unlabeled"),
    "unlabeled": ("unlabeled",),
}
DATA_KINDS = ("pairs", "lists", "singles", "trajectories", "unlabeled")
DISCOUNT_UNITS = ("turn", "token")
LABEL_COLUMNS = ("preference", "margin")
IMAGE_COLUMNS = {"image", "images"}
CHAT_COLUMNS = ("tools", "chat_template_kwargs")
GRADE_COLUMNS = ("ranks", "scores")
ASKING_ROLES = ("user", "system", "developer")
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"

LISTS = "an objective that learns from lists (loss_type 'multi_negative' or 'plackett_luce')"
SINGLES = "an objective that learns from single judged completions (loss_type 'kto' or 'apo_zero_unpaired')"
PAIRS = (
    "prompt/chosen/rejected as text or lists of messages, chosen/rejected that start alike (implicit prompt), raw HH "
    "transcripts, or prompt_ids/chosen_ids/rejected_ids"
)
ACCEPTED = {
    "pairs": PAIRS,
    "trajectories": "chosen/rejected as whole conversations, or prompt/chosen/rejected as messages, text or ids",
    "lists": f"prompt/completions with ranks or scores, or (rejected may be a list) {PAIRS}",
    "singles": f"prompt/completion/label, messages/label, or (rejected may be a list) {PAIRS}",
    "unlabeled": "prompt/completion, prompt/completions or messages",
}


@dataclass(frozen=True)
class Wanted:
    """What the objective learns from; the arguments of the same names of `prepare_dataset`."""

    data: str = "pairs"
    label_columns: tuple[str, ...] = ()
    discount_unit: str = "turn"
    single_best: bool = False
    unpair: bool = False
    images: bool = False  # a processor is there to read them
    invocation: tuple[int, ...] = ()  # that each prompt must hold, see `invocation.py`

    def __post_init__(self) -> None:
        if self.data not in DATA_KINDS:
            raise OptionError(f"data={self.data!r} is unknown. Use one of {', '.join(DATA_KINDS)}.")
        if self.discount_unit not in DISCOUNT_UNITS:
            raise OptionError(f"discount_unit={self.discount_unit!r} is unknown. Use one of 'turn' and 'token'.")
        if self.unpair and self.data != "singles":
            raise OptionError(f"unpair=True has no effect on data={self.data!r}: leave it out, or use 'singles'.")
        if not isinstance(self.label_columns, tuple) or not set(self.label_columns) <= set(LABEL_COLUMNS):
            raise OptionError(f"label_columns={self.label_columns!r} must hold nothing but {LABEL_COLUMNS}.")

    @property
    def graded(self) -> bool:
        """Says whether each completion of a row has a grade of its own."""
        return self.data in ("lists", "singles")


@dataclass(frozen=True)
class Example:
    """One prompt with K completions before tokenization, the best first.

    `kind` is "text" (str), "chat" (lists of messages) or "ids" (lists of int) and holds for prompt and completions.
    `fields` are the names of the completions in messages, `grades` one number each (higher is better) for lists and
    singles. `continues` says that the completions go on with the prompt's last message instead of starting a new one.
    `images` are those of the prompt (`images.py`): their files, and once they are opened their sizes.
    """

    kind: str
    prompt: Any
    completions: list[Any]
    fields: tuple[str, ...]
    grades: list[float] | None = None
    tools: list[Values] | None = None
    template_kwargs: Values = field(default_factory=dict)
    continues: bool = False
    images: Sequence[Any] = ()


@dataclass(frozen=True)
class Encoded:
    """Token ids of one row, and how much truncation took of them."""

    prompt_ids: list[int]
    completion_ids: list[list[int]]
    resplits: int = 0  # completions that were tokenized apart from their prompt
    steps: list[list[int]] = field(default_factory=list)  # of trajectories, one for each completion token
    images: str = ""  # name of the prompt's images
    prompt_cut: int = 0  # tokens
    completions_cut: int = 0  # completions
    ends_lost: int = 0  # completions


@dataclass(frozen=True)
class RowFormat:
    """A way to write preference rows. `register` adds one; `parse.py` makes those that the tables above list."""

    name: str  # what the summary calls it
    kind: str  # what its examples hold: "text", "chat" or "ids" (see `Example`)
    columns: tuple[str, ...]  # those that `read` reads; the summary names the others as unused
    # One row to an `Example` of this kind, or to the name of the reason (of `REASONS`) why it can't teach anything; or
    # to a list of these, where a row has several completions that nobody judged. Raises `RowProblem(field, problem,
    # remedy)` for a malformed row.
    read: Callable[[Row], "Example | str | list[Example | str]"]
    # Whether a dataset with these columns and this first row is of this format.
    detect: Callable[[set[str], Row], bool] = lambda columns, first: False
    prepare: Callable[[Row], Row] = dict  # is done with a row before `read` and the labels of a pair read it
    as_chat: bool | None = None  # whether `prepare` makes turns of plain text; None: there is none


REGISTERED: dict[str, RowFormat] = {}


def register(row_format: RowFormat) -> None:
    """Adds a format for rows, or replaces the one of that name. It is asked before the package's own formats."""
    REGISTERED[row_format.name] = row_format


@dataclass(frozen=True)
class Layout:
    """How a dataset gives its prompts (first table above) and what is known of its completions (second table)."""

    prompt: str
    columns: tuple[str, ...]  # that hold completions
    judged: str = "pair"

    @cached_property
    def name(self) -> str:
        """Returns what the summary calls it."""
        return self.prompt if self.judged in ("pair", "several") else f"{self.prompt}_{self.judged}"

    @cached_property
    def kind(self) -> str:
        """Returns what its examples hold: "text", "chat" or "ids"."""
        return self.prompt.partition("_")[0].replace("transcript", "text")

    @cached_property
    def implicit(self) -> bool:
        """Says whether the prompt is the start of the completions, not a column."""
        return self.prompt not in ("text", "chat", "ids")

    @property
    def used_columns(self) -> tuple[str, ...]:
        """Returns the columns that rows are read from, labels of a pair apart."""
        prompt = () if self.implicit else ("prompt_ids" if self.kind == "ids" else "prompt",)
        judgments = {"ranked": GRADE_COLUMNS, "label": ("label",)}.get(self.judged, ())
        return (*prompt, *self.columns, *judgments, *(CHAT_COLUMNS if self.kind == "chat" else ()))


def find_completions(have: set[str], first: Row, lists: bool = False) -> tuple[tuple[str, ...], str]:
    """Returns the columns that hold completions, and what is known of these. `lists` prefers ranked ones to a pair."""
    paired = {"chosen", "rejected"} <= have or {"chosen_ids", "rejected_ids"} <= have
    graded = bool(have.intersection(GRADE_COLUMNS))
    for column in ("completions", "completions_ids", "completion", "completion_ids", "messages"):
        listed = column.startswith("completions")
        if column in have and (not paired or lists and listed and graded):
            judged = ("ranked" if graded else "") if listed else ("label" if "label" in have else "")
            return (column,), judged or "unlabeled"
    end = "_ids" if have & {"prompt_ids", "chosen_ids", "rejected_ids"} and not {"chosen", "rejected"} <= have else ""
    chosen, rejected = f"chosen{end}", f"rejected{end}"
    found = first.get(rejected)
    several = isinstance(found, list) and found and isinstance(found[0], str | list)
    return (chosen, rejected), "several" if several else "pair"


def data_of(columns: Collection[str], first: Row) -> str:
    """Returns the kind of data that rows with these columns and this first row are scored as."""
    return SUITS[find_completions(set(columns), first)[1]][0]


def detect_layout(name: str, columns: Collection[str], first: Row, wanted: Wanted) -> Layout:
    """Returns the format of dataset `name` from its columns and its first row.

    Raises `DataError` when there is none, or none that the objective can learn from.
    """
    have, data = set(columns), wanted.data
    _check_images(name, have, wanted)
    given, judged = find_completions(have, first, data == "lists")
    if data == "lists" and given[0].startswith("completions"):
        if len(have.intersection(GRADE_COLUMNS)) != 1:
            count = "there is neither" if judged == "unlabeled" else "both are there"
            raise DataError(
                f"{name}: {given[0]!r} needs one of 'ranks' (lower is better) and 'scores' (higher is better), and "
                f"{count}. Add or remove a column, e.g. dataset.remove_columns('ranks')."
            )
    elif data not in SUITS[judged]:
        _refuse_unsuited(name, have, given, judged, data)
    for column in LABEL_COLUMNS:
        if column in have and (wanted.graded or column not in wanted.label_columns):
            raise DataError(
                f"{name}: column {column!r} would have no effect with this loss_type. Put it away: --column_map "
                f"{column}:unused_{column} on the command line, dataset.remove_columns({column!r}) in Python; or "
                "choose a loss_type that reads it."
            )
    judged = "unlabeled" if data == "unlabeled" else judged
    ids = given[0].endswith("_ids")
    _need(name, have, ("prompt_ids", *given) if ids else given, data)
    if ids or given == ("messages",):
        return Layout("ids" if ids else "chat_implicit", given, judged)
    alone, found = judged in ("label", "unlabeled"), _one_each(first, given, wanted.graded)
    prompt = _detect_prompt(name, have, first, found, alone)
    if prompt == "transcript" and data == "trajectories":
        raise DataError(
            f"{name}: raw HH transcripts hold their turns as one text. Convert them first: "
            "--dataset_format hh on the command line, dataset.map(dpo_peft.data.from_hh) in Python."
        )
    return Layout(prompt, given, judged)


def _check_images(name: str, have: set[str], wanted: Wanted) -> None:
    """Refuses images where no processor is there to read them, before anything else is said."""
    found = sorted(have & IMAGE_COLUMNS)
    if found and not wanted.images:
        raise DataError(
            f"{name}: column {found[0]!r} holds images, and there is no processor to read them. Take a model of text "
            "and images and leave processing_class out, or pass its AutoProcessor. If the text alone is meant: "
            f"dataset.remove_columns({found!r})."
        )
    if len(found) > 1:
        raise DataError(f"{name}: there is a column 'image' and one 'images': dataset.remove_columns('image').")


def _refuse_unsuited(name: str, have: set[str], given: tuple[str, ...], judged: str, data: str) -> None:
    """Says what the rows are for, as they are not for `data`."""
    end = "_ids" if given[0].endswith("_ids") else ""
    if data == "unlabeled":
        return _need(name, have, (f"completion{end}",), data)
    if given[0].startswith("completions"):
        needs = f"{given[0]!r} (ranked or scored lists) needs {LISTS}"
    elif judged == "several":
        needs = f"{given[1]!r} as a list of completions needs {LISTS}"
    elif judged == "label":
        needs = f"'label' (one judged completion per row) needs {SINGLES}"
    elif data == "singles":
        needs = "a judged completion needs a 'label' column (True for desirable)"
    else:
        return _need(name, have, (f"chosen{end}", f"rejected{end}"), data)
    option = (
        "Give --loss_type kto. " if SINGLES in needs else "Give --loss_type plackett_luce. " if LISTS in needs else ""
    )
    raise DataError(f"{name}: {needs}. {option}The objective that was chosen learns from {data}: {ACCEPTED[data]}.")


def _need(name: str, have: set[str], wanted: tuple[str, ...], data: str) -> None:
    missing = [column for column in wanted if column not in have]
    if missing:
        raise DataError(
            f"{name}: column {', '.join(map(repr, missing))} is missing; the columns are {sorted(have)}. Accepted: "
            f"{ACCEPTED[data]}. {name_them(have, wanted)}"
        )


# Names that others give to what is called so here, for messages.
_ALIKE = {
    "prompt": ("question", "query", "instruction", "input", "user", "user_message", "ask", "text", "problem"),
    "chosen": ("good", "better", "preferred", "accepted", "positive", "win", "winner", "best", "response_chosen"),
    "rejected": ("bad", "worse", "dispreferred", "negative", "lose", "loser", "worst", "response_rejected"),
    "completion": ("answer", "response", "output", "reply", "generation"),
    "label": ("thumb", "thumbs", "feedback", "vote", "desirable", "liked"),
}


def name_them(have: set[str], wanted: Collection[str]) -> str:
    """Returns the sentence that says how columns of other names are read: those that look alike, others to fill in."""
    pairs = {}
    for column in ["prompt", *wanted] if "prompt_ids" not in wanted and wanted != ("messages",) else wanted:
        if column not in have:
            alike = (name for name in _ALIKE.get(column, ()) if name in have and name not in pairs)
            pairs[next(alike, f"YOUR_{column.upper()}")] = column
    return f"If yours have other names: {renaming(pairs)}."


def renaming(names: Mapping[str, str]) -> str:
    """Returns how columns are renamed: on the command line, and in Python."""
    words = " ".join(f"{old}:{new}" for old, new in names.items())
    return f"--column_map {words} on the command line, dataset.rename_columns({dict(names)}) in Python"


def _one_each(first: Row, given: tuple[str, ...], graded: bool) -> Values:
    """Returns one completion of the first row for each column that holds some; None where there is none."""
    found = {column: first.get(column) for column in given}
    for column, value in found.items():
        rejected = graded and column == "rejected" and is_several(value, kind_of(found["chosen"]))
        if rejected or column == "completions":
            found[column] = value[0] if isinstance(value, list) and value else None
    return found


def _detect_prompt(name: str, have: set[str], first: Row, found: Values, alone: bool) -> str:
    """Returns how the rows give their prompt; `found` holds one completion by column. Odd ones are left to the reader.

    `alone`: completions stand on their own, so there is nothing that shows where their prompt ends.
    """
    prompt = kind_of(first.get("prompt")) if "prompt" in have else None
    kinds, columns = [kind_of(value) for value in found.values()], " and ".join(map(repr, found))
    if {"text", "list"} <= set(kinds):
        raise DataError(
            f"{name}: 'chosen' is {kinds[0]} but 'rejected' is {kinds[-1]}. Give both as text or both as lists of "
            "messages."
        )
    if "text" in kinds or "list" not in kinds and prompt != "list":
        if prompt == "list":
            raise DataError(
                f"{name}: 'prompt' is a list of messages but {columns} hold text. Make the completions "
                'messages too: [{"role": "assistant", "content": text}].'
            )
        if prompt:
            return "text"
        if questions := [column for column in _ALIKE["prompt"] if column in have]:
            raise DataError(
                f"{name}: no 'prompt' column, but {', '.join(map(repr, questions))} looks like one. If it is: "
                f"{renaming({questions[0]: 'prompt'})}."
            )
        if alone:
            raise DataError(
                f"{name}: no 'prompt' column. Add it: one completion alone doesn't show where its prompt ends."
            )
        return "transcript" if all(str(text).startswith(HUMAN) for text in found.values()) else "text_implicit"
    if prompt == "list":
        return "chat"
    # Some public sets repeat the question as text beside two whole conversations.
    turns = next(turns for turns in found.values() if isinstance(turns, list))
    whole = first_message(turns).get("role") in ASKING_ROLES
    if not alone and (prompt is None or whole):
        return "chat_implicit"
    shown = f"'prompt' is {prompt}" if prompt else "there is no 'prompt'"
    raise DataError(
        f"{name}: {shown} but {columns} hold lists of messages. Make the prompt a list of messages too: "
        '[{"role": "user", "content": text}].'
    )


def is_several(value: object, kind: str) -> bool:
    """Says whether `value` holds a list of completions where one is possible; `kind` says what a completion is."""
    return isinstance(value, list) and (kind == "text" or not value or isinstance(value[0], list))


def kind_of(value: object) -> str:
    if isinstance(value, str):
        return "text"
    return "list" if isinstance(value, list) else type(value).__name__
