"""What can go wrong while a run goes on: memory, numbers, signals, disks, damaged files. Nothing saved is lost, and
the message says what happened and what to do.
"""

import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import REPO
from peft import get_peft_model
from safetensors.torch import load_file
from trainer_helpers import adapter_weights, id_pairs, lora, ours, step_logs, text_pairs
from transformers import Trainer, TrainerCallback

from dpo_peft import DPOConfig, NonFiniteError, trainer
from dpo_peft.errors import CheckpointError, OptionError, TrainingInterrupted
from dpo_peft.training.checkpoints import newest_whole, problem_with

ROWS = 12


def build(tiny_llama: Any, make_tokenizer: Any, folder: Path, **changed: Any) -> Any:
    options = {"per_device_train_batch_size": 4, "max_steps": 4, **changed}
    rows = id_pairs(options.pop("rows", ROWS))
    return ours(tiny_llama(), rows, make_tokenizer(), folder, **options)


def largest_weight_difference(a: Any, b: Any) -> float:
    expected = adapter_weights(b)
    return max(float((weight - expected[name]).abs().max()) for name, weight in adapter_weights(a).items())


# ---- Out of memory --------------------------------------------------------------------------------------------------


def limit_memory(monkeypatch: pytest.MonkeyPatch, rows: int) -> list[int]:
    """The policy's forward pass holds so many rows at most. Returns the rows of each pass that went through."""
    sizes: list[int] = []
    forward = trainer.completion_logps

    def limited(model: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        if batch.num_samples > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        sizes.append(batch.num_samples)
        return forward(model, batch, *args, **kwargs)

    monkeypatch.setattr(trainer, "completion_logps", limited)
    return sizes


@pytest.mark.sampled(3)
@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "kto", "aot", "sft"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_out_of_memory_halves_and_repeats(
    tiny_llama, make_tokenizer, tmp_path, monkeypatch, caplog, loss, accumulation
):
    options = {"loss_type": loss, "gradient_accumulation_steps": accumulation, "rows": 16}
    if loss == "kto":
        rows = [{"prompt_ids": r["prompt_ids"], "completion_ids": r["chosen_ids"], "label": i % 3 > 0}
                for i, r in enumerate(id_pairs(16))]  # fmt: skip
        from datasets import Dataset

        monkeypatch.setattr(sys.modules[__name__], "id_pairs", lambda number: Dataset.from_list(rows))
    straight = build(tiny_llama, make_tokenizer, tmp_path / "straight", **options)
    straight.train()
    sizes = limit_memory(monkeypatch, rows=2)
    halved = build(tiny_llama, make_tokenizer, tmp_path / "halved", **options)
    with caplog.at_level(logging.WARNING):
        halved.train()
    assert halved.step.halvings == 1
    assert set(sizes) == {2}
    warnings = [r.getMessage() for r in caplog.records if "Out of memory with 4 rows" in r.getMessage()]
    assert len(warnings) == 1 and "run in 2 parts" in warnings[0]  # remembered: it happens once
    assert largest_weight_difference(halved, straight) < 1e-5
    for a, b in zip(step_logs(halved), step_logs(straight), strict=True):
        for name in ("loss", "grad_norm", "rewards/chosen", "logps/chosen"):
            assert a.get(name, 0.0) == pytest.approx(b.get(name, 0.0), rel=1e-4, abs=2e-6), name


def test_out_of_memory_in_the_middle_of_a_backward_pass(tiny_llama, make_tokenizer, tmp_path):
    """Some gradients of the second micro-batch are there already when it fails: they must not count twice."""
    options = {"gradient_accumulation_steps": 2, "rows": 16, "max_steps": 2}
    straight = build(tiny_llama, make_tokenizer, tmp_path / "straight", **options)
    straight.train()
    interrupted = build(tiny_llama, make_tokenizer, tmp_path / "interrupted", **options)
    calls = 0

    def fail_once(gradient: torch.Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    names = [name for name, p in interrupted.model.named_parameters() if p.requires_grad]
    middle = dict(interrupted.model.named_parameters())[names[len(names) // 2]]
    middle.register_hook(fail_once)
    interrupted.train()
    assert interrupted.step.halvings == 1
    assert largest_weight_difference(interrupted, straight) < 2e-6
    assert [a["loss"] for a in step_logs(interrupted)] == pytest.approx([b["loss"] for b in step_logs(straight)])


def test_the_comparison_tells_a_step_that_kept_its_gradients(tiny_llama, make_tokenizer, tmp_path, monkeypatch):
    options = {"gradient_accumulation_steps": 2, "rows": 16, "max_steps": 1, "max_grad_norm": 0.0}
    options |= {"optim": "sgd", "learning_rate": 1.0}
    straight = build(tiny_llama, make_tokenizer, tmp_path / "straight", **options)
    straight.train()
    broken = build(tiny_llama, make_tokenizer, tmp_path / "broken", **options)
    backward, passes = Trainer.training_step, []

    def fail_after(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        loss = backward(self, model, *args, **kwargs)
        passes.append(loss)
        if len(passes) == 2:
            raise torch.OutOfMemoryError("late")
        return loss

    monkeypatch.setattr(Trainer, "training_step", fail_after)
    monkeypatch.setattr(broken.model, "zero_grad", lambda set_to_none=True: None)
    broken.train()
    assert largest_weight_difference(broken, straight) > 1e-4


def test_one_row_that_does_not_fit(tiny_llama, make_tokenizer, tmp_path, monkeypatch):
    limit_memory(monkeypatch, rows=0)
    model = build(tiny_llama, make_tokenizer, tmp_path)
    with pytest.raises(torch.OutOfMemoryError, match="single row.*Lower max_length"):
        model.train()


def test_a_coupled_loss_is_not_cut_under_dropout(tiny_llama, make_tokenizer, tmp_path, monkeypatch):
    """Its pass over the whole batch and the one with gradients would draw different masks."""
    limit_memory(monkeypatch, rows=2)
    model = build(tiny_llama, make_tokenizer, tmp_path, loss_type="aot", disable_dropout=False)
    with pytest.raises(torch.OutOfMemoryError, match="couples its batch.*Lower per_device_train_batch_size"):
        model.train()


def test_halving_is_remembered_by_a_checkpoint(tiny_llama, make_tokenizer, tmp_path, monkeypatch):
    with monkeypatch.context() as limited:
        limit_memory(limited, rows=1)
        build(tiny_llama, make_tokenizer, tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()
    resumed = build(tiny_llama, make_tokenizer, tmp_path, max_steps=4)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.step.halvings == 2  # 4 rows, 2, 1


# ---- Numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.attack("weights not finite")
@pytest.mark.parametrize("strategy", ["steps", "no"])
def test_a_row_that_gives_nan(tiny_llama, make_tokenizer, tmp_path, monkeypatch, strategy):
    forward = trainer.completion_logps

    def poisoned(model: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        scores = forward(model, batch, *args, **kwargs)
        bad_C = (batch.rows == 7)[batch.sample_of]
        return type(scores)(scores.token_logps_N, scores.logps_C.masked_fill(bad_C, float("nan")), None)

    model = build(tiny_llama, make_tokenizer, tmp_path, save_strategy=strategy, save_steps=1, max_steps=9)
    monkeypatch.setattr(trainer, "completion_logps", poisoned)
    with pytest.raises(NonFiniteError, match=r"the loss is not finite, on training rows 7\.") as raised:
        model.train()
    step = model.state.global_step if strategy == "steps" else 0  # steps that were taken and saved
    found, passed_over = newest_whole(tmp_path)
    assert not passed_over and (found is None) == (step == 0) == ("the last checkpoint" not in str(raised.value))
    assert step == 0 or found.name == f"checkpoint-{step}"


class Breaks(torch.optim.SGD):
    """An optimizer that puts something into the weights of a step."""

    def __init__(self, *args: Any, at: int, value: float, **options: Any):
        super().__init__(*args, **options)
        self.at, self.value, self.steps = at, value, 0

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        self.steps += 1
        if self.steps == self.at:
            with torch.no_grad():
                self.param_groups[0]["params"][3][0, 0] = self.value


@pytest.mark.attack("weights not finite")
@pytest.mark.parametrize(("value", "steps"), [(math.nan, 2), (math.inf, 2), (math.nan, 9), (1e30, 2)])
def test_a_step_that_breaks_the_weights(tiny_llama, make_tokenizer, tmp_path, value: float, steps: int) -> None:
    """The loss and the gradients before it were fine; nothing of it is saved, at the last step neither. Numbers that
    are large and finite pass."""
    base = get_peft_model(tiny_llama(), lora())
    optimizer = Breaks([p for p in base.parameters() if p.requires_grad], lr=1e-3, at=2, value=value)
    given = {"optimizers": (optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0))}
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": steps, **given}
    trainer = ours(base, text_pairs(8), make_tokenizer(), tmp_path, **options)
    if math.isfinite(value):
        trainer.train()
        return
    with pytest.raises(NonFiniteError, match=r"Step 2 made 1 of \d+ trained tensors NaN or infinite, .*before it"):
        trainer.train()
    found, passed_over = newest_whole(tmp_path)
    assert found.name == "checkpoint-1" and not passed_over and not (tmp_path / "adapter_model.safetensors").exists()
    assert all(tensor.isfinite().all() for tensor in load_file(found / "adapter_model.safetensors").values())


# ---- Signals --------------------------------------------------------------------------------------------------------


class SignalAt(TrainerCallback):
    """Sends this process a signal in the middle of a step."""

    def __init__(self, step: int, number: int):
        self.step, self.number = step, number

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.attack("killed while writing")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends(tiny_llama, make_tokenizer, tmp_path, caplog, number):
    options = {"gradient_accumulation_steps": 2, "rows": 16, "max_steps": 5}
    straight = build(tiny_llama, make_tokenizer, tmp_path / "straight", **options)
    straight.train()
    before = signal.getsignal(number)
    told = build(tiny_llama, make_tokenizer, tmp_path / "told", callbacks=[SignalAt(2, number)], **options)
    with caplog.at_level(logging.WARNING), pytest.raises(TrainingInterrupted) as raised:
        told.train()
    assert raised.value.code == 128 + number
    assert signal.getsignal(number) == before
    assert told.state.global_step == 3 and problem_with(tmp_path / "told" / "checkpoint-3") is None
    assert any("after step 3; checkpoint-3 is saved" in r.getMessage() for r in caplog.records)
    resumed = build(tiny_llama, make_tokenizer, tmp_path / "told", **options)
    resumed.train(resume_from_checkpoint="latest")
    assert largest_weight_difference(resumed, straight) == 0
    assert [log["loss"] for log in step_logs(resumed)] == [log["loss"] for log in step_logs(straight)]


def test_a_signal_saves_where_an_evaluation_decides_otherwise(tiny_llama, make_tokenizer, tmp_path):
    """With save_strategy="best" a worse evaluation takes back the wish to save."""
    options = {"save_strategy": "best", "metric_for_best_model": "loss", "greater_is_better": False, "eval_steps": 1}
    options |= {"eval_strategy": "steps", "eval_dataset": id_pairs(4, seed=2), "gradient_accumulation_steps": 2}
    told = build(tiny_llama, make_tokenizer, tmp_path, callbacks=[SignalAt(2, signal.SIGTERM)], rows=16, **options)
    told._determine_best_metric = lambda metrics, trial: False
    with pytest.raises(TrainingInterrupted):
        told.train()
    assert problem_with(tmp_path / "checkpoint-3") is None


def test_a_signal_after_the_last_step_is_not_lost(tiny_llama, make_tokenizer, tmp_path):
    class AtTheEnd(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            os.kill(os.getpid(), signal.SIGTERM)

    told = build(tiny_llama, make_tokenizer, tmp_path, callbacks=[AtTheEnd()])
    with pytest.raises(TrainingInterrupted):
        told.train()
    assert problem_with(tmp_path / "checkpoint-4") is None


@pytest.mark.attack("killed while writing")
def test_a_second_signal_acts_at_once(tiny_llama, make_tokenizer, tmp_path):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process of pytest-xdist ignores Ctrl-C

    class Twice(SignalAt):
        def on_substep_end(self, *args, **kwargs):
            super().on_substep_end(*args, **kwargs)
            super().on_substep_end(*args, **kwargs)

    options = {"gradient_accumulation_steps": 2, "rows": 16, "callbacks": [Twice(1, signal.SIGINT)]}
    model = build(tiny_llama, make_tokenizer, tmp_path, **options)
    try:
        with pytest.raises(KeyboardInterrupt):
            model.train()
    finally:
        signal.signal(signal.SIGINT, before)
    assert not list(tmp_path.glob("checkpoint-*"))


# ---- Disks ----------------------------------------------------------------------------------------------------------


@pytest.mark.attack("full disk")
@pytest.mark.slow
@pytest.mark.sampled(99, slow=4)
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt", "trainer_state.json", "run_state.json"])
def test_a_disk_that_fills_up(tiny_llama, make_tokenizer, tmp_path, monkeypatch, name):
    """A limit on the size of files stands in for the disk: writing beyond it fails as on a full one."""
    code = (
        "import resource, signal, sys; sys.argv = ['x']\n"
        "import conftest, test_faults as t\n"
        f"t.fill_up({str(tmp_path)!r}, {name!r})\n"
    )
    tests = REPO / "tests"
    path = REPO, tests, tests / "helpers", tests / "training"
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPO,
        env={**os.environ, "PYTHONPATH": ":".join(map(str, path))},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def fill_up(folder: str, name: str) -> None:
    """Train in this process with a first checkpoint that fits and a second whose file `name` does not."""
    import resource

    from conftest import make_tokenizer as tokenizers
    from conftest import tiny_llama as models

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    tiny, make = models.__wrapped__(), tokenizers.__wrapped__()
    run = build(tiny, make, Path(folder), save_strategy="steps", save_steps=1)

    class Fill(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                sizes = {p.name: p.stat().st_size for p in Path(folder, "checkpoint-1").iterdir()}
                # Just below the file's size: all smaller ones are still written.
                resource.setrlimit(resource.RLIMIT_FSIZE, (sizes[name] - 1, resource.RLIM_INFINITY))

    run.add_callback(Fill())
    try:
        run.train()
    except CheckpointError as error:
        message = str(error)
    else:
        raise AssertionError("the second checkpoint was written")
    assert "checkpoint-2 can't be written" in message and "checkpoint-1" in message and "Free some space" in message
    assert problem_with(Path(folder, "checkpoint-1")) is None
    assert sorted(p.name for p in Path(folder).iterdir()) == ["checkpoint-1"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    again = build(tiny, make, Path(folder), save_strategy="steps", save_steps=1)
    again.train(resume_from_checkpoint="latest")
    assert again.state.global_step == 4 and problem_with(Path(folder, "checkpoint-4")) is None


# ---- Damaged checkpoints --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tiny_llama, make_tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    build(tiny_llama, make_tokenizer, folder, save_strategy="steps", save_steps=2).train()
    return folder


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


DAMAGES = {
    "truncated safetensors": (truncate, "adapter_model.safetensors", r"adapter_model\.safetensors"),
    "changed optimizer": (flip, "optimizer.pt", r"optimizer\.pt"),
    "no scheduler": (Path.unlink, "scheduler.pt", r"scheduler\.pt"),
    "no manifest": (Path.unlink, "manifest.json", r"manifest"),
}


@pytest.mark.attack("damaged or mixed files")
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(tiny_llama, make_tokenizer, saved, tmp_path, caplog, damage):
    change, name, message = DAMAGES[damage]
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    change(folder / "checkpoint-4" / name)
    with pytest.raises(CheckpointError, match=rf"checkpoint-4.*{message}.*newest whole checkpoint is.*checkpoint-2"):
        build(tiny_llama, make_tokenizer, folder).train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    resumed = build(tiny_llama, make_tokenizer, folder)
    with caplog.at_level(logging.WARNING):
        resumed.train(resume_from_checkpoint=True)
    assert [r for r in caplog.records if "checkpoint-4 is passed over" in r.getMessage()]
    assert resumed.state.global_step == 4
    change(folder / "checkpoint-2" / name)
    with pytest.raises(CheckpointError, match="none of its 2 checkpoints is whole"):
        build(tiny_llama, make_tokenizer, folder).train(resume_from_checkpoint="latest")


def test_latest_without_checkpoints_starts_from_scratch(tiny_llama, make_tokenizer, tmp_path, caplog):
    model = build(tiny_llama, make_tokenizer, tmp_path, max_steps=1, resume_from_checkpoint="latest")
    with caplog.at_level(logging.INFO):
        model.train()
    assert model.state.global_step == 1
    assert any("No checkpoint in" in r.getMessage() for r in caplog.records)
    with pytest.raises(CheckpointError, match="it holds no checkpoint"):
        build(tiny_llama, make_tokenizer, tmp_path).train(resume_from_checkpoint=True)


# ---- Options that changed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"learning_rate": 5e-4}, r"learning_rate: 0\.001 before, 0\.0005 now"),
        ({"weight_decay": 0.1}, r"weight_decay"),
        ({"peft_config": lora(lora_alpha=16)}, r"peft_config\.lora_alpha: 8 before, 16 now"),
        ({"peft_config": lora(target_modules=["q_proj"])}, r"peft_config\.target_modules"),
    ],
)
def test_an_option_that_the_checkpoint_overrules(tiny_llama, make_tokenizer, saved, changed, message):
    with pytest.raises(OptionError, match=message):
        build(tiny_llama, make_tokenizer, saved, **changed).train(str(saved / "checkpoint-2"))


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"beta": 0.3}, "beta: 0.1 before, 0.3 now"),
        ({"seed": 4}, "seed: 3 before, 4 now"),
        ({"rows": ROWS + 1}, "train_dataset: '12 rows"),
        ({"logging_steps": 2, "save_steps": 7, "dataset_num_proc": 1}, None),
        ({}, None),
    ],
)
def test_an_option_that_changes_the_run_is_named(
    tiny_llama, make_tokenizer, saved, tmp_path, caplog, changed, message
):
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    with caplog.at_level(logging.WARNING):
        build(tiny_llama, make_tokenizer, folder, **changed).train(str(folder / "checkpoint-2"))
    said = [r.getMessage() for r in caplog.records if "options that change the run" in r.getMessage()]
    assert (message in said[0]) if message else not said


def test_a_run_that_began_with_the_old_default_of_learning_rate_is_resumed(tiny_llama, make_tokenizer, tmp_path):
    """Without the option, as its script leaves it; to the same weights, and with the old rate in its checkpoints."""
    saves = {"save_strategy": "steps", "save_steps": 2}
    straight = build(tiny_llama, make_tokenizer, tmp_path, learning_rate=1e-6, **saves)
    straight.train()
    resumed = build(tiny_llama, make_tokenizer, tmp_path, learning_rate=DPOConfig.learning_rate)
    resumed.train(str(tmp_path / "checkpoint-2"))
    expected = adapter_weights(straight)
    assert all(torch.equal(weight, expected[name]) for name, weight in adapter_weights(resumed).items())
    assert resumed.trajectory()["learning_rate"] == 1e-6
    # Any other rate than the default was asked for.
    with pytest.raises(OptionError, match=r"learning_rate: 1e-06 before, 3e-05 now"):
        build(tiny_llama, make_tokenizer, tmp_path, learning_rate=3e-5).train(str(tmp_path / "checkpoint-2"))


def test_the_base_of_an_objective_without_reference(tiny_llama, make_tokenizer, tmp_path):
    options = {"loss_type": "simpo", "save_strategy": "steps", "save_steps": 2}
    build(tiny_llama, make_tokenizer, tmp_path, **options).train()
    other = ours(tiny_llama(seed=1), id_pairs(ROWS), make_tokenizer(), tmp_path, max_steps=4, loss_type="simpo")
    with pytest.raises(OptionError, match="base model: .* before, .* now"):
        other.train(str(tmp_path / "checkpoint-2"))


def test_a_checkpoint_without_optimizer(tiny_llama, make_tokenizer, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "save_only_model": True}
    build(tiny_llama, make_tokenizer, tmp_path, **options).train()
    with pytest.raises(CheckpointError, match="save_only_model"):
        build(tiny_llama, make_tokenizer, tmp_path).train(resume_from_checkpoint=True)
    assert json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())["global_step"] == 2
