"""Names for cached results: a digest of everything that decides them."""

import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedTokenizerBase

from .clock import template_date


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns a digest of what decides a tokenizer's ids: vocabulary, rules, special tokens, chat template, date."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        tokenizer("a", padding=False, truncation=False)  # leaves no trace of an earlier call's padding or truncation
        files = [backend.to_str()]
    else:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            files = [path.read_bytes().hex() for path in sorted(Path(folder).rglob("*")) if path.is_file()]
    switches = [str(getattr(tokenizer, name, None)) for name in ("split_special_tokens", "add_prefix_space")]
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    template = [tokenizer.chat_template, template_date(tokenizer)]
    return digest([type(tokenizer).__name__, files, special, template, switches, transformers.__version__])


def rows_digest(dataset: Any, samples: int = 256) -> str:
    """Returns a digest of a prepared dataset: its length, and rows spread evenly over it. A stream has none."""
    if not hasattr(dataset, "__len__"):
        return "stream"
    number = len(dataset)
    spread = sorted({i * number // samples for i in range(samples)}) if number else []
    return f"{number} rows, {digest([dataset[i] for i in spread])}"


def digest(content: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
