"""Families whose GGUF files are read: what each one's metadata means, and what llama.cpp's converter did to weights.

A file is read as llama.cpp reads it. So what llama.cpp takes for granted stands here, and a key of which nothing is
known is refused: it may change the numbers. Read off llama.cpp's `conversion` and `src/models` in autumn 2026.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from math import log
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..errors import OptionError

REMEDY = "Name the 16-bit model that it was made from."
_COMMON = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
}
_TOKENS = {"bos": "bos", "eos": "eos", "pad": "padding"}
_RMS: dict[str, str | None] = {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
# Keys that are read below, or by nothing. Where a value stands, llama.cpp computes with it whatever the file says.
_OTHERS: dict[str, Any] = dict.fromkeys(
    "vocab_size tensor_data_layout attention.value_length attention.sliding_window attention.sliding_window_pattern "
    "attention.layer_norm_rms_epsilon attention.layer_norm_epsilon rope.freq_base rope.dimension_count "
    "rope.scaling.type rope.scaling.factor rope.scaling.attn_factor rope.scaling.original_context_length "
    "rope.scaling.yarn_ext_factor rope.scaling.yarn_attn_factor".split()
)
_OTHERS |= {"rope.scaling.finetuned": True, "rope.scaling.yarn_beta_fast": 32.0, "rope.scaling.yarn_beta_slow": 1.0}
_Also = Callable[[dict[str, Any], Collection[str]], dict[str, Any]]


@dataclass(frozen=True)
class Family:
    """A family of models.

    Args:
        model_type: transformers' name of it.
        keys: of its metadata, and the fields of its config that they fill, beside those of all. None: read below.
        also: other fields of its config, of what is known of it and the names of its tensors.
        window: every how manyth layer looks beyond the window, unless the file tells. None: all do.
        window_base: base of the positions' frequencies in layers with a window, unless the file tells, if they are not
            scaled as others are. 0 for the base of the others, whatever the file tells.
        partial: whether a part of each head may be left without positions.
        rotated: whether rows of queries and keys were reordered, as llama.cpp rotates neighbors.
        shifted: whether norms hold their weight + 1.
    """

    model_type: str
    keys: Mapping[str, str | None] = field(default_factory=lambda: _RMS)
    also: _Also = lambda config, names: {}
    window: int | None = None
    window_base: float | None = None
    partial: bool = False
    rotated: bool = False
    shifted: bool = False

    def restored(self, weight: Tensor, name: str, config: Any) -> Tensor:
        """Returns a weight, or its rows of blocks, as transformers has it."""
        if self.shifted and name.endswith("norm.weight"):
            return weight - 1
        for part, heads in (("attn_q.", config.num_attention_heads), ("attn_k.", config.num_key_value_heads)):
            if self.rotated and part in name:
                weight = weight.view(heads, -1, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)
        return weight


def _scalar(layers: int) -> _Also:
    """What Gemma's queries are divided by the root of: otherwise in the 27B, which llama.cpp knows by its layers."""
    key = "query_pre_attn_scalar"
    large = lambda config: {key: config["hidden_size"] // config["num_attention_heads"]}  # noqa: E731
    return lambda config, names: large(config) if config["num_hidden_layers"] == layers else {key: config["head_dim"]}


def _stablelm(config: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    bias, after = "blk.0.attn_q.bias" in names, "blk.0.ffn_norm.weight" in names
    return {"use_qkv_bias": bias, "use_parallel_residual": not after}


def _exaone4(config: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    if config["num_hidden_layers"] == 64:  # by which llama.cpp knows it
        raise OptionError("its architecture is exaone4, of which the 32B, with its windows, is not read here")
    return {"sliding_window": None, "layer_types": ["full_attention"] * config["num_hidden_layers"]}


def _phi3(config: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """llama.cpp has no window for it, whatever the file says."""
    original = config["rope_parameters"].get("original_max_position_embeddings", config["max_position_embeddings"])
    return {"sliding_window": None, "original_max_position_embeddings": original}


_CAPS = {f"{name}_logit_softcapping": f"{name}_logit_softcapping" for name in ("final", "attn")}
_BASE = {**_RMS, "rope.freq_base_swa": None}
_COHERE = {"attention.layer_norm_epsilon": "layer_norm_eps", "logit_scale": "logit_scale"}
_STABLE = {"attention.layer_norm_epsilon": "layer_norm_eps", "use_parallel_residual": None}
_BETA = {"attention.temperature_scale": "llama_4_scaling_beta", "rope.scaling.yarn_log_multiplier": None}
_GRANITE = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
_OLMO3 = Family("olmo3", _BASE, window=4, window_base=0)
FAMILIES = {
    "arcee": Family("arcee", rotated=True),
    "cohere2": Family("cohere2", _COHERE, window=4),
    "command-r": Family("cohere", _COHERE),
    "ernie4_5": Family("ernie4_5"),
    "exaone4": Family("exaone4", also=_exaone4),
    "gemma": Family("gemma", shifted=True),
    "gemma2": Family("gemma2", {**_RMS, **_CAPS}, _scalar(46), window=2, shifted=True),
    "gemma3": Family("gemma3_text", {**_BASE, **_CAPS}, _scalar(62), window=6, window_base=1e4, shifted=True),
    "glm4": Family("glm4", partial=True),
    "granite": Family("granite", {**_RMS, **_GRANITE}, rotated=True),
    "llama": Family("llama", rotated=True),
    "mistral3": Family("ministral3", {**_RMS, **_BETA}, rotated=True),
    "nemotron": Family("nemotron", {"attention.layer_norm_epsilon": "norm_eps"}, partial=True, shifted=True),
    "olmo2": Family("olmo2"),
    "phi3": Family("phi3", also=_phi3, partial=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "seed_oss": Family("seed_oss"),
    "smollm3": Family("smollm3", rotated=True),
    "stablelm": Family("stablelm", _STABLE, _stablelm, partial=True),
    "starcoder2": Family("starcoder2", {"attention.layer_norm_epsilon": "norm_epsilon"}),
}


def config_of(metadata: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Returns the fields of transformers' config, `model_type` among them, of a GGUF file.

    Args:
        metadata: of the file; the number of tokens stands for `tokenizer.ggml.tokens`.
        names: of its tensors.

    Raises:
        OptionError: it may compute otherwise than is known here. It says how, and does not name the file.
    """
    called = metadata["general.architecture"]
    if any("_exps." in name for name in names):
        raise OptionError(f"it is a mixture of experts ({called}), and those are not read in blocks")
    if called not in FAMILIES:
        raise OptionError(f"its architecture is {called}, and only these are read here: {', '.join(FAMILIES)}")
    prefix = f"{called}."
    its = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    family = _OLMO3 if called == "olmo2" and its.get("attention.sliding_window") else FAMILIES[called]
    known = {**_COMMON, **family.keys}
    for key, value in its.items():
        if key not in known and (key not in _OTHERS or _OTHERS[key] not in (None, value)):
            raise OptionError(f"its architecture is {called}, of which {key} = {value} is not known here")
    config = {name: its[key] for key, name in known.items() if name and key in its}
    config |= {f"{name}_token_id": metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in _TOKENS.items()}
    config |= {"vocab_size": its.get("vocab_size", metadata.get("tokenizer.ggml.tokens"))}
    config |= {"model_type": family.model_type, "tie_word_embeddings": "output.weight" not in names}
    head = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    rope = _positions(called, its, names)
    if family.partial:
        rope["partial_rotary_factor"] = its.get("rope.dimension_count", head) / head
    elif its.get("rope.dimension_count", head) != head:
        raise OptionError(f"its architecture is {called}, but some numbers of a head are without positions")
    if "llama_4_scaling_beta" in config:
        rope["llama_4_scaling_beta"] = config.pop("llama_4_scaling_beta")
    config["rope_parameters"] = rope
    if family.window:
        window = its.get("attention.sliding_window", 4096 if called == "gemma2" else 0)
        every = its.get("attention.sliding_window_pattern", family.window)
        layers = range(config["num_hidden_layers"])
        near = every if isinstance(every, list) else [at % every < every - 1 for at in layers]
        config["layer_types"] = [f"{'sliding' if window and near[at] else 'full'}_attention" for at in layers]
        config |= {"sliding_window": window} if window else {}
    if family.window_base is not None:  # without the scaling of the others
        base = its.get("rope.freq_base_swa", family.window_base) if family.window_base else rope["rope_theta"]
        plain = {"rope_type": "default", "rope_theta": base}
        config["rope_parameters"] = {"full_attention": rope, "sliding_attention": plain}
    return config | family.also(config, names)


def _positions(called: str, its: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Returns transformers' rope parameters, but for the factors that stand in tensors."""
    rope = {"rope_type": "default", "rope_theta": its.get("rope.freq_base", 1e4)}
    kind, factor = its.get("rope.scaling.type", "linear"), its.get("rope.scaling.factor", 0.0)
    size, long = its.get("rope.scaling.attn_factor", 1.0), "rope_factors_long.weight" in names
    how = {"original_max_position_embeddings": its.get("rope.scaling.original_context_length", its["context_length"])}
    if kind == "yarn" and called not in ("gemma3", "phi3"):
        size *= 1 + 0.1 * log(factor)
        if multiplier := its.get("rope.scaling.yarn_log_multiplier"):
            size /= 1 + 0.1 * multiplier * log(factor)
            how |= {"mscale": 1.0, "mscale_all_dim": multiplier}  # for the converters
        return {**rope, **how, "rope_type": "yarn", "factor": factor, "attention_factor": size}
    if long and called == "phi3":
        return {**rope, **how, "attention_factor": size}
    if long or kind not in ("linear", "none") or size != 1:
        raise OptionError(f"its architecture is {called}, and its positions are scaled otherwise than known ({kind})")
    return {**rope, "rope_type": "linear", "factor": factor} if kind == "linear" and factor else rope


def scaled_by(config: Any, factors: Mapping[str, Tensor]) -> bool:
    """Puts scalings into a config of which a file holds what each frequency is divided by, and says whether it could.

    Args:
        config: of the model.
        factors: tensors by their names in the file.
    """
    rope = config.rope_parameters
    if (divisors := factors.get("rope_freqs.weight")) is not None:  # Llama 3's
        usual = rope["rope_theta"] ** -(torch.arange(len(divisors)) / len(divisors))
        its = {"rope_type": "llama3", "factor": float(divisors.max()), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        config.rope_parameters = {**rope, **its, "original_max_position_embeddings": 8192}
        return torch.allclose(ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0], usual / divisors, rtol=1e-5)
    both = {f"{name}_factor": factors[f"rope_factors_{name}.weight"].tolist() for name in ("long", "short")}
    config.rope_parameters = {**rope, **both, "rope_type": "longrope"}
    return True
