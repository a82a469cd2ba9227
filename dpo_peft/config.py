"""Every option of a training run, one documented field each.

Names and defaults are those of `trl.DPOConfig` where it has them, so that a TRL script changes one import.
"""

import functools
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import TrainingArguments

from .config_checks import (
    OBJECTIVE_OPTIONS,
    check_choice,
    check_loss_type,
    check_number,
    check_objective_options,
    check_used,
    resolve_beta,
)
from .data import DISCOUNT_UNITS, TRUNCATION_MODES
from .errors import OptionError
from .evaluation_options import check_evaluation_options
from .losses import F_DIVERGENCES, REGISTRY
from .option_names import NOT_AVAILABLE, check_option_names


@dataclass
class DPOConfig(TrainingArguments):
    """Options of `DPOTrainer`; the rest are those of `transformers.TrainingArguments`.

    Defaults that differ from `TrainingArguments` are TRL's: `learning_rate` 1e-6, `logging_steps` 10,
    `gradient_checkpointing` on, `bf16` on unless `fp16` is. `logging_nan_inf_filter` is off: a non-finite loss stops
    the run.

    Raises:
        OptionError: an unknown option, one of `trl.DPOConfig` that isn't offered, a value of the wrong type or out of
            range, or an option that would have no effect.
    """

    # Model
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Arguments of `from_pretrained` for a model given by name (JSON on the command line)."},
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that ships with model or tokenizer."})
    quantize_base: bool | None = field(
        default=None,
        metadata={"help": "Load a model given by name in 4 bits (NF4, double quantisation). Default: yes."},
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Turn off all dropout, LoRA's included."})
    share_prompts: bool = field(
        default=True,
        metadata={"help": "Compute each prompt once for all its completions, where the model can (it is probed)."},
    )

    # Reference; docs/reference.md
    reference: str | None = field(
        default=None,
        metadata={
            "help": "What the policy is compared with: 'initial', the model as it comes in (a trained adapter is "
            "copied and frozen); 'base', the adapter off; or the folder of another adapter. Default: 'initial'."
        },
    )
    sync_ref_model: bool = field(
        default=False, metadata={"help": "TR-DPO: the reference follows the policy, a little every few steps."}
    )
    ref_model_mixup_alpha: float = field(
        default=0.6, metadata={"help": "sync_ref_model: reference = alpha * policy + (1 - alpha) * reference."}
    )
    ref_model_sync_steps: int = field(default=512, metadata={"help": "sync_ref_model: steps between two updates."})
    precompute_ref_log_probs: bool = field(
        default=False, metadata={"help": "Compute the reference's log-probs before training and keep them on disk."}
    )
    precompute_ref_tokens: int = field(
        default=16384, metadata={"help": "precompute_ref_log_probs: tokens of a forward pass."}
    )
    cache_ref_log_probs: bool = field(
        default=False,
        metadata={
            "help": "Keep the reference's log-probs on disk as they are computed; later epochs and runs read them."
        },
    )
    ref_cache_dir: str | None = field(
        default=None, metadata={"help": "Folder of the cached log-probs. Default: ~/.cache/dpo-peft/reference."}
    )
    ref_cache_gb: float = field(default=4.0, metadata={"help": "Size that the cache keeps within, in 10^9 bytes."})
    ref_cache_tokens: bool | None = field(
        default=None,
        metadata={
            "help": "Cache the log-prob of every token instead of sums; the kl metric needs it. Default: only if the "
            "objective reads them."
        },
    )

    # Data
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenise the dataset."})
    max_length: int | None = field(
        default=1024, metadata={"help": "Longest prompt + completion in tokens; longer ones are cut. None: no limit."}
    )
    truncation_mode: str = field(
        default="keep_start",
        metadata={
            "help": "What is cut beyond max_length: 'keep_start' keeps the first tokens, 'keep_end' the last, "
            "'trim_prompt' cuts the prompt's start and never a completion.",
            "choices": list(TRUNCATION_MODES),
        },
    )
    on_unusable: str = field(
        default="drop",
        metadata={
            "help": "Rows without a signal (equal completions, an empty one, no room for one): 'drop' leaves them out "
            "and reports the counts, 'error' stops.",
            "choices": ["drop", "error"],
        },
    )
    max_unusable_share: float = field(default=0.5, metadata={"help": "Stop if more than this share would be dropped."})

    # Speed and memory; docs/performance.md
    max_tokens_per_microbatch: int | str | None = field(
        default=None,
        metadata={
            "help": "Pack the rows of a whole optimizer step, or of an evaluation batch, into as few micro-batches as "
            "hold so many tokens each; the step stays the same. Or 'auto'. Default: no packing, micro-batches of "
            "per_device_train_batch_size rows."
        },
    )
    checkpoint_layers: int | str | None = field(
        default="auto",
        metadata={
            "help": "With gradient_checkpointing: how many of the first layers are recomputed in the backward pass. "
            "'auto': as many as memory requires, for each micro-batch anew."
        },
    )
    max_memory_gib: float | None = field(
        default=None,
        metadata={"help": "GPU memory that 'auto' keeps within, in GiB. Default: most of what is free at the start."},
    )
    activation_offloading: bool = field(
        default=False, metadata={"help": "Keep what checkpointed layers save in the CPU's memory: for long rows."}
    )
    fused_layers: bool | None = field(
        default=None,
        metadata={
            "help": "Compute decoder layers by our own kernels. Default: yes, on models that they are right for."
        },
    )

    # Objective; docs/objectives.md has an entry for each loss
    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={"help": f"The objective, or several for a weighted mix. Available: {', '.join(REGISTRY)}."},
    )
    loss_weights: list[float] | None = field(
        default=None, metadata={"help": "Weights of a mix, one per loss. Default: 1 each."}
    )
    beta: float | None = field(
        default=None,
        metadata={
            "help": "How strongly the policy is held to the reference. Default: the objective's own (DPO: 0.1)."
        },
    )
    label_smoothing: float = field(
        default=0.0, metadata={"help": "Share of the labels taken to be wrong (cDPO, robust, exo_pair, aot, ...)."}
    )
    reward_clip: float | None = field(
        default=None, metadata={"help": "Clip implicit rewards to [-reward_clip, reward_clip] inside the loss."}
    )
    f_divergence_type: str = field(
        default="reverse_kl",
        metadata={"help": "Divergence from the reference that is regularised.", "choices": list(F_DIVERGENCES)},
    )
    f_alpha_divergence_coef: float = field(default=0.5, metadata={"help": "Alpha of the alpha divergence."})
    ld_alpha: float | None = field(
        default=None,
        metadata={"help": "Weight of the tokens by which a completion is longer than its partner (LD-DPO)."},
    )
    use_weighting: bool = field(
        default=False, metadata={"help": "Weight pairs by how likely the policy is to write them (WPO)."}
    )
    discopop_tau: float = field(default=0.05, metadata={"help": "Temperature of the discopop loss."})
    ipo_length_normalize: bool = field(
        default=False, metadata={"help": "ipo: log-ratios per token, as TRL has them, instead of their sums."}
    )
    simpo_gamma: float = field(default=1.0, metadata={"help": "simpo: target margin of the rewards."})
    cpo_alpha: float = field(default=1.0, metadata={"help": "cpo: weight of its SFT term."})
    desirable_weight: float = field(default=1.0, metadata={"help": "kto: weight of desirable answers."})
    undesirable_weight: float = field(default=1.0, metadata={"help": "kto: weight of undesirable answers."})
    discount_gamma: float = field(
        default=1.0, metadata={"help": "trajectory: step t counts discount_gamma to the power of t."}
    )
    discount_unit: str = field(
        default="turn",
        metadata={"help": "trajectory: a step is an assistant's 'turn' or 'token'.", "choices": list(DISCOUNT_UNITS)},
    )

    # Evaluation while training; docs/diagnostics.md
    sample_prompts: int = field(
        default=0,
        metadata={
            "help": "Held-out prompts to answer before training and at every evaluation, for samples.jsonl and the "
            "model card; 4 are enough to see trouble. Default: none, as a batch of answers takes time and memory."
        },
    )
    sample_max_new_tokens: int = field(default=128, metadata={"help": "sample_prompts: longest answer, in tokens."})
    sample_temperature: float = field(
        default=0.0, metadata={"help": "sample_prompts: 0 takes the likeliest token each time, 1 samples."}
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "Stop after so many evaluations in a row without a better metric_for_best_model, which is then "
            "the held-out margin (eval_rewards/margins) if not set. Default: no early stopping."
        },
    )
    early_stopping_threshold: float = field(
        default=0.0, metadata={"help": "early_stopping_patience: by how much a better one must be better."}
    )

    # Defaults that differ from TrainingArguments
    learning_rate: float = field(default=1e-6, metadata={"help": "The initial learning rate."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps (a share of all if < 1)."})
    gradient_checkpointing: bool = field(
        default=True, metadata={"help": "Recompute activations in the backward pass to save memory."}
    )
    bf16: bool | None = field(default=None, metadata={"help": "Compute in bfloat16. Default: yes, unless fp16 is."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Not available: a non-finite loss stops the run."}
    )

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]

    def __post_init__(self) -> None:
        self._check_values()
        if self.bf16 is None:
            self.bf16 = not self.fp16
        # Newer transformers renames the option and warns about the old name, which is TRL's.
        if getattr(self, "activation_checkpointing", False) is None:
            self.activation_checkpointing = self.gradient_checkpointing
        try:
            super().__post_init__()
        except ValueError as error:
            raise OptionError(str(error)) from error
        if not isinstance(self.model_init_kwargs, (dict, type(None))):
            raise OptionError(f"model_init_kwargs={self.model_init_kwargs!r} must be a dict, or JSON like '{{...}}'.")

    def _check_values(self) -> None:
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        check_loss_type(self.loss_type, self.loss_weights)
        self.beta = resolve_beta(self.loss_type, self.beta)
        check_objective_options(self.loss_type, {name: getattr(self, name) for name in OBJECTIVE_OPTIONS})
        self._check_batch()
        self._check_memory()
        self._check_reference()
        check_evaluation_options(self)
        check_number(self, "learning_rate", minimum=0)
        check_number(self, "max_unusable_share", minimum=0, maximum=1)
        check_number(self, "max_length", minimum=2, optional=True, whole=True)
        check_number(self, "dataset_num_proc", minimum=1, optional=True, whole=True)
        check_choice("truncation_mode", self.truncation_mode, TRUNCATION_MODES)
        check_choice("on_unusable", self.on_unusable, ("drop", "error"))
        flags = "trust_remote_code disable_dropout share_prompts gradient_checkpointing sync_ref_model"
        for name in [*flags.split(), "precompute_ref_log_probs", "cache_ref_log_probs", "activation_offloading"]:
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name}={getattr(self, name)!r} must be True or False.")
        for name in ("quantize_base", "bf16", "ref_cache_tokens", "fused_layers"):
            if not isinstance(getattr(self, name), (bool, type(None))):
                raise OptionError(f"{name}={getattr(self, name)!r} must be True, False or None.")
        check_choice("train_sampling_strategy", self.train_sampling_strategy, ("random", "sequential"))
        for name, (harmless, why) in NOT_AVAILABLE.items():
            if getattr(self, name, harmless) not in (harmless, None):
                raise OptionError(f"{name}={getattr(self, name)!r} is not available here. {why}")

    @property
    def caches_reference(self) -> bool:
        """Whether the reference's log-probs are kept on disk."""
        return self.precompute_ref_log_probs or self.cache_ref_log_probs

    def _check_reference(self) -> None:
        check_number(self, "ref_model_mixup_alpha", above=0, maximum=1)
        check_number(self, "ref_model_sync_steps", minimum=1, whole=True)
        check_number(self, "precompute_ref_tokens", minimum=1, whole=True)
        check_number(self, "ref_cache_gb", above=0)
        used_with = {
            "ref_model_mixup_alpha": ("sync_ref_model", self.sync_ref_model),
            "ref_model_sync_steps": ("sync_ref_model", self.sync_ref_model),
            "precompute_ref_tokens": ("precompute_ref_log_probs", self.precompute_ref_log_probs),
        }
        cache = ("precompute_ref_log_probs or cache_ref_log_probs", self.caches_reference)
        used_with |= dict.fromkeys(("ref_cache_dir", "ref_cache_gb", "ref_cache_tokens"), cache)
        check_used(self, used_with)
        if not any(REGISTRY[name].needs_reference for name in self.loss_type):
            names = "reference sync_ref_model precompute_ref_log_probs cache_ref_log_probs".split()
            if given := [name for name in names if getattr(self, name)]:
                raise OptionError(
                    f"{', '.join(given)}: no effect, loss_type {', '.join(self.loss_type)} has no reference. Leave it "
                    "out."
                )
        if self.ref_cache_tokens is False and (self.ld_alpha is not None or self.discount_gamma != 1.0):
            raise OptionError("ref_cache_tokens=False: ld_alpha and discount_gamma read single tokens. Leave it out.")
        if self.precompute_ref_log_probs and self.cache_ref_log_probs:
            raise OptionError("cache_ref_log_probs has no effect with precompute_ref_log_probs: set one of them.")
        if self.caches_reference and self.sync_ref_model:
            raise OptionError("sync_ref_model changes the reference as it goes, so nothing of it can be cached.")
        if self.sync_ref_model and self.reference == "base":
            raise OptionError(
                "reference='base' is the bare model and can't follow the policy: leave sync_ref_model out."
            )
        if self.caches_reference and any("mismatched_scores_M" in REGISTRY[name].inputs for name in self.loss_type):
            raise OptionError(
                f"loss_type {', '.join(self.loss_type)} compares with mismatched answers that every batch draws anew: "
                "a cache would never hold them. Leave precompute_ref_log_probs and cache_ref_log_probs out."
            )

    def _check_memory(self) -> None:
        layers = "auto" if self.checkpoint_layers is None else self.checkpoint_layers
        self.checkpoint_layers = layers = int(layers) if str(layers).isdecimal() else layers  # text if from a shell
        if layers != "auto" and (isinstance(layers, bool) or not isinstance(layers, int) or layers < 0):
            raise OptionError(f"checkpoint_layers={layers!r} must be a whole number from 0, or 'auto'.")
        needing = {"checkpoint_layers": layers != "auto", "activation_offloading": self.activation_offloading}
        if not self.gradient_checkpointing and (given := [name for name, on in needing.items() if on]):
            raise OptionError(
                f"{', '.join(given)}: no effect without gradient_checkpointing: set it, or leave it out."
            )
        check_number(self, "max_memory_gib", above=0, optional=True)
        automatic = self.max_tokens_per_microbatch == "auto" or (self.gradient_checkpointing and layers == "auto")
        if self.max_memory_gib is not None and not automatic:
            remedy = "Set checkpoint_layers or max_tokens_per_microbatch to 'auto', or leave it out."
            raise OptionError(f"max_memory_gib={self.max_memory_gib} has no effect: nothing is 'auto'. {remedy}")

    def _check_batch(self) -> None:
        """The token budget, and what an objective that couples the samples of an optimizer batch needs of it."""
        budget = self.max_tokens_per_microbatch
        if isinstance(budget, str) and budget.isdecimal():  # from the command line
            self.max_tokens_per_microbatch = budget = int(budget)
        whole = isinstance(budget, int) and not isinstance(budget, bool) and budget >= 1
        if not whole and budget not in (None, "auto"):
            raise OptionError(f"max_tokens_per_microbatch={budget!r} must be a whole number from 1, 'auto' or None.")
        names = ", ".join(name for name in self.loss_type if REGISTRY[name].batch_coupled)
        if not names:
            return
        if (self.gradient_accumulation_steps > 1 or budget is not None) and self.disable_dropout is False:
            raise OptionError(
                f"disable_dropout=False with loss_type {names} needs gradient_accumulation_steps=1 and no "
                "max_tokens_per_microbatch: this loss couples micro-batches through a pass of its own, which would "
                "draw other dropout masks."
            )
        if self.per_device_train_batch_size * self.gradient_accumulation_steps < 2:
            raise OptionError(
                f"loss_type {names} compares the samples of a batch with each other: set per_device_train_batch_size "
                "or gradient_accumulation_steps to at least 2."
            )


def objective_options(config: DPOConfig) -> dict[str, Any]:
    """The options that losses read, by name."""
    return {name: getattr(config, name) for name in ("beta", *OBJECTIVE_OPTIONS)}


def _checked(init: Any) -> Any:
    known = {f.name for f in fields(DPOConfig)}

    @functools.wraps(init)
    def __init__(self: DPOConfig, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **check_option_names(kwargs, known))

    return __init__


# The generated __init__ would answer an unknown option with a bare TypeError.
DPOConfig.__init__ = _checked(DPOConfig.__init__)  # type: ignore[method-assign]
