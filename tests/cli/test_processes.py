"""`dpo-peft train --num_processes 2`: what it refuses before anything starts, what a job says and how it ends, and
that it trains as one process with the same global batch."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from parallel_run import child_environment
from safetensors.torch import load_file

from dpo_peft.cli import launch
from dpo_peft.cli import train as cli_train
from dpo_peft.cli.options import known
from dpo_peft.errors import OptionError

# ---- What is asked for ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--num_processes 0", "num_processes=0 on num_machines=1: give a whole number"),
        ("--num_processes 1.5", "num_processes.*invalid int value: '1.5'"),
        ("--num_processes 3 --num_machines 2", "num_processes=3 on num_machines=2.*as many on each"),
        ("--num_processes 4 --num_machines 2", "give main_process_ip and main_process_port"),
        ("--num_processes 4 --num_machines 2 --machine_rank 2", "machine_rank=2: machines are counted from 0 to 1"),
        ("--num_processes 2 --accelerate_config fsdp", "neither a file nor one of ddp, ddp_cpu, fsdp2.*'fsdp2'"),
        ("--num_processes 2 --accelerate_config {}/zero.yaml", "distributed_type DEEPSPEED is not offered.*fsdp2"),
        ("--num_processes 2 --accelerate_config {}/typo.yaml", "typo.yaml.*num_proceses"),
        ("--num_processes 2 --accelerate_config {}/list.yaml", "list.yaml"),
        ("--main_process_port 29501", "main_process_port=29501 has no effect without num_processes"),
        ("--num_processes 3", "3 on this machine, which has 2 GPUs.*--num_processes 2,"),
        ("--num_processes 2 --gpu_ids 1", "which has 1 GPU for them.*--num_processes 1,|Less than two GPU ids"),
    ],
)
def test_what_is_refused_before_anything_starts(
    words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "zero.yaml").write_text("distributed_type: DEEPSPEED\nnum_processes: 2\n")
    (tmp_path / "typo.yaml").write_text("distributed_type: MULTI_GPU\nnum_proceses: 2\n")
    (tmp_path / "list.yaml").write_text("- distributed_type\n")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(OptionError, match=message):
        launch.job(words.format(tmp_path).split())


def test_one_process_is_no_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run.yaml").write_text("num_processes: 2\naccelerate_config: null\n")
    file = ["--config", str(tmp_path / "run.yaml")]
    for words in ([], ["--num_processes=1"], ["--accelerate_config", "single_gpu"], [*file, "--num-processes", "1"]):
        assert launch.job(words) is None, words
    made = launch.job(file)
    assert made is not None and made.ranks == range(2)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launch.job(file) is None, "what torchrun has started"
    with pytest.raises(OptionError, match="num_processes=3 has no effect: this is one of 2 processes"):
        launch.job(["--num_processes", "3"])
    with pytest.raises(OptionError, match="accelerate_config='fsdp2' has no effect"):
        launch.job([*file, "--accelerate_config", "fsdp2"])


def test_what_accelerate_makes_of_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the second of two machines, as options and as a file say it."""
    monkeypatch.delenv("OMP_NUM_THREADS")
    place = {"num_processes": 4, "num_machines": 2, "machine_rank": 1, "main_process_ip": "10.0.0.1"}
    place["main_process_port"] = 29511
    by_options = launch.job([f"--{name}={value}" for name, value in {"accelerate_config": "fsdp2", **place}.items()])
    config = yaml.safe_load(launch._config("fsdp2").read_text()) | place
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(config))
    for made in (by_options, launch.job(["--accelerate_config", str(tmp_path / "two.yaml")])):
        assert made is not None and (made.processes, made.ranks) == (4, range(2, 4))
        assert made.address == ("10.0.0.1", 29511)
        assert made.env["ACCELERATE_USE_FSDP"] == "true" and made.env["FSDP_VERSION"] == "2"
        assert made.env["OMP_NUM_THREADS"] == str(max(torch.get_num_threads() // 2, 1))
        assert made.env.get("ACCELERATE_USE_CPU") == (None if torch.cuda.device_count() else "true")


def test_the_kept_help_knows_the_options(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("beta: 0.3\nbetta: 1\n")
    assert known("train", ["--model_name_or_path", "m", "--per-device-train-batch-size=2", "--num_processes", "2"])
    assert not known("train", ["--betta", "1"]) and not known("train", ["--config", str(tmp_path / "run.yaml")])


# ---- What a job says, and how it ends -------------------------------------------------------------------------------

# Stands for the command of each process: the command line as it is, around a training that does what the case says.
STUB = """
import logging, os, pathlib, signal, sys, time, types
rank, case = os.environ["RANK"], sys.argv[1]
from dpo_peft import cli, errors
from dpo_peft.cli import launch

def wait():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)

def gone():
    ends = time.monotonic() + (0.2 if case == "dead" else 30)  # which says nothing before it ends
    while time.monotonic() < ends and not list(pathlib.Path(os.environ[launch.JOB]).glob("*.end")):
        time.sleep(0.01)
    raise RuntimeError("Connection closed by peer")

def full():
    raise errors.CheckpointError("The disk is full.") from OSError("No space left")

def fail(kind, text):
    raise kind(text)

def said():
    log = logging.getLogger("dpo_peft.stub")
    log.info("News.")
    log.warning("Both say this.")
    if rank == "1":
        log.warning("One says this.")
        print("Not for people.")
        print("Nor this.", file=sys.stderr)
    else:
        print("The result.")

class OutOfMemoryError(RuntimeError):
    pass

cases = {
    "fine": (said, said),
    "same": (lambda: fail(errors.OptionError, "beta is wrong."),) * 2,
    "one": (wait, lambda: fail(errors.DataError, "Row 7 is bad.")),
    "full": (full, gone),
    "memory": (lambda: fail(OutOfMemoryError, "Out of memory with a single row."),) * 2,
    "bug": (gone, lambda: fail(KeyError, "a bug")),
    "killed": (gone, lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "hung": (wait, lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "dead": (gone, lambda: print("last words", flush=True) or os._exit(7)),
    "piped": (lambda: sys.exit(141), gone),
}
def train(argv):
    cases[case][int(rank)]()
sys.modules["dpo_peft.cli.train"] = types.SimpleNamespace(train=train)
sys.exit(cli.main(["train"]))
"""


def run_stub(case: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> Any:
    """Returns exit status, standard output and standard error of a job, whose processes are all gone."""
    (folder / "stub.py").write_text(STUB)
    monkeypatch.setattr(launch, "command", lambda argv: [sys.executable, str(folder / "stub.py"), *argv])
    monkeypatch.setattr(launch, "ENDINGS", ((0.5, signal.SIGTERM), (1, signal.SIGKILL)))
    job = launch.Job(2, range(2), child_environment(), ("127.0.0.1", 0), dry_run=False)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    launch.show_progress()
    try:
        job.run([case])
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    assert all(worker.returncode is not None for worker in job._workers.values())
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    return code, *capfd.readouterr()


@pytest.mark.sampled(9)
@pytest.mark.parametrize(
    ("case", "status", "expected"),
    [
        ("one", 2, "dpo-peft: process 1: Row 7 is bad.\n"),
        ("same", 2, "dpo-peft: beta is wrong.\n"),
        ("full", 3, "dpo-peft: The disk is full.\n"),
        ("memory", 3, "dpo-peft: Out of memory with a single row.\n"),
        (
            "hung",
            137,
            "dpo-peft: process 1 of 2 was ended by SIGKILL (exit status 137); the system does so when memory",
        ),
        ("killed", 137, "dpo-peft: process 1 of 2 was ended by SIGKILL (exit status 137); the system does so when"),
        ("bug", 1, "dpo-peft: process 1 of 2 failed (exit status 1):\nTraceback (most recent call last)"),
        ("dead", 7, "dpo-peft: process 1 of 2 ended with exit status 7.\nlast words\n"),
        ("piped", 141, ""),
    ],
)
def test_an_error_is_said_once_and_the_status_is_its_own(
    case: str, status: int, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    code, _, error = run_stub(case, tmp_path, monkeypatch, capfd)
    assert code == status, error
    assert error.startswith(expected) and error.count("dpo-peft: ") == bool(expected)
    assert "Connection closed" not in error, "what the other one met is no news"
    assert ("Traceback" in error) == (case == "bug") and ("KeyError: 'a bug'" in error) == (case == "bug")


def test_news_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any, caplog: Any) -> None:
    code, out, error = run_stub("fine", tmp_path, monkeypatch, capfd)
    assert (code, out) == (0, "The result.\n")
    assert sorted(error.splitlines()) == ["Both say this.", "News."]
    assert caplog.messages == ["Process 1: One says this."]


# ---- Training -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Any, make_tokenizer: Any) -> Path:
    """A model, ten rows, and a config file for them."""
    folder = tmp_path_factory.mktemp("processes")
    tiny_llama().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    rows = [{"prompt": f"say {i}", "chosen": f" the {i} and more", "rejected": f" a {i}"} for i in range(10)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {
        "model_name_or_path": str(folder / "model"),
        "dataset_name": str(folder / "rows.jsonl"),
        "dtype": "float32",
        "bf16": False,
        "optim": "sgd",
        "learning_rate": 0.2,
        "num_train_epochs": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "lora_r": 4,
        "report_to": "none",
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(options))
    return folder


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "dpo_peft.cli", "train", "--config", str(folder / "run.yaml"), *options]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=child_environment(), stdout=pipe, stderr=pipe, text=True)


@pytest.mark.slow
def test_two_processes_train_as_one_with_the_same_global_batch(case: Path) -> None:
    """The last batch, of two rows, is uneven: each process has one where it has two elsewhere."""
    two = ["--num_processes", "2", "--per_device_train_batch_size", "2", "--output_dir", str(case / "two"), "--json"]
    job = start(case, *two)
    one = ["--per_device_train_batch_size", "4", "--output_dir", str(case / "one"), "--use_cpu"]
    cli_train.train(["--config", str(case / "run.yaml"), *one])
    out, error = job.communicate(timeout=300)
    assert job.returncode == 0, error
    assert json.loads(out)["steps"] == 6, "all of stdout is the result"
    for news in (
        "LoRA on ",
        "Reference: ",
        "The first row as it is trained on:",
        "6 steps in ",
        "train: 10 of 10 rows",
    ):
        assert error.count(news) == 1, (news, error)
    losses = []
    for name in ("one", "two"):
        log = json.loads((case / name / "metrics.json").read_text())["log_history"]
        losses.append([entry["loss"] for entry in log if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6) and len({*losses[0]}) > 3
    weights, same = (load_file(case / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert max(float((weights[name] - same[name]).abs().max()) for name in weights) < 1e-6


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_sigterm_reaches_all_processes_which_save_a_checkpoint(case: Path) -> None:
    out = case / "stopped"
    job = start(case, "--num_processes", "2", "--max_steps", "100000", "--output_dir", str(out), "--disable_tqdm")
    assert job.stdout is not None and job.stderr is not None
    lines = iter(job.stdout.readline, "")
    assert any(re.match(r" *3/100000 ", line) for line in lines), job.stderr.read()
    workers = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    assert len(workers) == 2
    os.kill(job.pid, signal.SIGTERM)
    _, error = job.communicate(timeout=60)
    assert job.returncode == 143, error
    (saved,) = out.glob("checkpoint-*")
    told = f"Stopped by SIGTERM after step {saved.name.split('-')[1]}; {saved.name} is saved."
    assert error.count(told) == 1 and "Traceback" not in error and "dpo-peft:" not in error
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline, "a process is left"
        time.sleep(0.1)
