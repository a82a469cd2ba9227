"""The KL of samples to the reference, against PEFT's own forward pass."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from dpo_peft import DPOConfig, DPOTrainer, answer_only, quickstart
from dpo_peft.quickstart.sampling import sampled_kl


def build(folder, invocation):
    """Returns a trainer of the bundled model whose adapter is random numbers on both sides."""
    answers = {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    rows = Dataset.from_list([{"prompt": quickstart.eval_prompts()[0], **answers}])
    config = DPOConfig(
        output_dir=str(folder), model_init_kwargs={"dtype": "float32"}, bf16=False, use_cpu=True, report_to="none"
    )
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", alora_invocation_tokens=invocation)
    trainer = DPOTrainer(quickstart.model_path(), args=config, train_dataset=rows, peft_config=lora)
    torch.manual_seed(0)
    for name, weight in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    return trainer


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
def test_kl_of_samples_is_that_of_peft(tmp_path, scope):
    trainer = build(tmp_path, None)
    tokenizer, prompts = trainer.tokenizer, quickstart.eval_prompts()[:3]
    if scope == "completions":
        of_all_tokens, trainer = trainer, build(tmp_path, answer_only(tokenizer))
    answers = [
        tokenizer(text)["input_ids"] for text in ("The room was nice.", "We left.", "It was a treat, and so on.")
    ]
    found = [tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=True) for p in prompts]
    with torch.no_grad():
        ratios = [
            peft_log_ratio(trainer.model, one["input_ids"], answer) for one, answer in zip(found, answers, strict=True)
        ]
    kl = sampled_kl(trainer, prompts, answers)
    assert abs(kl) > 0.1
    assert kl == pytest.approx(sum(ratios) / 3, abs=1e-4)
    if scope == "completions":  # the control: with these weights, where the adapter begins makes a difference
        assert abs(sampled_kl(of_all_tokens, prompts, answers) - kl) > 0.01
