"""The plan of a model of text and images counts its tower and projector."""

from pathlib import Path

import pytest
import vision_models as vm

from dpo_peft.model.base import load_base
from dpo_peft.model.loading import storage_report
from dpo_peft.planning.run import plan


@pytest.mark.sampled(7)
@pytest.mark.parametrize("name", ["llava", "idefics3", "internvl", "gemma3", "qwen2_5_vl", "qwen3_vl", "mistral3"])
def test_weights_are_those_of_the_whole_model(name: str, tmp_path: Path) -> None:
    model = vm.build(name)
    model.save_pretrained(tmp_path)
    whole = model.num_parameters()
    for quantize in (False, None):
        figures = plan(model_name_or_path=str(tmp_path), quantize_base=quantize, max_memory_gib=4).figures
        assert figures["weights"] == pytest.approx(whole, rel=0.01)
        base = load_base(str(tmp_path), None, quantize is None, {"dtype": "bfloat16"})
        stored = storage_report(base.requires_grad_(False))
        for kind in ("quantized", "unquantized"):
            assert figures["components"][f"{kind}_weights"] == pytest.approx(getattr(stored, kind), rel=0.01)
