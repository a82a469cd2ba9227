"""What a run does with the memory it has: decisions by hand on a small model's predictions, and in training."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_helpers import adapter_weights, id_pairs, ours, step_logs

from dpo_peft.errors import OptionError
from dpo_peft.forward import Sample, pack
from dpo_peft.planning import GIB, PRESETS, MemoryModel, Shape
from dpo_peft.training.memory_budget import MemoryBudget, memory_limit
from dpo_peft.training.packing import level_bins

SHAPE = Shape.llama(hidden=64, intermediate=128, layers=4, heads=4, kv_heads=2, vocab=320)
MEMORY = MemoryModel.of_shape(SHAPE, element=4)
BATCH = pack([Sample([1] * 30, [[2] * 20, [3] * 25])])
SIZE = (75, 135, 45)  # tokens; keys 30 + 50 + 55; predicted


def budget(limit: float, layers: int | str = "auto", tokens: int | str | None = None) -> MemoryBudget:
    return MemoryBudget(MEMORY, limit, layers, tokens, 1)


def test_as_few_layers_are_checkpointed_as_fit() -> None:
    for layers in range(4):
        exact = MEMORY.peak(*SIZE, layers)
        assert budget(exact).checkpointed(BATCH)[0] == layers
        assert budget(exact - 1).checkpointed(BATCH)[0] > layers
    assert budget(0).checkpointed(BATCH) == (4, 0)
    assert budget(0, layers=2).checkpointed(BATCH) == (2, 0)


def test_micro_batches_that_fit() -> None:
    """Four equal samples: with room for two at a time and no more, two micro-batches."""
    samples = [SIZE] * 4
    room = MEMORY.peak(*(2 * n for n in SIZE), 3)
    assert MEMORY.peak(*(3 * n for n in SIZE), 4) > room
    assert budget(room, tokens="auto").microbatch_tokens(samples) == 2 * SIZE[0]
    assert budget(10 * GIB, tokens="auto").microbatch_tokens(samples) == 4 * SIZE[0]
    assert budget(room, tokens=100).microbatch_tokens(samples) == 100


def test_a_row_of_6000_tokens_among_short_ones_fits_a_gpu_of_24_gb() -> None:
    """8B, 16 pairs a step of about 800 tokens and one outlier: every micro-batch's predicted peak keeps within 95 % of
    what the GPU has, however the lengths fall; most are run without checkpoints, the long ones with."""
    memory = MemoryModel.of_shape(PRESETS["8b"][1])
    limit = 0.95 * 22.9 * GIB
    decide = MemoryBudget(memory, limit, "auto", "auto", 1)
    draw, layers = random.Random(0), []
    for _ in range(40):
        pairs = [tuple(int(draw.lognormvariate(5.2, 0.7)) + 8 for _ in range(3)) for _ in range(15)]
        pairs.append((4096, draw.randrange(800, 1100), draw.randrange(800, 1100)))
        samples = [(p + a + b, 3 * p + a + b, a + b) for p, a, b in pairs]
        bins = level_bins([tokens for tokens, _, _ in samples], decide.microbatch_tokens(samples))
        for rows in bins:
            tokens, keys, predicted = (sum(samples[i][k] for i in rows) for k in range(3))
            layers.append(memory.checkpoint_layers_for(tokens, keys, predicted, limit))
            assert memory.peak(tokens, keys, predicted, layers[-1]) <= limit
            if 15 in rows:
                assert layers[-1] > 0
    assert min(layers) == 0


def test_what_is_not_known_or_not_there() -> None:
    with pytest.raises(OptionError, match="max_tokens_per_microbatch='auto': the planner does not know"):
        MemoryBudget(None, 1.0, "auto", "auto", 1)
    with pytest.raises(OptionError, match="checkpoint_layers=5: the model has 4 layers"):
        budget(1.0, layers=5)
    assert MemoryBudget(None, 1.0, "auto", None, 1).checkpointed(BATCH) >= (4, 0)


def test_after_running_out_of_memory_the_limit_is_below_what_was_held() -> None:
    one = budget(100.0)
    assert one.tighten(80.0) and one.limit == 72.0
    assert not one.tighten(80.0) and one.limit == 72.0  # it has been tried
    assert not one.tighten(0.0)
    assert not budget(100.0, layers=1).tighten(80.0)


def test_the_limit() -> None:
    assert memory_limit(torch.device("cpu"), 1.5, 0) == 1.5 * GIB
    free = memory_limit(torch.device("cpu"), None, 0)
    assert memory_limit(torch.device("cpu"), None, GIB) - free == pytest.approx(GIB, rel=0.5) and free > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_process_that_may_use_part_of_a_gpu() -> None:
    device = torch.device("cuda", 0)
    whole = memory_limit(device, None, 0)
    torch.cuda.set_per_process_memory_fraction(0.1)
    try:
        assert memory_limit(device, None, 0) < 0.2 * whole
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("given", [{"checkpoint_layers": 1}, {"max_memory_gib": 3.0}, {"activation_offloading": True}])
def test_options_of_fused_layers_are_refused_on_the_models_own(
    given: dict[str, Any], tiny_llama: Any, make_tokenizer: Any, tmp_path: Path
) -> None:
    options = {"gradient_checkpointing": True, "fused_layers": False, **given}
    with pytest.raises(OptionError, match=f"{next(iter(given))}: for fused layers.*fused_layers=False"):
        ours(tiny_llama(), id_pairs(8), make_tokenizer(), tmp_path, **options)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"checkpoint_layers": 1}, "checkpoint_layers: no effect without gradient_checkpointing"),
        ({"activation_offloading": True}, "activation_offloading: no effect without gradient_checkpointing"),
        ({"max_memory_gib": 3.0}, "max_memory_gib=3.0 has no effect: nothing is 'auto'"),
        ({"gradient_checkpointing": True, "checkpoint_layers": -1}, "checkpoint_layers=-1 must be"),
        ({"gradient_checkpointing": True, "checkpoint_layers": "some"}, "checkpoint_layers='some' must be"),
        ({"gradient_checkpointing": True, "max_memory_gib": 0}, "max_memory_gib=0 must be a number above 0"),
        ({"gradient_checkpointing": True, "activation_offloading": True}, "no effect on a CPU"),
        ({"gradient_checkpointing": True, "checkpoint_layers": 9}, "checkpoint_layers=9: the model has 2 layers"),
        ({"fused_layers": "yes"}, "fused_layers='yes' must be True, False or None"),
    ],
    ids=str,
)
def test_options_that_make_no_sense(
    given: dict[str, Any], message: str, tiny_llama: Any, make_tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=message):
        ours(tiny_llama(), id_pairs(8), make_tokenizer(), tmp_path, **given)


def test_a_step_that_runs_out_is_repeated_with_more_layers_checkpointed(
    tiny_llama: Any, make_tokenizer: Any, tmp_path: Path, monkeypatch: Any, caplog: Any
) -> None:
    """The second step fails once while "the GPU" holds 1 MiB: no micro-batch is halved, and the run is the same."""
    rows, tokenizer = id_pairs(24, seed=5), make_tokenizer()
    options = {"max_steps": 3, "per_device_train_batch_size": 8, "gradient_checkpointing": True}
    straight = ours(tiny_llama(), rows, tokenizer, tmp_path / "a", **options)
    straight.train()
    run = ours(tiny_llama(), rows, tokenizer, tmp_path / "b", **options)
    policy, seen = run.policy_logps, []

    def fail_once(batch: Any) -> Any:
        seen.append(run.step.budget.checkpointed(batch))
        if len(seen) == 2:
            raise torch.OutOfMemoryError("planted")
        return policy(batch)

    tighten = run.step.budget.tighten
    monkeypatch.setattr(run, "policy_logps", fail_once)
    monkeypatch.setattr(run.step.budget, "tighten", lambda held: tighten(2**20))
    run.train()
    assert seen == [(0, 0), (0, 0), (2, 0), (2, 0)] and run.step.halvings == 0 and "keep within 0.0 GiB" in caplog.text
    assert [log["loss"] for log in step_logs(run)] == [log["loss"] for log in step_logs(straight)]
    for name, weight in adapter_weights(run).items():
        assert torch.equal(weight, adapter_weights(straight)[name])
