"""The quickstart's shipped assets: grammar, true reward, tokenizer, small model and preference pairs."""

import itertools
import json
import random
import re
from pathlib import Path

import pytest
import torch
from quickstart_grammar import text, topics
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from dpo_peft import quickstart
from dpo_peft.quickstart import known_trigram_share, true_reward
from dpo_peft.quickstart.lexicon import ENTRIES, VALENCE

ROOT = Path(quickstart.__file__).parent
WORD = re.compile(r"[^\W\d_]+")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(quickstart.model_path())


@pytest.fixture(scope="module")
def pairs():
    files = {"train": quickstart.train_file(), "test": quickstart.test_file()}
    return {name: [json.loads(line) for line in open(file, encoding="utf-8")] for name, file in files.items()}


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(quickstart.model_path(), dtype=torch.float32).eval()


# ---- the true reward, by hand


@pytest.mark.parametrize(
    ("answer", "reward"),
    [
        ("The soup was superb, but the staff was rude. The room was ordinary.", (2 - 2 + 0) / 3),
        ("The plot was gripping.", 2 / 3),  # one judgment is divided by three
        ("The plot was superb. The cast was superb. The score was superb.", 2 / 3),  # a repeated word counts once
        (
            "I enjoyed the garden and loathed the menu. The tea was delicious, but the cake was vile.",
            (1 - 2 + 2 - 2) / 4,
        ),
        ("The soup was not really fresh.", -0.5 / 3),
        ("The equipment was never ghastly.", 1 / 3),
        ("It was not a long walk and the view was stunning.", 2 / 3),  # the negator is too far away
        ("SUPERB views and a Friendly guide made our day!", (2 + 1) / 3),
        ("Superb wonderful excellent marvellous splendid.", 0.0),  # a list of praise is no sentence
        ("the room was superb and the staff was friendly", 0.0),  # unfinished
        ("Superb food here.", 0.0),  # under four words
        ("We went there on a Tuesday with my sister.", 0.0),
        ("", 0.0),
    ],
)
def test_reward_by_hand(answer, reward):
    assert true_reward(answer) == pytest.approx(reward, abs=1e-12)


def test_reward_is_bounded_whatever_the_text():
    rng, words = random.Random(0), [*VALENCE, "the", "was", "not", "very", "and", ".", "!", "a"]
    for _ in range(500):
        assert -2 <= true_reward(" ".join(rng.choices(words, k=60))) <= 2


def test_no_word_is_graded_or_classed_twice():
    assert len({(word, part, grade) for word, part, grade in ENTRIES}) == len(VALENCE)


# ---- the grammar


@pytest.fixture(scope="module")
def reviews():
    rng = random.Random(11)
    return [text.write_review(rng, text.write_prompt(rng)[1]) for _ in range(3000)]


def test_grammar_valence_is_the_reward(reviews):
    for review, values in reviews:
        assert true_reward(review) == pytest.approx(sum(values) / max(3, len(values)), abs=1e-12), review


def test_grammar_sentiment_is_broad_and_symmetric(reviews):
    rewards = torch.tensor([true_reward(review) for review, _ in reviews])
    assert abs(rewards.mean()) < 0.05 and 0.45 < rewards.std() < 0.65
    assert abs((rewards > 0.5).float().mean() - (rewards < -0.5).float().mean()) < 0.04


def test_grammar_writes_well_formed_text(reviews):
    for review, _ in reviews:
        assert not re.search(r"\ba [aeio]|\ban (?!hour)[^aeiou]|\ban us|  |\{|\*| ,|\.\.", review), review
        for sentence in re.findall(r"[^.]+\.", review):
            assert sentence.strip()[0].isupper()
        evaluative = [word for word in WORD.findall(review.lower()) if word in VALENCE]
        assert len(set(evaluative)) == len(evaluative), review
    assert len({review for review, _ in reviews}) == len(reviews)


def test_neutral_parts_use_no_evaluative_word():
    parts = [*topics.STREETS, *topics.TOWNS, *topics.SURNAMES, *topics.BRANDS, *topics.TITLES, *topics.COMPANIONS]
    for topic in topics.TOPICS.values():
        nouns = itertools.chain(*topic.aspects.values(), *topic.performers)
        parts += [*topic.subjects, topic.short, *nouns, *topic.feelers, *topic.facts, *topic.back, *topic.audience]
    assert not [part for part in parts if set(WORD.findall(part.lower())) & set(VALENCE)]


@pytest.mark.slow
def test_the_shipped_trigrams_are_those_of_the_grammar():
    assert (ROOT / "trigrams.txt").read_text("utf-8").splitlines() == text.known_trigrams()


def test_fluency_figure_separates_text_from_salad(reviews):
    rng = random.Random(3)
    texts = [review for review, _ in reviews[:300]]
    shuffled = [" ".join(rng.sample(words, len(words))) for words in map(str.split, texts)]
    assert known_trigram_share(texts) > 0.98
    assert known_trigram_share(shuffled) < 0.2
    sentence = "The room was tidy. All in all, it was {} awful hotel and a bore."
    assert known_trigram_share([sentence.format("a")]) < known_trigram_share([sentence.format("an")]) == 1.0


# ---- tokenizer and chat template


@pytest.mark.parametrize(
    "content", ["", "\n\nTwo lines first", "  spaces", "日本語 🙂 \x00 ﬁ", "ends in newline\n", "<b>x</b>"]
)
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_generation_prompt_is_a_token_prefix(tokenizer, content, system):
    prompt = [{"role": "system", "content": system}] if system else []
    prompt += [{"role": "user", "content": "How was the \ncafé?\n"}]
    whole = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": content}], tokenize=False)
    start = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    start_ids, whole_ids = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (start, whole))
    assert whole_ids[: len(start_ids)] == start_ids
    # The completion is the content and the end token, nothing else: what a sampler returns.
    content_ids = tokenizer(content, add_special_tokens=False)["input_ids"]
    assert whole_ids[len(start_ids) :] == [*content_ids, tokenizer.eos_token_id]
    assert tokenizer.decode(whole_ids) == whole


def test_special_tokens(tokenizer):
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|pad|>"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id and tokenizer.bos_token is None
    assert (
        tokenizer("x", add_special_tokens=True)["input_ids"] == tokenizer("x", add_special_tokens=False)["input_ids"]
    )


# ---- the pairs


def test_pairs_hold_their_true_rewards(pairs):
    for row in pairs["train"] + pairs["test"]:
        for name in ("chosen", "rejected"):
            (message,) = row[name]
            assert message["role"] == "assistant"
            assert row[f"{name}_reward"] == pytest.approx(true_reward(message["content"]), abs=5e-5)
        assert row["chosen_reward"] - row["rejected_reward"] >= 0.9 - 1e-4


def subject_of(prompt: str) -> str:
    """What a prompt asks about, read back through the ways of asking."""
    for ask in text.ASKS:
        pattern = re.escape(ask).replace(r"\{subject\}", "(?P<subject>.+)").replace(r"\{relative\}", r"\w+")
        if found := re.fullmatch(pattern, prompt):
            return found["subject"]
    raise AssertionError(f"no way of asking matches {prompt!r}")


def test_held_out_subjects_are_unseen(pairs):
    prompts = {name: [row["prompt"][0]["content"] for row in rows] for name, rows in pairs.items()}
    assert len(prompts["train"]) >= 1200 and len(prompts["test"]) >= 250
    for name, texts in prompts.items():
        assert len(set(texts)) == len(texts), name
    assert not set(map(subject_of, prompts["train"])) & set(map(subject_of, prompts["test"]))
    assert [prompt[0]["content"] for prompt in quickstart.eval_prompts()] == prompts["test"]


def test_length_tells_nothing(pairs, tokenizer):
    for name, rows in pairs.items():
        chosen, rejected = (
            torch.tensor([len(tokenizer(row[side][0]["content"])["input_ids"]) for row in rows], dtype=torch.float)
            for side in ("chosen", "rejected")
        )
        longer = ((chosen > rejected).float() + 0.5 * (chosen == rejected)).mean()
        assert abs(longer - 0.5) < 0.04, name
        assert abs(chosen.mean() - rejected.mean()) < 0.5, name


# ---- the model


def test_sizes():
    files = [file for file in ROOT.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    assert sum(file.stat().st_size for file in files) <= 8 * 2**20
    with safe_open(ROOT / "model" / "model.safetensors", "pt") as weights:
        for name in weights.keys():  # noqa: SIM118
            tensor = weights.get_tensor(name)
            assert tensor.dtype == torch.bfloat16 and torch.isfinite(tensor).all(), name
            assert all(size % 64 == 0 for size in tensor.shape), name


@torch.no_grad()
def nats_per_token(model, tokenizer, chats):
    losses = []
    for chat in chats:
        ids = tokenizer(chat, add_special_tokens=False, return_tensors="pt")["input_ids"]
        losses.append(model(input_ids=ids, labels=ids).loss)
    return torch.stack(losses).mean().item()


def test_model_knows_the_language(model, tokenizer):
    rng = random.Random(2024)
    chats = [text.write_chat(rng) for _ in range(64)]
    salad = [
        [chat[0], {**chat[1], "content": " ".join(rng.sample(w := chat[1]["content"].split(), len(w)))}]
        for chat in chats
    ]
    fluent, shuffled = (
        [tokenizer.apply_chat_template(chat, tokenize=False) for chat in some] for some in (chats, salad)
    )
    assert nats_per_token(model, tokenizer, fluent) < 1.25
    assert nats_per_token(model, tokenizer, shuffled) > 3


@pytest.mark.slow
def test_samples_of_the_4bit_model_are_fluent_and_neutral(tokenizer):
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        quickstart.model_path(), quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    prompts = quickstart.eval_prompts()[:96]
    texts = tokenizer.apply_chat_template(prompts, tokenize=False, add_generation_prompt=True)
    batch = tokenizer(texts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
    torch.manual_seed(0)
    output = model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    ids = output[:, batch["input_ids"].shape[1] :]
    answers = tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert (ids == tokenizer.eos_token_id).any(1).float().mean() > 0.97
    assert known_trigram_share(answers) > 0.94
    assert len(set(answers)) == len(answers)
    rewards = torch.tensor([true_reward(answer) for answer in answers])
    assert abs(rewards.mean()) < 0.2 and 0.4 < rewards.std() < 0.75
