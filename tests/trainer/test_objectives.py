"""Objectives in training: what each computes, what it leaves out, and the labels that rows may carry."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from objective_rows import rows_for
from trainer_helpers import adapter_weights, id_pairs, largest_difference, ours, step_logs
from transformers import GPT2Config, GPT2LMHeadModel

from dpo_peft.forward import Sample, Scores, pack, sum_by_completion
from dpo_peft.losses import REGISTRY
from dpo_peft.objective import Scored, Totals, TrainingObjective

REFERENCE_FREE: list[dict[str, Any]] = [
    {"loss_type": "sft"},
    {"loss_type": "simpo"},
    {"loss_type": "orpo"},
    {"loss_type": "cpo"},
    {"loss_type": ["simpo", "sft"]},
]


def trained(model: Any, rows: Any, tokenizer: Any, folder: Path, **changed: Any) -> Any:
    trainer = ours(model, rows, tokenizer, folder, **{"max_steps": 5, **changed})
    trainer.train()
    return trainer


def forward_tokens(model: Any) -> list[int]:
    """Tokens of each forward pass from now on."""
    seen: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].numel()))
    return seen


# ---- What is computed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", REFERENCE_FREE, ids=str)
def test_no_reference_pass_where_none_is_needed(
    options: dict[str, Any], tiny_llama: Any, make_tokenizer: Any, tmp_path: Path
) -> None:
    """One forward per batch in training and evaluation, none for the reference, and no KL in the log."""
    model, rows = tiny_llama(), id_pairs(12)
    trainer = ours(model, rows, make_tokenizer(), tmp_path, max_steps=3, eval_dataset=rows, **options)
    seen = forward_tokens(model)
    trainer.train()
    assert len(seen) == 3
    trainer.evaluate()
    assert len(seen) == 3 + 3
    assert "kl" not in step_logs(trainer)[0]


@pytest.mark.parametrize("options", [{}, {"loss_type": ["sigmoid", "sft"]}], ids=str)
def test_with_a_reference_there_are_two_passes(
    options: dict[str, Any], tiny_llama: Any, make_tokenizer: Any, tmp_path: Path
) -> None:
    model = tiny_llama()
    trainer = ours(model, id_pairs(12), make_tokenizer(), tmp_path, max_steps=3, **options)
    trainer.reference.start_checked = True
    seen = forward_tokens(model)
    trainer.train()
    assert len(seen) == 6 and "kl" in step_logs(trainer)[0]


def test_a_list_is_one_prompt_and_its_answers(tiny_llama: Any, make_tokenizer: Any, tmp_path: Path) -> None:
    """m from 1 to 7 in one batch: each pass reads P + sum of C tokens, the prompt once for all answers."""
    model, rows = tiny_llama(), rows_for("multi_negative", 7)
    options = {"loss_type": "multi_negative", "per_device_train_batch_size": 7, "max_steps": 1}
    trainer = ours(model, rows, make_tokenizer(), tmp_path, **options)
    trainer.reference.start_checked = True
    seen = forward_tokens(model)
    trainer.train()
    assert sorted(len(row["rejected_ids"]) for row in rows) == list(range(1, 8))
    tokens = sum(len(r["prompt_ids"]) + len(r["chosen_ids"]) + sum(map(len, r["rejected_ids"])) for r in rows)
    assert seen == [tokens, tokens]


def test_first_losses_by_hand(tiny_llama: Any, make_tokenizer: Any, tmp_path: Path) -> None:
    """Before the first step all rewards are 0: (17) is the mean of log(1 + m), a ranking's loss that of log K!."""
    model, tokenizer = tiny_llama, make_tokenizer()
    options = {"per_device_train_batch_size": 7, "max_steps": 1}
    lists = trained(model(), rows_for("multi_negative", 7), tokenizer, tmp_path, loss_type="multi_negative", **options)
    expected = sum(math.log(1 + m) for m in range(1, 8)) / 7
    assert step_logs(lists)[0]["loss"] == pytest.approx(expected, abs=1e-6)
    ranked = trained(model(), rows_for("plackett_luce", 7), tokenizer, tmp_path, loss_type="plackett_luce", **options)
    expected = sum(math.lgamma(k + 1) for k in range(2, 9)) / 7
    assert step_logs(ranked)[0]["loss"] == pytest.approx(expected, abs=1e-5)
    kto = trained(model(), rows_for("kto", 7), tokenizer, tmp_path, loss_type="kto", desirable_weight=1.4, **options)
    good = sum(rows_for("kto", 7)["label"])
    assert step_logs(kto)[0]["loss"] == pytest.approx((1.4 * good + 7 - good) / 14, abs=1e-6)


# ---- Objectives that are others in disguise -------------------------------------------------------------------------


def test_one_rejected_answer_is_dpo(tiny_llama: Any, make_tokenizer: Any, tmp_path: Path) -> None:
    """Five steps of (17) with m = 1, of a ranking of two, and of a trajectory of one step, beside DPO's."""
    rows, tokenizer = id_pairs(20), make_tokenizer()
    dpo = trained(tiny_llama(), rows, tokenizer, tmp_path)
    for loss in ("multi_negative", "plackett_luce", "trajectory"):
        other = trained(tiny_llama(), rows, tokenizer, tmp_path, loss_type=loss)
        # A trajectory leaves out what both answers begin with; its rewards are those of the rest.
        names = ["loss", "grad_norm", "rewards/margins", "rewards/accuracies"]
        assert largest_difference(dpo, other, names) < 1e-5
    assert max(abs(log["rewards/margins"]) for log in step_logs(dpo)) > 1e-3


def test_a_discount_changes_the_steps(tiny_llama: Any, make_tokenizer: Any, tmp_path: Path) -> None:
    """Negative control for the identity above; the discounted path is checked by the oracle below."""
    rows, tokenizer = id_pairs(20), make_tokenizer()
    options = {"loss_type": "trajectory", "discount_unit": "token", "discount_gamma": 0.6}
    runs = [trained(tiny_llama(), rows, tokenizer, tmp_path, **o) for o in ({}, options)]
    assert largest_difference(*runs, ["loss"]) > 1e-3


def test_discounted_rewards_against_plain_logits(tiny_llama: Any, make_tokenizer: Any, tmp_path: Path) -> None:
    """beta * sum over tokens of gamma^t * (log pi - log pi_ref), from the model's own logits, adapter on and off."""
    rows, gamma, beta = id_pairs(6), 0.7, 0.3
    options = {"loss_type": "trajectory", "discount_unit": "token", "discount_gamma": gamma, "beta": beta}
    trainer = trained(tiny_llama(), rows, make_tokenizer(), tmp_path, **options)

    def log_probs(ids: list[int]) -> torch.Tensor:
        logits = trainer.model(input_ids=torch.tensor([ids])).logits[0, :-1].double()
        return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]

    expected = []
    with torch.no_grad():
        trainer.model.eval()
        for row in rows:
            for side in ("chosen_ids", "rejected_ids"):
                start, ids = len(row["prompt_ids"]), row["prompt_ids"] + row[side]
                policy = log_probs(ids)[start - 1 :]
                with trainer.model.disable_adapter():
                    ratios = policy - log_probs(ids)[start - 1 :]
                weights = torch.tensor([gamma**t for t in range(len(ratios))], dtype=torch.float64)
                expected.append(float(beta * (weights * ratios).sum()))
    rewards = trainer.predict(rows).predictions
    assert abs(rewards).max() > 1e-3
    # Tokens that both answers begin with are left out of both rewards; margins are those of the whole.
    margins = [a - b for a, b in zip(expected[::2], expected[1::2], strict=True)]
    torch.testing.assert_close(
        torch.tensor(rewards[:, 0] - rewards[:, 1]), torch.tensor(margins, dtype=torch.float64), rtol=0, atol=1e-5
    )


def test_items_know_their_rows() -> None:
    """What a non-finite loss is reported with: of single completions each own one, of pairs and lists the sample."""
    answers = [Sample([1], [[2], [3]], 40, mismatched=[[4]]), Sample([1], [[4]], 41, mismatched=[[2]])]
    assert TrainingObjective(["kto"]).kind.rows(pack(answers)).tolist() == [40, 40, 41]
    assert TrainingObjective(["multi_negative"]).kind.rows(pack(answers[:1])).tolist() == [40]


def test_micro_batches_joined_are_the_whole_batch() -> None:
    """What a coupled loss reads of the optimizer batch, whatever its split; the samples keep their own numbers."""
    samples = [Sample([1], [[2, 3], [4], [5, 6, 7]], row, grades=[2.0, 1.0, 0.0]) for row in range(4)]
    objective = TrainingObjective(["plackett_luce"], beta=1.0, reward_clip=None)

    def score(part: list[Sample]) -> Scored:
        batch = pack(part)
        tokens = [-(row + 1.0) * (1 + place) for row in batch.rows.tolist() for place in range(6)]
        policy, ref = (
            Scores(x, sum_by_completion(x, batch)) for x in (torch.tensor(tokens), torch.zeros(len(tokens)))
        )
        return objective.score(policy, ref, batch)

    whole, joined = score(samples), Scored.join([score(samples[:1]), score(samples[1:])])
    assert joined.sample_of_C.tolist() == whole.sample_of_C.tolist() and joined.num_samples == 4
    totals = Totals(4, 1.0)
    assert objective.losses(joined, totals).tolist() == objective.losses(whole, totals).tolist()


# ---- Labels of rows -------------------------------------------------------------------------------------------------


def labeled(rows: Dataset, **columns: Any) -> Dataset:
    for name, values in columns.items():
        rows = rows.add_column(name, values if isinstance(values, list) else [values] * len(rows))
    return rows


def flipped(rows: Dataset) -> Dataset:
    return rows.rename_columns({"chosen_ids": "rejected_ids", "rejected_ids": "chosen_ids"})


@pytest.mark.sampled(8, slow=3)
@pytest.mark.parametrize("loss", [name for name, entry in REGISTRY.items() if entry.soft_labels])
def test_soft_labels(loss: str, tiny_llama: Any, make_tokenizer: Any, tmp_path: Path) -> None:
    """p of (w, l) is 1 - p of (l, w); p = 1 is the hard label; a tie says nothing while rewards are equal."""
    rows, tokenizer = id_pairs(12), make_tokenizer()
    options: dict[str, Any] = {"loss_type": loss, "max_steps": 3}
    options |= {"label_smoothing": 0.05} if loss == "exo_pair" else {}
    options |= {"beta": 1.0} if loss == "sppo_hard" else {}  # its gradient is of the order of 1 / beta

    def run(data: Dataset) -> Any:
        return trained(tiny_llama(), data, tokenizer, tmp_path, **options)

    graded = [0.9, 0.6, 0.75, 0.5] * 3
    soft = run(labeled(rows, preference=graded))
    turned = run(labeled(flipped(rows), preference=[1 - p for p in graded]))
    # Relative: the gradients of ipo and sppo_hard are 100 times those of the others.
    assert largest_difference(soft, turned, ["loss", "grad_norm"], relative=True) < 1e-5
    hard, one = run(rows), run(labeled(rows, preference=1.0))
    assert largest_difference(hard, one, ["loss", "grad_norm"]) < 1e-6
    assert largest_difference(soft, hard, ["grad_norm"]) > 1e-4
    ties = trained(tiny_llama(), labeled(rows, preference=0.5), tokenizer, tmp_path, **{**options, "max_steps": 1})
    assert "rewards/accuracies" not in step_logs(ties)[0]
    if loss in ("sigmoid", "trajectory", "robust", "ipo", "hinge"):
        assert step_logs(ties)[0]["grad_norm"] < 1e-6


def test_margins(tiny_llama: Any, make_tokenizer: Any, tmp_path: Path) -> None:
    """The loss of equal rewards is -log sigmoid(-margin); no margin is a margin of 0."""
    rows, tokenizer = id_pairs(8), make_tokenizer()
    options = {"per_device_train_batch_size": 8, "max_steps": 1}
    margins = [0.0, 0.5, 1.0, -0.5, 2.0, 0.1, 0.2, 0.3]
    run = trained(tiny_llama(), labeled(rows, margin=margins), tokenizer, tmp_path, **options)
    expected = sum(math.log1p(math.exp(m)) for m in margins) / 8
    assert step_logs(run)[0]["loss"] == pytest.approx(expected, abs=1e-6)
    # A row below one half is turned round, its margin with it.
    both = labeled(rows, margin=margins, preference=0.2)
    run = trained(tiny_llama(), both, tokenizer, tmp_path, **options)
    expected = sum(0.2 * math.log1p(math.exp(m)) + 0.8 * math.log1p(math.exp(-m)) for m in margins) / 8
    assert step_logs(run)[0]["loss"] == pytest.approx(expected, abs=1e-6)


def test_ld_alpha_leaves_reference_free_parts_of_a_mix_alone(
    tiny_llama: Any, make_tokenizer: Any, tmp_path: Path
) -> None:
    """SimPO doesn't read ld_alpha: in a mix its part is that of plain log-probs."""
    rows, tokenizer = id_pairs(8), make_tokenizer()
    options = {"per_device_train_batch_size": 8, "max_steps": 1, "beta": 1.0}
    losses = []
    for mix in ({"loss_type": ["sigmoid", "simpo"], "ld_alpha": 0.3}, {"loss_type": "simpo"}):
        run = trained(tiny_llama(), rows, tokenizer, tmp_path, **options, **mix)
        losses.append(step_logs(run)[0]["loss"])
    assert losses[0] == pytest.approx(losses[1] + math.log(2), abs=1e-6)


# ---- Evaluation and resuming ----------------------------------------------------------------------------------------


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "loss", ["multi_negative", "plackett_luce", "kto", "apo_zero_unpaired", "trajectory", "simpo"]
)
def test_evaluation_and_compute_metrics(loss: str, tiny_llama: Any, make_tokenizer: Any, tmp_path: Path) -> None:
    """A trained policy beats the start on its own rows; `compute_metrics` gets every completion's reward and label."""
    rows, got = rows_for(loss, 13), []
    options = {"loss_type": loss, "eval_dataset": rows, "max_steps": 20, "learning_rate": 1e-2}
    options |= {"compute_metrics": lambda output: got.append(output) or {"seen": len(output.predictions)}}
    trainer = ours(tiny_llama(), rows, make_tokenizer(), tmp_path, **options)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"]
    assert after["eval_rewards/accuracies"] > max(0.8, before["eval_rewards/accuracies"])
    if REGISTRY[loss].data in ("pairs", "trajectories"):
        assert got[-1].predictions.shape == (13, 2)
        return
    grades, row = torch.tensor(got[-1].label_ids).T
    assert len(grades) == after["eval_seen"] and sorted(set(row.tolist())) == list(range(13))
    rewards = torch.tensor(got[-1].predictions)
    apart = (grades[:, None] > grades) & ((row[:, None] == row) | (REGISTRY[loss].data == "singles"))
    assert (rewards[:, None] > rewards)[apart].double().mean() > 0.75


@pytest.mark.parametrize("loss", ["kto", "aot"])
def test_a_coupled_run_resumes_exactly(loss: str, tiny_llama: Any, make_tokenizer: Any, tmp_path: Path) -> None:
    rows, tokenizer = rows_for(loss, 24), make_tokenizer()
    options = {"loss_type": loss, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 8}
    options |= {"save_strategy": "steps", "save_steps": 4}
    straight = trained(tiny_llama(), rows, tokenizer, tmp_path / "a", **options)
    again = ours(tiny_llama(), rows, tokenizer, tmp_path / "a", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    for name, weight in adapter_weights(straight).items():
        assert torch.equal(weight, adapter_weights(again)[name]), name
    assert step_logs(straight)[-1]["loss"] == step_logs(again)[-1]["loss"]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("loss", ["kto", "multi_negative", "trajectory"])
def test_streams_train_as_datasets_do(loss: str, tiny_llama: Any, make_tokenizer: Any, tmp_path: Path) -> None:
    rows, tokenizer = rows_for(loss, 16), make_tokenizer()
    options = {"loss_type": loss, "max_steps": 3, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    whole = trained(tiny_llama(), rows, tokenizer, tmp_path, train_sampling_strategy="sequential", **options)
    stream = trained(tiny_llama(), rows.to_iterable_dataset(), tokenizer, tmp_path, **options)
    assert largest_difference(whole, stream, ["loss", "grad_norm"]) == 0


def test_a_last_batch_of_one_row_has_no_mismatched_answer(
    tiny_llama: Any, make_tokenizer: Any, tmp_path: Path
) -> None:
    """5 rows by 4: z_ref of the last one is 0, so its loss is that of APO; it is not dropped."""
    rows, tokenizer = rows_for("kto", 5), make_tokenizer()
    options = {"max_steps": 2, "per_device_train_batch_size": 4, "train_sampling_strategy": "sequential"}
    kto, apo = (
        trained(tiny_llama(), rows, tokenizer, tmp_path, loss_type=loss, learning_rate=0.0, **options)
        for loss in ("kto", "apo_zero_unpaired")
    )
    assert "z_ref" in step_logs(kto)[0] and "z_ref" not in step_logs(kto)[1]
    assert largest_difference(kto, apo, ["loss"]) < 1e-7


@pytest.mark.parametrize("learned", [False, True], ids=["max_length", "positions"])
def test_mismatched_completions_keep_within_the_longest_row(
    learned: bool, tiny_llama: Any, make_tokenizer: Any, tmp_path: Path
) -> None:
    """A completion of 17 tokens meets a prompt of 10: cut to 10, and another one from 4 to 2."""
    lengths, longest = [(18, 2), (3, 17), (10, 4)], 20
    rows = [{"prompt_ids": [5 + i] * n, "completion_ids": [*range(20, 20 + k)]} for i, (n, k) in enumerate(lengths)]
    rows = [{**row, "label": i != 1} for i, row in enumerate(rows)]
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=320, n_embd=16, n_layer=1, n_head=2, n_positions=longest)
    model = GPT2LMHeadModel(config) if learned else tiny_llama()
    options = {"loss_type": "kto", "max_length": None if learned else longest, "train_sampling_strategy": "sequential"}
    options |= {"per_device_train_batch_size": 3, "per_device_eval_batch_size": 3, "max_steps": 3}
    trainer = trained(model, Dataset.from_list(rows), make_tokenizer(), tmp_path, learning_rate=1e-2, **options)
    assert [log.get("mismatched_cut") for log in step_logs(trainer)] == [2, 4, 6]
    others = [rows[2]["completion_ids"][:2], rows[0]["completion_ids"], rows[1]["completion_ids"][:10]]
    crossed = [{**row, "completion_ids": ids} for row, ids in zip(rows, others, strict=True)]
    expected = float(trainer.predict(Dataset.from_list(crossed)).predictions.mean())
    assert trainer.evaluate(Dataset.from_list(rows))["eval_z_ref"] == pytest.approx(expected, rel=1e-5)
    assert abs(expected) > 1e-4


# ---- What is left behind --------------------------------------------------------------------------------------------


def test_the_card_says_what_was_trained(tiny_llama: Any, make_tokenizer: Any, tmp_path: Path) -> None:
    """Names, weights, options and the meaning of the rewards; only log-ratios make the adapter a reward model."""
    rows, tokenizer = id_pairs(8), make_tokenizer()
    mix = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.25], "ld_alpha": 0.5}
    trained(tiny_llama(), rows, tokenizer, tmp_path / "mix", **mix).save_model()
    card = (tmp_path / "mix" / "README.md").read_text()
    assert "trained with 1 × `sigmoid` (Rafailov et al. 2023" in card and "+ 0.25 × `sft` (maximum likelihood" in card
    assert "ld_alpha" in card and "also a reward model" in card and "Rewards are β·log(π/π_ref)" in card
    trained(tiny_llama(), rows, tokenizer, tmp_path / "simpo", loss_type="simpo").save_model()
    card = (tmp_path / "simpo" / "README.md").read_text()
    assert "`simpo` (Meng et al. 2024" in card and "Rewards are β·log π per token" in card
    assert "**Reference:** none is needed" in card and "also a reward model" not in card


# ---- Evaluation of single completions -------------------------------------------------------------------------------


@pytest.mark.sampled(2)
@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_held_out_margins_of_single_completions_are_over_all_rows(
    loss: str, tiny_llama: Any, make_tokenizer: Any, tmp_path: Path
) -> None:
    """All good ones first: no batch holds both. The margins that early stopping looks at are there all the same."""
    rows = rows_for(loss, 12)
    held_out = rows_for(loss, 9, seed=1).sort("label", reverse=True)
    changed = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    margins = []
    for size in (2, 4, 9) if loss == "kto" else (1, 2, 9):
        options = {"per_device_eval_batch_size": size, "early_stopping_patience": 9, "loss_type": loss, **changed}
        folder, options["learning_rate"] = tmp_path / str(size), 1e-2
        trainer = trained(tiny_llama(), rows, make_tokenizer(), folder, eval_dataset=held_out, **options)
        margins.append([log["eval_rewards/margins"] for log in trainer.state.log_history if "eval_loss" in log])
    predicted = trainer.predict(held_out)
    rewards, good = torch.as_tensor(predicted.predictions), torch.as_tensor(predicted.label_ids)[:, 0] > 0
    assert 0 < good.sum() < 9 and len(margins[0]) == 5 and abs(margins[0][-1]) > 1e-4
    assert trainer.evaluate(held_out)["eval_rewards/margins"] == pytest.approx(
        float(rewards[good].mean() - rewards[~good].mean()), rel=1e-5
    )
    assert margins[0] == pytest.approx(margins[1], abs=1e-6) and margins[0] == pytest.approx(margins[2], abs=1e-6)


def accuracies_by_hand(rewards: list[float], lengths: list[int], good: list[bool]) -> dict[str, float]:
    """Every good completion against every bad one, one by one."""
    won: dict[str, list[float]] = {"accuracies/chosen_longer": [], "accuracies/chosen_shorter": [], "equal": []}
    for a, b in itertools.product(range(len(good)), repeat=2):
        if good[a] and not good[b]:
            stratum = 0 if lengths[a] > lengths[b] else 1 if lengths[a] < lengths[b] else 2
            won[list(won)[stratum]].append(
                1.0 if rewards[a] > rewards[b] else 0.5 if rewards[a] == rewards[b] else 0.0
            )
    longer, shorter, equal = won.values()
    found = {name: sum(wins) / len(wins) for name, wins in won.items() if name != "equal"}
    found["accuracies/length_balanced"] = sum(found.values()) / 2
    number = len(longer) + len(shorter) + len(equal)
    found["accuracies/length_only"] = (len(longer) + len(equal) / 2) / number
    return {**found, "rewards/accuracies": sum(longer + shorter + equal) / number}


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("loss", "paired"), [("kto", False), ("apo_zero_unpaired", False), ("kto", True)])
def test_held_out_accuracies_of_single_completions_are_over_all_rows(
    loss: str, paired: bool, tiny_llama: Any, make_tokenizer: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """Whatever the batches and the order of the rows; the control compares within each batch."""
    rows, held_out = (id_pairs(n, seed=n) if paired else rows_for(loss, n, seed=n) for n in (12, 11))
    trainer = trained(tiny_llama(), rows, make_tokenizer(), tmp_path, loss_type=loss, learning_rate=1e-2)
    predicted = trainer.predict(held_out)
    sides = ("chosen_ids", "rejected_ids") if paired else ("completion_ids",)
    lengths = [len(row[side]) for row in held_out for side in sides]
    expected = accuracies_by_hand(predicted.predictions.tolist(), lengths, (predicted.label_ids[:, 0] > 0).tolist())
    backward = held_out.select(range(10, -1, -1)) if paired else held_out.sort("label")

    def figures(size: int, dataset: Any) -> dict[str, float]:
        trainer.args.per_device_eval_batch_size = size
        found = trainer.evaluate(dataset)
        return {name: found[f"eval_{name}"] for name in expected if f"eval_{name}" in found}

    for size in (2, 4, 7, 12):
        assert figures(size, held_out) == figures(size, backward) == pytest.approx(expected, abs=1e-12)
    monkeypatch.setattr(type(trainer.objective.kind), "across_rows", False)
    assert figures(2, backward) != pytest.approx(expected, abs=1e-12)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_last_row_alone_has_a_reference_point(
    size: int, tiny_llama: Any, make_tokenizer: Any, tmp_path: Path
) -> None:
    """It takes the completion of the row before it: every held-out row has one to another prompt, and so no more."""
    held_out = rows_for("kto", size + 1, seed=2)
    options = {"loss_type": "kto", "per_device_eval_batch_size": size, "learning_rate": 1e-2}
    trainer = trained(tiny_llama(), rows_for("kto", 12), make_tokenizer(), tmp_path, **options)
    sources = [size - 1, *range(size)]  # within the first batch, then across
    sources[size] = size - 1
    mismatched = [
        {**row, "completion_ids": held_out[source]["completion_ids"]}
        for row, source in zip(held_out, sources, strict=True)
    ]
    expected = float(trainer.predict(Dataset.from_list(mismatched)).predictions.mean())
    for _ in range(2):  # a second evaluation begins anew
        assert trainer.evaluate(held_out)["eval_z_ref"] == pytest.approx(expected, rel=1e-5)
    assert abs(expected) > 1e-3
    assert "eval_z_ref" not in trainer.evaluate(held_out.select([0]))
