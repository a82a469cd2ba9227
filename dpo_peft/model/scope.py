"""What an answer-only adapter (aLoRA, see `forward.scope`) can't be or be on; and which layers there are for one."""

import re

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora.variants import ALoraLinearVariant
from transformers import PreTrainedModel

from ..errors import OptionError
from ..forward.modules import decoder_layers, eval_mode, text_decoder
from ..forward.scope import invocation_tokens
from ..reference.frozen_adapter import adapter_layers, holds_adapter

# Options of a LoraConfig that act on every token, or for which PEFT has no aLoRA.
_EVERYWHERE = ("modules_to_save", "trainable_token_indices")
_NO_VARIANT = ("use_dora", "target_parameters", "use_qalora", "use_bdlora", "kasa_config", "velora_config")
ALL_TOKENS = "or train an adapter of all tokens (adapter_scope: all; alora_invocation_tokens=None)"


def check_answer_only(config: LoraConfig) -> None:
    """Raises an OptionError for a config with invocation tokens that PEFT would overlook, or can't honor."""
    tokens = config.alora_invocation_tokens
    if tokens is None:
        return
    name = "peft_config.alora_invocation_tokens"
    if not tokens or not all(type(token) is int and token >= 0 for token in tokens):
        raise OptionError(
            f"{name}={tokens!r} must be a list of token ids, at least one: take those of "
            "dpo_peft.answer_only(tokenizer), or leave it out."
        )
    if config.task_type != "CAUSAL_LM":
        raise OptionError(
            f"{name}: PEFT looks for the tokens in models of one task alone, and without it the adapter would never "
            'act. Set task_type="CAUSAL_LM".'
        )
    for names, why in ((_EVERYWHERE, "act on the prompt too"), (_NO_VARIANT, "PEFT has no aLoRA of this kind")):
        if given := [option for option in names if getattr(config, option)]:
            raise OptionError(f"{name} goes without {', '.join(given)}: {why}. Leave it out, {ALL_TOKENS}.")
    init = config.init_lora_weights
    if isinstance(init, str) and init not in ("gaussian", "eva", "orthogonal"):
        raise OptionError(
            f"{name} goes without init_lora_weights={init!r}, which changes the base, and so the prompt. Leave it out."
        )


def check_same_scope(model: PeftModel, adapter: str, other: PeftConfig, name: str) -> None:
    """Raises an OptionError for a second adapter that acts on other tokens than one of the model: their prompts are
    shared, and generation looks for the tokens of one."""
    ours, its = invocation_tokens(model.peft_config, adapter), invocation_tokens({"": other}, "")
    if ours != its:
        acts = [f"from the tokens {[*tokens]} on" if tokens else "on all tokens" for tokens in (ours, its)]
        raise OptionError(
            f"{name} acts {acts[1]}, and the adapter beside it {acts[0]} (alora_invocation_tokens): both must act on "
            "the same tokens. Choose one of the same scope."
        )


def check_attached(model: PeftModel, adapter: str) -> None:
    """Refuses an answer-only adapter on modules where PEFT can't tell a completion's tokens from the prompt's.

    PEFT looks at layers that see rows, (rows, tokens, width): not at the head, which training runs on completions
    alone, nor at towers of images, nor at layers whose model flattens rows first, as in front of experts.
    """
    tokens = [*invocation_tokens(model.peft_config, adapter)]
    if not tokens:
        return
    base = model.get_base_model()
    inside = {id(module) for module in text_decoder(base).modules()}
    remedy = f"Name other layers in target_modules, {ALL_TOKENS}."
    for name, layer in adapter_layers(model):
        variant = getattr(layer, "lora_variant", {}).get(adapter)
        if holds_adapter(layer, adapter) and not (isinstance(variant, ALoraLinearVariant) and id(layer) in inside):
            short = name.removeprefix("base_model.model.")
            raise OptionError(
                f"An answer-only adapter (alora_invocation_tokens) can be on linear layers of the decoder alone, and "
                f"this one is on {short}. {remedy}"
            )
    size = base.get_input_embeddings().weight.shape[0]
    if max(tokens) >= size:
        raise OptionError(f"alora_invocation_tokens={tokens} are not of this model, which has {size} tokens.")
    row = torch.tensor([[tokens[0], *tokens, tokens[-1]]] * 2, device=base.get_input_embeddings().weight.device)
    try:
        with torch.no_grad(), eval_mode(model):
            model(input_ids=row, use_cache=False)
    except (IndexError, RuntimeError) as error:
        raise OptionError(
            f"PEFT can't run an answer-only adapter (alora_invocation_tokens) on these layers: {error} {remedy}"
        ) from error


# ---- Layers ---------------------------------------------------------------------------------------------------------


def layer_numbers(given: object, count: int) -> list[int] | None:
    """Returns the layers that an adapter is to be on, for `LoraConfig.layers_to_transform`; None for all.

    Args:
        given: numbers, ranges (16-31), or one share of the layers (0.5), the upper ones.
        count: how many layers the model has.

    Raises:
        OptionError: something else, or a layer that the model doesn't have.
    """
    if given is None:
        return None
    words = [str(word) for word in (given if isinstance(given, list | tuple) else [given])]
    found: list[int] = []
    for word in words:
        if re.fullmatch(r"0?\.\d+", word) and len(words) == 1:
            found += range(count - round(float(word) * count), count)
        elif numbers := re.fullmatch(r"(\d+)(?:-(\d+))?", word):
            found += range(int(numbers[1]), int(numbers[2] or numbers[1]) + 1)
        else:
            found.append(count)
    if not found or max(found) >= count:
        raise OptionError(
            f"lora_layers_to_transform={given!r}: the model has {count} layers, 0 to {count - 1}. Give numbers, "
            f"ranges such as {count // 2}-{count - 1}, or one share such as 0.5, the upper half."
        )
    return sorted(set(found))


def check_layers(config: LoraConfig, model: PreTrainedModel) -> None:
    """Raises an OptionError for layers that the model doesn't have, or beside a pattern: PEFT overlooks both."""
    layers, targets = config.layers_to_transform, config.target_modules
    if layers is None:
        return
    if isinstance(targets, str) and targets != "all-linear":
        raise OptionError(
            "lora_layers_to_transform has no effect beside a pattern of target_modules: give names or all-linear, or "
            "put the layers into the pattern."
        )
    if not config.layers_pattern:
        layer_numbers(layers if isinstance(layers, int) else [*layers], len(decoder_layers(model)))
