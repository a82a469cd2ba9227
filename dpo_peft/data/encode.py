"""Examples to token ids: the one way for training rows, prompts to sample from and completions to score."""

from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from ..errors import DataError
from .chat import Chat
from .fields import RowProblem, read_text
from .formats import Encoded, Example
from .images import Images
from .summary import explain
from .tokenize import PAIR, Borders, check_tokenizer, encode_text, leading_ids, text_prompt_ids
from .truncate import check_truncation, fit

IGNORE = -100  # label of positions that carry no loss


class Encoder:
    """Turns examples of one kind ("text", "chat" or "ids") into token ids. `ends`: whether completions of text are to
    be encoded, which end with the tokenizer's end token.

    Raises `OptionError` for what is no tokenizer, `DataError` for one without an end token or a chat template.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, name: str, kind: str, ends: bool = True, images: Images | None = None
    ):
        check_tokenizer(tokenizer, need_eos=ends and kind == "text")
        if kind == "chat" and not tokenizer.chat_template:
            raise DataError(
                f"{name}: the rows are conversations, but the tokenizer has no chat template. Set "
                "tokenizer.chat_template, take an instruction-tuned model's tokenizer, or give the rows as text."
            )
        self.tokenizer, self.borders, self.images = tokenizer, Borders(tokenizer), images
        self.leading = leading_ids(tokenizer) if kind == "text" else []

    def chat(self, example: Example) -> Chat:
        """Returns the conversations of an example, to be rendered."""
        return Chat(self.tokenizer, example, self.borders, self.images)

    def prompt(self, example: Example) -> list[int]:
        """Returns the ids up to where the model begins to write. Raises `RowProblem` when there are none."""
        if example.kind == "chat":
            return self.chat(example).prompt_ids()
        if example.kind == "text":
            text = self.images.expand(example.prompt, example.images) if self.images else example.prompt
            return text_prompt_ids(self.tokenizer, text, self.leading)
        ids: list[int] = example.prompt
        return ids

    def __call__(self, example: Example) -> Encoded | str:
        """Returns the ids of prompt and completions, or the reason why a completion is empty. Raises `RowProblem` when
        the template refuses the row, or the prompt's ids are not the start of the whole."""
        if example.kind == "chat":
            return self.chat(example).encode()
        if example.kind == "text":
            if self.images is not None:
                example = replace(example, prompt=self.images.expand(example.prompt, example.images))
            return encode_text(self.tokenizer, example, self.leading)
        return Encoded(example.prompt, example.completions)


def preprocess_dpo_sample(
    tokenizer: PreTrainedTokenizerBase, prompt: str, chosen: str, rejected: str, max_length: int = 512
) -> dict[str, list[int]]:
    """Returns one sample as padded-batch trainers want it: [BOS] + prompt + response + [EOS] twice.

    The package's own training goes through `prepare_dataset`. Unlike the listing: BOS stands where the tokenizer
    itself puts one, and once; EOS stands once; and what is too long loses the start of its prompt, the same for both
    responses, never the response or its EOS.

    Args:
        tokenizer: Must have an end token.
        prompt, chosen, rejected: Text.
        max_length: Most tokens of prompt + response.

    Returns:
        `{chosen,rejected}_input_ids`, `…_attention_mask` (all ones) and `…_labels` (ids, with -100 on the prompt).

    Raises:
        DataError: a value is no text, a response is empty, or one does not fit beside one prompt token.
        OptionError: `max_length` is no integer of at least 2.
    """
    check_truncation(max_length, "trim_prompt")
    encode = Encoder(tokenizer, "sample", "text")
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    try:
        text, *completions = (read_text(row, column) for column in row)
        encoded = encode(Example("text", text, completions, PAIR))
    except RowProblem as problem:
        raise problem.located("sample", 0) from None
    fitted = encoded if isinstance(encoded, str) else fit(encoded, max_length, "trim_prompt")
    if isinstance(fitted, str):
        raise DataError(f"sample: {explain(fitted)}.")
    prompt_ids, sample = fitted.prompt_ids, dict[str, list[int]]()
    for side, ids in zip(PAIR, fitted.completion_ids, strict=True):
        sample[f"{side}_input_ids"] = prompt_ids + ids
        sample[f"{side}_attention_mask"] = [1] * len(prompt_ids + ids)
        sample[f"{side}_labels"] = [IGNORE] * len(prompt_ids) + ids
    return sample
