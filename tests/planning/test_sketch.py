"""The planner's sketch of a model without numbers, against loaded models of every family: bytes stored, adapters, and
what autograd keeps."""

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from peft import LoraConfig
from transformers import AutoConfig

from dpo_peft.model.loading import attach_adapter, load_base, storage_report
from dpo_peft.planning import MemoryModel, Sketch

ROW = 64
# Their layers can't be run without numbers: which tokens an indexer takes decides sizes.
BY_NUMBERS = {"qwen4_exp_text", "qwen4_exp-vl"}
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


@pytest.mark.sampled(20)
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in BY_NUMBERS])
def test_a_sketch_has_the_bytes_of_the_loaded_model(name: str, tmp_path: Path) -> None:
    config, model = loaded(name, tmp_path)
    real = storage_report(model)
    sketch = Sketch(config, lora(), row=ROW)
    predicted = MemoryModel.of_sketch(sketch, fused=False)
    assert (predicted.quantized, predicted.unquantized) == (real.quantized, real.unquantized)
    assert predicted.trained == real.trainable_count
    for rows in (2, 3):
        kept = bytes_kept(model, rows)
        assert kept <= predicted.components(rows * ROW, rows * ROW, 1, 0)["saved_activations"] <= 1.3 * kept
