"""`dpo-peft env`: what a report of a fault says is so on this machine, and it tells no secret."""

import json
import os
import platform
from importlib.metadata import version

import psutil
import pytest
import torch

from dpo_peft.cli import main


def test_it_says_what_is_here(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 34)
    monkeypatch.setenv("DPO_PEFT_CACHE", os.sep + "elsewhere")
    assert main(["env", "--json"]) == 0
    printed = capsys.readouterr().out
    found = json.loads(printed)
    assert (found["python"], found["torch"]) == (platform.python_version(), version("torch"))
    assert found["memory_gib"] == pytest.approx(psutil.virtual_memory().total / 2**30, abs=0.1)
    assert (found["GPU"] == "none") == (not torch.cuda.is_available())
    assert found["cache of the reference"] == os.path.join(os.sep + "elsewhere", "reference")
    assert "hf_" not in printed
    assert main(["env"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [name.split()[0] for name in found]


def test_a_driver_is_named_or_said_to_be_missing(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    from dpo_peft.planning.bench import driver

    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\n[ "$1" = --query-gpu=driver_version ] && echo 580.95.05 && echo 580.95.05\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert driver() == "580.95.05"
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert driver() == "none found"
    tool.unlink()
    assert driver() == "none found"
