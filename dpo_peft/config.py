"""Every option of a training run, one documented field each.

Names and defaults are those of `trl.DPOConfig` where it has them, so that a TRL script changes one import.
"""

import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers import TrainingArguments

from .config_checks import (
    OF_OTHER_CONFIGS,
    check_fields,
    check_fp8,
    check_inherited,
    check_loss_options,
    check_loss_type,
    check_option_names,
    check_read,
    check_together,
    choice,
    flag,
    free,
    number,
    resolve_beta,
    whole,
)
from .credentials import without_secrets
from .data import DISCOUNT_UNITS, TRUNCATION_MODES
from .distributed import sharding
from .errors import OptionError
from .losses import F_DIVERGENCES, REGISTRY, find_objective

logger = logging.getLogger(__name__)

# Of the metrics that are better when they are smaller, how their names end.
SMALLER_IS_BETTER = ("loss", "kl", "sample_weight", "rejected")
_CACHED = "precompute_ref_log_probs or cache_ref_log_probs"


@dataclass
class DPOConfig(TrainingArguments):
    """Options of `DPOTrainer`; the rest are those of `transformers.TrainingArguments`.

    Defaults that differ from `TrainingArguments` are TRL's: `logging_steps` 10, `gradient_checkpointing` on, `bf16` on
    unless `fp16` is. Our own are `learning_rate` 2e-5, made for LoRA (docs/from-trl.md; TRL: 1e-6), and
    `logging_nan_inf_filter` off: a non-finite loss stops the run.

    Raises:
        OptionError: an unknown option, one of `trl.DPOConfig` that isn't offered, a value of the wrong type or out of
            range, or an option that would have no effect.
    """

    # Model
    model_init_kwargs: dict[str, Any] | str | None = free(
        None, "Arguments of `from_pretrained` for a model given by name (JSON on the command line)."
    )
    trust_remote_code: bool = flag(False, "Run code that ships with model or tokenizer.")
    quantize_base: bool | None = flag(
        None, "Load a model given by name in 4 bits (NF4, double quantization). Default: yes."
    )
    lora_experts: bool = flag(False, "Put the adapter on the experts of a mixture too, not only on its linear layers.")
    lora_vision: bool = flag(
        False, "Put the adapter on what reads images too, tower and projector: they are encoded twice a step."
    )
    disable_dropout: bool = flag(True, "Turn off all dropout, LoRA's included.")
    share_prompts: bool = flag(
        True, "Compute each prompt once for all its completions, where the model can (it is probed)."
    )

    # Reference; docs/reference.md
    reference: str | None = free(
        None,
        "What the policy is compared with: 'initial', the model as it comes in (a trained adapter is copied and "
        "frozen); 'base', the adapter off; or the folder of another adapter. Default: 'initial'.",
    )
    sync_ref_model: bool = flag(False, "TR-DPO: the reference follows the policy, a little every few steps.")
    ref_model_mixup_alpha: float = number(
        0.6,
        "sync_ref_model: reference = alpha * policy + (1 - alpha) * reference.",
        above=0,
        maximum=1,
        needs="sync_ref_model",
    )
    ref_model_sync_steps: int = whole(512, 1, "sync_ref_model: steps between two updates.", needs="sync_ref_model")
    precompute_ref_log_probs: bool = flag(
        False, "Compute the reference's log-probs before training and keep them on disk."
    )
    precompute_ref_tokens: int = whole(
        16384, 1, "precompute_ref_log_probs: tokens of a forward pass.", needs="precompute_ref_log_probs"
    )
    cache_ref_log_probs: bool = flag(
        False, "Keep the reference's log-probs on disk as they are computed; later epochs and runs read them."
    )
    ref_cache_dir: str | None = free(
        None, "Folder of the cached log-probs. Default: ~/.cache/dpo-peft/reference.", needs=_CACHED
    )
    ref_cache_gb: float = number(4.0, "Size that the cache keeps within, in 10^9 bytes.", above=0, needs=_CACHED)
    ref_cache_tokens: bool | None = flag(
        None,
        "Cache the log-prob of every token instead of sums; the kl metric needs it. Default: only if the objective "
        "reads them.",
        needs=_CACHED,
    )

    # Data
    dataset_num_proc: int | None = whole(None, 1, "Processes that tokenize the dataset.")
    max_length: int | None = whole(
        1024, 2, "Longest prompt + completion in tokens; longer ones are cut. None: no limit.", optional=True
    )
    truncation_mode: str = choice(
        "keep_start",
        TRUNCATION_MODES,
        "What is cut beyond max_length: 'keep_start' keeps the first tokens, 'keep_end' the last, 'trim_prompt' cuts "
        "the prompt's start and never a completion.",
    )
    on_unusable: str = choice(
        "drop",
        ("drop", "error"),
        "Rows without a signal (equal completions, an empty one, no room for one): 'drop' leaves them out and reports "
        "the counts, 'error' stops.",
    )
    max_unusable_share: float = number(0.5, "Stop if more than this share would be dropped.", minimum=0, maximum=1)
    unneeded_columns: list[str] | None = free(
        None, "Columns with text that may stay unread; any other stops the run before it starts."
    )
    as_chat: bool | None = flag(
        None,
        "Text rows go into the chat template: prompts as the user's turn, completions as the assistant's. Default: if "
        "the model has one, and the prompts aren't rendered already; false trains the text as it is.",
    )
    unpair_preferences: bool = flag(
        False, "kto, apo_zero_unpaired: a row of several completions becomes a row for each, as TRL counts them."
    )

    # Speed and memory; docs/performance.md
    max_tokens_per_microbatch: int | str | None = whole(
        None,
        1,
        "Pack the rows of a whole optimizer step, or of an evaluation batch, into as few micro-batches as hold so "
        "many tokens each; the step stays the same. Or 'auto'. Default: no packing, micro-batches of "
        "per_device_train_batch_size rows.",
        auto=True,
    )
    checkpoint_layers: int | str | None = whole(
        "auto",
        0,
        "With gradient_checkpointing: how many of the first layers are recomputed in the backward pass. 'auto': as "
        "many as memory requires, for each micro-batch anew.",
        optional=True,
        auto=True,
    )
    max_memory_gib: float | None = number(
        None, "GPU memory that 'auto' keeps within, in GiB. Default: most of what is free at the start.", above=0
    )
    stream_layers: int | str | None = whole(
        None,
        1,
        "Keep the frozen weights of so many decoder layers in the CPU's memory, and copy each to the GPU as it runs: "
        "for a base that is too large for it. 'auto': as many as the GPU can't hold.",
        optional=True,
        auto=True,
    )
    activation_offloading: bool = flag(False, "Keep what checkpointed layers save in the CPU's memory: for long rows.")
    fused_layers: bool | None = flag(
        None, "Compute decoder layers by our own kernels. Default: yes, on models that they are right for."
    )
    fp8_products: bool = flag(
        False,
        "Experimental: multiply frozen weights in FP8, on GPUs that can (docs/quantization.md). A CPU does it slowly.",
        needs="fused_layers",
    )

    # Objective; docs/objectives.md has an entry for each loss
    loss_type: list[str] = free(
        ["sigmoid"],
        f"The objective, or several for a weighted mix. Available: {', '.join(REGISTRY)}; or your own function as "
        "file.py:function.",
    )
    loss_weights: list[float] | None = free(None, "Weights of a mix, one per loss. Default: 1 each.")
    loss_options: dict[str, Any] | str | None = free(
        None, "Options of losses of your own, by name (JSON on the command line)."
    )
    beta: float | None = number(
        None, "How strongly the policy is held to the reference. Default: the objective's own (DPO: 0.1).", above=0
    )
    label_smoothing: float = number(
        0.0, "Share of the labels taken to be wrong (cDPO, robust, exo_pair, aot, ...).", minimum=0, below=0.5
    )
    reward_clip: float | None = number(
        None, "Clip implicit rewards to [-reward_clip, reward_clip] inside the loss.", above=0
    )
    f_divergence_type: str = choice("reverse_kl", F_DIVERGENCES, "Divergence from the reference that is regularized.")
    f_alpha_divergence_coef: float = number(0.5, "Alpha of the alpha divergence.")
    ld_alpha: float | None = number(
        None, "Weight of the tokens by which a completion is longer than its partner (LD-DPO).", minimum=0, maximum=1
    )
    router_aux_loss_coef: float | None = number(
        None, "Weight of the auxiliary loss of a mixture of experts. Default: as its config says. 0: none.", minimum=0
    )
    use_weighting: bool = flag(False, "Weight pairs by how likely the policy is to write them (WPO).")
    discopop_tau: float = number(0.05, "Temperature of the discopop loss.", above=0)
    ipo_length_normalize: bool = flag(False, "ipo: log-ratios per token, as TRL has them, instead of their sums.")
    simpo_gamma: float = number(1.0, "simpo: target margin of the rewards.", minimum=0)
    alphapo_alpha: float = number(0.0, "simpo: AlphaPO's alpha, the shape of its rewards; 0 is SimPO.")
    cpo_alpha: float = number(1.0, "cpo, cpo_hinge, cpo_ipo: weight of the SFT term.", minimum=0)
    desirable_weight: float = number(1.0, "kto: weight of desirable completions.", above=0)
    undesirable_weight: float = number(1.0, "kto: weight of undesirable completions.", above=0)
    discount_gamma: float = number(
        1.0, "trajectory: step t counts discount_gamma to the power of t.", above=0, maximum=1
    )
    discount_unit: str = choice("turn", DISCOUNT_UNITS, "trajectory: a step is an assistant's 'turn' or 'token'.")

    # Evaluation while training; docs/diagnostics.md
    sample_prompts: int = whole(
        0,
        0,
        "Held-out prompts to answer before training and at every evaluation, for samples.jsonl and the model card; 4 "
        "are enough to see trouble. Default: none, as a batch of completions takes time and memory.",
    )
    sample_max_new_tokens: int = whole(128, 1, "sample_prompts: most tokens of each.", needs="sample_prompts")
    sample_temperature: float = number(
        0.0, "sample_prompts: 0 takes the likeliest token each time, 1 samples.", minimum=0, needs="sample_prompts"
    )
    early_stopping_patience: int | None = whole(
        None,
        1,
        "Stop after so many evaluations in a row without a better metric_for_best_model, which is then the held-out "
        "margin (eval_rewards/margins) if not set. Default: no early stopping.",
        needs="eval_strategy",
    )
    early_stopping_threshold: float = number(
        0.0,
        "early_stopping_patience: by how much a better one must be better.",
        minimum=0,
        needs="early_stopping_patience",
    )

    log_file: str | None = free(
        None, "File that everything shown is added to as well, with the time; without bars. Default: none."
    )
    overwrite_output_dir: bool = flag(
        False, "Begin a new run in a folder that holds a finished one, which is replaced at the end."
    )

    # Options of TrainingArguments with another default, or fewer values
    train_sampling_strategy: str = choice("random", ("random", "sequential"), "Order of the rows.")
    learning_rate: float = number(2e-5, "The initial learning rate.", minimum=0)
    logging_steps: float = free(10, "Log every so many steps (a share of all if < 1).")
    gradient_checkpointing: bool = flag(True, "Recompute activations in the backward pass to save memory.")
    bf16: bool | None = flag(None, "Compute in bfloat16. Default: yes, unless fp16 is.")
    logging_nan_inf_filter: bool = free(False, "Always off: a loss that is not finite stops the run.")

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs", "loss_options"]

    def __post_init__(self) -> None:
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        for name in ("eval_strategy", "save_strategy", "logging_strategy"):
            if getattr(self, name) is False:  # what YAML reads an unquoted `no` as
                setattr(self, name, "no")
        self.fsdp_config = self.fsdp_config or None  # type: ignore[has-type]
        check_inherited(self)
        losses = check_loss_type(self.loss_type, self.loss_weights)
        check_fields(self, losses)
        self.beta = resolve_beta(self.loss_type, self.beta)
        self.checkpoint_layers = "auto" if self.checkpoint_layers is None else self.checkpoint_layers
        check_together(self, losses)
        check_fp8(self)
        if self.early_stopping_patience is not None and self.metric_for_best_model is None:  # type: ignore[has-type]
            self.metric_for_best_model = "eval_rewards/margins"
        # transformers knows only that a loss should be small.
        if self.metric_for_best_model is not None and self.greater_is_better is None:  # type: ignore[has-type]
            self.greater_is_better = not self.metric_for_best_model.endswith(SMALLER_IS_BETTER)
        if self.bf16 is None:
            self.bf16 = not self.fp16
        if not self.use_cpu and not torch.accelerator.is_available():  # type: ignore[has-type]
            self.use_cpu = True
            _warn_of_cpu()
        # Newer transformers renames the option and warns about the old name, which is TRL's.
        if getattr(self, "activation_checkpointing", False) is None:
            self.activation_checkpointing = self.gradient_checkpointing
        sharded = sharding(self.fsdp, os.environ)  # type: ignore[has-type]
        self.fsdp = None  # transformers and accelerate would shard everything, the adapter too
        try:
            super().__post_init__()
        except ValueError as error:
            raise OptionError(str(error)) from error
        self.fsdp, self.fsdp_config = sharded, {} if sharded else None
        for name in ("model_init_kwargs", "loss_options"):  # text of a command line is parsed by now
            if not isinstance(getattr(self, name), (dict, type(None))):
                raise OptionError(f"{name}={getattr(self, name)!r} must be a dict, or JSON like '{{...}}'.")
        check_loss_options(self, losses)
        # TRL's default, True, would wait for the GPU at every micro-batch.
        self.logging_nan_inf_filter = False

    def to_dict(self) -> dict[str, Any]:
        """Returns the options as trackers and files get them: tokens are in none of them, however deep they stand."""
        return {name: without_secrets(value) for name, value in super().to_dict().items()}

    @property
    def caches_reference(self) -> bool:
        """Whether the reference's log-probs are kept on disk."""
        return self.precompute_ref_log_probs or self.cache_ref_log_probs


# Options that losses of the registry read, with their defaults. `beta` is apart: its default is the objective's.
OBJECTIVE_OPTIONS: dict[str, Any] = {
    one.name: one.default
    for one in fields(DPOConfig)
    if one.name != "beta" and any(one.name in loss.options for loss in REGISTRY.values())
}


def objective_options(config: DPOConfig) -> dict[str, Any]:
    """The options that losses read, by name."""
    return {name: getattr(config, name) for name in ("beta", "loss_options", *OBJECTIVE_OPTIONS)}


@functools.cache
def _warn_of_cpu() -> None:
    logger.warning(
        "No GPU is found: everything runs on the CPU, as with use_cpu=True, which suits small models. If this machine "
        "has a GPU, see whether `nvidia-smi` shows it and whether torch was installed for it (torch.version.cuda)."
    )


def _checked(init: Callable[..., None]) -> Callable[..., None]:
    known = {f.name for f in fields(DPOConfig) if f.init}

    @functools.wraps(init)
    def __init__(self: DPOConfig, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **check_option_names(kwargs, known))
        # Given at its default, such an option has no effect either, but tells that another loss is meant. Parsers of
        # command lines give every option.
        if not known <= kwargs.keys():
            for name in OF_OTHER_CONFIGS.keys() & kwargs.keys():
                check_read(self, name, [find_objective(loss) for loss in self.loss_type])

    return __init__


# The generated __init__ would answer an unknown option with a bare TypeError.
DPOConfig.__init__ = _checked(DPOConfig.__init__)  # type: ignore[method-assign]
