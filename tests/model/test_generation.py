"""Sampling: the distribution is the model's own, seeds decide, and nothing of the caller's is disturbed."""

from collections import Counter
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from dpo_peft.errors import OptionError
from dpo_peft.model.generation import sample_completions

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]


@pytest.fixture
def model(tiny_llama: Any) -> Any:
    return tiny_llama()


def test_greedy_is_the_likeliest_token_each_time(model: Any, make_tokenizer: Any) -> None:
    found = sample_completions(model, make_tokenizer(), PROMPTS, max_new_tokens=6, temperature=0)
    for prompt, completion in zip(PROMPTS, found, strict=True):
        ids = list(prompt)
        for _ in range(6):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == 2:
                break
        assert completion == ids[len(prompt) :]


def test_samples_follow_the_model(model: Any, make_tokenizer: Any) -> None:
    """First tokens of 4,000 samples against exact probabilities: chi-square over the ten likeliest and the rest."""

    def chi_square(temperature: float) -> float:
        drawn = sample_completions(model, make_tokenizer(), [[5, 6, 7]] * 4000, 0, 1, temperature)
        counts = Counter(ids[0] for ids in drawn)
        probs = model(torch.tensor([[5, 6, 7]])).logits[0, -1].softmax(-1)
        top = probs.topk(10).indices.tolist()
        expected = [4000 * float(probs[t]) for t in top]
        observed = [counts[t] for t in top]
        expected.append(4000 - sum(expected))
        observed.append(4000 - sum(observed))
        return sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))

    assert chi_square(1.0) < 29.6  # 10 degrees of freedom, p = 0.001
    assert chi_square(0.7) > 100  # control: another distribution is seen


def test_seeds_decide_and_the_callers_state_stays(model: Any, make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer()
    model.train()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    one = sample_completions(model, tokenizer, PROMPTS, seed=1, max_new_tokens=8)
    assert torch.equal(torch.rand(3), expected)
    assert model.training and one == sample_completions(model, tokenizer, PROMPTS, seed=1, max_new_tokens=8)
    assert one != sample_completions(model, tokenizer, PROMPTS, seed=2, max_new_tokens=8)


def test_seeds_of_their_own_follow_the_model_and_ignore_the_batch(model: Any, make_tokenizer: Any) -> None:
    """As above, with a seed per prompt, temperature, top_k and top_p; and a completion is the same in any company."""
    tokenizer, prompt = make_tokenizer(), [5, 6, 7]
    how: dict[str, Any] = {"temperature": 0.7, "top_k": 6, "top_p": 0.9}
    drawn = sample_completions(model, tokenizer, [prompt] * 4000, range(4000), 1, **how)
    counts = Counter(ids[0] for ids in drawn)

    def chi_square(temperature: float) -> float:
        probs = (model(torch.tensor([prompt])).logits[0, -1].detach() / temperature).softmax(-1)
        order = probs.topk(6).indices.tolist()
        top = (probs[order] / probs[order].sum()).tolist()
        kept = next(n for n in range(1, 7) if n == 6 or sum(top[:n]) >= 0.9)
        expected = {token: 4000 * p / sum(top[:kept]) for token, p in zip(order[:kept], top[:kept], strict=True)}
        assert counts.keys() <= expected.keys()
        return sum((counts[token] - e) ** 2 / e for token, e in expected.items())

    assert chi_square(0.7) < 20.5  # at most 5 degrees of freedom, p = 0.001
    assert chi_square(1.0) > 100  # control
    together = sample_completions(model, tokenizer, PROMPTS, [3, 4, 5], 12)
    for number, alone in enumerate(PROMPTS):
        assert sample_completions(model, tokenizer, [alone], [3 + number], 12) == [together[number]]
    with pytest.raises(OptionError, match="2 seeds for 3 prompts"):
        sample_completions(model, tokenizer, PROMPTS, [1, 2])


def test_the_models_own_generation_config_is_left_out_and_kept(model: Any, make_tokenizer: Any) -> None:
    """Chat models ship penalties and limits there, with which samples are no longer the model's own."""
    expected = sample_completions(model, make_tokenizer(), PROMPTS, seed=3, max_new_tokens=20)
    model.generation_config.repetition_penalty, model.generation_config.top_k = 3.0, 2
    assert sample_completions(model, make_tokenizer(), PROMPTS, seed=3, max_new_tokens=20) == expected
    assert model.generation_config.repetition_penalty == 3.0


def test_it_ends_where_the_model_says(model: Any, make_tokenizer: Any) -> None:
    """A model may have more end tokens than its tokenizer names."""
    tokenizer = make_tokenizer()
    longest = sample_completions(model, tokenizer, [[5, 6, 7]], seed=3, max_new_tokens=30)[0]
    stop = longest[4]
    model.generation_config.eos_token_id = [2, stop]
    found = sample_completions(model, tokenizer, [[5, 6, 7]], seed=3, max_new_tokens=30)[0]
    assert found == longest[: longest.index(stop) + 1]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompt_ids": [[1], []]}, "Prompt 1 has no tokens"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_k": -1}, "top_k=-1"),
        ({"temperature": 0.0, "top_p": 0.5}, "no effect with temperature=0"),
    ],
)
def test_what_it_refuses(model: Any, make_tokenizer: Any, changed: dict[str, Any], message: str) -> None:
    arguments = {"prompt_ids": PROMPTS, **changed}
    with pytest.raises(OptionError, match=message):
        sample_completions(model, make_tokenizer(), **arguments)


@pytest.mark.parametrize("family", ["gemma3", "mistral3", "qwen2_5_vl", "llava"])
def test_models_whose_config_holds_one_of_text(family: str, make_tokenizer: Any) -> None:
    """They write by text alone, and their options are as before."""
    text = {"vocab_size": 320, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    seen = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    seen |= {"image_size": 28, "patch_size": 14}
    if family == "qwen2_5_vl":
        rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
        text, seen = (
            {**text, "rope_parameters": rope},
            {"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 16},
        )
    own = {
        "mistral3": {
            "text_config": {**text, "model_type": "mistral"},
            "vision_config": {**seen, "model_type": "pixtral"},
        }
    }
    own["llava"] = {
        "text_config": {**text, "model_type": "llama"},
        "vision_config": {**seen, "model_type": "clip_vision_model"},
    }
    given = own.get(family, {"text_config": text, "vision_config": seen})
    model = AutoModelForImageTextToText.from_config(CONFIG_MAPPING[family](**given)).eval()
    before = model.config.get_text_config().use_cache
    model.config.get_text_config().use_cache = False
    (found,) = sample_completions(model, make_tokenizer(), [[5, 6, 7]], max_new_tokens=4, temperature=0)
    ids = [5, 6, 7]
    for _ in range(len(found)):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    assert found == ids[3:] and before is not False
    assert model.config.get_text_config().use_cache is False
