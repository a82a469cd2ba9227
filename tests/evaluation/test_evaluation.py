"""What evaluations leave behind, early stopping and the best adapter: right, and the run isn't disturbed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from objective_rows import rows_for
from parallel_run import SCRIPT, launch, train
from peft import PeftModel, get_peft_model
from trainer_helpers import StopAt, adapter_weights, history, id_pairs, lora, optimizer_tensors, ours
from transformers import TrainerCallback, TrainerControl, TrainerState, set_seed

from dpo_peft import DPOConfig, OptionError
from dpo_peft.evaluation.pair_records import EXAMPLES, first_and_newest
from dpo_peft.evaluation.samples import SAMPLES, distinct_prompts, in_short, send_table
from dpo_peft.training.callbacks import EarlyStop

EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 6, "per_device_train_batch_size": 2}
SAMPLED = {"sample_prompts": 3, "sample_max_new_tokens": 6, "sample_temperature": 1.0}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def run(tiny_llama: Any, make_tokenizer: Any) -> Any:
    """`run(folder, **changed)`: a trained trainer, evaluated at steps 2, 4 and 6 on nine pairs."""

    def train(folder: Path, resume: Any = None, **changed: Any) -> Any:
        changed = {"eval_dataset": id_pairs(9, seed=9), **EVALUATED, **changed}
        set_seed(0)
        trainer = ours(tiny_llama(), id_pairs(12), make_tokenizer(), folder, **changed)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return train


def waited(trainer: Any) -> dict[str, Any]:
    """How long a run's early stopping has waited, and for what."""
    (stop,) = (one for one in trainer.callback_handler.callbacks if isinstance(one, EarlyStop))
    return {name: getattr(stop, name) for name in ("best", "best_step", "waited", "step")}


# ---- Samples --------------------------------------------------------------------------------------------------------


def test_samples_leave_the_run_alone(run, tmp_path) -> None:
    """Weights, optimizer and logs are those of a run without, dropout's random numbers included."""
    dropout = {"disable_dropout": False, "peft_config": lora(lora_dropout=0.3), "gradient_checkpointing": True}
    plain = run(tmp_path / "plain", **dropout)
    sampled = run(tmp_path / "sampled", **dropout, **SAMPLED)
    assert not (tmp_path / "plain" / SAMPLES).exists()
    expected = adapter_weights(plain)
    assert all(torch.equal(weight, expected[name]) for name, weight in adapter_weights(sampled).items())
    for a, b in zip(optimizer_tensors(plain), optimizer_tensors(sampled), strict=True):
        assert torch.equal(a, b)
    assert without_times(sampled) == without_times(plain)
    # The comparison can fail: the same dropout after one more random number is another run.
    disturbed = run(tmp_path / "disturbed", **dropout, callbacks=[DrawANumber()])
    assert any(not torch.equal(weight, expected[name]) for name, weight in adapter_weights(disturbed).items())


class DrawANumber(TrainerCallback):
    def on_evaluate(self, args, state, control, **kwargs):
        torch.rand(1)


def without_times(trainer: Any) -> list[dict[str, float]]:
    kept = [{k: v for k, v in log.items() if not k.endswith("preparation_time")} for log in history(trainer)]
    return kept


def test_samples_are_the_models_own(run, make_tokenizer, tiny_llama, tmp_path) -> None:
    """Greedy answers of the base before training and of the saved adapter at the end, by plain transformers."""
    trainer = run(tmp_path, sample_prompts=3, sample_max_new_tokens=6, learning_rate=3e-2)
    trainer.save_model()
    rows, tokenizer = lines(tmp_path / SAMPLES), make_tokenizer()
    assert [(row["step"], row["prompt_number"]) for row in rows] == [(s, i) for s in (0, 2, 4, 6) for i in range(3)]
    prompts = [row["prompt_ids"] for row in id_pairs(9, seed=9)][:3]
    trained = PeftModel.from_pretrained(tiny_llama(), str(tmp_path)).merge_and_unload()
    texts = {0: greedy(tiny_llama(), prompts), 6: greedy(trained, prompts)}
    for row in rows:
        prompt = prompts[row["prompt_number"]]
        assert row["prompt"] == tokenizer.decode(prompt, skip_special_tokens=True)
        if row["step"] in texts:
            ids = texts[row["step"]][row["prompt_number"]]
            assert row["completion"] == tokenizer.decode(ids, skip_special_tokens=True)
            assert row["tokens"] == len(ids) and row["finished"] == (ids[-1] == tokenizer.eos_token_id)
    assert texts[0] != texts[6], "training has changed nothing, so the comparison says nothing"


def greedy(model: Any, prompts: list[list[int]], new: int = 6) -> list[list[int]]:
    """The likeliest token again and again, from the logits of whole rows."""
    answers = []
    for prompt in prompts:
        ids = list(prompt)
        while len(ids) < len(prompt) + new and ids[len(prompt) :][-1:] != [2]:
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        answers.append(ids[len(prompt) :])
    return answers


def test_prompts_are_different_ones_that_leave_room(run, tmp_path, caplog) -> None:
    rows = [{"prompt_ids": ids} for ids in ([5, 6], [], [5, 6], [7] * 9, [8])]
    assert [row["prompt_ids"] for row in distinct_prompts(rows, longest=8)] == [[5, 6], [8]]
    assert [row["prompt_ids"] for row in distinct_prompts(rows, longest=None)] == [[5, 6], [7] * 9, [8]]
    run(tmp_path, **SAMPLED | {"sample_prompts": 30}, max_steps=2)
    assert len(lines(tmp_path / SAMPLES)) == 2 * 9
    assert "sample_prompts=30: the evaluation rows have 9 different prompts" in caplog.text


def test_the_first_of_several_datasets_is_sampled_once_a_step(run, tmp_path) -> None:
    sets = {"b": id_pairs(3, seed=5), "a": id_pairs(4, seed=6)}
    trainer = run(tmp_path, **SAMPLED, eval_dataset=sets, max_steps=2)
    trainer.evaluate()  # of the same step again
    rows = lines(tmp_path / SAMPLES)
    assert [(row["step"], row["prompt_number"]) for row in rows] == [(s, i) for s in (0, 2) for i in range(3)]
    expected = trainer.processing_class.decode(sets["b"][1]["prompt_ids"], skip_special_tokens=True)
    assert rows[1]["prompt"] == expected


def test_a_run_that_changes_no_text_says_so_at_its_end(run, tmp_path, caplog) -> None:
    greedy = {"sample_prompts": 3, "sample_max_new_tokens": 6}
    still = run(tmp_path / "still", learning_rate=0.0, save_strategy="steps", save_steps=6, **greedy)
    (warning,) = still.warnings_raised
    assert (warning["name"], warning["step"]) == ("no-change", 6) and "all 3 samples of step 6" in warning["message"]
    assert caplog.text.count("no-change at step 6") == 1
    saved = json.loads((tmp_path / "still" / "checkpoint-6" / "run_state.json").read_text())
    assert saved["extra"]["warnings"] == [], "it was said before the run was over"
    moved = run(tmp_path / "moved", learning_rate=3e-2, **greedy)
    assert "no-change" not in [warning["name"] for warning in moved.warnings_raised]
    # Without an evaluation while it trains nothing is known of the text until somebody evaluates.
    silent = run(tmp_path / "silent", learning_rate=0.0, eval_strategy="no", **greedy)
    assert not silent.warnings_raised
    silent.evaluate()
    assert [warning["name"] for warning in silent.warnings_raised] == ["no-change"]


def test_samples_that_do_not_fit_cost_a_warning(run, tmp_path, caplog, monkeypatch) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr("dpo_peft.evaluation.samples.sample_completions", full)
    trainer = run(tmp_path, **SAMPLED, max_steps=2)
    assert trainer.state.global_step == 2 and not (tmp_path / SAMPLES).exists()
    assert "No samples at step 2: they don't fit into memory. Lower sample_prompts" in caplog.text


def test_samples_of_single_answers(tiny_llama, make_tokenizer, tmp_path) -> None:
    """KTO's rows come two to a prompt; each prompt is answered once, and there are no pairs to record."""
    rows = rows_for("kto", 8, 0)
    trainer = ours(
        tiny_llama(), rows, make_tokenizer(), tmp_path, loss_type="kto", eval_dataset=rows, **EVALUATED, **SAMPLED
    )
    trainer.train()
    assert len({row["prompt"] for row in lines(tmp_path / SAMPLES) if row["step"] == 6}) == 3
    assert not (tmp_path / EXAMPLES).exists()


# ---- Records of pairs -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(run, tmp_path_factory) -> tuple[Any, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("recorded")
    trainer = run(folder)
    return trainer, lines(folder / EXAMPLES)


def test_records_are_of_the_first_and_the_newest_evaluation(recorded) -> None:
    _, rows = recorded
    assert [(r["step"], r["dataset"], r["row"]) for r in rows] == [(s, "eval", i) for s in (2, 6) for i in range(9)]


def test_records_are_the_pairs_own_figures(recorded, tiny_llama) -> None:
    """Log-probs by plain transformers, row by row; rewards as beta times the log-ratio to the base."""
    trainer, rows = recorded
    base, pairs = tiny_llama(), id_pairs(9, seed=9)
    for record in rows[-9:]:
        for side in ("chosen", "rejected"):
            prompt, answer = pairs[record["row"]]["prompt_ids"], pairs[record["row"]][f"{side}_ids"]
            logps = [own_logp(model, prompt, answer) for model in (trainer.model, base)]
            assert record[f"logp_{side}"] == pytest.approx(logps[0], abs=1e-4)
            assert record[f"reward_{side}"] == pytest.approx(0.1 * (logps[0] - logps[1]), abs=1e-5)
            assert record[f"tokens_{side}"] == len(answer)


def own_logp(model: Any, prompt: list[int], answer: list[int]) -> float:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return float(logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).double().sum())


def test_records_add_up_to_the_metrics(recorded) -> None:
    trainer, rows = recorded
    newest = [log for log in trainer.state.log_history if "eval_loss" in log][-1]
    margins = {r["row"]: r["reward_chosen"] - r["reward_rejected"] for r in rows[-9:]}
    longer = {r["row"]: r["tokens_chosen"] - r["tokens_rejected"] for r in rows[-9:]}
    assert newest["eval_rewards/margins"] == pytest.approx(sum(margins.values()) / 9, abs=1e-9)
    sides = {"longer": [r for r in longer if longer[r] > 0], "shorter": [r for r in longer if longer[r] < 0]}
    shares = {side: sum(margins[r] > 0 for r in of) / len(of) for side, of in sides.items()}
    assert newest["eval_accuracies/chosen_longer"] == shares["longer"]
    assert newest["eval_accuracies/chosen_shorter"] == shares["shorter"]
    assert newest["eval_accuracies/length_balanced"] == sum(shares.values()) / 2


@pytest.mark.sampled(2)
@pytest.mark.parametrize("how", [{"max_tokens_per_microbatch": 40}, {"share_prompts": False}, {"loss_type": "aot"}])
def test_records_do_not_depend_on_the_packing(run, tiny_llama, tmp_path, how) -> None:
    """A token budget takes rows out of their order. Before training, so that all are known."""
    run(tmp_path, eval_on_start=True, max_steps=1, eval_steps=1, **how)
    rows, pairs, base = [r for r in lines(tmp_path / EXAMPLES) if r["step"] == 0], id_pairs(9, seed=9), tiny_llama()
    assert [row["row"] for row in rows] == list(range(9))
    for row, pair in zip(rows, pairs, strict=True):
        for side in ("chosen", "rejected"):
            expected = own_logp(base, pair["prompt_ids"], pair[f"{side}_ids"])
            assert row[f"logp_{side}"] == pytest.approx(expected, abs=1e-4)
            assert row[f"tokens_{side}"] == len(pair[f"{side}_ids"]) and abs(row[f"reward_{side}"]) < 1e-6


def test_records_of_several_datasets(run, tmp_path) -> None:
    sets = {"b": id_pairs(3, seed=5), "a": id_pairs(2, seed=6)}
    trainer = run(tmp_path, eval_dataset=sets, max_steps=4)
    found = [(r["step"], r["dataset"], r["row"]) for r in lines(tmp_path / EXAMPLES)]
    assert found == [(s, f"eval_{n}", i) for n in sets for s in (2, 4) for i in range(len(sets[n]))]
    # What isn't the trainer's own evaluation, or belongs to no run, is not recorded.
    trainer.evaluate(id_pairs(7, seed=1))
    trainer.predict(id_pairs(7, seed=1))
    assert [(r["step"], r["dataset"], r["row"]) for r in lines(tmp_path / EXAMPLES)] == found


def test_a_trainer_that_has_not_trained_leaves_the_files_of_a_run(run, tiny_llama, make_tokenizer, tmp_path) -> None:
    run(tmp_path, **SAMPLED)
    before = {name: (tmp_path / name).read_bytes() for name in (SAMPLES, EXAMPLES)}
    rows = id_pairs(5)
    other = ours(tiny_llama(), rows, make_tokenizer(), tmp_path, eval_dataset=rows, **SAMPLED)
    other.evaluate()
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    other.args.max_steps = 1
    other.train()  # a new run from scratch: the files are its own now
    assert {row["step"] for row in lines(tmp_path / SAMPLES)} == {0} and not (tmp_path / EXAMPLES).exists()


def test_first_and_newest() -> None:
    looks = [[{"step": step, "n": n}] for n, step in enumerate((2, 4, 4, 6))]
    assert first_and_newest([], looks[0]) == looks[0]
    assert first_and_newest(looks[1], looks[2]) == looks[2]
    held: list[dict[str, int]] = []
    for look in looks:
        held = first_and_newest(held, look)
    assert held == looks[0] + looks[3]


# ---- Interrupted runs -----------------------------------------------------------------------------------------------


def test_interrupted_equals_straight(run, tmp_path) -> None:
    """The files too: killed after step 4 was evaluated, gone on with from step 3 in another folder and in its own."""
    options = {**SAMPLED, "save_strategy": "steps", "save_steps": 3, "early_stopping_patience": 9}
    straight = run(tmp_path / "straight", **options)
    run(tmp_path / "own", **options, callbacks=[StopAt(5)])
    assert {row["step"] for row in lines(tmp_path / "own" / SAMPLES)} == {0, 2, 4}
    for folder in (tmp_path / "other", tmp_path / "own"):
        resumed = run(folder, resume=str(tmp_path / "own" / "checkpoint-3"), **options)
        for name in (SAMPLES, EXAMPLES):
            assert (folder / name).read_bytes() == (tmp_path / "straight" / name).read_bytes(), name
        assert waited(resumed) == waited(straight)
        assert resumed.warnings_raised == straight.warnings_raised


def test_warnings_are_raised_once_across_an_interruption(run, tmp_path, caplog) -> None:
    options = {"save_strategy": "steps", "save_steps": 3, "learning_rate": 0.1, "max_grad_norm": 100.0}
    run(tmp_path, **options, callbacks=[StopAt(4)])
    before = json.loads((tmp_path / "checkpoint-3" / "run_state.json").read_text())["extra"]["warnings"]
    assert "high-kl" in [warning["name"] for warning in before]
    caplog.clear()
    resumed = run(tmp_path, resume=True, **options)
    assert resumed.warnings_raised[: len(before)] == before and "high-kl at step" not in caplog.text


# ---- Early stopping -------------------------------------------------------------------------------------------------


def told(callback: EarlyStop, values: dict[int, float | None], name: str = "eval_m") -> list[int]:
    """The steps at which the run was told to stop, given the metric by step."""
    stopped = []
    for step, value in values.items():
        state, control = TrainerState(global_step=step), TrainerControl()
        callback.on_evaluate(None, state, control, metrics={} if value is None else {name: value})
        stopped += [step] if control.should_training_stop else []
    return stopped


@pytest.mark.parametrize(
    ("values", "greater", "patience", "threshold", "stops"),
    [
        ([1, 2, 3, 4], True, 1, 0, []),
        ([1, 2, 2, 3], True, 1, 0, [3]),  # as good is not better
        ([1, 0, 2, 1, 1], True, 2, 0, [5]),  # a better one in between starts the count again
        ([1, 0, 0, 0], True, 3, 0, [4]),
        ([3, 2, 1, 1], False, 1, 0, [4]),
        ([1, 1.4, 1.8, 2.0], True, 2, 0.5, []),  # 1.8 is 0.8 above the mark, and the mark moves with it
        ([1, 1.2, 1.4, 1.6], True, 2, 0.5, [3]),
        ([float("nan"), 1, float("nan"), float("nan")], True, 2, 0, [4]),
        ([1, float("inf"), float("-inf")], True, 2, 0, [3]),
    ],
)
def test_early_stopping_counts(values, greater, patience, threshold, stops) -> None:
    callback = EarlyStop("eval_m", greater, patience, threshold)
    assert told(callback, dict(enumerate(values, start=1)))[:1] == stops


def test_early_stopping_looks_once_at_a_step_and_only_at_its_metric() -> None:
    callback = EarlyStop("eval_m", True, 2, 0.0)
    assert told(callback, {1: 1.0}) == told(callback, {1: 0.5}) == told(callback, {1: 0.5}) == []
    assert told(callback, {2: None, 3: None, 4: None}) == []
    assert told(callback, {5: 0.5, 6: 0.5}) == [6]


class Worsen(TrainerCallback):
    """From a step on, the weights are pulled to where the run began: the held-out margin falls."""

    def __init__(self, start: int):
        self.start = start

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step >= self.start:
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and "lora_B" in name:
                    parameter.data.mul_(0.3)


STOPPING = {
    "early_stopping_patience": 2,
    "max_steps": 12,
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "learning_rate": 1e-2,
    "logging_steps": 1,
}


@pytest.fixture(scope="module")
def same_rows() -> Dataset:
    return id_pairs(12)  # held-out rows that are the training rows: the margin grows as long as training does


@pytest.fixture(scope="module")
def stopped(run, same_rows, tmp_path_factory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("stopped")
    trainer = run(
        folder, **STOPPING, eval_dataset=same_rows, load_best_model_at_end=True, callbacks=[Worsen(5)], **SAMPLED
    )
    return trainer, folder


def margins(trainer: Any) -> dict[int, float]:
    logs = [log for log in trainer.state.log_history if "eval_loss" in log]
    return {log["step"]: log["eval_rewards/margins"] for log in logs}


def test_a_run_stops_when_the_held_out_margin_falls(stopped, caplog) -> None:
    trainer, _ = stopped
    found = margins(trainer)
    best = max(found, key=found.__getitem__)
    assert trainer.state.global_step == best + 2 < 12 and list(found) == list(range(1, best + 3))
    assert trainer.args.metric_for_best_model == "eval_rewards/margins" and trainer.args.greater_is_better is True
    assert trainer.state.best_metric == found[best] and trainer.state.best_global_step == best


def test_the_best_adapter_is_kept_and_saved(stopped, tiny_llama) -> None:
    trainer, folder = stopped
    found = margins(trainer)
    best = max(found, key=found.__getitem__)
    kept = PeftModel.from_pretrained(tiny_llama(), str(folder / f"checkpoint-{best}"))
    weights = {n: p for n, p in kept.named_parameters() if "lora_" in n}
    loaded = adapter_weights(trainer)
    assert len(loaded) == len(weights) > 0
    assert all(torch.equal(loaded[name], weight) for name, weight in weights.items())
    assert all(p.requires_grad == ("lora_" in n) for n, p in trainer.model.named_parameters())
    assert trainer.evaluate()["eval_rewards/margins"] == found[best]
    rows = lines(folder / SAMPLES)
    of_best, of_last = ([r["completion"] for r in rows if r["step"] == s] for s in (best, best + 2))
    assert of_last == of_best, "the newest samples are not of the adapter that is saved"


def test_a_run_that_stopped_early_takes_no_further_step(stopped, run, same_rows, tmp_path) -> None:
    """Killed after its last checkpoint, before the adapter was saved."""
    trainer, folder = stopped
    step = trainer.state.global_step
    more = {**STOPPING, "eval_dataset": same_rows, "load_best_model_at_end": True, **SAMPLED}
    resumed = run(tmp_path / "again", resume=str(folder / f"checkpoint-{step}"), **more)
    assert resumed.state.global_step == step
    expected = adapter_weights(trainer)
    assert all(torch.equal(weight, expected[name]) for name, weight in adapter_weights(resumed).items())
    # From the checkpoint before, the count goes on: one more evaluation, not two.
    resumed = run(tmp_path / "before", resume=str(folder / f"checkpoint-{step - 1}"), **more, callbacks=[Worsen(5)])
    assert resumed.state.global_step == step
    assert waited(resumed) == waited(trainer)


def test_the_best_of_an_adapter_with_another_name(run, same_rows, tiny_llama, make_tokenizer, tmp_path) -> None:
    set_seed(0)
    model = get_peft_model(tiny_llama(), lora(), adapter_name="mine")
    options = {**EVALUATED, **STOPPING, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    trainer = ours(
        model, same_rows, make_tokenizer(), tmp_path, eval_dataset=same_rows, callbacks=[Worsen(4)], **options
    )
    trainer.train()
    best = trainer.state.best_global_step
    assert best < trainer.state.global_step
    losses = {log["step"]: log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log}
    assert trainer.evaluate()["eval_loss"] == losses[best] == min(losses.values())


def test_the_best_adapter_comes_with_the_reference_that_it_had(run, same_rows, tmp_path) -> None:
    """TR-DPO: margins are to a reference that moves, so it goes back as well."""
    moving = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5}
    trainer = run(
        tmp_path, **STOPPING, **moving, eval_dataset=same_rows, load_best_model_at_end=True, callbacks=[Worsen(5)]
    )
    found = margins(trainer)
    assert trainer.state.best_global_step < trainer.state.global_step
    assert trainer.evaluate()["eval_rewards/margins"] == max(found.values())


def test_a_metric_that_no_row_tells_anything_of(run, tmp_path) -> None:
    """All better answers are the longer ones, so there is no accuracy where they are the shorter ones."""
    rows = Dataset.from_list([{"prompt_ids": [5], "chosen_ids": [6, 7 + i, 9], "rejected_ids": [8]} for i in range(4)])
    with pytest.raises(OptionError, match=r"length_balanced': the evaluation of step 1 lacks it.*eval_loss"):
        run(tmp_path, eval_dataset=rows, eval_steps=1, metric_for_best_model="eval_accuracies/length_balanced")


# ---- Several processes ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_leave_the_files_of_one(tiny_llama, make_tokenizer, tmp_path) -> None:
    """Seven held-out pairs in batches of four: the last one leaves rank 1 with one row of three."""
    tiny_llama().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    options = {"eval_strategy": "steps", "eval_steps": 2, **SAMPLED, "sample_temperature": 0.0}
    options |= {"early_stopping_patience": 1, "early_stopping_threshold": 1e9}
    case = {"name": "evaluated", "loss": ["sigmoid"], "rows": 12, "batch": 4, "eval_rows": 7, "options": options}
    (tmp_path / "case.json").write_text(json.dumps([case]))
    launch(SCRIPT, [str(tmp_path / "case.json")], tmp_path)
    train(case, str(tmp_path), 1, 0)
    two, one = tmp_path / "outputs-evaluated-2", tmp_path / "outputs-evaluated-1"
    assert (two / SAMPLES).read_bytes() == (one / SAMPLES).read_bytes()
    assert {row["step"] for row in lines(two / SAMPLES)} == {0, 2, 4}, "the second evaluation ends the run"
    assert len(lines(one / EXAMPLES)) == 14
    for a, b in zip(lines(one / EXAMPLES), lines(two / EXAMPLES), strict=True):
        assert a == {**b, **{k: pytest.approx(v, abs=1e-5) for k, v in b.items() if isinstance(v, float)}}


# ---- Options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample_prompts": -1}, r"sample_prompts=-1 must be a whole number at least 0"),
        ({"sample_prompts": 1.5}, r"sample_prompts=1\.5 must be a whole number"),
        ({"sample_max_new_tokens": 9}, r"sample_max_new_tokens=9 has no effect without sample_prompts"),
        ({"sample_temperature": 1.0}, r"sample_temperature=1\.0 has no effect without sample_prompts"),
        ({"sample_prompts": 1, "sample_temperature": -1}, r"sample_temperature=-1 must be a number at least 0"),
        ({"sample_prompts": 1, "sample_max_new_tokens": 0}, r"sample_max_new_tokens=0 must be"),
        ({"early_stopping_patience": 2}, r"early_stopping_patience=2 has no effect without eval_strategy: set it too"),
        ({"early_stopping_patience": 0}, r"early_stopping_patience=0 must be a whole number at least 1"),
        ({"early_stopping_threshold": 0.1}, r"early_stopping_threshold=0\.1 has no effect without early_stopping_pat"),
    ],
)
def test_wrong_options(options, message) -> None:
    with pytest.raises(OptionError, match=message):
        DPOConfig(output_dir="out", use_cpu=True, report_to="none", **options)


@pytest.mark.parametrize(
    ("metric", "greater"),
    [("eval_rewards/margins", True), ("rewards/accuracies", True), ("eval_kl", False), ("eval_loss", False)],
)
def test_the_direction_of_a_metric(metric, greater) -> None:
    args = DPOConfig(output_dir="out", use_cpu=True, report_to="none", metric_for_best_model=metric)
    assert args.greater_is_better is greater


def test_options_that_need_other_datasets(tiny_llama, make_tokenizer, tmp_path) -> None:
    rows = id_pairs(4)

    def build(**changed: Any) -> Any:
        return ours(tiny_llama(), rows, make_tokenizer(), tmp_path, **{**EVALUATED, **changed})

    with pytest.raises(OptionError, match=r"sample_prompts=2 takes the prompts of eval_dataset.*eval_strategy"):
        build(sample_prompts=2, eval_strategy="no")
    with pytest.raises(OptionError, match=r"'eval_rewards/margins' is not what .*: set one of eval_a_"):
        build(early_stopping_patience=1, eval_dataset={"a": rows, "b": rows})
    with pytest.raises(OptionError, match=r"'eval_kl' is not what .* set one of eval_accuracies/"):
        build(metric_for_best_model="kl", loss_type="simpo", eval_dataset=rows)
    build(early_stopping_patience=1, eval_dataset={"a": rows, "b": rows}, metric_for_best_model="eval_b_loss")


# ---- Where people see samples ---------------------------------------------------------------------------------------

ROWS = [
    {"step": 3, "prompt_number": 0, "prompt": "a | b\nc", "completion": "x" * 500, "tokens": 9, "finished": False},
    {"step": 3, "prompt_number": 1, "prompt": "p", "completion": "q", "tokens": 1, "finished": True},
]


def test_samples_in_the_log_are_short() -> None:
    text = in_short(ROWS * 9)
    assert text.count("\n") == 5 and "> a | b c\n" in text and "x" * 240 + " ... [cut]" in text and "\n  q" in text


class Writer:
    """What the callbacks of transformers hold of a tracker, noting what it is sent."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def add_text(self, *args: Any) -> None:
        self.sent.append(args)

    def log(self, values: Any) -> None:
        self.sent.append(values)

    class Table:
        def __init__(self, **content: Any):
            self.content = content


def tracker(name: str, **attributes: Any) -> Any:
    return type(name, (TrainerCallback,), attributes)()


def test_trackers_that_run_get_a_table() -> None:
    board, wandb, trackio, off = Writer(), Writer(), Writer(), Writer()
    callbacks = [
        tracker("TensorBoardCallback", tb_writer=board),
        tracker("TensorBoardCallback", tb_writer=None),
        tracker("WandbCallback", _wandb=wandb, _initialized=True),
        tracker("WandbCallback", _wandb=off, _initialized=False),
        tracker("TrackioCallback", _trackio=trackio, _initialized=True),
        tracker("SomeCallback"),
    ]
    send_table(callbacks, ROWS, 3)
    name, table, step = board.sent[0]
    assert (name, step) == ("samples", 3) and table.splitlines()[1] == "| --- | --- | --- | --- | --- | --- |"
    assert table.splitlines()[2].startswith(r"| 3 | 0 | a \| b<br>c | xxx") and len(table.splitlines()) == 4
    assert wandb.sent[0]["samples"].content["data"][1] == [3, 1, "p", "q", 1, True]
    assert trackio.sent[0]["samples"].content["dataframe"].loc[1, "completion"] == "q"
    assert wandb.sent[0]["train/global_step"] == trackio.sent[0]["train/global_step"] == 3 and not off.sent
    send_table(callbacks, [], 3)
    assert len(board.sent) == 1
