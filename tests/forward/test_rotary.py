"""Rotary frequencies that transformers chooses by the longest row of a batch.

The oracle has no such choice: the same weights with fixed frequencies, which are worked out by hand, row by row.
"""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forward_models import SLIDING, VOCAB, build, own_token_logps, random_samples
from torch import nn

from dpo_peft.errors import OptionError
from dpo_peft.forward import completion_logps, pack, pad_rows, plan_forward
from dpo_peft.forward.rotary import fix_rope, fixed_rope, fixed_rope_length, rope_length
from dpo_peft.model.generation import sample_completions

LIMIT = 24
SHORT, LONG = random_samples([(5, [4, 6]), (30, [20, 9])])
LONGROPE = dict(
    rope_type="longrope",
    rope_theta=1e4,
    original_max_position_embeddings=LIMIT,
    short_factor=[1.0] * 8,
    long_factor=[4.0] * 8,
    factor=4.0,
    attention_factor=1.0,
)
DYNAMIC = dict(rope_type="dynamic", rope_theta=1e4, factor=3.0)
PLAIN = dict(rope_type="default", rope_theta=1e4)
LINEAR = dict(rope_type="linear", rope_theta=1e4, factor=4.0)
# Bloc97's formula for a context of 3 * 24 tokens, 16 dimensions: theta * (3 * 72 / 24 - 2) ** (16 / 14).
STRETCHED = dict(rope_type="default", rope_theta=1e4 * 7 ** (16 / 14))


def by_layer(rope: dict[str, Any], **others: Any) -> dict[str, Any]:
    return dict(SLIDING, rope_parameters={"sliding_attention": PLAIN, "full_attention": rope}, **others)


def flat(rope: dict[str, Any], **others: Any) -> dict[str, Any]:
    return dict(rope_parameters=rope, **others)


KINDS = {
    "llama longrope": ("Llama", flat, LONGROPE, PLAIN, LINEAR, 256),
    "qwen3 dynamic": ("Qwen3", flat, DYNAMIC, PLAIN, STRETCHED, LIMIT),
    "gemma3 longrope": ("Gemma3", by_layer, LONGROPE, PLAIN, LINEAR, 256),
    "gpt-oss dynamic": ("GptOss", flat, DYNAMIC, PLAIN, STRETCHED, LIMIT),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("far", [False, True], ids=["short rows", "rows on both sides"])
def test_a_row_has_the_same_log_probs_in_every_batch(kind, far):
    name, spread, rope, short, long, positions = KINDS[kind]
    model = build(name, spread(rope, max_position_embeddings=positions))
    oracle = build(name, spread(long if far else short, max_position_embeddings=256))
    samples = [SHORT, LONG] if far else [SHORT, SHORT]
    length = rope_length(model.config, 50 if far else 11)
    assert length == ((25 if rope is LONGROPE else 72) if far else LIMIT)
    with torch.no_grad():
        expected = torch.cat([one for sample in samples for one in own_token_logps(oracle, [sample])])
        moved = float((torch.cat(own_token_logps(model, [SHORT, LONG])[:2]) - expected[:10]).abs().max())
        fix_rope(model, length)
        plan = plan_forward(model)
        assert plan.shared
        for batch in (pack(samples), pad_rows(samples)):
            found = completion_logps(model, batch, plan.scorer).token_logps_N
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
        # Beside a longer row, and after it.
        beside = own_token_logps(model, [SHORT, LONG])[:2]
        torch.testing.assert_close(torch.cat(beside), expected[:10], atol=2e-5, rtol=0)
    assert far or moved > 3e-3  # without the frequencies fixed, the long row moves the short one's log-probs


def test_what_is_fixed_is_as_before_afterwards():
    model = build("Llama", flat(LONGROPE))
    with torch.no_grad():
        before = [torch.cat(own_token_logps(model, samples)) for samples in ([SHORT], [LONG], [SHORT, LONG])]
        with fixed_rope(model, 25), fixed_rope(model, LIMIT), fixed_rope(model, 25):
            inside = torch.cat(own_token_logps(model, [SHORT]))
            assert fixed_rope_length(model) == 25
        after = [torch.cat(own_token_logps(model, samples)) for samples in ([SHORT], [LONG], [SHORT, LONG])]
    assert fixed_rope_length(model) is None and (inside - before[0]).abs().max() > 1e-2
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_lengths_with_the_same_frequencies_have_one_number():
    longrope = build("Llama", flat(LONGROPE)).config
    assert [rope_length(longrope, n) for n in (1, 24, 25, 200, 10_000)] == [24, 24, 25, 25, 25]
    dynamic = build("Llama", flat(DYNAMIC, max_position_embeddings=LIMIT)).config
    assert [rope_length(dynamic, n) for n in (1, 24, 25, 72, 80)] == [24, 24, 72, 72, 80]
    assert rope_length(build("Llama", flat(LINEAR)).config, math.inf) is None
    with pytest.raises(OptionError, match="set max_length"):
        rope_length(longrope, math.inf)


def test_a_choice_of_the_models_own_code_is_refused_where_rows_cross_its_limit():
    """Phi-3.5-MoE scales its angles by the longest row too, in its module's own forward."""
    rope = {**LONGROPE, "short_mscale": 1.1, "long_mscale": 1.3}
    model = build("Phimoe", flat(rope))
    fix_rope(model, LIMIT)  # all rows are on one side
    with pytest.raises(OptionError, match="Phimoe.*max_length=24 or less"):
        fix_rope(model, 25)


class OwnRotary(nn.Module):
    """As code beside a model may have it: nothing tells that it reads the batch's length but what it computes."""

    def __init__(self, inner: nn.Module, act: bool):
        super().__init__()
        self.inner, self.act = inner, act

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        stretch = 2.0 if self.act and position_ids.max() >= LIMIT else 1.0
        return self.inner(x, position_ids / stretch)


@pytest.mark.parametrize("length", [LIMIT, 72])
@pytest.mark.parametrize("act", [True, False])
def test_an_unknown_model_is_tried_beside_a_long_row(length, act):
    model = build("Llama", flat(PLAIN, max_position_embeddings=LIMIT))
    model.model.rotary_emb = OwnRotary(model.model.rotary_emb, act)
    model.config.rope_parameters = DYNAMIC  # its config says so
    fix_rope(model, length)
    if act and length > LIMIT:
        with pytest.raises(OptionError, match=r"neighbors \(by .* nats per token\).*max_length=24 or less"):
            plan_forward(model)
    else:
        assert plan_forward(model).shared


@pytest.mark.parametrize("name", ["Llama", "Phi3"])  # Phi-3 drops its cache at the limit
@pytest.mark.parametrize("length", [LIMIT, 25])
def test_a_generation_keeps_its_frequencies_beyond_the_limit(name, length):
    """Otherwise keys from before the limit were turned by other frequencies than those after it."""
    own = {"original_max_position_embeddings": LIMIT} if name == "Phi3" else {}
    model, prompt = build(name, flat(LONGROPE, **own)), list(LONG.prompt[:18])
    fix_rope(model, length)
    model.generation_config.eos_token_id = None
    tokenizer: Any = SimpleNamespace(pad_token_id=0, eos_token_id=VOCAB)
    (found,) = sample_completions(model, tokenizer, [prompt], max_new_tokens=16, temperature=0)
    # Short and long factors for all positions, so the longest row decides nothing.
    same = LONGROPE["short_factor" if length == LIMIT else "long_factor"]
    oracle, ids = build(name, flat({**LONGROPE, "short_factor": same, "long_factor": same}, **own)), prompt
    with torch.no_grad():
        for _ in found:
            ids = [*ids, int(oracle(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())]
    assert found == ids[len(prompt) :] and len(prompt) + len(found) > LIMIT + 4
