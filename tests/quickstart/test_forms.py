"""The bundled pairs as single answers, lists and conversations, and the recipe of each family that trains on them."""

import importlib.util
import itertools
import json
import math
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from paths import REPO
from transformers import AutoTokenizer

from dpo_peft import quickstart
from dpo_peft.data import prepare_dataset
from dpo_peft.quickstart import forms, true_reward

ROOT = REPO
RECIPES = sorted((ROOT / "recipes" / "objectives").glob("*.yaml"))


def load_script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(path: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def pairs() -> list[dict[str, Any]]:
    return read(quickstart.train_file())


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(quickstart.model_path())


@pytest.fixture(scope="module")
def lists() -> list[dict[str, Any]]:
    return forms.ranked_lists(quickstart.eval_prompts()[:10], quickstart.model_path())


def text_of(messages: list[dict[str, str]]) -> str:
    (message,) = messages
    assert message["role"] == "assistant"
    return message["content"]


# ---- single answers


def test_singles_are_every_answer_once_with_its_label(pairs: list) -> None:
    rows = forms.singles(pairs)
    expected = [
        (repr(p["prompt"]), text_of(p[name]), name == "chosen") for p in pairs for name in ("chosen", "rejected")
    ]
    found = [(repr(row["prompt"]), text_of(row["completion"]), row["label"]) for row in rows]
    assert sorted(found) == sorted(expected) and found != expected
    labels = [row["label"] for row in rows]
    alternations = sum(a != b for a, b in itertools.pairwise(labels))
    assert abs(alternations / len(labels) - 0.5) < 0.05  # a coin: pairs side by side would give more, blocks none
    assert rows == forms.singles(pairs) != forms.singles(pairs, seed=1)


def test_labels_agree_with_the_true_reward(pairs: list) -> None:
    rewards: dict[str, dict[bool, float]] = {}
    for row in forms.singles(pairs):
        rewards.setdefault(repr(row["prompt"]), {})[row["label"]] = true_reward(text_of(row["completion"]))
    assert all(of[True] - of[False] >= 0.9 for of in rewards.values() if len(of) == 2)


# ---- conversations


def test_trajectories_join_two_pairs(pairs: list) -> None:
    rows = forms.trajectories(pairs)
    by_prompt = {pair["prompt"][0]["content"]: pair for pair in pairs}
    assert len(rows) == len(pairs)
    for number, row in enumerate(rows):
        chosen, rejected = row["chosen"], row["rejected"]
        assert [m["role"] for m in chosen] == [m["role"] for m in rejected] == ["user", "assistant"] * 2
        assert chosen[0] == rejected[0] and chosen[2] == rejected[2] and chosen[0] != chosen[2]
        first, second = by_prompt[chosen[0]["content"]], by_prompt[chosen[2]["content"]]
        assert chosen[3:] == second["chosen"] and rejected[3:] == second["rejected"]
        if number % 3 == 0:
            assert [chosen[1]] == [rejected[1]] == first["chosen" if number % 6 == 0 else "rejected"]
        else:
            assert [chosen[1]] == first["chosen"] and [rejected[1]] == first["rejected"]
    for turn in (0, 2):  # every pair stands once in each place
        assert {row["chosen"][turn]["content"] for row in rows} == set(by_prompt)


def test_prepared_trajectories_share_what_is_the_same(pairs: list, tokenizer: Any) -> None:
    rows = forms.trajectories(pairs)[:6]
    prepared, report = prepare_dataset(Dataset.from_list(rows), tokenizer, max_length=384, data="trajectories")
    assert report.kept_rows == 6
    for number, (row, given) in enumerate(zip(prepared, rows, strict=True)):
        shared = 3 if number % 3 == 0 else 1
        start = tokenizer.apply_chat_template(given["chosen"][:shared], tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(row["prompt_ids"]).startswith(start)
        for name, ids, steps in zip(("chosen", "rejected"), row["completion_ids"], row["steps"], strict=True):
            assert set(steps) == ({1} if shared == 3 else {-1, 0, 1})
            last = [token for token, step in zip(ids, steps, strict=True) if step == 1]
            written = given[name][3]["content"] + tokenizer.eos_token
            assert written.endswith(tokenizer.decode(last)) and len(last) > 5


# ---- lists


def test_lists_are_ranked_by_the_true_reward(lists: list) -> None:
    assert len(lists) >= 8
    for row in lists:
        answers = [text_of(completion) for completion in row["completions"]]
        assert row["scores"] == [true_reward(answer) for answer in answers]
        assert row["scores"].count(max(row["scores"])) == 1
        assert len(set(answers)) == len(answers)
    assert {2, 6} <= {len(row["scores"]) for row in lists} <= {2, 3, 4, 5, 6}
    texts = [text_of(completion) for row in lists for completion in row["completions"]]
    assert quickstart.known_trigram_share(texts) > 0.9  # the bundled model wrote them


def test_lists_answer_their_own_prompt(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    """A sampler that repeats the prompt, with the number of its call and its place in it."""
    seeds = []

    def repeat(model: Any, tokenizer: Any, prompts: list, seed: int) -> list[list[int]]:
        seeds.append(seed)
        texts = [f"{prompt[0]['content']} {len(seeds)} {place}" for place, prompt in enumerate(prompts)]
        return tokenizer(texts, add_special_tokens=False)["input_ids"]

    monkeypatch.setattr(forms, "sample_answers", repeat)
    monkeypatch.setattr(forms, "load_base", lambda *args, **kwargs: torch.nn.Linear(1, 1))
    monkeypatch.setattr(forms, "true_reward", lambda text: float(text.split()[-2]) * 1000 + float(text.split()[-1]))
    prompts = quickstart.eval_prompts()[:50]
    rows = forms.ranked_lists(prompts, quickstart.model_path())
    assert [row["prompt"] for row in rows] == prompts
    for number, row in enumerate(rows):
        answers = [text_of(completion) for completion in row["completions"]]
        assert len(answers) == 2 + number % 5
        assert all(answer.startswith(row["prompt"][0]["content"]) for answer in answers)
    assert len(seeds) == len(set(seeds)) == 2  # 200 answers, 128 at once, and never the same random numbers


def test_prepared_lists_lose_no_row(lists: list, tokenizer: Any) -> None:
    options = {"max_length": 384, "data": "lists", "single_best": True, "on_unusable": "error"}
    prepared, report = prepare_dataset(Dataset.from_list(lists), tokenizer, **options)
    assert report.kept_rows == len(lists)
    for row, given in zip(prepared, lists, strict=True):
        assert row["grades"] == sorted(given["scores"], reverse=True)


@pytest.mark.parametrize(
    ("answers", "kept"),
    [
        (["good", "bad", "good", "fine"], ["good", "bad", "fine"]),  # sampled twice
        (["good", "nice", "bad"], ["good", "bad"]),  # two best ones
        (["bad", "poor", "good"], ["bad", "poor", "good"]),  # a tie below the best stays
        (["good", "nice"], None),
        (["good", "good"], None),
    ],
)
def test_one_answer_of_a_list_is_the_best(monkeypatch: pytest.MonkeyPatch, answers: list, kept: list | None) -> None:
    rewards = {"good": 1.0, "nice": 1.0, "fine": 0.5, "bad": -1.0, "poor": -1.0}
    monkeypatch.setattr(forms, "true_reward", rewards.__getitem__)
    row = forms._ranked([{"role": "user", "content": "?"}], answers)
    assert (row and [text_of(completion) for completion in row["completions"]]) == kept
    assert row is None or row["scores"] == [rewards[answer] for answer in kept or []]


# ---- files


def test_files_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, model = quickstart.test_file(), quickstart.model_path()
    assert forms.write_form("pairs", source, tmp_path, model) == source
    path = Path(forms.write_form("singles", source, tmp_path / "new", model))
    assert read(path) == forms.singles(read(source))
    monkeypatch.setattr(forms, "singles", lambda pairs: pytest.fail("made again"))
    assert forms.write_form("singles", source, tmp_path / "new", model) == str(path)


def test_a_broken_run_leaves_no_short_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, model = quickstart.test_file(), quickstart.model_path()

    def break_off(descriptor: int) -> None:  # what was written so far is in the file
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("os.fsync", break_off)
        forms.write_form("singles", source, tmp_path, model)
    assert len(read(forms.write_form("singles", source, tmp_path, model))) == 2 * len(read(source))


# ---- recipes


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    return load_script(ROOT / "recipes" / "objectives.py")


@pytest.fixture
def few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first training and held-out pairs in place of all."""
    for name, count in (("train", 48), ("test", 12)):
        file = tmp_path / f"{name}.jsonl"
        rows = read(getattr(quickstart, f"{name}_file")())[:count]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        monkeypatch.setattr(quickstart, f"{name}_file", lambda file=file: str(file))


def test_there_is_a_recipe_per_family() -> None:
    names = {path.stem for path in RECIPES}
    assert names == {"pairs", "lists", "unpaired", "trajectories", "reference_free"}


def expected_start(name: str, trainer: Any) -> float | None:
    """The held-out loss of a policy that still is its reference; None without a reference."""
    rows = trainer.eval_dataset
    if name == "lists":
        return sum(math.log(len(ids)) for ids in rows["completion_ids"]) / len(rows)
    return {"trajectories": math.log(2), "unpaired": 0.5}.get(name)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_learns_on_held_out_rows(recipe: ModuleType, few: None, tmp_path: Path, path: Path) -> None:
    short = {"max_steps": 4, "warmup_steps": 0, "learning_rate": 1e-3, "lr_scheduler_type": "constant"}
    options = {"config": path, "output_dir": tmp_path / "out", **short}
    argv = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    trainer = recipe.build_trainer(argv, lists=16, held_out_lists=8)
    start = trainer.evaluate()
    trainer.train()
    end = trainer.evaluate()
    expected = expected_start(path.stem, trainer)
    if expected is not None:
        assert start["eval_loss"] == pytest.approx(expected, abs=1e-4)
    assert end["eval_loss"] < start["eval_loss"] - 1e-3
    assert end["eval_rewards/margins"] > start["eval_rewards/margins"] + 1e-2
    assert {"eval_rewards/accuracies", "eval_accuracies/length_only"} <= end.keys()
    assert ("eval_kl" in end) == (path.stem != "reference_free")


@pytest.mark.slow
def test_named_data_is_taken_as_it_is(recipe: ModuleType, few: None, tmp_path: Path) -> None:
    config = ROOT / "recipes" / "objectives" / "lists.yaml"
    options = {"config": config, "output_dir": tmp_path / "out", "dataset_name": quickstart.train_file()}
    argv = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    trainer = recipe.build_trainer(argv, held_out_lists=8)
    assert [len(ids) for ids in trainer.train_dataset["completion_ids"]] == [2] * 48  # pairs: one rejected answer each
    assert max(len(ids) for ids in trainer.eval_dataset["completion_ids"]) > 2


def test_recipe_without_a_config_says_how_to_call_it(recipe: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["objectives.py"])
    with pytest.raises(SystemExit, match="--config recipes/objectives/lists.yaml"):
        recipe.main()


# ---- the benchmark's own arithmetic


@pytest.mark.parametrize("data", ["pairs", "trajectories", "lists", "singles"])
def test_benchmark_accuracy_compares_answers_to_one_prompt(data: str) -> None:
    benchmark = load_script(ROOT / "benchmarks" / "objectives.py")
    by_pair = np.array([[2.0, 1.0], [0.0, 5.0], [1.0, 1.0], [-3.0, -4.0]])  # right, wrong, equal, right
    rewards, labels = by_pair, np.zeros(4)
    if data in ("lists", "singles"):
        grade, row = np.tile([1.0, 0.0], 4), np.repeat([0.0, 1.0, 2.0, 3.0], 2)
        order = np.array([3, 6, 0, 7, 1, 5, 2, 4])
        rewards, labels = by_pair.ravel()[order], np.stack([grade, row], axis=1)[order]
    output = SimpleNamespace(predictions=rewards, label_ids=labels)
    trainer = SimpleNamespace(predict=lambda rows: output, objective=SimpleNamespace(data=data))
    assert benchmark.accuracy(trainer) == 2.5 / 4
