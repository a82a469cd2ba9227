"""A GGUF file as a base: its config, tokenizer and weights, with its linear layers left in their blocks.

transformers reads config, tokenizer and names; it would dequantize all weights. Blocks lie along a layer's inputs, so
that what llama.cpp's converter reorders, rows of queries and keys, is put back in blocks too.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import OptionError
from ..forward.gguf import GgufHead, GgufLinear, block_of, dequantized
from .gguf_families import FAMILIES, REMEDY, config_of, scaled_by
from .gguf_tokenizer import gguf_tokenizer

METHOD = "gguf_blocks"
_PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}  # ggml's types that are no blocks
_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")  # of positions


def is_gguf(name: str) -> bool:
    """Whether a model's name is that of a GGUF file."""
    return name.endswith(".gguf")


def gguf_place(name: str) -> tuple[str, dict[str, str]]:
    """Returns what `from_pretrained` takes for a model's name: of a GGUF file its folder, or its repository on the
    Hub, and the file in it."""
    if not is_gguf(name):
        return name, {}
    parts = name.split("/")
    if Path(name).is_file() or len(parts) < 3 or "" in parts:
        return str(Path(name).parent), {"gguf_file": Path(name).name}
    return "/".join(parts[:2]), {"gguf_file": "/".join(parts[2:])}


def from_named(auto: Any, name: str, **where: Any) -> Any:
    """Returns what one of transformers' Auto classes finds by a model's name, which may be a GGUF file's, whose
    tokenizer is the one beside it, if there is one.

    Raises:
        OptionError: of a GGUF file, what `config_of` refuses, or a tokenizer that isn't known.
    """
    place, file = gguf_place(name)
    if not file or (auto is AutoTokenizer and Path(place, "tokenizer_config.json").is_file()):
        return auto.from_pretrained(place, **where)
    if auto is AutoTokenizer:
        return gguf_tokenizer(name, _path(name, where))
    from transformers.integrations.gguf.reader import read_gguf_metadata

    metadata, names = read_gguf_metadata(_path(name, where))
    if metadata.get("split.count", 1) > 1:
        raise OptionError(f"model={name!r} is a part of a model: join the parts by llama-gguf-split --merge.")
    try:
        return AutoConfig.for_model(**config_of(metadata, names))
    except OptionError as error:
        raise OptionError(f"model={name!r} can't be trained on: {error}. {REMEDY}") from None


def _path(name: str, hub: Mapping[str, Any]) -> str:
    place, file = gguf_place(name)
    where = {key: value for key, value in hub.items() if key != "trust_remote_code"}
    return str(cached_file(place, file["gguf_file"], **where))


def open_gguf(name: str, hub: Mapping[str, Any]) -> Any:
    """Returns the `gguf.GGUFReader` of a file.

    Args:
        name: of the file.
        hub: where it is found, such as a revision.

    Raises:
        OptionError: it can't be trained on: another architecture, a part of a model, positions that are scaled.
        OSError, ValueError: there is no such file, or it is none.
    """
    from gguf import GGUFReader

    from_named(AutoConfig, name, **hub)
    reader, problem = GGUFReader(_path(name, hub)), None
    for tensor in reader.tensors:
        try:
            tensor.tensor_type in _PLAIN or block_of(tensor.tensor_type)
        except KeyError:
            problem = f"{tensor.name} is in {tensor.tensor_type.name}, which is not known"
    if problem:
        raise OptionError(f"model={name!r} can't be trained on: {problem}. {REMEDY}")
    return reader


def blocks_in(name: str) -> int:
    """Returns the bytes of a file's layers that are in blocks. Raises as `open_gguf`."""
    layers = (tensor for tensor in open_gguf(name, {}).tensors if tensor.name.startswith("blk."))
    return sum(tensor.n_bytes for tensor in layers if tensor.tensor_type not in _PLAIN)


class KeptBlocks(QuantizationConfigMixin):
    """Says which layers are in which of ggml's types, and of which the head was."""

    def __init__(self, types: Mapping[str, int] | None = None, head: int | None = None):
        self.quant_method: Any = METHOD
        self.types, self.head = dict(types or {}), head

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": METHOD}


class BlocksQuantizer(HfQuantizer):
    """Has `from_pretrained` make `GgufLinear` layers."""

    is_trainable = True

    def is_serializable(self) -> bool:
        return False

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        for name, ggml_type in self.quantization_config.types.items():
            old: Any = model.get_submodule(name)
            sizes = old.in_features, old.out_features, old.bias is not None
            model.set_submodule(name, GgufLinear(*sizes, ggml_type, old.weight.dtype))
        head: Any = model.get_output_embeddings()
        if self.quantization_config.head is not None and type(head) is nn.Linear:
            head.__class__, head.ggml_type = GgufHead, self.quantization_config.head


AUTO_QUANTIZER_MAPPING[METHOD] = BlocksQuantizer


def load_gguf(
    name: str, reader: Any, kind: Any, dtype: torch.dtype | str, hub: Mapping[str, Any], **kwargs: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Loads a model from a GGUF file: linear layers in their blocks, the rest in `dtype` (bfloat16 if "auto").

    Args:
        name: of the file.
        reader: what `open_gguf` returns for it.
        kind: the model's class, or one of transformers' that finds it.
        hub: where the file is found.
        kwargs: others of `from_pretrained`.

    Returns:
        The model, and what transformers tells of its weights.

    Raises:
        OptionError: a tensor has no place in the model, or its positions are scaled in an unknown way.
    """
    dtype = torch.bfloat16 if isinstance(dtype, str) else dtype
    warnings.filterwarnings("ignore", r"Could not find a config file in .*\.gguf ")  # of PEFT, when it saves
    config = from_named(AutoConfig, name, **hub)
    factors = {one.name: torch.from_numpy(np.array(one.data)) for one in reader.tensors if one.name in _FACTORS}
    if factors and not scaled_by(config, factors):
        problem = f"scales its positions in a way that is not known ({', '.join(factors)})"
        raise OptionError(f"model={name!r} {problem}. {REMEDY}")
    kind = kind._model_mapping[type(config)] if hasattr(kind, "_model_mapping") else kind
    with torch.device("meta"):
        empty = kind(config)
    weights, types = _weights(name, reader, empty, dtype)
    in_file = {tensor.name: int(tensor.tensor_type) for tensor in reader.tensors}
    head = in_file.get("output.weight", in_file["token_embd.weight"])
    kept = KeptBlocks(types, None if head in _PLAIN else head)
    how = {"config": config, "state_dict": weights, "dtype": dtype, "quantization_config": kept}
    model, info = kind.from_pretrained(None, **how, **{key: kwargs[key] for key in kwargs if key not in hub})
    model.config._name_or_path = model.name_or_path = name
    return model, info


def _weights(
    name: str, reader: Any, empty: PreTrainedModel, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Returns the tensors by their names in the model, and the types of the layers that stay in blocks."""
    from transformers.modeling_gguf_pytorch_utils import TensorProcessor, get_gguf_hf_weights_map

    called = reader.fields["general.architecture"].contents()
    names = get_gguf_hf_weights_map(empty, TensorProcessor(), called)
    weights: dict[str, Tensor] = {}
    types: dict[str, int] = {}
    for tensor in (one for one in reader.tensors if one.name not in _FACTORS):
        if tensor.name not in names:
            raise OptionError(
                f"model={name!r} holds {tensor.name}, which has no place in {type(empty).__name__}. {REMEDY}"
            )
        key = names[tensor.name]
        layer, ggml_type = empty.get_submodule(key.rpartition(".")[0]), int(tensor.tensor_type)
        data = torch.from_numpy(np.array(tensor.data))
        if ggml_type in _PLAIN:
            data = data.view(_PLAIN[ggml_type]).view([*reversed(tensor.shape.tolist())]).float()
        elif type(layer) is nn.Linear and layer is not empty.get_output_embeddings():
            types[key.removesuffix(".weight")] = ggml_type
            key = f"{key.removesuffix('weight')}blocks"
        else:
            data = dequantized(data, ggml_type, torch.float32)
        data = FAMILIES[called].restored(data, tensor.name, empty.config)
        weights[key] = data.to(dtype) if data.is_floating_point() else data
    return weights, types
