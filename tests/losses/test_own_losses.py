"""A loss from outside the package, by its import path: options, errors, training, resuming, card."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from objective_rows import rows_for
from trainer_helpers import adapter_weights, id_pairs, ours, step_logs
from transformers import HfArgumentParser

from dpo_peft import DPOConfig, OptionError
from dpo_peft.losses import REGISTRY, find_objective
from dpo_peft.objective import TrainingObjective

LOSSES = '''
import torch
import torch.nn.functional as F

from dpo_peft.losses import objective


def like_dpo(chosen_scores_B, rejected_scores_B, margin_B=0.0, *, beta=0.1, scale=1.0):
    """Source: Nobody et al. 2031, A Paper without an Entry, arXiv:2999.00001, eq. 1."""
    return -F.logsigmoid(scale * (beta * (chosen_scores_B - rejected_scores_B) - margin_B))


def mean_gap(chosen_logps_B, rejected_logps_B, chosen_lengths_B, rejected_lengths_B, *, beta=2.0):
    return -F.logsigmoid(beta * (chosen_logps_B / chosen_lengths_B - rejected_logps_B / rejected_lengths_B) - 1.0)


@objective(data="singles")
def judged(scores_C, grades_C, *, beta=0.1):
    return torch.where(grades_C > 0.5, torch.sigmoid(-beta * scores_C), torch.sigmoid(beta * scores_C))


@objective(data="singles")
def likelihood(logps_C, lengths_C, grades_C):
    return torch.where(grades_C > 0.5, -logps_C / lengths_C, 0.0)


@objective(data="lists", shaping=("reward_clip",))
def first_of_list(scores_C, grades_C, sample_of_C, num_samples, *, beta=0.1):
    return scores_C.new_zeros(num_samples).index_add(0, sample_of_C, -beta * scores_C * (grades_C > 0))


def unknown(chosen_scores_B, rejected_score_B):
    return chosen_scores_B - rejected_score_B


NUMBER = 3
'''


@pytest.fixture
def path(tmp_path: Path) -> str:
    file = tmp_path / "my_losses.py"
    file.write_text(LOSSES)
    return str(file)


def trained(model: Any, rows: Any, tokenizer: Any, folder: Path, **changed: Any) -> Any:
    options = {"max_steps": 5, "per_device_train_batch_size": 4, "learning_rate": 1e-3, **changed}
    trainer = ours(model, rows, tokenizer, folder, **options)
    trainer.train()
    return trainer


def config(loss_type: Any, **options: Any) -> DPOConfig:
    return DPOConfig(output_dir="out", use_cpu=True, report_to="none", loss_type=loss_type, **options)


def test_what_is_read_off_a_function(path: str) -> None:
    own, mean, singles = (find_objective(f"{path}:{name}") for name in ("like_dpo", "mean_gap", "judged"))
    assert own.inputs == REGISTRY["sigmoid"].inputs and own.keywords == ("beta", "scale")
    assert (own.needs_reference, own.reward, own.default_beta) == (True, "log_ratio", 0.1)
    assert own.paper == "Nobody et al. 2031, A Paper without an Entry, arXiv:2999.00001" and own.equation == "eq. 1"
    assert (mean.needs_reference, mean.reward, mean.default_beta) == (False, "mean_logp", 2.0)
    assert singles.data == "singles" and singles.needs_reference and not singles.soft_labels


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "unknown",
            {},
            r"unknown: the parameter 'rejected_score_B' is no input .* of pairs.*rejected_scores_B",
        ),
        ("missing", {}, r"loss_type=.*missing': there is no such name"),
        ("NUMBER", {}, r"it is a int, not a function"),
        ("like_dpo", {"loss_options": {"scael": 2.0}}, r"loss_options\['scael'\] has no effect.*options are scale"),
        ("like_dpo", {"loss_options": 3}, r"loss_options=3 must be a dict, or JSON"),
        ("like_dpo", {"label_smoothing": 0.1}, r"label_smoothing=0.1 has no effect on loss_type"),
        ("judged", {"reward_clip": 1.0}, r"reward_clip=1.0 has no effect on loss_type"),
        ("likelihood", {"reference": "base"}, r"reference: no effect, loss_type .* has no reference"),
    ],
)
def test_what_is_refused(name: str, options: dict[str, Any], message: str, path: str) -> None:
    with pytest.raises(OptionError, match=message):
        config(f"{path}:{name}", **options)


def test_other_places(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match=r"can't be imported: OptionError: there is no such file"):
        config(f"{tmp_path}/none.py:f")
    with pytest.raises(OptionError, match=r"loss_options\['scale'\] has no effect on loss_type=\['sigmoid'\]: leave"):
        config("sigmoid", loss_options={"scale": 2.0})
    with pytest.raises(OptionError, match=r"can't be mixed: 'sigmoid' learns from pairs but .* singles"):
        config(["sigmoid", f"{path}:judged"])
    monkeypatch.syspath_prepend(str(tmp_path))
    assert config("my_losses:like_dpo").beta == 0.1
    (parsed,) = HfArgumentParser(DPOConfig).parse_args_into_dataclasses(
        ["--output_dir", "out", "--use_cpu", "--loss_type", f"{path}:like_dpo", "--loss_options", '{"scale": 2.0}']
    )
    assert parsed.loss_options == {"scale": 2.0}


def test_a_changed_file_is_read_anew(path: str) -> None:
    assert config(f"{path}:like_dpo").beta == 0.1
    Path(path).write_text(LOSSES.replace("beta=0.1, scale", "beta=0.7, scale"))
    assert config(f"{path}:like_dpo").beta == 0.7


def test_it_trains_as_the_built_in_loss(path: str, tiny_llama: Any, make_tokenizer: Any, tmp_path: Path) -> None:
    """Every figure and weight is that of `sigmoid`; with `scale` of 2, that of twice the beta. Also in a mix."""
    rows, tokenizer = id_pairs(12), make_tokenizer()
    for mix, own, built_in in (
        ([], {}, {}),
        ([], {"loss_options": {"scale": 2.0}, "reward_clip": 3.0}, {"beta": 0.2, "reward_clip": 6.0}),
        (["sft"], {}, {}),
    ):
        mine = trained(tiny_llama(), rows, tokenizer, tmp_path, loss_type=[f"{path}:like_dpo", *mix], **own)
        theirs = trained(tiny_llama(), rows, tokenizer, tmp_path, loss_type=["sigmoid", *mix], **built_in)
        for name in ("loss", "grad_norm", "rewards/accuracies"):
            assert [log[name] for log in step_logs(mine)] == [log[name] for log in step_logs(theirs)], name
        for name, weight in adapter_weights(theirs).items():
            assert torch.equal(weight, adapter_weights(mine)[name]), name


@pytest.mark.parametrize(
    ("name", "like"), [("judged", "kto"), ("likelihood", "kto"), ("first_of_list", "plackett_luce")]
)
def test_other_kinds_of_data(
    name: str, like: str, path: str, tiny_llama: Any, make_tokenizer: Any, tmp_path: Path
) -> None:
    """`judged` is `apo_zero_unpaired`; a loss that reads no score trains without a reference."""
    rows, tokenizer = rows_for(like, 8), make_tokenizer()
    options = {"max_steps": 3, "per_device_train_batch_size": 8}
    run = trained(tiny_llama(), rows, tokenizer, tmp_path, loss_type=f"{path}:{name}", **options)
    assert run.objective.needs_reference == (name != "likelihood")
    if name == "judged":
        apo = trained(tiny_llama(), rows, tokenizer, tmp_path, loss_type="apo_zero_unpaired", **options)
        assert [log["loss"] for log in step_logs(apo)] == [log["loss"] for log in step_logs(run)]
    else:
        assert step_logs(run)[-1]["loss"] < step_logs(run)[0]["loss"]  # of the same rows: each batch is all of them


def test_what_it_leaves_behind(
    path: str, tiny_llama: Any, make_tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A card without the unknown paper's entry, records without the file's folder; resumed, it is the straight run."""
    rows, tokenizer = id_pairs(12), make_tokenizer()
    options = {"loss_type": f"{path}:like_dpo", "loss_options": {"scale": 1.5}, "max_steps": 4}
    options |= {"save_strategy": "steps", "save_steps": 2}
    straight = trained(tiny_llama(), rows, tokenizer, tmp_path / "run", **options)
    caplog.set_level("INFO", logger="dpo_peft")
    straight.save_model()
    assert "arXiv:2999.00001 is not cited" in caplog.text
    card = (tmp_path / "run" / "README.md").read_text()
    assert "`my_losses.py:like_dpo` (Nobody et al. 2031" in card and "rafailov2023direct" in card
    assert "loss_options" in (tmp_path / "run" / "recipe.yaml").read_text()
    for file in ("README.md", "adapter_config.json", "recipe.yaml"):
        assert path not in (tmp_path / "run" / file).read_text(), file
    record = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert "my_losses.py:like_dpo" in json.dumps(record)
    again = ours(tiny_llama(), rows, tokenizer, tmp_path / "run", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for name, weight in adapter_weights(straight).items():
        assert torch.equal(weight, adapter_weights(again)[name]), name


def test_options_reach_the_function(path: str) -> None:
    """Those of `loss_options`, and the run's beta; an option of the config with the same name is another one."""
    objective = TrainingObjective([f"{path}:like_dpo"], None, {"scale": 3.0}, beta=0.5, scale=7.0)
    assert objective.names == ["my_losses.py:like_dpo"] and objective.data == "pairs"
    assert objective.loss_options == {"scale": 3.0, "beta": 0.5}
