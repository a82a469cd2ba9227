"""One date for all rows of a run, where the chat template writes today's (Llama 3.2, gpt-oss).

The first use of a tokenizer fixes the date. It is kept with the tokenizer and saved with it, so that an adapter's own
tokenizer scores under the date of its training, and a cache of rows is that of one date.
"""

import json
from collections.abc import Callable
from datetime import date
from pathlib import Path

from transformers import PreTrainedTokenizerBase

KEY = "chat_template_date"  # in the tokenizer's options, and so in tokenizer_config.json
CLOCK = "strftime_now"  # the function that templates call


def template_date(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Returns the date (ISO) that this tokenizer's template writes; None for a template that reads no clock."""
    if CLOCK not in str(tokenizer.chat_template):
        return None
    return str(tokenizer.init_kwargs.setdefault(KEY, date.today().isoformat()))


def template_clock(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], str] | None:
    """Returns what the template is to call as `strftime_now`: its date in any format; None for one without a clock."""
    day = template_date(tokenizer)
    return None if day is None else date.fromisoformat(day).strftime


def keep_date(tokenizer: PreTrainedTokenizerBase, output_dir: str, checkpoint: str | bool | None) -> None:
    """Takes over the date of a run that is resumed: of its checkpoint, or of those in its folder. A damaged file is
    passed over: whether a checkpoint is whole is asked where the run is resumed."""
    if CLOCK not in str(tokenizer.chat_template):
        return
    named = [Path(checkpoint)] if isinstance(checkpoint, str) else []
    for folder in [*named, *sorted(Path(output_dir).glob("checkpoint-*"))]:
        config = folder / "tokenizer_config.json"
        if KEY in tokenizer.init_kwargs or not config.is_file():
            continue
        try:
            day = date.fromisoformat(json.loads(config.read_text("utf-8"))[KEY])
        except (ValueError, KeyError, TypeError):
            continue
        tokenizer.init_kwargs[KEY] = day.isoformat()
