"""A model family from outside the package comes to the fused layers by one entry."""

from typing import Any

import pytest
import torch
from forward_models import COMMON, adapter_grads, add_lora, grad_difference
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from dpo_peft.forward import Sample, completion_logps, pack, plan_forward
from dpo_peft.fused.recognition import FAMILIES, Family

SAMPLES = [Sample([5, 9, 12, 40, 7, 33], [[8, 30, 51], [60, 17]]), Sample([3, 99], [[14, 15, 92], [35]])]


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnModel(LlamaForCausalLM):
    """Llama's layers under another type."""

    config_class = OwnConfig


class RenamedLayer(LlamaDecoderLayer):
    """A layer of the same parts with other names."""

    def __init__(self, config: LlamaConfig, index: int):
        super().__init__(config, index)
        self.pre_norm, self.post_norm = (
            self._modules.pop("input_layernorm"),
            self._modules.pop("post_attention_layernorm"),
        )
        self.mlp.w1, self.mlp.w3, self.mlp.w2 = (
            self.mlp._modules.pop(name) for name in ("gate_proj", "up_proj", "down_proj")
        )

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        attended, _ = self.self_attn(hidden_states=self.pre_norm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        x = self.post_norm(hidden_states)
        return hidden_states + self.mlp.w2(nn.functional.silu(self.mlp.w1(x)) * self.mlp.w3(x))


class RenamedModel(OwnModel):
    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.model.layers = nn.ModuleList(RenamedLayer(config, i) for i in range(config.num_hidden_layers))
        self.post_init()


def own(kind: type[OwnModel]) -> Any:
    torch.manual_seed(0)
    names = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim"
    )
    config = OwnConfig(**{name: COMMON[name] for name in [*names.split(), "initializer_range"]})
    return add_lora(kind(config).float())


RENAMED = Family(norm="pre_norm", mlp_norm="post_norm", gate_up=("mlp.w1", "mlp.w3"), down="mlp.w2")


@pytest.mark.parametrize(("kind", "family"), [(OwnModel, Family()), (RenamedModel, RENAMED)], ids=["llama", "renamed"])
def test_one_entry_brings_a_family(kind: type[OwnModel], family: Family, monkeypatch: Any) -> None:
    model = own(kind)
    plan = plan_forward(model)
    assert plan.shared and plan.fused is None and "layers of the model type 'own' are not known" in plan.unfused
    monkeypatch.setitem(FAMILIES, "own", family)
    plan = plan_forward(model)
    assert plan.fused is not None, plan.unfused
    (mine, mine_N), (theirs, theirs_N) = (
        (adapter_grads(model, scores.logps_C), scores.token_logps_N.detach())
        for scores in (completion_logps(model, pack(SAMPLES), backend) for backend in (plan.fused, "dense"))
    )
    assert (mine_N - theirs_N).abs().max() < 1e-5 and grad_difference(mine, theirs) < 1e-5


def test_an_entry_that_is_wrong_is_noticed(monkeypatch: Any) -> None:
    """Negative control: gate and up exchanged, and a part that isn't there."""
    model = own(OwnModel)
    monkeypatch.setitem(FAMILIES, "own", Family(gate_up=("mlp.up_proj", "mlp.gate_proj")))
    assert "fused log-probs differ by" in plan_forward(model).unfused
    monkeypatch.setitem(FAMILIES, "own", Family(down="mlp.w2"))
    assert "w2" in plan_forward(model).unfused
