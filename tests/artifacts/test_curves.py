"""The outputs of a run that people look at: the curves and the model card, checked against figures given by hand."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from peft import LoraConfig, get_peft_model
from PIL import Image

from dpo_peft.artifacts.card import RunSummary, figures_of, is_hub_id, model_card, save_model_card
from dpo_peft.artifacts.curves import BLUE, GRAY, ORANGE, plot_training_curves
from dpo_peft.errors import OptionError

NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
}


def entry(step: int, margin: float, prefix: str = "") -> dict[str, float]:
    metrics = {
        "loss": math.log1p(math.exp(-margin)),
        "rewards/chosen": margin / 3,
        "rewards/rejected": -2 * margin / 3,
        "rewards/margins": margin,
        "rewards/accuracies": 0.5 + margin / 8,
        "accuracies/length_only": 0.55,
        "logps/chosen": -50 + margin,
        "logps/rejected": -51 - margin,
        "sample_weight": 1 / (1 + math.exp(margin)),
        "kl": margin / 2,
    }
    return {"step": step, "epoch": step / 40, **{prefix + key: value for key, value in metrics.items()}}


def history() -> list[dict[str, float]]:
    train = [entry(step, step / 10) for step in range(1, 41)]
    return [
        *train[:20],
        entry(20, 1.25, "eval_"),
        *train[20:],
        entry(40, 3.5, "eval_"),
        {"step": 40, "train_loss": 0.3},
    ]


def run(**changes: Any) -> RunSummary:
    options: dict[str, Any] = {"name": "someone/tiny-dpo", "base_model": "someone/tiny", "beta": 0.1, "versions": {}}
    return RunSummary(**{**options, **figures_of(history()), **changes})


def pixels(path: Path, color: str) -> int:
    """How many pixels of the picture have this color, within what antialiasing leaves of thin lines."""
    wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
    picture = np.asarray(Image.open(path).convert("RGB"), dtype=int)
    return int((np.abs(picture - wanted).max(axis=-1) < 24).sum())


# Curves


def test_curves_show_every_panel(tmp_path: Path) -> None:
    path = plot_training_curves(history(), tmp_path / "made" / "curves.png")
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        width, height = picture.size
    assert 1500 < width < 2200 and 700 < height < 1200  # three by two panels
    assert min(pixels(path, color) for color in (BLUE, ORANGE, GRAY)) > 200


def test_a_panel_without_data_is_left_out(tmp_path: Path) -> None:
    full = Image.open(plot_training_curves(history(), tmp_path / "full.png")).size
    keys = ("step", "loss", "rewards/accuracies")
    few = [{key: value for key, value in row.items() if key in keys} for row in history()]
    path = plot_training_curves(few, tmp_path / "few.png")
    width, height = Image.open(path).size
    assert abs(width - full[0] * 2 / 3) < 3 and height < full[1] * 0.6  # two panels in one row, no key below
    assert pixels(path, ORANGE) == 0 < pixels(path, BLUE)  # nothing of the rejected ones


def test_evaluation_is_drawn_over_training(tmp_path: Path) -> None:
    train_only = [row for row in history() if "loss" in row]
    with_eval = Image.open(plot_training_curves(history(), tmp_path / "a.png")).size
    without = Image.open(plot_training_curves(train_only, tmp_path / "b.png")).size
    assert with_eval[1] > without[1]  # the key that says what rings are
    only_eval = plot_training_curves([entry(20, 1.0, "eval_")], tmp_path / "c.png")
    assert pixels(only_eval, ORANGE) > 20


def test_a_value_that_is_not_finite_leaves_the_rest_of_the_curve(tmp_path: Path) -> None:
    broken = [{"step": 1, "loss": 0.7}, {"step": 2, "loss": math.nan}, {"step": 3, "loss": math.inf}]
    broken += [{"step": 4, "loss": 0.6}]
    whole = [row for row in broken if math.isfinite(row["loss"])]
    a, b = (plot_training_curves(rows, tmp_path / f"{i}.png") for i, rows in enumerate((broken, whole)))
    assert a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize(
    "log_history",
    [[], [{"step": 1, "learning_rate": 1e-4}], [{"loss": 0.5}], [{"step": 1, "loss": math.nan}]],
    ids=["empty", "no metric", "no step", "not finite"],
)
def test_nothing_to_plot_is_an_error(log_history: list[dict[str, float]], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="nothing to plot.*logging_steps"):
        plot_training_curves(log_history, tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_a_lone_baseline_is_no_panel(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="nothing to plot"):
        plot_training_curves([{"step": 1, "accuracies/length_only": 0.5}], tmp_path / "x.png")


# Card


def parse(readme: str) -> tuple[dict[str, Any], str]:
    """(metadata, text) of a card, by the rule of the Hub: YAML between the first two `---` lines."""
    _, head, body = re.split(r"^---$", readme, maxsplit=2, flags=re.MULTILINE)
    return yaml.safe_load(head), body


def table(body: str, first_cell: str) -> list[list[str]]:
    """The rows of the Markdown table whose head begins with this cell, heads included, rule left out."""
    rows: list[list[str]] = []
    for line in body[body.index(f"| {first_cell} |") :].splitlines():
        if not line.startswith("|"):
            break
        rows.append([part.strip() for part in line.strip("|").split("|")])
    return [rows[0], *rows[2:]]


def test_metadata_is_what_the_hub_expects(tmp_path: Path) -> None:
    summary = run(
        datasets=["someone/pairs", str(tmp_path / "own.jsonl")],
        eval_dataset="someone/pairs",
        license="Apache-2.0",
        languages=["en", "zh"],
        quantization=NF4,
    )
    head, _ = parse(save_model_card(summary, tmp_path).read_text("utf-8"))
    assert head["base_model"] == "someone/tiny" and head["base_model_relation"] == "adapter"
    assert (head["library_name"], head["pipeline_tag"]) == ("peft", "text-generation")
    assert head["datasets"] == ["someone/pairs"]  # a local file is no dataset of the Hub
    assert (head["license"], head["language"]) == ("apache-2.0", ["en", "zh"])
    assert {"dpo", "lora", "dpo-peft", "qlora", "4-bit"} <= set(head["tags"])
    (index,) = head["model-index"]
    assert index["name"] == "tiny-dpo"
    (result,) = index["results"]
    assert result["dataset"] == {"name": "someone/pairs", "type": "someone/pairs"}
    figures = {metric["name"]: (metric["type"], metric["value"]) for metric in result["metrics"]}
    assert figures == {
        "Preference accuracy": ("accuracy", 0.9375),
        "Accuracy of picking the longer completion, for comparison": ("accuracy", 0.55),
        "Reward margin, nats": ("reward_margin", 3.5),
        "KL to the reference, nats per completion": ("kl_divergence", 1.75),
        "Loss": ("loss", math.log1p(math.exp(-3.5))),
    }


def test_unknown_facts_are_left_out() -> None:
    head, body = parse(str(model_card(RunSummary(name="x", base_model="someone/tiny", beta=0.1, versions={}))))
    assert {"license", "datasets", "language", "model-index"}.isdisjoint(head)
    assert "4-bit" not in head["tags"]
    assert "No figures were logged" in body and "![" not in body and "###" not in body
    assert "not quantized" in body


def test_a_license_of_ones_own_is_other_with_its_name() -> None:
    head, _ = parse(str(model_card(run(license="My House Licence v2"))))
    assert (head["license"], head["license_name"]) == ("other", "my-house-licence-v2")


def test_figures_are_the_runs() -> None:
    _, body = parse(str(model_card(run())))
    rows = table(body, "metric")
    assert rows[0] == ["metric", "first step", "last step", "evaluation, first", "evaluation, last"]
    figures = {row[0].strip("`"): [float(value) for value in row[1:]] for row in rows[1:]}
    assert figures["rewards/margins"] == [0.1, 4.0, 1.25, 3.5]
    assert figures["rewards/accuracies"] == [0.5125, 1.0, 0.6562, 0.9375]
    # By hand: ln(1 + e^-0.1), ln(1 + e^-4), ln(1 + e^-1.25), ln(1 + e^-3.5).
    assert figures["loss"] == [0.6444, 0.01815, 0.2519, 0.02975]
    assert {"step", "epoch", "train_loss"}.isdisjoint(figures)
    assert set(figures) == set(entry(1, 1.0)) - {"step", "epoch"}


def test_one_evaluation_makes_one_column() -> None:
    log = [row for row in history() if row["step"] < 40]
    _, body = parse(str(model_card(run(**figures_of(log)))))
    assert table(body, "metric")[0] == ["metric", "first step", "last step", "evaluation, last"]


def test_several_evaluation_sets_are_kept_apart() -> None:
    log = [
        {"step": 5, "eval_a_loss": 0.6},
        {"step": 5, "eval_b_loss": 0.5},
        {"step": 9, "eval_a_loss": 0.3},
        {"step": 9, "eval_b_loss": 0.2},
    ]
    figures = figures_of(log)
    assert figures["eval_first"] == {"a_loss": 0.6, "b_loss": 0.5}
    assert figures["eval_last"] == {"a_loss": 0.3, "b_loss": 0.2}


def test_options_stand_in_their_tables() -> None:
    hyperparameters = {"learning_rate": 5e-6, "beta": 0.1, "note": "a|b\nc"}
    _, body = parse(
        str(model_card(run(lora={"r": 16, "target_modules": {"v", "q"}}, hyperparameters=hyperparameters)))
    )
    assert "| r | 16 |" in body and "| target_modules | q, v |" in body
    assert "| learning_rate | 5e-06 |" in body and "| note | a\\|b c |" in body


def test_a_local_base_does_not_leak_its_path(tmp_path: Path) -> None:
    base = tmp_path / "secret-user" / "my-base"
    base.mkdir(parents=True)
    summary = run(
        name=str(tmp_path / "secret-user" / "out"),
        base_model=str(base),
        datasets=[str(tmp_path / "secret-user" / "pairs.jsonl")],
        eval_dataset=str(tmp_path / "secret-user" / "held.jsonl"),
        hyperparameters={"output_dir": str(base)},
    )
    readme = str(model_card(summary))
    head, body = parse(readme)
    assert {"base_model", "base_model_relation", "datasets"}.isdisjoint(head)
    assert "secret-user" not in readme
    assert "`my-base`" in body and "`pairs.jsonl`" in body and body.startswith("\n\n# out")


@pytest.mark.parametrize("name", ["/abs/model", "a/b/c", "./model", "~/model", "C:\\models\\x", "..", "a b"])
def test_a_path_is_no_hub_id(name: str) -> None:
    assert not is_hub_id(name)


def test_a_folder_that_exists_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("outputs/model")
    (tmp_path / "outputs" / "model").mkdir(parents=True)
    assert not is_hub_id("outputs/model")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_model": ""}, "base_model is empty"),
        ({"name": ""}, "name is empty"),
        ({"last": {"loss": "0.5"}}, "'loss' .last step. is '0.5'"),
        ({"eval_last": {"rewards/accuracies": None}}, "'rewards/accuracies' .evaluation, last. is None"),
    ],
)
def test_a_card_that_can_not_be_written_is_an_error(change: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        model_card(run(**change))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("quantization", [{}, NF4], ids=["plain", "nf4"])
@pytest.mark.parametrize("chat", [True, False], ids=["chat", "text"])
def test_the_loading_example_runs(
    quantization: dict[str, Any],
    chat: bool,
    tmp_path: Path,
    tiny_llama: Any,
    make_tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    adapted = get_peft_model(tiny_llama(), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "out")
    make_tokenizer(chat_template=None if not chat else "{{ messages[0]['content'] }}").save_pretrained(
        tmp_path / "out"
    )
    readme = str(model_card(run(name=str(tmp_path / "out"), quantization=quantization, has_chat_template=chat)))
    (example,) = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path / "out")
    names: dict[str, Any] = {}
    exec(example, names)
    assert names["output"].shape[1] > names["inputs"]["input_ids"].shape[1]
    kind = type(names["model"].base_model.model.model.layers[0].self_attn.q_proj.base_layer).__name__
    assert kind == ("Linear4bit" if quantization else "Linear")
