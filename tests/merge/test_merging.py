"""Merging: against weights worked out by hand, plain transformers, and merges that are wrong on purpose."""

import copy
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from trainer_helpers import lora, ours, text_pairs
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

from dpo_peft import quickstart
from dpo_peft.errors import DriftError, OptionError
from dpo_peft.files import read_rows
from dpo_peft.forward import sequence_logps
from dpo_peft.merge import drift, merging
from dpo_peft.merge import weights as merge_weights
from dpo_peft.merge.merging import MergeReport, merge_adapter
from dpo_peft.model.adapter_source import AdapterSource, load_trained
from dpo_peft.model.loading import keep_weights, load_base

ROWS = text_pairs(16)
LOGITS = {"atol": 2e-3, "rtol": 0}  # they reach 200
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": {"embed_tokens": [60, 70, 80]}},
}


@pytest.fixture(scope="module")
def folders(tiny_llama, make_tokenizer, tmp_path_factory) -> dict[bool, str]:
    """Bases by whether their embeddings are tied."""
    found = {}
    for tied in (False, True):
        found[tied] = str(tmp_path_factory.mktemp("tied" if tied else "untied"))
        tiny_llama(tie_word_embeddings=tied).save_pretrained(found[tied])
        make_tokenizer().save_pretrained(found[tied])
    return found


@pytest.fixture(scope="module")
def trained(folders, make_tokenizer, tmp_path_factory) -> Callable[..., str]:
    """`trained("dora", tied=True)`: folder of an adapter that was trained so hard that it matters; made once."""
    made: dict[tuple[Any, ...], str] = {}

    def adapter(kind: str, tied: bool = False, model: str | None = None, **changed: Any) -> str:
        key = (kind, tied, model, *sorted(changed))
        if key not in made:
            folder = str(tmp_path_factory.mktemp(kind))
            options = {"max_steps": 4, "learning_rate": 3e-2, "model_init_kwargs": {"dtype": "float32"}, **changed}
            if model is None:
                options.setdefault("peft_config", lora(**KINDS.get(kind, {})))
            trainer = ours(model or folders[tied], ROWS, make_tokenizer(), folder, **options)
            trainer.train()
            trainer.save_model()
            made[key] = folder
        return made[key]

    return adapter


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    """Short texts, and no survey of memory for what tiny models leave."""
    monkeypatch.setattr(drift, "NEW_TOKENS", 8)
    monkeypatch.setattr(merging, "gc", SimpleNamespace(collect=lambda: None))


@pytest.fixture(scope="module")
def merged(trained, tmp_path_factory) -> Callable[..., tuple[Path, MergeReport]]:
    """`merged("lora", dtype="bfloat16")`: folder and report of a merge without a limit; made once, only to be read."""
    made: dict[tuple[Any, ...], tuple[Path, MergeReport]] = {}

    def merge(kind: str, tied: bool = False, **options: Any) -> tuple[Path, MergeReport]:
        key = (kind, tied, *options.items())
        if key not in made:
            folder = tmp_path_factory.mktemp("merged") / "out"
            made[key] = folder, merge_adapter(trained(kind, tied), folder, max_drift=100, **options)
        return made[key]

    return merge


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(40, 80)[None], use_cache=False).logits


def adapter_logits(adapter: str) -> torch.Tensor:
    return logits_of(load_trained(adapter, with_reference=False).model)


def reload(folder: Any, **kwargs: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()


# ---- The weights ----------------------------------------------------------------------------------------------------


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("kind", "tied", "tied_after"),
    [
        ("lora", False, False),
        ("dora", True, True),  # equal embeddings stay one tensor
        ("tokens", True, True),  # and so do those in which single tokens changed alike
        ("embeddings", True, False),  # anything else must part them
        ("head", True, False),
    ],
)
def test_reloaded_model_is_the_adapters_model(trained, merged, kind: str, tied: bool, tied_after: bool) -> None:
    folder, report = merged(kind, tied)
    model = reload(folder)
    torch.testing.assert_close(logits_of(model), adapter_logits(trained(kind, tied)), **LOGITS)
    assert report.drift.mean_token < 1e-4 < 0.05 < report.drift.adapter_token
    assert report.drift.greedy_equal == report.drift.greedy_prompts == 8
    assert not hasattr(model.config, "quantization_config")
    assert report.tied == model.config.tie_word_embeddings == tied_after


def through_forward(base: str) -> dict[str, torch.Tensor]:
    """The weights that the 4-bit layers act with, float64: what they make of a unit matrix."""
    model = load_base(base, init_kwargs={"dtype": "float32"})
    keep_weights(model)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    with torch.no_grad():
        return {f"{name}.weight": layer(torch.eye(layer.in_features)).T.double() for name, layer in layers.items()}


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("kind", "scale"), [("lora", 8 / 4), ("rslora", 8 / math.sqrt(4)), ("dora", 8 / 4)])
def test_merged_weights_by_hand(trained, folders, tmp_path, kind: str, scale: float) -> None:
    adapter = trained(kind)
    merge_adapter(adapter, tmp_path / "out")
    saved, factors = (
        load_file(tmp_path / "out" / "model.safetensors"),
        load_file(f"{adapter}/adapter_model.safetensors"),
    )
    base = through_forward(folders[False])
    assert len(base) == 14
    for name, weight in base.items():
        prefix = "base_model.model." + name.removesuffix("weight")
        a, b = (factors[f"{prefix}lora_{x}.weight"].double() for x in "AB")
        expected = weight + scale * b @ a
        if kind == "dora":
            magnitude = factors[f"{prefix}lora_magnitude_vector"].double()
            expected = expected * (magnitude / expected.norm(dim=1))[:, None]
        torch.testing.assert_close(saved[name].double(), expected, atol=2e-6, rtol=1e-5)


def test_base16_is_the_original_with_the_adapter(trained, merged, folders) -> None:
    folder, report = merged("lora", onto="base16")
    plain = PeftModel.from_pretrained(reload(folders[False]), trained("lora")).eval()
    torch.testing.assert_close(logits_of(reload(folder)), logits_of(plain), **LOGITS)
    assert report.drift.mean_token > 0.1  # this model's weights are large and 4 bits change them a lot


def test_drift_grows_from_float32_to_bfloat16_to_base16(merged) -> None:
    cases = [{}, {"dtype": "float16"}, {"dtype": "bfloat16"}, {"onto": "base16"}]
    drifts = [merged("lora", **case)[1].drift.mean_token for case in cases]
    assert all(2 * smaller < larger for smaller, larger in zip(drifts, drifts[1:], strict=False)), drifts


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_rounded_once(merged, dtype: str) -> None:
    """Rounding before the addition, or twice, would leave other values."""
    (exact, _), (rounded, report) = merged("lora"), merged("lora", dtype=dtype)
    assert report.dtype == json.loads((rounded / "config.json").read_text())["dtype"] == dtype
    a, b = (load_file(folder / "model.safetensors") for folder in (exact, rounded))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name].to(getattr(torch, dtype)), b[name]) for name in a)


def test_training_in_bfloat16(trained, tmp_path) -> None:
    """The usual case on a GPU: base and autocast in bfloat16, so that is the dtype of the merged model."""
    adapter = trained("lora", model_init_kwargs={"dtype": "bfloat16"}, bf16=True, learning_rate=1e-2)
    report = merge_adapter(adapter, tmp_path / "out", max_drift=5)
    assert report.dtype == "bfloat16"
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    assert report.drift.mean_token < report.drift.adapter_token / 5


# ---- Other trainings ------------------------------------------------------------------------------------------------


def test_adapter_of_a_plain_base(trained, tmp_path) -> None:
    adapter = trained("lora", quantize_base=False)
    report = merge_adapter(adapter, tmp_path / "out")
    assert report.onto is None
    assert report.drift.mean_token < 1e-4
    with pytest.raises(OptionError, match="onto='base16' has no effect.*Leave it out"):
        merge_adapter(adapter, tmp_path / "other", onto="base16")


def test_reference_adapter_is_left_out(trained, tmp_path) -> None:
    """An adapter that went on from another: the policy alone is merged, and the reference needn't be there."""
    first = trained("lora")
    second = trained(
        "lora", model=str(shutil.copytree(first, tmp_path / "first")), reference="initial", peft_config=None
    )
    shutil.rmtree(tmp_path / "first")
    report = merge_adapter(second, tmp_path / "out")
    torch.testing.assert_close(logits_of(reload(tmp_path / "out")), adapter_logits(second), **LOGITS)
    assert (adapter_logits(first) - adapter_logits(second)).abs().max() > 1
    assert report.drift.mean_token < 1e-4
    with pytest.raises(OptionError, match="give its folder as reference"):
        merge_adapter(second, tmp_path / "with", dataset=ROWS)
    report = merge_adapter(second, tmp_path / "with", dataset=ROWS, reference=first)
    assert report.drift.pairs == 16


@pytest.mark.parametrize(("init", "quantize"), [("pissa", False), ("olora", True)])
def test_initialization_that_moves_the_base(trained, tmp_path, init: str, quantize: bool) -> None:
    """The adapter was taken out of the base, and is added to what was left of it, not to all of it."""
    options = {"quantize_base": quantize, "learning_rate": 1e-3}
    adapter = trained(init, peft_config=lora(init_lora_weights=init), **options)
    report = merge_adapter(adapter, tmp_path / "out")
    torch.testing.assert_close(logits_of(reload(tmp_path / "out")), adapter_logits(adapter), **LOGITS)
    assert report.drift.mean_token < 1e-4
    if quantize:
        with pytest.raises(OptionError, match="does not fit the original"):
            merge_adapter(adapter, tmp_path / "other", onto="base16")


def test_adapter_of_another_trainer(folders, tmp_path) -> None:
    """Without a record of the training, the user says whether its base was quantized."""
    model = get_peft_model(reload(folders[False]), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    expected = logits_of(model.eval())
    merge_adapter(str(tmp_path / "adapter"), tmp_path / "out", quantize=False, dtype="float32", max_drift=1)
    assert (logits_of(reload(tmp_path / "out")) - expected).abs().mean() < 0.5  # its base was loaded in bfloat16


# ---- What is saved --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_loads_without_peft_and_bitsandbytes(trained, merged) -> None:
    folder, _ = merged("dora", True)
    code = (
        "import sys; sys.modules.update(peft=None, bitsandbytes=None, dpo_peft=None)\n"
        "import torch; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"tokenizer = AutoTokenizer.from_pretrained({str(folder)!r})\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folder)!r}).eval()\n"
        "ids = tokenizer('the cat sat', return_tensors='pt')['input_ids']\n"
        "print(model.generate(ids, max_new_tokens=12, do_sample=False)[0].tolist())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    source = load_trained(trained("dora", True))
    ids = source.tokenizer("the cat sat", return_tensors="pt")["input_ids"]
    expected = source.model.generate(input_ids=ids, max_new_tokens=12, do_sample=False)[0].tolist()
    assert json.loads(done.stdout.splitlines()[-1]) == expected


def test_shards_tokenizer_and_facts(trained, tmp_path) -> None:
    adapter = trained("lora")
    report = merge_adapter(adapter, tmp_path / "out", max_shard_size="100KB")
    assert len(report.files) > 2
    assert max(report.files.values()) < 150_000  # embeddings of 80 kB, and no tensor is split
    torch.testing.assert_close(logits_of(reload(tmp_path / "out")), adapter_logits(adapter), **LOGITS)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(adapter).chat_template
    facts = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert facts["drift"]["mean_token"] == report.drift.mean_token
    written = "".join((tmp_path / "out" / name).read_text() for name in ("merge.json", "README.md", "config.json"))
    assert "# out\n\nThe adapter `lora0` merged into `untied0`" in written
    assert str(tmp_path) not in written and adapter not in written  # published files hold no path of this machine
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_drift_and_accuracy_are_those_of_plain_transformers(trained, folders, tmp_path) -> None:
    adapter = trained("lora")
    report = merge_adapter(adapter, tmp_path / "out", onto="base16", max_drift=100, dataset=ROWS, max_rows=12)
    source, tokenizer = load_trained(adapter), AutoTokenizer.from_pretrained(adapter)
    merged = reload(tmp_path / "out")
    differences, policy, off, other = [], [], [], []
    for row in ROWS.select(range(12)):
        for answer in (row["chosen"], row["rejected"]):
            prompt = tokenizer(row["prompt"])["input_ids"]
            ids = torch.tensor([prompt + tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id]])
            labels = ids.clone()
            labels[:, : len(prompt)] = -100
            mask = torch.ones_like(ids)
            with torch.no_grad():
                policy.append(float(sequence_logps(source.model, ids, mask, labels)))
                other.append(float(sequence_logps(merged, ids, mask, labels)))
                with source.model.disable_adapter():
                    off.append(float(sequence_logps(source.model, ids, mask, labels)))
            differences.append(abs(policy[-1] - other[-1]))
    found = report.drift
    assert found.rows == "the dataset (12 of 16 rows)"
    assert (found.pairs, found.completions) == (12, 24)
    assert found.max_completion == pytest.approx(max(differences), abs=1e-3)
    assert found.mean_completion == pytest.approx(sum(differences) / 24, abs=1e-3)
    for accuracy, logps in ((found.accuracy_adapter, policy), (found.accuracy_merged, other)):
        rewards = [p - o for p, o in zip(logps, off, strict=True)]
        assert accuracy == sum(c > r for c, r in zip(rewards[::2], rewards[1::2], strict=True)) / 12
    assert found.accuracy_adapter > 0.8  # it was trained on them


# ---- Merges that are wrong ------------------------------------------------------------------------------------------


def refused(adapter: str, folder: Path, **options: Any) -> str:
    """The message of a refusal that left nothing behind."""
    before = sorted(folder.iterdir())
    with pytest.raises(DriftError) as error:
        merge_adapter(adapter, folder / "out", **options)
    assert sorted(folder.iterdir()) == before
    return str(error.value)


def test_wrong_strength_is_refused(trained, tmp_path, monkeypatch) -> None:
    right = merging.merge_into

    def twice(base: Any, adapter: str, config: Any, *args: Any) -> Any:
        config = copy.deepcopy(config)
        config.lora_alpha *= 2
        return right(base, adapter, config, *args)

    monkeypatch.setattr(merging, "merge_into", twice)
    message = refused(trained("lora"), tmp_path, dtype="bfloat16", max_drift=0.05)
    assert "nats per token" in message and "at most 0.05 are allowed" in message and "max_drift" in message


def test_wrong_base_is_refused(trained, merged, tiny_llama, tmp_path, monkeypatch) -> None:
    right = merged("lora", onto="base16")[1].drift.mean_token
    monkeypatch.setattr(merging, "original_base", lambda *args: tiny_llama(seed=1))
    message = refused(trained("lora"), tmp_path, onto="base16", max_drift=1.5 * right)
    assert "onto='dequantized'" in message


def test_base16_is_refused_unless_allowed(trained, tmp_path) -> None:
    assert "the original is another model" in refused(trained("lora"), tmp_path, onto="base16")


@pytest.mark.parametrize("kind", ["embeddings", "head"])
def test_embeddings_that_stay_tied_are_refused(trained, tmp_path, monkeypatch, kind: str) -> None:
    """Control: saved as tied, one of the two tensors is lost on reload."""

    def keep_tied(model: Any) -> None:
        model.config.tie_word_embeddings = True
        model.get_output_embeddings().weight = model.get_input_embeddings().weight

    monkeypatch.setattr(merge_weights, "tie_if_equal", keep_tied)
    refused(trained(kind, tied=True), tmp_path, max_drift=0.05)


def test_embeddings_that_were_not_parted_are_refused(trained, tmp_path, monkeypatch) -> None:
    """Control: an adapter on embeddings that are also the head's changes both."""
    monkeypatch.setattr(merge_weights, "untie", lambda model: False)
    refused(trained("embeddings", tied=True), tmp_path, max_drift=0.05)


@pytest.mark.attack("weights not finite")
def test_nan_is_refused(trained, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(merging, "compare", lambda *a: SimpleNamespace(**dict.fromkeys(FIELDS, math.nan), rows="x"))
    refused(trained("lora"), tmp_path, max_drift=1e9)


FIELDS = ("mean_token", "adapter_token", "tokens")


@pytest.mark.attack("killed while writing")
def test_interrupted_merge_leaves_nothing(trained, tmp_path, monkeypatch) -> None:
    def stop(*args: Any) -> None:
        assert any(path.name.startswith(".out.") for path in tmp_path.iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr(merging, "measure_drift", stop)
    with pytest.raises(KeyboardInterrupt):
        merge_adapter(trained("lora"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"onto": "nf4"}, "onto='nf4': use one of dequantized, base16"),
        ({"dtype": "int8"}, "dtype='int8': use one of"),
        ({"max_drift": -1.0}, "max_drift=-1.0 must be 0 or more"),
        ({"max_drift": math.nan}, "max_drift=nan must be 0 or more"),
        ({"max_shard_size": "big"}, "max_shard_size='big': write a size such as 5GB"),
        ({"reference": "x"}, "reference has no effect without a dataset"),
        ({"dataset": ROWS, "max_rows": 0}, "max_rows=0 must be at least 1"),
    ],
)
def test_wrong_options_are_found_before_loading(trained, tmp_path, monkeypatch, options, message) -> None:
    monkeypatch.setattr(AdapterSource, "load", None)
    with pytest.raises(OptionError, match=message):
        merge_adapter(trained("lora"), tmp_path / "out", **options)


@pytest.mark.attack("input as output")
def test_folder_with_files_is_refused_before_loading(trained, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(AdapterSource, "load", None)
    (tmp_path / "keep.txt").write_text("mine")
    with pytest.raises(OptionError, match="is not an empty folder"):
        merge_adapter(trained("lora"), tmp_path)
    assert (tmp_path / "keep.txt").read_text() == "mine"


# ---- A model that writes text ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reviews(tmp_path_factory) -> str:
    """A short training of the bundled model."""
    folder = str(tmp_path_factory.mktemp("reviews"))
    rows = read_rows(quickstart.train_file()).select(range(48))
    model = quickstart.model_path()
    tokenizer = AutoTokenizer.from_pretrained(model)
    options = {"max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 3e-3, "beta": 0.5}
    trainer = ours(model, rows, tokenizer, folder, model_init_kwargs={"dtype": "float32"}, **options)
    trainer.train()
    trainer.save_model()
    return folder


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_greedy_texts_are_those_of_the_adapter(reviews, tmp_path, dtype: str) -> None:
    report = merge_adapter(
        reviews, tmp_path / "out", dtype=dtype, dataset=read_rows(quickstart.test_file()), max_rows=8
    )
    merged, source = reload(tmp_path / "out", dtype="float32"), load_trained(reviews)
    changed = 0
    for messages in quickstart.eval_prompts()[:4]:
        ids = source.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        how = {"input_ids": ids, "max_new_tokens": 16, "do_sample": False}
        text = source.model.generate(**how)
        assert torch.equal(merged.generate(**how), text)
        with source.model.disable_adapter():
            changed += not torch.equal(source.model.generate(**how), text)
    assert changed >= 2  # the base writes other texts
    assert report.drift.mean_token < (1e-5 if dtype == "float32" else 5e-3)
    assert report.drift.accuracy_adapter == report.drift.accuracy_merged


@pytest.mark.parametrize("kind", ["modules_to_save", "trainable_token_indices"])
def test_what_was_trained_whole_is_not_rounded_by_the_base(folders: Any, tmp_path: Path, kind: str) -> None:
    """Onto a bfloat16 base, into float32: the file's values, where the base's dtype would round them."""
    chosen = {"modules_to_save": ["norm"], "trainable_token_indices": {"embed_tokens": [60, 70]}}[kind]
    model = get_peft_model(reload(folders[False], dtype=torch.float32), lora(**{kind: chosen}))
    key = "model.norm.modules_to_save.default.weight" if kind == "modules_to_save" else "trainable_tokens_delta"
    (trained,) = [p for name, p in model.named_parameters() if key in name and p.requires_grad]
    with torch.no_grad():
        trained += torch.linspace(1e-4, 1e-3, trained.numel()).view_as(trained)
    model.save_pretrained(tmp_path)
    expected = trained.detach().clone()
    config = model.peft_config["default"]
    for dtype in (torch.float32, torch.float16):
        base = reload(folders[False], dtype=torch.bfloat16)
        merged = merge_weights.merge_into(base, str(tmp_path), copy.copy(config), dtype, {})
        norm, embed = merged.model.norm.weight, merged.get_input_embeddings().weight
        found = norm if kind == "modules_to_save" else embed[[60, 70]]
        assert found.dtype == dtype and torch.equal(found, expected.to(dtype))
        assert not torch.equal(expected.bfloat16().float(), expected)  # the control: rounding shows


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl", "mistral3", "llava", "llama"])
@pytest.mark.parametrize("tied", [False, True])
def test_ties_are_read_from_either_config(family: str, tied: bool) -> None:
    """A text config may have no such option at all."""
    assert merge_weights.is_tied(CONFIG_MAPPING[family](tie_word_embeddings=tied)) is tied
