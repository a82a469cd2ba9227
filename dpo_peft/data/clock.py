"""One date for all rows of a run, where the chat template writes today's (Llama 3.2, gpt-oss).

The first use of a tokenizer fixes the date. It is kept with the tokenizer and saved with it, so that an adapter's own
tokenizer scores under the date of its training, and a cache of rows is that of one date.
"""

import json
import re
from datetime import date
from functools import lru_cache
from pathlib import Path

from transformers import PreTrainedTokenizerBase

KEY = "chat_template_date"  # in the tokenizer's options, and so in tokenizer_config.json
CLOCK = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


def template_date(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Returns the date (ISO) that this tokenizer's template writes; None for a template that reads no clock."""
    if not CLOCK.search(str(tokenizer.chat_template)):
        return None
    return str(tokenizer.init_kwargs.setdefault(KEY, date.today().isoformat()))


def dated_template(tokenizer: PreTrainedTokenizerBase, tools: list[dict[str, object]] | None) -> str | None:
    """Returns the template with its date in place of the clock's; None for one that reads no clock."""
    day = template_date(tokenizer)
    return None if day is None else _with_date(tokenizer.get_chat_template(tools=tools), day)


@lru_cache(maxsize=8)
def _with_date(template: str, day: str) -> str:
    return CLOCK.sub(lambda call: json.dumps(date.fromisoformat(day).strftime(call[2])), template)


def keep_date(tokenizer: PreTrainedTokenizerBase, output_dir: str, checkpoint: str | bool | None) -> None:
    """Takes over the date of a run that is resumed: of its checkpoint, or of those in its folder. A damaged file is
    passed over: whether a checkpoint is whole is asked where the run is resumed."""
    if not CLOCK.search(str(tokenizer.chat_template)):
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
