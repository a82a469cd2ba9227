"""What the speed benchmark measures on: lengths, rows of random ids, random NF4 models, and the bound on the speed.

Lengths are drawn from fixed distributions with fixed seeds, so every engine and every machine sees the same rows.
"""

import itertools
import math
import random
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

SHAPE_FIELDS = (
    "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size".split()
)
SHAPES = {
    name: dict(zip(SHAPE_FIELDS, values, strict=True))
    for name, values in {
        "8b": (4096, 14336, 32, 32, 8, 128256),
        "70b": (8192, 28672, 80, 64, 8, 128256),
        "small": (256, 704, 6, 4, 2, 8000),  # a TRL step on two pairs takes about 3 s on two CPU cores
        "tiny": (64, 128, 2, 4, 2, 1000),
    }.items()
}

# Log-normal lengths of (prompt, completion): mean, coefficient of variation, longest.
DRAWN = {
    "uf": ((190, 1.0, 1024), (300, 0.7, 1024)),
    "hh": ((140, 0.9, 1024), (60, 0.8, 512)),
    "longprompt": ((3000, 0.3, 6000), (250, 0.6, 1000)),
    "multi": ((190, 1.0, 1024), (300, 0.7, 1024)),  # as uf, with three rejected answers
}
# Prompt, chosen and rejected of the first 64 rows of LLaMA-Factory's dpo_en_demo.json, tokenized with SmolLM2's
# tokenizer and chat template.
# fmt: off
DEMO = [
    (52, 342, 117), (539, 239, 275), (45, 572, 238), (40, 420, 147), (482, 434, 275), (177, 64, 148), (54, 524, 446),
    (93, 910, 500), (66, 874, 767), (598, 473, 293), (64, 15, 75), (166, 3, 75), (277, 282, 251), (65, 33, 585),
    (68, 361, 234), (1049, 116, 213), (277, 129, 278), (419, 396, 542), (42, 261, 33), (826, 406, 572), (75, 398, 517),
    (71, 38, 24), (46, 253, 49), (43, 59, 78), (612, 190, 317), (176, 40, 102), (881, 466, 425), (569, 482, 487),
    (1125, 200, 356), (139, 115, 578), (940, 600, 979), (179, 270, 330), (56, 24, 179), (775, 351, 584),
    (888, 424, 363), (480, 68, 76), (117, 210, 257), (300, 423, 443), (739, 414, 386), (1104, 508, 480),
    (190, 203, 370), (1291, 543, 656), (65, 236, 462), (104, 43, 39), (60, 61, 106), (93, 29, 579), (125, 207, 313),
    (112, 369, 217), (464, 19, 80), (253, 198, 273), (817, 608, 415), (73, 196, 93), (281, 467, 293), (162, 4, 187),
    (302, 18, 11), (130, 86, 346), (773, 271, 477), (1457, 515, 366), (82, 16, 342), (56, 536, 506), (187, 120, 201),
    (469, 247, 319), (44, 578, 94), (1371, 356, 419),
]
# fmt: on
# One row of 6,000 tokens in the third step of eight, among others of about 800.
OUTLIER = [(4096, 1024, 880) if i == 19 else (190 + i % 5, 250 + 9 * (i % 8), 350 - 7 * (i % 9)) for i in range(72)]
FIXED = {"demo": DEMO, "ctx16k": [(12288, 2048, 2048)], "ctx32k": [(30720, 1024, 1024)], "outlier": OUTLIER}
SAMPLES = {
    "uf": 8,
    "hh": 32,
    "longprompt": 2,
    "multi": 4,
    "demo": 2,
    "ctx16k": 1,
    "ctx32k": 1,
    "outlier": 8,
}  # of a step
FIRST_ID = 4  # below stand the special tokens

Lengths = tuple[int, ...]  # prompt, chosen, rejected (several for "multi")


def lengths(work: str, number: int, seed: int = 0) -> list[Lengths]:
    """The lengths in tokens of the first `number` rows."""
    if work in FIXED:
        return list(itertools.islice(itertools.cycle(FIXED[work]), number))
    draw = random.Random(seed)

    def one(mean: float, variation: float, longest: int, shortest: int) -> int:
        variance = math.log(1 + variation * variation)
        value = draw.lognormvariate(math.log(mean) - variance / 2, math.sqrt(variance))
        return max(shortest, min(longest, int(value)))

    prompt, completion = DRAWN[work]
    answers = 4 if work == "multi" else 2
    return [(one(*prompt, 8), *(one(*completion, 4) for _ in range(answers))) for _ in range(number)]


def make_rows(sizes: list[Lengths], vocab: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of random ids; `rejected_ids` is a list of completions where a row has several."""
    draw = random.Random(seed + 1)
    rows = []
    for size in sizes:
        prompt, chosen, *rejected = (draw.choices(range(FIRST_ID, vocab), k=length) for length in size)
        rejected_ids = rejected[0] if len(rejected) == 1 else rejected
        rows.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected_ids})
    return rows


def as_pairs(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same rows for a trainer that knows pairs only: one pair for each rejected completion."""
    pairs = []
    for row in rows:
        several = isinstance(row["rejected_ids"][0], list)
        pairs += [{**row, "rejected_ids": ids} for ids in (row["rejected_ids"] if several else [row["rejected_ids"]])]
    return pairs


def as_text(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Pairs as text that `make_tokenizer` turns back into the same ids."""

    def text(ids: list[int]) -> str:
        return " ".join(f"t{i}" for i in ids)

    names = {"prompt": "prompt_ids", "chosen": "chosen_ids", "rejected": "rejected_ids"}
    return [{name: " " * (name != "prompt") + text(row[ids]) for name, ids in names.items()} for row in rows]


def make_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(["<s>", "</s>", "<pad>", "<unk>"])}
    words |= {f"t{i}": i for i in range(FIRST_ID, vocab)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def make_config(shape: str) -> LlamaConfig:
    return LlamaConfig(
        **SHAPES[shape],
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )


def make_model(shape: str, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """A Llama of that shape, the same at every call."""
    from dpo_peft.planning.bench import random_model

    torch.manual_seed(0)
    return random_model(make_config(shape), device, dtype)


def same_start(model: nn.Module, dtype: torch.dtype | None) -> None:
    """The same adapter weights in every engine, so that losses can be compared.

    `dtype` replaces the one that the trainer chose for them: TRL makes them bfloat16 on a 4-bit base.
    """
    trained = sorted((name, p) for name, p in model.named_parameters() if p.requires_grad)
    for seed, (name, parameter) in enumerate(trained):
        if dtype is not None and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
        draw = torch.Generator().manual_seed(seed)
        start = torch.randn(parameter.shape, generator=draw) / math.sqrt(parameter.shape[-1])
        with torch.no_grad():
            parameter.copy_(start if "lora_A" in name else torch.zeros_like(start))


def bound_flops(shape: str, sizes: list[Lengths], adapter: str = "") -> float:
    """6 floating-point operations per decoder weight and distinct token, and per head weight and predicted token.

    That is a policy forward pass, a reference forward pass and the backward pass to the inputs, two each. Two are left
    where an adapter isn't: on an answer-only adapter's prompts, and in layers below the first one with an adapter, the
    passes are one and nothing goes back. Attention itself, LoRA and recomputation are not counted.
    """
    c = SHAPES[shape]
    head_dim = c["hidden_size"] // c["num_attention_heads"]
    attention = 2 * c["hidden_size"] * (c["hidden_size"] + c["num_key_value_heads"] * head_dim)
    decoder = c["num_hidden_layers"] * (attention + 3 * c["hidden_size"] * c["intermediate_size"])
    prompts, predicted = sum(size[0] for size in sizes), sum(sum(size[1:]) for size in sizes)
    adapted = 2.0 + 4.0 * (
        (c["num_hidden_layers"] + 1) // 2 / c["num_hidden_layers"] if "upper half" in adapter else 1
    )
    on_prompts = 2.0 if "answer-only" in adapter else adapted
    head = 6.0 * c["vocab_size"] * c["hidden_size"]
    return decoder * (on_prompts * prompts + adapted * predicted) + head * predicted


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
