"""Tokenizers of GGUF files: their ids are llama.cpp's, on texts that are hard to split."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from dpo_peft.errors import OptionError
from dpo_peft.model.gguf import from_named
from dpo_peft.model.gguf_tokenizer import _SPLITS
from dpo_peft.serving.servers import llama_cpp_server

pytest.importorskip("xllamacpp")
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>"]
TYPES = [2, 3, 3, 3, 3, 3, 4]
TEXTS = [
    "In 2024, 15 films: 3.14159 1234567 007 \u0663\u0664\u0665 \u00b2\u00b3 \u00bd \u2167 1a2b3c 4 5  6 $100,000.00",
    "  several   spaces    here ",
    " leading and trailing  ",
    "a\n\nb\n\n\nc\n d\n  e\t\tf\r\ng\r\n\r\nh \t mixed \n\t x",
    "   \n  \n",
    "I'm don't WE'RE you'LL 'Tis it'\u017f o'clock \u2019s \u201cquotes\u201d it\u2019s \u2014 dash\u2026",
    "\u00dcn\u00efc\u00f6d\u00e9 na\u00efve Stra\u00dfe \u01c5ungla \u0130stanbul \ufb01ne e\u0301 combining a\u0308",
    "\u4f60\u597d\uff0c\u4e16\u754c\uff01\u3053\u3093\u306b\u3061\u306f \ud55c\uad6d\uc5b4 "
    "\u0939\u093f\u0928\u094d\u0926\u0940 \u0e44\u0e17\u0e22",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 emoji \U0001f3f3\ufe0f\u200d\U0001f308!!! \U0001f680",
    "HelloWorld camelCase XMLHttpRequest \u041f\u0440\u0438\u0432\u0435\u0442 \u041c\u0438\u0440",
    "x=1;y[2]//z/*c*/ != == -> ... ?!\n\n/path/to/file",
    "nbsp\u00a0here\u3000wide\u2028line\u200bzw \ufeffbom \x07bell",
    "a" * 50 + " " * 20 + "b",
    "def f(x):\n    return x  # ok\n\n\n",
    "<|im_start|>user\nHello <think>there</think><|im_end|>\n <|im_start|> x",
    "</s>Hi</s> there <unk>",
    "",
]


def trained(spaces: str | None) -> tuple[list[str], list[list[str]]]:
    """Returns the tokens and merges of the texts: merges go across all that could be split."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    if spaces is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(False, use_regex=False)
    else:
        tokenizer.normalizer = normalizers.Replace(" ", spaces)
    alphabet = pre_tokenizers.ByteLevel.alphabet() if spaces is None else []
    options = {"special_tokens": SPECIAL, "initial_alphabet": alphabet, "max_token_length": 12, "show_progress": False}
    tokenizer.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(vocab_size=3000, min_frequency=2, **options))
    model = json.loads(tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), model["merges"]


def written(path: Path, kind: str, tokens: list[str], **its: Any) -> str:
    """Writes a model of one layer, all zeros, with a tokenizer."""
    writer = gguf.GGUFWriter(path, "llama")
    sizes = {"context_length": 512, "block_count": 1, "embedding_length": 32, "feed_forward_length": 32}
    heads = {"head_count": 2, "head_count_kv": 2, "layer_norm_rms_eps": 1e-5, "vocab_size": len(tokens)}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "unk_token_id": 0}
    for key, value in {**sizes, **heads, "tokenizer_model": kind, "token_list": tokens, **ids, **its}.items():
        getattr(writer, f"add_{key}")(value)
    layers = "attn_q attn_k attn_v attn_output ffn_gate ffn_up ffn_down".split()
    shapes = {"token_embd": (len(tokens), 32), **{f"blk.0.{layer}": (32, 32) for layer in layers}}
    for name, shape in {**shapes, "output_norm": 32, "blk.0.attn_norm": 32, "blk.0.ffn_norm": 32}.items():
        writer.add_tensor(f"{name}.weight", np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def compared(path: str, other: str | None = None) -> int:
    """Asserts that the ids are llama.cpp's, with and without what is added, and returns how many of the texts have
    others in another file."""
    own, differing = from_named(AutoTokenizer, path), 0
    with llama_cpp_server(path, None, 64) as server:
        for text in TEXTS:
            for add in (True, False):
                how = {"content": text, "add_special": add, "parse_special": True}
                its = server.at.ask("/tokenize", how)["tokens"]
                assert own(text, add_special_tokens=add)["input_ids"] == its, text
            differing += bool(other) and from_named(AutoTokenizer, other)(text)["input_ids"] != own(text)["input_ids"]
    return differing


def byte_level(path: Path, split: str, **its: Any) -> str:
    tokens, merges = trained(None)
    merges = [merge for merge in merges if "".join(merge) != "ing"]  # a token that no merge makes
    types = [*TYPES, *[1] * (len(tokens) - len(TYPES))]
    joined = [" ".join(merge) for merge in merges]
    return written(path, "gpt2", tokens, tokenizer_pre=split, token_types=types, token_merges=joined, **its)


@pytest.mark.parametrize("split", [name for names in _SPLITS for name in names])
def test_ways_to_split_are_llama_cpps(split: str, tmp_path: Path) -> None:
    other = byte_level(tmp_path / "other.gguf", "qwen2" if split in ("gpt-2", "olmo", "exaone4") else "gpt-2")
    path = byte_level(tmp_path / f"{split}.gguf", split)
    assert compared(path, other) > 0
    chat = byte_level(tmp_path / "chat.gguf", split, chat_template="{{ messages }}", add_bos_token=True)
    ours = from_named(AutoTokenizer, chat)
    assert (ours.chat_template, from_named(AutoTokenizer, path).chat_template) == ("{{ messages }}", None)
    assert ours("x")["input_ids"][0] == 1 and ours.decode(ours(TEXTS[6])["input_ids"][1:]) == TEXTS[6]


# Phi-3's special tokens take the spaces behind them; Gemma has tokens of spaces.
@pytest.mark.parametrize(
    "name, prefix", [("Llama 2", True), ("Phi-3 mini", True), ("Phi-3 mini", False), ("Gemma", False)]
)
def test_sentencepiece_is_llama_cpps(name: str, prefix: bool, tmp_path: Path) -> None:
    tokens, merges = trained("\u2581")
    letters = [token for token in tokens if len(token) == 1 and ord(token) < 0x3000]  # others are bytes
    made = [token for token in dict.fromkeys("".join(merge) for merge in merges) if {*token} <= {*letters}]
    made = [token for token in made if token not in SPECIAL]
    tokens = [
        *SPECIAL,
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "  " if name == "Gemma" else "<s2>",
        *made,
        *letters,
    ]
    types = [*TYPES, *[6] * 256, 4, *[1] * len(made + letters)]
    scores = [0.0] * (len(SPECIAL) + 257) + [-float(at) for at in range(len(made + letters))]
    its = {"tokenizer_pre": "default", "token_types": types, "token_scores": scores, "add_space_prefix": prefix}
    files = [written(tmp_path / f"{each}.gguf", "llama", tokens, name=each, **its) for each in (name, "other")]
    assert (compared(*files) > 0) == ("Phi" in name)
    ours = from_named(AutoTokenizer, files[0])
    assert ours.decode(ours(TEXTS[3], add_special_tokens=False)["input_ids"]) == TEXTS[3]


def test_what_is_not_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"splits text \(default\) is not known. Put the tokenizer's files"):
        from_named(AutoTokenizer, byte_level(tmp_path / "a.gguf", "default"))
    unigram = written(tmp_path / "b.gguf", "t5", ["a"], token_types=[1])
    with pytest.raises(OptionError, match=r"its kind of tokenizer \(t5\) is not known. Put the tokenizer's files"):
        from_named(AutoTokenizer, unigram)
