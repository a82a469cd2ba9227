"""What a run leaves behind: no secret that it was given, no pickle but torch's own, no rows for others."""

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_helpers import mentions
from planted import SECRETS
from trainer_helpers import lora, options, ours, text_pairs
from transformers import AutoTokenizer

from dpo_peft import DPOConfig, DPOTrainer, OptionError
from dpo_peft.files import write_atomically, write_rows
from dpo_peft.hub.pickles import pickled
from dpo_peft.quickstart import model_path
from dpo_peft.training.resume import RUN_STATE

OF_TORCH = {"optimizer.pt", "scheduler.pt", "rng_state.pth"}  # loaded with weights_only


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints, samples and a tracker's files, under the usual umask; secrets in options and outside."""
    pytest.importorskip("tensorboard")
    folder = tmp_path_factory.mktemp("left") / "run"
    secrets = {"token": SECRETS["Hub"] + "X", "use_auth_token": "any old password"}
    given = options(
        *(folder,),
        **{"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "report_to": "tensorboard", "max_length": 64},
        **{"hub_token": SECRETS["Hub"] + "Y", "run_name": f"with {SECRETS['OpenAI']}", "quantize_base": False},
        **{"eval_strategy": "steps", "eval_steps": 1, "sample_prompts": 1, "sample_max_new_tokens": 2},
        model_init_kwargs={"dtype": "float32", "token": secrets["token"]},
    )
    rows, patch = text_pairs(8), pytest.MonkeyPatch()
    patch.setenv("HF_TOKEN", SECRETS["Hub"] + "Z")
    patch.setenv("WANDB_API_KEY", "0123456789" * 4)
    patch.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "runs"))
    before = os.umask(0o022)
    try:
        args = DPOConfig(**given)
        trainer = DPOTrainer(model_path(), args=args, train_dataset=rows, eval_dataset=rows, peft_config=lora())
        trainer.train()
        trainer.save_model()
    finally:
        os.umask(before)
        patch.undo()
    assert trainer.args.model_init_kwargs["token"] == secrets["token"]
    return folder


@pytest.mark.attack("planted secrets")
def test_no_secret_is_in_any_file(run: Path) -> None:
    assert mentions(run, "chosen")  # the search finds what is there
    for secret in (*(SECRETS["Hub"] + end for end in "XYZ"), SECRETS["OpenAI"], "0123456789" * 4):
        assert mentions(run, secret) == []
    saved = json.loads((run / "training_args.json").read_text())
    assert saved["model_init_kwargs"] == {"dtype": "float32"} and saved["run_name"] == "with <removed>"
    state = json.loads((run / "checkpoint-2" / RUN_STATE).read_text())
    assert state["trajectory"]["model_init_kwargs"] == {"dtype": "float32"}


@pytest.mark.attack("planted secrets")
def test_a_tokenizer_keeps_no_secret(make_tokenizer: Any, tiny_llama: Any, tmp_path: Path) -> None:
    """What it was loaded with is in its own files; and transformers takes use_auth_token for a special token."""
    tokenizer = make_tokenizer()
    tokenizer.init_kwargs |= {"token": "any old password", "api_key": SECRETS["Google"]}
    trainer = ours(tiny_llama(), text_pairs(4), tokenizer, tmp_path / "run", max_steps=1)
    trainer.save_model()
    assert mentions(tmp_path, "any old password") == mentions(tmp_path, SECRETS["Google"]) == []
    assert AutoTokenizer.from_pretrained(tmp_path / "run").special_tokens_map == tokenizer.special_tokens_map
    tokenizer.add_special_tokens({"additional_special_tokens": [SECRETS["Hub"]]})
    tokenizer.pad_token = SECRETS["Hub"]
    with pytest.raises(OptionError, match="a secret among its special tokens"):
        ours(tiny_llama(), text_pairs(4), tokenizer, tmp_path / "again")


@pytest.mark.attack("pickles")
def test_no_pickle_but_torchs_own(run: Path) -> None:
    found = {path.name for path in run.rglob("*") if path.is_file() and pickled(path.read_bytes())}
    assert found == OF_TORCH
    for path in (path for path in run.rglob("*") if path.name in OF_TORCH - {"rng_state.pth"}):
        torch.load(path, weights_only=True)


@pytest.mark.attack("other users")
def test_other_users_cannot_read_rows(run: Path) -> None:
    others = {path.name for path in run.rglob("*") if path.is_file() and path.stat().st_mode & stat.S_IROTH}
    assert not others & {"samples.jsonl", "eval_examples.jsonl"} and (run / "samples.jsonl").is_file()
    assert {"README.md", "metrics.json", "adapter_config.json"} <= others  # what has no rows is as by umask


@pytest.mark.attack("other users")
def test_a_file_of_rows_is_closed_whatever_lay_there(tmp_path: Path) -> None:
    """An unfinished file that anybody may read, or a link that somebody put there, isn't written through."""
    target = tmp_path / "target"
    target.write_text("not ours")
    (tmp_path / ".rows.jsonl.part").symlink_to(target)
    (tmp_path / "rows.jsonl").write_text("old")
    os.chmod(tmp_path / "rows.jsonl", 0o666)
    write_rows(tmp_path / "rows.jsonl", [{"a": 1}])
    assert target.read_text() == "not ours" and (tmp_path / "rows.jsonl").read_text() == '{"a": 1}\n'
    assert not (tmp_path / "rows.jsonl").stat().st_mode & stat.S_IRWXO
    (tmp_path / ".open.json.part").write_text("")
    os.chmod(tmp_path / ".open.json.part", 0o644)
    assert not write_atomically(tmp_path / "open.json", "{}", private=True).stat().st_mode & stat.S_IRWXO
