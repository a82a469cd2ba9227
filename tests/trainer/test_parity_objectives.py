"""Fifteen steps of every objective that TRL has, beside TRL's own trainer for it: same model, rows, order and seed.

Deliberate differences, and how the comparison goes round them:
- ipo: ours takes sums of log-ratios (docs/derivations.md, eq. 50) unless ipo_length_normalize asks for TRL's form.
- ORPO: TRL's SFT term counts the prompt's tokens too; a prompt of one token has none that are predicted.
- KTO: TRL shifts answers within a micro-batch, ours within the optimizer batch; with one micro-batch they agree.
"""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from objective_rows import rows_for
from trainer_helpers import id_pairs, largest_difference, lora, options, ours, step_logs, text_pairs, theirs
from trl import KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

STEPS = {"max_steps": 15, "learning_rate": 3e-3}
TOLERANCE = 1e-5

# Options of ours; TRL's are the same but for what the second dict changes (None: not an option of TRL's).
DPO_RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ipo": ({"loss_type": "ipo", "ipo_length_normalize": True, "beta": 1.0}, {"ipo_length_normalize": None}),
    "hinge": ({"loss_type": "hinge"}, {}),
    "robust": ({"loss_type": "robust", "label_smoothing": 0.1}, {}),
    "exo_pair": ({"loss_type": "exo_pair", "label_smoothing": 0.05}, {}),
    "nca_pair": ({"loss_type": "nca_pair", "beta": 0.1}, {}),
    "apo_zero": ({"loss_type": "apo_zero"}, {}),
    "aot": ({"loss_type": "aot"}, {}),
    "sigmoid_norm": ({"loss_type": "sigmoid_norm", "beta": 2.0}, {}),
    "sigmoid, js divergence": ({"f_divergence_type": "js_divergence"}, {}),
    "sigmoid, ld_alpha": ({"ld_alpha": 0.3}, {}),
    "sigmoid, WPO": ({"use_weighting": True}, {}),
    "mix of two": ({"loss_type": ["sigmoid", "sft"], "loss_weights": [0.7, 0.2]}, {}),
    "mix of three": ({"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}, {}),
}


def run(trainer: Any) -> Any:
    trainer.train()
    assert len(step_logs(trainer)) == STEPS["max_steps"]
    return trainer


def assert_same_path(mine: Any, trl: Any, names: list[str], least: float = TOLERANCE) -> None:
    """Within the tolerance at every step, in a run that goes somewhere. `least`: absolute tolerance of the loss."""
    assert largest_difference(mine, trl, names) < TOLERANCE
    for a, b in zip(step_logs(mine), step_logs(trl), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=TOLERANCE, abs=least)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=TOLERANCE, abs=least)
    losses = [log["loss"] for log in step_logs(mine)]
    assert max(losses) - min(losses) > 100 * least


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", DPO_RUNS)
def test_dpo_trainer(name: str, tiny_llama: Any, make_tokenizer: Any, tmp_path: Path) -> None:
    changed, trls = DPO_RUNS[name]
    rows, tokenizer = id_pairs(24), make_tokenizer()
    mine = run(ours(tiny_llama(), rows, tokenizer, tmp_path, **STEPS, **changed))
    for_trl = {key: value for key, value in {**changed, **trls}.items() if value is not None}
    trl = run(theirs(tiny_llama(), rows, tokenizer, tmp_path, **STEPS, **for_trl))
    # Random ids weigh next to nothing in WPO, and their loss is as small.
    least = 1e-8 if "WPO" in name else TOLERANCE
    assert_same_path(mine, trl, ["loss", "rewards/chosen", "rewards/rejected"], least)


def test_the_comparison_tells_losses_apart(tiny_llama: Any, make_tokenizer: Any, tmp_path: Path) -> None:
    """Negative control: DPO's sum form of IPO is not TRL's."""
    rows, tokenizer = id_pairs(24), make_tokenizer()
    mine = run(ours(tiny_llama(), rows, tokenizer, tmp_path, **STEPS, loss_type="ipo"))
    trl = run(theirs(tiny_llama(), rows, tokenizer, tmp_path, **STEPS, loss_type="ipo"))
    assert largest_difference(mine, trl, ["loss"]) > 100 * TOLERANCE


class IdsKTOTrainer(KTOTrainer):
    """TRL's trainer for rows that are token ids already; its own rule for mismatched completions."""

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, name: str) -> Any:
        def shift(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
            return {"KL_completion_ids": [rows["completion_ids"][-1], *rows["completion_ids"][:-1]]}

        if not self.calculate_KL:
            return dataset
        return dataset.map(shift, batched=True, batch_size=args.per_device_train_batch_size)


@pytest.mark.parametrize(
    ("loss", "longest"), [("kto", None), ("kto", 12), pytest.param("apo_zero_unpaired", None, marks=pytest.mark.slow)]
)
def test_kto_trainer(loss: str, longest: int | None, tiny_llama: Any, make_tokenizer: Any, tmp_path: Path) -> None:
    """With a `max_length` that the rows keep, but not each prompt with the completion of another one."""
    rows, tokenizer = rows_for("kto", 24 if longest is None else 60), make_tokenizer()
    if longest is not None:
        fits = [len(row["prompt_ids"]) + len(row["completion_ids"]) <= longest for row in rows]
        rows = rows.select([i for i, one in enumerate(fits) if one][:24])
    changed = {**STEPS, "loss_type": loss, "train_sampling_strategy": "sequential", "beta": 0.1}
    changed |= {"desirable_weight": 1.3, "undesirable_weight": 0.8, "per_device_train_batch_size": 6}
    changed["max_length"] = longest
    mine = run(ours(tiny_llama(), rows, tokenizer, tmp_path, **changed))
    assert (step_logs(mine)[-1].get("mismatched_cut", 0) > 20) == (longest is not None)
    args = KTOConfig(**options(tmp_path, **{**changed, "loss_type": loss}))
    trl = IdsKTOTrainer(tiny_llama(), args=args, train_dataset=rows, processing_class=tokenizer, peft_config=lora())
    assert_same_path(mine, run(trl), ["loss"])
    if loss == "kto":
        assert max(log["z_ref"] for log in step_logs(mine)) > 0.01
        for a, b in zip(step_logs(mine), step_logs(trl), strict=True):
            assert max(a["z_ref"], 0.0) == pytest.approx(0.1 * b["kl"], abs=TOLERANCE)


@pytest.mark.parametrize(
    ("loss", "streamed"),
    [("kto", False), ("kto", True), pytest.param("apo_zero_unpaired", False, marks=pytest.mark.slow)],
)
def test_unpaired_rows_count_as_in_trl(
    loss: str, streamed: bool, tiny_llama: Any, make_tokenizer: Any, tmp_path: Path
) -> None:
    """12 pairs by 2: 12 steps, all chosen completions first; without the option 6, of two pairs each."""
    pairs, tokenizer = text_pairs(12), make_tokenizer()
    rows = pairs.to_iterable_dataset() if streamed else pairs
    changed = {"loss_type": loss, "train_sampling_strategy": "sequential", "learning_rate": 3e-3}
    changed |= {"per_device_train_batch_size": 2, "max_steps": 12 if streamed else -1, "num_train_epochs": 1}
    ahead = {"precompute_ref_log_probs": True, "ref_cache_dir": str(tmp_path)} if not streamed else {}
    mine = ours(tiny_llama(), rows, tokenizer, tmp_path, unpair_preferences=True, **changed, **ahead)
    mine.train()
    args = KTOConfig(**options(tmp_path, **changed))
    trl = KTOTrainer(tiny_llama(), args=args, train_dataset=pairs, processing_class=tokenizer, peft_config=lora())
    trl.train()
    assert mine.state.global_step == trl.state.global_step == 12
    assert largest_difference(mine, trl, ["loss"]) < TOLERANCE
    assert abs(step_logs(mine)[-1]["loss"] - 0.5) > 1e-3
    if not streamed:
        paired = ours(tiny_llama(), pairs, tokenizer, tmp_path, **changed)
        paired.train()
        assert paired.state.global_step == 6 and step_logs(paired)[0]["rewards/rejected"] == 0.0


def ids_row(self: Any, row: dict[str, Any], model: Any = None) -> dict[str, list[int]]:
    """What TRL's experimental trainers make of a row, from its ids."""
    found = {"prompt_input_ids": row["prompt_ids"], "prompt_attention_mask": [1] * len(row["prompt_ids"])}
    for side in ("chosen", "rejected"):
        ids = row["prompt_ids"] + row[f"{side}_ids"]
        found[f"{side}_input_ids"] = ids
        found[f"{side}_attention_mask"] = [1] * len(ids)
        found[f"{side}_labels"] = [-100] * len(row["prompt_ids"]) + row[f"{side}_ids"]
    return found


class IdsCPOTrainer(CPOTrainer):
    tokenize_row = ids_row


class IdsORPOTrainer(ORPOTrainer):
    tokenize_row = ids_row


def with_text(rows: Dataset) -> Dataset:
    """TRL's preparation wants text columns, though nothing reads them here."""
    return rows.map(lambda row: {"prompt": "p", "chosen": "c", "rejected": "r"})


# Ours, and TRL's CPO config.
CPO_RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "cpo": ({"loss_type": "cpo", "cpo_alpha": 0.7}, {"loss_type": "sigmoid", "cpo_alpha": 0.7, "beta": 0.1}),
    "cpo, smoothed": (
        {"loss_type": "cpo", "label_smoothing": 0.1, "beta": 0.3},
        {"loss_type": "sigmoid", "label_smoothing": 0.1, "beta": 0.3},
    ),
    "simpo": (
        {"loss_type": "simpo", "simpo_gamma": 0.5},
        {"loss_type": "simpo", "simpo_gamma": 0.5, "beta": 2.0, "cpo_alpha": 0.0},
    ),
    "cpo-simpo": (
        {"loss_type": ["simpo", "sft"], "beta": 2.0, "loss_weights": [1.0, 0.5]},
        {"loss_type": "simpo", "simpo_gamma": 1.0, "beta": 2.0, "cpo_alpha": 0.5},
    ),
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", CPO_RUNS)
def test_cpo_trainer(name: str, tiny_llama: Any, make_tokenizer: Any, tmp_path: Path) -> None:
    mine_changed, trl_changed = CPO_RUNS[name]
    rows, tokenizer = id_pairs(24), make_tokenizer()
    mine = run(ours(tiny_llama(), rows, tokenizer, tmp_path, **STEPS, **mine_changed))
    args = CPOConfig(**options(tmp_path, **STEPS, **trl_changed))
    trl = IdsCPOTrainer(
        tiny_llama(), args=args, train_dataset=with_text(rows), processing_class=tokenizer, peft_config=lora()
    )
    assert_same_path(mine, run(trl), ["loss", "rewards/chosen", "rewards/rejected"])


def test_orpo_trainer(tiny_llama: Any, make_tokenizer: Any, tmp_path: Path) -> None:
    rows, tokenizer = id_pairs(24).map(lambda row: {"prompt_ids": row["prompt_ids"][:1]}), make_tokenizer()
    mine = run(ours(tiny_llama(), rows, tokenizer, tmp_path, **STEPS, loss_type="orpo", beta=0.5))
    args = ORPOConfig(**options(tmp_path, **STEPS, beta=0.5))
    trl = IdsORPOTrainer(
        tiny_llama(), args=args, train_dataset=with_text(rows), processing_class=tokenizer, peft_config=lora()
    )
    assert_same_path(mine, run(trl), ["loss", "rewards/chosen", "rewards/rejected"])
