"""What an adapter's config records of its training: written by the trainer, read by all that load the adapter."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from peft import PeftConfig, PeftModel
from transformers import BitsAndBytesConfig

from ..config_checks import is_number
from ..data import TRUNCATION_MODES
from ..errors import ReferenceMismatchError
from ..reference.fingerprint import read_entry, write_entry
from .rebuilding import BaseAsGiven, loader

RECORD = "dpo_peft_training"  # the record's key in the adapter's config


@dataclass(frozen=True)
class TrainedWith:
    """Holds what of a run decides how its adapter is scored and loaded. The defaults are for one without record."""

    loss_type: list[str] = field(default_factory=lambda: ["sigmoid"])
    beta: float | None = None  # None: the objective has none, rewards are scaled by 1
    reward: str = "log_ratio"  # the implicit reward: "log_ratio", "logp" or "mean_logp", see `Objective.reward`
    max_length: int | None = None  # tokens of prompt + completion
    truncation_mode: str = "keep_start"
    precision: str = "no"  # of autocast: "bfloat16", "float16" or "no"
    dtype: str = "bfloat16"  # of the base's weights that are not quantized
    quantization: dict[str, object] = field(default_factory=dict)  # of `BitsAndBytesConfig`; empty: not quantized
    discount_gamma: float = 1.0  # of trajectories
    ld_alpha: float | None = None
    plain_fingerprint: str | None = None  # of the base's weights that are not quantized
    base_class: str | None = None  # these three as in `BaseAsGiven`
    vocabulary: int | None = None
    base_changed: str | None = None
    experts_quantized: bool = False  # experts of a mixture too
    rope_length: int | None = None  # of rows for which rotary frequencies were fixed; None: they do not depend on it
    as_chat: bool | None = False  # rows of text were read as turns; None: there were none

    @property
    def class_name(self) -> str:
        """The class that loads the base again, whatever its files name."""
        return self.base_class or "AutoModelForCausalLM"

    def quantization_config(self) -> BitsAndBytesConfig | None:
        """Returns how the base was loaded for the training."""
        return BitsAndBytesConfig(**self.quantization) if self.quantization else None


UNRECORDED = TrainedWith()  # of an adapter that another program trained
_CHOICES = {
    "reward": ("log_ratio", "logp", "mean_logp"),
    "truncation_mode": TRUNCATION_MODES,
    "precision": ("no", "bfloat16", "float16"),
    "dtype": ("bfloat16", "float16", "float32", "float64"),
}
_LATER = (
    "discount_gamma",
    "ld_alpha",
    "plain_fingerprint",
    "experts_quantized",
    "rope_length",
    "as_chat",
    *BaseAsGiven.__dataclass_fields__,
)


def record_training(model: PeftModel, adapter: str, trained: TrainedWith) -> None:
    """Puts `trained` into an adapter's config, which PEFT saves with the weights."""
    write_entry(model, adapter, RECORD, asdict(trained))


def read_training(source: PeftConfig | str | Path) -> TrainedWith | None:
    """Returns what `record_training` stored; None for an adapter that was not trained by this package. What reads its
    fields later trusts them.

    Raises:
        ReferenceMismatchError: the record is damaged.
    """
    record = read_entry(source, RECORD)
    if record is None:
        return None
    try:
        if not isinstance(record, Mapping):
            raise TypeError(f"it is {record!r}")
        # Records without the later ones are older.
        names = [f.name for f in fields(TrainedWith) if f.name in record or f.name not in _LATER]
        trained = TrainedWith(**{name: record[name] for name in names})
        for name, hint in get_type_hints(TrainedWith).items():
            value = getattr(trained, name)
            if not _fits(value, hint) or value not in _CHOICES.get(name, (value,)):
                raise TypeError(f"{name} is {value!r}")
        if not trained.loss_type or (trained.beta is not None and trained.beta <= 0):
            raise ValueError(f"loss_type is {trained.loss_type!r}, beta {trained.beta!r}")
        trained.quantization_config(), loader(trained.base_class).from_pretrained  # noqa: B018
        return trained
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ReferenceMismatchError(
            f"The record of the training (auto_mapping.{RECORD} in adapter_config.json) is damaged: {error}. Restore "
            "it from a copy of the adapter, or delete the entry and give beta and the base's options yourself."
        ) from error


def _fits(value: object, hint: Any) -> bool:
    """Says whether a value read from JSON is of a field's type. Numbers are finite, and True is none."""
    if options := [one for one in get_args(hint) if get_origin(hint) not in (list, dict)]:
        return any(_fits(value, one) for one in options)
    if hint in (int, float):
        return is_number(value) and (hint is float or isinstance(value, int))
    if get_origin(hint) is list:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    return isinstance(value, {NoneType: NoneType}.get(hint, get_origin(hint) or hint))
