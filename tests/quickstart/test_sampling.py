"""The KL of samples to the reference, against PEFT's own forward pass."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_peft import answer_only, quickstart
from dpo_peft.quickstart.sampling import sampled_kl


def build(invocation: list[int] | None) -> PeftModel:
    """Returns the bundled model with an adapter that is random numbers on both sides."""
    base = AutoModelForCausalLM.from_pretrained(quickstart.model_path(), dtype=torch.float32)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", alora_invocation_tokens=invocation)
    torch.manual_seed(0)
    model = get_peft_model(base, lora)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    return model


def peft_log_ratio(model, prompt, answer):
    """Returns log(policy / base) of an answer from PEFT's forward pass, which finds the invocation itself."""
    ids = torch.tensor([prompt + answer])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    policy = model(**given).logits
    with model.disable_adapter():
        both = torch.stack([policy, model(**given).logits]).squeeze(1).log_softmax(-1)
    policy, base = both[:, len(prompt) - 1 : -1].gather(2, ids[:, len(prompt) :, None].expand(2, -1, -1)).sum((1, 2))
    return float(policy - base)


@pytest.mark.parametrize("scope", ["all", "completions"])
def test_kl_of_samples_is_that_of_peft(scope):
    tokenizer, prompts = AutoTokenizer.from_pretrained(quickstart.model_path()), quickstart.eval_prompts()[:3]
    model = build(answer_only(tokenizer) if scope == "completions" else None)
    answers = [
        tokenizer(text)["input_ids"] for text in ("The room was nice.", "We left.", "It was a treat, and so on.")
    ]
    found = [tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=True) for p in prompts]
    with torch.no_grad():
        ratios = [peft_log_ratio(model, one["input_ids"], answer) for one, answer in zip(found, answers, strict=True)]
    kl = sampled_kl(model, tokenizer, prompts, answers)
    assert abs(kl) > 0.1
    assert kl == pytest.approx(sum(ratios) / 3, abs=1e-4)
    if scope == "completions":  # the control: with these weights, where the adapter begins makes a difference
        assert abs(sampled_kl(build(None), tokenizer, prompts, answers) - kl) > 0.01
