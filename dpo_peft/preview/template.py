"""The chat template of a tokenizer: which one it is, what it adds to a conversation, and what ends a completion."""

import re
from collections.abc import Sequence

from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..data.chat import Chat
from ..data.clock import template_date
from ..data.fields import Messages, RowProblem
from ..data.formats import Example
from ..data.tokenize import special_tokens

# A text that only one family of templates writes -> how that family is called. The first that is found counts.
FAMILIES = {
    "<|im_start|>": "chatml",
    "<|start_header_id|>": "llama-3",
    "<|header_start|>": "llama-4",
    "<start_of_turn>": "gemma",
    "<|turn>": "gemma-4",
    "<|start|>": "harmony",
    "<｜User｜>": "deepseek",
    "<|START_OF_TURN_TOKEN|>": "command-r",
    "<|start_of_role|>": "granite",
    "[INST]": "mistral, llama-2",
    "<|user|>": "phi-3, zephyr, glm-4",
    "### Instruction": "alpaca",
    "\n\nHuman:": "hh transcripts",
}
MARKS = "(mark 1)", "(mark 2)"


def family_of(text: str) -> str:
    """Returns the family of a chat template, or of a text that one has rendered; "" if none is known."""
    return next((name for sign, name in FAMILIES.items() if sign in text), "")


def default_system(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the system prompt that the template writes where a conversation has none; "" if it writes none."""

    def before_user(*system: str) -> str:
        messages: Messages = [{"role": "system", "content": text} for text in system]
        chat = Chat(tokenizer, Example("chat", [*messages, {"role": "user", "content": MARKS[0]}], [], ()))
        return chat.prompt_text.partition(MARKS[0])[0]

    try:
        alone, given = before_user(), before_user(MARKS[1])
    except RowProblem:  # a template may refuse system turns
        return ""
    behind = given.partition(MARKS[1])[2]  # how a system turn ends, and a user's begins
    shared = next((size for size in range(len(behind), 0, -1) if alone.endswith(behind[-size:])), 0)
    text = alone[: len(alone) - shared]
    for token in special_tokens(tokenizer):
        text = text.replace(token, "\n")
    return re.sub(r"\A\s*(system|developer|user)\b", "", text).strip()


def stop_tokens(model: str, tokenizer: PreTrainedTokenizerBase, revision: str | None = None) -> list[int]:
    """Returns the tokens at which generation stops: the tokenizer's end token, and those of the model's
    `generation_config.json` where there is one. Loads no weights."""
    try:
        found = GenerationConfig.from_pretrained(model, revision=revision).eos_token_id
    except (OSError, ValueError):
        found = None
    several = found if isinstance(found, list) else [found]
    return list(dict.fromkeys(token for token in [tokenizer.eos_token_id, *several] if token is not None))


def describe_template(tokenizer: PreTrainedTokenizerBase, stops: Sequence[int]) -> dict[str, object]:
    """Returns what is to be known of a tokenizer's template: `family` (None without a template), `default_system`,
    `date` (that it writes, ISO) and `stops` (token texts)."""
    template = tokenizer.chat_template
    return {
        "family": (family_of(str(template)) or "unknown") if template else None,
        "default_system": default_system(tokenizer) if template else "",
        "date": template_date(tokenizer),
        "stops": tokenizer.convert_ids_to_tokens(stops),
    }
