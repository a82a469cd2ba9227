"""A trained adapter on its way back: how it was trained, and the model that it was trained on, loaded the same way.

An adapter means little without its base in the right precision, its reference and its beta. The trainer puts what is
needed into the adapter's config (`training_record`), and `load_trained` reads it.
"""

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import cached_file

from ..data.images import Images
from ..errors import OptionError, ReferenceMismatchError
from ..forward.rotary import fix_rope, fixed_rope_length, rope_length
from ..reference import fingerprint
from ..reference.adapter_off import Reference
from ..reference.fingerprint import Identity
from .adapters import check_adapter, is_adapter, load_frozen, named_place, read_config
from .gguf import METHOD, from_named, is_gguf
from .loading import load_on_base
from .options import AdapterOptions
from .training_record import UNRECORDED, TrainedWith, read_training

logger = logging.getLogger(__name__)

# For a file that may well be missing.
_QUIET: Any = {
    f"_raise_exceptions_for_{name}": False for name in ("missing_entries", "gated_repo", "connection_errors")
}
_CONSTANT = re.compile(r"\.quant\.|\.SCB$")  # of quantized weights


def plain_fingerprint(model: PeftModel) -> str:
    """Returns 32 hex digits for the base's weights that are not quantized: the same on every kind of device, while
    GPUs and CPUs round a few 4-bit weights differently."""
    tensors = (
        (name, fingerprint.tensor_fingerprint(part))
        for name, part in fingerprint.base_parts(model.get_base_model())
        if isinstance(part, torch.Tensor) and part.is_floating_point() and not _CONSTANT.search(name)
    )
    return fingerprint.digest_of(tensors, 16)


def rope_length_of(model: PeftModel, trained: TrainedWith, max_length: int | None) -> int | None:
    """Returns for which row length an adapter's rotary frequencies were fixed (see `fix_rope`). Where that is not
    recorded, `max_length` decides; without one, rows are taken to be no longer than what leaves them as they are."""
    if trained.rope_length is not None:
        return trained.rope_length
    length = rope_length(model.config, max_length or 1)
    if length is not None and length != fixed_rope_length(model):
        logger.warning(
            "The model chooses its rotary frequencies by the longest row, and the adapter does not say for which rows "
            "it was trained: those of rows of up to %d tokens are taken. Give max_length if it was trained on longer "
            "ones.",
            length,
        )
    return length


class AdapterSource(AdapterOptions):
    """An adapter and how its base is made again: as it was made for the training, unless an option says otherwise.

    Read by scoring, merging and sampling alike, from Python and from the command line. Its arguments are the fields of
    `AdapterOptions`.
    """

    @classmethod
    def of(cls, options: AdapterOptions) -> "AdapterSource":
        """Returns the source that a command's options name."""
        return cls(**{f.name: getattr(options, f.name) for f in fields(AdapterOptions)})

    @property
    def from_hub(self) -> dict[str, str]:
        """The arguments with which the adapter's files are found on the Hub."""
        return {} if self.revision is None else {"revision": self.revision}

    @cached_property
    def config(self) -> PeftConfig:
        """The adapter's config. Raises an OptionError where there is no adapter."""
        if not is_adapter(self.adapter, **self.from_hub):
            raise OptionError(
                f"{self.adapter!r} is not an adapter: give a folder (or Hub id) with an adapter_config.json."
            )
        return read_config(self.adapter, **self.from_hub)

    @property
    def base_name(self) -> str:
        """Folder or Hub id of the base. Raises an OptionError if the config names none and none is given."""
        name = self.base or named_place(self.adapter, "base", self.config.base_model_name_or_path)
        if not name:
            raise OptionError(f"The adapter {self.adapter!r} does not say which base it belongs to: give base.")
        if self.base is None and Path(name).is_absolute() and not Path(name).exists() and self.read() is not None:
            moved = (
                place for place in beside(self.adapter, name) if is_gguf(name) or Path(place, "config.json").is_file()
            )
            return next(moved, name)  # its fingerprint is compared
        return name

    def read(self) -> TrainedWith | None:
        """Returns what the adapter records of its training, without loading its model. See `read_training`."""
        return read_training(self.config)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Returns the adapter's own tokenizer, or its base's. Raises an OptionError if there is neither."""
        tokenizer: PreTrainedTokenizerBase = self._beside(AutoTokenizer, "tokenizer")
        return tokenizer

    def images(self, needed: bool = False) -> Images | None:
        """Returns the processor that the adapter was trained with, saved beside it; None where that was a tokenizer,
        or if it is `needed`, the base's. Raises an OptionError if it can't be loaded."""
        self.config  # noqa: B018 - what is no adapter is refused as such
        own = cached_file(self.adapter, "processor_config.json", **self.from_hub, **_QUIET)
        if own is None and not needed:
            return None
        processor = self._beside(AutoProcessor, "processor")
        if not isinstance(processor, ProcessorMixin):
            raise OptionError(f"{self.adapter!r} and its base {self.base_name!r} read no images: leave them out.")
        return Images(processor)

    def _beside(self, auto: Any, kind: str) -> Any:
        base = self.base or named_place(self.adapter, "base", self.config.base_model_name_or_path) or self.adapter
        of_base = {"revision": self.config.revision} if self.config.revision and self.base is None else {}
        for name, where in ((self.adapter, self.from_hub), (base, of_base)):
            try:
                found = from_named(auto, name, trust_remote_code=self.trust_remote_code, **where)
                if kind == "tokenizer" or isinstance(found, ProcessorMixin) or name == base:
                    return found
            except (OSError, ValueError, ImportError) as error:
                reason = error
        raise OptionError(f"No {kind} can be loaded from {self.adapter!r} or its base {base!r}: {reason}")

    def load(self, device: torch.device | str | None = None, with_reference: bool = True) -> "TrainedAdapter":
        """Loads the adapter on the base that it was trained on, made as it was then, with its reference, on a device
        (a GPU if there is one). `with_reference` False leaves the reference out, to sample from the policy alone.

        Raises `OptionError` where there is no adapter, no base, or a reference that can't be found;
        `ReferenceMismatchError` where the base or the reference is another one than in training.
        """
        check_adapter(self.config)
        trained = self.read()
        setup = trained or UNRECORDED
        with_reference = _needs_reference(trained, self.reference) and with_reference
        quantization = setup.quantization_config() if self.quantize is None else None
        quantize = trained is None if self.quantize is None else self.quantize
        kwargs: dict[str, object] = {"dtype": self.dtype or setup.dtype}
        if self.config.revision and self.base is None:
            kwargs["revision"] = self.config.revision
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        experts = quantization is None or setup.experts_quantized
        how = quantization, quantize, kwargs, self.trust_remote_code, device, trained and trained.class_name, experts
        model = load_on_base(self.adapter, self.base_name, "give base.", self.from_hub, *how)
        model.requires_grad_(False).eval()
        fix_rope(model, rope_length_of(model, setup, setup.max_length))
        policy = model.active_adapters[0]
        recorded = fingerprint.read_record(model.peft_config[policy])
        as_recorded = trained is not None and self.quantize is None and self.dtype is None
        if recorded is not None and as_recorded and self.check_base:
            _check_base(recorded, trained, model, self.adapter)
        elif trained and trained.base_changed and self.base is None:
            logger.warning(
                "%r was trained on %r changed in memory (%s differed from its files), and that base was loaded from "
                "its files: give the changed model, saved, as base.",
                *(self.adapter, self.base_name, trained.base_changed),
            )
        reference = _find_reference(model, recorded, self.reference, self.adapter) if with_reference else None
        images = self.images()
        tokenizer = images.tokenizer if images else self.tokenizer()
        return TrainedAdapter(model, tokenizer, policy, reference, trained, self.adapter, images)


@dataclass
class TrainedAdapter:
    """An adapter on its base, in eval mode, nothing trainable."""

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    policy: str  # the adapter's name in the model
    reference: Reference | None  # None: its objective had no reference
    trained: TrainedWith | None  # None: not trained by this package
    source: str  # the folder or Hub id
    images: Images | None = None  # the processor that it was trained with

    @property
    def setup(self) -> TrainedWith:
        """How it was trained, or what is assumed of an adapter without a record."""
        return self.trained or UNRECORDED


def load_trained(
    adapter: str, *, device: torch.device | str | None = None, with_reference: bool = True, **made: Any
) -> TrainedAdapter:
    """Returns what `AdapterSource.load` does for a folder or Hub id and options of `AdapterSource`."""
    return AdapterSource(adapter, **made).load(device, with_reference)


def _needs_reference(trained: TrainedWith | None, given: str | None) -> bool:
    """Whether the adapter's objective has a reference; one that is given without effect is refused."""
    needed = (trained or UNRECORDED).reward == "log_ratio"
    if given is not None and not needed:
        raise OptionError("reference has no effect: the adapter's objective has none. Leave it out.")
    return needed


def trained_in(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase | None,
    policy: str | None = None,
    reference: str | None = None,
) -> TrainedAdapter:
    """Returns an adapter of a loaded PeftModel, which may be in training, with what its config records. The model
    stays as it is. `policy` is the adapter's name (None: the active one), and `reference` that of the frozen adapter
    that is its reference, or "base" for the model with all adapters off (None: the recorded one).

    Raises `OptionError` where there is no tokenizer, no such adapter, or a reference that is not in the model.
    """
    if not isinstance(model, PeftModel):
        raise OptionError(
            f"adapter is a {type(model).__name__}: give a folder or Hub id, a TrainedAdapter, or a PeftModel."
        )
    if tokenizer is None:
        raise OptionError("tokenizer is missing: a PeftModel does not bring one.")
    if policy is None and len(model.active_adapters) != 1:
        raise OptionError(f"{len(model.active_adapters)} adapters are active: name the one to score with by policy.")
    policy = policy or model.active_adapters[0]
    if policy not in model.peft_config:
        raise OptionError(f"policy={policy!r}: the model's adapters are {', '.join(model.peft_config)}.")
    trained = read_training(model.peft_config[policy])
    found = _reference_in(model, policy, reference) if _needs_reference(trained, reference) else None
    return TrainedAdapter(model, tokenizer, policy, found, trained, f"adapter {policy!r} of the model")


def _reference_in(model: PeftModel, policy: str, reference: str | None) -> Reference:
    others = [name for name in model.peft_config if name != policy]
    recorded = fingerprint.read_record(model.peft_config[policy]) if reference is None else None
    if recorded is not None and recorded.adapter is not None:
        for name in others:
            if fingerprint.adapter_fingerprint(model, name) == recorded.adapter_fingerprint:
                return Reference("adapter", name, recorded.adapter)
        raise OptionError(
            f"{policy!r} was trained against a frozen adapter ({recorded.adapter}), which is not in the model: name "
            'one as reference, or "base".'
        )
    if reference in (None, "base"):
        return Reference("base", None, chosen=reference is not None)
    if reference not in others:
        raise OptionError(f"reference={reference!r}: the model's other adapters are {', '.join(others) or 'none'}.")
    return Reference("adapter", reference, chosen=True)


def _check_base(recorded: Identity, trained: TrainedWith | None, model: PeftModel, adapter: str) -> None:
    """Refuses a base that is not the one of the training; where its 4-bit weights alone differ, that is said."""
    actual = fingerprint.identify(model, None)
    if recorded.base_fingerprint == actual.base_fingerprint:
        return
    same_config = recorded.base_fingerprint[16:] == actual.base_fingerprint[16:]
    quantized_alike = recorded.quantization == actual.quantization not in ("none", METHOD)
    if same_config and quantized_alike and trained and trained.plain_fingerprint == plain_fingerprint(model):
        logger.warning(
            "The base of %r has other 4-bit weights than in training, and is the same otherwise: GPUs and CPUs round "
            "some differently, which moves log-probs a little.",
            adapter,
        )
        return
    if trained and trained.base_changed:
        raise ReferenceMismatchError(
            f"{adapter!r} was trained on {recorded.base!r} changed in memory ({trained.base_changed} differed from "
            "its files), and that base was loaded from its files: give the changed model, saved, as base."
        )
    raise ReferenceMismatchError(
        f"The base of {adapter!r} is not the one that it was trained on: {recorded.differences(actual)[0]}. Give the "
        "right base; or, if it is meant to differ, check_base=False."
    )


def _find_reference(model: PeftModel, recorded: Identity | None, given: str | None, adapter: str) -> Reference:
    """Returns the recorded reference: the adapter off, or a frozen adapter beside it."""
    if given is not None:
        places = [given]
    elif recorded is None or recorded.adapter is None:
        return Reference("base", None)
    else:
        named = named_place(adapter, "reference", recorded.adapter)
        places = [name for name in [*beside(adapter, named), named] if is_adapter(name)]
    if not places:
        raise OptionError(
            f"{adapter!r} was trained against a frozen adapter ({recorded and recorded.adapter}), which can't be "
            "found: give its folder as reference."
        )
    expected, found = recorded and recorded.adapter_fingerprint, ""
    for place in places:
        try:
            name = load_frozen(model, place)
        except OptionError:  # another one of that name
            if place == places[-1]:
                raise
            continue
        found = fingerprint.adapter_fingerprint(model, name)
        if recorded is None or expected == found:
            return Reference("adapter", name, place, chosen=True)
        model.delete_adapter(name)
    raise ReferenceMismatchError(
        f"{adapter!r} was trained against the reference {expected or 'without adapter'}, and "
        f"{places[-1]!r} is {found}: give the adapter that the training began with."
    )


def beside(adapter: str, recorded: str) -> Iterator[str]:
    """Yields the places where something lies that was recorded under a path, if it was moved together with an
    adapter: the ends of that path, below the adapter's folder and those above it; the nearest first."""
    parts = Path(recorded).parts
    for above in [Path(adapter).resolve(), *Path(adapter).resolve().parents]:
        for end in range(1, len(parts) + 1):
            if not Path(*parts[-end:]).is_absolute() and (place := above.joinpath(*parts[-end:])).exists():
                yield str(place)
