"""Tokens a second and the share of the bound: by hand on a clock of the tests, and against what a run computed."""

import math
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forward_models import build
from peft import get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from trainer_helpers import adapter_weights, history, id_pairs, lora, ours
from transformers import PrinterCallback

from dpo_peft.training import throughput
from dpo_peft.training.throughput import Throughput, gpu_rate, passes_over_weights, weights_per_token


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def after(self, seconds: float, method: Any) -> Any:
        """The method, which takes so long."""

        def slow(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            self.now += seconds
            return result

        return slow


def needs(reference: bool = True, cached: bool = False) -> tuple[Any, Any]:
    args = SimpleNamespace(caches_reference=cached, device=torch.device("cpu"))
    return SimpleNamespace(needs_reference=reference), args


def batch(tokens: int, predicted: int, padding: int | None = None) -> dict[str, Any]:
    made = {"input_ids": torch.zeros(1, tokens + (padding or 0)), "target": torch.zeros(predicted)}
    mask = torch.tensor([[1] * tokens + [0] * (padding or 0)])
    return made if padding is None else {**made, "attention_mask": mask}


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> tuple[Throughput, Clock]:
    """70 weights that multiply every token, and 30 of a head."""
    monkeypatch.setattr(throughput, "weights_per_token", lambda model: (70.0, 30))
    monkeypatch.setattr(throughput, "share_below", lambda model: 0.5)
    clock = Clock()
    model: Any = SimpleNamespace(num_parameters=lambda **_: 100, modules=list)
    made = Throughput(model, *needs(), clock=clock)
    made.begin()
    made.rate, made._below = 61_080.0, 0.0
    return made, clock


def test_figures_by_hand(by_hand: tuple[Throughput, Clock]) -> None:
    made, clock = by_hand
    clock.now += 50  # samples before the first step
    made.count({"packs": [batch(40, 15), batch(12, 5, padding=8)]})
    clock.now += 2
    made.count({"packs": [batch(10, 5)]})
    clock.now += 2
    with made.apart():
        clock.now += 1  # the log waits for the GPU
        # 62 tokens, 25 of them predicted, in 5 s; 2 * 3 passes * (70 * 62 + 30 * 25) / 5 = 6,108 FLOP/s.
        assert made.figures() == pytest.approx({"tokens_per_second": 12.4, "share_of_bound": 0.1})
        clock.now += 30  # an evaluation
    clock.now += 1  # reading rows
    made.count({"packs": []})  # a process without a row
    made.count({"packs": [batch(100, 0)]})
    clock.now += 1
    with made.apart():
        clock.now += 7  # a checkpoint, and no log
    made.count({"packs": [batch(20, 20)]})
    clock.now += 1
    assert made.figures() == pytest.approx({"tokens_per_second": 40.0, "share_of_bound": 6 * 9000 / 3 / 61_080})
    assert (made.tokens, made.predicted, made.seconds) == (182, 45, 8)
    made.begin()  # of another run
    assert (made.tokens, made.seconds, made.rate) == (0, 0, None) and made.figures() == {}


def test_what_policy_and_reference_share_counts_once(by_hand: tuple[Throughput, Clock]) -> None:
    """20 of 50 tokens are left to the base; then half of the layers are below the adapter too."""
    made, clock = by_hand
    for below, products in ((0.0, 70 * (20 + 3 * 30)), (0.5, 70 * 20 + 35 * 30 + 3 * 35 * 30)):
        made._below = below
        made.count({"packs": [{**batch(50, 10), "alora_offsets": (30,)}]})
        clock.now += 1
        share = 2 * (products + 3 * 30 * 10) / 61_080
        assert made.figures() == pytest.approx({"tokens_per_second": 50.0, "share_of_bound": share})


def test_tokens_of_all_processes(by_hand: tuple[Throughput, Clock], monkeypatch: pytest.MonkeyPatch) -> None:
    made, clock = by_hand
    other = (38.0, 5.0, 0.0, 3 * 2**30)
    monkeypatch.setattr(throughput, "gather_over_processes", lambda own: [own, other])
    made.count({"packs": [batch(62, 25)]})
    clock.now += 10
    shares = {"share_of_bound": 6 * (70 * 100 + 30 * 30) / 10 / 61_080, "peak_memory_gib": 3.0}
    assert made.figures() == pytest.approx({"tokens_per_second": 10.0, **shares})


@pytest.mark.parametrize(("reference", "cached", "passes"), [(True, False, 3), (True, True, 2), (False, False, 2)])
def test_passes(reference: bool, cached: bool, passes: int) -> None:
    assert passes_over_weights(*needs(reference, cached)) == passes


@pytest.mark.parametrize("name", ["Llama", "tied", "Mixtral", "Qwen3Moe"])
def test_weights_are_those_that_torch_multiplies_by(name: str) -> None:
    """A forward pass of a model whose experts take two of four: its products, counted by torch, are 2 a weight."""
    model = build("Llama", {"tie_word_embeddings": True}) if name == "tied" else build(name)
    model.config._experts_implementation = "eager"
    peft_model = get_peft_model(model, lora())
    of_all, of_head = weights_per_token(peft_model) or (0, 0)
    norms = sum(p.numel() for p in model.parameters() if p.ndim == 1 and not p.requires_grad)
    with torch.no_grad(), peft_model.disable_adapter(), FlopCounterMode(display=False) as counted:
        model(input_ids=torch.arange(5, 12)[None])
    ops = counted.get_flop_counts()["Global"]
    products = sum(number for op, number in ops.items() if "mm" in str(op) and "bmm" not in str(op))
    assert 2 * 7 * (of_all - norms + of_head) == products


def test_models_whose_work_is_not_known() -> None:
    model = get_peft_model(build("Llama"), lora())
    model.config.num_experts_per_tok = 2  # but no experts are found
    assert weights_per_token(model) is None
    del model.config.num_experts_per_tok
    text, model.config.get_text_config = model.config.get_text_config(), lambda decoder: SimpleNamespace()
    assert text is model.config and weights_per_token(model) is None  # a tower beside the text


def test_the_rate_draws_no_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "PRODUCT", (64, 32, 16))
    before = torch.get_rng_state()
    assert (gpu_rate(torch.device("cpu")) or 0) > 0 and torch.equal(before, torch.get_rng_state())


# ---- In a run -------------------------------------------------------------------------------------------------------


def training_logs(trainer: Any) -> list[dict[str, float]]:
    return [log for log in trainer.state.log_history if "loss" in log]


def timed(model: Any, tokenizer: Any, folder: Any, **options: Any) -> tuple[Any, Clock, list[int]]:
    """A trainer, its clock (a micro-batch takes 1 s, an evaluation 100 s, a checkpoint 1,000 s, a logger 10,000 s),
    and the tokens of each pass of the policy: those that the embedding looks up with gradients on."""
    given = {
        "max_steps": 4,
        "logging_steps": 2,
        "eval_dataset": id_pairs(3),
        "eval_strategy": "steps",
        "eval_steps": 1,
    }
    given |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_strategy": "steps"}
    trainer = ours(model, id_pairs(32), tokenizer, folder, **{**given, "save_steps": 1, **options})
    clock, seen = Clock(), list[int]()
    trainer.throughput._clock = clock
    for name, seconds in {"training_step": 1, "evaluate": 100, "_save_checkpoint": 1000}.items():
        setattr(trainer, name, clock.after(seconds, getattr(trainer, name)))
    trainer.callback_handler.on_log = clock.after(10_000, trainer.callback_handler.on_log)

    def look(module: Any, inputs: Any, _: Any) -> None:
        if trainer.model.training and torch.is_grad_enabled():
            seen.append(inputs[0].numel())

    trainer.model.get_input_embeddings().register_forward_hook(look)
    return trainer, clock, seen


@pytest.mark.parametrize("console", [True, False])
def test_logs_have_the_tokens_of_the_forward_pass(tiny_llama, make_tokenizer, tmp_path, console: bool) -> None:
    trainer, _, seen = timed(tiny_llama(), make_tokenizer(), tmp_path)
    if not console:
        trainer.remove_callback(PrinterCallback)
    trainer.train()
    logs = training_logs(trainer)
    assert len(seen) == 8 and [log["tokens_per_second"] * 4 for log in logs] == [sum(seen[:4]), sum(seen[4:])]
    assert not {"share_of_bound", "peak_memory_gib"} & {name for log in logs for name in log}  # on a CPU
    assert not any("tokens_per_second" in log for log in trainer.state.log_history if log not in logs)


def test_without_taking_evaluations_out_it_would_be_slower(tiny_llama, make_tokenizer, tmp_path) -> None:
    """Negative control: 4 s of steps, between them an evaluation, which is logged, and a checkpoint; or two, and the
    time of the training log."""
    trainer, _, seen = timed(tiny_llama(), make_tokenizer(), tmp_path)
    trainer.throughput.apart = nullcontext
    trainer.train()
    first, second = (log["tokens_per_second"] for log in training_logs(trainer))
    assert first == pytest.approx(sum(seen[:4]) / (4 + 11_100))
    assert second == pytest.approx(sum(seen[4:]) / (4 + 2 * 11_100 + 10_000))


def test_padding_is_no_token(tiny_llama, make_tokenizer, tmp_path) -> None:
    trainer, _, seen = timed(tiny_llama(), make_tokenizer(), tmp_path, share_prompts=False, max_steps=8)
    trainer.train()
    rows = id_pairs(32)  # each is seen once: its prompt twice
    tokens = sum(2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)
    assert trainer.throughput.tokens == tokens < sum(seen)
    assert trainer.throughput.predicted == sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)


def test_a_resumed_run_counts_its_own_steps(tiny_llama, make_tokenizer, tmp_path) -> None:
    """Interrupted between two logs: the next one is of the steps since, and no other figure differs."""
    straight, _, seen = timed(tiny_llama(), make_tokenizer(), tmp_path, logging_steps=3, max_steps=6)
    straight.train()
    resumed, clock, again = timed(tiny_llama(), make_tokenizer(), tmp_path, logging_steps=3, max_steps=6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert again == seen[2:]
    rates = [[log["tokens_per_second"] for log in training_logs(one)] for one in (straight, resumed)]
    assert rates == [[sum(seen[:6]) / 6, sum(seen[6:]) / 6], [sum(seen[2:6]) / 4, sum(seen[6:]) / 6]]
    assert history(straight) == history(resumed)
    other = adapter_weights(resumed)
    assert all(torch.equal(weight, other[name]) for name, weight in adapter_weights(straight).items())


@pytest.mark.parametrize(("loss", "passes"), [("sigmoid", 3), ("simpo", 2)])
def test_share_in_a_run(loss: str, passes: int, tiny_llama, make_tokenizer, tmp_path, monkeypatch) -> None:
    """Of a rate that is given."""
    trainer, _, _ = timed(tiny_llama(), make_tokenizer(), tmp_path, loss_type=loss)
    done, begin = trainer.throughput, trainer.throughput.begin
    monkeypatch.setattr(done, "begin", lambda: (begin(), setattr(done, "rate", 1e9)))
    trainer.train()
    of_all, of_head = weights_per_token(trainer.model) or (math.nan, 0)
    shares = [log["share_of_bound"] for log in training_logs(trainer)]
    assert sum(shares) * 4 * 1e9 == pytest.approx(2 * passes * (of_all * done.tokens + of_head * done.predicted))
