"""What an answer-only adapter (aLoRA, see `forward.scope`) can't be or be on; and which layers there are for one."""

import re

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora.variants import ALoraLinearVariant

from ..errors import OptionError
from ..forward.modules import eval_mode, text_decoder
from ..forward.scope import acting, invocation_tokens
from ..reference.frozen_adapter import adapter_layers, holds_adapter

# Options of a LoraConfig that act on every token, or of which PEFT has no aLoRA.
_OF_ALL_TOKENS = (
    "modules_to_save trainable_token_indices use_dora target_parameters use_qalora use_bdlora kasa_config "
    "velora_config"
).split()
_NAME = "alora_invocation_tokens"
_OR_ALL = "or train an adapter of all tokens (adapter_scope: all)."


def check_answer_only(config: LoraConfig) -> None:
    """Raises an OptionError for a config with invocation tokens that PEFT would overlook, or can't honor."""
    tokens = config.alora_invocation_tokens
    if tokens is None:
        return
    if not tokens or not all(type(token) is int and token >= 0 for token in tokens):
        raise OptionError(f"{_NAME}={tokens!r} must be token ids, at least one: dpo_peft.answer_only(tokenizer).")
    if config.task_type != "CAUSAL_LM":
        raise OptionError(f'{_NAME}: PEFT heeds them for task_type="CAUSAL_LM" alone. Set it.')
    given, init = [name for name in _OF_ALL_TOKENS if getattr(config, name)], config.init_lora_weights
    if isinstance(init, str) and init not in ("gaussian", "eva", "orthogonal"):
        given.append(f"init_lora_weights={init!r}")
    if given:
        raise OptionError(
            f"{_NAME} goes without {', '.join(given)}: it would act on the prompt too, or PEFT has no aLoRA of this "
            f"kind. Leave it out, {_OR_ALL}"
        )


def check_same_scope(model: PeftModel, adapter: str, other: PeftConfig, name: str) -> None:
    """Raises an OptionError for a second adapter that acts on other tokens than one of the model, whose prompts it is
    to share."""
    ours, its = invocation_tokens(model.peft_config, adapter), invocation_tokens({"": other}, "")
    if ours != its:
        raise OptionError(
            f"{name} has {_NAME}={[*its] or None}, and the adapter beside it {[*ours] or None}: both must act on the "
            "same tokens. Choose one of the same scope."
        )


def check_attached(model: PeftModel, adapter: str) -> None:
    """Refuses an answer-only adapter where PEFT can't tell a completion's tokens from the prompt's: on the head, which
    training runs on completions alone, in towers of images, and on layers that see tokens without rows, as in front of
    some experts."""
    tokens, base = [*invocation_tokens(model.peft_config, adapter)], model.get_base_model()
    if not tokens:
        return
    remedy = f"Name other layers in target_modules, {_OR_ALL}"
    inside = {id(module) for module in text_decoder(base).modules()}
    for name, layer in adapter_layers(model):
        variant = getattr(layer, "lora_variant", {}).get(adapter)
        if holds_adapter(layer, adapter) and not (isinstance(variant, ALoraLinearVariant) and id(layer) in inside):
            raise OptionError(
                f"An answer-only adapter ({_NAME}) can be on linear layers of the decoder alone, and this one is on "
                f"{name.removeprefix('base_model.model.')}. {remedy}"
            )
    embeddings = base.get_input_embeddings().weight
    if max(tokens) >= len(embeddings):
        raise OptionError(f"{_NAME}={tokens} are not of this model, which has {len(embeddings)} tokens.")
    rows = torch.tensor([[tokens[0], *tokens]] * 2, device=embeddings.device)
    try:
        with torch.no_grad(), eval_mode(model), acting(base, [len(tokens)] * 2):
            base(input_ids=rows, use_cache=False)
    except torch.OutOfMemoryError:
        raise
    except (IndexError, RuntimeError) as error:
        raise OptionError(f"PEFT can't run an answer-only adapter ({_NAME}) here: {error} {remedy}") from error


def layer_numbers(given: object, count: int) -> list[int] | None:
    """Returns `LoraConfig.layers_to_transform` for numbers, ranges (16-31) or one share (0.5: the upper ones) of
    `count` layers; None, which is all of them, for None. Raises an OptionError for anything else."""
    if given is None:
        return None
    words, found = [str(word) for word in (given if isinstance(given, list) else [given])], set[int]()
    for word in words:
        if re.fullmatch(r"0?\.\d+", word) and len(words) == 1:
            found.update(range(count - round(float(word) * count), count))
        elif numbers := re.fullmatch(r"(\d+)(?:-(\d+))?", word):
            found.update(range(int(numbers[1]), int(numbers[2] or numbers[1]) + 1))
        else:
            found.add(count)
    if not found or max(found) >= count:
        raise OptionError(
            f"lora_layers_to_transform={given!r}: the model has {count} layers, 0 to {count - 1}. Give numbers, "
            f"ranges such as {count // 2}-{count - 1}, or one share such as 0.5, the upper half."
        )
    return sorted(found)


def check_layers(config: LoraConfig, count: int) -> None:
    """Raises an OptionError for layers beyond the `count` of the model, or beside a pattern: PEFT overlooks both."""
    layers, targets = config.layers_to_transform, config.target_modules
    if layers is not None and isinstance(targets, str) and targets != "all-linear":
        raise OptionError(
            "lora_layers_to_transform has no effect beside a pattern of target_modules: give names, or put the layers "
            "into the pattern."
        )
    if not config.layers_pattern:
        layer_numbers(layers, count)
