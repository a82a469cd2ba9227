"""`dpo-peft plan`: its figures, what it reads of options and models, and what it refuses."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from paths import REPO
from peft import PeftModel
from trainer_helpers import lora
from transformers import LlamaConfig, T5Config

from dpo_peft import OptionError, cli, planning
from dpo_peft.model.loading import attach_adapter, load_base, storage_report
from dpo_peft.planning import GIB, PRESETS, RESERVE, Lora, MemoryModel
from dpo_peft.planning.gpus import GPUS, parse_gpu

CONFIG = dict(
    vocab_size=320,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
)


@pytest.fixture
def plan(capsys: pytest.CaptureFixture) -> Any:
    """`plan("--shape", "8b")`: the command's JSON as a dict."""

    def run(*words: Any) -> dict[str, Any]:
        code = cli.main(["plan", "--json", *map(str, words)])
        out, err = capsys.readouterr()
        assert code == 0, err
        return json.loads(out)

    return run


@pytest.fixture
def text(capsys: pytest.CaptureFixture) -> Any:
    """`text("--shape", "8b")`: what the command prints."""

    def run(*words: Any) -> str:
        code = cli.main(["plan", *map(str, words)])
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    return run


# ---- Figures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "gpu", "at_least"), [("70b", "H100", 20000), ("70b", "80GB", 20000), ("8b", "24GB", 16000)]
)
def test_what_must_fit(plan: Any, size: str, gpu: str, at_least: int) -> None:
    found = plan("--shape", size, "--gpu", gpu)
    none, half, full = found["fits"]
    assert none["tokens"] < half["tokens"] < full["tokens"] >= at_least
    assert [row["checkpoint_layers"] for row in found["fits"]] == [n * found["layers"] // 2 for n in (0, 1, 2)]
    assert full["samples"] == full["tokens"] // 800  # the default lengths: 200 + 2 * 300


def test_figures_are_those_of_the_library(plan: Any) -> None:
    found = plan("--shape", "8b", "--gpu", "RTX4090", "--optim", "adamw_8bit", "--lora_r", 32)
    shape = PRESETS["8b"][1]
    model = MemoryModel.of_shape(shape, Lora.of(shape, 32), optimizer="adamw_8bit")
    usable = GPUS["RTX4090"] * GIB - RESERVE
    assert found["gpu"]["usable"] == usable
    assert [row["tokens"] for row in found["fits"]] == [model.largest_tokens(usable, n) for n in (0, 16, 32)]
    assert [row["longest_row"] for row in found["fits"]] == [model.longest_row(usable, n) for n in (0, 16, 32)]
    size = {name: number for name, number in found["micro_batch"].items() if name != "samples"}
    assert found["components"] == model.components(**size)
    assert found["peak"] == model.peak(**size) == found["step"]["peak"] <= usable
    assert found["trained_weights"] == 2 * 41943040


def test_the_function_gives_what_the_command_prints(plan: Any) -> None:
    options = {"shape": "8b", "gpu": "24GB", "lora_r": 32, "loss_type": "simpo", "pairs": 60, "pairs_per_second": 2.0}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    assert planning.plan(**options).figures == plan(*words)
    assert planning.plan(shape="8b").figures == plan("--shape", "8b")
    with pytest.raises(OptionError, match="'gpus'.*'gpu'"):
        planning.plan(shape="8b", gpus="24GB")


def test_a_step_is_cut_until_it_fits(plan: Any) -> None:
    """64 pairs of 800 tokens: each micro-batch holds whole pairs, all 51,200 tokens are in some."""
    options = "--per_device_train_batch_size", 8, "--gradient_accumulation_steps", 8
    small, large = (plan("--shape", "8b", "--gpu", gpu, *options)["step"] for gpu in ("24GB", "80GB"))
    for step in (small, large):
        assert (step["samples"], step["tokens"]) == (64, 51200)
        assert len(step["checkpoint_layers"]) == step["micro_batches"]
        assert step["max_tokens"] * step["micro_batches"] >= 51200 and step["max_tokens"] % 800 == 0
    assert small["micro_batches"] > large["micro_batches"]
    held = plan("--shape", "8b", "--gpu", "80GB", *options, "--max_tokens_per_microbatch", 4000)["step"]
    assert (held["max_tokens"], held["micro_batches"]) == (4000, 13)


def test_without_a_gpu_the_options_say_how_it_runs(plan: Any, text: Any) -> None:
    options = "--shape", "8b", "--per_device_train_batch_size", 4
    full, none = plan(*options), plan(*options, "--gradient_checkpointing", "False")
    assert full["micro_batch"] == {
        "samples": 4,
        "tokens": 3200,
        "keys": 4800,
        "predicted": 2400,
        "given": 0,
        "checkpoint_layers": 32,
        "attended": 0,
    }
    assert none["micro_batch"]["checkpoint_layers"] == 0 and none["peak"] > full["peak"]
    assert full["gpu"] is None and full["step"] is None
    model = MemoryModel.of_shape(PRESETS["8b"][1])
    need = (model.peak(3200, 4800, 2400, 32) + RESERVE) / 0.98 / GIB
    assert f"a GPU of {int(need) + 1} GB or more" in text(*options)


def test_lengths_of_samples(plan: Any) -> None:
    options = "--shape", "8b", "--per_device_train_batch_size", 1, "--prompt_tokens", 1000, "--answer_tokens", 50
    shared = plan(*options, "--answers", 3)["micro_batch"]
    assert (shared["tokens"], shared["keys"], shared["predicted"]) == (1150, 4150, 150)
    rows = plan(*options, "--share_prompts", "False")
    assert rows["micro_batch"]["tokens"] == rows["micro_batch"]["keys"] == 2100
    assert not rows["fused_layers"]


def test_the_comparison_by_hand(plan: Any) -> None:
    """8,030,261,248 weights; with a head of one output instead of 128,256: 128,255 * 4,096 fewer, 7,504,928,768."""
    language, scalar = 8030261248, 7504928768
    ppo, dpo, here = plan("--shape", "8b")["methods"]
    assert (ppo["models"], dpo["models"], here["models"]) == (4, 2, 1)
    assert ppo["weights"] == 2 * (2 * language + 2 * scalar)
    assert ppo["training"] == 14 * (language + scalar)
    assert (dpo["weights"], dpo["training"]) == (4 * language, 14 * language)
    assert here["weights"] == pytest.approx(5.31 * GIB, rel=0.01)
    assert here["total"] < dpo["total"] / 20
    tied = plan("--shape", "1b")
    assert tied["methods"][0]["weights"] == 2 * (4 * tied["weights"] + 2 * 2048)


@pytest.mark.parametrize(
    ("options", "hours"),
    [
        (["--pairs_per_second", 2], 1.0),
        (["--tokens_per_second", 1600], 1.0),
        (["--tokens_per_second", 1600, "--answer_tokens", 100], 0.5),
    ],
)
def test_time_of_an_epoch(plan: Any, options: list[Any], hours: float) -> None:
    time = plan("--shape", "8b", "--pairs", 7200, "--num_train_epochs", 2, *options)["time"]
    assert time["seconds_per_epoch"] == pytest.approx(3600 * hours)
    assert time["seconds"] == pytest.approx(7200 * hours)


def test_the_table(text: Any) -> None:
    """Every figure of the JSON that people read, rounded; a note where something isn't part of the peak."""
    said = text("--shape", "70b", "--gpu", "H100", "--pairs", 60000, "--pairs_per_second", 1.17)
    for words in (
        "Llama 3.1 70B: 70.55 billion weights, 80 layers, NF4. LoRA of rank 16: 207,093,760 trained weights",
        "H100: 79.10 GiB, 0.60 of it for CUDA",
        "80 of 80 layers checkpointed",
        "reference                                 0.00",
        "head and its logits",
        "not added",
        "An epoch of 60,000 samples at 1.17 a second: 14 h 15 min; 3 epochs: 42 h 44 min.",
    ):
        assert words in said, words
    assert "max_length" not in said  # 1024, which fits
    assert "max_length=20,000 does not fit" in text("--shape", "70b", "--gpu", "H100", "--max_length", 20000)


def test_nothing_fits(plan: Any, text: Any) -> None:
    found = plan("--shape", "70b", "--gpu", "24GB")
    assert [row["tokens"] for row in found["fits"]] == [0, 0, 0]
    assert not found["step"]["fits"]
    assert "a single sample does not fit" in text("--shape", "70b", "--gpu", "24GB")


def test_the_docs_show_what_is_printed(text: Any) -> None:
    page = (REPO / "docs" / "planning.md").read_text(encoding="utf-8")
    shown = re.findall(r"^```console\n\$ dpo-peft plan (.*?)\n(.*?)```$", page, flags=re.MULTILINE | re.DOTALL)
    assert len(shown) == 3
    for words, output in shown:
        assert text(*words.split()) == output


# ---- Models and options ---------------------------------------------------------------------------------------------


@pytest.fixture
def config_folder(tmp_path: Path) -> Path:
    """A folder that holds config.json and nothing else."""
    LlamaConfig(**CONFIG).save_pretrained(tmp_path / "config")
    return tmp_path / "config"


def test_a_config_without_weights_is_enough(plan: Any, config_folder: Path, tiny_llama: Any, tmp_path: Path) -> None:
    found = plan("--model_name_or_path", config_folder, "--lora_r", 4)
    tiny_llama().save_pretrained(tmp_path / "weights")
    real = storage_report(attach_adapter(load_base(str(tmp_path / "weights")), lora())[0])
    assert found["components"]["quantized_weights"] == real.quantized
    assert found["components"]["unquantized_weights"] == real.unquantized
    assert found["components"]["adapter"] == real.trainable
    assert found["fused_layers"]


@pytest.mark.parametrize(
    ("options", "component", "factor"),
    [
        (["--quantize_base", "False"], "quantized_weights", 0),
        (["--dtype", "float32"], "unquantized_weights", 2),
        (["--lora_r", 32], "adapter", 2),
        (["--optim", "sgd"], "optimizer_state", 0),
        (["--sync_ref_model", "True"], "reference_adapter", None),
        (["--bf16", "False", "--dtype", "float32"], "saved_activations", 2),
    ],
)
def test_options_that_change_memory(
    plan: Any, config_folder: Path, options: list[Any], component: str, factor: float | None
) -> None:
    base, changed = (
        plan("--model_name_or_path", config_folder, *more)["components"][component] for more in ([], options)
    )
    if factor is None:
        assert (base, changed) == (0, plan("--model_name_or_path", config_folder)["components"]["adapter"])
    else:
        assert changed == pytest.approx(factor * base, rel=0.05)  # the float32 log-sum-exp doesn't double


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "options", [["--use_dora", "True"], ["--lora_modules_to_save", "lm_head"], ["--fp16", "True"]]
)
def test_what_runs_on_the_models_own_layers(plan: Any, config_folder: Path, options: list[str]) -> None:
    dtype = ["--dtype", "float16"] if "--fp16" in options else []
    assert plan("--model_name_or_path", config_folder, *options, *dtype)["fused_layers"] == bool(dtype)
    assert plan("--model_name_or_path", config_folder)["fused_layers"]


def test_a_folder_of_an_adapter(plan: Any, tiny_llama: Any, tmp_path: Path) -> None:
    """Going on, its own copy is the reference; against the base there is none. Its rank and targets count."""
    tiny_llama().save_pretrained(tmp_path / "base")
    model = attach_adapter(load_base(str(tmp_path / "base")), lora(r=6, target_modules=["q_proj", "up_proj"]))[0]
    assert isinstance(model, PeftModel)
    model.save_pretrained(tmp_path / "adapter")
    found = plan("--model_name_or_path", tmp_path / "adapter")
    assert found["trained_weights"] == storage_report(model).trainable_count
    assert found["components"]["reference_adapter"] == found["components"]["adapter"] > 0
    against_base = plan("--model_name_or_path", tmp_path / "adapter", "--reference", "base")
    assert against_base["components"]["reference_adapter"] == 0
    other = plan("--model_name_or_path", tmp_path / "base", "--reference", tmp_path / "adapter")
    assert other["components"]["reference_adapter"] == found["components"]["adapter"] != other["components"]["adapter"]
    no_reference = plan("--model_name_or_path", tmp_path / "adapter", "--loss_type", "simpo")
    assert no_reference["components"]["reference_adapter"] == 0


def test_the_command_line_overrides_the_file(plan: Any, config_folder: Path, tmp_path: Path) -> None:
    """A file for training is taken as it is, hardware that isn't here included."""
    options = {
        "model_name_or_path": str(config_folder),
        "dataset_name": "none",
        "output_dir": "out",
        "lora_r": 8,
        "learning_rate": "1e-5",
        "per_device_train_batch_size": 2,
        "bf16": True,
        "tf32": True,
        "lora_target_modules": ["q_proj"],
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(options))
    file = "--config", tmp_path / "run.yaml"
    assert plan(*file)["trained_weights"] == 2 * 8 * 128
    assert plan(*file, "--lora_r", 4)["trained_weights"] == 2 * 4 * 128
    assert plan(f"--config={tmp_path / 'run.yaml'}")["micro_batch"]["samples"] == 2
    assert plan(*file, "--shape", "8b")["layers"] == 32  # in the place of the file's model


def test_the_recipe_can_be_planned(plan: Any) -> None:
    recipe = REPO / "recipes" / "dpo_qlora_8b.yaml"
    assert plan("--config", recipe, "--shape", "8b", "--gpu", "24GB")["step"]["fits"]


@pytest.mark.parametrize(
    ("options", "named", "remedy"),
    [
        (["--gpu", "H1000"], "gpu='H1000'", "H100"),
        (["--gpu", "A100"], "gpu='A100'", "A100-40GB"),
        (["--gpu", "banana"], "gpu='banana'", "--gpu 24GB"),
        (["--gpu", "0GB"], "gpu='0GB'", "1 to 10000"),
        (["--shape", "9b"], "shape='9b'", "70b"),
        (["--shape", "8b", "--model_name_or_path", "x"], "shape", "give one of them"),
        (["--model_name_or_path", "no/such/model"], "no/such/model", "can't be read"),
        ([], "model_name_or_path is missing", "--shape"),
        (["--shape", "8b", "--pairs", "5"], "pairs", "--pairs_per_second"),
        (["--shape", "8b", "--pairs_per_second", "5"], "pairs_per_second", "--pairs"),
        (["--shape", "8b", "--pairs", "5", "--pairs_per_second", "1", "--tokens_per_second", "1"], "pairs", "one"),
        (["--shape", "8b", "--pairs", "5", "--pairs_per_second", "0"], "pairs_per_second=0", "above 0"),
        (["--shape", "8b", "--pairs", "0", "--pairs_per_second", "1"], "pairs=0", "at least 1"),
        (["--shape", "8b", "--prompt_tokens", "0"], "prompt_tokens=0", "at least 1"),
        (["--shape", "8b", "--per_device_train_batch_size", "0"], "per_device_train_batch_size=0", "at least 1"),
        (["--shape", "8b", "--lora_r", "-1"], "lora_r=-1", "at least 1"),
        (["--shape", "8b", "--lora_target_modules", "w1"], "'w1'", "q_proj"),
        (["--shape", "8b", "--optim", "galore_adamw"], "galore_adamw", "adamw_8bit"),
        (["--shape", "8b", "--max_tokens_per_microbatch", "-3"], "max_tokens_per_microbatch", "'auto'"),
        (["--shape", "8b", "--loss_type", "dpoo"], "loss_type='dpoo'", "sigmoid"),
        (["--shape", "8b", "--gpus", "H100"], "'gpus'", "'gpu'"),
        (["--shape", "8b", "stray"], "'stray'", "--option value"),
        (["--shape", "8b", "--lora_r", "many"], "--lora_r", "many"),
        (["--shape", "8b", "--dtype", "int4"], "--dtype", "bfloat16"),
        (["--config", "nowhere.yaml"], "nowhere.yaml", "no such file"),
    ],
)
def test_what_it_refuses(capsys: pytest.CaptureFixture, options: list[str], named: str, remedy: str) -> None:
    assert cli.main(["plan", *options]) == 2
    out, error = capsys.readouterr()
    assert named in error and remedy in error
    assert not out and "Traceback" not in error


def test_models_that_cannot_be_predicted(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    T5Config(d_model=32, num_layers=1).save_pretrained(tmp_path / "t5")
    LlamaConfig(**CONFIG, quantization_config={"quant_method": "gptq", "bits": 4}).save_pretrained(tmp_path / "gptq")
    for name, word in (("t5", "t5 model can't be predicted"), ("gptq", "stored quantized (gptq)")):
        assert cli.main(["plan", "--model_name_or_path", str(tmp_path / name)]) == 2
        assert word in capsys.readouterr().err


# ---- GPUs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "gib"),
    [
        ("24GB", 24 * 0.98),
        ("23.5GiB", 23.5),
        ("80GB", 80 * 0.98),
        ("rtx 4090", GPUS["RTX4090"]),
        ("NVIDIA GeForce RTX 4090", GPUS["RTX4090"]),
        ("a100-40gb", GPUS["A100-40GB"]),
    ],
)
def test_gpus(text: str, gib: float) -> None:
    gpu = parse_gpu(text)
    assert gpu.total == pytest.approx(gib * GIB)
    assert gpu.usable == gpu.total - RESERVE


def test_gpus_report_less_than_they_are_sold_as() -> None:
    """Where the size is part of the name, and for GPUs of one size."""
    sold = {"A100-40GB": 40, "A100-80GB": 80, "V100-16GB": 16, "V100-32GB": 32, "T4": 16, "RTX4090": 24, "H100": 80}
    for name, size in sold.items():
        assert 0.9 * size < GPUS[name] < size, name
    with pytest.raises(OptionError, match="A100-40GB or A100-80GB|A100-80GB or A100-40GB"):
        parse_gpu("A100")


def test_a_limit_stands_in_for_a_gpu(plan: Any, text: Any, capsys: Any) -> None:
    limited = plan("--shape", "8b", "--max_memory_gib", 15.4)
    assert limited["gpu"]["usable"] == pytest.approx(15.4 * GIB)
    assert plan("--shape", "8b", "--gpu", "24GB", "--max_memory_gib", 15.4)["step"] == limited["step"]
    assert plan("--shape", "8b", "--gpu", "24GB", "--max_memory_gib", 60)["gpu"]["name"] == "24GB"
    assert cli.main(["plan", "--shape", "8b", "--gpu", "24GB", "--checkpoint_layers", "3"]) == 2
    assert "checkpoint_layers has no effect here" in capsys.readouterr().err


def test_offloaded_inputs_and_attention_of_hopper(plan: Any) -> None:
    """8B: inputs of 32 layers of 2 * 4096 bytes a token; k and v of 2 * 2 * 1024 a key where they are gathered."""
    whole = ("--shape", "8b", "--gpu", "24GB")
    assert (
        plan(*whole, "--activation_offloading", "true")["fits"][2]["tokens"] > 1.3 * plan(*whole)["fits"][2]["tokens"]
    )
    sizes = {gpu: plan("--shape", "8b", "--gpu", gpu, "--max_memory_gib", 40) for gpu in ("H100", "A100-80GB")}
    assert sizes["H100"]["fits"][0]["tokens"] > sizes["A100-80GB"]["fits"][0]["tokens"]


def test_options_that_trl_has_for_model_and_adapter(capsys: pytest.CaptureFixture) -> None:
    def figures(*words: str) -> dict[str, Any]:
        assert cli.main(["plan", "--shape", "8b", "--json", *words]) == 0
        return json.loads(capsys.readouterr().out)

    assert figures("--lora_target_modules", "all-linear") == figures()
    assert figures("--load_in_4bit", "false") == figures("--quantize_base", "false")
    assert figures("--lora_target_modules", "q_proj")["trained_weights"] < figures()["trained_weights"]
    for words, name in ((["--load_in_8bit"], "8-bit"), (["--lora_target_modules", ".*_proj"], "a pattern")):
        assert cli.main(["plan", "--shape", "8b", *words]) == 2
        assert re.search(f"{name}.* not known to the planner", capsys.readouterr().err)
