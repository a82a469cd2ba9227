"""The tokenizer of a GGUF file: the token ids that llama.cpp makes of a text.

A model's own tokenizer may differ in details, such as combining marks in Tekken's. What llama.cpp does was read off
its `llama-vocab.cpp` in autumn 2026.
"""

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

from ..errors import OptionError

_FILES = (
    "Put the tokenizer's files (tokenizer.json, tokenizer_config.json) of the model that it was made from beside it."
)
_PLAIN = ("<unk>", "<s>", "<|endoftext|>")  # of Phi-3's: they leave the spaces behind them
_UNKNOWN, _CONTROL, _USER = 2, 3, 4  # types of tokens that are looked for before text is split

# How text is split before pieces are merged into tokens.
_ENDS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_WORD, _SPACES = r"[^\r\n\p{L}\p{N}]?\p{L}+", r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*" + _SPACES
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_UPPER, _LOWER = r"[^\r\n\p{L}\p{N}]?(?:(?=\p{L})[^a-z])", r"(?:(?=\p{L})[^A-Z])"
_PATHS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*" + _SPACES
_SPLITS = {
    ("gpt-2", "olmo", "exaone4"): [_GPT2],
    ("smollm", "starcoder", "refact", "command-r", "exaone"): [r"\p{N}", _GPT2],
    (
        "llama3",
        "llama-v3",
        "llama-bpe",
        "falcon3",
        "pixtral",
        "midm-2.0",
        "dbrx",
        "smaug-bpe",
        "glm4",
        "chatglm-bpe",
    ): [rf"{_ENDS}|{_WORD}|\p{{N}}{{1,3}}|{_REST}"],
    ("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2", "kormo", "f2llmv2"): [rf"{_ENDS}|{_WORD}|\p{{N}}|{_REST}"],
    ("tekken",): [rf"{_UPPER}*{_LOWER}+|{_UPPER}+{_LOWER}*|\p{{N}}|{_PATHS}"],
    ("gpt-4o", "llama4", "kanana2"): [
        rf"{_UPPER}*{_LOWER}+{_ENDS}?|{_UPPER}+{_LOWER}*{_ENDS}?|\p{{N}}{{1,3}}|{_PATHS}"
    ],
    ("seed-coder",): [rf"{_ENDS}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+{_SPACES}"],
}
# Those that take a piece that is a token without merging, and begin with the bos token unless the file tells.
_WHOLE = ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "midm-2.0", "tekken")


def gguf_tokenizer(name: str, path: str) -> PreTrainedTokenizerFast:
    """Returns the tokenizer of a file, with its chat template, if it has one.

    Raises:
        OptionError: how it makes tokens of text is not known here.
    """
    from transformers.integrations.gguf.reader import read_gguf_metadata

    metadata, _ = read_gguf_metadata(path, ("tokenizer.ggml.tokens", "tokenizer.ggml.merges"))
    its = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    kind, split = its["model"], its.get("pre", "gpt-2")
    regexes = next((found for names, found in _SPLITS.items() if split in names), None)
    if kind == "gpt2" and regexes is None:
        raise OptionError(f"model={name!r}: how its tokenizer splits text ({split}) is not known. {_FILES}")
    if kind not in ("gpt2", "llama"):
        raise OptionError(f"model={name!r}: its kind of tokenizer ({kind}) is not known. {_FILES}")
    tokens: list[str] = its["tokens"]
    if regexes is not None and kind == "gpt2":
        backend = _byte_level(tokens, its["merges"], regexes, split in _WHOLE)
    else:
        backend = _sentencepiece(tokens, its["scores"], its.get("add_space_prefix", True))
    phi3 = any(part in metadata.get("general.name", "").lower() for part in ("phi-3", "phi3"))
    backend.add_tokens(
        [
            AddedToken(token, special=sort != _USER, normalized=False, rstrip=phi3 and token not in _PLAIN)
            for token, sort in zip(tokens, its["token_type"], strict=True)
            if sort in (_UNKNOWN, _CONTROL, _USER)
        ]
    )
    named = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {f"{key}_token": its.get(f"{other}_token_id") for key, other in named.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        add_bos_token=its.get("add_bos_token", kind == "llama" or split in _WHOLE),
        add_eos_token=its.get("add_eos_token", False),
        chat_template=metadata.get("tokenizer.chat_template"),
        **{key: None if at is None else tokens[at] for key, at in ids.items()},
    )


def _byte_level(tokens: list[str], merges: list[str], regexes: list[str], whole: bool) -> Tokenizer:
    vocab, pairs = {token: at for at, token in enumerate(tokens)}, (merge.split(" ") for merge in merges)
    backend: Any = Tokenizer(models.BPE(vocab, [(left, right) for left, right in pairs], ignore_merges=whole))
    steps: list[Any] = [pre_tokenizers.Split(Regex(regex), "isolated") for regex in regexes]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(tokens: list[str], scores: list[float], prefix: bool) -> Tokenizer:
    """A space comes before the text and after each special token, if `prefix`."""
    vocab = {token: at for at, token in enumerate(tokens)}
    merges = generate_merges(vocab, dict(zip(tokens, scores, strict=True)))
    backend: Any = Tokenizer(models.BPE(vocab, merges, byte_fallback=True))
    first = [normalizers.Prepend("\u2581")] if prefix else []
    backend.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", "\u2581")])
    last = [decoders.Strip(" ", 1, 0)] if prefix else []
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *last]
    backend.decoder = decoders.Sequence(steps)
    return backend
