"""The speed benchmark's own arithmetic: its lengths, its bound, its comparison of turns, and the page it writes."""

import importlib.util
import json
import math
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from datasets import Dataset
from paths import REPO
from transformers import AutoTokenizer

from dpo_peft.data import from_sharegpt, prepare_dataset
from dpo_peft.forward import attention

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
    names = ["speed_models", "speed_cases", "gpu_queue", "speed_peers", "speed", "speed_report"]
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
    head = 6 * 64 * 1000 * 7
    # Answer-only: 5 prompt tokens pass once; upper half: so do the lower of two layers.
    assert models.bound_flops("tiny", [(5, 3, 4)], "answer-only") == decoder * (2 * 5 + 6 * 7) + head
    assert models.bound_flops("tiny", [(5, 3, 4)], "upper half") == decoder * 4 * 12 + head
    assert models.bound_flops("tiny", [(5, 3, 4)], "answer-only, upper half") == decoder * (2 * 5 + 4 * 7) + head
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
    assert "margins_apart" not in found
    own[0]["margins"], trl[0]["margins"] = [0.0, 0.5], [0.0, 0.75]
    found = scripts["speed"].compare({"own": own[:1], "fused": trl[:1]})
    assert found["margins_apart"] == {"fused": 0.25} and found["margins_move_by"] == 0.5


MACHINE = {
    "machine": "x, 2 threads",
    "commit": "0123456789abcdef",
    "measured": "2026-01-01",
    "versions": "torch 2.11",
    "matmul_flops": {"bfloat16": 1e12},
}


def finished(engine: str, samples_per_s: float, **more: object) -> dict:
    figures = {"samples_per_s": samples_per_s, "tokens_per_s": 1234.5, "seconds_per_step": 8 / samples_per_s}
    fixed = {"shape": "8b", "work": "uf", "samples": 8, "peak_gib": 12.04, "predicted_gib": 13.0, "loss": 0.69}
    # At this rate and these seconds: 3/8 of the bound.
    work = {"bound_flops_per_step": 0.375e12 * 8 / samples_per_s}
    return {**MACHINE, "name": f"8b uf {engine}", "engine": engine, **fixed, **figures, **work, **more}


@pytest.fixture
def card(scripts) -> dict:
    """A card with a case of each kind, two of them in the list of the GPU's cases and one of a smaller card."""
    turns = {"ours": [turn(1.0, [0.7])], "trl": [turn(2.5, [0.7])]}
    compared = scripts["speed"].compare(turns)
    failed = {**MACHINE, "engine": "trl", "shape": "8b", "work": "ctx32k"}
    oom = "OutOfMemoryError: CUDA out of memory. Tried to allocate"
    return {
        "device": "NVIDIA Card 80GB",
        "results": [
            finished("ours", 8.0, name="8b uf ours free", options={"gradient_checkpointing": False}),
            finished("trl", 2.0),
            finished(
                "ours", 99.0, name="smaller", memory_gib=23.0
            ),  # no TRL under this limit: nothing to compare with
            finished("ours", 98.0, name="larger", samples=16),  # nor on steps of 16 pairs
            finished("ours", 97.0, name="less", adapter="answer-only"),
            {**failed, "name": "8b ctx32k trl", "error": oom},
            {
                **failed,
                "name": "odd",
                "engine": "unsloth",
                "error": "exit status 1: Traceback\nModuleNotFoundError: a|b",
            },
            {**MACHINE, "name": "small demo", "engines": {}, **compared},
            {
                **MACHINE,
                "name": "pytest -m gpu",
                "command": ["x"],
                "passed": 12,
                "failed": 0,
                "failing": [],
                "took": 9.0,
            },
        ],
    }


def test_table(scripts, card) -> None:
    text = scripts["speed_report"].table(card)
    same = "| 8 | {} | {} | 1,234 | {} | 12.0 | 13.0 | 38% | 0.6900 |"
    lines = text.splitlines()
    assert "| 0123456 | 8b uf ours free " + same.format("8", "4.00", "1") in lines
    assert "| 0123456 | 8b uf trl " + same.format("2", "1.00", "4") in lines
    assert "| 0123456 | smaller " + same.format("99", "", "0.0808") in lines
    assert any("| 0123456 | larger | 16 | 98 |  |" in line for line in lines)
    assert any("| 0123456 | 8b ctx32k trl |  | out of memory |" in line for line in lines)
    assert any("| odd |  | ModuleNotFoundError: a/b |" in line for line in lines)
    demo = "| 0123456 | small demo | 1 | ours 1.00 | trl 2.50 | 2.50 (2.50 to 2.50) | 2.50 | 0.0e+00 |  | 0% |"
    assert demo in lines
    assert "| 0123456 | pytest -m gpu | passed 12, failed 0 |" in lines
    for block in text.split("\n\n")[1:]:
        assert len({line.count("|") for line in block.splitlines()}) == 1, block  # as many cells in every row


def test_what_is_not_measured_stands_in_the_table(scripts, card) -> None:
    """In the order of the cases; what the list doesn't know comes last."""
    lines = scripts["speed_report"].table(card).splitlines()
    names = [line.split(" | ")[1] for line in lines if line.startswith(("| 0123456 |", "|  |"))]
    listed = [case["name"] for case in scripts["speed_cases"].gpu() if "engine" in case]
    assert names[: len(listed)] == listed and names[len(listed)] == "smaller"
    assert any(line.startswith("|  | 8b outlier ours 24gb |  | not measured |") for line in lines)
    missing = sum("not measured" in line for line in lines)
    assert missing == len(scripts["speed_cases"].gpu()) - 4


def test_page_keeps_what_is_written_by_hand(scripts, card, tmp_path) -> None:
    results, page, chart = (tmp_path / name for name in ("speed_card.json", "performance.md", "chart.png"))
    page.write_text("# Performance\n\nWords by hand.\n")
    results.write_text(json.dumps(card))
    scripts["speed_report"].write_page([results], page, chart)
    first = page.read_text()
    assert first.startswith("# Performance\n\nWords by hand.\n") and first.count("| 8b uf trl |") == 1
    page.write_text(first + "\nMore words.\n")
    results.write_text(json.dumps({**card, "results": [finished("trl", 4.0)]}))
    scripts["speed_report"].write_page([results], page, chart)
    second = page.read_text()
    assert "Words by hand." in second and second.endswith("More words.\n")
    assert "| 8b uf trl | 8 | 4 | 1.00 |" in second and "smaller" not in second
    assert chart.read_bytes()[:4] == b"\x89PNG"


def test_chart_takes_the_fastest_of_each_engine(scripts, card) -> None:
    card["results"].insert(1, finished("ours", 6.0, name="slower"))
    assert scripts["speed_report"].speedups([card]) == {
        "8b uf\nCard": {"ours": 4.0, "trl": 1.0},
        "small demo": {"ours": 2.5, "trl": 1.0},
    }


def test_the_page_holds_the_committed_results(scripts) -> None:
    """What `speed_report.py` would write stands there."""
    page = (REPO / "docs" / "performance.md").read_text("utf-8")
    for path in sorted((BENCHMARKS / "results").glob("speed_*.json")):
        content = scripts["speed_report"].table(json.loads(path.read_text("utf-8")))
        assert scripts["speed_report"].place(page, path.stem, content) == page, path.name


# ---- one case


def test_description(scripts) -> None:
    found = scripts["speed"].describe("cpu", "abc")
    assert found["device"] == "cpu" and found["commit"] == "abc" and f"torch {torch.__version__}," in found["versions"]
    assert 1e8 < found["matmul_flops"]["float32"] < 1e14


def test_results_do_not_make_the_commit_another(scripts, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the queue writes is committed too; only code that differs does."""

    def git(*command: str) -> str:
        given = ["git", "-c", "user.name=x", "-c", "user.email=x@x", *command]
        return subprocess.run(given, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    for folder in ("dpo_peft", "benchmarks/results"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.setattr(scripts["speed"], "HERE", tmp_path / "benchmarks")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert scripts["speed"].commit_here() == ""
    (tmp_path / "dpo_peft" / "a.py").write_text("1\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "a")
    (tmp_path / "benchmarks" / "results" / "speed_card.json").write_text("{}")
    assert scripts["speed"].commit_here() == git("rev-parse", "HEAD")
    (tmp_path / "dpo_peft" / "a.py").write_text("2\n")
    assert scripts["speed"].commit_here() == git("rev-parse", "HEAD") + "-dirty"


@pytest.mark.slow
def test_adapters_on_less_get_their_rows(scripts) -> None:
    """The upper layers alone are trained; an answer-only adapter's rows all hold the token that it acts from."""
    case = {"engine": "ours", "work": "demo", "shape": "tiny", "samples": 2, "dtype": "float32", "warm": 1, "steps": 1}
    whole = scripts["speed"].measure(case, "cpu")
    upper = scripts["speed"].measure({**case, "adapter": "upper half"}, "cpu")
    assert upper["losses"][0] == pytest.approx(whole["losses"][0], abs=1e-6)  # both start from the base
    assert upper["losses"][1] != whole["losses"][1]
    assert upper["bound_flops_per_step"] < whole["bound_flops_per_step"]


@pytest.mark.slow
def test_attention_by_name_is_what_is_measured(scripts, monkeypatch: pytest.MonkeyPatch) -> None:
    """A candidate that the trainer's probe refuses is an error, not a figure of the backend that it falls back on."""
    record = attention.backend_named("dense")
    broken = replace(record, attend=lambda plan, q, *_: q + 1)
    candidates = SimpleNamespace(CANDIDATES={"mine": record, "broken": broken})
    monkeypatch.setitem(sys.modules, "attention", candidates)
    monkeypatch.setattr(attention, "BACKENDS", [*attention.BACKENDS])
    case = {"engine": "ours", "work": "demo", "shape": "tiny", "samples": 2, "dtype": "float32", "warm": 1, "steps": 1}
    assert "'mine, by name'" in scripts["speed"].measure({**case, "attention": "mine"}, "cpu")["plan"]
    with pytest.raises(RuntimeError, match="backend 'dense'"):
        scripts["speed"].measure({**case, "attention": "broken"}, "cpu")
