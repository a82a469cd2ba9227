"""What is known of each loss beside its function, and how a loss is found by its name or import path.

Most is read off the function: parameters that are named like an input are its inputs, the others its options, and the
last paragraph of the docstring is its source. The decorator adds what can't be read there.
"""

import inspect
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import OptionError
from ..imports import load_function

Loss = Callable[..., Tensor]  # returns one loss per item, unreduced

# Options that act before the loss: on its scores; on the weights of tokens and pairs; on the steps of a trajectory.
SHAPES = ("reward_clip", "f_divergence_type", "f_alpha_divergence_coef")
WEIGHTS = ("ld_alpha", "use_weighting")
DISCOUNTS = ("discount_gamma", "discount_unit")
SHAPING = (*SHAPES, *WEIGHTS)
_SHAPING_OF = {"pairs": SHAPING, "trajectories": (*SHAPES, *DISCOUNTS), "lists": SHAPES, "singles": SHAPES}

_OF_PAIRS = (
    *("chosen_scores_B", "rejected_scores_B"),  # log pi(y|x) - log pi_ref(y|x), in nats, weighted, shaped, clipped
    *("chosen_logps_B", "rejected_logps_B"),  # log pi(y|x), summed over tokens
    *("ref_chosen_logps_B", "ref_rejected_logps_B"),  # log pi_ref(y|x)
    *("chosen_lengths_B", "rejected_lengths_B"),  # tokens
    *("chosen_nll_B", "rejected_nll_B"),  # -log pi(y|x), unweighted
    "margin_B",  # by how much the chosen reward should be ahead, in rewards; 0.0 if the rows have none
    "mean_chosen_length",  # tokens per pair, over the whole optimizer batch: 0-dim or a number
)
_OF_COMPLETIONS = ("scores_C", "logps_C", "lengths_C", "grades_C")  # of a grade, only the order counts
# Kind of data to what a loss of it may read.
INPUTS: dict[str, tuple[str, ...]] = {
    "pairs": _OF_PAIRS,
    "trajectories": _OF_PAIRS,
    "lists": (*_OF_COMPLETIONS, "sample_of_C", "num_samples"),  # which list; how many there are
    "singles": (*_OF_COMPLETIONS, "mismatched_scores_M"),  # of completions to other prompts, without gradient
}


class Objective:
    """A loss with what trainer, options and model card must know of it, most of it read off the function.

    Args:
        loss: returns one loss per item, unreduced.
        name: in the registry; empty for a loss from outside.
        formula: plain text; r is beta times the score, s the score, h the difference of the rewards.
        use_when, why_beta: a sentence each.
        data: "pairs", "trajectories", "lists" or "singles".
        shaping: options that act on its inputs before it sees them, such as "reward_clip"; by default all that there
            are if it reads the scores of pairs, else none.
        batch_coupled: an item's loss depends on the other items, so it must see the whole optimizer batch at once.

    Raises:
        OptionError: a parameter is neither an input nor an option with a default, or `data` or `shaping` is unknown.
    """

    def __init__(
        self,
        loss: Loss,
        name: str = "",
        formula: str = "",
        use_when: str = "",
        why_beta: str = "TRL's default.",
        data: str = "pairs",
        shaping: tuple[str, ...] | None = None,
        batch_coupled: bool = False,
    ):
        named = name or getattr(loss, "__name__", type(loss).__name__)
        if data not in INPUTS:
            raise OptionError(f"{named}: data={data!r} is unknown. Use one of {', '.join(INPUTS)}.")
        self.loss, self.name, self.data = loss, name, data
        self.formula, self.use_when, self.why_beta = formula, use_when, why_beta
        parameters = inspect.signature(loss).parameters
        self.inputs = tuple(p for p in parameters if p in INPUTS[data])  # what it reads
        self.keywords = tuple(p for p in parameters if p not in INPUTS[data])  # the options that it takes
        for option in self.keywords:
            if parameters[option].default is inspect.Parameter.empty:
                raise OptionError(
                    f"{named}: the parameter {option!r} is no input of a loss of {data}, and as an option it needs a "
                    f"default. Inputs: {', '.join(INPUTS[data])}."
                )
        self.default_beta: float | None = parameters["beta"].default if "beta" in parameters else None
        self.needs_reference = any("scores" in p or p.startswith("ref_") for p in self.inputs)
        shaping = (SHAPING if self.needs_reference and data == "pairs" else ()) if shaping is None else shaping
        if unknown := set(shaping) - set(_SHAPING_OF[data]):
            known = ", ".join(_SHAPING_OF[data])
            raise OptionError(f"{named}: shaping={sorted(unknown)} is unknown for {data}. Use some of {known}.")
        self.options = (*self.keywords, *shaping)  # that have an effect on it
        # Those of a config; `loss_options` holds those of a loss from outside.
        self.heeds = self.options if name else shaping
        self.batch_coupled = batch_coupled or "mismatched_scores_M" in self.inputs
        # Whether p * loss(w, l) + (1 - p) * loss(l, w) is meaningful: not with a term of the chosen completion alone.
        paired = data in ("pairs", "trajectories")
        self.soft_labels = paired and not self.batch_coupled and "chosen_nll_B" not in self.inputs
        # What the forward pass must return per token beside log-probs.
        self.token_extras = ("log_sum_sq",) if "use_weighting" in shaping else ()
        # The implicit reward to report, times beta.
        by_token = any("lengths" in p for p in self.inputs)
        self.reward = "log_ratio" if self.needs_reference else "mean_logp" if by_token else "logp"
        # Paper and equation in one line: the last paragraph of the docstring, up to a semicolon.
        paragraph = " ".join((inspect.getdoc(loss) or "").partition("Source: ")[2].split("\n\n")[0].split())
        self.source = paragraph.split("; ")[0].removesuffix(".")
        found = re.match(r".*?arXiv:[\d.]+\d|[^,]*", self.source)
        self.paper = found[0] if found else ""
        self.equation = self.source.removeprefix(self.paper).removeprefix(", ")


REGISTRY: dict[str, Objective] = {}


def register(formula: str, **about: Any) -> Callable[[Loss], Loss]:
    """Puts a loss of this package into the registry, under its function's name without `_loss`; see `Objective`."""

    def put(loss: Loss) -> Loss:
        name = loss.__name__.removesuffix("_loss")
        REGISTRY[name] = Objective(loss, name, formula, **about)
        return loss

    return put


def objective(**about: Any) -> Callable[[Loss], Loss]:
    """Declares of your own loss what can't be read off it: `data`, `shaping`, `batch_coupled`; see `Objective`."""

    def declare(loss: Loss) -> Loss:
        loss.objective = Objective(loss, **about)  # type: ignore[attr-defined]
        return loss

    return declare


def find_objective(name: str) -> Objective:
    """Returns the loss of that name, or your own: `folder/file.py:function` or `package.module:function`.

    Raises:
        OptionError: there is none, or it can't be imported or used.
    """
    if name not in REGISTRY and ":" not in name:
        raise OptionError(
            f"loss_type={name!r} is not one of {', '.join(REGISTRY)}. For your own, write package.module:function or "
            "file.py:function."
        )
    return REGISTRY[name] if name in REGISTRY else load_objective(name)


@lru_cache
def load_objective(path: str) -> Objective:
    """Returns a loss from outside by its import path, imported once; see `find_objective`."""
    loss = load_function(path, "loss_type")
    return getattr(loss, "objective", None) or Objective(loss)


def shown_name(name: str) -> str:
    """Returns a loss's name fit to be published: of a file, the last part of its path."""
    return name if name in REGISTRY else Path(name).name
