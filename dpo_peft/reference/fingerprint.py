"""Which model the reference was: fingerprints of the base and of a frozen adapter, and the record that names them.

An adapter says nothing about the reference that it was trained against. Given to a trainer again, it could silently
become its own reference; on another base, or on the same one quantized otherwise, its rewards would mean something
else. So the reference's identity is stored with the adapter and with each checkpoint, and compared on the way back.

A fingerprint is about content, never about names or paths, and the tensors stay on their own device. It finds
accidents; it is no protection against forgery.
"""

import copy
import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import align_module_device
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import ReferenceMismatchError
from ..forward.modules import bring_in
from .frozen_adapter import AdapterLayer, adapter_tensors

logger = logging.getLogger(__name__)

RECORD = "dpo_peft_reference"  # the record's key in the adapter's config

# ---- Tensors --------------------------------------------------------------------------------------------------------

_WORDS = 1 << 14  # 32-bit words that are summed up at once: decides fingerprints, so never change it
# Bytes looked at in one go: decides speed and memory only. The CPU's fits its cache; a GPU's makes twice that.
_CHUNK = {"cpu": 1 << 18, "cuda": 1 << 26}


@torch.no_grad()
def tensor_fingerprint(t: Tensor) -> bytes:
    """Returns 16 bytes that depend on every bit of a tensor, its dtype and its shape, and on nothing else.

    The bytes are taken as 32-bit words. Each block of 2**14 words is reduced to two sums of word times multiplier,
    modulo 2**64, with odd pseudo-random multipliers that depend on the position (multilinear hashing, Dietzfelbinger
    1996). As 32-bit words can't reach the 64-bit modulus, one changed word always changes both sums; any other change
    goes unnoticed with a probability of about 2**-64. Whole-number sums are the same on every device and in any order.

    Args:
        t: any dtype and device, also empty or not contiguous (then it is copied once).

    Raises:
        ReferenceMismatchError: a tensor without content (on the meta device).
    """
    digest = hashlib.blake2b(f"{t.dtype} {tuple(t.shape)}".encode(), digest_size=16)
    if is_traceable_wrapper_subclass(t):  # a quantized weight that is several tensors, say
        for name in t.__tensor_flatten__()[0]:
            digest.update(name.encode() + tensor_fingerprint(getattr(t, name)))
    elif t.is_meta:
        raise ReferenceMismatchError(
            "A weight is on the meta device, so there is nothing to tell the reference by. Load the model's weights "
            "before training."
        )
    elif t.numel():
        data = t.detach().contiguous().reshape(-1).view(torch.uint8)
        sums = [_block_sums(part) for part in data.split(_CHUNK.get(t.device.type, 1 << 26))]
        digest.update(torch.cat(sums).cpu().numpy().tobytes())
    return digest.digest()


def _block_sums(data: Tensor) -> Tensor:
    """Reduces (bytes,) uint8 to (blocks, 2) int64; the last block is filled up with zeros, which add nothing."""
    width = min(_WORDS, -(-data.numel() // 4))
    missing = -data.numel() % (4 * width)
    if missing or data.data_ptr() % 4 or data.storage_offset() % 4:
        data = F.pad(data, (0, missing))  # a new tensor, aligned
    words = data.view(torch.int32).view(-1, width)
    return torch.stack([(words * m[:width]).sum(1) for m in _multipliers(data.device)], 1)


@lru_cache(maxsize=16)
def _multipliers(device: torch.device) -> Tensor:
    """Returns (2, _WORDS) odd int64."""
    draws = hashlib.shake_128(b"dpo_peft fingerprint 1").digest(2 * 8 * _WORDS)
    return torch.from_numpy(np.frombuffer(draws, "<i8").reshape(2, _WORDS) | 1).to(device)


def digest_of(lines: Iterable[tuple[str, bytes]], size: int) -> str:
    """Returns `size` bytes in hex for named contents in any order."""
    digest = hashlib.blake2b(digest_size=size)
    for name, content in sorted(lines):
        digest.update(f"{len(name)} {len(content)} {name}".encode() + content)
    return digest.hexdigest()


# ---- A base, an adapter ---------------------------------------------------------------------------------------------

# Entries of a model's config that leave its log-probs alone: where it came from, how it is computed and stored (the
# tensors tell), what it returns, dropout (a reference has none), what the tokenizer sets, and what other tasks read.
_UNRELATED = re.compile(
    r"_.*|transformers_version|(torch_)?dtype|quantization_config|use_cache|cache_implementation|architectures|auto_map"
    r"|(attn|experts)_implementation|torchscript|return_dict|output_(attentions|hidden_states|router_logits)"
    r"|.*(dropout|_pdrop|layerdrop|jitter_noise|loss_coef|aux_loss).*|(initializer|.*_init)_(range|std|factor)"
    r"|(pad|bos|eos|sep|decoder_start)_token_id|tokenizer_class|gradient_checkpointing|pretraining_tp"
    r"|id2label|label2id|problem_type|num_labels|finetuning_task|task_specific_params|summary_.*|base_model_tp_plan"
)


def base_fingerprint(model: nn.Module) -> str:
    """Returns 16 hex digits for all weights below the adapters, then 16 for the model's class and config.

    Weights are the parameters and persistent buffers with their names, dtypes and shapes, and the constants that
    bitsandbytes keeps beside quantized ones. The same before and after PEFT wraps the model, whichever adapter is
    active, and wherever the weights lie. The compute dtype of quantized layers is not part of it. Raises
    `ReferenceMismatchError` for weights that are not loaded.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    weights = (
        (name, what.encode() if isinstance(what, str) else tensor_fingerprint(what)) for name, what in base_parts(base)
    )
    config = json.dumps([type(base).__name__, _plain(base.config.to_dict())], sort_keys=True, default=str)
    return digest_of(weights, 8) + digest_of([("config", config.encode())], 8)


def base_parts(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor | str]]:
    """Yields all that decides what the base computes, by the names that it has without PEFT."""
    wrapped = getattr(module, "_orig_mod", None)  # of torch.compile
    if isinstance(module, AdapterLayer):
        wrapped = getattr(module, "base_layer" if isinstance(module, BaseTunerLayer) else "original_module", None)
    if wrapped is not None:
        yield from base_parts(wrapped, prefix)
        return
    bring_in(module)
    own = [*module._parameters, *(key for key in module._buffers if key not in module._non_persistent_buffers_set)]
    with align_module_device(module):  # brings in weights that accelerate keeps off the device
        for key in own:
            # Not as an attribute: experts in 4 bits read there as if they were not.
            if (tensor := {**module._parameters, **module._buffers}[key]) is not None:
                # 4-bit layers rewrite their bias in the dtype of their input: what acts is its value in this dtype.
                acts = getattr(module, "compute_dtype", None) if key == "bias" else None
                yield prefix + key, tensor if acts is None else tensor.to(acts)
                beside = quantization_parts(tensor, module if key == "weight" else None)
                yield from ((f"{prefix}{key}.{name}", what) for name, what in beside)
    for key, child in module._modules.items():
        if child is not None:
            yield from base_parts(child, f"{prefix}{key}.")


def quantization_parts(weight: Any, module: nn.Module | None = None) -> Iterator[tuple[str, Tensor | str]]:
    """Yields what bitsandbytes keeps beside a quantized weight.

    In 4 bits that is how it is stored, and the constants of nested states; in 8 bits the scales, which the first
    forward pass moves into the module, if that is given.
    """
    state, name = getattr(weight, "quant_state", None), "quant"
    if state is not None:
        yield "stored", f"{state.quant_type} {state.dtype} {tuple(state.shape)}"
    while state is not None:
        yield f"{name}.blocksize", str(state.blocksize)
        constants = ((kind, getattr(state, kind)) for kind in ("absmax", "code", "offset"))
        yield from ((f"{name}.{kind}", value) for kind, value in constants if isinstance(value, Tensor))
        state, name = getattr(state, "state2", None), name + ".nested"
    in_module: Any = getattr(module, "state", None)
    if hasattr(in_module, "SCB"):
        scales = weight.SCB if getattr(weight, "SCB", None) is not None else in_module.SCB
        if scales is not None:
            yield "SCB", scales
        yield "threshold", str(in_module.threshold)


def _plain(value: Any) -> Any:
    """Returns a config's content in one spelling, be it from code or from a file, without what is unrelated."""
    if isinstance(value, dict):
        items = {str(key): _plain(v) for key, v in value.items() if not _UNRELATED.fullmatch(str(key))}
        return {key: v for key, v in items.items() if v is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def adapter_fingerprint(model: nn.Module, adapter: str) -> str:
    """Returns 32 hex digits for an adapter: its tensors by value in float32, and what each layer scales them by. The
    adapter's name doesn't count; rank, alpha, rsLoRA and patterns count by what they amount to in each layer. Raises
    `ReferenceMismatchError` if the model has no such adapter."""
    tensors = adapter_tensors(model, adapter)
    if not tensors:
        present = ", ".join(getattr(model, "peft_config", {})) or "none"
        raise ReferenceMismatchError(f"The model has no adapter {adapter!r}; its adapters: {present}.")
    lines = [(n, tensor_fingerprint(t.float() if t.is_floating_point() else t)) for n, t in tensors.items()]
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and adapter in getattr(module, "scaling", ()):
            variant = type(getattr(module, "lora_variant", {}).get(adapter)).__name__
            lines.append((name, f"{float(module.scaling[adapter])!r} {variant}".encode()))
    return digest_of(lines, 16)


# ---- The record -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Identity:
    """What a reference is. Fingerprints decide; the rest says to people what they belong to."""

    base: str  # Hub id or folder
    revision: str | None
    quantization: str  # "nf4, double quantization, compute bfloat16" | "none". Caches depend on the spelling
    dtype: str  # of the weights that are not quantized
    base_fingerprint: str
    adapter: str | None  # where the frozen adapter came from; None: the adapter is switched off
    adapter_fingerprint: str | None
    sync: str | None = None  # how the reference follows the policy: "alpha 0.6 every 512 steps"

    def key(self) -> str:
        """Returns 32 hex digits of the weights that decide the log-probs, not of names, paths or compute dtype."""
        parts = [("base", self.base_fingerprint.encode()), ("adapter", (self.adapter_fingerprint or "").encode())]
        return digest_of(parts, 16)

    def differences(self, other: "Identity") -> list[str]:
        """Returns what sets two references apart, a line each that names this one's side first; [] if nothing does."""
        lines = []
        for what, at in (("weights", slice(0, 16)), ("config", slice(16, None))):
            if self.base_fingerprint[at] != other.base_fingerprint[at]:
                a, b = (f"{i.base_fingerprint[at][:8]} ({i._base_in_words()})" for i in (self, other))
                lines.append(f"base {what}: {a} and {b}")
        if self.adapter_fingerprint != other.adapter_fingerprint:
            lines.append(f"adapter: {self._adapter_in_words()} and {other._adapter_in_words()}")
        if self.sync != other.sync:
            lines.append(f"sync: {self.sync or 'none'} and {other.sync or 'none'}")
        return lines

    def _base_in_words(self) -> str:
        revision = f" at {self.revision[:12]}" if self.revision else ""
        stored = self.dtype if self.quantization == "none" else f"{self.quantization}; rest {self.dtype}"
        return f"{self.base}{revision}, {stored}"

    def _adapter_in_words(self) -> str:
        return f"{self.adapter} ({(self.adapter_fingerprint or '')[:8]})" if self.adapter else "none"

    def __str__(self) -> str:
        base = f"{self._base_in_words()} (weights {self.base_fingerprint[:8]}, config {self.base_fingerprint[16:24]})"
        sync = f", synced with {self.sync}" if self.sync else ""
        return f"{base}, adapter: {self._adapter_in_words()}{sync}"

    @classmethod
    def from_dict(cls, record: object) -> "Identity":
        """Reads a record, `asdict` of an identity, without fields that this version doesn't know. Raises a
        ReferenceMismatchError for a damaged one."""
        known = {f.name: record[f.name] for f in fields(cls) if f.name in record} if isinstance(record, dict) else {}
        faults = [f"{f.name} is missing" for f in fields(cls) if f.name not in known and f.name != "sync"]
        for name, value in known.items():
            form = "[0-9a-f]{32}" if name.endswith("_fingerprint") else "(?s).*"
            may_be_none = name not in ("base", "quantization", "dtype", "base_fingerprint")
            if not (re.fullmatch(form, value) if isinstance(value, str) else value is None and may_be_none):
                faults.append(f"{name} is wrong")
        if not faults and (known["adapter"] is None) != (known["adapter_fingerprint"] is None):
            faults = ["adapter is wrong"]
        if faults:
            raise ReferenceMismatchError(
                f"The record of the reference (auto_mapping.{RECORD} in adapter_config.json) is damaged: "
                f"{', '.join(faults)}. Restore it from a copy of the adapter, or delete the entry to train without "
                "knowing the reference."
            )
        return cls(**known)


def identify(model: PeftModel, adapter: str | None, source: str | None = None, sync: str | None = None) -> Identity:
    """Returns the identity of the reference inside `model`: a frozen adapter, by its name there and the path that it
    was loaded from, or with None the model with its adapter off. `sync` says in words how it follows the policy.
    Raises `ReferenceMismatchError` if there is no such adapter, or weights are not loaded."""
    bare = model.get_base_model()
    config, peft_config = bare.config, model.peft_config[model.active_adapters[0]]
    dtypes = (str(t.dtype) for _, t in base_parts(bare) if isinstance(t, Tensor) and t.is_floating_point())
    return Identity(
        base=str(config._name_or_path or peft_config.base_model_name_or_path or f"unnamed {type(bare).__name__}"),
        revision=getattr(config, "_commit_hash", None) or peft_config.revision,
        quantization=_quantization(bare),
        dtype=next(dtypes).removeprefix("torch."),
        base_fingerprint=base_fingerprint(model),
        adapter=None if adapter is None else source or "the adapter as it came in",
        adapter_fingerprint=None if adapter is None else adapter_fingerprint(model, adapter),
        sync=sync,
    )


def _quantization(base: nn.Module) -> str:
    for module in base.modules():
        weight = module._parameters.get("weight")
        state = getattr(weight, "quant_state", None)
        if state is not None:
            blocks = "" if state.blocksize == 64 else f", blocks of {state.blocksize}"
            double = ", double quantization" if getattr(state, "state2", None) is not None else ""
            compute = str(getattr(module, "compute_dtype", None) or "of the input").removeprefix("torch.")
            return f"{state.quant_type}{blocks}{double}, compute {compute}"
        if weight is not None and weight.dtype == torch.int8:
            return "int8"
    config = getattr(base.config, "quantization_config", None)
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    return "none" if config is None else str(getattr(method, "value", method))


def read_record(source: PeftConfig | str | Path) -> Identity | None:
    """Returns the identity that is stored in an adapter's config, or in that of a folder; None if there is none.
    Raises `ReferenceMismatchError` where the record, or the file, is damaged."""
    record = read_entry(source, RECORD)
    return None if record is None else Identity.from_dict(record)


def write_entry(model: PeftModel, adapter: str, key: str, value: Mapping[str, object]) -> None:
    """Puts an entry into `auto_mapping`, the one free-form part of `adapter_config.json`: it survives loading, saving
    again and the Hub, and other programs take no notice. The adapter's config is replaced by a copy, as the user may
    hold the original and build another adapter with it."""
    config = copy.copy(model.peft_config[adapter])
    config.auto_mapping = {**(config.auto_mapping or {}), key: value}
    config.task_type = config.task_type or "CAUSAL_LM"  # without one, PEFT overwrites auto_mapping when it saves
    model.peft_config[adapter] = config


def read_entry(source: PeftConfig | str | Path, key: str) -> Any:
    """Returns what `write_entry` stored; None if there is nothing. Raises as `read_record`."""
    content: Any = {}
    if isinstance(source, PeftConfig):
        content = {"auto_mapping": source.auto_mapping}
    elif (file := Path(source) / "adapter_config.json").is_file():
        try:
            content = json.loads(file.read_text("utf-8"))
        except ValueError as error:
            raise ReferenceMismatchError(f"{file} is not valid JSON ({error}): restore it from a copy.") from error
    auto_mapping = content.get("auto_mapping") if isinstance(content, dict) else None
    return auto_mapping.get(key) if isinstance(auto_mapping, dict) else None


def check_same(expected: Identity, actual: Identity, what: str, remedy: str, asked_for: bool = False) -> None:
    """Compares the reference that something was trained against to the present one. `what` that is, such as "The
    checkpoint runs/a/checkpoint-20", begins the message, and `remedy` is a sentence. Raises `ReferenceMismatchError`,
    which names both, if they differ; a difference is only warned of where the user asked for the present one."""
    lines = expected.differences(actual)
    if lines and asked_for:
        logger.warning("%s was trained against %s; it goes on against %s, as asked for.", what, expected, actual)
    elif lines:
        raise ReferenceMismatchError(
            f"{what} belongs to another reference than this run has. Its own and this run's differ in "
            f"{'; '.join(lines)}. {remedy}"
        )
