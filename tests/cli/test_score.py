"""`dpo-peft score`: figures that agree with the trainer's, files that can be joined to the rows, errors in time."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from datasets import load_dataset
from safetensors.torch import load_file, save_file
from trainer_helpers import ours, text_pairs

from dpo_peft import DPOTrainer, cli
from dpo_peft.cli import score as cli_score


@pytest.fixture(scope="module")
def trained(base_folder: str, make_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> DPOTrainer:
    """A tiny adapter, moved well away from its start."""
    folder = tmp_path_factory.mktemp("adapter")
    trainer = ours(
        base_folder,
        text_pairs(12),
        make_tokenizer(),
        folder,
        max_steps=4,
        learning_rate=1e-2,
        beta=0.5,
        quantize_base=False,
        model_init_kwargs={"dtype": "float32"},
    )
    trainer.train()
    trainer.save_model()
    return trainer


@pytest.fixture(scope="module")
def adapter(trained: DPOTrainer) -> str:
    return str(trained.args.output_dir)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Held-out pairs with a category."""
    rows = [{**row, "kind": "odd" if i % 2 else "even"} for i, row in enumerate(text_pairs(30, seed=9))]
    return write(tmp_path_factory.mktemp("data") / "pairs.jsonl", rows)


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def score(capsys: Any, *argv: Any) -> dict[str, Any]:
    """The command's JSON."""
    capsys.readouterr()
    assert cli.main(["score", *map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)  # nothing else is on stdout


def lines_of(file: Path) -> list[dict[str, Any]]:
    return load_dataset(
        "parquet" if file.suffix == ".parquet" else "json", data_files=str(file), split="train"
    ).to_list()


def test_figures_and_lines_are_the_trainers(
    trained: DPOTrainer, adapter: str, pairs: Path, capsys: Any, tmp_path: Path
) -> None:
    held_out = load_dataset("json", data_files=str(pairs), split="train")
    predicted = trained.predict(held_out)
    metrics = {name.removeprefix("test_"): value for name, value in predicted.metrics.items()}
    output = tmp_path / "scores.jsonl"
    result = score(capsys, adapter, "--dataset_name", pairs, "--category_column", "kind", "--output", output)

    found = result["agreement"]
    assert result["data"] == "pairs" and result["beta"] == 0.5 and found["comparisons"] == 30
    assert found["accuracy"]["value"] == pytest.approx(metrics["rewards/accuracies"], abs=1e-6)
    assert found["length_only"]["value"] == pytest.approx(metrics["accuracies/length_only"], abs=1e-6)
    assert found["mean_margin"] == pytest.approx(metrics["rewards/margins"], abs=1e-5)
    assert found["accuracy"]["low"] < found["accuracy"]["value"] < found["accuracy"]["high"]

    lines = lines_of(output)
    for i, (line, (chosen, rejected)) in enumerate(zip(lines, predicted.predictions.tolist(), strict=True)):
        assert (line["row"], line["category"]) == (i, "odd" if i % 2 else "even")
        assert (line["reward_chosen"], line["reward_rejected"]) == pytest.approx((chosen, rejected), abs=1e-5)
        assert line["margin"] == pytest.approx(chosen - rejected, abs=1e-5)
        assert line["correct"] == float(chosen > rejected)
        log_ratio = line["logp_chosen"] - line["ref_logp_chosen"]
        assert line["reward_chosen"] == pytest.approx(0.5 * log_ratio, abs=1e-6)
    # What the lines add up to.
    right = [line["correct"] for line in lines]
    halves = [[line["tokens_chosen"] - line["tokens_rejected"] for line in lines], right]
    longer, shorter = ([r for d, r in zip(*halves, strict=True) if d * sign > 0] for sign in (1, -1))
    balanced = (sum(longer) / len(longer) + sum(shorter) / len(shorter)) / 2
    assert found["length_balanced"]["value"] == pytest.approx(balanced)
    for kind, of_kind in result["by_category"].items():
        mine = [line["correct"] for line in lines if line["category"] == kind]
        assert of_kind["accuracy"]["value"] == pytest.approx(sum(mine) / len(mine)) and of_kind["comparisons"] == 15

    wrong = sorted((line["margin"], line["row"]) for line in lines if line["correct"] < 1)
    assert [one["row"] for one in result["worst"]] == [row for _, row in wrong[:10]]
    assert [one["margin"] for one in result["worst"]] == pytest.approx([margin for margin, _ in wrong[:10]])
    assert result["worst"][0]["better"] == held_out[wrong[0][1]]["chosen"].strip()


def test_text_for_people(adapter: str, pairs: Path, capsys: Any, caplog: Any) -> None:
    assert cli.main(["score", adapter, "--dataset_name", str(pairs), "--category_column", "kind", "--worst", "2"]) == 0
    out, err = capsys.readouterr()
    assert "30 pairs of 30 rows scored" in out and "0.5 * log(policy / reference)" in out
    assert out.count("    better: ") == 2 and "length-balanced" in out and "\neven " in out
    assert "Scoring: 100%" in err and "30 of 30 rows kept" in caplog.text


def test_an_accuracy_of_margins_within_noise_is_shown_as_such(
    adapter: str, pairs: Path, capsys: Any, tmp_path: Path
) -> None:
    """The same adapter, shrunk until it does next to nothing: its order of the pairs is much the same."""
    shutil.copytree(adapter, tmp_path / "small", ignore=shutil.ignore_patterns("manifest.json"))  # changed on purpose
    file = tmp_path / "small" / "adapter_model.safetensors"
    save_file({n: t * (1e-3 if "lora_B" in n else 1) for n, t in load_file(file).items()}, file)
    large, small = (score(capsys, folder, "--dataset_name", pairs) for folder in (adapter, tmp_path / "small"))
    assert (large["note"], small["note"]) == ("", "margins within noise")
    assert 0 < abs(small["agreement"]["mean_margin"]) < 0.05 < abs(large["agreement"]["mean_margin"])
    assert cli.main(["score", str(tmp_path / "small"), "--dataset_name", str(pairs), "--beta", "20"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("all "))
    assert line.endswith("  margins within noise"), "a larger beta makes larger margins, and no other model"


def test_parquet_holds_the_same(adapter: str, pairs: Path, capsys: Any, tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.parquet"):
        result = score(capsys, adapter, "--dataset_name", pairs, "--output", tmp_path / name, "--worst", 0)
        assert result["output"] == str(tmp_path / name) and "worst" not in result
    assert lines_of(tmp_path / "a.jsonl") == lines_of(tmp_path / "a.parquet")


def test_options_replace_what_is_recorded(adapter: str, pairs: Path, capsys: Any) -> None:
    recorded = score(capsys, adapter, "--dataset_name", pairs)
    doubled = score(capsys, adapter, "--dataset_name", pairs, "--beta", 1.0, "--max_tokens", 50)
    assert doubled["agreement"]["mean_margin"] == pytest.approx(2 * recorded["agreement"]["mean_margin"], abs=1e-5)
    assert doubled["agreement"]["accuracy"] == recorded["agreement"]["accuracy"]
    cut = score(capsys, adapter, "--dataset_name", pairs, "--max_length", 22)
    assert cut["truncated"] > 0 and cut["max_length"] == 22 and recorded["truncated"] == 0
    assert cut["rows"] == 30 == cut["scored_rows"] + sum(cut["dropped"].values())
    assert score(capsys, adapter, "--dataset_name", pairs, "--max_length", 0)["max_length"] is None


def test_ties_and_preferences(adapter: str, capsys: Any, tmp_path: Path) -> None:
    rows = [{**row, "preference": p} for row, p in zip(text_pairs(3), (1.0, 0.5, 0.2), strict=True)]
    plain = write(tmp_path / "plain.jsonl", list(text_pairs(3)))
    soft = write(tmp_path / "soft.jsonl", rows)
    outputs = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    score(capsys, adapter, "--dataset_name", plain, "--output", outputs[0])
    result = score(capsys, adapter, "--dataset_name", soft, "--output", outputs[1])
    assert result["agreement"]["comparisons"] == 2  # a tie has no better answer
    before, after = map(lines_of, outputs)
    assert after[1]["correct"] is None and after[1]["margin"] == pytest.approx(before[1]["margin"], abs=1e-5)
    assert after[2]["margin"] == pytest.approx(-before[2]["margin"], abs=1e-5)  # the other one is the better one


def test_ranked_lists_come_back_in_their_order(adapter: str, capsys: Any, tmp_path: Path) -> None:
    answers = [" sat on a mat", " saw", " it rained and rained", " in one tree"]
    singles = write(tmp_path / "singles.jsonl", [{"prompt": "the cat?", "completion": text} for text in answers])
    ranked = {"prompt": "the cat?", "completions": answers, "scores": [1, 7, 3, 3], "kind": "x"}
    lists = write(tmp_path / "lists.jsonl", [ranked])
    score(capsys, adapter, "--dataset_name", singles, "--output", tmp_path / "a.jsonl")
    result = score(
        capsys, adapter, "--dataset_name", lists, "--output", tmp_path / "b.jsonl", "--category_column", "kind"
    )
    rewards = [line["reward"] for line in lines_of(tmp_path / "a.jsonl")]
    (line,) = lines_of(tmp_path / "b.jsonl")
    assert line["rewards"] == pytest.approx(rewards, abs=1e-5) and line["grades"] == [1, 7, 3, 3]
    better = [(1, 0), (1, 2), (1, 3), (2, 0), (3, 0)]
    won = sum(rewards[a] > rewards[b] for a, b in better) / len(better)
    assert result["data"] == "lists" and result["agreement"]["accuracy"]["value"] == pytest.approx(won)
    assert line["won"] == pytest.approx(won) and line["category"] == "x"
    several = write(tmp_path / "n.jsonl", [{"prompt": "the cat?", "chosen": answers[0], "rejected": answers[1:]}])
    score(capsys, adapter, "--dataset_name", several, "--output", tmp_path / "c.jsonl")
    assert lines_of(tmp_path / "c.jsonl")[0]["rewards"] == pytest.approx(rewards, abs=1e-5)


def test_single_judged_answers(adapter: str, capsys: Any, tmp_path: Path) -> None:
    rows = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in text_pairs(6, seed=4)
        for side in ("chosen", "rejected")
    ]
    result = score(
        capsys, adapter, "--dataset_name", write(tmp_path / "s.jsonl", rows), "--output", tmp_path / "o.jsonl"
    )
    lines = lines_of(tmp_path / "o.jsonl")
    good, bad = ([line["reward"] for line in lines if line["label"] is label] for label in (True, False))
    share = sum((a > b) + (a == b) / 2 for a in good for b in bad) / 36
    assert result["data"] == "singles" and result["agreement"]["accuracy"]["value"] == pytest.approx(share)
    assert lines[0]["won"] == pytest.approx(sum(good[0] > b for b in bad) / 6)
    assert all(one["won"] < 0.5 for one in result["worst"])


def test_without_labels_there_are_scores_only(adapter: str, capsys: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "the cat?", "completions": [" sat", " on a mat"]}, {"prompt": "rain?", "completions": [" it"]}]
    file = write(tmp_path / "u.jsonl", rows)
    result = score(capsys, adapter, "--dataset_name", file, "--output", tmp_path / "o.jsonl")
    assert result["agreement"] is None and (result["rows"], result["completions"]) == (2, 3)
    places = [(line["row"], line["completion"]) for line in lines_of(tmp_path / "o.jsonl")]
    assert places == [(0, 0), (0, 1), (1, 0)]
    assert cli.main(["score", adapter, "--dataset_name", str(file)]) == 0
    assert "No accuracy: the completions have no labels" in capsys.readouterr().out


def test_dropped_rows_are_counted(adapter: str, capsys: Any, caplog: Any, tmp_path: Path) -> None:
    rows = [*text_pairs(3), {"prompt": "the cat?", "chosen": " sat", "rejected": " sat"}]
    file = write(tmp_path / "d.jsonl", rows)
    result = score(capsys, adapter, "--dataset_name", file)
    assert (result["rows"], result["scored_rows"], result["dropped"]) == (4, 3, {"identical_completions": 1})
    assert cli.main(["score", adapter, "--dataset_name", str(file)]) == 0
    assert "3 pairs of 4 rows scored, 1 dropped" in capsys.readouterr().out
    assert "dropped 1: identical_completions" in caplog.text


def test_converted_rows_keep_their_category(adapter: str, capsys: Any, tmp_path: Path) -> None:
    talk = [{"from": "human", "value": "the cat?"}]
    rows = [
        {
            "conversations": talk,
            "chosen": {"from": "gpt", "value": a},
            "rejected": {"from": "gpt", "value": b},
            "of": c,
        }
        for a, b, c in (("sat", "on a mat", "x"), ("tree", "rain", "y"))
    ]
    options = ["--dataset_format", "sharegpt", "--category_column", "of"]
    result = score(capsys, adapter, "--dataset_name", write(tmp_path / "g.jsonl", rows), *options)
    assert list(result["by_category"]) == ["x", "y"] and result["agreement"]["comparisons"] == 2


def test_help_shows_examples_and_exit_codes(capsys: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["score", "--help"])
    out = capsys.readouterr().out
    assert stopped.value.code == 0 and "exit codes:" in out
    assert all(example in out for example in cli_score.EXAMPLES)


def test_what_is_refused(adapter: str, pairs: Path, capsys: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """With exit code 2, before a model is loaded, and nothing is written."""
    from dpo_peft.model import loading

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(loading, "load_base", refuse)
    broken = write(tmp_path / "broken.jsonl", [*text_pairs(1), {"prompt": "", "chosen": "b", "rejected": "c"}])
    no_record = tmp_path / "no_record"
    no_record.mkdir()
    config = json.loads((Path(adapter) / "adapter_config.json").read_text())
    (no_record / "adapter_config.json").write_text(json.dumps({**config, "auto_mapping": None}))
    for argv, message in (
        ([], "adapter is missing"),
        ([adapter], "dataset_name is missing"),
        ([adapter, "--dataset_name", tmp_path / "none.jsonl"], "there is no such file"),
        ([adapter, "--dataset_name", pairs, "--output", tmp_path / "a.txt"], "must end in .jsonl or .parquet"),
        ([adapter, "--dataset_name", pairs, "--dataset_split", "test"], "dataset_split has no effect"),
        ([adapter, "--dataset_name", pairs, "--category_column", "sort"], "the columns are prompt, chosen, rejected"),
        ([adapter, "--dataset_name", pairs, "--worst", -1], "worst=-1 must be 0 or more"),
        ([adapter, "--dataset_name", pairs, "--max_length", 1], "max_length=1 must be None or an integer of at least"),
        ([adapter, "--dataset_name", pairs, "--max_tokens", 0], "max_tokens=0 must be a positive integer"),
        ([adapter, "--dataset_name", pairs, "--beta", 0], "beta=0.0 must be a positive number"),
        ([adapter, "--dataset_name", pairs, "--categories_column", "kind"], "Did you mean 'category_column'?"),
        ([tmp_path / "x", "--dataset_name", pairs], "is not an adapter"),
        ([adapter, "--dataset_name", broken], "score row 1, field 'prompt'"),
        ([no_record, "--dataset_name", pairs], "does not say which beta"),
    ):
        assert cli.main(["score", *map(str, argv)]) == 2, argv
        err = capsys.readouterr().err
        assert message in err, (argv, err)
    assert not list(tmp_path.glob("*.txt"))


def test_a_base_that_was_not_trained_on(
    adapter: str, pairs: Path, tiny_llama: Any, capsys: Any, tmp_path: Path
) -> None:
    tiny_llama(seed=1).save_pretrained(tmp_path)
    argv = ["score", adapter, "--dataset_name", str(pairs), "--base", str(tmp_path)]
    assert cli.main(argv) == 2
    assert "is not the one that it was trained on" in capsys.readouterr().err
    assert cli.main([*argv, "--check_base", "false"]) == 0


def test_empty_file(adapter: str, capsys: Any, tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text("prompt,chosen,rejected\n")
    assert cli.main(["score", adapter, "--dataset_name", str(tmp_path / "e.csv")]) == 2
    assert f"{tmp_path / 'e.csv'}" in capsys.readouterr().err
