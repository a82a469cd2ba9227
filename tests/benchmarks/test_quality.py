"""The quality benchmark: TRL's trainer beside ours starts from the same model and takes the same steps; instructions
and labels are judged as figures by hand and by other code say."""

import argparse
import importlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_peft import quickstart

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def quality() -> Any:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("quality", BENCHMARKS / "quality.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def tasks(quality) -> Any:
    return importlib.import_module("quality_tasks")


def asked(task: str, data: list[str] = []) -> argparse.Namespace:  # noqa: B006
    return argparse.Namespace(task=task, model=quickstart.model_path(), data=data, times=1, device="cpu")


def test_trl_is_measured_from_the_same_start(quality, tasks, monkeypatch):
    short = tasks.Task((1, 2), 4, 2e-3, 0.5, 4, (0.1,), 24)
    monkeypatch.setitem(quality.TASKS, "quickstart", short)
    prompts = quality.quickstart.eval_prompts()[:8]
    monkeypatch.setattr(quality.quickstart, "eval_prompts", lambda: prompts)
    ours, theirs, kto = (quality.measure(asked("quickstart"), name, 0)["points"] for name in ("full", "trl", "kto"))
    for own, other, unlike in zip(ours, theirs, kto, strict=True):
        assert own["kl"] == pytest.approx(other["kl"], abs=1e-3) and own["kl"] > 0.01
        assert own["rewards"] == other["rewards"]
        assert abs(unlike["kl"] - own["kl"]) > 0.01  # the control: another objective moves it elsewhere
    summary = quality.summarize({f"quickstart/{name}/0": {"points": p} for name, p in (("full", ours), ("kto", kto))})
    assert "accuracy" in summary["quickstart/full"] and "accuracy" not in summary["quickstart/kto"]
    assert summary["quickstart/kto"]["kl"]["mean"] == pytest.approx(kto[-1]["kl"], abs=1e-4)


def test_pairs_of_sentiment_are_ranked_by_the_lexicon(tasks, monkeypatch, tmp_path):
    pytest.importorskip("vaderSentiment")
    monkeypatch.setattr(tasks, "OPENINGS", tasks.OPENINGS[:2])
    monkeypatch.setattr(tasks, "PLACES", tasks.PLACES[:4])
    monkeypatch.setitem(tasks.TASKS, "sentiment", tasks.TASKS["sentiment"]._replace(held_out=1))
    tasks.draw_pairs("sentiment", tmp_path / "pairs.json", quickstart.model_path(), "cpu")
    train, test = tasks.read_pairs("sentiment", [str(tmp_path / "pairs.json")], 1, "cpu")
    texts = [[row[side][0]["content"] for side in ("chosen", "rejected")] for row in train]
    score = tasks.vader().polarity_scores
    assert all(score(chosen)["compound"] > score(rejected)["compound"] for chosen, rejected in texts) and texts
    assert test[0]["prompt"] not in [row["prompt"] for row in train]


LOUD = "EVERY WORD IN CAPITALS, AND A GOOD DEAL LONGER THAN THE OTHERS"


def saying(*texts: str) -> Any:
    """A policy that answers the first prompt with the first text, and so on from the beginning."""

    def sample(model: Any, tokenizer: Any, prompts: list[Any], seed: int, most: int) -> list[list[int]]:
        return [tokenizer(texts[(seed + at) % len(texts)])["input_ids"] for at in range(len(prompts))]

    return sample


def test_pairs_of_instructions_pass_and_fail_at_lengths_that_are_near(tasks, monkeypatch, tmp_path):
    """Four answers, of which every prompt gets each: two are in small letters, and of those the longer one is nearer
    to an answer that isn't."""
    answers = ("no.", "small letters, all of them", "Capital Letters, some of them", LOUD)
    monkeypatch.setattr(tasks, "sample_answers", saying(*answers))
    monkeypatch.setitem(tasks.TASKS, "instructions", tasks.TASKS["instructions"]._replace(held_out=50))
    tasks.draw_pairs("instructions", tmp_path / "pairs.json", quickstart.model_path(), "cpu")
    train, test = tasks.read_pairs("instructions", [str(tmp_path / "pairs.json")], 50, "cpu")
    pairs = {
        row["prompt"][0]["content"]: [row[side][0]["content"] for side in ("chosen", "rejected")] for row in train
    }
    lower = [pair for prompt, pair in pairs.items() if "small letters only" in prompt or "lower case" in prompt]
    assert lower and all(pair == [answers[1], answers[2]] for pair in lower)
    assert not any("Never use the letter" in prompt for prompt in pairs)  # all four pass
    held = [row["prompt"][0]["content"] for row in test]
    assert len(held) == 50 and not {*held} & {*pairs}
    kinds = {row["prompt"]: json.loads(row["instruction"])["kind"] for row in tasks.asked("instructions", 1)[0]}
    assert not {kinds[prompt] for prompt in pairs} & {*tasks.UNSEEN}
    assert {json.loads(row["instruction"])["kind"] for row in test} > {*tasks.UNSEEN}  # the control: held out are all


@pytest.mark.parametrize(("answer", "seen", "unseen"), [("all small", 1, 1), ("Some, Other", 0, 0), ("All", 0, 1)])
def test_instructions_followed_are_counted_by_kind(quality, tasks, monkeypatch, tmp_path, answer, seen, unseen):
    """ "lowercase" is a kind that is trained on, "no_commas" one that isn't."""
    monkeypatch.setitem(tasks.TASKS, "instructions", tasks.Task((1,), 2, 1e-4, 0.1, 3, (), 8))
    monkeypatch.setattr(quality, "sample_answers", saying(answer))
    prompt = [{"role": "user", "content": "Say something."}]
    sides = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    test = [{"prompt": prompt, "instruction": json.dumps({"kind": kind})} for kind in ("lowercase", "no_commas") * 2]
    file = tmp_path / "pairs.json"
    file.write_text(json.dumps({"train": [{"prompt": prompt, **sides}] * 2, "test": test}))
    points = quality.measure(asked("instructions", [str(file)]), "full", 0)["points"]
    of = quality.measures(())
    assert [float(of[f"worth, {which} kinds"](points).mean()) for which in ("seen", "unseen")] == [seen, unseen]
    assert points[-1]["words"] == len(answer.split())


def test_labels_swapped_give_the_mirrored_accuracy(quality, tasks, monkeypatch, tmp_path):
    """Margins are told from the trainer's own metrics, which count by other code."""
    file = tmp_path / "judged.jsonl"
    words = ("a-is-better", "a-is-slightly-better", "tie", "b-is-slightly-better", "b-is-better")
    rows = [json.loads(line) for line in Path(quickstart.train_file()).read_text("utf-8").splitlines()[:40]]
    judged = [
        {
            "prompt": row["prompt"][0]["content"],
            "completion_a": row["chosen"][0]["content"],
            "completion_b": row["rejected"][0]["content"] + " And so on." * (at % 3),
            "preference": words[at % 5],
        }
        for at, row in enumerate(rows)
    ]
    file.write_text("\n".join(map(json.dumps, [*judged, *judged[:5]])))  # some prompts stand twice
    monkeypatch.setitem(tasks.TASKS, "labels", tasks.Task((1,), 4, 2e-3, 0.1, 12, ()))
    train, test = tasks.read_pairs("labels", [str(file)], 12, "cpu")
    prompts = [{row["prompt"][0]["content"] for row in part} for part in (train, test)]
    assert not prompts[0] & prompts[1] and len(prompts[1]) == len(test) == 12
    better = {row["prompt"]: row["completion_a" if row["preference"][0] == "a" else "completion_b"] for row in judged}
    assert all(row["chosen"][0]["content"] == better[row["prompt"][0]["content"]] for row in [*train, *test])
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in test]
    runs = []
    for held in (test, swapped):
        monkeypatch.setattr(quality, "read_pairs", lambda *_, held=held: (train, held))
        runs.append(quality.measure(asked("labels"), "full", 0)["points"])
    of = quality.measures(())
    for name in ("accuracy", "length alone", "length_balanced"):
        right, wrong = (float(of[name](points).mean()) for points in runs)
        assert right == pytest.approx(1 - wrong) and 0 < right < 1
    own = float(of["length_balanced"](runs[0]).mean())
    assert own == pytest.approx(runs[0][-1]["length_balanced"], abs=1e-6)
    assert own != pytest.approx(float(of["accuracy"](runs[0]).mean()), abs=1e-3)  # the control: it isn't the accuracy


def test_a_gguf_file_is_converted_with_the_splits_of_its_tokenizer(quality, monkeypatch, tmp_path):
    gguf = pytest.importorskip("gguf")
    from gguf_files import write_gguf
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    key, file, folder = "tokenizer.ggml.pre", tmp_path / "model.gguf", tmp_path / "folder"
    monkeypatch.setattr(gguf.GGUFWriter, "add_tokenizer_pre", lambda self, _: self.add_string(key, "smollm"))
    monkeypatch.delitem(GGUF_PRE_TOKENIZER_SPLITS, "smollm", raising=False)
    own = AutoTokenizer.from_pretrained(quickstart.model_path())
    model = AutoModelForCausalLM.from_pretrained(quickstart.model_path(), dtype="float32")
    write_gguf(file, model, own, "Q8_0")
    silent = AutoTokenizer.from_pretrained(str(tmp_path), gguf_file=file.name)
    quality.convert(file, folder)
    saved = AutoTokenizer.from_pretrained(folder)
    split = [len(one.backend_tokenizer.pre_tokenizer.pre_tokenize_str("2024")) for one in (saved, silent)]
    assert split == [4, 1]  # the control: transformers alone splits like GPT-2
    assert saved.chat_template == own.chat_template
    name = "model.layers.1.mlp.up_proj.weight"
    read, weight = (one.state_dict()[name].float() for one in (AutoModelForCausalLM.from_pretrained(folder), model))
    assert (read - weight).abs().max() < 0.02 * weight.abs().max()


def test_the_gpus_queue_has_each_task_in_full(quality):
    cases = [case["command"] for case in importlib.import_module("speed_cases").gpu() if "quality" in case["name"]]
    assert [command[command.index("--task") + 1] for command in cases] == ["sentiment", "instructions", "labels"]
    assert all("--variants" not in command and "cuda" in command for command in cases)
