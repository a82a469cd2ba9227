"""T8 by force: a run that is killed by SIGKILL and resumed ends, bit for bit, as the run that nobody kills.

A few kills for each kind of run, of steps, saves and evaluations; `benchmarks/kills.py` does hundreds. What the
comparison would miss is shown by breaking the resume on purpose.
"""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kill_harness import Kill, Phase, Run, Torturer, differences, same_bits
from kill_scenarios import SCENARIOS, STEPS, make_base
from transformers.trainer_utils import get_last_checkpoint

from dpo_peft.training.checkpoints import MANIFEST, commit, staging_folder

pytestmark = pytest.mark.slow

# A checkpoint is there when the second save begins, so that there is something to go on from.
SECOND_SAVE = Kill(Phase.SAVING, 2, 0.5)
STEP = Kill(Phase.STEP, 2, 0.5)
EVALUATION = Kill(Phase.EVALUATING, 1, 0.5)
LAST_MOMENTS = {"cached": EVALUATION, "nf4": EVALUATION}
SHORT = [name for name in SCENARIOS if name not in ("continued-nf4", "precomputed")]


@pytest.fixture(scope="module")
def torturer(tmp_path_factory) -> Callable[[str], Torturer]:
    """`torturer(scenario)`: with its straight run done, once for all tests."""
    base, runs = make_base(tmp_path_factory.mktemp("base")), tmp_path_factory.mktemp("runs")
    made: dict[str, Torturer] = {}

    def get(name: str) -> Torturer:
        if name not in made:
            made[name] = Torturer(SCENARIOS[name], base, runs)
        return made[name]

    return get


def told(run: Run) -> str:
    return "\n".join([*map(str, run.attempts), *run.differences[:12], f"{len(run.differences)} differences"])


def assert_identical(run: Run) -> None:
    same = not run.differences
    assert same, told(run)


@pytest.mark.attack("killed while writing")
@pytest.mark.sampled(99, slow=2)
@pytest.mark.parametrize("name", SHORT)
def test_killed_equals_straight(torturer, name):
    assert torturer(name).straight["step"] == STEPS
    run = torturer(name).torture(0, [SECOND_SAVE, LAST_MOMENTS.get(name, STEP)])
    assert_identical(run)
    assert len(run.killed) == 2 and run.attempts[-1].resumed_at >= 3, told(run)


@pytest.mark.attack("damaged or mixed files")
def test_damaged_checkpoint_is_passed_over(torturer):
    run = torturer("float32").torture(1, [Kill(Phase.SAVING, 3, 0.5), Kill(Phase.SAVING, 2, 0.0)], damage=1.0)
    assert_identical(run)
    first, second, *_ = run.attempts
    assert first.damaged and second.expected == 3 and second.resumed_at == 3, told(run)


@pytest.mark.attack("killed while writing")
def test_killed_after_the_last_step(torturer):
    run = torturer("float32").torture(2, [Kill(Phase.ENDING, 1, 0.0)])
    assert_identical(run)
    assert run.attempts[-1].resumed_at == STEPS, told(run)


# ---- What the comparison finds --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lost", "kind"),
    [
        ("_load_rng_state", "weights"),
        ("_load_optimizer_and_scheduler", "optimizer"),
        ("_load_from_checkpoint", "logs"),
    ],
)
def test_resume_without_a_part_is_found(torturer, lost, kind):
    def forget(trainer: Any) -> None:
        setattr(trainer, lost, lambda *args, **kwargs: None)

    run = torturer("float32").torture(f"no {lost}", [Kill(Phase.STEP, 5, 0.0)], spoil=forget)
    assert run.attempts[-1].resumed_at == 3, told(run)
    assert any(line.startswith(kind) for line in run.differences), told(run)


def test_earlier_checkpoint_passed_off_as_later_is_found(torturer):
    def pass_off(run: Path) -> str:
        early, late = run / "checkpoint-3", run / "checkpoint-6"
        if late.is_dir():
            staged = staging_folder(run, 6) / late.name
            shutil.copytree(early, staged, ignore=shutil.ignore_patterns(MANIFEST), dirs_exist_ok=True)
            shutil.copy(late / "trainer_state.json", staged)
            commit(run, 6)
        return "latest"

    run = torturer("float32").torture("passed off", [Kill(Phase.STEP, 8, 0.0)], resume=pass_off)
    assert run.attempts[-1].resumed_at == 6, told(run)
    assert any(line.startswith("weights") for line in run.differences), told(run)
    assert any(line.startswith("optimizer") for line in run.differences), told(run)


def test_writing_in_place_is_found(torturer):
    """Half a checkpoint under its name, and a resume that takes it: only a kill within a save does harm."""

    def write_in_place(trainer: Any) -> None:
        run = Path(trainer.args.output_dir)
        state = trainer.run_state

        def save(owner: Any) -> None:
            state.write_files(owner, run / f"checkpoint-{owner.state.global_step}", [state.metrics.state()])

        state.save_checkpoint = save
        state.find = lambda resume: get_last_checkpoint(str(run))

    run = torturer("float32").torture("in place", [Kill(Phase.STEP, 5, 0.0)], spoil=write_in_place)
    assert_identical(run)
    assert run.attempts[-1].resumed_at == 3, told(run)
    for share in (0.2, 0.1, 0.4, 0.3, 0.0):  # a moment may miss the save
        moments = [Kill(Phase.SAVING, 2, share)]
        run = torturer("float32").torture(f"in place {share}", moments, spoil=write_in_place)
        if run.differences:
            break
    assert run.killed[0].phase is Phase.SAVING and run.differences, told(run)


def test_differences_are_found_to_the_bit():
    result = {
        "step": 2,
        "weights": {"a": torch.zeros(3), "b": torch.tensor([1.0, float("nan")])},
        "optimizer": {"0.step": torch.tensor(2.0)},
        "logs": [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}],
    }

    def changed(change: Callable[[dict[str, Any]], Any]) -> list[str]:
        other = copy.deepcopy(result)
        change(other)
        return differences(result, other)

    assert changed(lambda other: None) == []
    assert changed(lambda other: other["weights"]["a"][1:2].neg_()) == ["weights: a differs"]  # 0 and -0
    assert changed(lambda other: other["weights"].update(a=torch.zeros(3).double())) == ["weights: a differs"]
    assert changed(lambda other: other["weights"].pop("b")) == ["weights: b is in one only"]
    assert changed(lambda other: other["optimizer"]["0.step"].add_(1)) == ["optimizer: 0.step differs"]
    assert changed(lambda other: other["logs"].pop()) == ["logs: 1 lines, not 2"]
    assert changed(lambda other: other.update(step=3)) == ["ended at step 3, not 2"]
    assert changed(lambda other: other["logs"][1].update(loss=0.25 + 2**-54)) == [
        "logs: step 2: loss is 0.25000000000000006, not 0.25"
    ]
    assert not same_bits(torch.ones(2), torch.ones(2, 1))


def test_failing_attempt_is_told(torturer):
    def fail(trainer: Any) -> None:
        raise RuntimeError("on purpose")

    run = torturer("float32").torture("fails", 0, spoil=fail)
    assert len(run.differences) == 1 and "ended with 1" in run.differences[0] and "on purpose" in run.differences[0]
