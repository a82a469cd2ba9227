"""Every block of code on the pages runs, page by page, in order: Python, commands, configs and rows (`pages.py`)."""

import dataclasses
import re
from functools import partial
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any

import pytest
import torch
from forward_models import SHARING, build, random_samples
from hub_helpers import trained
from pages import KINDS, PAGES, blocks_of, run_page
from paths import REPO
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import dpo_peft
from dpo_peft import OptionError, config, files
from dpo_peft.cli import main
from dpo_peft.forward import attention, completion_logps, pack, plan_forward
from dpo_peft.fused import families
from dpo_peft.losses import REGISTRY, pairwise
from dpo_peft.quickstart import model_path, train_file

pytest_plugins = ["hub_helpers"]

# What may keep a block from being run, at the head of its reason; of Python the first line alone.
NEEDS = r"needs (a GPU|several GPUs|the Hub)\b"
NEEDS_TOO = r"needs (the package index|vLLM|Ollama|a GGUF file)\b"
QWEN3 = families.FAMILIES["qwen3"]


def test_a_block_is_of_a_kind_that_runs_or_says_why_not() -> None:
    bad = []
    for path in PAGES:
        page = path.read_text("utf-8")
        blocks = [*blocks_of(page)]
        for block in blocks:
            where = f"{path.name}:{block.line}"
            if block.kind not in KINDS:
                bad.append(f"{where}: {block.kind!r} is none of {', '.join(KINDS)}")
            reasons = NEEDS if block.kind != "console" else f"{NEEDS}|{NEEDS_TOO}"
            if block.reason is not None and not re.match(reasons, block.reason):
                bad.append(f"{where}: {block.reason!r} is no reason not to run it")
            if block.kind == "text" and re.search(r"^(\$ |dpo-peft |import |from \w+ import |def )", block.text, re.M):
                bad.append(f"{where}: this is no text")
        if page.count("<!-- not run") != sum(block.reason is not None for block in blocks):
            bad.append(f"{path.name}: a `not run` that belongs to no block")
    assert not bad, "\n".join(bad)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What stands for each adapter that a page takes as given."""
    folder = tmp_path_factory.mktemp("trained") / "adapter"
    rows = folder.parent / "rows.jsonl"
    rows.write_text("".join(Path(train_file()).read_text("utf-8").splitlines(keepends=True)[:16]), "utf-8")
    words = f"train --config {REPO}/recipes/quickstart.yaml --model_name_or_path {model_path()} --dataset_name {rows}"
    short = "--max_steps 2 --per_device_train_batch_size 4 --sample_prompts 1 --sample_max_new_tokens 8"
    assert main([*f"{words} --eval_dataset_name {rows} --output_dir {folder} {short}".split()]) == 0
    return folder


def given(page: str, adapter: Path) -> dict[str, Any]:
    """Names that the Python of a page begins with: what its text speaks of, and for CONTRIBUTING.md the modules that
    its blocks are to be written into."""
    if page == "CONTRIBUTING.md":
        return {**vars(families), **vars(attention), **vars(config), **vars(pairwise)}
    rows = files.read_rows(train_file(), "train").select(range(4))
    names: dict[str, Any] = {"dataset": rows, "prompts": rows.select_columns(["prompt"])}
    if page in ("scoring.md", "planning.md"):
        base = AutoModelForCausalLM.from_pretrained(model_path())
        names["model"] = names["peft_model"] = PeftModel.from_pretrained(base, adapter, adapter_name="judge")
        names["tokenizer"] = AutoTokenizer.from_pretrained(model_path())
    return names


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Configs are those of a short run on a CPU; registries are as before at the end."""
    import trl

    short = {"use_cpu": True, "bf16": False, "max_steps": 1, "report_to": "none"}
    monkeypatch.setattr(dpo_peft, "DPOConfig", partial(dpo_peft.DPOConfig, **short))
    monkeypatch.setattr(trl, "GRPOTrainer", partial(trl.GRPOTrainer, args=trl.GRPOConfig("outputs/grpo", **short)))
    monkeypatch.setattr(attention, "BACKENDS", [*attention.BACKENDS])
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))
    monkeypatch.setitem(REGISTRY, "hinge_at", REGISTRY["hinge"])
    del REGISTRY["hinge_at"]


def runs(path: Path) -> bool:
    """Whether a page has something to run, and isn't run by the test that uses what it defines, or has its images."""
    blocks = blocks_of(path.read_text("utf-8"))
    return path.name not in ("CONTRIBUTING.md", "images.md") and any(
        block.reason is None and block.kind != "text" for block in blocks
    )


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in PAGES if runs(path)], ids=lambda path: path.name)
@pytest.mark.usefixtures("small")
def test_a_page_runs(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: Path, request: pytest.FixtureRequest
) -> None:
    names = given(path.name, adapter)
    if publishes := path.name == "publishing.md":  # to a Hub of this machine
        hub = request.getfixturevalue("hub")
        hub.add_repo("me/my-base", {"config.json": b"{}"})
        model, tokenizer = (request.getfixturevalue(name) for name in ("tiny_llama", "make_tokenizer"))
        names["trainer"] = trained(model, tokenizer, tmp_path / "reviews")
    (tmp_path / "page").mkdir()
    run_page(path.read_text("utf-8"), tmp_path / "page", monkeypatch, adapter, names)
    if publishes:
        assert {"me/my-adapter", "me/reviews"} <= {*hub.repos}


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_what_contributing_shows_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss has the figure of its docstring, the option its range, the backend agrees with the definition, the
    family is the one that there is."""
    page = (REPO / "CONTRIBUTING.md").read_text("utf-8")
    space = run_page(page, tmp_path, monkeypatch, tmp_path, given("CONTRIBUTING.md", tmp_path))
    loss_B = space["hinge_at_loss"](torch.tensor([2.0]), torch.tensor([-1.0]), beta=0.1)
    assert loss_B.item() == pytest.approx(0.7) and "hinge_target" in REGISTRY["hinge_at"].options

    body = {"__annotations__": {"hinge_target": float}, "hinge_target": space["hinge_target"]}
    extended: Any = dataclasses.dataclass(type("Extended", (config.DPOConfig,), body))
    short = {"output_dir": "run", "use_cpu": True, "bf16": False, "report_to": "none", "loss_type": "hinge_at"}
    assert extended(**short).hinge_target == 1.0 and extended(**short, hinge_target=2.0).hinge_target == 2.0
    with pytest.raises(OptionError, match="hinge_target"):
        extended(**short, hinge_target=0.0)

    model, batch = build(*SHARING["llama"]), pack(random_samples([(11, (5, 8, 1)), (6, (7, 3))]))
    assert plan_forward(model).backend == "dense"  # "mine" is for CUDA
    mine_C, dense_C = (completion_logps(model, batch, name).logps_C for name in ("mine", "dense"))
    assert torch.equal(mine_C, dense_C)
    assert families.FAMILIES["qwen3"] == QWEN3 is not families.FAMILIES["qwen3"]


@pytest.mark.parametrize(
    ("block", "error"),
    [
        ("```python\nfrom dpo_peft import NoSuchTrainer\n```", "NoSuchTrainer"),
        ("```console\n$ dpo-peft data mine.jsonl --no_such_option 3\nrows\n```", "exit 2"),
        ("    dpo-peft data mine.jsonl\n    dpo-peft data no.jsonl\n", "no.jsonl: exit 2"),
        ("    make no-such-target\n", "no-such-target"),
        ("```yaml\nno_such_option: 3\n```", "exit 2"),
        ('```json\n{"prompt": "a", "chosen": "b" "rejected": "c"}\n```', "exit 2"),
        ("    vllm serve merged\n", "vllm isn't run"),
    ],
)
def test_a_wrong_block_fails(block: str, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative controls; with a reason nothing is run."""
    with pytest.raises((AssertionError, ImportError, CalledProcessError), match=error):
        run_page(f"# Page\n\n{block}\n", tmp_path, monkeypatch, tmp_path, {})
    (other := tmp_path / "other").mkdir()
    run_page(f"# Page\n\n<!-- not run: needs a GPU -->\n\n{block}\n", other, monkeypatch, tmp_path, {})
