"""The command line: options of file and command line, what it refuses, and what a run leaves behind."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors import safe_open
from transformers import AutoTokenizer

from dpo_peft import cli
from dpo_peft.cli import plan as cli_plan
from dpo_peft.cli import train as cli_train
from dpo_peft.cli.options import split_config
from dpo_peft.errors import DriftError, OptionError, TrainingInterrupted
from dpo_peft.reference.cache import Entry, ReferenceCache


@pytest.fixture
def run_folder(tmp_path: Path, tiny_llama: Any, make_tokenizer: Any) -> Path:
    """A model, twelve training and four evaluation rows, and a config file for them."""
    tiny_llama().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"say {i}", "chosen": f" the {i} and more", "rejected": f" a {i}"} for i in range(16)]
    for name, part in (("train", rows[:12]), ("test", rows[12:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    options = {
        "model_name_or_path": str(tmp_path / "model"),
        "dataset_name": str(tmp_path / "train.jsonl"),
        "eval_dataset_name": str(tmp_path / "test.jsonl"),
        "output_dir": str(tmp_path / "out"),
        "dtype": "float32",
        "bf16": False,
        "use_cpu": True,
        "beta": 0.3,
        "learning_rate": "1e-3",
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "logging_steps": 1,
        "eval_strategy": "epoch",
        "save_steps": 2,
        "lora_r": 4,
        "report_to": "none",
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(options))
    return tmp_path


def train(folder: Path, *options: str) -> Any:
    return cli_train.train(["--config", str(folder / "run.yaml"), *options])


def test_the_command_line_overrides_the_file(run_folder: Path) -> None:
    data, args, model = cli_train.parse(["--config", str(run_folder / "run.yaml"), "--beta", "0.2", "--lora_r", "8"])
    assert (args.beta, model.lora_r) == (0.2, 8)
    assert (args.learning_rate, args.num_train_epochs, model.dtype) == (1e-3, 2, "float32")
    assert data.dataset_name.endswith("train.jsonl")
    assert cli_train.parse([f"--config={run_folder / 'run.yaml'}"])[1].beta == 0.3


@pytest.mark.attack("hostile config")
def test_a_file_may_hold_null_but_sets_no_environment_variables(run_folder: Path) -> None:
    path, before = run_folder / "run.yaml", dict(os.environ)
    options = path.read_text() + "max_length: null\n"
    path.write_text(options)
    assert cli_train.parse(["--config", str(path)])[1].max_length is None
    for command in (cli_train.parse, cli_plan.plan):
        path.write_text(f"{options}env:\n  DPO_PEFT_TEST: 7\n")
        with pytest.raises(OptionError, match="env would set environment variables"):
            command(["--config", str(path)])
    assert dict(os.environ) == before


@pytest.mark.attack("hostile config")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("beta: 0.1\nbeta: 0.9\n", "'beta' stands twice"),
        ("model_init_kwargs:\n  dtype: float32\n  dtype: bfloat16\n", "'dtype' stands twice"),
        ("datasets:\n- path: a\n  path: b\n", "'path' stands twice"),
        (b"beta: 0.1 # \xe9\n", "not valid YAML"),
        ("[" * 5000, "not valid YAML"),
        ("a: !!python/object/apply:os.system [ls]", "not valid YAML"),
    ],
)
def test_a_config_file_that_is_not_what_it_seems(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(OptionError, match=f"run.yaml.*{message}"):
        cli_train.parse(["--config", str(path)])


def test_keys_of_several_mappings_may_be_the_same(tmp_path: Path) -> None:
    """Those of merged mappings too, which a later value replaces on purpose."""
    path = tmp_path / "run.yaml"
    path.write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\nc: [{x: 1}, {x: 2}]\n")
    assert split_config(["--config", str(path)])[1]["b"] == {"x": 3, "y": 2}


def test_a_run_leaves_adapter_card_metrics_and_curves(run_folder: Path) -> None:
    trainer = train(run_folder)
    out = run_folder / "out"
    with safe_open(out / "adapter_model.safetensors", "pt") as saved:
        shapes = {saved.get_slice(name).get_shape()[0] for name in saved.keys() if "lora_A" in name}
        assert shapes == {4}
    assert AutoTokenizer.from_pretrained(out)("the").input_ids == trainer.processing_class("the").input_ids
    metrics = json.loads((out / "metrics.json").read_text())
    assert [entry["step"] for entry in metrics["log_history"] if "loss" in entry] == list(range(1, 7))
    assert metrics["first"]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert metrics["data"]["train"]["kept_rows"] == 12 and metrics["data"]["eval"]["kept_rows"] == 4
    assert metrics["storage_bytes"]["quantized"] > 0
    card = (out / "README.md").read_text()
    assert f"{metrics['eval_last']['rewards/margins']:.4g}" in card and "nf4" in card
    assert (out / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_resume_gives_the_figures_of_the_straight_run(run_folder: Path) -> None:
    straight = train(run_folder)
    weights = {n: p.detach().clone() for n, p in straight.model.named_parameters() if p.requires_grad}
    resumed = train(run_folder, "--resume_from_checkpoint", str(run_folder / "out" / "checkpoint-4"))
    assert resumed.state.global_step == 6
    for name, parameter in resumed.model.named_parameters():
        if parameter.requires_grad:
            assert (parameter == weights[name]).all(), name
    steps = {entry["step"]: entry["loss"] for entry in straight.state.log_history if "loss" in entry}
    again = {entry["step"]: entry["loss"] for entry in resumed.state.log_history if "loss" in entry}
    assert again == steps


@pytest.mark.parametrize(
    ("options", "named", "remedy"),
    [
        (["--betta", "0.2"], "'betta'", "'beta'"),
        (["--lora_rank", "8"], "'lora_rank'", "lora_"),
        (["--pad_token", "x"], "pad_token", "tokenizer.pad_token"),
        (["stray"], "'stray'", "--option value"),
        (["--dataset_name", "nowhere.jsonl"], "nowhere.jsonl", "no such file"),
        (["--dataset_name", "nobody/nothing-here"], "nobody/nothing-here", "can't be read"),
        (["--eval_strategy", "no"], "eval_dataset_name", "eval_strategy"),
        (["--lora_dropout", "0.1"], "lora_dropout", "disable_dropout"),
        (["--model_name_or_path", "no/such/model/here"], "no/such/model/here", "model"),
        (["--model_name_or_path", ""], "model_name_or_path", "--model_name_or_path"),
        (["--beta", "0"], "beta", "above 0"),
        (["--dataset_streaming", "True"], "streaming", "max_steps"),
    ],
)
def test_what_it_refuses(
    run_folder: Path, capsys: pytest.CaptureFixture, options: list[str], named: str, remedy: str
) -> None:
    assert cli.main(["train", "--config", str(run_folder / "run.yaml"), *options]) == 2
    error = capsys.readouterr().err
    assert named in error and remedy in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), ("beta: [0.1", "not valid YAML"), ("- 1\n- 2\n", "must hold"), ("betta: 1\n", "'beta'")],
)
def test_bad_config_files(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "bad.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(OptionError, match=message):
        cli_train.parse(["--config", str(path), "--model_name_or_path", "m", "--dataset_name", "d"])


def test_a_file_without_a_test_split_cannot_be_evaluated_on(run_folder: Path) -> None:
    options = yaml.safe_load((run_folder / "run.yaml").read_text())
    del options["eval_dataset_name"]
    (run_folder / "run.yaml").write_text(yaml.safe_dump(options))
    with pytest.raises(OptionError, match="eval_dataset_name"):
        train(run_folder)


# ---- What every command shares -------------------------------------------------------------------------------------

COMMANDS = re.findall(r"^  (\w+) ", cli.USAGE, flags=re.MULTILINE)


def help_of(words: Sequence[str], capsys: pytest.CaptureFixture) -> str:
    with pytest.raises(SystemExit) as exit:
        cli.main(words)
    assert exit.value.code == 0
    return capsys.readouterr().out


def test_unknown_command_and_help(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["tarin"]) == 2
    assert "'tarin' is not a command" in capsys.readouterr().err
    for words in ([], ["help"], ["--help"]):
        assert cli.main(words) == 0
        assert "dpo-peft train" in capsys.readouterr().out
    assert cli.main(["--version"]) == 0
    assert re.fullmatch(r"dpo-peft \d+\.\d+\.\d+\n", capsys.readouterr().out)
    assert cli.main(["help", "tarin"]) == 2
    assert "'tarin' is not a command" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_and_exit_codes(command: str, capsys: pytest.CaptureFixture) -> None:
    """Every option that an example uses is one that the help lists."""
    said = help_of([command, "--help"], capsys)
    assert said == help_of(["help", command], capsys)
    options, examples, codes = re.split(r"^examples:$|^exit codes:$", said, flags=re.MULTILINE)
    for code in ("0  ", "2  ", "3  ", "130, 143"):
        assert f"\n  {code}" in codes
    assert examples.count(f"  dpo-peft {command} ") + examples.count(f"  dpo-peft {command}\n") >= 2
    listed = set(re.findall(r"^  (--\w+)", options, flags=re.MULTILINE)) | {"--config"}
    assert "--json" in listed
    assert set(re.findall(r" (--\w+)", examples)) <= listed


def test_a_quick_answer_loads_nothing_slow() -> None:
    """`dpo-peft help` and the names of commands need neither torch nor transformers."""
    code = "import sys, dpo_peft.cli as cli; cli.main(['help']); print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("set()\n")


@pytest.mark.parametrize(
    ("raised", "status"), [(DriftError("too far"), 3), (OptionError("no"), 2), (KeyboardInterrupt(), 130)]
)
def test_exit_codes(
    raised: BaseException, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fail(argv: Sequence[str]) -> None:
        raise raised

    monkeypatch.setattr("dpo_peft.cli.plan.plan", fail)
    assert cli.main(["plan"]) == status
    out, error = capsys.readouterr()
    assert not out and error.startswith("dpo-peft: ") and "Traceback" not in error


def test_an_interrupted_training_leaves_with_the_signal_s_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(argv: Sequence[str]) -> None:
        raise TrainingInterrupted(143)

    monkeypatch.setattr(cli_train, "train", stopped)
    with pytest.raises(SystemExit) as exit:
        cli.main(["train"])
    assert exit.value.code == 143


# ---- dpo-peft train --json ------------------------------------------------------------------------------------------


def test_json_is_all_of_stdout(run_folder: Path, capsys: pytest.CaptureFixture) -> None:
    """Logs and progress, which transformers prints, go to stderr; the figures are those of metrics.json."""
    assert cli.main(["train", "--config", str(run_folder / "run.yaml"), "--num_train_epochs", "1", "--json"]) == 0
    out, error = capsys.readouterr()
    result = json.loads(out)
    metrics = json.loads((run_folder / "out" / "metrics.json").read_text())
    assert result["output_dir"] == str(run_folder / "out") and result["steps"] == 3
    assert result["seconds"] > 0 and isinstance(result["warnings"], list)
    for name in ("first", "last", "eval_first", "eval_last"):
        assert result[name] == metrics[name]
    assert "3 steps in" in error and result["verdict"] == metrics["verdict"]
    again = ["--max_steps", "1", "--overwrite_output_dir"]
    assert cli.main(["train", "--config", str(run_folder / "run.yaml"), *again]) == 0
    out, error = capsys.readouterr()
    # Without it stdout is for people.
    assert "1 steps in" in out and f"are in {run_folder / 'out'}" in " ".join(out.split())


def test_the_end_of_a_run(run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Figures of the first and the last evaluation, the verdict, and commands that work as they stand."""
    monkeypatch.chdir(run_folder)
    trainer = train(run_folder, "--output_dir", "a run")
    evaluations = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert evaluations == [3, 6], "the last one is not repeated"
    out = capsys.readouterr().out
    metrics = json.loads(Path("a run/metrics.json").read_text())
    head, accuracy = (line for line in out.splitlines() if line.startswith(("held out", "accuracy")))
    assert head.split() == ["held", "out", "step", "3", "step", "6"]
    assert accuracy.split()[2] == f"{metrics['eval_last']['rewards/accuracies']:.4f}"
    assert f"Verdict: {metrics['verdict']['level']}. {metrics['verdict']['headline']}" in " ".join(out.split())
    assert "samples.jsonl" not in out and "curves.png" in out
    commands = [shlex.split(line) for line in out.split("Next:\n")[1].splitlines()]
    assert [words[1] for words in commands if words[1] not in ("chat", "compare")] == [
        "score",
        "report",
        "merge",
        "push",
    ]
    for words in commands:
        if words[1] in ("score", "report", "merge"):
            assert cli.main(words[1:]) == 0, words
    assert max(map(len, out.split("held out")[1].split("Next:")[0].splitlines())) <= 80


def test_it_is_evaluated_at_the_end_if_the_weights_are_others(run_folder: Path) -> None:
    best = ["--load_best_model_at_end", "--save_strategy", "epoch", "--metric_for_best_model", "eval_loss"]
    for greater, expected in (("true", [3, 6, 6]), ("false", [3, 6])):  # the best one is the first, the last
        out = ["--output_dir", str(run_folder / greater), "--greater_is_better", greater]
        log = train(run_folder, *best, *out).state.log_history
        assert [entry["step"] for entry in log if "eval_loss" in entry] == expected


def test_a_run_without_evaluation_ends_with_what_to_do(run_folder: Path, capsys: pytest.CaptureFixture) -> None:
    options = yaml.safe_load((run_folder / "run.yaml").read_text())
    del options["eval_dataset_name"], options["eval_strategy"]
    (run_folder / "run.yaml").write_text(yaml.safe_dump(options))
    train(run_folder, "--logging_steps", "100", "--logging_first_step", "false")
    out = capsys.readouterr().out
    assert "--eval_share 0.2" in out and "Verdict: " in out
    assert (
        "curves.png" not in out.split("are in")[0].rsplit("Verdict", 1)[1] or (run_folder / "out/curves.png").exists()
    )


@pytest.mark.parametrize(
    ("words", "named"),
    [(["--beta", "much"], "--beta"), (["--lora_r", "1.5"], "--lora_r"), (["--dtype", "int4"], "--dtype")],
)
def test_values_of_the_wrong_type(
    run_folder: Path, capsys: pytest.CaptureFixture, words: list[str], named: str
) -> None:
    """One line, not argparse's usage of 200 lines."""
    assert cli.main(["train", "--config", str(run_folder / "run.yaml"), *words]) == 2
    out, error = capsys.readouterr()
    assert named in error and words[1] in error
    assert not out and len(error.splitlines()) <= 2


# ---- dpo-peft cache -------------------------------------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A cache of two references: three entries of "first", one of "second"."""
    keys = [bytes([number]) * 16 for number in range(3)]
    for name, used in (("first", keys), ("second", keys[:1])):
        with closing(ReferenceCache(tmp_path / "cache", name, f"about {name}")) as cache:
            cache.put(used, [Entry(-1.0, np.zeros(4, np.float32))] * len(used))
    return tmp_path / "cache"


def test_cache_lists_and_clears(kept: Path, capsys: pytest.CaptureFixture) -> None:
    def run(*words: str) -> Any:
        assert cli.main(["cache", str(kept), *words, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    entries = {one["reference"]: (one["entries"], one["about"]) for one in run()["references"]}
    assert entries == {"first": (3, "about first"), "second": (1, "about second")}
    assert run("--clear", "--unused_days", "1")["deleted_entries"] == 0
    assert run("--clear", "--reference", "first")["deleted_entries"] == 3
    assert [one["reference"] for one in run()["references"]] == ["second"]
    assert cli.main(["cache", "--dir", str(kept)]) == 0
    assert re.search(r"second +1 entries .* about second", capsys.readouterr().out)
    assert run("--clear")["deleted_entries"] == 1
    assert cli.main(["cache", "--dir", str(kept)]) == 0
    assert "Nothing is kept" in capsys.readouterr().out


def test_a_cache_that_was_never_used_is_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("DPO_PEFT_CACHE", str(tmp_path / "new"))
    for words in ([], ["--clear"]):
        assert cli.main(["cache", *words]) == 0
        assert re.search("Nothing is kept|Deleted 0 entries", capsys.readouterr().out)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("words", "named", "remedy"),
    [
        (["--dir", "nowhere"], "dir='nowhere'", "no such folder"),
        (["--reference", "first"], "reference", "--clear"),
        (["--unused_days", "3"], "unused_days", "--clear"),
        (["--clear", "--reference", "third"], "'third'", "first"),
        (["--clear", "--unused_days", "-1"], "unused_days", "0 or more"),
        (["--clear", "--unused_days", "soon"], "--unused_days", "soon"),
        (["--cleer"], "'cleer'", "'clear'"),
    ],
)
def test_what_cache_refuses(
    kept: Path, capsys: pytest.CaptureFixture, words: list[str], named: str, remedy: str
) -> None:
    where = [] if "--dir" in words else ["--dir", str(kept)]
    assert cli.main(["cache", *where, *words]) == 2
    out, error = capsys.readouterr()
    assert named in error and remedy in error
    assert not out


@pytest.mark.sampled(3)
@pytest.mark.parametrize("words", [["train", "--help"], ["recipes"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_nobody_reads_ends_a_command_quietly(words: list[str], unbuffered: str) -> None:
    """As `| head` does when it has enough."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "dpo_peft", *words],
        stdout=writer,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        text=True,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")
