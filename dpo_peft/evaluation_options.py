"""Options of evaluation while training, checked: samples, early stopping, and which adapter is the best."""

from typing import Any

from .config_checks import check_number, check_used

MARGIN = "eval_rewards/margins"
# Of the metrics that are better when they are smaller, how their names end.
SMALLER_IS_BETTER = ("loss", "kl", "sample_weight", "rejected")


def check_evaluation_options(options: Any) -> None:
    """Check them, and fill in the metric that early stopping watches and its direction if they aren't given.

    Args:
        options: a `DPOConfig`.

    Raises:
        OptionError: an option of the wrong type, out of range or without effect.
    """
    check_number(options, "sample_prompts", minimum=0, whole=True)
    check_number(options, "sample_max_new_tokens", minimum=1, whole=True)
    check_number(options, "sample_temperature", minimum=0)
    check_number(options, "early_stopping_patience", minimum=1, optional=True, whole=True)
    check_number(options, "early_stopping_threshold", minimum=0)
    sampled = ("sample_prompts", options.sample_prompts > 0)
    patient = ("early_stopping_patience", options.early_stopping_patience is not None)
    evaluated = ("eval_strategy", options.eval_strategy != "no")
    used_with = {"sample_max_new_tokens": sampled, "sample_temperature": sampled}
    check_used(options, {**used_with, "early_stopping_threshold": patient, "early_stopping_patience": evaluated})
    if patient[1] and options.metric_for_best_model is None:
        options.metric_for_best_model = MARGIN
    # transformers knows only that a loss should be small.
    if options.metric_for_best_model is not None and options.greater_is_better is None:
        options.greater_is_better = not options.metric_for_best_model.endswith(SMALLER_IS_BETTER)
