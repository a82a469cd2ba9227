"""How other programs' LoRA loaders read an adapter's config, so that nobody finds out on the server.

Read off vLLM's `PEFTHelper` and `LoRAModel` and llama.cpp's `convert_lora_to_gguf.py` and `llama_adapter_lora_weight`.
Both take `adapter_config.json` with `adapter_model.safetensors` as PEFT writes them and ignore keys that they do not
know. Some settings they refuse; others they overlook, and the adapter then acts with the wrong strength.
"""

import math
import re
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from peft import PeftConfig

from ..model.adapters import moved_base

# vLLM's --max-lora-rank takes these values only, and is 16 unless given.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in")


def serving_problems(config: PeftConfig | Mapping[str, object]) -> list[str]:
    """Returns what vLLM's and llama.cpp's LoRA loaders would refuse or get wrong, a sentence each; empty if nothing.

    Args:
        config: of the adapter, from PEFT or as read from adapter_config.json.
    """
    return [text for _, text in _problems(dict(config) if isinstance(config, Mapping) else config.to_dict())]


def gguf_problems(config: PeftConfig, tied_head: bool) -> list[str]:
    """Returns what keeps an adapter from being converted for llama.cpp, a sentence each; empty if nothing.

    Args:
        config: of the adapter.
        tied_head: whether the base's head is its embeddings.
    """
    stops = {"both", "llama.cpp", *(["tied head"] if tied_head else [])}
    return [text for whose, text in _problems(config.to_dict()) if whose in stops]


def _problems(options: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns whose problem each is, and a sentence: "both", "vllm", "llama.cpp", or what it depends on."""
    both = "vLLM and llama.cpp"
    found = []
    if options.get("use_dora"):
        found.append(("both", f"{both} refuse DoRA: merge the adapter."))
    if options.get("modules_to_save"):
        saved = options["modules_to_save"]
        names = saved if isinstance(saved, str) else ", ".join(sorted(saved))
        found.append(("both", f"{both} refuse modules_to_save ({names}): merge the adapter."))
    if options.get("trainable_token_indices"):
        text = (
            "llama.cpp refuses trainable_token_indices, and vLLM needs --max-lora-trainable-tokens or refuses them "
            "too: merge the adapter."
        )
        found.append(("both", text))
    # Those of layers are saved as a layer's adapter is.
    if any(not name.endswith(".weight") for name in options.get("target_parameters") or ()):
        text = f"{both} may not know weights in target_parameters (fused experts): try it, or merge."
        found.append(("both", text))
    if options.get("lora_bias") or options.get("bias", "none") != "none":
        found.append(("both", f"{both} refuse or overlook biases in an adapter: merge it."))
    init = options.get("init_lora_weights", True)  # False starts off zero, and leaves the base alone
    if init is not False and (moved := moved_base(SimpleNamespace(init_lora_weights=init))):
        text = f"{both} add the adapter to the original base, but {moved}: merge it, or convert it by PEFT."
        found.append(("both", text))
    if options.get("alora_invocation_tokens"):
        text = (
            "vLLM refuses an answer-only adapter (alora_invocation_tokens), and where it doesn't know them, acts on "
            "the prompt too: serve it by PEFT or llama.cpp's llama-server."
        )
        found.append(("vllm", text))
    if options.get("layer_replication"):
        found.append(("both", f"{both} know no layer_replication."))
    targets = options.get("target_modules") or ()
    named = [targets] if isinstance(targets, str) else targets
    if any(re.search(r"vision|visual|multi_modal_projector", name) for name in named):
        found.append(("both", f"{both} may not know an adapter on a vision tower or projector: try it, or merge."))
    last = {name.split(".")[-1] for name in named}
    found += _scale_problems(options)
    if "lm_head" in last:
        text = "llama.cpp refuses an adapter on lm_head where the head is tied to the embeddings: merge it."
        found.append(("tied head", text))
    if on := sorted(last & set(EMBEDDINGS)):
        found.append(("vllm", f"vLLM takes an adapter on {on[0]} for some architectures only: try it, or merge."))
    record = (options.get("auto_mapping") or {}).get("dpo_peft_training") or {}  # of `TrainedWith`
    if (length := record.get("rope_length")) is not None:
        text = (
            f"It was trained with the rotary frequencies of rows of {length} tokens, and servers choose them by the "
            "context (vLLM by --max-model-len): give it one on the same side of the model's limit."
        )
        found.append(("context", text))
    return found


def _scale_problems(options: Mapping[str, Any]) -> list[tuple[str, str]]:
    rank, alpha = options.get("r", 8), options.get("lora_alpha", 8)
    ranks, alphas = options.get("rank_pattern") or {}, options.get("alpha_pattern") or {}
    found = []
    if options.get("use_rslora"):
        text = (
            f"llama.cpp overlooks use_rslora and scales by lora_alpha / r: give --lora-scaled a factor of "
            f"{math.sqrt(rank):.4g}, the square root of the rank."
        )
        found.append(("rslora", text))
    if ranks or alphas:
        which = " and ".join(name for name, on in (("rank_pattern", ranks), ("alpha_pattern", alphas)) if on)
        overlook = bool(alphas or options.get("use_rslora"))
        overlooks = "vLLM and llama.cpp overlook" if overlook else "vLLM overlooks"
        text = f"{overlooks} {which} and scale every module by lora_alpha={alpha:g}: merge the adapter."
        found.append(("both" if overlook else "vllm", text))
    largest = max([rank, *ranks.values()])
    if largest > VLLM_RANKS[-1]:
        text = f"vLLM takes ranks up to {VLLM_RANKS[-1]}, and this one's is {largest}: merge the adapter."
        found.append(("vllm", text))
    return found


def max_lora_rank(config: PeftConfig | Mapping[str, object]) -> int:
    """Returns the least value for vLLM's `--max-lora-rank` that the adapter fits into."""
    options = dict(config) if isinstance(config, Mapping) else config.to_dict()
    largest = max([options.get("r", 8), *(options.get("rank_pattern") or {}).values()])
    return next((rank for rank in VLLM_RANKS if rank >= largest), largest)
