"""The planner's sketch of a model without numbers, against loaded models of every family: bytes stored, adapters, and
what autograd keeps."""

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from peft import LoraConfig
from transformers import AutoConfig, GptOssConfig, Qwen3MoeConfig

from dpo_peft import OptionError
from dpo_peft.model.loading import attach_adapter, load_base, storage_report
from dpo_peft.planning import GIB, MemoryModel, Sketch
from dpo_peft.planning.sketch import nf4_bytes

ROW = 64
# Their layers can't be run without numbers: which tokens a router or an indexer takes decides sizes.
BY_NUMBERS = {"longcat_flash", "qwen4_exp_text", "qwen4_exp-vl"}
# Some of their layers have a gradient that is zero, as short texts don't reach them: an adapter leaves them out.
UNREACHED = {"deepseek_v4", "mllama-vl"}
# A few small layers of their vision towers are taken for ones that stay in 16 bits.
ROUGHLY = {"gemma4-vl", "gemma4_moe-vl", "gemma4_unified-vl"}
FAMILIES = [*zoo.TEXT, *(f"{name}-vl" for name in zoo.COMPOSITES)]


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options})


def loaded(name: str, folder: Path) -> tuple[Any, Any]:
    """The config of a family, and its model with the default adapter on NF4."""
    zoo.build(name).save_pretrained(folder)
    return AutoConfig.from_pretrained(folder), attach_adapter(load_base(str(folder)), lora())[0]


def bytes_kept(model: Any, rows: int) -> int:
    """Bytes of the distinct tensors that a pass over rows of text keeps for its backward, weights left out."""
    causal_lm = model.get_base_model()
    decoder = causal_lm.get_decoder()
    decoder = decoder.model if hasattr(decoder, "lm_head") else decoder
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    storages: dict[int, Any] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return tensor

    model.train()
    hook = causal_lm.get_input_embeddings().register_forward_hook(lambda m, a, out: out.requires_grad_())
    ids = torch.randint(5, 290, (rows, ROW))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        states = decoder(input_ids=ids, use_cache=False).last_hidden_state
    hook.remove()
    assert states.grad_fn is not None
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.sampled(96, slow=12)
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in BY_NUMBERS])
def test_a_sketch_has_the_bytes_of_the_loaded_model(name: str, tmp_path: Path) -> None:
    config, model = loaded(name, tmp_path)
    real = storage_report(model)
    sketch = Sketch(config, lora(), row=ROW)
    predicted = MemoryModel.of_sketch(sketch, fused=False)
    if name in ROUGHLY:
        whole = real.quantized + real.unquantized
        assert whole <= predicted.quantized + predicted.unquantized <= 1.1 * whole
    else:
        assert (predicted.quantized, predicted.unquantized) == (real.quantized, real.unquantized)
    assert predicted.trained >= real.trainable_count
    assert name in UNREACHED or predicted.trained == real.trainable_count
    for rows in (2, 3):
        kept = bytes_kept(model, rows)
        assert kept <= predicted.components(rows * ROW, rows * ROW, 1, 0)["saved_activations"] <= 1.3 * kept


@pytest.mark.slow
def test_a_prediction_from_other_lengths_would_show(tmp_path: Path) -> None:
    """Negative control: without what it keeps per pair of tokens in a row, gpt-oss is predicted too small."""
    config, model = loaded("gpt_oss", tmp_path)
    short = Sketch(config, lora(), row=ROW // 4)
    kept, sizes = bytes_kept(model, 2), (2 * ROW, 2 * ROW, 1, 0)
    assert MemoryModel.of_sketch(short, fused=False).components(*sizes)["saved_activations"] < kept
    longer = MemoryModel.of_sketch(short, fused=False, row=ROW).components(*sizes)["saved_activations"]
    assert kept <= longer <= 1.3 * kept


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", sorted(BY_NUMBERS))
def test_what_cannot_be_run_without_numbers_is_refused(name: str, tmp_path: Path) -> None:
    zoo.build(name).save_pretrained(tmp_path)
    sketch = Sketch(AutoConfig.from_pretrained(tmp_path), lora())
    with pytest.raises(OptionError, match="can't be predicted: its layers can't be run without numbers.*--shape"):
        _ = sketch.costs


def test_experts_in_4_bits_by_hand() -> None:
    """3 experts of 600 numbers: 300 bytes, 10 scales, one scale of these and an offset each; two tables for all."""
    assert nf4_bytes(600, experts=3) == 3 * (300 + 10 + 4 + 4) + 64 + 1024
    assert nf4_bytes(600, nested=False, experts=3) == 3 * (300 + 40) + 64


PUBLISHED = {
    "qwen3-30b-a3b": Qwen3MoeConfig(
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        vocab_size=151936,
    ),
    "gpt-oss-20b": GptOssConfig(
        hidden_size=2880,
        intermediate_size=2880,
        num_hidden_layers=24,
        num_local_experts=32,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=201088,
    ),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("name", "billions", "most"), [("gpt-oss-20b", 20.91, 14), ("qwen3-30b-a3b", 30.53, 20)])
def test_mixtures_as_published_fit_their_cards(name: str, billions: float, most: int) -> None:
    """Weights, adapter, gradients and optimizer, with the default adapter."""
    sketch = Sketch(PUBLISHED[name], lora(r=16))
    assert round(sketch.weights / 1e9, 2) == billions
    memory = MemoryModel.of_sketch(sketch)
    assert sum(memory.fixed.values()) <= most * GIB
    assert memory.quantized > 0.4 * sketch.weights
    assert memory.largest_tokens(most * GIB + 3 * GIB, sketch.layers) > 4000


def test_adapters_on_experts_are_counted(tmp_path: Path) -> None:
    """The factors of rank 4 for each of 4 experts: 64 x 64 (gate and up of 32 each) and 32 x 64, in 2 layers."""
    config, model = loaded("qwen3_moe", tmp_path)
    both = [Sketch(config, lora(), experts=on).trained for on in (False, True)]
    assert both[1] - both[0] == 2 * 4 * 4 * ((64 + 64) + (32 + 64))
    own = MemoryModel.of_model(model, storage_report(model), fused=False)
    assert own.peak(100, 100, 50, 0) > own.peak(100, 100, 50, 2)
