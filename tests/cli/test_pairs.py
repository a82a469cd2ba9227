"""`dpo-peft pairs` as a command: what it samples, who judges, what it writes, what it refuses, and being killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from trainer_helpers import lora, options, text_pairs
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_peft import DPOConfig, DPOTrainer, cli
from dpo_peft.data import prepare_dataset
from dpo_peft.errors import OptionError
from dpo_peft.model.generation import sample_completions
from dpo_peft.model.loading import keep_weights
from dpo_peft.pairs.building import seed_of
from dpo_peft.pairs.engines import ModelSource, Sampling, TransformersEngine
from dpo_peft.reward.implicit import ImplicitReward

PROMPTS = [[{"role": "user", "content": f"say {i} and the"}] for i in range(10)]
# Judges by the share of vowels, and notes in a log whom it judged. It can be told to be slow, or to stop the run.
REWARD = """
import os, time

def reward(prompts, completions, completion_ids, tag, **kwargs):
    with open(os.path.join(os.path.dirname(__file__), "judged.txt"), "a") as log:
        log.write("".join(p[0]["content"] + "\\n" for p in prompts[::4]))
    if "INTERRUPT" in os.environ and prompts[0][0]["content"] == os.environ["INTERRUPT"]:
        raise KeyboardInterrupt
    time.sleep(float(os.environ.get("SLOW", 0)))
    assert tag == [f"t{p[0]['content'].split()[1]}" for p in prompts] and all(map(len, completion_ids))
    texts = [c[0]["content"] for c in completions]
    return [sum(text.count(vowel) for vowel in "aeiou") / max(len(text), 1) for text in texts]
"""

BY_LAST_LETTER = """
def reward(completions, **_):
    return [float(ord((c if isinstance(c, str) else c[0]["content"])[-1])) for c in completions]
"""


@pytest.fixture(scope="module")
def adapter(base_folder: str, tmp_path_factory: Any) -> str:
    """Folder of an adapter trained for two steps on `base_folder`, in 4 bits and float32."""
    folder = tmp_path_factory.mktemp("adapter")
    args = DPOConfig(**options(folder, max_steps=2, learning_rate=5e-2, model_init_kwargs={"dtype": "float32"}))
    trainer = DPOTrainer(base_folder, args=args, train_dataset=text_pairs(8), peft_config=lora())
    trainer.train()
    trainer.save_model()
    return str(folder)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A folder with prompts, a judge and nothing else."""
    rows = [{"prompt": prompt, "tag": f"t{i}"} for i, prompt in enumerate(PROMPTS)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rewards.py").write_text(REWARD)
    return tmp_path


def command(work: Path, model: str | None, output: str = "pairs.jsonl", **changed: Any) -> list[str]:
    """The words after `dpo-peft pairs`: four short answers to each prompt, eight at once."""
    given = {
        "prompts": work / "prompts.jsonl",
        "output": work / output,
        "reward": f"{work / 'rewards.py'}:reward",
        "num_candidates": 4,
        "max_new_tokens": 12,
        "batch_size": 8,
        "require_finished": False,
        **changed,
    }
    words = [] if model is None else [model]
    return words + [f"--{name}={value}" for name, value in given.items() if value is not None]


def run(words: list[str], capsys: Any) -> dict[str, Any]:
    assert cli.main(["pairs", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def refused(words: list[str], capsys: Any) -> str:
    assert cli.main(["pairs", *words]) == 2
    return capsys.readouterr().err


# ---- Sampling and writing -------------------------------------------------------------------------------------------


def test_answers_are_the_adapters_and_pairs_are_theirs(
    work: Path, adapter: str, base_folder: str, capsys: Any
) -> None:
    """Against the adapter put on its base by PEFT, one prompt at a time with the documented seeds."""
    result = run(command(work, adapter, lists_output=work / "lists.jsonl", seed=3), capsys)
    trained = TransformersEngine.load(ModelSource(adapter), Sampling(12), 8).model.get_base_model()
    base = AutoModelForCausalLM.from_pretrained(
        base_folder, dtype=torch.float32, quantization_config=trained.config.quantization_config
    )
    keep_weights(base)  # or bitsandbytes computes in bfloat16 on some CPUs, and a few samples differ
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    ids = [tokenizer.apply_chat_template(p, add_generation_prompt=True)["input_ids"] for p in PROMPTS]

    def answers(model: Any) -> list[list[str]]:
        seeds = [[seed_of(3, i, k) for k in range(4)] for i in range(len(ids))]
        drawn = [sample_completions(model, tokenizer, [one] * 4, s, 12) for one, s in zip(ids, seeds, strict=True)]
        return [tokenizer.batch_decode(each, skip_special_tokens=True) for each in drawn]

    of_base, of_adapter = answers(base), answers(PeftModel.from_pretrained(base, adapter))
    assert of_base != of_adapter
    lists, pairs = read(work / "lists.jsonl"), read(work / "pairs.jsonl")
    written = {row["prompt_number"]: [c[0]["content"] for c in row["completions"]] for row in lists}
    for number, texts in written.items():
        assert texts == list(dict.fromkeys(text for text in of_adapter[number] if text.strip()))
    by_number = {row["prompt_number"]: row for row in lists}
    assert len(pairs) == result["pairs"] == result["prompts_with_pairs"] >= 8
    for row in pairs:
        scores = by_number[row["prompt_number"]]["scores"]
        assert row["prompt"] == PROMPTS[row["prompt_number"]]
        assert (row["chosen_reward"], row["rejected_reward"]) == (max(scores), min(scores))
        for name in ("chosen", "rejected"):
            text = row[name][0]["content"]
            assert sum(map(text.count, "aeiou")) / len(text) == row[f"{name}_reward"]
    assert result["candidates"] == 40 and not (work / "pairs.jsonl.unfinished").exists()
    # What was written is what training reads.
    kept, report = prepare_dataset(Dataset.from_json(str(work / "pairs.jsonl")), tokenizer, name="pairs")
    assert len(kept) == report.kept_rows == len(pairs)
    kept, _ = prepare_dataset(Dataset.from_json(str(work / "lists.jsonl")), tokenizer, name="lists", data="lists")
    assert len(kept) == len(lists)


def test_batches_and_memory_do_not_change_the_answers(work: Path, adapter: str, capsys: Any, monkeypatch: Any) -> None:
    run(command(work, adapter), capsys)
    run(command(work, adapter, "other.jsonl", batch_size=5), capsys)
    whole, calls = sample_completions, []

    def short_of_memory(model: Any, tokenizer: Any, prompt_ids: Any, *rest: Any, **how: Any) -> Any:
        calls.append(len(prompt_ids))
        if len(prompt_ids) > 2:
            raise torch.OutOfMemoryError
        return whole(model, tokenizer, prompt_ids, *rest, **how)

    monkeypatch.setattr("dpo_peft.pairs.engines.sample_completions", short_of_memory)
    run(command(work, adapter, "small.jsonl"), capsys)
    assert len({(work / name).read_text() for name in ("pairs.jsonl", "other.jsonl", "small.jsonl")}) == 1
    assert calls[:7] == [8, 4, 2, 2, 4, 2, 2]

    def without_memory(*_: Any, **how: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr("dpo_peft.pairs.engines.sample_completions", without_memory)
    assert "Out of memory for a single completion" in refused(command(work, adapter, "none.jsonl"), capsys)


def test_a_base_model_in_4_bits_or_whole(work: Path, base_folder: str, adapter: str, capsys: Any) -> None:
    run(command(work, base_folder, dtype="float32", max_prompts=4), capsys)
    run(command(work, base_folder, "whole.jsonl", dtype="float32", quantize=False, max_prompts=4), capsys)
    assert read(work / "pairs.jsonl") != read(work / "whole.jsonl")
    # In 4 bits it is the model that an adapter is trained on, to float32's rounding.
    base = TransformersEngine.load(ModelSource(base_folder, dtype="float32"), Sampling(1), 1).model
    trained = TransformersEngine.load(ModelSource(adapter), Sampling(1), 1).model
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad(), trained.disable_adapter():
        assert torch.allclose(base(ids).logits, trained(ids).logits, atol=1e-5)


def test_sampling_does_not_need_the_reference(adapter: str, tmp_path: Path) -> None:
    """An adapter that was trained against another one, which is gone: it can't be scored, but it can write."""
    shutil.copytree(adapter, tmp_path / "copy")
    config = json.loads((tmp_path / "copy" / "adapter_config.json").read_text())
    config["auto_mapping"]["dpo_peft_reference"] |= {"adapter": "gone", "adapter_fingerprint": "0" * 32}
    (tmp_path / "copy" / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "copy" / "manifest.json").unlink()
    with pytest.raises(OptionError, match="can't be found"):
        ImplicitReward(str(tmp_path / "copy"))
    gone, there = (TransformersEngine.load(ModelSource(str(f)), Sampling(6), 1) for f in (tmp_path / "copy", adapter))
    assert gone([[5, 6, 7]], [0]) == there([[5, 6, 7]], [0])


def test_rejection_sampling_leaves_accepted_answers_to_learn_from(work: Path, adapter: str, capsys: Any) -> None:
    rso = {"method": "rso", "rso_accept": 2, "rso_beta": 0.05, "sft_output": work / "sft.parquet"}
    result = run(command(work, adapter, num_candidates=8, **rso), capsys)
    accepted = Dataset.from_parquet(str(work / "sft.parquet"))
    assert len(accepted) == result["accepted"] == 20 and 0.2 < result["acceptance_rate"] < 1
    by_prompt: dict[int, set[str]] = {}
    for row in accepted:
        by_prompt.setdefault(row["prompt_number"], set()).add(row["completion"][0]["content"])
    for row in read(work / "pairs.jsonl"):
        assert {row["chosen"][0]["content"], row["rejected"][0]["content"]} == by_prompt[row["prompt_number"]]
    assert set(accepted.column_names) == {"prompt", "completion", "reward", "prompt_number"}


def test_given_answers_and_scores_need_no_model(work: Path, capsys: Any) -> None:
    rows = [
        {"prompt": "a?", "completions": [" x", " y", " z"], "rating": [1.0, 3.0, 2.0]},
        {"prompt": "b?", "completions": [" x", " x", " w"], "rating": [1.0, 1.0, 1.0]},
    ]
    (work / "given.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [f"--prompts={work / 'given.jsonl'}", f"--output={work / 'pairs.jsonl'}", "--score_column=rating"]
    result = run([*words, "--method=all", "--max_pairs=2"], capsys)
    assert [(row["chosen"], row["rejected"], row["reward_margin"]) for row in read(work / "pairs.jsonl")] == [
        (" y", " x", 2.0),
        (" z", " x", 1.0),
    ]
    assert result["pairs_refused"] == {"beyond max_pairs": 1, "equal rewards": 1}
    assert result["candidates_unused"] == {"same text as another": 1}
    assert result["prompts_without_pairs"] == {"equal rewards": 1}
    judge = (
        "def score(completions, rating, **_):\n    return [ord(c[1]) + 0 * r[0] for c, r in zip(completions, rating)]"
    )
    (work / "by_letter.py").write_text(judge)
    judged = [*words[:1], f"--output={work / 'judged.jsonl'}", f"--reward={work / 'by_letter.py'}:score"]
    run(judged, capsys)
    assert [(row["chosen"], row["rejected"]) for row in read(work / "judged.jsonl")] == [(" z", " x"), (" x", " w")]


def test_a_trained_adapter_as_the_judge(work: Path, adapter: str, base_folder: str, capsys: Any) -> None:
    words = command(work, base_folder, reward=None, implicit_reward=adapter, dtype="float32", max_prompts=4)
    run(words, capsys)
    rows = read(work / "pairs.jsonl")
    judge = ImplicitReward(adapter)
    for name in ("chosen", "rejected"):
        expected = judge([row["prompt"] for row in rows], [row[name] for row in rows])
        assert [row[f"{name}_reward"] for row in rows] == pytest.approx(expected, abs=1e-5)
    assert all(row["reward_margin"] > 0 for row in rows) and len(rows) == 4


def test_prompts_beyond_the_models_context_are_counted(work: Path, base_folder: str, capsys: Any) -> None:
    rows = [{"prompt": "x " * length, "tag": ""} for length in (5, 600, 6)]  # of 1,024 positions, two tokens a word
    (work / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (work / "plain.py").write_text(BY_LAST_LETTER)
    changed = {"prompts": work / "long.jsonl", "reward": f"{work / 'plain.py'}:reward"}
    result = run(command(work, base_folder, **changed), capsys)
    assert result["prompts_without_pairs"] == {"prompt too long for the model": 1} and result["prompts"] == 3
    assert [row["prompt_number"] for row in read(work / "pairs.jsonl")] == [0, 2]


# ---- Killed, stopped, resumed ---------------------------------------------------------------------------------------


@pytest.mark.attack("killed while writing")
@pytest.mark.slow
def test_a_kill_loses_no_finished_prompt(work: Path, adapter: str, capsys: Any) -> None:
    """A process killed by SIGKILL in the middle; the same command then does the rest and ends with the same file."""
    run(command(work, adapter, "straight.jsonl"), capsys)
    (work / "judged.txt").unlink()
    unfinished = work / "pairs.jsonl.unfinished"
    words = [sys.executable, "-m", "dpo_peft.cli", "pairs", *command(work, adapter)]
    process = subprocess.Popen(words, env={**os.environ, "SLOW": "0.3"}, stderr=subprocess.PIPE)
    patience = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < patience:
        if unfinished.is_file() and len(unfinished.read_bytes().splitlines()) >= 3:  # the header, two chunks
            os.kill(process.pid, signal.SIGKILL)
            break
        time.sleep(0.02)
    output = process.communicate()[1]
    assert process.returncode == -signal.SIGKILL, output.decode()[-2000:]
    assert not (work / "pairs.jsonl").exists()
    finished = [json.loads(line) for line in unfinished.read_text().splitlines()[1:]]
    prompts = sum(map(len, finished))
    assert 4 <= prompts < 10

    (work / "judged.txt").unlink()
    result = run(command(work, adapter), capsys)
    assert result["resumed_prompts"] == prompts
    assert (work / "judged.txt").read_text().splitlines() == [p[0]["content"] for p in PROMPTS[prompts:]]
    assert (work / "pairs.jsonl").read_bytes() == (work / "straight.jsonl").read_bytes()
    assert not unfinished.exists()


def test_ctrl_c_keeps_what_is_finished_and_other_options_are_refused(
    work: Path, adapter: str, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setenv("INTERRUPT", "say 4 and the")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["pairs", *command(work, adapter)])
    assert stopped.value.code == 130
    assert "4 of 10 prompts are in" in capsys.readouterr().err
    monkeypatch.delenv("INTERRUPT")
    for changed, named in (
        ({"temperature": 0.7}, "temperature = 1.0, and now it is 0.7"),
        ({"max_prompts": 9}, "prompts = "),
        ({"seed": 1}, "seed = 0, and now it is 1"),
        ({"reward": None, "implicit_reward": adapter}, "reward = "),
    ):
        assert named in refused(command(work, adapter, **changed), capsys)
    source = (work / "rewards.py").read_text()
    (work / "rewards.py").write_text(source + "\n# another judge\n")
    assert "source of the reward function" in refused(command(work, adapter), capsys)
    (work / "rewards.py").write_text(source)
    assert run(command(work, adapter, method="all", batch_size=16), capsys)["resumed_prompts"] == 4  # rules may change


def test_other_rules_use_the_answers_that_are_there(work: Path, adapter: str, capsys: Any) -> None:
    error = refused(command(work, adapter, min_margin=5), capsys)
    assert "no pair could be made of 40 completions" in error and "margin below min_margin" in error
    assert not (work / "pairs.jsonl").exists()
    judged = (work / "judged.txt").read_text()
    assert run(command(work, adapter, min_margin=0.01), capsys)["resumed_prompts"] == 10
    assert (work / "judged.txt").read_text() == judged  # nobody was asked again
    assert "is there already" in refused(command(work, adapter), capsys)
    assert run([*command(work, adapter), "--overwrite"], capsys)["resumed_prompts"] == 0


# ---- vLLM -----------------------------------------------------------------------------------------------------------


class StubVllm(ModuleType):
    """vLLM's names, which note what they are called with. Answers are the seed's digits, cut off if it is odd."""

    def __init__(self) -> None:
        super().__init__("vllm")
        self.options: dict[str, Any] = {}
        self.requests: list[Any] = []
        self.SamplingParams, self.LLM = SimpleNamespace, self.make
        self.lora = ModuleType("vllm.lora")
        self.lora.request = ModuleType("vllm.lora.request")  # type: ignore[attr-defined]
        self.lora.request.LoRARequest = lambda *args: ("lora", *args)  # type: ignore[attr-defined]

    def make(self, **options: Any) -> Any:
        self.options = options
        return SimpleNamespace(generate=self.generate)

    def generate(self, prompts: Any, sampling_params: Any, lora_request: Any, use_tqdm: bool) -> list[Any]:
        assert not use_tqdm
        self.requests += [
            (p["prompt_token_ids"], s, lora_request) for p, s in zip(prompts, sampling_params, strict=True)
        ]
        return [SimpleNamespace(outputs=[self.answer(params)]) for params in sampling_params]

    def answer(self, params: Any) -> Any:
        ids, cut = [10 + int(digit) for digit in str(params.seed)[-6:]], params.seed % 2
        return SimpleNamespace(token_ids=ids if cut else [*ids, 2], finish_reason="length" if cut else "stop")


@pytest.fixture
def vllm(monkeypatch: Any) -> StubVllm:
    stub = StubVllm()
    for name, module in (("vllm", stub), ("vllm.lora", stub.lora), ("vllm.lora.request", stub.lora.request)):
        monkeypatch.setitem(sys.modules, name, module)
    return stub


def test_vllm_gets_tokens_seeds_and_the_adapter(work: Path, adapter: str, vllm: StubVllm, capsys: Any) -> None:
    changed = {"engine": "vllm", "batch_size": None, "temperature": 0.8, "top_k": 0, "top_p": 0.9}
    changed |= {"gpu_memory_utilization": 0.5, "require_finished": None, "reward": None, "implicit_reward": adapter}
    result = run(command(work, adapter, **changed), capsys)
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    ids = [tokenizer.apply_chat_template(p, add_generation_prompt=True)["input_ids"] for p in PROMPTS]
    assert [request[0] for request in vllm.requests] == [one for one in ids for _ in range(4)]
    assert [request[1].seed for request in vllm.requests] == [seed_of(0, i, k) for i in range(10) for k in range(4)]
    params, request = vllm.requests[0][1], vllm.requests[0][2]
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (0.8, 0.9, -1, 12)
    assert request == ("lora", "policy", 1, adapter)
    assert vllm.options["enable_lora"] and vllm.options["max_lora_rank"] == 8  # the least that serves rank 4
    assert vllm.options["quantization"] == "bitsandbytes" and vllm.options["gpu_memory_utilization"] == 0.5
    assert vllm.options["max_model_len"] == max(map(len, ids)) + 12
    odd = sum(seed_of(0, i, k) % 2 for i in range(10) for k in range(4))
    assert result["candidates_unused"] == {"unfinished": odd} and result["pairs"] >= 5
    text = read(work / "pairs.jsonl")[0]["chosen"][0]["content"]
    assert text in {tokenizer.decode([10 + int(d) for d in str(seed_of(0, 0, k))[-6:]]) for k in range(4)}


def test_vllm_of_a_base_model_has_no_adapter(work: Path, base_folder: str, vllm: StubVllm, capsys: Any) -> None:
    (work / "plain.py").write_text(BY_LAST_LETTER)
    changed = {"engine": "vllm", "batch_size": None, "quantize": False, "max_prompts": 4}
    run(command(work, base_folder, reward=f"{work / 'plain.py'}:reward", **changed), capsys)
    assert not vllm.options.keys() & {"enable_lora", "quantization"} and vllm.requests[0][2] is None


def test_vllm_is_missing_or_cannot_serve(
    work: Path, adapter: str, base_folder: str, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert "engine='vllm' needs the package vllm" in refused(command(work, adapter, engine="vllm"), capsys)
    stub = StubVllm()
    for name, module in (("vllm", stub), ("vllm.lora", stub.lora), ("vllm.lora.request", stub.lora.request)):
        monkeypatch.setitem(sys.modules, name, module)
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    dora = LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM")
    get_peft_model(base, dora).save_pretrained(work / "dora")
    words = command(work, str(work / "dora"), engine="vllm")
    assert "an adapter with DoRA" in refused(words, capsys)


# ---- Refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompts": None}, "prompts is missing"),
        ({"output": "pairs.txt"}, "must end in .jsonl or .parquet"),
        ({"reward": None}, "no judge is given: give one of reward, reward_model, implicit_reward, score_column"),
        ({"reward_model": "x"}, "reward, reward_model are given: give one of"),
        ({"reward": None, "score_column": "tag"}, "there is no column 'completions'"),
        ({"rso_beta": 0.1}, "rso_beta: no effect, method is 'best_worst'"),
        ({"sft_output": "x.jsonl"}, "sft_output: no effect"),
        ({"max_pairs": 3}, "max_pairs: no effect"),
        ({"method": "rso", "rso_accept": 5}, "rso_accept=5 is more than num_candidates=4"),
        ({"num_candidates": 1}, "num_candidates must be at least 2"),
        ({"gpu_memory_utilization": 0.5}, "gpu_memory_utilization: no effect, engine is not 'vllm'"),
        ({"as_chat": True}, "as_chat has no effect"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"max_new_tokens": 2000}, "every prompt with max_new_tokens=2000 is longer"),
        ({"temperature": -1}, "temperature=-1.0"),
        ({"temperature": 0}, "no pair could be made"),  # four times the same completion
        ({"base": "x"}, "base has no effect"),
        ({"engine": "ollama"}, "engine"),
        ({"canditates": 3}, "'canditates' is not an option"),
        ({"reward": "nowhere.py:f"}, "there is no such file"),
        ({"prompts": "nowhere.jsonl"}, "there is no such file"),
        ({"model": "nowhere/at-all"}, "nowhere/at-all"),
    ],
)
def test_what_is_refused(work: Path, base_folder: str, changed: dict[str, Any], message: str, capsys: Any) -> None:
    model = changed.get("model", base_folder)
    given = {name: value for name, value in changed.items() if name != "model"}
    if "output" in given:
        given["output"] = work / given["output"]
        words = [word for word in command(work, model, dtype="float32") if not word.startswith("--output")]
        words.append(f"--output={given['output']}")
    else:
        words = command(work, model, dtype="float32", **given)
    assert message in refused(words, capsys)
    assert not (work / "pairs.jsonl").exists()


def test_sampling_options_have_no_effect_on_given_answers(work: Path, base_folder: str, capsys: Any) -> None:
    row = {"prompt": "a?", "completions": [" x", " y"], "scores": [1.0, 3.0]}
    (work / "given.jsonl").write_text(json.dumps(row) + "\n")
    words = [f"--prompts={work / 'given.jsonl'}", f"--output={work / 'pairs.jsonl'}"]
    assert "The rows have scores: --score_column scores" in refused(words, capsys)
    error = refused([base_folder, *words, "--score_column=scores", "--temperature=0.5"], capsys)
    assert "model, temperature: no effect, the rows have completions in 'completions' already" in error
    assert "model is missing" in refused(command(work, None), capsys)


def test_help_has_examples_and_exit_codes(capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["pairs", "--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0
    for word in ("--method rso", "exit codes", "--rso_beta", "best_worst"):
        assert word in out
