"""Options and data that don't fit an objective are refused when the config or the trainer is made."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from objective_rows import NEEDED, rows_for
from trainer_helpers import id_pairs, ours
from transformers import HfArgumentParser

from dpo_peft import DataError, DPOConfig, OptionError
from dpo_peft.config import OBJECTIVE_OPTIONS
from dpo_peft.config_checks import resolve_beta
from dpo_peft.losses import REGISTRY

# A value away from the default for every option, and what else it needs to have an effect.
CHANGED: dict[str, dict[str, Any]] = {
    "label_smoothing": {"label_smoothing": 0.2},
    "reward_clip": {"reward_clip": 3.0},
    "f_divergence_type": {"f_divergence_type": "js_divergence"},
    "f_alpha_divergence_coef": {"f_alpha_divergence_coef": 0.7, "f_divergence_type": "alpha_divergence"},
    "ld_alpha": {"ld_alpha": 0.5},
    "use_weighting": {"use_weighting": True},
    "discopop_tau": {"discopop_tau": 0.1},
    "ipo_length_normalize": {"ipo_length_normalize": True},
    "simpo_gamma": {"simpo_gamma": 0.3},
    "alphapo_alpha": {"alphapo_alpha": 0.5},
    "cpo_alpha": {"cpo_alpha": 0.5},
    "desirable_weight": {"desirable_weight": 2.0},
    "undesirable_weight": {"undesirable_weight": 2.0},
    "discount_gamma": {"discount_gamma": 0.9},
    "discount_unit": {"discount_unit": "token", "discount_gamma": 0.9},
}


def config(**options: Any) -> DPOConfig:
    return DPOConfig(output_dir="out", use_cpu=True, report_to="none", **options)


def test_every_option_is_covered() -> None:
    assert CHANGED.keys() == OBJECTIVE_OPTIONS.keys()
    read = {option for entry in REGISTRY.values() for option in entry.options} - {"beta"}
    assert read == OBJECTIVE_OPTIONS.keys(), "every option has a reader, and every option of a loss is in the config"


@pytest.mark.parametrize("option", OBJECTIVE_OPTIONS)
@pytest.mark.parametrize("loss", REGISTRY)
def test_an_option_is_read_or_refused(loss: str, option: str) -> None:
    """The whole table: 15 options by every loss."""
    given = {"loss_type": loss, **({"label_smoothing": 0.1} if loss == "exo_pair" else {}), **CHANGED[option]}
    readers = [name for name, entry in REGISTRY.items() if option in entry.options]
    if loss in readers:
        assert getattr(config(**given), option) == CHANGED[option][option]
        return
    with pytest.raises(OptionError, match=r"has no effect on loss_type=.*leave it out, or use one of") as caught:
        config(**given)
    assert f"'{loss}'" in str(caught.value)


@pytest.mark.parametrize("loss", REGISTRY)
def test_beta_is_the_objectives_own_by_default(loss: str) -> None:
    needed = {name: value for name, value in NEEDED.get(loss, {}).items() if name != "beta"}
    assert config(loss_type=loss, **needed).beta == REGISTRY[loss].default_beta
    if REGISTRY[loss].default_beta is None:
        with pytest.raises(OptionError, match=r"beta has no effect on loss_type=\['sft'\]: leave it out"):
            config(loss_type=loss, beta=0.1)
    else:
        assert config(loss_type=loss, beta=0.3, **needed).beta == 0.3


def test_a_mix_needs_a_beta_where_its_losses_differ() -> None:
    assert resolve_beta(["sigmoid", "sft"], None) == 0.1
    with pytest.raises(OptionError, match=r"beta must be given for loss_type=\['sigmoid', 'simpo'\].*0\.1.*2\.0"):
        config(loss_type=["sigmoid", "simpo"])
    assert config(loss_type=["sigmoid", "simpo"], beta=1.0).beta == 1.0


# Options, then what the message must say.
MALFORMED: dict[str, tuple[dict[str, Any], str]] = {
    "no loss": ({"loss_type": []}, r"loss_type=\[\] is not available"),
    "twice": ({"loss_type": ["sigmoid", "sigmoid"]}, r"names a loss twice: give it once"),
    "pairs and lists": (
        {"loss_type": ["sigmoid", "multi_negative"]},
        r"can't be mixed: 'sigmoid' learns from pairs but 'multi_negative' learns from lists",
    ),
    "pairs and singles": ({"loss_type": ["sft", "kto"]}, r"'sft' learns from pairs but 'kto' learns from singles"),
    "one weight too few": (
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]},
        r"loss_weights=\[1\.0\] must be a list with one number per loss",
    ),
    "weight zero": (
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0]},
        r"positive numbers: leave out a loss",
    ),
    "weight as text": ({"loss_weights": ["a"]}, r"loss_weights=\['a'\] must be positive numbers"),
    "smoothing of a half": ({"label_smoothing": 0.5}, r"label_smoothing=0\.5 must be .* at least 0 and below 0\.5"),
    "exo without smoothing": ({"loss_type": "exo_pair"}, r"'exo_pair' needs label_smoothing above 0"),
    "divergence": ({"f_divergence_type": "kl"}, r"f_divergence_type='kl' must be one of 'reverse_kl'"),
    "alpha of nothing": ({"f_alpha_divergence_coef": 0.7}, r"no effect without f_divergence_type='alpha_divergence'"),
    "ld_alpha above one": ({"ld_alpha": 1.5}, r"ld_alpha=1\.5 must be a number at least 0 and at most 1"),
    "weighting as text": ({"use_weighting": "yes"}, r"use_weighting='yes' must be True or False"),
    "gamma above one": (
        {"loss_type": "trajectory", "discount_gamma": 1.1},
        r"discount_gamma=1\.1 must be a number above 0 and at most 1",
    ),
    "unit without discount": (
        {"loss_type": "trajectory", "discount_unit": "token"},
        r"discount_unit has no effect while discount_gamma is 1",
    ),
    "unit": (
        {"loss_type": "trajectory", "discount_unit": "word", "discount_gamma": 0.9},
        r"discount_unit='word' must be one of 'turn', 'token'",
    ),
    "one row to compare": (
        {"loss_type": "kto", "per_device_train_batch_size": 1},
        r"loss_type kto compares the samples of a batch.*at least 2",
    ),
    "evaluated row by row": (
        {"loss_type": "kto", "per_device_eval_batch_size": 1},
        r"per_device_eval_batch_size=1: loss_type kto takes its reference point .* at least 2",
    ),
    "a mix evaluated row by row": (
        {"loss_type": ["apo_zero_unpaired", "kto"], "per_device_eval_batch_size": 1, "eval_strategy": "steps"},
        r"per_device_eval_batch_size=1: loss_type apo_zero_unpaired, kto takes",
    ),
    "other dropout masks": (
        {"loss_type": "aot", "disable_dropout": False, "gradient_accumulation_steps": 2},
        r"disable_dropout=False with loss_type aot needs gradient_accumulation_steps=1",
    ),
    "unpaired pairs": ({"unpair_preferences": True}, r"unpair_preferences has no effect on loss_type sigmoid"),
    "desirable weight zero": ({"loss_type": "kto", "desirable_weight": 0}, r"desirable_weight=0 must be .* above 0"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_option(name: str) -> None:
    options, message = MALFORMED[name]
    with pytest.raises(OptionError, match=message) as caught:
        config(**options)
    assert len(str(caught.value)) < 500


# As TRL's other configs are made, with the class changed: what the message must name.
OF_TRL: dict[str, tuple[dict[str, Any], str]] = {
    "cpo": (
        {"loss_type": "sigmoid", "cpo_alpha": 1.0},
        r"'sigmoid', 'hinge' and 'ipo' are loss_type='cpo',",
    ),
    "cpo without a loss": ({"cpo_alpha": 1.0}, r"'sigmoid', 'hinge' and 'ipo' are loss_type='cpo',"),
    "cpo's hinge": ({"loss_type": "hinge", "cpo_alpha": 1.0, "max_length": 512}, r"'cpo', 'cpo_hinge' and 'cpo_ipo'"),
    "cpo's ipo": ({"loss_type": ["ipo"], "simpo_gamma": 1.0}, r"'cpo', 'cpo_hinge' and 'cpo_ipo'"),
    "cpo's simpo": ({"loss_type": "simpo", "cpo_alpha": 1.0, "simpo_gamma": 0.5}, r"\['simpo', 'sft'\]"),
    "cpo, another value": (
        {"loss_type": "sigmoid", "cpo_alpha": 0.3},
        r"'sigmoid', 'hinge' and 'ipo' are loss_type='cpo',",
    ),
    "kto": ({"desirable_weight": 1.0, "undesirable_weight": 1.0}, r"set loss_type='kto'"),
    "kto, another value": ({"undesirable_weight": 2.0}, r"set loss_type='kto'"),
}


@pytest.mark.parametrize("name", OF_TRL)
def test_a_config_of_another_trainer_of_trl(name: str) -> None:
    given, message = OF_TRL[name]
    with pytest.raises(OptionError, match=rf"has no effect on loss_type=.*leave it out, or use one of .*{message}"):
        config(**given)


def test_options_of_other_trainers_where_they_are_read_or_not_given_by_hand() -> None:
    assert config(loss_type=["simpo", "sft"], loss_weights=[1.0, 1.0], simpo_gamma=1.0).simpo_gamma == 1.0
    for name in ("cpo", "cpo_hinge", "cpo_ipo"):
        assert config(loss_type=[name], cpo_alpha=1.0).cpo_alpha == 1.0
    assert config(loss_type="kto", desirable_weight=1.0, undesirable_weight=1.0).desirable_weight == 1.0
    (parsed,) = HfArgumentParser(DPOConfig).parse_args_into_dataclasses(["--output_dir", "out", "--use_cpu"])
    assert parsed.loss_type == ["sigmoid"] and parsed.cpo_alpha == 1.0
    assert dataclasses.replace(config(), beta=0.3).beta == 0.3


def labeled_pairs(**columns: float) -> Dataset:
    rows = id_pairs(8)
    for name, value in columns.items():
        rows = rows.add_column(name, [value] * len(rows))
    return rows


# Each: loss, rows, what the message must say.
WRONG_DATA: dict[str, tuple[str, Dataset, str]] = {
    "lists for pairs": ("sigmoid", rows_for("multi_negative", 8), r"multi_negative.*plackett_luce"),
    "single answers for pairs": ("simpo", rows_for("kto", 8), r"kto.*apo_zero_unpaired"),
    "single answers for lists": ("multi_negative", rows_for("kto", 8), r"kto.*apo_zero_unpaired"),
    "single answers for trajectories": ("trajectory", rows_for("kto", 8), r"kto.*apo_zero_unpaired"),
    "soft labels for a sort": ("aot", labeled_pairs(preference=0.7), r"preference.*remove"),
    "soft labels for ORPO": ("orpo", labeled_pairs(preference=0.7), r"preference.*remove"),
    "margin for APO": ("apo_zero", labeled_pairs(margin=0.7), r"margin.*remove"),
    "margin for lists": ("multi_negative", labeled_pairs(margin=0.7), r"margin.*remove"),
}


@pytest.mark.parametrize("name", WRONG_DATA)
def test_data_that_a_loss_cannot_learn_from(name: str, tiny_llama: Any, make_tokenizer: Any, tmp_path: Path) -> None:
    loss, rows, message = WRONG_DATA[name]
    with pytest.raises(DataError, match=message):
        ours(tiny_llama(), rows, make_tokenizer(), tmp_path, loss_type=loss)
