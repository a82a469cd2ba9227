"""T8: an interrupted run is the straight run, bit for bit: weights, optimizer, order of rows, logged figures."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from trainer_helpers import StopAt, adapter_weights, history, id_pairs, lora, optimizer_tensors, ours
from transformers import set_seed

STEPS, STOP = 7, 3


def make(kind: str, base_folder: str, tiny_llama: Any, make_tokenizer: Any, folder: Path, **changed: Any) -> Any:
    options = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": STOP,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "eval_dataset": id_pairs(5, seed=9),
        # Dropout in the policy makes the state of the random numbers count.
        "disable_dropout": False,
        "rows": 10,
        **changed,
    }
    config, rows = lora(lora_dropout=0.2), id_pairs(options.pop("rows"))
    if kind == "nf4":
        return ours(base_folder, rows, None, folder, bf16=True, peft_config=config, **options)
    if kind == "named adapter":
        set_seed(0)
        model = get_peft_model(tiny_llama(), config, adapter_name="mine")
        return ours(model, rows, make_tokenizer(), folder, **options)
    if kind == "saved head":
        config = lora(lora_dropout=0.2, modules_to_save=["lm_head"])
    return ours(tiny_llama(), rows, make_tokenizer(), folder, peft_config=config, **options)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("kind", ["float32", "nf4", "named adapter", "saved head"])
def test_interrupted_equals_straight(base_folder, tiny_llama, make_tokenizer, tmp_path, kind):
    def build(name: str, **changed: Any) -> Any:
        return make(kind, base_folder, tiny_llama, make_tokenizer, tmp_path / name, **changed)

    straight = build("straight")
    straight.train()
    interrupted = build("interrupted", callbacks=[StopAt(STOP)])
    interrupted.train()
    assert interrupted.state.global_step == STOP
    resumed = build("interrupted")
    resumed.train(resume_from_checkpoint=True)

    assert resumed.state.global_step == STEPS
    expected = adapter_weights(straight)
    for name, weight in adapter_weights(resumed).items():
        assert weight.dtype == torch.float32 and torch.equal(weight, expected[name]), name
    for a, b in zip(optimizer_tensors(straight), optimizer_tensors(resumed), strict=True):
        assert torch.equal(a, b)
    assert history(resumed)[:-1] == history(straight)[:-1]  # the last line is the mean over this run's own steps
    assert any(not torch.equal(p, expected[name]) for name, p in adapter_weights(interrupted).items())


def test_resume_from_a_path(tiny_llama, make_tokenizer, tmp_path):
    def build(**changed: Any) -> Any:
        return make("float32", "", tiny_llama, make_tokenizer, tmp_path, **changed)

    straight = build()
    straight.train()
    for checkpoint in (STOP, 2 * STOP):
        resumed = build()
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{checkpoint}"))
        expected = adapter_weights(straight)
        assert all(torch.equal(weight, expected[name]) for name, weight in adapter_weights(resumed).items())
    # The comparison can fail: without the checkpoint's state of the random numbers the run is another.
    other = build()
    other._load_rng_state = lambda checkpoint: None
    other.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STOP}"))
    assert any(not torch.equal(weight, expected[name]) for name, weight in adapter_weights(other).items())


def test_logs_that_span_the_interruption(tiny_llama, make_tokenizer, tmp_path):
    """A log is the mean over the steps since the last one, those before an interruption included."""

    def build(name: str, **changed: Any) -> Any:
        changed = {"eval_strategy": "no", "logging_steps": 2, "rows": 12, **changed}
        return make("float32", "", tiny_llama, make_tokenizer, tmp_path / name, **changed)

    every_step = build("every", logging_steps=1)
    every_step.train()  # before the next is built: the random numbers of dropout go on from the constructor's seed
    straight = build("straight")
    expected = straight.train()
    build("interrupted", callbacks=[StopAt(STOP)]).train()
    resumed = build("interrupted")
    output = resumed.train(resume_from_checkpoint=True)
    assert history(resumed) == history(straight)
    names = ["loss", "rewards/chosen", "rewards/margins", "logps/rejected", "kl"]
    single = history(every_step)
    for log, steps in zip(history(resumed), [(1, 2), (3, 4), (5, 6)], strict=False):
        mean = {name: sum(single[step - 1][name] for step in steps) / len(steps) for name in names}
        assert {name: log[name] for name in names} == pytest.approx(mean, rel=1e-5)
    assert output.training_loss == expected.training_loss
    assert output.training_loss == pytest.approx(sum(log["loss"] for log in single[:STEPS]) / STEPS)
