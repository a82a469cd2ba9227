"""Layers that are sharded or streamed, as planned: bytes and times by hand, the bytes of real placements, choices."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trainer_helpers import id_pairs, ours
from trainer_helpers import lora as lora_config
from transformers import LlamaConfig, Qwen3MoeConfig

from dpo_peft import OptionError, planning
from dpo_peft.model.loading import attach_adapter, load_base, storage_report
from dpo_peft.model.placement import placement_of, stream
from dpo_peft.planning import GIB, PRESETS, Lora, MemoryModel, Shape, Sketch, layers_to_stream, of_size, plan_step
from dpo_peft.planning.gpus import GPUS, TFLOPS
from dpo_peft.planning.steps import Pace, hiding_tokens
from dpo_peft.training import memory_budget

SHAPE = Shape.llama(hidden=64, intermediate=128, layers=4, heads=4, kv_heads=2, vocab=320)
MODEL = MemoryModel.of_shape(SHAPE, Lora.of(SHAPE, 8))
EIGHT = MemoryModel.of_shape(PRESETS["8b"][1])
LAYER = 18432  # two of 64 x 64 weights in half a byte each, two of 32 x 64, three of 128 x 64; no constant is large
PACE = Pace(flops=8 * 36864, bandwidth=368.64)  # 4 layers of 36,864 weights, 2 operations each: a token in a second


# ---- Bytes ----------------------------------------------------------------------------------------------------------


def test_bytes_by_hand() -> None:
    """2 of 4 streamed: two layers less, and both of them open. Sharded over 2: half of each, and three open."""
    assert MODEL.layer_bytes == (LAYER,) * 4
    whole, streamed, sharded = (m.fixed for m in (MODEL, replace(MODEL, streamed=2), replace(MODEL, shards=2)))
    assert streamed == {**whole, "quantized_weights": MODEL.quantized - 2 * LAYER, "open_layers": 2 * LAYER}
    assert replace(MODEL, streamed=1).fixed["open_layers"] == LAYER
    rest = {"quantized_weights": MODEL.quantized - 4 * LAYER, "shard": 4 * LAYER / 2, "open_layers": 3 * LAYER}
    assert sharded == {**whole, **rest}
    assert "open_layers" not in whole
    plain = MemoryModel.of_shape(SHAPE, Lora.of(SHAPE, 8), quantize=False, streamed=4)
    assert plain.layer_bytes == (2 * 36864,) * 4
    assert plain.fixed["unquantized_weights"] == plain.unquantized - 4 * 2 * 36864
    uneven = replace(MODEL, layer_bytes=(1.0, 5.0, 2.0, 4.0), streamed=4)
    assert uneven.fixed["open_layers"] == 7


SIZES = dict(vocab_size=320, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, intermediate_size=64, head_dim=16)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("quantize", [True, False])
@pytest.mark.parametrize(
    "config",
    [LlamaConfig(**SIZES, intermediate_size=1600), Qwen3MoeConfig(**SIZES, **EXPERTS)],
    ids=["llama", "experts"],
)
def test_bytes_are_those_of_a_real_placement(config: Any, quantize: bool, tmp_path: Any) -> None:
    """An MLP of 1600 has scales that come, and others that stay."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = attach_adapter(load_base(str(tmp_path), quantize=quantize), lora_config())[0]
    placement = stream(model, torch.device("cpu"), 3)
    real = [layer.flat.numel() for layer in placement.layers]
    weight_bytes = model.get_input_embeddings().weight.itemsize
    options = {"quantize": quantize, "weight_bytes": weight_bytes}
    sketched = MemoryModel.of_sketch(Sketch(config, lora_config()), **options)
    assert list(sketched.layer_bytes) == real
    if config.model_type == "llama":
        assert list(MemoryModel.of_shape(Shape.of(config), **options).layer_bytes) == real
        assert sketched.token_flops == MemoryModel.of_shape(Shape.of(config), **options).token_flops
    else:  # attention 12,288 weights; the router 4 x 64; of 4 experts of 3 x 64 x 64 a token sees 2
        assert sketched.token_flops == 2 * 3 * (12288 + 256 + 2 * 12288)


def test_a_run_plans_with_where_its_layers_are(tiny_llama: Any, make_tokenizer: Any, tmp_path: Any) -> None:
    options = {"stream_layers": 1, "gradient_checkpointing": True}
    run = ours(tiny_llama(), id_pairs(8), make_tokenizer(), tmp_path / "a", **options)
    memory, placement = run.step.budget.memory, placement_of(run.model)
    assert memory.placed == tuple(layer.flat.numel() for layer in placement.layers) and len(memory.placed) == 1
    stored = storage_report(run.model)
    fixed = memory.fixed
    weights = fixed["quantized_weights"] + fixed["unquantized_weights"] + fixed["open_layers"]
    assert weights == stored.quantized + stored.unquantized  # the one layer is open
    options["stream_layers"] = "auto"
    run = ours(tiny_llama(), id_pairs(8), make_tokenizer(), tmp_path / "b", **options)
    assert placement_of(run.model).layers == []  # on a CPU nothing is gained
    run.train()


# ---- Times ----------------------------------------------------------------------------------------------------------


def test_times_by_hand() -> None:
    """Two layers of four are 36,864 bytes: 100 seconds, as long as a pass over 100 tokens. A micro-batch of 60 tokens
    with 10 for the weights takes 70 a pass: two forward passes on one copy hide it, one backward pass waits for 30.
    With a copy for each pass each waits. Layers that are recomputed take 1.73 * 70 = 121, and don't wait."""
    some = replace(MODEL, streamed=2)
    assert (some.token_flops, PACE.copy_tokens(some)) == (PACE.flops, pytest.approx(100))
    assert PACE.copy_tokens(replace(MODEL, shards=4)) == pytest.approx(150)  # 3 of 4 parts of twice as many layers
    sample, options = (60, 90, 40), {"pass_tokens": 10, "least_tokens": 0, "copy_tokens": 100.0}
    ample = plan_step([sample], some, GIB, **options)
    assert (ample.waiting, ample.cost) == (30, 3 * 10 + 30)
    assert PACE.seconds(ample, some, 1) == pytest.approx(3 * 60 + 60 + 6 * 40 * 320 * 64 / PACE.flops)
    assert plan_step([sample], some, GIB, forward_copies=2, **options).waiting == 3 * 30
    assert plan_step([sample], replace(some, fused=False), GIB, **options).waiting == 3 * 30
    assert plan_step([sample], some, some.peak(*sample, 4), **options).waiting == 30 / 4  # 3 layers
    assert plan_step([sample], some, GIB, **{**options, "copy_tokens": 0}).waiting == 0
    assert hiding_tokens(1000, 0, 2, 1) == hiding_tokens(1000, 1, 2, 2) == 600
    assert hiding_tokens(1000, 1, 2, 1) == pytest.approx(1000 / 1.73 - 400)


def test_micro_batches_are_larger_where_layers_come() -> None:
    """As in `test_planning.test_the_cost_by_hand`, where two samples are cheaper apart."""
    sample = (3000, 4500, 2250)
    limit, options = EIGHT.peak(6000, 9000, 4500, 8), {"pass_tokens": 10, "least_tokens": 0}
    assert len(plan_step([sample] * 2, EIGHT, limit, **options).micro_batches) == 2
    assert len(plan_step([sample] * 2, EIGHT, limit, copy_tokens=9000, **options).micro_batches) == 1


# ---- How many layers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gib", [4.5, 5, 6])
def test_as_few_layers_are_streamed_as_leave_room(gib: float) -> None:
    limit, pace = gib * GIB, of_size("RTX4090", 0).pace(False)
    number = layers_to_stream(EIGHT, limit, pace, 1024, 0)
    rows = [replace(EIGHT, streamed=n).longest_row(limit, 32) for n in (number - 1, number)]
    assert 0 < number < 32 and rows[0] < 1024 <= rows[1]
    wider = layers_to_stream(EIGHT, limit, of_size("H100", 0).pace(False), 1024, 3000)  # whose passes take 3,600
    room = [replace(EIGHT, streamed=n).largest_tokens(limit, 32) for n in (wider - 1, wider)]
    assert wider > number and room[0] < 3000 and (room[1] >= 3000 or wider == 32)


def test_none_is_streamed_where_all_fit_and_all_where_none_does() -> None:
    pace = of_size("RTX4090", 0).pace(False)
    assert layers_to_stream(EIGHT, 22 * GIB, pace, 1024, 20000) == 0
    assert layers_to_stream(EIGHT, GIB, pace, None, 20000) == 32
    assert layers_to_stream(EIGHT, 4 * GIB, Pace(pace.flops, 1e6), 64, 1e9) == 32  # a link too slow to hide


def test_auto_on_a_gpu(tmp_path: Any, monkeypatch: Any) -> None:
    """What `layers_to_stream` says of the model as it lies in the CPU's memory; the most over all processes."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, intermediate_size=1600)).save_pretrained(tmp_path)
    model = attach_adapter(load_base(str(tmp_path)), lora_config())[0]
    args: Any = SimpleNamespace(stream_layers="auto", device=torch.device("cuda"), fused_layers=None, max_length=64)
    vars(args).update(max_memory_gib=None, optim="adamw_torch", bf16=True, fp16=False, activation_offloading=False)
    vars(args).update(per_device_train_batch_size=1, gradient_accumulation_steps=1, max_tokens_per_microbatch=16)
    args.caches_reference = False
    shape = Shape.of(model.config)
    memory = MemoryModel.of_shape(shape, Lora.of(shape, 4), optimizer="adamw_torch", row=64)
    limits = [replace(memory, streamed=n).peak(128, 128, 128, 3) + 1 for n in range(4)]
    monkeypatch.setattr(memory_budget, "_pace", lambda args: Pace(1e12, 1e12))
    for limit in (10 * GIB, *limits[2:]):
        monkeypatch.setattr(memory_budget, "memory_limit", lambda *_, limit=limit: limit)
        expected = layers_to_stream(memory, limit, Pace(1e12, 1e12), 64, 16)
        assert memory_budget.layers_to_stream(model, args, None) == expected
    monkeypatch.setattr(memory_budget, "gather_over_processes", lambda value: [value, 2, 1])
    assert memory_budget.layers_to_stream(model, args, None) == max(expected, 2)
    monkeypatch.setattr(memory_budget, "wing", lambda name: None)
    assert memory_budget.layers_to_stream(model, args, None) == 3


# ---- The plan -------------------------------------------------------------------------------------------------------


def test_70b_on_24_gb_and_what_the_plan_says_to_do() -> None:
    options: dict[str, Any] = {"shape": "70b", "gpu": "RTX4090", "optim": "adamw_8bit"}
    found = planning.plan(**options).figures
    assert not found["step"]["fits"]
    by = [{k: one[k] for k in ("stream_layers", "fsdp", "num_processes") if k in one} for one in found["remedies"]]
    assert [*map(set, by)] == [{"stream_layers"}, {"fsdp", "num_processes"}]
    for remedy, said in zip(by, found["remedies"], strict=True):
        followed = planning.plan(**options, **remedy).figures
        assert followed["step"]["fits"] and followed["peak"] <= followed["gpu"]["usable"]
        assert followed["placement"]["samples_per_second"] == said["samples_per_second"] > 0
    fewer = planning.plan(**options, fsdp="full_shard", num_processes=by[1]["num_processes"] - 1).figures
    assert not fewer["step"]["fits"]
    auto = planning.plan(**options, stream_layers="auto").figures["placement"]
    assert auto["layers"] == by[0]["stream_layers"]
    assert auto["pinned_memory"] == auto["layers"] * 512 * 2**20  # 421 MiB a layer, pinned in powers of two
    slow = planning.plan(**options, stream_layers=80, layer_gb_per_second=1).figures["placement"]
    assert 0.3 < slow["lost"] < 1 and slow["hiding_tokens"] > 5000
    assert planning.plan(shape="8b", gpu="24GB", stream_layers="auto").figures["placement"]["layers"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stream_layers": 33}, "stream_layers=33: the model has 32 layers"),
        ({"stream_layers": "auto", "gpu": None}, "depends on the GPU"),
        ({"fsdp": "full_shard"}, "give num_processes too"),
        ({"fsdp": "full_shard", "num_processes": 2, "stream_layers": 2}, "Set one"),
        ({"fsdp": "shard_grad_op", "num_processes": 2}, "fsdp='shard_grad_op'"),
        ({"layer_gb_per_second": 12.0}, "no effect without stream_layers or fsdp"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        planning.plan(**{"shape": "8b", "gpu": "24GB", **options})


def test_a_gpu_is_as_fast_as_its_name_or_size_says() -> None:
    assert TFLOPS.keys() == GPUS.keys()
    names = {
        "NVIDIA A100-SXM4-40GB": "A100-40GB",
        "NVIDIA A100 80GB PCIe": "A100-80GB",
        "NVIDIA H100 80GB HBM3": "H100",
        "NVIDIA L40S": "L40S",
        "NVIDIA GeForce RTX 4090": "RTX4090",
        "NVIDIA RTX 6000 Ada Generation": "RTX6000Ada",
        "24GB": "RTX3090",  # the slowest of that size
    }
    for name, like in names.items():
        assert of_size(name, GPUS[like] * GIB).like == like
