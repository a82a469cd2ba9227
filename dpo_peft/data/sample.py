"""One preference sample as padded-batch trainers want it: ids, attention mask, labels (the note's listing 3).

The package's own training goes through `prepare_dataset`; this is the same tokenisation for a single text sample.
"""

from transformers import PreTrainedTokenizerBase

from ..errors import DataError
from .fields import RowProblem, read_text
from .summary import REASONS
from .tokenize import PAIR, check_tokenizer, encode_text, leading_ids
from .truncate import check_truncation, fit

IGNORE = -100  # label of positions that carry no loss


def preprocess_dpo_sample(
    tokenizer: PreTrainedTokenizerBase, prompt: str, chosen: str, rejected: str, max_length: int = 512
) -> dict[str, list[int]]:
    """[BOS] + prompt + response + [EOS] for both responses (note listing 3).

    Unlike the listing: BOS stands where the tokenizer itself puts one, and once; EOS stands once; and what is too
    long loses the start of its prompt, the same for both responses, never the response or its EOS.

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
    check_tokenizer(tokenizer, need_eos=True)
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    try:
        prompt, *completions = (read_text(row, column) for column in row)
        encoded = encode_text(tokenizer, prompt, completions, leading_ids(tokenizer))
    except RowProblem as problem:
        raise problem.located("sample", 0) from None
    fitted = (
        encoded
        if isinstance(encoded, str)
        else fit(encoded.prompt_ids, encoded.completion_ids, max_length, "trim_prompt")
    )
    if isinstance(fitted, str):
        meaning, remedy = REASONS[fitted]
        raise DataError(f"sample: {fitted}: {meaning}. Remedy: {remedy}.")
    sample: dict[str, list[int]] = {}
    for side, ids in zip(PAIR, fitted.completion_ids, strict=True):
        sample[f"{side}_input_ids"] = fitted.prompt_ids + ids
        sample[f"{side}_attention_mask"] = [1] * (len(fitted.prompt_ids) + len(ids))
        sample[f"{side}_labels"] = [IGNORE] * len(fitted.prompt_ids) + ids
    return sample
