"""`dpo-peft bench`: arithmetic by hand, a real measurement of a tiny shape, and what the planner makes of a file."""

import getpass
import itertools
import json
import platform
import socket
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import get_peft_model
from trainer_helpers import lora
from transformers import PreTrainedModel

from dpo_peft import OptionError, cli
from dpo_peft.cli.bench import render
from dpo_peft.planning import Shape, bench, plan
from dpo_peft.planning.gpus import OF_PRODUCTS, parse_gpu
from dpo_peft.training.throughput import weights_per_token

CPU = torch.device("cpu")
GPU = {"name": "NVIDIA GeForce RTX 4090", "total": 24 * 2**30, "driver": "580.95"}
RATES = {"flops": {"bfloat16": 1.6e14, "float16": 1.5e14, "fp8": 3e14}, "nf4_weights_per_second": 4e11}
RATES |= {"copy_bytes_per_second": 9.1e11, "host_to_device_bytes_per_second": 2.2e10}
RUN = {"shape": "8b", "samples_per_step": 8, "steps": 20, "samples_per_second": 2.5, "tokens_per_second": 2000.0}
RUN |= {"share_of_bound": 0.61, "peak": 20 * 2**30, "predicted_peak": 19.5 * 2**30}
FOUND = {"gpu": GPU, "rates": RATES, "run": RUN}
SHOWN = """\
GPU                 NVIDIA GeForce RTX 4090, 24.00 GiB, driver 580.95
large products      bfloat16 160, float16 150, fp8 300 TFLOP/s
copies              within memory 910, from the CPU's (pinned) 22 GB/s
NF4 unpacked        400 billion weights/s
DPO, 8b             2.5 pairs/s, 2,000 tokens/s, of 20 steps of 8 pairs
share of the bound  61%
peak of memory      20.00 GiB, predicted 19.50"""


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    return json.loads(json.dumps(bench.bench(minutes=0.01)))


def test_a_tiny_run(measured: dict[str, Any]) -> None:
    """The tokens of a sample are those of the rows that it was given."""
    run, rows = measured["run"], bench.rows(bench.ROWS, 1000)
    assert (run["shape"], measured["gpu"], run["share_of_bound"]) == ("tiny", None, None)
    first = bench.WARM * bench.CPU_SAMPLES
    counted = rows[first : first + run["steps"] * bench.CPU_SAMPLES]
    tokens = statistics.mean(sum(map(len, row.values())) for row in counted)
    assert run["steps"] >= bench.LEAST and run["tokens_per_second"] / run["samples_per_second"] == pytest.approx(
        tokens
    )
    assert set(measured["rates"]["flops"]) == {"float32"}


def test_it_names_no_user_machine_or_folder(measured: dict[str, Any]) -> None:
    text, secrets = json.dumps(measured), {getpass.getuser(), socket.gethostname(), platform.node(), str(Path.home())}
    assert not [one for one in secrets if f'"{one}' in text] and "/" not in text
    assert len(measured["date"]) == len("2026-11-29")


def test_rates_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of work that takes half a second each."""
    monkeypatch.setattr(bench, "seconds_of", lambda work, device: (work(), 0.5)[1])
    assert bench.rates(CPU) == {
        "flops": {"float32": 2 * 2 * 512**3},
        "nf4_weights_per_second": 2 * 512**2,
        "copy_bytes_per_second": 2 * 2 * 2**26,
    }


def test_lengths_are_those_that_are_said() -> None:
    rows = bench.rows(4000, 1000)
    assert statistics.mean(len(row["prompt_ids"]) for row in rows) == pytest.approx(190, rel=0.05)
    assert statistics.mean(len(row["chosen_ids"]) for row in rows) == pytest.approx(300, rel=0.05)
    ids = [i for row in rows[:99] for i in itertools.chain(*row.values())]
    assert (min(ids), max(ids)) == (4, 999) and rows[:9] == bench.rows(9, 1000)


@pytest.mark.parametrize("tied", [True, False])
def test_the_model_is_in_nf4_and_random(tied: bool) -> None:
    from bitsandbytes.functional import dequantize_4bit

    shape = Shape.llama(64, 128, 2, 4, 2, 100, tied=tied)
    model: PreTrainedModel = bench.random_model(shape.config(), CPU, torch.float32)
    small = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert len(small) == 14 and not any(parameter.is_meta for parameter in model.parameters())
    weights = [dequantize_4bit(one.weight.data, one.weight.quant_state) for one in small]
    assert {tuple(weight.shape) for weight in weights} == {(64, 64), (32, 64), (128, 64), (64, 128)}
    assert all(weight.std() == pytest.approx(0.02, rel=0.1) for weight in weights)
    assert not torch.equal(weights[0], weights[3])
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    adapted = get_peft_model(model, lora())
    of_layers = 2 * sum(linear.weights for linear in shape.linears) + shape.others
    assert weights_per_token(adapted) == (of_layers, 100 * 64)  # packed ones count as what they stand for


def test_what_is_shown_of_a_gpu() -> None:
    assert render(FOUND) == SHOWN


def test_the_command(measured, tmp_path, monkeypatch, capsys) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(bench, "bench", lambda *given: (asked.append(given), measured)[1])
    file = tmp_path / "mine.json"
    assert cli.main(["bench", "--shape", "tiny", "--minutes", "0.5", "--output", str(file)]) == 0
    assert asked == [("tiny", 0.5)] and json.loads(file.read_text()) == measured
    assert "figures of a CPU: they say nothing about a GPU" in capsys.readouterr().out
    assert cli.main(["bench", "--output", str(file)]) == 2 and "--overwrite" in capsys.readouterr().err
    assert cli.main(["bench", "--output", str(tmp_path / "no" / "x.json")]) == 2
    assert cli.main(["bench", "--output", str(file), "--overwrite", "--json", "--minutes", "0"]) == 2
    assert len(asked) == 1
    assert cli.main(["bench", "--output", str(file), "--overwrite", "--json"]) == 0
    capsys.readouterr()


@pytest.mark.parametrize(("shape", "told"), [("9b", "is not one of 1b"), ("8b", "--shape tiny")])
def test_shapes_that_are_refused(shape: str, told: str) -> None:
    with pytest.raises(OptionError, match=told):
        bench.bench(shape)


# ---- A file of it in the planner ------------------------------------------------------------------------------------


def test_the_planner_takes_what_was_measured(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    file.write_text(json.dumps(FOUND))
    gpu = parse_gpu(str(file))
    assert (gpu.name, gpu.total, gpu.like) == (GPU["name"], GPU["total"], "RTX4090")
    assert gpu.pace(False) == (OF_PRODUCTS * 1.6e14, 2.2e10) and gpu.pace(False, 5) == (OF_PRODUCTS * 1.6e14, 5e9)
    assert gpu.pace(True) == (OF_PRODUCTS * 1.6e14, parse_gpu("RTX4090").pace(True).bandwidth)
    options = {"shape": "8b", "stream_layers": 4}
    mine, table = (plan(gpu=name, **options).figures["placement"] for name in (str(file), "RTX4090"))
    assert (mine["flops"], mine["bandwidth"], mine["measured"]) == (OF_PRODUCTS * 1.6e14, 2.2e10, True)
    assert mine["samples_per_second"] > table["samples_per_second"] and not table["measured"]
    limited = plan(gpu=str(file), max_memory_gib=12, **options).figures["placement"]
    assert limited["flops"] == mine["flops"]


def test_attention_is_that_of_the_gpu_in_the_file(tmp_path: Path) -> None:
    (file := tmp_path / "h100.json").write_text(json.dumps({**FOUND, "gpu": {**GPU, "name": "NVIDIA H100 80GB HBM3"}}))
    assert plan(shape="8b", gpu=str(file)).model.packed and not plan(shape="8b", gpu="RTX4090").model.packed


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{}", "not a file that"),
        ("[", "not a file that"),
        (json.dumps({"gpu": None}), "on a CPU"),
        (None, "not a file"),
    ],
)
def test_other_files_are_refused(text: str | None, told: str, tmp_path: Path) -> None:
    file = tmp_path / "other.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(OptionError, match=f"gpu=.*{told}"):
        parse_gpu(str(file))
