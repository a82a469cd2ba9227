"""Attacks on what must not get out: secrets, pickles and links, in whatever file, under whatever name."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hub_helpers import BASE
from planted import SECRETS

from dpo_peft.errors import OptionError
from dpo_peft.hub.pickles import pickled
from dpo_peft.hub.upload_files import Upload, collect

pytest_plugins = ["hub_helpers"]

NO_LABELS: dict[str, list[str]] = {"datasets": [], "language": []}
# Where a secret may stand: files that are published anyway, and some that are added by name.
PLACES = (
    "samples.jsonl metrics.json recipe.yaml README.md tokenizer.json chat_template.jinja train.log .env notes.ipynb "
    "data.csv job.sh wide.txt no_ending"
).split()


def gather(folder: Path, *include: str) -> Upload:
    (folder / "manifest.json").unlink(missing_ok=True)  # files are changed on purpose
    return collect(folder, "me/x", BASE, include, NO_LABELS)


def plant(path: Path, secret: str) -> None:
    text = path.read_text("utf-8") if path.is_file() else "some lines\n"
    if path.suffix == ".json":
        text = json.dumps({**json.loads(text), "note": f"see {secret} there"})
    elif path.suffix == ".jsonl":
        text += json.dumps({"step": 0, "prompt_number": 9, "prompt": f"my key is {secret}", "completion": "ok"}) + "\n"
    else:
        text += f"# {secret}\n"
    path.write_text(text, "utf-16" if path.name == "wide.txt" else "utf-8")


@pytest.mark.attack("planted secrets")
@pytest.mark.parametrize("place", PLACES)
def test_no_secret_gets_out(folder: Path, place: str) -> None:
    """Each of 26 kinds, in each place; without it the same folder passes."""
    included = [] if (folder / place).is_file() or place == "chat_template.jinja" else [place]
    plant(folder / place, "nothing")
    clean = (folder / place).read_bytes()
    assert place in gather(folder, *included).files
    for kind, secret in SECRETS.items():
        (folder / place).write_bytes(clean)
        if place == "wide.txt":
            (folder / place).write_bytes(b"")
        plant(folder / place, secret)
        with pytest.raises(OptionError, match=f"{place} holds what looks like .*line \\d+.*revoke") as refused:
            gather(folder, *included)
            pytest.fail(kind)
        assert secret not in str(refused.value)


@pytest.mark.parametrize(
    "text",
    [
        "sk-learn-like-names-are-not-keys-at-all",  # no digit
        "the flask-1234567890abcdefghijkl option",  # in the middle of a word
        "hf_hub_download(repo_id) of huggingface_hub",
        "https://user@example.org/a:b, http://host:8080/x@y",
        "PAD_TOKEN = '<|endoftext|>', EOS_TOKEN: 151645, MAX_KEY=12",
        "a sha256 " + "0123456789abcdef" * 4,
        "-----BEGIN CERTIFICATE-----",
        "AKIAIOSFODNN7EXAMPLETOOLONG",
    ],
)
def test_what_is_no_secret_passes(folder: Path, text: str) -> None:
    (folder / "notes.txt").write_text(text)
    assert "notes.txt" in gather(folder, "notes.txt").files


class Runs:
    """A pickle of it runs a function when it is loaded."""

    def __reduce__(self) -> Any:
        return (print, ("run",))


def saved(value: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def zipped(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.bin", content)
    return file.getvalue()


def of_numpy(values: Any) -> bytes:
    file = io.BytesIO()
    numpy.save(file, values, allow_pickle=True)
    return file.getvalue()


CODE = pickle.dumps(Runs())
PICKLES = {
    **{f"protocol {protocol}": pickle.dumps(Runs(), protocol) for protocol in range(6)},
    **{f"plain value, protocol {protocol}": pickle.dumps({"x": 1}, protocol) for protocol in range(6)},
    "protocol 0 with a text behind it": pickle.dumps(Runs(), 0) + b"\nand more",
    "torch": saved({"x": torch.ones(2)}),
    "torch, old format": saved({"x": torch.ones(2)}, _use_new_zipfile_serialization=False),
    "objects of NumPy": of_numpy(numpy.array([Runs()], dtype=object)),
    "gzip": gzip.compress(CODE),
    "bzip2": bz2.compress(CODE),
    "xz": lzma.compress(CODE),
    "zip": zipped(CODE),
}


@pytest.mark.attack("pickles")
@pytest.mark.parametrize("kind", PICKLES)
def test_no_pickle_gets_out_under_any_name(folder: Path, kind: str) -> None:
    for name in ("state.pickle", "model.ckpt", "weights", "notes.txt", "curves.png", "spiece.model"):
        path = folder / name
        before = path.read_bytes() if path.is_file() else None
        path.write_bytes(PICKLES[kind])
        with pytest.raises(OptionError, match=f"{name} is an? (pickle|archive)"):
            gather(folder, *([] if name in ("curves.png", "spiece.model") else [name]))
        path.unlink() if before is None else path.write_bytes(before)


@pytest.mark.parametrize(
    "content",
    [
        b"N.B. this is prose",
        b"chapter one\nit was\n.\n",
        b"(a) first\n(b) second.\n",
        b"I like it\n.",
        b"x^2 + 1",
        b"",
        of_numpy(numpy.ones(3)),
        json.dumps({"|O": "data.pkl"}).encode(),
    ],
)
def test_what_is_no_pickle(content: bytes) -> None:
    assert pickled(content) is None


@pytest.mark.attack("links")
@pytest.mark.parametrize("name", ["curves.png", "samples.jsonl", "tokenizer_config.json"])
def test_a_link_is_left_out_by_name(folder: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.txt").write_text("top secret")
    (folder / name).unlink()
    (folder / name).symlink_to(tmp_path / "secret.txt")
    upload = gather(folder)
    assert name not in upload.files and "symbolic link" in upload.left_out[name]


@pytest.mark.attack("links")
def test_no_link_is_followed(folder: Path, tmp_path: Path) -> None:
    """A file, or a folder on the way to one; weights and config are needed, so the command stops."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text("top secret")
    (folder / "link.txt").symlink_to(outside / "secret.txt")
    (folder / "there").symlink_to(outside)
    for include in ("link.txt", "*.txt", "there/secret.txt", "**/*.txt"):
        with pytest.raises(OptionError, match="symbolic link"):
            gather(folder, include)
    (folder / "own.txt").write_text("mine")
    assert "own.txt" in gather(folder, "own.txt").files
    (outside / "weights").write_bytes((folder / "adapter_model.safetensors").read_bytes())
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.safetensors").symlink_to(outside / "weights")
    with pytest.raises(OptionError, match="adapter_model.safetensors or adapter_config.json is a symbolic link"):
        gather(folder)


@pytest.mark.attack("planted secrets")
def test_this_machines_folders_are_found_in_rows_too(folder: Path) -> None:
    """A sample may speak of any path, but hardly of the run's own folder."""
    line = {"step": 0, "prompt_number": 9, "prompt": "ls /home" + "/anybody", "completion": "ok"}
    with (folder / "samples.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    gather(folder)
    with (folder / "samples.jsonl").open("a") as file:
        file.write(json.dumps({**line, "completion": f"in {folder}"}) + "\n")
    with pytest.raises(OptionError, match="samples.jsonl names a path of a machine"):
        gather(folder)
