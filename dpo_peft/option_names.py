"""Which names an option may have: those that exist, and a word on each of those that don't or can't be honoured."""

import difflib
from collections.abc import Mapping
from typing import Any

from .errors import OptionError

# Options of trl.DPOConfig (1.16) that this version doesn't offer: (TRL's default, what to do instead). Given at their
# default they change nothing and are accepted.
NOT_OFFERED: dict[str, tuple[Any, str]] = {
    "padding_free": (False, "Batches never hold padding here; leave it out."),
    "pad_to_multiple_of": ("auto", "Batches are packed without padding; leave it out."),
    "precompute_ref_batch_size": (None, "Set precompute_ref_tokens, the tokens of a forward pass."),
    "router_aux_loss_coef": (None, "The router's auxiliary loss is not available yet."),
    "pad_token": (None, "Set tokenizer.pad_token and pass the tokenizer as processing_class."),
}

# Options of TrainingArguments that would have no effect here, or a wrong one: (harmless value, what to do instead).
NOT_AVAILABLE: dict[str, tuple[Any, str]] = {
    "label_smoothing_factor": (0.0, "It smooths token labels, which this loss has none of."),
    "torch_compile": (False, "The trainer calls the backbone itself, which this option does not compile."),
    "logging_nan_inf_filter": (False, "A non-finite loss stops the run; it is never filtered out."),
    "neftune_noise_alpha": (None, "Noise on the policy alone would enter the implicit rewards; leave it out."),
    "label_names": (None, "Pairs have no labels; leave it out."),
    "include_for_metrics": ([], "compute_metrics gets the implicit rewards; leave it out."),
    "fsdp": (None, "In several processes each holds the whole model: use recipes/accelerate/ddp.yaml instead."),
    "deepspeed": (None, "In several processes each holds the whole model: use recipes/accelerate/ddp.yaml instead."),
    "auto_find_batch_size": (False, "A micro-batch that runs out of memory is halved by itself; leave it out."),
    "enable_jit_checkpoint": (False, "SIGTERM always saves a checkpoint here; leave it out."),
}


def check_option_names(given: Mapping[str, Any], known: set[str]) -> dict[str, Any]:
    """Keep the options that exist; refuse the others with a word on each.

    Args:
        given: option name to value.
        known: the names that exist.

    Returns:
        `given` without the options of `trl.DPOConfig` that stand at a default with which nothing changes.

    Raises:
        OptionError: an unknown option, or one of `trl.DPOConfig` that isn't offered.
    """
    kept = {}
    for name, value in given.items():
        if name in known:
            kept[name] = value
        elif name in NOT_OFFERED:
            default, remedy = NOT_OFFERED[name]
            if value != default and str(value).lower() != str(default).lower():  # a command line gives text
                raise OptionError(f"{name}={value!r} is an option of trl.DPOConfig that isn't offered here. {remedy}")
        else:
            close = difflib.get_close_matches(name, known | set(NOT_OFFERED), n=1)
            hint = f"Did you mean {close[0]!r}?" if close else "`dpo-peft train --help` lists them all."
            raise OptionError(f"{name!r} is not an option. {hint}")
    return kept
