"""The implicit reward: equal to the trainer's own and to plain transformers, left as it was, useful, used by TRL."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from reward_helpers import bundled_rows, plain_log_ratio, train_bundled
from trainer_helpers import lora, ours, text_pairs
from transformers import AutoModelForCausalLM

from dpo_peft import DataError, DPOTrainer, ImplicitReward, OptionError, prepare_dataset, quickstart
from dpo_peft.data.prompts import encode_completions
from dpo_peft.errors import NonFiniteError
from dpo_peft.model.adapter_source import load_trained
from dpo_peft.quickstart.sampling import sample_answers
from dpo_peft.reward.rows import units_of


def margins(rewards: Any) -> torch.Tensor:
    """(B,) of (B, 2) rewards."""
    rewards = torch.as_tensor(rewards, dtype=torch.float64)
    return rewards[:, 0] - rewards[:, 1]


def scored_pairs(reward: ImplicitReward, rows: Any) -> list[list[float]]:
    """Rewards of both answers of each row, by the public call on texts or messages."""
    columns = [reward(rows["prompt"], rows[side]) for side in ("chosen", "rejected")]
    return [list(pair) for pair in zip(*columns, strict=True)]


# ---- The trainer's own margins, after a way over the disk -----------------------------------------------------------


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> tuple[DPOTrainer, Path]:
    folder = tmp_path_factory.mktemp("bundled")
    return train_bundled(folder, steps=4, learning_rate=3e-3), folder


@pytest.fixture(scope="module")
def reward(bundled: tuple[DPOTrainer, Path]) -> ImplicitReward:
    return ImplicitReward(str(bundled[1]))


def test_margins_are_those_of_the_trainers_evaluation(bundled: Any, reward: ImplicitReward) -> None:
    held_out = bundled_rows(quickstart.test_file(), 24)
    expected = margins(bundled[0].predict(held_out).predictions)
    found = margins(scored_pairs(reward, held_out))
    assert (found - expected).abs().max() < 1e-5
    assert expected.std() > 0.2  # far from a trivial equality
    assert (margins(scored_pairs(ImplicitReward(reward.adapter, beta=0.4), held_out)) - expected).abs().max() > 0.1


def test_a_frozen_adapter_was_the_reference(base_folder: str, make_tokenizer: Any, tmp_path: Path) -> None:
    start = get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder), lora())
    torch.manual_seed(1)
    for name, parameter in start.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    start.save_pretrained(tmp_path / "sft")
    rows, options = text_pairs(12), {"max_steps": 3, "learning_rate": 1e-2, "quantize_base": False}
    trainer = ours(
        str(tmp_path / "sft"),
        rows,
        make_tokenizer(),
        tmp_path / "dpo",
        peft_config=None,
        model_init_kwargs={"dtype": "float32"},
        **options,
    )
    trainer.train()
    trainer.save_model()
    assert trainer.reference.adapter is not None
    expected = margins(trainer.predict(rows).predictions)
    reward = ImplicitReward(str(tmp_path / "dpo"), reference=str(tmp_path / "sft"))
    assert (margins(scored_pairs(reward, rows)) - expected).abs().max() < 1e-5
    # In the trainer's own model the frozen copy is found by its fingerprint.
    live = ImplicitReward(trainer.model, tokenizer=make_tokenizer())
    assert live.reference is not None and live.reference.adapter == trainer.reference.adapter
    assert (margins(scored_pairs(live, rows)) - expected).abs().max() < 1e-5
    bare = ImplicitReward(trainer.model, tokenizer=make_tokenizer(), reference="base")
    assert (margins(scored_pairs(bare, rows)) - expected).abs().max() > 0.1  # another reference is another reward


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("loss_type", "kind"), [("simpo", "mean_logp"), ("cpo", "logp"), ("orpo", "mean_logp")])
def test_objectives_without_a_reference(
    loss_type: str, kind: str, base_folder: str, make_tokenizer: Any, tmp_path: Path
) -> None:
    rows = text_pairs(12)
    trainer = run_tiny(base_folder, rows, make_tokenizer(), tmp_path, loss_type=[loss_type])
    expected = torch.as_tensor(trainer.predict(rows).predictions)
    reward = ImplicitReward(str(tmp_path))
    assert reward.kind == kind and reward.reference is None
    assert (torch.tensor(scored_pairs(reward, rows)) - expected).abs().max() < 1e-5
    assert reward.scores(rows["prompt"][:1], rows["chosen"][:1])[0].ref_logp is None
    with pytest.raises(OptionError, match="reference has no effect"):
        ImplicitReward(trainer.model, tokenizer=make_tokenizer(), reference="base")


def run_tiny(base: str, rows: Any, tokenizer: Any, folder: Path, **changed: Any) -> DPOTrainer:
    """A few steps on the tiny model that move it well away from its start, saved."""
    chosen = {"max_steps": 3, "learning_rate": 1e-2, "quantize_base": False, **changed}
    trainer = ours(base, rows, tokenizer, folder, model_init_kwargs={"dtype": "float32"}, **chosen)
    trainer.train()
    trainer.save_model()
    return trainer


def test_bfloat16_autocast_is_repeated(base_folder: str, make_tokenizer: Any, tmp_path: Path) -> None:
    rows = text_pairs(12)
    trainer = run_tiny(base_folder, rows, make_tokenizer(), tmp_path, bf16=True)
    expected = torch.as_tensor(trainer.predict(rows).predictions)
    reward = ImplicitReward(str(tmp_path))
    found = torch.tensor(scored_pairs(reward, rows))
    in_float32 = ImplicitReward(replace(reward.adapter, trained=replace(reward.trained, precision="no")))
    rounding = (torch.tensor(scored_pairs(in_float32, rows)) - expected).abs().max()
    # Batches of another shape round differently, but not as float32 does.
    assert (found - expected).abs().max() < 0.5 * rounding and rounding > 1e-3


def test_trajectories(base_folder: str, make_tokenizer: Any, tmp_path: Path) -> None:
    def talk(*words: str) -> list[dict[str, str]]:
        return [{"role": ("user", "assistant")[i % 2], "content": word} for i, word in enumerate(words)]

    rows = Dataset.from_list(
        [
            {"chosen": talk("hi", f"one {i}", "go on", "two"), "rejected": talk("hi", f"three {i}", "why", "four")}
            for i in range(4)
        ]
    )
    trainer = run_tiny(base_folder, rows, make_tokenizer(), tmp_path, loss_type=["trajectory"])
    expected = torch.as_tensor(trainer.predict(rows).predictions)
    prepared, _ = prepare_dataset(rows, make_tokenizer(), data="trajectories")
    scores = ImplicitReward(str(tmp_path)).score_rows(prepared)
    assert (torch.tensor([[s.reward for s in row] for row in scores]) - expected).abs().max() < 1e-5
    assert scores[0][0].tokens == sum(step >= 0 for step in prepared[0]["steps"][0])


# ---- Plain transformers ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(base_folder: str, make_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained adapter on the tiny model, beta 0.3."""
    folder = tmp_path_factory.mktemp("tiny")
    run_tiny(base_folder, text_pairs(12), make_tokenizer(), folder, beta=0.3)
    return folder


@pytest.fixture(scope="module")
def tiny_reward(tiny: Path) -> ImplicitReward:
    return ImplicitReward(str(tiny))


@pytest.fixture(scope="module")
def plain(tiny: Path, base_folder: str) -> PeftModel:
    """The same loaded by PEFT alone."""
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), str(tiny)).eval()


PROMPTS = ["the cat?", "the cat?", "rain and a mat?", "the cat?"]
ANSWERS = [" sat on a mat", " saw it", " the old tree", ""]


def test_texts_messages_and_ids(tiny_reward: ImplicitReward, plain: PeftModel, make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer()
    end = [tokenizer.eos_token_id]
    ids = [tokenizer(text)["input_ids"] for text in PROMPTS], [tokenizer(text)["input_ids"] + end for text in ANSWERS]
    expected = [0.3 * plain_log_ratio(plain, *pair) for pair in zip(*ids, strict=True)]
    assert max(map(abs, expected)) > 0.1
    assert tiny_reward(PROMPTS, ANSWERS) == pytest.approx(expected, abs=1e-4)
    assert tiny_reward(*ids) == pytest.approx(expected, abs=1e-4)
    assert tiny_reward(PROMPTS, ANSWERS, completion_ids=ids[1]) == pytest.approx(expected, abs=1e-4)

    turns = [[{"role": "user", "content": text}] for text in PROMPTS]
    shown = [f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" for text in PROMPTS]
    rendered = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in shown]
    answered = [tokenizer(f"{text}<|im_end|>\n", add_special_tokens=False)["input_ids"] for text in ANSWERS]
    expected = [0.3 * plain_log_ratio(plain, *pair) for pair in zip(rendered, answered, strict=True)]
    assert tiny_reward(turns, ANSWERS) == pytest.approx(expected, abs=1e-4)
    answers = [[{"role": "assistant", "content": text}] for text in ANSWERS]
    assert tiny_reward(turns, answers) == pytest.approx(expected, abs=1e-4)


def test_sampled_tokens_are_scored_as_they_are(
    tiny_reward: ImplicitReward, plain: PeftModel, make_tokenizer: Any
) -> None:
    tokenizer = make_tokenizer()
    stopped = tokenizer(" sat on")["input_ids"]
    expected = 0.3 * plain_log_ratio(plain, tokenizer("the cat?")["input_ids"], stopped)
    (found,) = tiny_reward(["the cat?"], [" sat on"], completion_ids=[stopped], trainer_state=None, log_extra=print)
    assert found == pytest.approx(expected, abs=1e-4)
    assert abs(found - tiny_reward(["the cat?"], [" sat on"])[0]) > 1e-3  # the text gets its end token
    with pytest.raises(DataError, match=r"completion 1's completion_ids: read ' sat on' with the adapter's tokenizer"):
        tiny_reward(["a?"] * 2, [" sat on", " other text"], completion_ids=[stopped] * 2)


def test_tokens_are_those_of_training_rows(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(add_bos=True)
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    question = [{"role": "user", "content": "the cat?"}]
    answers = [[{"role": "assistant", "content": text}] for text in (" sat", " the mat")]
    for prompt, (a, b), extra in (
        ("the", (" cat", "n sat</s>"), {}),  # a merge across the border; an end token that is there already
        (question, answers, {"tools": tools}),
        ([*question, {"role": "assistant", "content": "It"}], answers, {}),  # goes on with a turn
        ([7, 8, 9], ([10, 11], [12]), {}),
    ):
        names = ("prompt", "chosen", "rejected")
        end = "_ids" if isinstance(prompt[0], int) else ""
        row = {f"{name}{end}": value for name, value in zip(names, (prompt, a, b), strict=True)}
        prepared, _ = prepare_dataset(Dataset.from_list([row | extra]), tokenizer, max_length=None)
        entries = [{"prompt": prompt, "completion": answer, **extra} for answer in (a, b)]
        names = "prompt_ids", "completion_ids"
        assert encode_completions(tokenizer, entries) == {name: prepared[0][name] for name in names}


def test_template_columns_reach_the_prompt(tiny_reward: ImplicitReward) -> None:
    prompts, answers = [[{"role": "user", "content": "the cat?"}]] * 2, ["sat"] * 2
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    plain_one, with_tools = tiny_reward(prompts, answers, tools=[None, tools])
    assert plain_one == pytest.approx(tiny_reward(prompts[:1], answers[:1])[0], abs=1e-6)
    assert abs(plain_one - with_tools) > 1e-3


# ---- Order, packing, layout -----------------------------------------------------------------------------------------


def test_order_and_packing_change_nothing(tiny: Path, tiny_reward: ImplicitReward) -> None:
    rows = text_pairs(16, seed=5)
    prompts, answers = [*rows["prompt"]] * 2, [*rows["chosen"], *rows["rejected"]]
    expected = torch.tensor(tiny_reward(prompts, answers))
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = torch.tensor(tiny_reward([prompts[i] for i in order], [answers[i] for i in order]))
    assert (shuffled - expected[order]).abs().max() < 1e-5
    small = ImplicitReward(tiny_reward.adapter, max_tokens=20)
    assert (torch.tensor(small(prompts, answers)) - expected).abs().max() < 1e-5
    padded = ImplicitReward(tiny_reward.adapter)
    padded.plan = replace(padded.plan, shared=False, fused=None)
    assert (torch.tensor(padded(prompts, answers)) - expected).abs().max() < 1e-5
    assert (shuffled - expected).abs().max() > 0.01


def test_a_prompt_is_computed_once_for_neighbors() -> None:
    def row(number: int, prompt: list[int], *lengths: int) -> dict[str, Any]:
        return {"row": number, "prompt_ids": prompt, "completion_ids": [[9] * n for n in lengths]}

    rows = [row(0, [1, 2], 3), row(1, [1, 2], 1, 1), row(2, [1], 4), row(3, [1, 2], 1)]
    units = list(units_of(rows, 100, shared=True))
    assert [[len(ids) for ids in unit["completion_ids"]] for unit in units] == [[3, 1, 1], [4], [1]]
    assert [unit["ends"] for unit in units] == [2, 1, 1]
    # No more than fits: 2 + 3, 2 + 1 + 1, ...
    units = list(units_of(rows, 5, shared=True))
    assert [[len(ids) for ids in unit["completion_ids"]] for unit in units] == [[3], [1, 1], [4], [1]]
    assert [len(unit["completion_ids"]) for unit in units_of(rows, 100, shared=False)] == [1] * 5


def test_prompts_are_cut_as_in_training_and_counted(tiny_reward: ImplicitReward, caplog: Any) -> None:
    whole = tiny_reward.scores(["the cat?"], [" sat on a mat"])[0]
    short = ImplicitReward(tiny_reward.adapter, max_length=12)
    with caplog.at_level("WARNING"):
        (score,) = short.scores(["the cat?"], [" sat on a mat"])
    assert score.tokens < whole.tokens and short.cut == 1 and tiny_reward.cut == 0
    assert "Completion 0 is cut to max_length=12" in caplog.text
    ids = short.tokenizer(" sat on a mat")["input_ids"]
    assert short.scores(["the cat?"], [" sat on a mat"], completion_ids=[ids])[0].tokens == len(ids)
    with pytest.raises(DataError, match="completion 0: prompt_too_long.*set max_length=None"):
        short(["the cat sat on the mat and saw"], [" it"])
    assert ImplicitReward(tiny_reward.adapter, max_length=None).max_length is None


def test_compare_and_rank(tiny_reward: ImplicitReward) -> None:
    answers = ANSWERS[:3]
    r = tiny_reward(["the cat?"] * 3, answers)
    assert tiny_reward.compare("the cat?", *answers[:2]) == pytest.approx(1 / (1 + math.exp(r[1] - r[0])), abs=1e-6)
    both = tiny_reward.compare("the cat?", *answers[:2]) + tiny_reward.compare("the cat?", *answers[1::-1])
    assert both == pytest.approx(1.0, abs=1e-5)
    assert tiny_reward.rank("the cat?", answers) == sorted(range(3), key=lambda i: -r[i])
    assert tiny_reward.rank("the cat?", [answers[0]] * 3) == [0, 1, 2]
    sharp = ImplicitReward(tiny_reward.adapter, beta=1e6)
    assert {sharp.compare("the cat?", *answers[:2]), sharp.compare("the cat?", *answers[1::-1])} == {0.0, 1.0}


# ---- A model that someone else holds --------------------------------------------------------------------------------


def state_of(model: PeftModel) -> dict[str, Any]:
    wrapped = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    return {
        "training": [m.training for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grad": [p.grad is None for p in model.parameters()],
        "adapters": [(m.disable_adapters, list(m.active_adapters)) for m in wrapped],
        "attention": model.get_base_model().config._attn_implementation,
        "random": torch.get_rng_state().tolist(),
    }


def test_a_model_in_training_is_left_as_it_was(tiny: Path, base_folder: str, tiny_reward: ImplicitReward) -> None:
    base = AutoModelForCausalLM.from_pretrained(base_folder, attn_implementation="eager")
    model = PeftModel.from_pretrained(base, str(tiny), adapter_name="judge", is_trainable=True)
    model.add_adapter("policy", lora())
    model.set_adapter("policy")
    model.train()
    model.base_model.model.model.layers[0].eval()
    before = state_of(model)
    held = ImplicitReward(model, tokenizer=tiny_reward.tokenizer, policy="judge")
    assert state_of(model) == before
    found = held(PROMPTS, ANSWERS)
    assert state_of(model) == before
    assert found == pytest.approx(tiny_reward(PROMPTS, ANSWERS), abs=1e-5)
    # Seen as it is at each call.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B.judge" in name:
                parameter.zero_()
    assert held(PROMPTS, ANSWERS) == pytest.approx([0.0] * 4, abs=1e-5)


def test_what_is_refused(tiny: Path, tiny_reward: ImplicitReward, base_folder: str, tmp_path: Path) -> None:
    loaded, tokenizer = tiny_reward.adapter, tiny_reward.tokenizer
    bare = get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder), lora())
    bare.save_pretrained(tmp_path)
    for make, message in (
        (lambda: ImplicitReward(str(tmp_path)), "does not say which beta"),
        (lambda: ImplicitReward(str(tmp_path), beta=-1), "beta=-1 must be a positive number"),
        (lambda: ImplicitReward(bare, tokenizer=tokenizer), "does not say which beta"),
        (lambda: ImplicitReward(str(tmp_path / "none")), "is not an adapter"),
        (lambda: ImplicitReward(loaded, base=base_folder), "base: no effect for a TrainedAdapter"),
        (lambda: ImplicitReward(loaded.model, tokenizer=tokenizer, dtype="float32"), "no effect for a PeftModel"),
        (lambda: ImplicitReward(str(tiny), policy="default"), "policy: no effect for a folder"),
        (lambda: ImplicitReward(loaded.model), "tokenizer is missing"),
        (lambda: ImplicitReward(loaded.model, tokenizer=tokenizer, policy="x"), "the model's adapters are default"),
        (lambda: ImplicitReward(loaded.model, tokenizer=tokenizer, reference="x"), "other adapters are none"),
        (lambda: ImplicitReward(loaded.model.get_base_model(), tokenizer=tokenizer), "adapter is a LlamaForCausalLM"),
        (lambda: ImplicitReward(loaded, max_tokens=0), "max_tokens=0"),
        (lambda: ImplicitReward(loaded, max_length="all"), "max_length='all'"),
        (lambda: ImplicitReward(load_trained(str(tiny), with_reference=False)), "without its reference"),
        (lambda: tiny_reward("one prompt", ["a"]), "must be lists of one length"),
        (lambda: tiny_reward(["a"], ["b", "c"]), "must be lists of one length"),
        (lambda: tiny_reward.rank("a", []), "at least one completion"),
    ):
        with pytest.raises(OptionError, match=message):
            make()
    for prompts, answers, message in (
        (["a?", "b?"], ["x", 3], "completion 1: expected text"),
        ([[], []], ["x", "y"], "the prompt of completion 0: has no tokens"),
        ([[5], [5]], [[6], [10**6]], "completion 1: position 0 holds id 1000000"),
        ([[{"role": "user", "content": "a"}]], [[{"role": "user", "content": "b"}]], "begin with a turn of the model"),
    ):
        with pytest.raises(DataError, match=message):
            tiny_reward(prompts, answers)


def test_infinite_log_probs_name_their_rows(tiny: Path) -> None:
    broken = ImplicitReward(str(tiny), max_tokens=1)
    with torch.no_grad():
        broken.model.get_base_model().model.embed_tokens.weight[300] = math.nan
    rows = [{"row": i, "prompt_ids": [5, 6], "completion_ids": [[7], [300 if i == 2 else 8, 9]]} for i in range(4)]
    with pytest.raises(NonFiniteError, match="1 rows are not finite: 2"):
        broken.score_rows(rows)


# ---- Useful: the best of eight --------------------------------------------------------------------------------------


def chance_of(differences: torch.Tensor) -> float:
    """One-sided p-value of a mean this high if every difference were as likely the other way round."""
    signs = torch.randint(0, 2, (20000, len(differences)), generator=torch.Generator().manual_seed(0)) * 2 - 1
    return float(((signs * differences).mean(1) >= differences.mean()).double().mean())


@pytest.mark.slow
def test_the_best_of_eight_by_reward_is_better(bundled: Any, reward: ImplicitReward) -> None:
    prompts, number = quickstart.eval_prompts()[:24], 8
    model, tokenizer = reward.model, reward.tokenizer
    with model.disable_adapter():
        sampled = sample_answers(model, tokenizer, [p for p in prompts for _ in range(number)], seed=3)
    texts = tokenizer.batch_decode(sampled, skip_special_tokens=True)
    true = torch.tensor([quickstart.true_reward(text) for text in texts]).view(-1, number)
    ranks = [reward.rank(p, texts[i * number : (i + 1) * number]) for i, p in enumerate(prompts)]
    rows = torch.arange(len(prompts))
    best, worst = (true[rows, torch.tensor([rank[at] for rank in ranks])] for at in (0, -1))
    random_choice = true.mean(1)
    gain = best - random_choice
    assert chance_of(gain) < 1e-3 and gain.mean() > 0.3
    # The other way round it picks worse than at random; without training it picks the first, whatever it is.
    assert chance_of(worst - random_choice) > 0.999
    with torch.no_grad():
        kept = {name: p.clone() for name, p in model.named_parameters() if "lora_B" in name}
        for name, parameter in model.named_parameters():
            if name in kept:
                parameter.zero_()
        untrained = [reward(prompts[:1] * number, texts[:number]), reward.rank(prompts[0], texts[:number])]
        for name, parameter in model.named_parameters():
            if name in kept:
                parameter.copy_(kept[name])
    assert untrained == [[0.0] * number, list(range(number))]


# ---- As TRL's reward function ---------------------------------------------------------------------------------------


class Recorded:
    """A reward function that remembers its calls."""

    __name__ = "implicit_reward"

    def __init__(self, reward: ImplicitReward):
        self.reward, self.calls = reward, []

    def __call__(self, **kwargs: Any) -> list[float]:
        rewards = self.reward(**kwargs)
        self.calls.append((kwargs["prompts"], kwargs["completion_ids"], rewards))
        return rewards


@pytest.mark.parametrize(("name", "steps", "chat"), [("GRPO", 5, False), ("RLOO", 2, True)])
def test_reinforcement_learning_on_it(
    name: str,
    steps: int,
    chat: bool,
    tiny_reward: ImplicitReward,
    plain: PeftModel,
    base_folder: str,
    make_tokenizer: Any,
    tmp_path: Path,
) -> None:
    import trl

    tokenizer = make_tokenizer()
    asked = [f"the {word}?" for word in "cat mat tree rain".split()]
    prompts = [[{"role": "user", "content": text}] for text in asked] if chat else asked
    reward = Recorded(tiny_reward)
    args = getattr(trl, f"{name}Config")(
        output_dir=str(tmp_path),
        max_steps=steps,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=8,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
    )
    trainer = getattr(trl, f"{name}Trainer")(
        base_folder,
        reward_funcs=reward,
        args=args,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=tokenizer,
        peft_config=lora(),
    )
    trainer.train()
    logged = [log["rewards/implicit_reward/mean"] for log in trainer.state.log_history if "loss" in log]
    assert len(logged) == len(reward.calls) == steps
    for mean, (asked_for, sampled, rewards) in zip(logged, reward.calls, strict=True):
        expected = []
        for prompt, ids in zip(asked_for, sampled, strict=True):
            prompt_ids = (
                tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"] if chat else None
            )
            prompt_ids = prompt_ids or tokenizer(prompt)["input_ids"]
            expected.append(0.3 * plain_log_ratio(plain, prompt_ids, ids))
        assert rewards == pytest.approx(expected, abs=1e-4)
        assert mean == pytest.approx(sum(expected) / len(expected), abs=1e-4)
        assert max(expected) - min(expected) > 1e-2  # something to learn from
    assert any(p.abs().max() > 0 for n, p in trainer.model.named_parameters() if "lora_B" in n)  # a fresh policy moved
