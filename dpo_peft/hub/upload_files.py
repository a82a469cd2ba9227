"""Chooses what of an adapter's folder is published, and in which form; all is checked before the Hub is called.

The uploaded copies name the base by its Hub id, hold no path of this machine and no token; a pickle is known by its
content, and symbolic links are not followed. The folder itself is left as it is.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..artifacts.card import RunSummary, for_repository, is_hub_id, model_card
from ..artifacts.card_rules import hub_repo, problems, read_head
from ..artifacts.recipe import public
from ..credentials import find_secret
from ..errors import OptionError
from ..manifests import CONFIG, EVAL, MANIFEST, SERVING, WEIGHTS, check_one_run, settle, weights_digest
from ..model.gguf import is_gguf
from ..model.training_record import RECORD as TRAINING_RECORD
from ..reference.fingerprint import RECORD as REFERENCE_RECORD
from .pickles import PICKLE, pickled

CARD = "README.md"
RESULTS = ("recipe.yaml", "metrics.json", "curves.png", "samples.jsonl", EVAL, SERVING)
TOKENIZER = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json vocab.txt merges.txt "
    "tokenizer.model spiece.model sentencepiece.bpe.model chat_template.jinja chat_template.json "
    "additional_chat_templates/*.jinja processor_config.json preprocessor_config.json video_preprocessor_config.json"
).split()
PEFT_TEMPLATE = "[More Information Needed]"  # in the empty card that PEFT writes beside an adapter
# Why a file stays here, by how it is called; the first that fits.
LEFT_OUT = {
    "training_args.bin": f"{PICKLE}, and it can hold a token",
    "training_args.json": "options with paths of this machine; recipe.yaml has them for others",
    **dict.fromkeys(("*.bin", "*.pt", "*.pth", "*.pkl"), PICKLE),
    "checkpoint-*": "a checkpoint: optimizer state and pickles, to resume from here",
    EVAL: "of other weights: run dpo-peft eval again",
    SERVING: "of other weights: run dpo-peft verify-serving again",
    MANIFEST: "digests of the files as they are here",
    "eval_examples.jsonl": "figures of single held-out rows; add it by include",
    "worst_pairs.jsonl": "texts of held-out rows; add it by include",
    "pictures.jsonl": "pictures of held-out rows; add it by include",
    "*": "no part of an adapter; add it by include",
}
_BASE = "Give the id of the same model on the Hub: --base_model NAME/MODEL (publish it first if it isn't there)."
_GGUF = "Give that file on the Hub: --base_model NAME/MODEL/FILE.gguf (put there by hf upload NAME/MODEL FILE.gguf)."
LINK = "a symbolic link, which is not followed: copy the file here"
# Folders of any machine. Rows of data aren't searched for them, nor what a model wrote: both may speak of any path.
_MACHINE_PATHS = re.compile(
    r"(?<![\w.:/])/(?:home|root|Users|mnt|tmp|var|opt|data|work|workspace|scratch)/[\w.+-]+"
    r"|\b[A-Za-z]:\\{1,2}Users\\{1,2}\w+"
)
_VOCABULARY = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt")  # no prose
_ROWS = ("*.jsonl", "*.csv", "*.tsv")


@dataclass
class Upload:
    """Holds what goes to the Hub."""

    files: dict[str, bytes | Path] = field(default_factory=dict)  # name there to content
    base_model: str = ""  # Hub id of the base
    left_out: dict[str, str] = field(default_factory=dict)  # file or folder here to why it isn't published
    checks: list[str] = field(default_factory=list)  # what was checked, in words
    notes: list[str] = field(default_factory=list)  # what is allowed and should be known

    def size(self, name: str) -> int:
        """Returns the bytes of a file."""
        content = self.files[name]
        return len(content) if isinstance(content, bytes) else content.stat().st_size

    def content(self, name: str) -> bytes:
        """Returns the content of a file."""
        content = self.files[name]
        return content if isinstance(content, bytes) else content.read_bytes()


def collect(
    folder: Path, repo_id: str, base_model: str | None, include: Sequence[str], labels: Mapping[str, Sequence[str]]
) -> Upload:
    """Reads an adapter's folder and makes what is to be published of it.

    The arguments are those of `publish`; `labels` replace what the card's metadata says, where they have a value.

    Raises:
        OptionError: there is no whole adapter, its base is no Hub id, the card would be refused, or a file names a
            path of this machine.
    """
    adapter = _adapter_folder(folder)
    upload = Upload()
    upload.files[WEIGHTS] = _checked_weights(adapter, upload)
    config = _read_json(adapter / CONFIG)
    if not config.get("peft_type"):
        raise OptionError(f"{CONFIG} names no peft_type: it is not the config of a PEFT adapter.")
    old_base = config.get("base_model_name_or_path") or ""
    upload.base_model = _hub_base(base_model, old_base)
    upload.files[CONFIG] = _json_bytes(_published_config(config, old_base, upload))
    if not [path for pattern in TOKENIZER for path in _add(pattern, folder, adapter, upload)]:
        upload.notes.append("there is no tokenizer beside the adapter: others take that of the base")
    for pattern in RESULTS:
        _add(pattern, folder, adapter if pattern in (EVAL, SERVING) else folder, upload)
    for pattern in include:
        _include(pattern, folder, upload)
    upload.files[CARD] = _card(folder, repo_id, config, labels, upload).encode()
    published = {name.split("/")[0] for name in upload.files}
    for path in sorted(folder.iterdir()):
        if path.name not in published and path != adapter and not path.name.startswith("."):
            why = next(why for name, why in LEFT_OUT.items() if fnmatch(path.name, name))
            upload.left_out[path.name] = LINK if path.is_symlink() else why
    _check_contents(upload, (folder, Path(old_base), Path.home(), Path.cwd()))
    check_one_run(folder)
    return upload


# ---- The adapter ----------------------------------------------------------------------------------------------------


def _adapter_folder(folder: Path) -> Path:
    """Returns the folder itself, or, of an adapter that has a name, the one of that name inside it."""
    if not folder.is_dir():
        raise OptionError(f"adapter {str(folder)!r}: there is no such folder.")
    settle(folder)
    if (folder / CONFIG).is_file():
        return folder
    named = [path.parent for path in folder.glob(f"*/{CONFIG}") if not path.parent.name.startswith("checkpoint-")]
    if len(named) == 1:
        return named[0]
    raise OptionError(f"{folder.name} holds no adapter ({CONFIG}): give the folder that trainer.save_model() wrote.")


def _checked_weights(adapter: Path, upload: Upload) -> Path:
    path = adapter / WEIGHTS
    again = "the adapter is not whole. Save it again."
    if path.is_symlink() or (adapter / CONFIG).is_symlink():
        raise OptionError(f"{WEIGHTS} or {CONFIG} is {LINK}.")
    if not path.is_file():
        if (adapter / "adapter_model.bin").is_file():
            raise OptionError(
                f"{adapter.name} holds adapter_model.bin, a pickle that runs code when it is loaded: load it and save "
                "it with safe_serialization=True."
            )
        raise OptionError(f"{adapter.name} has no {WEIGHTS}: {again}")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise OptionError(f"{WEIGHTS} can't be read ({error}): {again}") from error
    if not tensors:
        raise OptionError(f"{WEIGHTS} is empty: {again}")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise OptionError(f"{WEIGHTS}: {name} holds NaN or infinity. Publish an earlier checkpoint.")
    numbers = sum(tensor.numel() for tensor in tensors.values())
    upload.checks.append(f"weights: {len(tensors)} tensors, {numbers:,} numbers, all finite")
    return path


def _hub_base(given: str | None, recorded: str) -> str:
    """Returns the base's Hub id: others can't load an adapter whose config names a folder of this machine."""
    gguf = is_gguf(recorded)
    remedy = _GGUF if gguf else _BASE
    if given is not None and (not is_hub_id(given) or (gguf and not is_gguf(given))):
        what = f"not the file that it was trained on, {public(recorded, is_path=True)}" if gguf else "not a Hub id"
        raise OptionError(f"base_model={given!r} is {what}. {remedy}")
    if given is None and not recorded:
        raise OptionError(f"The adapter does not say which base it belongs to. {remedy}")
    if given is None and not is_hub_id(recorded):
        name = f"{'file' if gguf else 'folder'} ({public(recorded, is_path=True)})"
        raise OptionError(
            f"The adapter was trained on a model in a local {name}, which nobody else can load. {remedy}"
        )
    return given or recorded


def _published_config(config: Mapping[str, Any], old: str, upload: Upload) -> dict[str, Any]:
    """Returns the adapter's config with the base's Hub id, in the record of its reference too."""
    base = upload.base_model
    config = {**config, "base_model_name_or_path": base}
    if old != base:
        config["revision"] = None  # it was the other repository's
        upload.checks.append(f"base: {base}, in the place of {public(old, is_path=True) if old else 'none'}")
        upload.notes.append(f"that {base} is the model it was trained on is not checked here; dpo-peft score does")
    else:
        upload.checks.append(f"base: {base}")
    records = dict(config.get("auto_mapping") or {})
    if changed := (records.get(TRAINING_RECORD) or {}).get("base_changed"):
        upload.notes.append(
            f"the base was changed before the training ({changed} differ from its files): on {base} itself the "
            "adapter is another model. Publish the changed base too, and give it as base_model"
        )
    if isinstance(reference := records.get(REFERENCE_RECORD), Mapping):
        reference = {**reference, "base": base}
        if (frozen := reference.get("adapter")) and not is_hub_id(str(frozen)):
            reference["adapter"] = public(str(frozen), is_path=True)
            upload.notes.append(
                f"its reference is a frozen adapter ({reference['adapter']}) that is not published with it: scoring "
                "needs reference=FOLDER"
            )
        config["auto_mapping"] = {**records, REFERENCE_RECORD: reference}
    return config


# ---- What lies beside it --------------------------------------------------------------------------------------------


def _add(pattern: str, folder: Path, adapter: Path, upload: Upload) -> list[Path]:
    """Adds the files of a pattern that lie beside the adapter, or else in the folder, as others should see them."""
    place = adapter if any(adapter.glob(pattern)) else folder
    found = [path for path in sorted(place.glob(pattern)) if path.is_file() and not _through_link(path, place)]
    for path in found:
        name = path.relative_to(place).as_posix()
        content: bytes | Path = path
        if name == "tokenizer_config.json":
            # How the tokenizer came here is of no use to others, and can name a folder of this machine.
            here = ("name_or_path", "is_local", "local_files_only")
            content = _json_bytes({key: value for key, value in _read_json(path).items() if key not in here})
        elif name == "metrics.json":
            metrics = _read_json(path)
            content = _json_bytes({**metrics, "base_model": upload.base_model} if "base_model" in metrics else metrics)
        elif name == "recipe.yaml":
            named = f"model_name_or_path: {upload.base_model}"
            content = re.sub(r"^model_name_or_path: .*$", named, path.read_text("utf-8"), flags=re.M).encode()
        elif name in (EVAL, SERVING):
            if (measured := _measured(path, weights_digest(adapter), upload)) is None:
                continue
            content = measured
        upload.files.setdefault(name, content)
    return found


def _measured(path: Path, weights: str | None, upload: Upload) -> bytes | None:
    """Returns what was measured of these weights, without the texts of rows and the places of files here; None if
    nothing was."""
    told = _read_json(path)
    if path.name == SERVING:
        same = {place: one for place, one in told.items() if isinstance(one, dict) and one.get("weights") == weights}
        return _json_bytes(same) if same else None
    if told.pop("weights", None) != weights:
        return None
    told["suites"] = [{key: suite[key] for key in suite if key not in ("rows", "suite")} for suite in told["suites"]]
    told.pop("lm_eval")
    upload.notes.append(f"{EVAL} goes without the texts of its rows and lm-eval's commands")
    return _json_bytes({**told, "adapter": public(told["adapter"], is_path=True), "weights": weights})


def _include(pattern: str, folder: Path, upload: Upload) -> None:
    if os.path.isabs(pattern) or ".." in Path(pattern).parts:
        raise OptionError(f"include {pattern!r}: give names or patterns inside the adapter's folder.")
    if links := [path for path in sorted(folder.glob(pattern)) if _through_link(path, folder)]:
        raise OptionError(f"include {pattern!r}: {links[0].name} is {LINK}.")
    found = _add(pattern, folder, folder, upload)
    if not found:
        raise OptionError(f"include {pattern!r} fits no file in {folder.name}.")
    for path in found:
        if (why := next(why for name, why in LEFT_OUT.items() if fnmatch(path.name, name))).startswith(PICKLE):
            raise OptionError(f"include {pattern!r}: {path.name} is {why}. It can't be published.")


def _through_link(path: Path, folder: Path) -> bool:
    """Says whether a file inside a folder, or a folder between the two, is a symbolic link."""
    return any(part.is_symlink() for part in (path, *path.parents) if folder in part.parents)


def _check_contents(upload: Upload, local: Sequence[Path]) -> None:
    """Checks that no file is a pickle or can't be searched, that none holds a secret, and that none that people read
    names a folder of this machine."""
    known = re.compile("|".join(re.escape(str(path)) for path in local if path.is_absolute() and len(path.parts) > 2))
    texts = 0
    for name in sorted(set(upload.files) - {WEIGHTS}):
        content = upload.content(name)
        if what := pickled(content):
            raise OptionError(f"{name} is {what}. It can't be published.")
        text, is_text = _text(content)
        texts += is_text
        if secret := find_secret(text):
            kind, line = secret
            raise OptionError(
                f"{name} holds what looks like {kind} (line {line}): take it out before publishing, and revoke it if "
                "anybody else may have read it."
            )
        prose = is_text and name not in _VOCABULARY and not any(fnmatch(name, rows) for rows in _ROWS)
        if found := (known.pattern and known.search(text)) or (prose and _MACHINE_PATHS.search(text)):
            raise OptionError(f"{name} names a path of a machine ({found[0]}): take it out before publishing.")
    upload.checks.append(f"no path of a machine and no token in {texts} text files; no pickle and no link among them")


def _text(content: bytes) -> tuple[str, bool]:
    """Returns what can be read in a file, whatever its name is, and whether all of it is text."""
    wide = content.startswith((b"\xff\xfe", b"\xfe\xff"))
    text = content.decode("utf-16" if wide else "utf-8", errors="replace")
    return text, "\ufffd" not in text


# ---- The card -------------------------------------------------------------------------------------------------------


def _card(
    folder: Path, repo_id: str, config: Mapping[str, Any], labels: Mapping[str, Sequence[str]], upload: Upload
) -> str:
    """Returns the card as it lies here, with repository, base and labels filled in; a short one if there is none."""
    base, old_base, path = upload.base_model, config.get("base_model_name_or_path") or "", folder / CARD
    text = path.read_text("utf-8") if path.is_file() else ""
    if not text or PEFT_TEMPLATE in text:
        upload.notes.append(f"there is no {CARD} of the run: a short card was made")
        lora = {"rank": config.get("r"), "alpha": config.get("lora_alpha")}
        text = str(model_card(RunSummary(repo_id, base, None, lora=lora, has_chat_template=False)))
    if found := [problem for problem in problems(text) if not problem.startswith("there is no metadata")]:
        raise OptionError(f"{CARD}: {found[0]}")
    if missing := [name for name in labels["datasets"] if not is_hub_id(name)]:
        raise OptionError(f"datasets: {missing[0]!r} is not a Hub id. Leave it out.")
    card = ModelCard(text)
    data = card.data
    name = data.get("model_name")
    card.text = for_repository(card.text, name or _title(card.text), repo_id, base, old_base)
    data["model_name"] = (_title(card.text) or name) if name else None
    data["base_model"], data["base_model_relation"] = hub_repo(base), "adapter"
    data["library_name"] = data.get("library_name") or "peft"
    data["pipeline_tag"] = data.get("pipeline_tag") or "text-generation"
    for key, value in labels.items():
        if value:
            data[key] = value
    finished = str(card)
    if found := problems(finished):
        raise OptionError(f"{CARD}: {found[0]}")
    keys = sorted(read_head(finished))
    upload.checks.append(f"card: the metadata ({', '.join(keys)}) keeps the Hub's rules")
    advice = {"license": "license: --license", "datasets": "dataset: --datasets"}
    upload.notes += [f"the card names no {what}" for key, what in advice.items() if key not in keys]
    return finished


def _title(text: str) -> str:
    heading = re.search(r"^# (.+)$", text, flags=re.M)
    return heading[1] if heading else ""


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise OptionError(f"{path.name} is not valid JSON ({error}). Save the adapter again.") from error
    if not isinstance(value, dict):
        raise OptionError(f"{path.name} is not a JSON object. Save the adapter again.")
    return value


def _json_bytes(value: Mapping[str, object]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
