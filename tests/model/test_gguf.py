"""GGUF files as bases: against ggml's own dequantization, and the same model held dense."""

import gc
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf_files import dequantized_by_ggml, quantized, write_gguf
from torch import nn
from trainer_helpers import adapter_weights, ours, step_logs, text_pairs
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, set_seed

from dpo_peft import cli, quickstart
from dpo_peft.errors import OptionError, ReferenceMismatchError
from dpo_peft.files import read_rows
from dpo_peft.forward.gguf import GgufLinear, dequantized
from dpo_peft.merge.merging import merge_adapter
from dpo_peft.model.adapter_source import load_trained
from dpo_peft.model.base import load_base
from dpo_peft.model.gguf import from_named
from dpo_peft.model.loading import storage_report

pytest.importorskip("xllamacpp")
TYPES = "Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS".split()
SLOW_TYPES = "IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ1_S IQ1_M".split()  # to quantize to
ROWS = text_pairs(16)
FLOAT32 = {"dtype": "float32"}


@pytest.fixture(scope="module")
def file(tiny_llama, make_tokenizer, tmp_path_factory) -> Callable[[str], str]:
    """`file("Q4_0")`: a tiny Llama whose matrices are in that type, wide enough for blocks of 256."""
    folder, model = tmp_path_factory.mktemp("gguf"), tiny_llama(hidden_size=256, intermediate_size=256)

    def path(kind: str) -> str:
        if not (made := folder / f"{kind}.gguf").is_file():
            write_gguf(made, model, make_tokenizer(), kind, "Q8_0" if "Q" in kind else None)
        return str(made)

    return path


def dense(path: str, dtype: str = "float32") -> Any:
    """Returns the model of a file, its blocks dequantized by ggml itself."""
    model = load_base(path, init_kwargs={"dtype": dtype})
    for name, layer in list(model.named_modules()):
        if isinstance(layer, GgufLinear):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=False)
            weight = dequantized_by_ggml(layer.blocks.data, gguf.GGMLQuantizationType(layer.ggml_type))
            plain.weight = nn.Parameter(weight.to(getattr(torch, dtype)), requires_grad=False)
            model.set_submodule(name, plain)
    model.hf_quantizer.remove_quantization_config(model)
    return model


@pytest.mark.parametrize("kind", TYPES + [pytest.param(kind, marks=pytest.mark.slow) for kind in SLOW_TYPES])
def test_weights_are_those_of_ggml_to_the_bit(kind):
    as_type = gguf.GGMLQuantizationType[kind]
    source = torch.randn(48, 512) * torch.rand(48, 1)
    blocks = quantized(source, as_type)
    weights = dequantized(blocks, int(as_type), torch.float32)
    assert torch.equal(weights, dequantized_by_ggml(blocks, as_type))
    assert (weights - source).norm() < 0.5 * source.norm()  # and mean something
    broken = blocks.clone()
    broken[7, 9] ^= 1
    assert (dequantized(broken, int(as_type), torch.float32) != weights).any(1).nonzero().flatten().tolist() == [7]


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q6_K"])
def test_every_weight_has_its_place(file, tiny_llama, kind):
    """llama.cpp's files hold queries and keys in another order of rows."""
    original, path, state = tiny_llama(hidden_size=256, intermediate_size=256), file(kind), torch.get_rng_state()
    model = load_base(path, init_kwargs=FLOAT32)
    assert torch.equal(torch.get_rng_state(), state)  # nothing was drawn first
    for name, weight in original.named_parameters():
        layer, _, _ = name.rpartition(".")
        own = model.get_submodule(layer).weight
        if weight.ndim == 1 or kind == "F32":
            expected = weight
        elif kind in ("F16", "BF16"):
            expected = weight.to(torch.float16 if kind == "F16" else torch.bfloat16).float()
        else:
            in_blocks = "Q8_0" if "embed" in name or "lm_head" in name else kind
            as_type = gguf.GGMLQuantizationType[in_blocks]
            expected = dequantized_by_ggml(quantized(weight, as_type), as_type)
        assert torch.equal(own, expected), name
    assert model.config.rope_parameters == original.config.rope_parameters
    assert sum(isinstance(layer, GgufLinear) for layer in model.modules()) == (0 if "F" in kind else 14)


def test_the_gradient_of_a_layer():
    layer = GgufLinear(32, 6, True, 2, torch.float64)
    layer.blocks.data = quantized(torch.randn(6, 32), gguf.GGMLQuantizationType.Q4_0)
    layer.bias.data.normal_()
    x = torch.randn(2, 3, 32, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)
    plain = nn.functional.linear(x, dequantized(layer.blocks, 2, torch.float64), layer.bias)
    assert torch.equal(layer(x), plain)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x.float()).dtype == torch.bfloat16


@pytest.mark.parametrize("kind, fused", [("Q4_1", True), ("Q6_K", False)])
def test_a_run_is_that_of_the_dense_model(file, make_tokenizer, tmp_path, kind, fused):
    how = {"max_steps": 3, "fused_layers": fused, "max_grad_norm": 0.0, "learning_rate": 1e-2}
    runs, path = {}, file(kind)
    loaded = load_base(path, init_kwargs=FLOAT32)
    for name, model in {"gguf": loaded, "dense": dense(path), "other": dense(file("Q4_0"))}.items():
        set_seed(0)
        runs[name] = ours(model, ROWS, make_tokenizer(), tmp_path / name, **how)
        runs[name].train()
        assert step_logs(runs[name])[0]["rewards/margins"] == 0
    for name, close in (("dense", True), ("other", False)):
        for ours_, its in zip(step_logs(runs["gguf"]), step_logs(runs[name]), strict=True):
            for what, tolerance in (("logps/chosen", 1e-6), ("loss", 1e-6), ("grad_norm", 1e-5)):
                same = ours_[what] == pytest.approx(its[what], rel=tolerance)
                assert same or not close, (name, what)
    ours_, its, others = (adapter_weights(run) for run in runs.values())
    assert all(torch.allclose(weight, its[key], atol=1e-6, rtol=1e-5) for key, weight in ours_.items())
    assert not all(torch.allclose(weight, others[key], atol=1e-6, rtol=1e-5) for key, weight in ours_.items())


def test_only_blocks_stay_in_memory(file, make_tokenizer, tmp_path):
    path = file("Q4_K")
    before = {id(tensor) for tensor in gc.get_objects() if isinstance(tensor, torch.Tensor)}
    run = ours(path, ROWS, make_tokenizer(), tmp_path, max_steps=2, model_init_kwargs=FLOAT32)
    run.train()
    layers = [layer for layer in run.model.modules() if isinstance(layer, GgufLinear)]
    assert {layer.blocks.shape for layer in layers} == {(256, 144), (128, 144)}
    report = storage_report(run.model)
    in_file = [tensor for tensor in gguf.GGUFReader(path).tensors if tensor.tensor_type.name == "Q4_K"]
    assert (
        report.quantized == sum(tensor.n_bytes for tensor in in_file) == sum(layer.blocks.nbytes for layer in layers)
    )
    gc.collect()
    sizes = {layer.in_features * layer.out_features for layer in layers}
    alive = [one for one in gc.get_objects() if isinstance(one, torch.Tensor) and id(one) not in before]
    assert len(alive) > len(layers)
    assert not [one.shape for one in alive if one.is_floating_point() and one.numel() in sizes]


@pytest.fixture(scope="module")
def trained(file, make_tokenizer, tmp_path_factory) -> tuple[Any, str]:
    """A run on a file in Q4_K, and the folder of its adapter."""
    folder = str(tmp_path_factory.mktemp("trained"))
    how = {"max_steps": 4, "learning_rate": 3e-2, "save_strategy": "steps", "save_steps": 2}
    run = ours(file("Q4_K"), ROWS, make_tokenizer(), folder, model_init_kwargs=FLOAT32, **how)
    run.train()
    run.save_model()
    return run, folder


@pytest.mark.parametrize("cached", [False, True])
def test_a_resumed_run_is_the_same(file, make_tokenizer, trained, tmp_path, cached):
    straight, folder = trained
    how = {"max_steps": 4, "learning_rate": 3e-2, "precompute_ref_log_probs": cached}
    shutil.copytree(Path(folder, "checkpoint-2"), tmp_path / "checkpoint-2")
    resumed = ours(file("Q4_K"), ROWS, make_tokenizer(), tmp_path, model_init_kwargs=FLOAT32, **how)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    expected = adapter_weights(straight)
    same = [torch.equal(weight, expected[name]) for name, weight in adapter_weights(resumed).items()]
    assert all(same) and resumed.state.global_step == 4


def test_the_adapter_finds_its_file_again(file, trained, tmp_path):
    run, folder = trained
    config = json.loads(Path(folder, "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == file("Q4_K")
    again, ids = load_trained(folder), torch.arange(5, 40)[None]
    assert again.reference.adapter is None
    with torch.no_grad():
        assert torch.equal(again.model(ids).logits, run.model.eval()(ids).logits)
    moved = tmp_path / "elsewhere"  # with its base beside it
    shutil.copytree(folder, moved / "run")
    config["base_model_name_or_path"] = "/nowhere/models/base.gguf"
    (moved / "run" / "adapter_config.json").write_text(json.dumps(config))
    shutil.copy(file("Q4_K"), moved / "base.gguf")
    assert load_trained(str(moved / "run")).model.config._name_or_path == str(moved / "base.gguf")
    shutil.copy(file("Q5_K"), moved / "base.gguf")
    with pytest.raises(ReferenceMismatchError, match="base weights"):
        load_trained(str(moved / "run"))


def test_a_merge_adds_to_what_the_file_means(file, trained, tmp_path):
    run, folder = trained
    report = merge_adapter(folder, tmp_path / "merged", dataset=ROWS.select(range(4)))
    assert (report.onto, report.dtype) == ("dequantized", "float32") and report.drift.mean_token < 1e-5
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    layer = run.model.get_base_model().model.layers[1].mlp.up_proj
    weight = dequantized_by_ggml(layer.base_layer.blocks.data, gguf.GGMLQuantizationType.Q4_K)
    delta = 2 * layer.lora_B.default.weight.detach() @ layer.lora_A.default.weight.detach()
    assert torch.allclose(merged.model.layers[1].mlp.up_proj.weight, weight + delta, atol=1e-6)
    assert delta.abs().max() > 1e-2
    for safe in (False, True):
        with pytest.raises(RuntimeError, match="merge the adapter by `dpo-peft merge`"):
            load_trained(folder, with_reference=False).model.merge_and_unload(safe_merge=safe)
    with pytest.raises(OptionError, match="onto='base16': the base of .* is a GGUF file"):
        merge_adapter(folder, tmp_path / "other", "base16")


# ---- What can't be read ---------------------------------------------------------------------------------------------


def test_the_tokenizer_of_a_file_is_the_models(tmp_path):
    folder = quickstart.model_path()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    own = AutoTokenizer.from_pretrained(folder)
    path = str(write_gguf(tmp_path / "quickstart.gguf", model, own, "Q8_0"))
    read = from_named(AutoTokenizer, path)
    for row in read_rows(quickstart.test_file()).select(range(20)):
        text = own.apply_chat_template([*row["prompt"], *row["chosen"]], tokenize=False)
        assert own(text)["input_ids"] == read(text)["input_ids"]
    assert (read.chat_template, read.eos_token, read.pad_token) == (own.chat_template, own.eos_token, own.pad_token)
    broken = path.replace("quickstart", "broken")
    Path(broken).write_bytes(Path(path).read_bytes().replace(b"gpt-2", b"gpt-9"))
    with pytest.raises(OptionError, match=r"splits text \(gpt-9\) is not known. Put the tokenizer's files"):
        from_named(AutoTokenizer, broken)
    own.save_pretrained(tmp_path)  # the remedy
    assert from_named(AutoTokenizer, broken)("One film.")["input_ids"] == own("One film.")["input_ids"]


@pytest.mark.parametrize(
    "before, after, message",
    [
        (b"llama", b"llamo", "its architecture is llamo, and only these .* llama, .* Name the 16-bit model"),
        (b"rope.freq_base", b"rope.freq_bass", "is llama, of which rope.freq_bass = 10000.0 is not known here. Name"),
        (b"blk.1.ffn_up.weight", b"blk.1.f_exps.weight", r"a mixture of experts \(llama\)"),
        (b"blk.1.ffn_up.weight", b"blk.9.ffn_up.weight", "holds blk.9.ffn_up.weight, which has no place"),
    ],
)
def test_files_that_are_refused(file, tmp_path, before, after, message):
    path = tmp_path / "changed.gguf"
    path.write_bytes(Path(file("Q4_0")).read_bytes().replace(before, after))
    with pytest.raises(OptionError, match=message):
        load_base(str(path))


def test_a_file_is_not_quantized_again(file):
    with pytest.raises(OptionError, match="by GGUF, and can't be quantized again. Leave it out."):
        load_base(file("Q4_0"), BitsAndBytesConfig(load_in_4bit=True))
    with pytest.raises(OptionError, match="can't be loaded"):
        load_base("missing.gguf")


@pytest.mark.slow
def test_the_command_trains_on_a_real_file(tmp_path, capsys):
    """SmolLM2 as others publish it, in Q4_1."""
    path, folder = os.environ.get("SMOLLM2_GGUF"), tmp_path / "run"
    if not path:
        pytest.skip("SMOLLM2_GGUF names no file")
    options = "--max_steps 2 --per_device_train_batch_size 2 --max_length 64 --bf16 false --use_cpu --report_to none"
    data = ["--dataset_name", quickstart.train_file(), "--output_dir", str(folder), "--logging_steps", "1"]
    assert cli.main(["train", "--model_name_or_path", path, "--dtype", "float32", *data, *options.split()]) == 0
    first, second = json.loads((folder / "metrics.json").read_text())["log_history"][:2]
    assert first["rewards/margins"] == 0 != second["rewards/margins"]
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == path
    model = load_base(path, init_kwargs=FLOAT32)
    layers = [tensor for tensor in gguf.GGUFReader(path).tensors if tensor.tensor_type.name == "Q4_1"]
    assert storage_report(model).quantized == sum(tensor.n_bytes for tensor in layers) == 66_355_200
    tokens = from_named(AutoTokenizer, path)("In 2024, 15 films")["input_ids"]
    assert from_named(AutoTokenizer, path).decode(tokens[2:6]) == "2024"  # a digit a token, as SmolLM2's own has it
