"""Text to token ids, with the border between prompt and completion where a generating model meets it.

The prompt's ids are what a user feeds when generating, so they must be an exact prefix of the training sequence.
Prompt and completion are tokenized jointly first. When a token would cross the border, the completion is tokenized on
its own, and that is accepted only if it decodes to the same text.
"""

from collections.abc import Callable
from functools import cache, partial

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..errors import DataError, OptionError
from .fields import RowProblem
from .formats import Encoded, Example
from .parse import common_start
from .summary import EMPTY_COMPLETION

# Leading characters that keep a tokenizer from adding a blank before a text that continues another one.
ANCHORS = ("", "\n", "a")
PAIR = ("chosen", "rejected")
NEAR_END = 200  # characters in which the last border of a text is looked for
TEXT_REMEDY = "end the prompt, or begin the completions, with a blank or a line break"


def check_tokenizer(tokenizer: object, need_eos: bool) -> None:
    """Raises `OptionError` for something that is no tokenizer, `DataError` for one without an end token."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        inner = getattr(tokenizer, "tokenizer", None)
        hint = " Pass processor.tokenizer, and the processor as images=Images(processor)." if inner else ""
        raise OptionError(f"the tokenizer must be a transformers tokenizer, found {type(tokenizer).__name__}.{hint}")
    if need_eos and tokenizer.eos_token_id is None:
        raise DataError(
            "the tokenizer has no end token, so a model trained on text rows would never stop. Set it first, e.g. "
            "tokenizer.eos_token = '<|endoftext|>' (a token of its vocabulary), or use pre-tokenized rows."
        )


def plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Returns the ids of `text` without the tokenizer's special tokens, never truncated."""
    if _calls_library(type(tokenizer)):  # type: ignore[arg-type]  # of mypy: a type is hashable
        backend = tokenizer.backend_tokenizer
        settings = backend.truncation, backend.padding, backend.encode_special_tokens
        if settings == (None, None, tokenizer.split_special_tokens):  # else the call below puts them right
            return list(backend.encode_batch([text], add_special_tokens=False)[0].ids)
    encoded = tokenizer(text, add_special_tokens=False, padding=False, truncation=False, verbose=False)
    return list(encoded["input_ids"])


@cache
def _calls_library(kind: type[PreTrainedTokenizerBase]) -> bool:
    """Says whether a tokenizer's call does no more than call the tokenizers library, which takes half as long."""
    made_by = PreTrainedTokenizerBase.__call__, PreTrainedTokenizerFast._encode_plus
    return issubclass(kind, PreTrainedTokenizerFast) and (kind.__call__, kind._encode_plus) == made_by


class Borders:
    """The special tokens in front of which a text can be cut: the ids of both parts are those of the whole.

    So what a prompt and the conversations behind it have in common is tokenized once. A tokenizer of the tokenizers
    library cuts texts there itself, before anything else; others have no borders.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer, self.sure = tokenizer, dict[str, bool]()
        rendered = type(tokenizer).apply_chat_template is PreTrainedTokenizerBase.apply_chat_template
        cuts = tokenizer.is_fast and rendered and not getattr(tokenizer, "split_special_tokens", False)
        self.added = list(tokenizer.added_tokens_decoder.values()) if cuts else []
        plain = (token for token in self.added if token.special and not token.normalized)
        self.tokens = [token.content for token in plain if not (token.lstrip or token.single_word)]

    def last(self, text: str) -> tuple[int, str]:
        """Returns where the last border near the end of a text is, and its token; (0, "") if there is none."""
        near = max(0, len(text) - NEAR_END)
        at, token = max(((text.rfind(token, near), token) for token in self.tokens), default=(0, ""))
        if at > 0 and token not in self.sure:
            self.sure[token] = self._is_border(token)
        return (at, token) if at > 0 and self.sure[token] else (0, "")

    def _is_border(self, token: str) -> bool:
        """Says whether no other token reaches into this one, and ids are the same on a text with all kinds of ends."""
        starts = [token[:size] for size in range(1, len(token))]
        others = [other.content for other in self.added if other.content != token]
        if any(token in other[1:] or other.endswith(start) for other in others for start in starts):
            return False
        texts = (f"{before}{token}{after}" for before in ("a", " a\n\n", "7 ") for after in ("b", " b", "\n\n7"))
        ids = partial(plain_ids, self.tokenizer)
        return all(ids(t) == ids(t[: (at := t.index(token))]) + ids(t[at:]) for t in texts)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Returns the texts that become special tokens wherever they stand."""
    if getattr(tokenizer, "split_special_tokens", False):
        return []
    added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    return [token for token in dict.fromkeys([*tokenizer.all_special_tokens, *added]) if token.strip()]


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the special tokens, usually BOS or none, that this tokenizer puts before a text by itself."""
    plain = plain_ids(tokenizer, "a")
    full = list(tokenizer("a", padding=False, truncation=False, verbose=False)["input_ids"])
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start]
    raise DataError(
        f"the tokenizer's special tokens change the text itself ({full} against {plain}). Give pre-tokenized rows "
        "(prompt_ids, chosen_ids, rejected_ids)."
    )


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str, leading: list[int]) -> list[int]:
    """Returns the ids of a text that starts a sequence: leading special tokens once, even if the text spells them."""
    ids = plain_ids(tokenizer, text)
    return ids if leading and ids[: len(leading)] == leading else leading + ids


def text_prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, leading: list[int]) -> list[int]:
    """Returns [BOS] + prompt; `RowProblem` when that is nothing."""
    ids = text_ids(tokenizer, prompt, leading)
    if not ids:
        raise RowProblem(
            "prompt", "is empty and the tokenizer puts no BOS before it", "give a prompt of at least one token"
        )
    return ids


def encode_text(tokenizer: PreTrainedTokenizerBase, example: Example, leading: list[int]) -> Encoded | str:
    """Returns [BOS] + prompt, and each completion with one end token; or the reason why a completion is empty."""
    prompt_ids = text_prompt_ids(tokenizer, example.prompt, leading)
    completion_ids, resplits = [], 0
    for field, text in zip(example.fields, example.completions, strict=True):
        body = without_eos(tokenizer, text)
        if not body.strip():
            return EMPTY_COMPLETION
        joint = text_ids(tokenizer, example.prompt + body, leading)
        ids, apart = ids_behind(tokenizer, prompt_ids, joint, partial(str, body), field, TEXT_REMEDY)
        completion_ids.append([*ids, tokenizer.eos_token_id])
        resplits += apart
    return Encoded(prompt_ids, completion_ids, resplits)


def without_eos(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Returns `text` without end tokens at its end, also when blanks follow them."""
    eos = tokenizer.eos_token
    while text.rstrip().endswith(eos):
        text = text.rstrip()[: -len(eos)]
    return text


def split_at_border(
    tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int], joint_ids: list[int], completion: str
) -> list[int] | None:
    """Returns ids of the completion such that prompt_ids + ids reads as joint_ids does; None if there are none."""
    if joint_ids[: len(prompt_ids)] == prompt_ids:
        return joint_ids[len(prompt_ids) :]
    wanted = tokenizer.decode(joint_ids, clean_up_tokenization_spaces=False)
    for anchor in ANCHORS:
        anchor_ids = plain_ids(tokenizer, anchor) if anchor else []
        ids = plain_ids(tokenizer, anchor + completion)
        if ids[: len(anchor_ids)] != anchor_ids:
            continue
        ids = ids[len(anchor_ids) :]
        if tokenizer.decode(prompt_ids + ids, clean_up_tokenization_spaces=False) == wanted:
            return ids
    return None


def ids_behind(
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[int],
    joint_ids: list[int],
    text: Callable[[], str | None],
    field: str,
    remedy: str,
    prompt: str = "the prompt",
    joint: str = "prompt + completion",
) -> tuple[list[int], bool]:
    """Returns the ids behind the prompt's, and whether they had to be tokenized apart from it.

    `text` gives what follows the prompt, or None if the prompt is not there. Raises `RowProblem` with the place where
    the prompt alone and the prompt in front of this completion part.
    """
    if joint_ids[: len(prompt_ids)] == prompt_ids:
        return joint_ids[len(prompt_ids) :], False
    completion = text()
    ids = None if completion is None else split_at_border(tokenizer, prompt_ids, joint_ids, completion)
    if ids is not None:
        return ids, True
    at = common_start([prompt_ids, joint_ids])
    alone = tokenizer.decode(prompt_ids[at : at + 12], clean_up_tokenization_spaces=False)
    whole = tokenizer.decode(joint_ids[at : at + 12], clean_up_tokenization_spaces=False)
    raise RowProblem(
        field,
        f"{prompt}'s tokens are not the start of {joint}: from token {at} on {prompt} alone reads {alone!r}, the "
        f"whole sequence {whole!r}",
        remedy,
    )
