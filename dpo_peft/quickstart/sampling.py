"""Sampling from the trained policy, and how far it moved from its reference.

Shape suffix: C completions.
"""

from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.collator import PreferenceCollator
from ..forward import PackedBatch, completion_logps
from ..forward.scope import invocation_start, invocation_tokens
from ..model.generation import sample_completions
from ..reference.adapter_off import reference_logps

Messages = list[dict[str, str]]


def sample_answers(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Messages],
    seed: int,
    max_new_tokens: int = 96,
) -> list[list[int]]:
    """Samples a completion per prompt at temperature 1: token ids with their end token, in the order of the prompts.

    Args:
        model: a causal LM or a PEFT model, its adapter on or off as the caller left it.
        tokenizer: with a chat template and a pad token.
        prompts: chat messages.
        seed: of the sampling.
        max_new_tokens: one that isn't finished by then stays unfinished.
    """
    prompt_ids = [
        tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=True)["input_ids"] for p in prompts
    ]
    return sample_completions(model, tokenizer, prompt_ids, seed, max_new_tokens)


@torch.no_grad()
def sampled_kl(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Messages],
    answers: list[list[int]],
    batch_size: int = 32,
) -> float:
    """Estimates KL(policy || base) in nats per completion, as the mean of log(policy / base) over samples.

    Unbiased if `answers` were sampled from the policy at temperature 1, one per prompt. The adapter is left in
    evaluation mode.
    """
    asked = [
        tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=True)["input_ids"] for p in prompts
    ]
    rows: list[dict[str, Any]] = [
        {"prompt_ids": ids, "completion_ids": [answer]} for ids, answer in zip(asked, answers, strict=True)
    ]
    if tokens := invocation_tokens(model.peft_config, model.active_adapters[0]):
        rows = [{**row, "adapter_start": invocation_start(row["prompt_ids"], tokens)} for row in rows]
    total, collate = 0.0, PreferenceCollator(shared=False)
    model.eval()
    for start in range(0, len(rows), batch_size):
        batch = PackedBatch(**collate(rows[start : start + batch_size])).to(model.device)
        total += float((completion_logps(model, batch).logps_C - reference_logps(model, batch).logps_C).sum())
    return total / len(rows)
