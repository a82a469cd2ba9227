"""metrics.json, recipe.yaml and the card of real runs: they say what was run, and nothing of the machine."""

import json
import os
import re
import stat
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hub_helpers import BASE
from paths import REPO
from peft import LoraConfig
from trainer_helpers import ours, text_pairs

from dpo_peft import DPOConfig, quickstart
from dpo_peft.artifacts.card import RunSummary, Sample, for_repository, model_card
from dpo_peft.artifacts.card_rules import problems
from dpo_peft.artifacts.recipe import plain, public, write_recipe
from dpo_peft.artifacts.rows_kept import turns
from dpo_peft.artifacts.run_files import read_samples
from dpo_peft.cli import train as cli

pytest_plugins = ["hub_helpers"]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A few steps of the quickstart from the command line's options, saved: a quantized base in a local folder."""
    folder = tmp_path_factory.mktemp("secret-user")
    held_out = folder / "held_out.jsonl"
    held_out.write_text("\n".join(Path(quickstart.test_file()).read_text().splitlines()[:8]) + "\n")
    given = {"config": REPO / "recipes" / "quickstart.yaml", "model_name_or_path": quickstart.model_path()}
    given |= {"dataset_name": quickstart.train_file(), "eval_dataset_name": held_out, "output_dir": folder / "out"}
    given |= {"max_steps": 4, "eval_steps": 2, "per_device_train_batch_size": 8, "logging_steps": 1, "lora_r": 8}
    given |= {"sample_prompts": 2, "sample_max_new_tokens": 12, "warmup_steps": 0, "learning_rate": 1e-3}
    given |= {"hub_token": "hf_" + "x" * 30, "loss_type": "sigmoid", "reward_clip": 9.0}
    argv = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    trainer = cli.build_trainer(*cli.parse(argv))
    trainer.train()
    trainer.save_model()
    return trainer, argv


def metrics(trainer: Any) -> dict[str, Any]:
    return json.loads(Path(trainer.args.output_dir, "metrics.json").read_text())


def test_metrics_say_what_was_run(quick: Any) -> None:
    trainer, _ = quick
    found = metrics(trainer)
    assert found["options"]["learning_rate"] == 1e-3 and found["options"]["output_dir"] == "out"
    assert found["options"]["reward_clip"] == 9.0 and "report_to" not in found["options"]
    assert (found["beta"], found["reward"], found["base_model"]) == (0.5, "log_ratio", "dpo_peft.quickstart")
    assert found["adapter"]["rank"] == 8 and "q_proj" in found["adapter"]["target modules"]
    assert found["quantization"]["bnb_4bit_quant_type"] == "nf4"
    assert found["environment"]["python"] == sys.version.split()[0] and "cpu" in found["environment"]["device"]
    assert found["seconds"] == next(e["train_runtime"] for e in trainer.state.log_history if "train_runtime" in e)
    assert found["objective"] == (
        "`sigmoid` (Rafailov et al. 2023, Direct Preference Optimization, arXiv:2305.18290, eq. 7)"
    )
    assert "warnings" not in found or found["warnings"] == trainer.warnings_raised


@pytest.mark.attack("planted secrets")
def test_nothing_of_the_machine_and_no_token_gets_out(quick: Any) -> None:
    trainer, _ = quick
    folder = Path(trainer.args.output_dir)
    for name in ("metrics.json", "recipe.yaml", "README.md"):
        text = (folder / name).read_text()
        assert "secret-user" not in text and str(REPO) not in text and "hf_xxx" not in text, name


def test_the_recipe_repeats_the_run(quick: Any) -> None:
    """Parsed by `dpo-peft train`, it gives the options of the run itself, apart from paths and the token."""
    trainer, argv = quick
    paths = {
        "model_name_or_path",
        "dataset_name",
        "eval_dataset_name",
        "output_dir",
        "overwrite_output_dir",
        "hub_token",
    }
    recipe = str(Path(trainer.args.output_dir, "recipe.yaml"))
    for first, again in zip(cli.parse(argv), cli.parse(["--config", recipe]), strict=True):
        names = {f.name for f in fields(first)} - paths
        assert {n: plain(getattr(first, n)) for n in names} == {n: plain(getattr(again, n)) for n in names}
    assert yaml.safe_load(Path(recipe).read_text())["dataset_name"] == "train.jsonl"


def test_a_changed_option_changes_the_recipe(quick: Any, tmp_path: Path) -> None:
    """The comparison above would see it."""
    trainer, argv = quick
    recipe = yaml.safe_load(Path(trainer.args.output_dir, "recipe.yaml").read_text())
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({**recipe, "beta": 0.25}))
    _, args, _ = cli.parse(["--config", str(tmp_path / "r.yaml")])
    assert args.beta == 0.25 != trainer.args.beta


EXOTIC: dict[str, Any] = {
    "loss_type": ["kto"],
    "beta": 0.2,
    "desirable_weight": 1.5,
    "optim": "adamw_torch",
    "lr_scheduler_type": "cosine_with_restarts",
    "lr_scheduler_kwargs": {"num_cycles": 2},
    "max_length": None,
    "report_to": ["tensorboard"],
    "fp16": False,
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "max_tokens_per_microbatch": 512,
    "gradient_checkpointing": False,
    "seed": 7,
    "adam_beta2": 0.99,
}


def test_options_of_every_kind_come_back(tmp_path: Path) -> None:
    from dpo_peft.artifacts.recipe import changed_options, write_recipe

    args = DPOConfig(output_dir=str(tmp_path / "out"), use_cpu=True, bf16=False, **EXOTIC)
    source = {"model_name_or_path": "a/b", "dataset_name": "a/c"}
    write_recipe(tmp_path / "r.yaml", changed_options(args), source)
    _, again, _ = cli.parse(["--config", str(tmp_path / "r.yaml")])
    kept = {f.name for f in fields(DPOConfig)} - {"output_dir"}
    assert {n: plain(getattr(args, n)) for n in kept} == {n: plain(getattr(again, n)) for n in kept}
    assert set(yaml.safe_load((tmp_path / "r.yaml").read_text())) == {*EXOTIC, *source} - {"fp16"} | {
        "output_dir",
        "use_cpu",
        "bf16",
        "learning_rate",  # at its default too, which was another one before
    }


def test_a_run_from_python_says_what_it_knows(tiny_llama: Any, make_tokenizer: Any, tmp_path: Path) -> None:
    model = tiny_llama()
    model.config._name_or_path = model.name_or_path = BASE
    lora = LoraConfig(r=6, lora_alpha=9, target_modules=["q_proj", "v_proj"], use_rslora=True)
    trainer = ours(model, text_pairs(4), make_tokenizer(), tmp_path / "run", peft_config=lora, max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "elsewhere"))
    text = (tmp_path / "elsewhere" / "recipe.yaml").read_text()
    recipe = yaml.safe_load(text)
    expected = {"model_name_or_path": BASE, "lora_r": 6, "lora_alpha": 9, "use_rslora": True, "dtype": "float32"}
    assert {name: recipe[name] for name in expected} == expected and recipe["quantize_base"] is False
    assert recipe["lora_target_modules"] == ["q_proj", "v_proj"]
    assert "# dataset_name: not known, the rows were given in Python." in text
    with pytest.raises(Exception, match="dataset_name is missing"):
        cli.parse(["--config", str(tmp_path / "elsewhere" / "recipe.yaml")])
    *_, parsed = cli.parse(["--config", str(tmp_path / "elsewhere" / "recipe.yaml"), "--dataset_name", "a/b"])
    assert (parsed.lora_r, parsed.use_rslora, parsed.lora_target_modules) == (6, True, ["q_proj", "v_proj"])


@pytest.mark.attack("planted secrets")
@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("/x/y/z", "z"),
        ("~/y/z", "z"),
        ("../z", "z"),
        ("C:\\x\\z", "z"),
        ({"token": "a", "hub_token": "b", "eos_token_id": 3, "password": "c"}, {"eos_token_id": 3}),
        ({"model_init_kwargs": {"token": "a", "cache_dir": "/x/y"}}, {"model_init_kwargs": {"cache_dir": "y"}}),
        (["/x/y", 1], ["y", 1]),
        ("cosine", "cosine"),
        ("org/name", "org/name"),
    ],
)
def test_what_others_may_see(value: Any, shown: Any) -> None:
    assert public(value) == shown


# The card


def test_the_card_of_a_run(quick: Any) -> None:
    trainer, _ = quick
    card = Path(trainer.args.output_dir, "README.md").read_text()
    assert problems(card) == []
    assert "the small chat model that comes with `dpo-peft`" in card and "for `model`" not in card
    assert "model_preparation_time" not in card and "(note" not in card
    verdict = json.loads(Path(trainer.args.output_dir, "metrics.json").read_text())["verdict"]
    told = card.split("- **Verdict:** ")[1].split("\n")[0]
    assert told == " ".join([f"{verdict['level']}. {verdict['headline']}", *verdict["reasons"]])
    assert "**Reference:** the same weights with the adapter switched off" in card and "nf4" in card
    assert "rafailov2023direct" in card and "dettmers2023qlora" in card
    assert "Before is step 0, after is step 4." in card and card.count("Prompt ") == 2
    samples = [json.loads(line) for line in Path(trainer.args.output_dir, "samples.jsonl").read_text().splitlines()]
    first = [s["completion"] for s in samples if s["step"] in (0, 4) and s["prompt_number"] == 0]
    shown = " ".join(card.split())
    assert len(first) == 2 and all(" ".join(text.split()) in shown for text in first)
    assert (Path(trainer.args.output_dir) / "curves.png").is_file() and "![Training curves](curves.png)" in card


def test_steps_and_rows_are_at_the_head(quick: Any) -> None:
    """4 steps of 8 pairs of the quickstart's rows: 32 of them, not all of the file."""
    trainer, _ = quick
    card, found = Path(trainer.args.output_dir, "README.md").read_text(), metrics(trainer)
    rows = trainer.data_reports["train"].kept_rows
    assert (found["steps"], found["rows_used"]) == (4, 32) and found["epochs"] == pytest.approx(4 / -(-rows // 8))
    head = card.split("## Use it")[0]
    assert f"- **Steps:** 4 ({found['epochs']:.3g} epochs, 32 different rows)" in head
    assert f"- **Rows (train):** {rows:,} of {rows:,} in the file could be used" in head


def test_lengths_are_those_of_the_rows(quick: Any) -> None:
    """Counted once more, row by row."""
    trainer, _ = quick
    found = metrics(trainer)["lengths"]
    for name, rows in {"train": trainer.train_dataset, "eval": trainer.eval_dataset}.items():
        sides = [[len(ids) for ids in row["completion_ids"]] for row in rows]
        prompts = [len(ids) for ids in rows["prompt_ids"]]
        lengths = {"prompt": prompts, "chosen": [a for a, _ in sides], "rejected": [b for _, b in sides]}
        lengths["whole row"] = [prompt + max(both) for prompt, both in zip(prompts, sides, strict=True)]
        edges = found[name]["edges"]
        for side, values in lengths.items():
            by_hand = [sum(a <= n < b for n in values) for a, b in zip(edges[:-1], edges[1:], strict=True)]
            assert found[name][side] == by_hand and sum(by_hand) == len(rows), (name, side)


def test_the_worst_pairs_are_kept_with_their_texts(quick: Any) -> None:
    trainer, _ = quick
    folder = Path(trainer.args.output_dir)
    lines = (folder / "eval_examples.jsonl").read_text().splitlines()
    last = [row for row in map(json.loads, lines) if row["step"] == 4]
    wrong = sorted((row["reward_chosen"] - row["reward_rejected"], row["row"]) for row in last)
    texts = [json.loads(line) for line in (folder / "worst_pairs.jsonl").read_text().splitlines()]
    assert [text["row"] for text in texts] == [row for margin, row in wrong if margin < 0] != []
    held_out = [json.loads(line) for line in (folder.parent / "held_out.jsonl").read_text().splitlines()]
    for text in texts:
        row = held_out[text["row"]]
        assert turns(text["prompt"]) == [("user", row["prompt"][0]["content"])]
        assert [text[side].strip() for side in ("chosen", "rejected")] == [
            row[side][0]["content"] for side in ("chosen", "rejected")
        ]
    assert stat.S_IMODE((folder / "worst_pairs.jsonl").stat().st_mode) & 0o007 == 0  # rows are not for everybody


@pytest.mark.skipif(os.name == "nt", reason="modes of POSIX")
def test_the_weights_follow_the_umask_as_the_config_does(quick: Any) -> None:
    folder = Path(quick[0].args.output_dir)
    modes = [
        stat.S_IMODE((folder / f"adapter_{name}").stat().st_mode) for name in ("model.safetensors", "config.json")
    ]
    assert modes[0] == modes[1] != 0o600


def test_the_recipe_says_what_to_put_in(quick: Any, tmp_path: Path) -> None:
    """Local files and folders by their options; a recipe that names none repeats the run as it is."""
    recipe = Path(quick[0].args.output_dir, "recipe.yaml").read_text()
    local = re.search(r"put in where these are: (.*)\.\n", recipe)
    assert local and set(local[1].split(", ")) == {"model_name_or_path", "dataset_name", "eval_dataset_name"}
    write_recipe(tmp_path / "r.yaml", {}, {"model_name_or_path": "a/b", "dataset_name": "a/c"})
    assert "# Repeats the run: dpo-peft train --config recipe.yaml\n" in (tmp_path / "r.yaml").read_text()
    write_recipe(tmp_path / "r.yaml", {}, {"datasets": [{"path": str(tmp_path)}], "model_name_or_path": "a/b"})
    assert "where these are: datasets.\n" in (tmp_path / "r.yaml").read_text()


@pytest.mark.slow
def test_the_snippet_does_as_printed_what_the_trained_model_does(quick: Any) -> None:
    """Run by a Python of its own, offline, in the folder, as it says: the greedy text of the model in memory."""
    trainer, _ = quick
    folder = Path(trainer.args.output_dir)
    (snippet,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", snippet], cwd=folder, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    model, tokenizer = trainer.model, trainer.processing_class
    messages = [{"role": "user", "content": "Tell me about your day."}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    model.eval()
    with torch.no_grad():
        on = model.generate(**inputs, max_new_tokens=64, do_sample=False)
        with model.disable_adapter():
            off = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    start = inputs["input_ids"].shape[1]
    trained, base = (tokenizer.decode(ids[0, start:], skip_special_tokens=True) for ids in (on, off))
    assert done.stdout == trained + "\n" != base + "\n"


def summary(**changes: Any) -> str:
    return str(model_card(RunSummary(**{"name": "a/x", "base_model": "a/b", "beta": 0.1, "versions": {}, **changes})))


@pytest.mark.attack("hostile rows")
def test_samples_can_not_break_out_of_their_blocks() -> None:
    """Whatever a model writes, headings, fences and HTML included, stays text."""
    wild = "```\n# Heading\n<script>alert(1)</script>\n````\n| a |"
    card = summary(samples=[Sample("p", wild, "after")], sample_steps=(0, 5))
    blocks = re.findall(r"^(`{3,})text\n(.*?)\n\1$", card, flags=re.M | re.DOTALL)
    assert [text for _, text in blocks] == ["p", wild, "after"] and blocks[1][0] == "`" * 5
    outside = re.sub(r"^(`{3,})text\n(.*?)\n\1$", "", card, flags=re.M | re.DOTALL)
    assert "<script>" not in outside and "# Heading" not in outside


def test_the_example_is_seen_from_where_a_relative_base_lies(tmp_path: Path, monkeypatch: Any) -> None:
    """A base that was given as `model` is found from its folder's parent alone, so the adapter is seen from there."""
    (tmp_path / "model").mkdir()
    (tmp_path / "out" / "run").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    of_run = {"name": str(tmp_path / "out" / "run"), "base_model": "model"}
    assert 'adapter = "out/run"  # seen from where the base\'s folder lies' in summary(**of_run)
    absolute = summary(**{**of_run, "base_model": str(tmp_path / "model")})
    assert 'adapter = "."  # this folder, "run": run it here, or give its path' in absolute
    for card in (summary(**of_run), absolute):
        assert str(tmp_path) not in card
        published = for_repository(card, "run", "me/reviews", "org/base", "model")
        assert '\nadapter = "me/reviews"\n' in published and "# reviews" in published


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("user\nHi.\nassistant\n", [("user", "Hi.")]),  # ChatML
        ("system\nBe kind.\nuser\nHi.\nassistant\n", [("system", "Be kind."), ("user", "Hi.")]),
        ("user\n\nHi.assistant\n\n", [("user", "Hi.")]),  # Llama 3
        ("user\nHi.\nmodel\n", [("user", "Hi.")]),  # Gemma
        ("user\nA\nassistant\nB\nuser\nC\nassistant\n", [("user", "A"), ("assistant", "B"), ("user", "C")]),
        (
            "system: Be kind.\nuser: Hi.\nYou?",
            [("system", "Be kind."), ("user", "Hi.\nYou?")],
        ),  # as it is recorded now
        ("user: a word of an ad", [("", "user: a word of an ad")]),
        ("It was", [("", "It was")]),
        ("user manuals of an assistant", [("", "user manuals of an assistant")]),
    ],
)
def test_turns_of_a_prompt_whose_special_tokens_are_gone(prompt: str, said: list[tuple[str, str]]) -> None:
    assert turns(prompt) == said


def test_a_long_sample_is_cut_and_says_so() -> None:
    card = summary(samples=[Sample("p", "word " * 400, "b")])
    assert "[... 1300 more characters]" in " ".join(card.split())
    assert max(map(len, card.split("## Training")[0].splitlines())) < 900


def test_three_samples_are_enough() -> None:
    card = summary(samples=[Sample(f"prompt {i}", "a", "b") for i in range(5)])
    assert re.findall(r"^prompt \d$", card, flags=re.M) == ["prompt 0", "prompt 1", "prompt 2"]


def test_warnings_are_named() -> None:
    card = summary(warnings=[{"step": 40, "name": "high-kl", "message": "The policy | is\nfar."}])
    assert "- step 40, **high-kl**: The policy \\| is far." in card
    assert "warnings" not in summary()


def test_an_accuracy_of_margins_within_noise_is_shown_as_such() -> None:
    """In the text and in the metadata of the Hub; of several evaluation sets, of those that it is true of."""
    still, moved = {"rewards/accuracies": 1.0, "rewards/margins": 7e-4, "kl": 6e-6}, {"rewards/margins": 0.7}
    sets = {f"{name}_{key}": value for name in "ab" for key, value in still.items()}
    card = summary(eval_last={**sets, "b_rewards/margins": 0.7})
    assert "**Margins within noise:**" in card
    assert re.findall(r"name: (Preference accuracy.*)", card) == [
        "Preference accuracy (margins within noise)",
        "Preference accuracy",
    ]
    assert "**Margins within noise:**" in summary(last=still), "a run without an evaluation"
    for other in ({"eval_last": {**still, **moved}}, {"eval_last": still, "reward": "mean_logp"}, {}):
        assert "within noise" not in summary(**other)


def test_first_and_last_step_of_the_samples(tmp_path: Path) -> None:
    rows = [
        {"step": step, "prompt_number": number, "prompt": f"p{number}", "completion": f"{step}-{number}"}
        for step in (0, 10, 20)
        for number in (0, 1)
    ]
    rows.pop()  # prompt 1 has no answer at step 20
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_samples(path) == ((0, 20), [Sample("p0", "0-0", "20-0")])
    path.write_text(json.dumps(rows[0]) + "\n")
    assert read_samples(path) == ((0, 0), []) == read_samples(tmp_path / "none.jsonl")


HOSTILE = "x`](https://evil.example)<script>alert(1)</script>|\n# y"


@pytest.mark.attack("hostile names")
def test_names_of_others_are_no_markup() -> None:
    """A data set, a base, an adapter, a reference and a warning that are called so."""
    summary = RunSummary(
        HOSTILE,
        f"/models/{HOSTILE}",
        0.1,
        title=HOSTILE,
        reference=HOSTILE,
        datasets=[HOSTILE],
        facts={f"Rows ({HOSTILE})": "1"},
        warnings=[{"step": 1, "name": HOSTILE, "message": HOSTILE}],
        hyperparameters={"loss_type": HOSTILE},
    )
    card = str(model_card(summary))
    text = card.split("\n---\n", 1)[1]
    outside = re.sub(r"(?s)```.*?```", "", text)  # blocks of code
    outside = re.sub(r"(?<!`)(`+)(?!`)(.*?)(?<!`)\1(?!`)", "", outside)  # spans of code
    assert "<script>" not in outside and "](https://evil" not in outside and "\n# y" not in outside
    assert yaml.safe_load(card.split("---\n")[1])["tags"]
