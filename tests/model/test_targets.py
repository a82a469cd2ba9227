"""Which layers get LoRA: the rule on layers made by hand and on real families, and the line that says it."""

import logging
import re
from typing import Any

import pytest
import torch
import zoo
from family_matrix import logits
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from trainer_helpers import lora
from transformers import LlamaForCausalLM

from dpo_peft import OptionError
from dpo_peft.model.loading import attach_adapter, load_on_base
from dpo_peft.model.targets import computes_linear, read_past, targets_as_named


def adapted(model: nn.Module) -> set[str]:
    """Names of the layers with an adapter, without the numbers of layers."""
    names = (name.removeprefix("base_model.model.") for name, m in model.named_modules() if hasattr(m, "lora_A"))
    return {re.sub(r"\.\d+\.", ".", name) for name in names}


# ---- The rule -------------------------------------------------------------------------------------------------------


class Scaled(nn.Linear):
    """A linear layer whose output is not a linear layer's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * x.mean()


class OwnForward(nn.Linear):
    """A linear layer in other words."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T if self.bias is None else x @ self.weight.T + self.bias


class Mlp(nn.Module):
    """A layer of every sort."""

    def __init__(self, mlp: nn.Module):
        super().__init__()
        self.dense = mlp
        self.gate, self.shared_expert_gate = nn.Linear(64, 2), nn.Linear(64, 1)
        self.experts = nn.ModuleList(nn.Linear(64, 64) for _ in range(2))
        self.attention = nn.ModuleDict({"gate": nn.Linear(64, 64)})  # no router: beside no experts
        self.indexer = nn.ModuleDict({"proj": nn.Linear(64, 64)})
        self.my_router_layer, self.scaled, self.own = nn.Linear(64, 64), Scaled(64, 64), OwnForward(64, 64)
        self.read, self.unused, self.detached = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = self.gate(x).softmax(-1)
        x = x + sum(chosen[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts))
        x = x + self.shared_expert_gate(x).sigmoid() * self.attention["gate"](x) + self.indexer["proj"](x)
        x = x + self.my_router_layer(x) + self.scaled(x) + self.own(x) + x @ self.read.weight.T + self.read(x)
        return self.dense(x) + self.detached(x).detach()


@pytest.fixture
def by_hand(tiny_llama: Any) -> LlamaForCausalLM:
    model = tiny_llama()
    for layer in model.model.layers:
        layer.mlp = Mlp(layer.mlp)
    return model


FIT = {f"model.layers.self_attn.{kind}_proj" for kind in "qkvo"}
FIT |= {f"model.layers.mlp.dense.{kind}_proj" for kind in ("gate", "up", "down")}
FIT |= {"model.layers.mlp.attention.gate", "model.layers.mlp.own"}


def test_the_rule_on_layers_made_by_hand(by_hand: Any, caplog: Any) -> None:
    with caplog.at_level(logging.INFO, "dpo_peft"):
        model, _ = attach_adapter(by_hand)
    assert adapted(model) == FIT
    (line,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("LoRA on ")]
    weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert line.startswith(f"LoRA on {2 * len(FIT)} layers, {weights:,} weights: self_attn.q_proj, ")
    for names, why in (
        ("lm_head", "it is the head"),
        ("mlp.gate, mlp.my_router_layer, mlp.shared_expert_gate", "it is a router"),
        ("indexer.proj", "it is an indexer"),
        ("mlp.experts", "it is an expert"),
        ("mlp.read", "the model reads its weight itself"),
        ("mlp.scaled", "it is no plain linear layer"),
        ("mlp.detached, mlp.unused", "the log-probs of a short text do not depend on it"),
    ):
        assert f"Not on {names} ({why})." in line


def test_what_a_user_names_stays(by_hand: Any, caplog: Any) -> None:
    with caplog.at_level(logging.INFO, "dpo_peft"):
        model, _ = attach_adapter(by_hand, lora(target_modules=["read", "gate", "nothing"]))
    assert adapted(model) == {f"model.layers.mlp.{name}" for name in ("read", "gate", "attention.gate")}
    assert "No layer is called nothing." in caplog.text and "Not on" not in caplog.text


def test_what_is_linear_and_what_is_read() -> None:
    assert computes_linear(OwnForward) and not computes_linear(Scaled)
    assert read_past(Mlp(nn.Identity())) == ["read"]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("name", "ends", "without"),
    [
        ("hunyuan_moe", ["shared_mlp.gate_proj", "self_attn.q_proj"], ["gate.wg", "mlp.gate"]),
        ("afmoe", ["self_attn.gate_proj", "shared_experts.up_proj", "mlp.gate_proj"], ["router.gate"]),
        ("gemma3n_text", ["per_layer_input_gate", "laurel.linear_left"], ["prediction_coefs", "modality_router"]),
        ("deepseek_v32", ["kv_b_proj", "mlp.up_proj"], ["indexer.wq_b", "indexer.wk", "mlp.gate"]),
        ("zamba2", ["in_proj", "o_proj"], ["mamba.out_proj"]),
        ("qwen4_exp_text", ["ple.key_proj", "ple.value_proj"], ["shared_expert_gate", "index_qk_proj"]),
        ("gpt2", ["attn.c_attn", "mlp.c_proj"], ["lm_head"]),
    ],
)
def test_the_rule_on_families(name: str, ends: list[str], without: list[str]) -> None:
    model, reference = attach_adapter(zoo.build(name))
    found = adapted(model)
    assert [end for end in ends if not any(layer.endswith(end) for layer in found)] == []
    assert [layer for layer in found if layer.endswith(tuple(without))] == []
    assert reference.adapter is None  # wrapping the layers left the base as it was


def test_outside_the_language_model_there_is_none() -> None:
    """Its names do not tell the vision tower's layers from the others: a pattern does, also for PEFT."""
    model, _ = attach_adapter(zoo.build("pixtral-vl"))
    assert {name.split(".")[1] for name in adapted(model)} == {"language_model"}
    config = model.peft_config["default"]
    assert len(adapted(get_peft_model(zoo.build("pixtral-vl"), LoraConfig(**config.to_dict())))) == 7


# ---- What PEFT makes of it ------------------------------------------------------------------------------------------


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["qwen3_next", "mllama-vl"])
def test_peft_alone_finds_the_same_layers_again(name: str, tmp_path: Any) -> None:
    model, _ = attach_adapter(zoo.build(name))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".lora_B." in key:
                parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path)
    served = PeftModel.from_pretrained(zoo.build(name), tmp_path)
    assert adapted(served) == adapted(model)
    here, there, without = logits(model.eval()), logits(served.eval()), logits(zoo.build(name).eval())
    assert (here - there).abs().max() < 2e-6 * (here - without).abs().max()


def test_an_adapter_of_elsewhere_is_read_as_peft_reads_it() -> None:
    config = lora(target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"])
    with targets_as_named():
        model = get_peft_model(zoo.build("qwen3_moe"), config)
    assert "model.layers.mlp.experts" in adapted(model)
    with targets_as_named(new=True), pytest.raises(ValueError, match="not found"):
        get_peft_model(zoo.build("qwen3_moe"), lora(target_modules=["gate_proj", "up_proj"]))


def test_names_that_only_experts_of_transformers_4_have_are_refused() -> None:
    with pytest.raises(OptionError, match="gate_proj"):
        attach_adapter(zoo.build("qwen3_moe"), lora(target_modules=["gate_proj", "up_proj"]))


@pytest.mark.parametrize(
    "targets", ["all-linear", ["gate_proj", "up_proj", "down_proj"], ["q_b_proj", "embed_tokens"]]
)
@pytest.mark.parametrize("experts", [False, True])
def test_experts_and_layers_of_their_names_are_kept_apart(targets: Any, experts: bool, tmp_path: Any) -> None:
    """Experts of DeepSeek V3 only when asked, and the same again by us."""
    model, _ = attach_adapter(zoo.build("deepseek_v3"), lora(target_modules=targets), lora_experts=experts)
    model.save_pretrained(tmp_path)
    zoo.build("deepseek_v3").save_pretrained(tmp_path / "base")
    again = load_on_base(str(tmp_path), str(tmp_path / "base"), "", {}, None, False, {"dtype": "float32"})
    assert adapted(again) == adapted(model)
    assert any("experts" in name and "shared" not in name for name in adapted(model)) == experts
    assert any(name.endswith("mlp.gate_proj") for name in adapted(model)) == ("embed_tokens" not in targets)
    assert any(name.endswith("embed_tokens") for name in adapted(model)) == ("embed_tokens" in targets)
    first, second = (m.peft_config["default"] for m in (model, again))
    assert {*first.target_modules} == {*second.target_modules}
    assert {*(first.target_parameters or ())} == {*(second.target_parameters or ())}
