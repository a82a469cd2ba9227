"""Sampling from the trained policy, and how far it moved from its reference.

Shape suffix: C completions.
"""

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..forward import PackedBatch, completion_logps
from ..forward.scope import invocation_start
from ..model.generation import sample_completions
from ..reference.adapter_off import reference_logps
from ..trainer import DPOTrainer

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


def sampled_kl(trainer: DPOTrainer, prompts: list[Messages], answers: list[list[int]], batch_size: int = 32) -> float:
    """Estimates KL(policy || reference) in nats per completion, as the mean of log(policy / reference) over samples.

    Unbiased if `answers` were sampled from the policy at temperature 1, one per prompt.
    """
    tokenizer, backend = trainer.tokenizer, trainer.forward_plan.scorer
    rows = [
        {"prompt_ids": ids["input_ids"], "completion_ids": [answer], "row": i}
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
        for ids in [tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)]
    ]
    if tokens := trainer.prepare.invocation:
        rows = [{**row, "adapter_start": invocation_start(row["prompt_ids"], tokens)} for row in rows]
    total = 0.0
    trainer.model.eval()
    with torch.no_grad(), trainer.compute_loss_context_manager():
        for start in range(0, len(rows), batch_size):
            batch = PackedBatch(**trainer.collate(rows[start : start + batch_size])).to(trainer.model.device)
            policy_C = completion_logps(trainer.model, batch, backend).logps_C
            total += float((policy_C - reference_logps(trainer.model, batch, backend).logps_C).sum())
    return total / len(rows)
