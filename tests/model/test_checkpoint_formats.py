"""Bases that are quantized already: what docs/quantization.md says becomes of them, by hand-made codes and scales."""

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from datasets import Dataset
from paths import REPO
from safetensors.torch import save_file
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from trainer_helpers import id_pairs, ours
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GptOssConfig,
    GPTQConfig,
    Mxfp4Config,
    Qwen3MoeConfig,
)

from dpo_peft import ImplicitReward, OptionError
from dpo_peft.merge import merge_adapter
from dpo_peft.model import stored_weights
from dpo_peft.model.adapter_source import load_trained
from dpo_peft.model.base import load_base
from dpo_peft.model.stored_weights import from_scaled

IDS = torch.arange(10, 40)[None]
FP8 = torch.float8_e4m3fn
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
Weights = dict[str, Tensor]


def write(folder: Path, like: str, stored: Weights, quantization: dict[str, Any] | None) -> str:
    """A folder with the files of `like`, but these weights."""
    shutil.copytree(like, folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    save_file({key: part.contiguous() for key, part in stored.items()}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    config |= {} if quantization is None else {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def as_fp8(weights: Weights, height: int, width: int) -> tuple[Weights, Weights]:
    """Projections in blocks of FP8 with scales, block by block; and what they stand for, in float64."""
    stored: Weights = {}
    meant = {key: weight.bfloat16().double() for key, weight in weights.items()}
    for key, weight in weights.items():
        if "proj" not in key:
            stored[key] = weight.bfloat16()
            continue
        rows, columns = -(-weight.shape[0] // height), -(-weight.shape[1] // width)
        codes, scales = torch.zeros_like(weight, dtype=FP8), torch.zeros(rows, columns)
        for i in range(rows):
            for j in range(columns):
                block = slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width)
                scales[i, j] = weight[block].abs().max() / 448
                codes[block] = (weight[block] / scales[i, j]).to(FP8)
                meant[key][block] = codes[block].double() * scales[i, j].double()
        stored |= {key: codes, f"{key}_scale_inv": scales}
    return stored, meant


FP8_CONFIG = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [48, 40]}


@pytest.fixture(scope="module")
def fp8(base_folder, tmp_path_factory) -> tuple[str, str, Weights]:
    """An FP8 checkpoint with blocks that don't divide its weights; the 16-bit one of the same weights; and these."""
    weights = AutoModelForCausalLM.from_pretrained(base_folder).state_dict()
    stored, meant = as_fp8(weights, 48, 40)
    folder = tmp_path_factory.mktemp("fp8")
    plain = {key: weight.to(torch.bfloat16) for key, weight in meant.items()}
    return (
        write(folder / "fp8", base_folder, stored, FP8_CONFIG),
        write(folder / "plain", base_folder, plain, None),
        meant,
    )


# ---- Codes and scales -----------------------------------------------------------------------------------------------


def test_scales_by_hand() -> None:
    """Codes 1, 2, 3, 4 in a row, twice, under scales of every kind."""
    codes = torch.tensor([[1.0, 2, 3, 4], [1, 2, 3, 4]]).to(FP8)

    def made(scales: Any, size: list[int] | None = None, kind: torch.dtype = torch.float32) -> list[list[float]]:
        return from_scaled(codes, torch.tensor(scales).to(kind), size, torch.float32).tolist()

    assert made(0.5) == made([0.5]) == made([[0.5]]) == [[0.5, 1, 1.5, 2]] * 2
    assert made([0.5, 2.0]) == made([[0.5], [2.0]]) == [[0.5, 1, 1.5, 2], [2, 4, 6, 8]]
    assert made([[0.5, 2.0]], [2, 3]) == [[0.5, 1, 1.5, 8]] * 2  # the last block is cut
    assert made([[0.5, 2.0]]) == [[0.5, 1, 6, 8]] * 2  # two equal blocks
    assert made([[126, 128]], None, torch.uint8) == [[0.5, 1, 6, 8]] * 2  # 2**(126 - 127), 2**(128 - 127)
    # Two 4-bit codes a byte, the lower half first: 0x21 is 0.5 and 1, 0xF7 is 6 and -6.
    packed = torch.tensor([[0x21, 0xF7]], dtype=torch.uint8)
    for bytes_of in (packed, packed.view(torch.int8)):
        made_of = from_scaled(bytes_of, torch.tensor([[2.0, 0.5]]), None, torch.float32)
        assert made_of.tolist() == [[1, 2, 3, -3]]


def test_fp8_is_what_its_codes_and_scales_say(fp8) -> None:
    folder, _, meant = fp8
    for name, weight in load_base(folder, quantize=False).named_parameters():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, meant[name].to(torch.bfloat16)), name
    exact = load_base(folder, quantize=False, init_kwargs={"dtype": "float32"}).state_dict()
    for name, weight in exact.items():
        assert torch.allclose(weight.double(), meant[name], rtol=1e-7, atol=0), name


def test_fp8_in_4_bits_is_its_16_bit_weights_in_4_bits(fp8) -> None:
    folder, plain, meant = fp8
    model, other = load_base(folder), load_base(plain)
    quantized = 0
    for name, weight in model.named_parameters():
        if (state := getattr(weight, "quant_state", None)) is not None:
            codes, expected = quantize_4bit(meant[name].bfloat16(), quant_type="nf4", compress_statistics=True)
            assert torch.equal(weight.data, codes) and torch.equal(state.absmax, expected.absmax)
            quantized += 1
    assert quantized == 14
    with torch.no_grad():
        assert torch.equal(model.train()(IDS).logits, other.train()(IDS).logits)
    assert model.config._name_or_path == folder


def test_wrong_scales_would_show(fp8, tmp_path) -> None:
    """Negative control: with one scale doubled neither test above holds."""
    folder, plain, meant = fp8
    stored, _ = as_fp8({key: weight.float() for key, weight in meant.items()}, 48, 40)
    stored["model.layers.1.mlp.up_proj.weight_scale_inv"][0, 0] *= 2
    wrong = load_base(write(tmp_path / "wrong", folder, stored, FP8_CONFIG))
    with torch.no_grad():
        assert not torch.equal(wrong.train()(IDS).logits, load_base(plain).train()(IDS).logits)


def test_one_weight_at_a_time_is_in_16_bits(fp8, monkeypatch) -> None:
    made: list[StorageWeakRef] = []
    most = [0]

    def make(*parts: Any, **how: Any) -> Tensor:
        whole = from_scaled(*parts, **how)
        made.append(StorageWeakRef(whole.untyped_storage()))
        most[0] = max(most[0], sum(not one.expired() for one in made))
        return whole

    monkeypatch.setattr(stored_weights, "from_scaled", make)
    load_base(fp8[0])
    assert (len(made), most[0]) == (14, 1)
    made.clear()
    model = load_base(fp8[0], quantize=False)  # the control: here they stay
    assert most[0] == 14 and model


@pytest.mark.parametrize("scale", ["weight_scale", "scale", "qscale_weight"])
def test_other_names_of_scales(base_folder, tmp_path, scale) -> None:
    weights = AutoModelForCausalLM.from_pretrained(base_folder).state_dict()
    stored, meant = as_fp8(weights, 10**6, 10**6)  # one scale a weight
    named = {key.replace("weight_scale_inv", scale): part for key, part in stored.items()}
    named["model.layers.0.mlp.up_proj.activation_scale"] = torch.tensor(1.0)
    config = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
    model = load_base(write(tmp_path / "base", base_folder, named, config), quantize=False)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, meant[name].to(torch.bfloat16)), name


def test_codes_without_scales_are_refused(base_folder, tmp_path) -> None:
    stored, _ = as_fp8(AutoModelForCausalLM.from_pretrained(base_folder).state_dict(), 48, 40)
    del stored["model.layers.0.mlp.up_proj.weight_scale_inv"]
    folder = write(tmp_path / "base", base_folder, stored, FP8_CONFIG)
    with pytest.raises(OptionError, match="layers.0.mlp.up_proj.weight is in F8_E4M3 and has no scales"):
        load_base(folder)


SMALL: dict[str, Any] = dict(
    vocab_size=320,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    pad_token_id=0,
    num_experts_per_tok=2,
)


def test_experts_in_fp8_are_joined(tmp_path) -> None:
    """One file per expert and projection, as they are published, in two shards; the model holds them joined."""
    config = Qwen3MoeConfig(**SMALL, num_experts=4, moe_intermediate_size=32, intermediate_size=96)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "plain")
    from safetensors.torch import load_file

    weights = load_file(tmp_path / "plain" / "model.safetensors")
    stored, meant = as_fp8(weights, 32, 32)
    folder = write(tmp_path / "fp8", str(tmp_path / "plain"), {}, FP8_CONFIG | {"weight_block_size": [32, 32]})
    half = len(stored) // 2
    parts = [dict(list(stored.items())[:half]), dict(list(stored.items())[half:])]
    (Path(folder) / "model.safetensors").unlink()
    index = {}
    for number, part in enumerate(parts):
        name = f"model-0000{number + 1}-of-00002.safetensors"
        save_file(part, Path(folder) / name, {"format": "pt"})
        index |= dict.fromkeys(part, name)
    content = {"metadata": {}, "weight_map": index}
    (Path(folder) / "model.safetensors.index.json").write_text(json.dumps(content))
    plain = write(tmp_path / "16", str(tmp_path / "plain"), {k: w.bfloat16() for k, w in meant.items()}, None)
    expected = load_base(plain, quantize=False).state_dict()
    actual = load_base(folder, quantize=False).state_dict()
    assert expected.keys() == actual.keys() and any(weight.ndim == 3 for weight in actual.values())
    for name, weight in expected.items():
        assert torch.equal(weight, actual[name]), name


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory) -> tuple[str, Weights]:
    """A gpt-oss as it is published, its experts in MXFP4, and what they stand for in float64."""
    folder = tmp_path_factory.mktemp("mxfp4")
    config = GptOssConfig(**SMALL, num_local_experts=4, intermediate_size=32)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder / "plain")
    stored: Weights = {}
    meant: Weights = {}
    draw = torch.Generator().manual_seed(0)
    for key, weight in model.state_dict().items():
        if not key.endswith(("gate_up_proj", "down_proj")):
            stored[key] = weight.bfloat16()
            continue
        experts, inputs, outputs = weight.shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8, generator=draw)
        scales = torch.randint(118, 124, (experts, outputs, inputs // 32), dtype=torch.uint8, generator=draw)
        stored |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
        whole = torch.zeros(experts, inputs, outputs, dtype=torch.float64)
        for e, o, g, b in torch.cartesian_prod(*map(torch.arange, blocks.shape)).tolist():
            byte, factor = int(blocks[e, o, g, b]), 2.0 ** (int(scales[e, o, g]) - 127)
            whole[e, 32 * g + 2 * b, o] = E2M1[byte % 16] * factor
            whole[e, 32 * g + 2 * b + 1, o] = E2M1[byte // 16] * factor
        meant[key] = whole
    names = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": names}
    return write(folder / "mxfp4", str(folder / "plain"), stored, quantization), meant


def test_mxfp4_is_what_its_codes_and_scales_say(gpt_oss) -> None:
    folder, meant = gpt_oss
    assert len(meant) == 4
    ours = load_base(folder, quantize=False)
    weights = ours.state_dict()
    for name, whole in meant.items():
        assert torch.equal(weights[name].double(), whole), name
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True)
    )
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, theirs(IDS).logits)


def test_gpt_oss_as_published_trains_with_the_defaults(gpt_oss, make_tokenizer, tmp_path) -> None:
    trainer = ours(gpt_oss[0], id_pairs(8), make_tokenizer(), tmp_path, max_steps=2, bf16=True)
    trainer.train()
    start, after = trainer.state.log_history[:2]
    assert start["rewards/margins"] == 0 != after["rewards/margins"]  # the loss has the routers' in it
    assert trainer.model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight.quant_state is not None


# ---- A run on such a base, and the way back -------------------------------------------------------------------------


def test_an_adapter_finds_its_fp8_base_again(fp8, make_tokenizer, tmp_path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(fp8[0])
    trainer = ours(fp8[0], id_pairs(8), tokenizer, tmp_path / "run", max_steps=2, bf16=True)
    trainer.train()
    trainer.save_model()
    adapter = str(tmp_path / "run")
    trained = load_trained(adapter)  # refuses a base with another fingerprint
    assert trained.trained and trained.trained.quantization["bnb_4bit_quant_type"] == "nf4"
    assert trained.trained.base_changed is None
    assert len(ImplicitReward(adapter).scores(["the cat"], [" sat"])) == 1
    report = merge_adapter(adapter, str(tmp_path / "merged"), max_drift=100, dtype="float32")
    assert report.onto == "dequantized"
    merged = load_base(str(tmp_path / "merged"), quantize=False)
    assert getattr(merged.config, "quantization_config", None) is None
    again = ours(
        adapter, id_pairs(8), tokenizer, tmp_path / "more", reference="base", peft_config=None, max_steps=1, bf16=True
    )
    again.train()


@pytest.mark.parametrize("kind", ["4", "8"])
def test_a_bitsandbytes_checkpoint_is_kept_and_computes_as_the_run_does(base_folder, tmp_path, kind, caplog) -> None:
    """Saved in float16; with bfloat16 asked, transformers alone would leave it there."""
    made = {"4": dict(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype=torch.float16)}
    config = BitsAndBytesConfig(**made.get(kind, {"load_in_8bit": True}))
    saved = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float16, quantization_config=config)
    folder = str(tmp_path / "base")
    saved.save_pretrained(folder)
    with caplog.at_level(logging.INFO, "dpo_peft"):
        model = load_base(folder, quantize=False)
    assert "is kept as it is (quantize_base=False does not unpack it)" in caplog.text
    assert "computes in float16: changed to bfloat16" in caplog.text
    expected = dict(saved.named_parameters())
    for name, weight in model.named_parameters():
        if weight.dtype in (torch.uint8, torch.int8):
            assert torch.equal(weight, expected[name]), name
        else:
            assert torch.equal(weight, expected[name].bfloat16()) and weight.dtype == torch.bfloat16, name
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.uint8 if kind == "4" else torch.int8}
    as_saved = load_base(folder, init_kwargs={"dtype": "float16"})
    assert {p.dtype for p in as_saved.parameters()} >= {torch.float16}
    caplog.clear()
    with caplog.at_level(logging.WARNING, "dpo_peft"):
        load_base(folder, BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"))
    assert "quantization_config has no effect" in caplog.text


@pytest.mark.parametrize("bits", [4, 8])
def test_a_bitsandbytes_checkpoint_trains_in_bfloat16(base_folder, make_tokenizer, tmp_path, bits) -> None:
    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_compute_dtype=torch.float16)
    saved = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float16, quantization_config=config)
    saved.save_pretrained(tmp_path / "base")
    trainer = ours(str(tmp_path / "base"), id_pairs(8), make_tokenizer(), tmp_path / "run", max_steps=2, bf16=True)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=2e-3)
    trainer.save_model()
    trained = load_trained(str(tmp_path / "run"))
    assert trained.trained and trained.trained.quantization[f"load_in_{bits}bit"] is True
    assert trained.trained.dtype == "bfloat16"


# ---- The table ------------------------------------------------------------------------------------------------------


def table() -> list[tuple[str, str, str]]:
    """Every method that docs/quantization.md has a row for, and what its two columns say."""
    text = (REPO / "docs" / "quantization.md").read_text("utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    named = [(name, *cells[1:]) for cells in rows for name in re.findall(r"`([\w-]+)`", cells[0]) if cells[1]]
    return [row for row in named if row[0] != "quant_method"]


@pytest.mark.parametrize(("method", "says", "otherwise"), table(), ids=lambda cell: cell.split(",")[0])
@pytest.mark.parametrize("quantize", [True, False])
def test_what_the_docs_say_becomes_of_a_checkpoint(base_folder, tmp_path, method, says, otherwise, quantize) -> None:
    """By the config alone, on a checkpoint in 16 bits, where the format's packages are missing."""
    weights = AutoModelForCausalLM.from_pretrained(base_folder).state_dict()
    stored: dict[str, Any] = {"quant_method": method, "bits": 4, "load_in_4bit": method == "bitsandbytes"}
    folder = write(tmp_path / "base", base_folder, weights, stored)
    wanted = re.findall(r"`([\w-]+)`", says)
    if method == "bitsandbytes":
        assert says.startswith("kept") and otherwise.startswith("kept")  # tested above
    elif says.startswith("dequantized"):
        model = load_base(folder, quantize=quantize)
        assert getattr(model, "is_loaded_in_4bit", False) is quantize
        assert ("NF4" in says, "16 bits" in otherwise) == (True, True)
    else:
        reason = "can't be trained on" if says.startswith("refused") else f"pip install.* {wanted[0]}"
        with pytest.raises(OptionError, match=f"quantized already, by .*{reason}.*16-bit model that it was made from"):
            load_base(folder, quantize=quantize)


def test_a_base_is_refused_before_the_data_are_prepared(base_folder, make_tokenizer, tmp_path) -> None:
    weights = AutoModelForCausalLM.from_pretrained(base_folder).state_dict()
    folder = write(tmp_path / "base", base_folder, weights, {"quant_method": "quark"})
    bad = Dataset.from_list([{"prompt": 1, "chosen": 2, "rejected": 3}])  # would be refused too, later
    with pytest.raises(OptionError, match="quantized already, by Quark, and can't be trained on"):
        ours(folder, bad, make_tokenizer(), tmp_path / "run")


def test_another_kind_of_quantization_is_refused(base_folder, tmp_path) -> None:
    weights = AutoModelForCausalLM.from_pretrained(base_folder).state_dict()
    folder = write(tmp_path / "base", base_folder, weights, {"quant_method": "gptq", "bits": 4})
    with pytest.raises(OptionError, match="quantization_config: .*quantized already, by GPTQ.* Leave it out"):
        load_base(folder, BitsAndBytesConfig(load_in_4bit=True))
    with pytest.raises(OptionError, match="pip install optimum gptqmodel"):
        load_base(folder, GPTQConfig(bits=4))
