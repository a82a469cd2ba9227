"""Sampling from the trained policy, and how far it moved from its reference.

Shape suffix: C completions.
"""

from typing import Any

import torch

from ..forward import PackedBatch, completion_logps
from ..reference import reference_logps

Messages = list[dict[str, str]]


def sample_answers(
    model: Any, tokenizer: Any, prompts: list[Messages], seed: int, max_new_tokens: int = 96
) -> list[list[int]]:
    """One answer per prompt at temperature 1 from the whole distribution, in order, as token ids with their end token.

    Args:
        model: a causal LM or a PEFT model, its adapter on or off as the caller left it.
        tokenizer: with a chat template and a pad token.
        prompts: chat messages.
        seed: of the sampling.
        max_new_tokens: an answer that isn't finished by then stays unfinished.
    """
    texts = [tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p in prompts]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    inputs = inputs.to(model.device)
    training, use_cache = model.training, model.config.use_cache
    model.eval()
    model.config.use_cache = True
    torch.manual_seed(seed)
    try:
        with torch.no_grad():
            output = model.generate(
                **inputs,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=max_new_tokens,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
    finally:
        model.train(training)
        model.config.use_cache = use_cache
    answers = output[:, inputs["input_ids"].shape[1] :].tolist()
    return [_until(ids, tokenizer.eos_token_id) for ids in answers]


def _until(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end) + 1] if end in ids else ids


def sampled_kl(trainer: Any, prompts: list[Messages], answers: list[list[int]], batch_size: int = 32) -> float:
    """KL(policy || reference) in nats per answer, estimated as the mean of log(policy / reference) over samples.

    Unbiased if `answers` were sampled from the policy at temperature 1, one per prompt.
    """
    tokenizer, backend = trainer.processing_class, trainer.forward_plan.scorer
    rows = [
        {"prompt_ids": ids["input_ids"], "completion_ids": [answer], "row": i}
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
        for ids in [tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)]
    ]
    total = 0.0
    trainer.model.eval()
    with torch.no_grad(), trainer.compute_loss_context_manager():
        for start in range(0, len(rows), batch_size):
            batch = PackedBatch(**trainer.collate(rows[start : start + batch_size])).to(trainer.model.device)
            policy_C = completion_logps(trainer.model, batch, backend).logps_C
            total += float((policy_C - reference_logps(trainer.model, batch, backend).logps_C).sum())
    return total / len(rows)
