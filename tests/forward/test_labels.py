"""Trajectories, lone completions, mismatched completions and the token-level extras, through the forward pass.

The oracle is the model's own logits on padded rows, one per completion.
"""

from typing import Any

import pytest
import torch
from forward_models import SHARING, adapter_grads, add_lora, build, grad_difference, own_token_logps
from varlen_kernel import emulated_kernel

from dpo_peft.forward import Sample, attention, completion_logps, pack, pad_rows, plan_forward, sum_by_completion
from dpo_peft.forward.logprobs import CHUNK_ROWS

DRAW = torch.Generator().manual_seed(4)


def ids(number: int) -> list[int]:
    return torch.randint(3, 90, (number,), generator=DRAW).tolist()


def steps(text: str) -> list[int]:
    """ "0.1" -> [0, -1, 1]: steps, a point for a token that is not scored."""
    return [-1 if mark == "." else int(mark) for mark in text]


SAMPLES = [
    Sample(ids(4), [ids(9), ids(6)], 0, steps=[steps("00...11.2"), steps(".0..11")]),
    Sample([], [ids(5), ids(8)], 1, steps=[steps("..000"), steps(".0000..1")]),
]
# The same for the oracle, which needs a prompt: where there is none, the first token becomes one.
WHOLE = [Sample(s.prompt or c[:1], [c if s.prompt else c[1:]]) for s in SAMPLES for c in s.completions]
SCORED = [[step >= 0 for step in (row if s.prompt else row[1:])] for s in SAMPLES for row in s.steps or ()]


def oracle(model: Any) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    logps = [x[torch.tensor(keep)] for x, keep in zip(own_token_logps(model, WHOLE), SCORED, strict=True)]
    return [x.detach() for x in logps], adapter_grads(model, torch.stack([x.sum() for x in logps]))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "qwen3-moe", "qwen3-next", "lfm2", "gpt-oss"])
@pytest.mark.parametrize("backend", ["dense", "varlen", "padded"])
def test_trajectories_equal_the_models_own_log_probs(name: str, backend: str, monkeypatch: Any) -> None:
    """Shared beginning or none, other speakers' tokens read and not scored: values and adapter gradients."""
    model = add_lora(build(*SHARING[name]))
    own, own_grads = oracle(model)
    if backend == "padded":
        scores = completion_logps(model, pad_rows(SAMPLES))
    else:
        plan_forward(model)
        monkeypatch.setattr(attention, "varlen_kernel", emulated_kernel)
        scores = completion_logps(model, pack(SAMPLES), backend)
    assert (scores.token_logps_N.detach() - torch.cat(own)).abs().max() < 1e-5
    assert grad_difference(adapter_grads(model, scores.logps_C), own_grads) < 1e-5


def test_an_unscored_token_is_read() -> None:
    """Negative control: another speaker's words change what follows them, and only that."""
    model = add_lora(build(*SHARING["llama"]))
    plan_forward(model)
    before = completion_logps(model, pack(SAMPLES)).token_logps_N
    other = [list(c) for c in SAMPLES[0].completions]
    other[0][3] = other[0][3] + 1  # the second of the three unscored tokens
    after = completion_logps(model, pack([SAMPLES[0]._replace(completions=other), SAMPLES[1]])).token_logps_N
    moved = (before - after).abs() > 1e-6
    assert moved.tolist() == [False] * 2 + [True] * 3 + [False] * 11


def test_mismatched_answers_do_not_touch_the_others() -> None:
    model = add_lora(build(*SHARING["llama"]))
    plan_forward(model)
    samples = [Sample(ids(5), [ids(4)], 0, grades=[1.0]), Sample(ids(3), [ids(6)], 1, grades=[0.0])]
    answers = [s.completions for s in samples]
    crossed = [s._replace(mismatched=a) for s, a in zip(samples, reversed(answers), strict=True)]
    alone = completion_logps(model, pack(samples)).logps_C
    batch = pack(crossed)
    both = completion_logps(model, batch).logps_C
    torch.testing.assert_close(both[~batch.mismatched], alone, rtol=0, atol=1e-5)
    swapped = [s._replace(completions=a) for s, a in zip(samples, reversed(answers), strict=True)]
    torch.testing.assert_close(
        both[batch.mismatched], completion_logps(model, pack(swapped)).logps_C, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize("chunk_rows", [3, CHUNK_ROWS])
def test_log_sum_of_squared_probabilities(trained_head: bool, chunk_rows: int) -> None:
    """WPO's token extra against the full softmax; asking for it changes neither log-probs nor gradients."""
    modules = ["lm_head"] if trained_head else None
    model = add_lora(build(*SHARING["llama"]), modules_to_save=modules)
    batch = pad_rows(SAMPLES)
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.flatten(0, 1)
    expected_N = logits[batch.pred_pos].double().softmax(-1).square().sum(-1).log()
    plain = completion_logps(model, batch, chunk_rows=chunk_rows)
    plain_grads = adapter_grads(model, plain.logps_C)
    extra = completion_logps(model, batch, chunk_rows=chunk_rows, log_sum_sq=True)
    torch.testing.assert_close(extra.log_sum_sq_N.double(), expected_N, rtol=0, atol=1e-5)
    assert not extra.log_sum_sq_N.requires_grad and plain.log_sum_sq_N is None
    assert torch.equal(extra.token_logps_N, plain.token_logps_N)
    assert grad_difference(adapter_grads(model, extra.logps_C), plain_grads) == 0


def test_sum_by_completion_is_float64() -> None:
    batch = pack([Sample([1], [[2] * 3, [2]])])
    sums_C = sum_by_completion(torch.tensor([1e8, 1.0, 1.0, 5.0]), batch)
    assert sums_C.tolist() == [1e8 + 2, 5.0]
