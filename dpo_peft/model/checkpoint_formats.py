"""Checkpoints that are quantized already: kept as they are, read as the 16-bit weights that they mean, or refused.

`docs/quantization.md` tells users what becomes of which.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import OptionError
from .gguf import is_gguf, load_gguf, open_gguf
from .rebuilding import quantization_options
from .stored_weights import weights_in_16_bits

logger = logging.getLogger(__name__)

ORIGINAL = "the 16-bit model that it was made from (its model card says which): that is loaded in NF4"


@dataclass(frozen=True)
class Format:
    """What becomes of checkpoints of one `quant_method`."""

    title: str
    kept: bool = False  # PEFT puts LoRA on its layers
    packages: Mapping[str, str] | None = None  # that these layers need: the module's name to what pip installs
    refused: str = ""  # why it can't be trained on, a clause; neither: it is read as 16-bit weights

    @property
    def is_read(self) -> bool:
        """Whether its weights are dequantized."""
        return not self.kept and not self.refused


_NO_GRADIENT = "its layers have no backward pass in transformers"
_UNREAD = "transformers can't read it"
FORMATS = {
    "bitsandbytes": Format("bitsandbytes", kept=True),
    "fp8": Format("FP8"),
    "mxfp8": Format("MXFP8"),
    "fbgemm_fp8": Format("FP8 of FBGEMM"),
    "mxfp4": Format("MXFP4"),
    "gptq": Format("GPTQ", True, {"optimum": "optimum", "gptqmodel": "gptqmodel"}),
    "awq": Format("AWQ", True, {"gptqmodel": "gptqmodel"}),
    "aqlm": Format("AQLM", True, {"aqlm": "aqlm[gpu,cpu]"}),
    "hqq": Format("HQQ", True, {"hqq": "hqq"}),
    "gguf": Format("GGUF", True, {"gguf": "gguf"}),
    "eetq": Format("EETQ", True, {"kernels": "kernels"}),
    "torchao": Format("torchao", True, {"torchao": "torchao"}),
    "compressed-tensors": Format("compressed-tensors", True, {"compressed_tensors": "compressed-tensors"}),
    "auto-round": Format("AutoRound", refused=_NO_GRADIENT),
    "bitnet": Format("BitNet", refused=_NO_GRADIENT),
    "quark": Format("Quark", refused=_NO_GRADIENT),
    "spqr": Format("SpQR", refused=_NO_GRADIENT),
    "vptq": Format("VPTQ", refused=_NO_GRADIENT),
    "higgs": Format("HIGGS", refused=_NO_GRADIENT),
    "modelopt": Format("ModelOpt (NVFP4, FP8)", refused=_UNREAD),
    "nvfp4": Format("NVFP4", refused=_UNREAD),
}
_HUB = ("revision", "token", "cache_dir", "subfolder", "local_files_only", "force_download", "proxies")


class Checkpoint:
    """How a model's files are loaded: `name` is a Hub id or local folder, `given` the `quantization_config` as the
    user gave it, `quantize` whether to quantize where nothing is given, and `hub` says where the files are found, such
    as a revision (other entries are left aside).

    Raises `OptionError` for a format that can't be trained on, or that contradicts `given`; `OSError` or `ValueError`
    where there is no such model.
    """

    def __init__(
        self, name: str, given: QuantizationConfigMixin | None, quantize: bool, hub: Mapping[str, object] | None = None
    ):
        self.name, self.given, self.quantize = name, given, quantize
        self.hub: dict[str, Any] = {key: value for key, value in (hub or {}).items() if key in _HUB}
        content: Any = {"quantization_config": {"quant_method": "gguf"}}
        if not is_gguf(name):
            content, _ = PretrainedConfig.get_config_dict(name, **self.hub)
        stored = content.get("quantization_config") or (content.get("text_config") or {}).get("quantization_config")
        self.stored: dict[str, Any] = stored or {}
        self.format = self._find() if self.stored else None
        self.gguf = open_gguf(name, self.hub) if is_gguf(name) else None  # reading it takes seconds

    def _find(self) -> Format:
        """Returns the format, unless it is refused."""
        method = str(self.stored.get("quant_method", "unknown"))
        if self.stored.get("load_in_4bit") or self.stored.get("load_in_8bit"):
            method = "bitsandbytes"
        found = FORMATS.get(method) or Format(method, refused="this format is not known here")
        start = f"model={self.name!r} is quantized already, by {found.title}"
        if found.refused:
            raise OptionError(f"{start}, and can't be trained on: {found.refused}. Name {ORIGINAL}.")
        if found.kept and self.given is not None and method not in str(self.given.quant_method.value):
            raise OptionError(f"quantization_config: {start}, and can't be quantized again. Leave it out.")
        if missing := [pip for module, pip in (found.packages or {}).items() if find_spec(module) is None]:
            raise OptionError(
                f"{start}, whose layers need a package that is missing: pip install {' '.join(missing)}. Or name "
                f"{ORIGINAL}."
            )
        return found

    @property
    def is_kept(self) -> bool:
        """Whether its own layers are trained on."""
        return self.format is not None and not self.in_16_bits

    @property
    def in_16_bits(self) -> bool:
        """Whether its files are read as the 16-bit weights that they stand for."""
        own = self.given is not None and not isinstance(self.given, BitsAndBytesConfig)
        return self.format is not None and self.format.is_read and not own

    def load(
        self, kind: Any, dtype: torch.dtype | str, quantization: QuantizationConfigMixin | None, **kwargs: Any
    ) -> tuple[PreTrainedModel, dict[str, Any]]:
        """Loads the model, and returns what transformers tells of its weights with it. `kind` is its class, or one of
        transformers' that finds the class; `dtype` is of what is not quantized, and `quantization` for weights that
        aren't yet. The others are of `from_pretrained`, `output_loading_info` among them.

        Raises `OptionError` where the format's layers can't be trained on here.
        """
        if self.format is None:
            return kind.from_pretrained(self.name, dtype=dtype, **_given(quantization), **kwargs)
        if self.in_16_bits:
            into = "kept in 16 bits" if quantization is None else "quantized anew, each as it is loaded"
            logger.info("%r is stored in %s: its weights are dequantized and %s.", self.name, self.format.title, into)
            return self._load_in_16_bits(kind, dtype, quantization, kwargs)
        return self._load_as_stored(kind, dtype, kwargs)

    def _load_as_stored(self, kind: Any, dtype: torch.dtype | str, kwargs: dict[str, Any]) -> Any:
        assert self.format is not None
        start, given = f"model={self.name!r} is quantized already, by {self.format.title}", self.given
        if isinstance(given, BitsAndBytesConfig):  # the same kind, and transformers takes the stored one
            own, its = (quantization_options(one) for one in (given, BitsAndBytesConfig.from_dict(self.stored)))
            for options in (own, its):
                options.pop("bnb_4bit_compute_dtype", None)
            if own != its:
                logger.warning("quantization_config has no effect: %s, and stays as it is: %s.", start, its)
            given = None
        if given is None:
            off = "" if self.quantize else " (quantize_base=False does not unpack it)"
            logger.info("%s, and is kept as it is%s.", start, off)
        try:
            if self.gguf is not None:
                model, info = load_gguf(self.name, self.gguf, kind, dtype, self.hub, **kwargs)
            else:
                model, info = kind.from_pretrained(self.name, dtype=dtype, **_given(given), **kwargs)
            quantizer = getattr(model, "hf_quantizer", None)
            trainable = quantizer is None or quantizer.is_trainable
        except torch.OutOfMemoryError:
            raise
        except (ImportError, RuntimeError) as error:
            raise OptionError(f"{start}, and can't be loaded here: {error} Or name {ORIGINAL}.") from error
        if not trainable:
            raise OptionError(f"{start}, in a way that transformers does not train on. Name {ORIGINAL}.")
        if isinstance(dtype, torch.dtype):
            _compute_in(model, dtype)
        return model, info

    def _load_in_16_bits(
        self, kind: Any, dtype: torch.dtype | str, quantization: QuantizationConfigMixin | None, kwargs: dict[str, Any]
    ) -> Any:
        from transformers import AutoConfig, GenerationConfig

        hub = {key: kwargs.pop(key) for key in _HUB if key in kwargs}
        config = AutoConfig.from_pretrained(self.name, trust_remote_code=kwargs.get("trust_remote_code"), **hub)
        for part in (config, config.get_text_config(decoder=True)):
            vars(part).pop("quantization_config", None)
        if hasattr(kind, "_model_mapping"):
            kind = kind._model_mapping[type(config)]
        files = {"config": config, "state_dict": weights_in_16_bits(self.name, self.stored, hub)}
        model, info = kind.from_pretrained(None, dtype=dtype, **_given(quantization), **files, **kwargs)
        model.config._name_or_path = model.name_or_path = self.name
        try:
            model.generation_config = GenerationConfig.from_pretrained(self.name, **hub)
        except OSError:  # it has none of its own, and the model's defaults hold
            pass
        return model, info


def _given(quantization: QuantizationConfigMixin | None) -> dict[str, Any]:
    """Returns it as an argument; None would take the place of the one that the checkpoint has."""
    return {} if quantization is None else {"quantization_config": quantization}


def _compute_in(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Has what is not quantized of a checkpoint, and the products of what is, in a dtype: transformers leaves them in
    the one that they were saved in, and float16 has too few exponents to train in without scaling."""
    halves, before = {torch.float16, torch.bfloat16}, set()
    for module in model.modules():
        weight = module._parameters.get("weight")
        if (state := getattr(weight, "quant_state", None)) is not None and state.dtype != dtype:
            before.add(state.dtype)
            state.dtype = module.compute_dtype = dtype
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.dtype in halves - {dtype}:
            before.add(tensor.dtype)
            tensor.data = tensor.data.to(dtype)
    if before:
        model.config.dtype = dtype
        quantization = getattr(model.config, "quantization_config", None)
        if isinstance(quantization, BitsAndBytesConfig) and quantization.load_in_4bit:
            quantization.bnb_4bit_compute_dtype = dtype
        names = ", ".join(sorted(str(one).removeprefix("torch.") for one in before))
        logger.info("The checkpoint computes in %s: changed to %s.", names, str(dtype).removeprefix("torch."))
