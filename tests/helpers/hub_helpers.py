"""What the tests of publishing share: the local Hub with the client turned to it, and a run to publish."""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from trainer_helpers import ours, text_pairs

BASE = "someone/tiny"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A local Hub with the account `me` (tokens hf_write, hf_read) and the base; the client talks to it.

    Retries wait for no time. The client sends large files by LFS: the server knows no Xet.
    """
    with HubServer() as server:
        server.add_account("me", "hf_write", "write", orgs={"lab": "write", "library": "read"})
        server.add_account("me", "hf_read", "read")
        server.add_account("you", "hf_you", "write")
        server.add_repo(BASE, {"config.json": b"{}"})
        server.slept = []  # type: ignore[attr-defined]
        for name, value in client_settings(server.url, tmp_path).items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(time, "sleep", server.slept.append)  # type: ignore[attr-defined]
        monkeypatch.setenv("HF_TOKEN", "hf_write")
        close_session()
        yield server
        close_session()
        assert server.unknown == []


def client_settings(url: str, tmp_path: Path) -> dict[str, Any]:
    """The client reads its environment once, at import; these are what it made of it."""
    return {
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_TOKEN_PATH": str(tmp_path / "token"),
        "HF_STORED_TOKENS_PATH": str(tmp_path / "stored_tokens"),
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "AGENT_HARNESSES_PATH": str(tmp_path / "harnesses.json"),
    }


def trained(tiny_llama: Any, make_tokenizer: Any, folder: Path, **options: Any) -> Any:
    """A trainer after two steps on a model whose base is `BASE`, nothing saved."""
    model = tiny_llama()
    model.config._name_or_path = model.name_or_path = BASE
    rows = text_pairs(8)
    options = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "sample_prompts": 2, **options}
    options |= {"sample_max_new_tokens": 8, "disable_tqdm": True}
    trainer = ours(
        model, rows, make_tokenizer(chat_template=None), folder, eval_dataset=rows.select([0, 1]), **options
    )
    trainer.train()
    return trainer


@pytest.fixture(scope="session")
def saved_run(tiny_llama: Any, make_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A finished run; its adapter and results are in `args.output_dir`. Tests only read it."""
    trainer = trained(tiny_llama, make_tokenizer, tmp_path_factory.mktemp("runs") / "reviews-dpo")
    trainer.save_model()
    return trainer


@pytest.fixture
def folder(saved_run: Any, tmp_path: Path) -> Path:
    """A copy of its folder, to be changed."""
    return Path(shutil.copytree(saved_run.args.output_dir, tmp_path / "reviews-dpo"))


def mentions(folder: Path, secret: str) -> list[str]:
    """Names of the files below a folder that hold a text, pickles and weights included."""
    paths = [Path(parent) / name for parent, _, names in os.walk(folder) for name in names]
    return [path.name for path in paths if secret.encode() in path.read_bytes()]
