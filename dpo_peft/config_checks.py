"""Which options an objective reads: those that it doesn't, and values that make no sense, are refused.

Plain values in, `OptionError` out; the config calls it before anything is loaded.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from .data import DISCOUNT_UNITS
from .errors import OptionError
from .losses import F_DIVERGENCES, REGISTRY

# Option -> its default, with which it changes nothing or is every loss's own choice. `beta` is apart: its default is
# the objective's.
OBJECTIVE_OPTIONS: dict[str, Any] = {
    "label_smoothing": 0.0,
    "reward_clip": None,
    "f_divergence_type": "reverse_kl",
    "f_alpha_divergence_coef": 0.5,
    "ld_alpha": None,
    "use_weighting": False,
    "discopop_tau": 0.05,
    "ipo_length_normalize": False,
    "simpo_gamma": 1.0,
    "cpo_alpha": 1.0,
    "desirable_weight": 1.0,
    "undesirable_weight": 1.0,
    "discount_gamma": 1.0,
    "discount_unit": "turn",
}
# Option -> (lowest, highest, lowest allowed, highest allowed).
_RANGES: dict[str, tuple[float, float, bool, bool]] = {
    "beta": (0, math.inf, False, False),
    "label_smoothing": (0, 0.5, True, False),
    "reward_clip": (0, math.inf, False, False),
    "f_alpha_divergence_coef": (-math.inf, math.inf, False, False),
    "ld_alpha": (0, 1, True, True),
    "discopop_tau": (0, math.inf, False, False),
    "simpo_gamma": (0, math.inf, True, False),
    "cpo_alpha": (0, math.inf, True, False),
    "desirable_weight": (0, math.inf, False, False),
    "undesirable_weight": (0, math.inf, False, False),
    "discount_gamma": (0, 1, False, True),
}


def check_loss_type(loss_type: Any, loss_weights: Any) -> None:
    """Refuse unknown losses, mixes that can't learn from the same data, and weights that don't match."""
    if not isinstance(loss_type, list) or not loss_type or any(name not in REGISTRY for name in loss_type):
        raise OptionError(f"loss_type={loss_type!r} is not available. Use one or several of {', '.join(REGISTRY)}.")
    if len(set(loss_type)) < len(loss_type):
        raise OptionError(f"loss_type={loss_type!r} names a loss twice: give it once, with the sum of the weights.")
    kinds = {REGISTRY[name].data: name for name in loss_type}
    if len(kinds) > 1:
        needs = " but ".join(f"{name!r} learns from {data}" for data, name in kinds.items())
        raise OptionError(f"loss_type={loss_type!r} can't be mixed: {needs}. Choose losses of one kind.")
    if loss_weights is None:
        return
    if not isinstance(loss_weights, list) or len(loss_weights) != len(loss_type):
        raise OptionError(f"loss_weights={loss_weights!r} must be a list with one number per loss of {loss_type}.")
    if not all(_is_number(weight) and weight > 0 for weight in loss_weights):
        raise OptionError(f"loss_weights={loss_weights!r} must be positive numbers: leave out a loss with weight 0.")


def resolve_beta(loss_type: Sequence[str], beta: Any) -> float | None:
    """`beta` if given, or the default that the losses agree on; None if none of them has a beta."""
    defaults = {name: REGISTRY[name].default_beta for name in loss_type if "beta" in REGISTRY[name].options}
    if not defaults:
        if beta is not None:
            raise OptionError(f"beta has no effect on loss_type={list(loss_type)!r}: leave it out.")
        return None
    if beta is not None:
        return float(_in_range("beta", beta))
    if len(set(defaults.values())) > 1:
        raise OptionError(f"beta must be given for loss_type={list(loss_type)!r}: their defaults differ ({defaults}).")
    return next(iter(defaults.values()))


def check_objective_options(loss_type: Sequence[str], given: Mapping[str, Any]) -> None:
    """Refuse an option away from its default that no loss of the mix reads, and values out of range.

    Args:
        loss_type: names in the registry.
        given: the value of every option of `OBJECTIVE_OPTIONS`.
    """
    for name, default in OBJECTIVE_OPTIONS.items():
        value = given[name]
        if value == default:
            continue
        readers = [loss for loss, entry in REGISTRY.items() if name in entry.options]
        if not set(readers) & set(loss_type):
            raise OptionError(
                f"{name}={value!r} has no effect on loss_type={list(loss_type)!r}: leave it out, or use one of "
                f"{', '.join(readers)}."
            )
        if name in _RANGES:
            _in_range(name, value)
    check_choice("f_divergence_type", given["f_divergence_type"], F_DIVERGENCES)
    check_choice("discount_unit", given["discount_unit"], DISCOUNT_UNITS)
    for name in ("use_weighting", "ipo_length_normalize"):
        if not isinstance(given[name], bool):
            raise OptionError(f"{name}={given[name]!r} must be True or False.")
    _check_together(loss_type, given)


def _check_together(loss_type: Sequence[str], given: Mapping[str, Any]) -> None:
    """Options that have an effect only beside another one."""
    if given["f_alpha_divergence_coef"] != 0.5 and given["f_divergence_type"] != "alpha_divergence":
        raise OptionError("f_alpha_divergence_coef has no effect without f_divergence_type='alpha_divergence'.")
    if given["discount_unit"] != "turn" and given["discount_gamma"] == 1.0:
        raise OptionError("discount_unit has no effect while discount_gamma is 1: set discount_gamma below 1.")
    if "exo_pair" in loss_type and not given["label_smoothing"]:
        raise OptionError(
            "loss_type 'exo_pair' needs label_smoothing above 0, such as 0.001 (it takes its logarithm)."
        )


def _in_range(name: str, value: Any) -> Any:
    low, high, with_low, with_high = _RANGES[name]
    if (
        _is_number(value)
        and (value > low or with_low and value == low)
        and (value < high or with_high and value == high)
    ):
        return value
    bounds = [f"{'at least' if with_low else 'above'} {low:g}"] if low > -math.inf else []
    bounds += [f"{'at most' if with_high else 'below'} {high:g}"] if high < math.inf else []
    raise OptionError(f"{name}={value!r} must be a number {' and '.join(bounds)}.".replace(" .", "."))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Refuse a value that is none of the choices of the option `name`."""
    if value not in choices:
        raise OptionError(f"{name}={value!r} must be one of {', '.join(map(repr, choices))}.")


def check_number(
    options: Any,
    name: str,
    above: float = -math.inf,
    minimum: float = -math.inf,
    maximum: float = math.inf,
    optional: bool = False,
    whole: bool = False,
) -> None:
    """Refuse an attribute of `options` that is no number within the bounds."""
    value = getattr(options, name)
    if value is None and optional:
        return
    kind = "a whole number" if whole else "a number"
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        raise OptionError(f"{name}={value!r} must be {kind}{' or None' if optional else ''}.")
    if not (math.isfinite(value) and above < value and minimum <= value <= maximum):
        bounds = [f"above {above}"] if above > -math.inf else []
        bounds += [f"at least {minimum}"] if minimum > -math.inf else []
        bounds += [f"at most {maximum}"] if maximum < math.inf else []
        raise OptionError(f"{name}={value!r} must be {kind} {' and '.join(bounds)}.")


def check_used(options: Any, used_with: Mapping[str, tuple[str, bool]]) -> None:
    """Refuse attributes of `options` that are set beside an option that isn't.

    Args:
        options: a dataclass's instance.
        used_with: each such attribute's name to that of the other option and whether that is on.
    """
    defaults = {f.name: f.default for f in fields(options)}
    for name, (option, on) in used_with.items():
        if not on and getattr(options, name) != defaults[name]:
            raise OptionError(f"{name}={getattr(options, name)!r} has no effect without {option}: set it too.")
