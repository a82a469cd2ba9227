"""Which reference an adapter was trained against: its fingerprint, and the record that goes through PEFT with it."""

import json
import warnings
from dataclasses import asdict, replace

import pytest
import torch
from identity_helpers import WRAPPINGS, flip_one_bit, quantized, swap
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from trainer_helpers import lora
from transformers import AutoModelForCausalLM

from dpo_peft import ReferenceMismatchError
from dpo_peft.reference.fingerprint import (
    RECORD,
    Identity,
    adapter_fingerprint,
    base_fingerprint,
    check_same,
    identify,
    read_record,
    write_entry,
)

IDS = torch.arange(10, 30)[None]


@pytest.fixture(scope="module")
def folder(tiny_llama, tmp_path_factory) -> str:
    path = str(tmp_path_factory.mktemp("base"))
    tiny_llama().save_pretrained(path)
    return path


# ---- The adapter ----------------------------------------------------------------------------------------------------


ADAPTERS = {**WRAPPINGS, "rank and alpha patterns": dict(rank_pattern={"q_proj": 2}, alpha_pattern={"up_proj": 3})}
del ADAPTERS["lora_bias"]


def trained(base, kind="linear", name="default", **options):
    """A PEFT model whose adapter is random in every tensor, the same each time."""
    torch.manual_seed(5)
    model = get_peft_model(base, lora(**ADAPTERS[kind], **options), adapter_name=name)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_by_another_name_saved_and_loaded(tiny_llama, tmp_path, kind):
    model = trained(tiny_llama(), kind)
    found = adapter_fingerprint(model, "default")
    assert adapter_fingerprint(trained(tiny_llama(), kind, name="mine"), "mine") == found
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, adapter_name="ref")
    assert adapter_fingerprint(loaded, "ref") == found
    if kind not in ("trained tokens", "saved modules"):
        loaded.add_adapter("policy", lora(**ADAPTERS[kind]))
        loaded.set_adapter("policy")
        assert adapter_fingerprint(loaded, "ref") == found != adapter_fingerprint(loaded, "policy")
    of_adapter = {name: p for name, p in loaded.named_parameters() if ".ref" in name}
    assert of_adapter
    for name, parameter in of_adapter.items():
        flip_one_bit(parameter)
        assert adapter_fingerprint(loaded, "ref") != found, name
        flip_one_bit(parameter)
    assert adapter_fingerprint(loaded, "ref") == found


def test_where_the_tensors_of_an_adapter_belong_counts(tiny_llama):
    model = trained(tiny_llama())
    found = adapter_fingerprint(model, "default")
    first, second = (layer.mlp.up_proj.lora_A["default"] for layer in model.base_model.model.model.layers)
    swap(first, second)
    assert adapter_fingerprint(model, "default") != found


def test_what_scales_an_adapter_counts(tiny_llama):
    models = [trained(tiny_llama(), **options) for options in ({}, {"lora_alpha": 9}, {"use_rslora": True})]
    models.append(trained(tiny_llama()))
    models[-1].base_model.model.model.layers[1].mlp.up_proj.set_scale("default", 0.5)
    models.append(trained(tiny_llama(), alpha_pattern={"layers.0.mlp.up_proj": 7}))
    assert len({adapter_fingerprint(m, "default") for m in models}) == len(models)
    # rsLoRA of rank 4 with alpha 4 is the same function as plain LoRA with alpha 8.
    same = trained(tiny_llama(), use_rslora=True, lora_alpha=4)
    assert adapter_fingerprint(same, "default") == adapter_fingerprint(models[0], "default")


def test_values_count_and_not_how_they_are_stored(tiny_llama):
    half = trained(tiny_llama())
    for name, parameter in half.named_parameters():
        if "lora" in name:
            parameter.data = parameter.data.bfloat16()
    found = adapter_fingerprint(half, "default")
    for parameter in half.parameters():
        parameter.data = parameter.data.float()
    assert adapter_fingerprint(half, "default") == found != adapter_fingerprint(trained(tiny_llama()), "default")


def test_an_unknown_adapter(tiny_llama):
    with pytest.raises(ReferenceMismatchError, match="no adapter 'ref'; its adapters: default"):
        adapter_fingerprint(trained(tiny_llama()), "ref")


# ---- The record -----------------------------------------------------------------------------------------------------


BASE = Identity(
    base="org/model",
    revision="0123456789abcdef",
    quantization="nf4, double quantization, compute bfloat16",
    dtype="bfloat16",
    base_fingerprint="a1b2c3d4" * 2 + "00" * 8,
    adapter=None,
    adapter_fingerprint=None,
)
ADAPTER = replace(BASE, adapter="runs/first", adapter_fingerprint="5" * 32)


def test_key_and_differences():
    renamed = replace(ADAPTER, base="copy", revision=None, adapter="elsewhere", quantization="?", dtype="?")
    assert renamed.key() == ADAPTER.key() and ADAPTER.differences(renamed) == []
    assert BASE.key() != ADAPTER.key() != replace(ADAPTER, base_fingerprint="0" * 32).key()
    assert BASE.differences(ADAPTER) == ["adapter: none and runs/first (55555555)"]
    other = replace(BASE, base="b", revision=None, quantization="none", base_fingerprint="99aa0011" * 2 + "f" * 16)
    assert BASE.differences(other) == [
        "base weights: a1b2c3d4 (org/model at 0123456789ab, nf4, double quantization, compute bfloat16; rest bfloat16)"
        " and 99aa0011 (b, bfloat16)",
        "base config: 00000000 (org/model at 0123456789ab, nf4, double quantization, compute bfloat16; rest bfloat16)"
        " and ffffffff (b, bfloat16)",
    ]
    synced = replace(BASE, sync="alpha 0.6 every 512 steps")
    assert BASE.differences(synced) == ["sync: none and alpha 0.6 every 512 steps"]
    assert str(replace(other, sync="alpha 1")) == (
        "b, bfloat16 (weights 99aa0011, config ffffffff), adapter: none, synced with alpha 1"
    )


def test_check_same():
    check_same(BASE, replace(BASE, base="moved"), "The checkpoint c", "Do that.")
    with pytest.raises(ReferenceMismatchError) as error:
        check_same(BASE, ADAPTER, "The checkpoint c", "Do that.")
    assert str(error.value) == (
        "The checkpoint c belongs to another reference than this run has. Its own and this run's differ in adapter: "
        "none and runs/first (55555555). Do that."
    )


@pytest.mark.parametrize("given", [BASE, ADAPTER, replace(ADAPTER, sync="alpha 0.6 every 512 steps")], ids=str)
def test_as_a_dict(given):
    stored = json.loads(json.dumps(asdict(given)))
    assert Identity.from_dict(stored) == given
    assert Identity.from_dict({**stored, "of_the_future": [1]}) == given


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("text", "base is missing"),
        (None, "base is missing"),
        ({}, "base is missing"),
        ({**asdict(BASE), "base": 3}, "base is wrong"),
        ({**asdict(BASE), "base_fingerprint": "xyz"}, "base_fingerprint is wrong"),
        ({**asdict(BASE), "base_fingerprint": None}, "base_fingerprint is wrong"),
        ({**asdict(BASE), "adapter": "a"}, "adapter is wrong"),
        ({**asdict(ADAPTER), "adapter_fingerprint": 5}, "adapter_fingerprint is wrong"),
        ({k: v for k, v in asdict(BASE).items() if k != "adapter"}, "adapter is missing"),
    ],
)
def test_a_damaged_record(wrong, said):
    with pytest.raises(ReferenceMismatchError, match=f"damaged: .*{said}.*Restore"):
        Identity.from_dict(wrong)


def test_identify(folder, tmp_path):
    model = trained(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    off = identify(model, None)
    assert (off.base, off.revision, off.quantization, off.dtype) == (folder, None, "none", "float32")
    assert off.base_fingerprint == base_fingerprint(model) and off.adapter is off.adapter_fingerprint is None
    on = identify(model, "default")
    assert on.base_fingerprint == off.base_fingerprint
    assert on.adapter == "the adapter as it came in"
    assert on.adapter_fingerprint == adapter_fingerprint(model, "default")
    assert identify(model, "default", source="runs/first", sync="s").adapter == "runs/first"
    nf4 = identify(get_peft_model(quantized(folder, torch.bfloat16), lora()), None)
    assert nf4.dtype == "bfloat16"
    assert identify(get_peft_model(quantized(folder), lora()), None).key() != off.key()


@pytest.fixture
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
def test_the_record_survives_peft(folder, tmp_path, task, no_warnings):
    """Saved, loaded and saved again by PEFT alone, through both of its ways of loading."""
    model = trained(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), task_type=task)
    reference = identify(model, None)
    write_entry(model, "default", RECORD, asdict(reference))
    model.save_pretrained(tmp_path / "a")
    assert read_record(tmp_path / "a") == reference
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    PeftModel.from_pretrained(base, tmp_path / "a", adapter_name="x").save_pretrained(tmp_path / "b")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "b" / "x", dtype=torch.float32)
    assert read_record(loaded.peft_config["default"]) == reference
    assert read_record(str(tmp_path / "b" / "x")) == reference
    assert read_record(PeftConfig.from_pretrained(tmp_path / "b" / "x")) == reference
    assert identify(loaded, None) == reference
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_without_a_task_peft_would_drop_it(tiny_llama, tmp_path):
    """Negative control of the one thing that `write_entry` changes beside the record."""
    model = trained(tiny_llama(), task_type=None)
    write_entry(model, "default", RECORD, asdict(BASE))
    model.peft_config["default"].task_type = None
    model.save_pretrained(tmp_path)
    assert read_record(tmp_path) is None


def test_a_record_goes_to_one_adapter_only(tiny_llama):
    """The config that a user builds two adapters with must not carry the first one's record to the second."""
    config = lora(task_type=None, auto_mapping={"base_model_class": "X"})
    model = get_peft_model(tiny_llama(), config)
    model.add_adapter("other", lora())
    write_entry(model, "default", RECORD, asdict(BASE))
    assert model.peft_config["default"].auto_mapping == {"base_model_class": "X", RECORD: asdict(BASE)}
    assert config.auto_mapping == {"base_model_class": "X"} and config.task_type is None
    assert read_record(config) is read_record(model.peft_config["other"]) is None
    write_entry(model, "default", RECORD, asdict(ADAPTER))
    assert read_record(model.peft_config["default"]) == ADAPTER


def test_no_record(tmp_path):
    assert read_record(tmp_path) is None
    for content in ("{}", "[]", '{"auto_mapping": null}', '{"auto_mapping": {"base_model_class": "X"}}'):
        (tmp_path / "adapter_config.json").write_text(content)
        assert read_record(tmp_path) is None
    (tmp_path / "adapter_config.json").write_text('{"auto_mapping": {"' + RECORD + '": {"base": 1}}}')
    with pytest.raises(ReferenceMismatchError, match="damaged"):
        read_record(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ReferenceMismatchError, match="adapter_config.json is not valid JSON.*restore"):
        read_record(tmp_path)
