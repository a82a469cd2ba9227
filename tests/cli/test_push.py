"""`dpo-peft push` as a command: words, exit codes, JSON, and a real process against the local Hub."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer

from dpo_peft import cli

pytest_plugins = ["hub_helpers"]

REPO = "me/reviews-dpo"


def push(*words: object) -> int:
    return cli.main(["push", *map(str, words)])


def test_published(hub: HubServer, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert push(folder, "--repo_id", REPO, "--private", "--gated", "manual", "--license", "mit") == 0
    out = capsys.readouterr().out
    commit = hub.repos[REPO].branches["main"][-1]
    assert out.startswith(f"Published {hub.url}/{REPO} (commit {commit.sha[:8]})\n")
    assert "  + adapter_model.safetensors " in out and "left out: options with paths of this machine" in out
    assert (hub.repos[REPO].private, hub.repos[REPO].gated) == (True, "manual")
    assert "license: mit" in commit.files["README.md"].content.decode()
    assert push(folder, "--repo_id", REPO, "--license", "mit") == 0
    assert capsys.readouterr().out.startswith(f"Everything is there already: {hub.url}/{REPO} (commit ")
    assert push(folder, "--repo_id", REPO, "--public", "--gated", "off", "--license", "mit") == 0
    assert (hub.repos[REPO].private, hub.repos[REPO].gated) == (False, False)


def test_json_is_all_that_is_on_stdout(hub: HubServer, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert push(folder, "--repo_id", REPO, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["repo_id"] == REPO and result["created"] and not result["dry_run"]
    assert result["uploaded"]["adapter_model.safetensors"] == (folder / "adapter_model.safetensors").stat().st_size


def test_a_dry_run_lists_and_sends_nothing(hub: HubServer, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert push(folder, "--repo_id", REPO, "--dry_run") == 0
    out = capsys.readouterr().out
    assert out.startswith("Would publish 9 files") and out.endswith("Nothing was sent (dry_run).\n")
    assert "ok    base: someone/tiny" in out and "note  the card names no license: --license" in out
    assert hub.requests == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere", "--repo_id", REPO], "adapter 'nowhere': there is no such folder"),
        (["{folder}"], "repo_id is missing"),
        (["{folder}", "--repo_id", REPO, "--licence", "mit"], "Did you mean 'license'?"),
        (["{folder}", "--repo_id", REPO, "--gated", "yes"], "invalid choice: 'yes'"),
        (["{folder}", "--repo_id", REPO, "--private", "--public"], "private contradicts public"),
        (["{folder}", "--repo_id", "you/x"], "you is neither your account nor"),
    ],
)
def test_wrong_input_is_exit_2(
    hub: HubServer, folder: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert push(*(word.format(folder=folder) for word in words)) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == "" and hub.count("^POST") == 0


def test_a_network_that_is_down_is_exit_3(hub: HubServer, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.fail("^PUT /storage", times=10**6)
    assert push(folder, "--repo_id", REPO, "--attempts", "1", "--commit_message", "two words") == 3
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "sending the files failed" in error and "was made and is empty: nothing was published" in error
    command = f"dpo-peft push {folder} --repo_id {REPO} --attempts 1 --commit_message 'two words'"
    assert error.endswith(f"To go on, give the command again: {command}")


@pytest.mark.slow
def test_a_process_of_its_own(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    """As a user runs it: nothing is patched, the client reads its environment."""
    env = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "dpo_peft.cli", "push", str(folder), "--repo_id", REPO, "--json"]
    env = {**os.environ, **env, "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(command, env={**env, "HF_TOKEN": "hf_write"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["commit"] == hub.repos[REPO].branches["main"][-1].sha
