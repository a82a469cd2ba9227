"""The speed benchmark's own arithmetic: its lengths, its bound, its comparison of turns, and the page it writes."""

import importlib.util
import json
import math
import random
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from datasets import Dataset
from paths import REPO
from transformers import AutoTokenizer

from dpo_peft.data import from_sharegpt, prepare_dataset

BENCHMARKS = REPO / "benchmarks"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # they import each other by these names
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    names = ["speed_models", "speed_cases", "speed_peers", "speed", "speed_report"]
    yield {name: load(name) for name in names}
    for name in names:
        del sys.modules[name]


# ---- lengths and rows


def test_lengths_are_the_stated_log_normal_ones(scripts) -> None:
    """uf: prompts of mean 190 and variation 1, so log-normal with sigma^2 = ln 2; answers of 300 and 0.7."""
    draw = random.Random(0)
    prompt, answer = math.sqrt(math.log(2)), math.sqrt(math.log(1.49))
    expected = [
        (
            int(math.exp(math.log(190) - prompt**2 / 2 + prompt * draw.normalvariate(0, 1))),
            int(math.exp(math.log(300) - answer**2 / 2 + answer * draw.normalvariate(0, 1))),
            int(math.exp(math.log(300) - answer**2 / 2 + answer * draw.normalvariate(0, 1))),
        )
        for _ in range(3)
    ]
    assert expected == [(115, 250, 382), (123, 600, 93), (168, 114, 237)]
    assert scripts["speed_models"].lengths("uf", 3) == expected


@pytest.mark.parametrize(
    ("work", "first", "longest"),
    [
        ("hh", [(90, 47, 76), (96, 126, 15)], (1024, 512)),
        ("longprompt", [(2722, 218, 315), (2793, 469, 91)], (6000, 1000)),
        ("multi", [(115, 250, 382, 231, 600), (37, 291, 114, 237, 204)], (1024, 1024)),
        ("demo", [(52, 342, 117), (539, 239, 275)], (1457, 979)),
        ("ctx32k", [(30720, 1024, 1024)] * 2, (30720, 1024)),
    ],
)
def test_first_lengths_and_caps(scripts, work, first, longest) -> None:
    sizes = scripts["speed_models"].lengths(work, 4000)
    assert sizes[:2] == first
    assert min(size[0] for size in sizes) >= 8 and min(min(size[1:]) for size in sizes) >= 3
    assert max(size[0] for size in sizes) <= longest[0] and max(max(size[1:]) for size in sizes) <= longest[1]


def test_demo_lengths_are_those_of_the_data(scripts, data_dir, tokenizer_dir) -> None:
    rows = json.loads((data_dir / "llama-factory-demo" / "dpo_en_demo.json").read_text("utf-8"))[:64]
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir("smollm2"))
    prepared, _ = prepare_dataset(
        Dataset.from_list([from_sharegpt(row) for row in rows]), tokenizer, name="train", max_length=None
    )
    assert scripts["speed_models"].DEMO == [
        (len(row["prompt_ids"]), *map(len, row["completion_ids"])) for row in prepared
    ]


def test_pairs_and_text_are_the_same_rows(scripts) -> None:
    models = scripts["speed_models"]
    sizes = [(5, 3, 4, 2, 6), (9, 2, 3, 4, 5)]
    rows = models.make_rows(sizes, vocab=50)
    assert [(len(r["prompt_ids"]), len(r["chosen_ids"]), *map(len, r["rejected_ids"])) for r in rows] == sizes
    pairs = models.as_pairs(rows)
    assert [pair["rejected_ids"] for pair in pairs] == rows[0]["rejected_ids"] + rows[1]["rejected_ids"]
    assert [pair["prompt_ids"] for pair in pairs] == [rows[0]["prompt_ids"]] * 3 + [rows[1]["prompt_ids"]] * 3
    tokenizer = models.make_tokenizer(50)
    for name in ("prompt", "chosen", "rejected"):
        texts = [row[name] for row in models.as_text(pairs)]
        assert tokenizer(texts)["input_ids"] == [pair[f"{name}_ids"] for pair in pairs]


# ---- model and bound


def test_layers_are_equal_but_apart_in_memory(scripts) -> None:
    model = scripts["speed_models"].make_model("tiny", "cpu", torch.float32)
    first, second = (layer.mlp.up_proj for layer in model.model.layers)
    assert torch.equal(first.weight.data, second.weight.data)
    places = {tensor.data_ptr() for x in (first, second) for tensor in (x.weight.data, x.weight.quant_state.absmax)}
    assert len(places) == 4
    inputs = torch.randn(3, 64)
    assert torch.equal(first(inputs), second(inputs))
    assert 0.1 < float(first(inputs).std()) < 0.2  # 64 weights of 0.02 each: 0.16


def test_bound_counts_the_model_it_is_for(scripts) -> None:
    """tiny: per layer 64x64 (q, o) and 64x32 (k, v), three of 64x128; head 64x1000 at the 7 predicted tokens."""
    models = scripts["speed_models"]
    decoder = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert models.bound_flops("tiny", [(5, 3, 4)]) == 6 * (decoder * 12 + 64 * 1000 * 7)
    layers = models.make_model("tiny", "cpu", torch.float32).model.layers.modules()
    assert sum(m.in_features * m.out_features for m in layers if hasattr(m, "in_features")) == decoder


# ---- turns and the page


def turn(seconds: float, losses: list[float]) -> dict:
    times = {"seconds_per_step": seconds, "cpu_seconds_per_step": 2 * seconds}
    return {**times, "samples_per_s": 2 / seconds, "tokens_per_s": 9.0, "losses": losses, "bound_flops_per_step": 1e9}


def test_turns_are_compared_within_each(scripts) -> None:
    own = [turn(1.0, [0.7, 0.5]), turn(2.0, [0.7, 0.5]), turn(4.0, [0.7, 0.5])]
    trl = [turn(3.0, [0.7, 0.5]), turn(4.0, [0.7, 0.51]), turn(6.0, [0.7, 0.5])]
    found = scripts["speed"].compare({"ours": own, "trl": trl})
    assert found["times_as_fast"]["trl"]["seconds_per_step"] == {"median": 2.0, "all": [1.5, 2.0, 3.0]}
    assert found["medians"]["ours"]["seconds_per_step"] == 2.0
    assert found["losses_apart"]["trl"] == pytest.approx(0.01)
    assert found["losses_move_by"] == pytest.approx(0.2)
    scripts["speed"].add_bound(found, rate=1e9)
    assert found["medians"]["ours"]["share_of_bound"] == 0.5 and found["medians"]["trl"]["share_of_bound"] == 0.25


def test_an_error_names_files_without_folders(scripts) -> None:
    text = 'File "/some/where/lib.so-1/core.py", line 3: 2/3 of a/b.py'
    assert scripts["speed"].without_folders(text) == 'File "core.py", line 3: 2/3 of a/b.py'


def finished(engine: str, samples_per_s: float, **more: object) -> dict:
    figures = {"samples_per_s": samples_per_s, "tokens_per_s": 1234.5, "seconds_per_step": 8 / samples_per_s}
    fixed = {"shape": "8b", "work": "uf", "samples": 8, "peak_gib": 12.04, "predicted_gib": 13.0, "loss": 0.69}
    return {"name": f"{engine}", "engine": engine, **fixed, **figures, "share_of_bound": 0.375, **more}


@pytest.fixture
def run(scripts) -> dict:
    turns = {"ours": [turn(1.0, [0.7])], "trl": [turn(2.5, [0.7])]}
    compared = scripts["speed"].compare(turns)
    scripts["speed"].add_bound(compared, rate=1e10)
    failed = {"name": "big", "engine": "trl", "shape": "8b", "work": "ctx32k"}
    return {
        "device": "Card",
        "machine": "x, 2 threads",
        "commit": "0123456789abcdef",
        "versions": {"torch": "2.11"},
        "matmul_flops": {"bfloat16": 7.76e14},
        "results": [
            finished("ours", 8.0, options={"gradient_checkpointing": False}),
            finished("trl", 2.0),
            finished("ours", 99.0, memory_gib=23.0),  # no TRL under this limit: nothing to compare with
            {**failed, "error": "OutOfMemoryError: CUDA out of memory. Tried to allocate"},
            {**failed, "engine": "unsloth", "error": "not importable"},
            {"name": "small demo", "engines": {}, **compared},
        ],
    }


def test_table(scripts, run) -> None:
    text = scripts["speed_report"].table(run)
    same = "| 8 | {} | {} | 1,234 | {} | 12.0 | 13.0 | 38% | 0.6900 |"
    lines = text.splitlines()
    assert "| 8b uf | dpo-peft | gradient_checkpointing=False " + same.format("8", "4.00", "1") in lines
    assert "| 8b uf | TRL | defaults " + same.format("2", "1.00", "4") in lines
    assert "| 8b uf, 23 GiB | dpo-peft | defaults " + same.format("99", "", "0.0808") in lines
    assert any("| 8b ctx32k | TRL | defaults |  | out of memory |" in line for line in lines)
    assert any("| Unsloth | defaults |  | not importable |" in line for line in lines)
    assert "| small demo | 1 | 1.00 | 2.50 | 2.50 (2.50 to 2.50) | 2.50 | 0.0e+00 | 10% |" in lines
    for block in text.split("\n\n")[1:]:
        assert len({line.count("|") for line in block.splitlines()}) == 1, block  # as many cells in every row


def test_page_keeps_what_is_written_by_hand(scripts, run, tmp_path, monkeypatch) -> None:
    results, page = tmp_path / "speed_card.json", tmp_path / "performance.md"
    results.write_text(json.dumps(run))
    paths = [str(results), "--page", str(page), "--chart", str(tmp_path / "chart.png")]
    monkeypatch.setattr("sys.argv", ["speed_report.py", *paths])
    scripts["speed_report"].main()
    first = page.read_text()
    assert first.startswith("# Performance") and first.count("| 8b uf | TRL |") == 1
    page.write_text(first.replace("## Figures", "## Figures\n\nWords by hand.") + "\nMore words.\n")
    results.write_text(json.dumps({**run, "results": [finished("trl", 4.0)]}))
    scripts["speed_report"].main()
    second = page.read_text()
    assert "Words by hand." in second and second.endswith("More words.\n")
    assert "| 8 | 4 | 1.00 |" in second and "dpo-peft" not in second.partition("<!-- table")[2]
    assert (tmp_path / "chart.png").read_bytes()[:4] == b"\x89PNG"


def test_chart_takes_the_fastest_of_each_engine(scripts, run) -> None:
    run["results"].insert(1, finished("ours", 6.0))
    assert scripts["speed_report"].speedups([run]) == {
        "8b uf": {"ours": 4.0, "trl": 1.0},
        "small demo": {"ours": 2.5, "trl": 1.0},
    }
