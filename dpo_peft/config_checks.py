"""What the values of options may be: stated at each field, checked in one loop; and which options go together.

`number`, `whole`, `flag`, `choice` and `free` make the fields of `DPOConfig`. Everything is checked when a config is
made, before anything is loaded; what reads the options later trusts them. Every check raises `OptionError` with the
option's name, what is wrong with its value, and the remedy.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from enum import EnumMeta
from typing import Any, get_args, get_type_hints

import torch

from .errors import OptionError, refuse
from .losses import REGISTRY, Objective, find_objective
from .losses.registry import load_objective
from .spelling import meant

# Options of trl.DPOConfig (1.16) that this version doesn't offer: (values that change nothing and are accepted, TRL's
# default among them; what to do instead).
NOT_OFFERED: dict[str, tuple[tuple[Any, ...], str]] = {
    "padding_free": ((False,), "Batches never hold padding here; leave it out."),
    "pad_to_multiple_of": (("auto", None), "Batches are packed without padding; leave it out."),
    "precompute_ref_batch_size": ((None,), "Set precompute_ref_tokens, the tokens of a forward pass."),
    "pad_token": ((None,), "Set tokenizer.pad_token and pass the tokenizer as processing_class."),
}
# Options of older versions of TRL and of its other trainers: what does the same here.
SUCCESSORS = {
    "alpha": "For AlphaPO set loss_type='simpo' and alphapo_alpha; for an alpha divergence "
    "f_divergence_type='alpha_divergence' and f_alpha_divergence_coef.",
    "rpo_alpha": "Set loss_type=['sigmoid', 'sft'] and loss_weights=[1.0, rpo_alpha].",
    "max_prompt_length": "Set max_length, and truncation_mode='trim_prompt' to shorten the prompt first.",
    "max_completion_length": "Set max_length, and truncation_mode='trim_prompt' to shorten the prompt first.",
    "reference_free": "Set loss_type to one without a reference, such as 'simpo', 'cpo' or 'orpo'.",
    "ref_adapter_name": "Set reference to the folder of the adapter that is the reference, or to 'base'.",
    "model_adapter_name": "The active adapter of the model is trained; leave it out.",
    "force_use_ref_model": "The reference is the model without its adapter; leave it out.",
    "padding_value": "Batches never hold padding here; leave it out.",
    "label_pad_token_id": "Batches never hold padding here; leave it out.",
    "is_encoder_decoder": "Only decoders are trained; leave it out.",
    "generate_during_eval": "Set sample_prompts, the number of prompts to complete at every evaluation.",
    "group_by_length": "Rows are packed by their tokens; leave it out.",
    "torch_dtype": "Set model_init_kwargs={'dtype': ...}.",
    "use_peft": "An adapter is always trained; leave it out.",
    "use_logits_to_keep": "Logits are computed where a completion is predicted alone; leave it out.",
    "use_num_logits_to_keep": "Logits are computed where a completion is predicted alone; leave it out.",
    "use_liger_loss": "The loss is computed in pieces that fit; leave it out.",
}
# Options that only TRL's other configs have: there, names of losses mean others than here.
_CPO = (
    "It is an option of trl.CPOConfig, whose losses are others: its 'sigmoid', 'hinge' and 'ipo' are loss_type='cpo', "
    "'cpo_hinge' and 'cpo_ipo', its 'simpo' is loss_type=['simpo', 'sft'] with loss_weights=[1.0, cpo_alpha]."
)
_KTO = "It is an option of trl.KTOConfig: set loss_type='kto'."
OF_OTHER_CONFIGS = dict.fromkeys(("cpo_alpha", "simpo_gamma"), _CPO) | dict.fromkeys(
    ("desirable_weight", "undesirable_weight"), _KTO
)
_FULL_EVAL = "It would round the adapter's weights for good. Evaluation computes as training does: set bf16."
_COMPILE = "The trainer calls the backbone itself, which this option does not compile; leave it out."
_NO_WRAPPER = "Several processes train without a wrapper of DistributedDataParallel; leave it out."
_FSDP = "The frozen base is sharded by fsdp='full_shard', or by the file that `dpo-peft recipes fsdp2` shows"
# Options of TrainingArguments that would have no effect here, or a wrong one: (harmless value, what to do instead).
NOT_AVAILABLE: dict[str, tuple[Any, str]] = {
    "label_smoothing_factor": (0.0, "It smooths token labels, which this loss has none of."),
    **dict.fromkeys(("bf16_full_eval", "fp16_full_eval"), (False, _FULL_EVAL)),
    "torch_compile": (False, _COMPILE),
    **dict.fromkeys(("torch_compile_backend", "torch_compile_mode"), (None, _COMPILE)),
    "use_liger_kernel": (False, "The fused layers (fused_layers) take its place; leave it out."),
    "liger_kernel_config": (None, "The fused layers (fused_layers) take its place; leave it out."),
    "neftune_noise_alpha": (None, "Noise on the policy alone would enter the implicit rewards; leave it out."),
    "label_names": (None, "Pairs have no labels; leave it out."),
    "include_for_metrics": ([], "compute_metrics gets the implicit rewards; leave it out."),
    **dict.fromkeys(
        ("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph"),
        (None, _NO_WRAPPER),
    ),
    "fsdp_config": (None, f"{_FSDP}, and there is nothing else to set; leave it out."),
    "deepspeed": (None, f"{_FSDP}; leave it out. DeepSpeed would split what is trained, which here is small."),
    "auto_find_batch_size": (False, "A micro-batch that runs out of memory is halved by itself; leave it out."),
    "enable_jit_checkpoint": (False, "SIGTERM always saves a checkpoint here; leave it out."),
}


# ---- Fields and their rules -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """What the value of an option may be."""

    kinds: tuple[type, ...] = ()  # bool, or numbers; none: it is checked elsewhere, or by its choices
    above: float = -math.inf
    minimum: float = -math.inf
    maximum: float = math.inf
    below: float = math.inf
    choices: Sequence[str] = ()
    optional: bool = False  # it may be None
    auto: bool = False  # it may be 'auto'; a number may come as text, from a shell
    needs: str = ""  # the option without which it has no effect, or several joined by " or "

    def check(self, name: str, value: Any) -> None:
        """Refuses a value that the option `name` can't have."""
        if (self.optional and value is None) or (self.auto and value == "auto"):
            return
        whole = "a number" if float in self.kinds else "a whole number"
        bounds = {"above": self.above, "at least": self.minimum, "at most": self.maximum, "below": self.below}
        within = " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if math.isfinite(bound))
        good = is_number(value) and self.above < value < self.below and self.minimum <= value <= self.maximum
        expected = None
        if self.choices and value not in self.choices:
            expected = f"one of {', '.join(map(repr, self.choices))}"
        elif self.kinds == (bool,) and not isinstance(value, bool):
            expected = f"True{', False or None' if self.optional else ' or False'}"
        elif self.auto and not (good and isinstance(value, int)):
            expected = f"a whole number from {self.minimum}, 'auto' or None"
        elif int in self.kinds and not good:
            expected = f"{whole} {within}".rstrip()
        elif int in self.kinds and not isinstance(value, self.kinds):
            expected = f"{whole}{' or None' if self.optional else ''}"
        if expected:
            raise OptionError(f"{name}={value!r} must be {expected}.{meant(value, self.choices)}")


def is_number(value: Any) -> bool:
    """Returns whether a value is a finite number; True and False are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


class _Metadata(dict[str, Any]):
    """A field's help and choices, which command line parsers copy item by item; the rule is no item, but is got."""

    rule: Rule

    def get(self, name: str, default: Any = None) -> Any:
        return self.rule if name == "rule" else super().get(name, default)


def _option(default: Any, text: str, rule: Rule) -> Any:
    metadata = _Metadata({"help": text, "choices": list(rule.choices)} if rule.choices else {"help": text})
    metadata.rule = rule
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def free(default: Any, text: str, needs: str = "") -> Any:
    """Makes a field whose values are not checked by themselves."""
    return _option(default, text, Rule(needs=needs))


def flag(default: bool | None, text: str, needs: str = "") -> Any:
    """Makes a field that is True or False, or None if that is its default."""
    return _option(default, text, Rule((bool,), optional=default is None, needs=needs))


def choice(default: str, choices: Sequence[str], text: str) -> Any:
    """Makes a field that is one of `choices`."""
    return _option(default, text, Rule(choices=choices))


def number(default: float | None, text: str, **rule: Any) -> Any:
    """Makes a field that is a number, or None if that is its default. `rule`: see `Rule`."""
    return _option(default, text, Rule((int, float), optional=default is None, **rule))


def whole(default: float | str | None, minimum: int, text: str, optional: bool = False, **rule: Any) -> Any:
    """Makes a field that is a whole number from `minimum` on; None too if it is optional or that is its default."""
    return _option(default, text, Rule((int,), minimum=minimum, optional=optional or default is None, **rule))


def _rule_of(one: Field[Any], hint: Any) -> Rule:
    """Returns the rule of a field. Inherited ones have none but their type: the text "no" would count as true."""
    if (rule := one.metadata.get("rule")) is not None:
        return rule
    kinds = [hint, *get_args(hint)]
    values = [[*kind._value2member_map_] for kind in kinds if isinstance(kind, EnumMeta)]
    plain = tuple(kind for kind in (bool, int) if kind in kinds and str not in kinds)
    return Rule(plain, choices=values[0] if values else (), optional=one.default is None)


def check_fields(options: Any, losses: Sequence[Objective]) -> None:
    """Refuses values against the rule of their field, and those that have no effect without another option or loss."""
    off, hints = (None, False, 0, "no"), get_type_hints(type(options))
    for one in fields(options):
        rule, value = _rule_of(one, hints[one.name]), getattr(options, one.name)
        if rule.auto and isinstance(value, str) and value.isdecimal():
            value = int(value)
            setattr(options, one.name, value)
        rule.check(one.name, value)
        if value == one.default:
            continue
        if rule.needs and all(getattr(options, name) in off for name in rule.needs.split(" or ")):
            raise OptionError(f"{one.name}={value!r} has no effect without {rule.needs}: set it too.")
        check_read(options, one.name, losses)
    for name, (harmless, why) in NOT_AVAILABLE.items():
        if getattr(options, name, harmless) not in (harmless, None):  # older versions of transformers lack some
            raise OptionError(f"{name}={getattr(options, name)!r} is not available here. {why}")


# Of numbers that transformers takes as they come: those that would make the weights NaN, or train nothing.
INHERITED = {
    **dict.fromkeys(("learning_rate", "weight_decay", "max_grad_norm"), Rule((int, float), minimum=0)),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), Rule((int, float), minimum=0, below=1)),
    "adam_epsilon": Rule((int, float), above=0),
    "num_train_epochs": Rule((int, float), above=0),
    **dict.fromkeys(
        ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
        Rule((int,), minimum=1),
    ),
    "save_total_limit": Rule((int,), minimum=1, optional=True),
    "seed": Rule((int,), minimum=0),
}


def check_inherited(options: Any) -> None:
    """Refuses numbers that `TrainingArguments` would take, and that would stop or spoil the run later."""
    for name, rule in INHERITED.items():
        rule.check(name, getattr(options, name))
    o = options
    refuse(
        {
            f"max_steps={o.max_steps} trains nothing: give at least 1, or leave it out.": o.max_steps is None
            or (o.max_steps < 1 and o.max_steps != -1),
            f"save_steps={o.save_steps} must be above 0. To save no checkpoints set save_strategy to 'no'.": (
                o.save_strategy == "steps" and o.save_steps <= 0
            ),
            f"eval_steps={o.eval_steps} must be above 0. To evaluate never set eval_strategy to 'no'.": (
                o.eval_strategy == "steps" and o.eval_steps is not None and o.eval_steps <= 0
            ),
        }
    )


def check_read(options: Any, name: str, losses: Sequence[Objective]) -> None:
    """Refuses an option that was given and that losses read, but none of these."""
    readers = [reader for reader, loss in REGISTRY.items() if name in loss.options and name != "beta"]
    if readers and not any(name in loss.heeds for loss in losses):
        use = f"leave it out, or use one of {', '.join(readers)}. {OF_OTHER_CONFIGS.get(name, '')}".rstrip()
        raise OptionError(f"{name}={getattr(options, name)!r} has no effect on loss_type={options.loss_type!r}: {use}")


def check_option_names(given: Mapping[str, Any], known: set[str]) -> dict[str, Any]:
    """Returns the options that are known; refuses others, but leaves out those of TRL that change nothing as given."""
    kept = {}
    for name, value in given.items():
        if name in known:
            kept[name] = value
        elif name in NOT_OFFERED:
            harmless, remedy = NOT_OFFERED[name]
            if str(value).lower() not in [str(one).lower() for one in harmless]:  # a command line gives text
                raise OptionError(f"{name}={value!r} is an option of trl.DPOConfig that isn't offered here. {remedy}")
        elif name in SUCCESSORS:
            raise OptionError(f"{name!r} is an option of TRL that isn't offered here. {SUCCESSORS[name]}")
        else:
            hint = meant(name, known | set(NOT_OFFERED)) or " `dpo-peft train --help-all` lists them all."
            raise OptionError(f"{name!r} is not an option.{hint}")
    return kept


# ---- The objective --------------------------------------------------------------------------------------------------


def check_loss_type(loss_type: Any, loss_weights: Any) -> list[Objective]:
    """Refuses unknown losses, mixes that can't learn from the same data, and weights that don't match.

    Returns:
        The losses.
    """
    known = isinstance(loss_type, list) and all(name in REGISTRY or ":" in str(name) for name in loss_type)
    if not known or not loss_type:
        others = [name for name in loss_type if name not in REGISTRY] if isinstance(loss_type, list) else [loss_type]
        hint = next((found for name in others if (found := meant(name, REGISTRY))), "")
        raise OptionError(
            f"loss_type={loss_type!r} is not available.{hint} Use one or several of {', '.join(REGISTRY)}, or your "
            "own function as file.py:function."
        )
    load_objective.cache_clear()  # a file that was changed since the last config is read anew
    losses = [find_objective(name) for name in loss_type]
    kinds = {loss.data: name for name, loss in zip(loss_type, losses, strict=True)}
    needs = " but ".join(f"{name!r} learns from {data}" for data, name in kinds.items())
    weights = [1.0] * len(losses) if loss_weights is None else loss_weights
    one_each = isinstance(weights, list) and len(weights) == len(losses)
    refuse(
        {
            f"loss_type={loss_type!r} names a loss twice: give it once, with the sum of the weights.": (
                len(set(loss_type)) < len(loss_type)
            ),
            f"loss_type={loss_type!r} can't be mixed: {needs}. Choose losses of one kind.": len(kinds) > 1,
            f"loss_weights={loss_weights!r} must be a list with one number per loss of {loss_type}.": not one_each,
            f"loss_weights={loss_weights!r} must be positive numbers: leave out a loss with weight 0.": (
                one_each and not all(is_number(weight) and weight > 0 for weight in weights)
            ),
        }
    )
    return losses


def resolve_beta(loss_type: Sequence[str], beta: float | None) -> float | None:
    """Returns `beta` if given, or the default that the losses agree on; None if none of them has a beta."""
    defaults = {name: one.default_beta for name in loss_type if "beta" in (one := find_objective(name)).options}
    if beta is not None and not defaults:
        raise OptionError(f"beta has no effect on loss_type={list(loss_type)!r}: leave it out.")
    if beta is None and len(set(defaults.values())) > 1:
        raise OptionError(f"beta must be given for loss_type={list(loss_type)!r}: their defaults differ ({defaults}).")
    return next(iter(defaults.values()), None) if beta is None else float(beta)


def check_loss_options(options: Any, losses: Sequence[Objective]) -> None:
    """Refuses options of losses from outside that none of them has."""
    known = {name for loss in losses if not loss.name for name in loss.keywords} - {"beta"}
    for name in options.loss_options or ():
        if name not in known:
            remedy = f"their options are {', '.join(sorted(known))}" if known else "leave it out"
            raise OptionError(f"loss_options[{name!r}] has no effect on loss_type={options.loss_type!r}: {remedy}.")


# ---- Options together -----------------------------------------------------------------------------------------------


def check_together(o: Any, losses: Sequence[Objective]) -> None:
    """Refuses options that contradict each other, and those without effect beside the value of another."""
    mix = ", ".join(o.loss_type)
    coupled = ", ".join(name for name, loss in zip(o.loss_type, losses, strict=True) if loss.batch_coupled)
    automatic = "auto" in (o.max_tokens_per_microbatch, o.gradient_checkpointing and o.checkpoint_layers)
    layers = {"checkpoint_layers": o.checkpoint_layers != "auto", "activation_offloading": o.activation_offloading}
    layered = ", ".join(name for name, on in layers.items() if on and not o.gradient_checkpointing)
    of_reference = ("reference", "sync_ref_model", "precompute_ref_log_probs", "cache_ref_log_probs")
    referring = ", ".join(name for name in of_reference if getattr(o, name))
    compared = any(loss.needs_reference for loss in losses)
    split = o.gradient_accumulation_steps > 1 or o.max_tokens_per_microbatch is not None or o.full_determinism
    single = o.per_device_train_batch_size * o.gradient_accumulation_steps < 2
    mismatched = any("mismatched_scores_M" in loss.inputs for loss in losses)
    tokens = o.ld_alpha is not None or o.discount_gamma != 1.0
    alpha = o.f_divergence_type == "alpha_divergence"
    of_optimizer = ("galore", "lomo", "apollo")
    problems: dict[str, object] = {
        f"optim_target_modules has no effect with optim={str(o.optim)!r}: leave it out.": (
            o.optim_target_modules is not None and not any(name in str(o.optim) for name in of_optimizer)
        ),
        "f_alpha_divergence_coef has no effect without f_divergence_type='alpha_divergence'.": (
            o.f_alpha_divergence_coef != 0.5 and not alpha
        ),
        "discount_unit has no effect while discount_gamma is 1: set discount_gamma below 1.": (
            o.discount_unit != "turn" and o.discount_gamma == 1.0
        ),
        "loss_type 'exo_pair' needs label_smoothing above 0, such as 0.001 (it takes its logarithm).": (
            "exo_pair" in o.loss_type and not o.label_smoothing
        ),
        f"{referring}: no effect, loss_type {mix} has no reference. Leave it out.": referring and not compared,
        "ref_cache_tokens=False: ld_alpha and discount_gamma read single tokens. Leave it out.": (
            o.ref_cache_tokens is False and tokens
        ),
        "cache_ref_log_probs has no effect with precompute_ref_log_probs: set one of them.": (
            o.precompute_ref_log_probs and o.cache_ref_log_probs
        ),
        "sync_ref_model changes the reference as it goes, so nothing of it can be cached.": (
            o.caches_reference and o.sync_ref_model
        ),
        "reference='base' is the bare model and can't follow the policy: leave sync_ref_model out.": (
            o.sync_ref_model and o.reference == "base"
        ),
        f"unpair_preferences has no effect on loss_type {mix}, which doesn't learn from single completions: leave it "
        "out.": o.unpair_preferences and losses[0].data != "singles",
        f"stream_layers={o.stream_layers!r} with fsdp={o.fsdp!r}: the layers are sharded already. Set one.": (
            o.stream_layers is not None and o.fsdp
        ),
        f"{layered}: no effect without gradient_checkpointing: set it, or leave it out.": layered,
        f"max_memory_gib={o.max_memory_gib} has no effect: nothing is 'auto'. Set checkpoint_layers or "
        "max_tokens_per_microbatch to 'auto', or leave it out.": o.max_memory_gib is not None and not automatic,
        f"disable_dropout=False with loss_type {coupled} needs gradient_accumulation_steps=1 and no "
        "max_tokens_per_microbatch or full_determinism: this loss couples micro-batches through a pass of its own, "
        "which would draw other dropout masks.": coupled and not o.disable_dropout and split,
        f"loss_type {coupled} compares the samples of a batch with each other: set per_device_train_batch_size or "
        "gradient_accumulation_steps to at least 2.": coupled and single,
        f"per_device_eval_batch_size={o.per_device_eval_batch_size}: loss_type {mix} takes its reference point from "
        "other rows of a batch, in an evaluation too. Set it to at least 2.": (
            mismatched and o.per_device_eval_batch_size < 2
        ),
    }
    refuse(problems)


def check_fp8(o: Any) -> None:
    """Refuses FP8 products in another dtype than bfloat16, and on a GPU that has none."""
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
    has = capability >= (8, 9) or o.use_cpu or not torch.accelerator.is_available()
    needs = "fp8_products=True needs a GPU of compute capability 8.9 or higher (Ada, Hopper, Blackwell): leave it out."
    other = "fp8_products=True computes the rest in bfloat16: leave it out, or fp16 and bf16=False."
    refuse({needs: o.fp8_products and not has, other: o.fp8_products and (o.fp16 or o.bf16 is False)})
