"""What of an adapter's folder is published, and in which form; everything is checked here before the Hub is called.

The uploaded copies name the base by its Hub id, hold no path of this machine and no token. The folder itself is left
as it is.
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
from safetensors import SafetensorError, safe_open

from ..artifacts.card import (
    BUNDLED_TEXT,
    LOCAL_NOTE,
    LOCAL_TEXT,
    RunSummary,
    is_hub_id,
    license_fields,
    link,
    model_card,
)
from ..artifacts.card_rules import is_repo_id, problems, read_head
from ..artifacts.recipe import public
from ..errors import OptionError
from ..reference.fingerprint import RECORD as REFERENCE_RECORD

WEIGHTS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"
RESULTS = ("recipe.yaml", "metrics.json", "curves.png", "samples.jsonl")
TOKENIZER = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json vocab.txt merges.txt "
    "tokenizer.model spiece.model sentencepiece.bpe.model chat_template.jinja chat_template.json "
    "additional_chat_templates/*.jinja"
).split()
PEFT_TEMPLATE = "[More Information Needed]"  # in the empty card that PEFT writes beside an adapter
# Why a file stays here, by how it is called; the first that fits.
LEFT_OUT = {
    "training_args.bin": "a pickle: who loads it runs its code, and it can hold a token",
    "*.bin": "a pickle: who loads it runs its code",
    "*.pt": "a pickle: who loads it runs its code",
    "*.pth": "a pickle: who loads it runs its code",
    "*.pkl": "a pickle: who loads it runs its code",
    "checkpoint-*": "a checkpoint: optimizer state and pickles, to go on with here",
    "eval_examples.jsonl": "figures of single held-out rows; add it by include",
    "*": "no part of an adapter; add it by include",
}
# Folders of this and of other machines. What a model wrote (samples) isn't searched: it may speak of any path.
_MACHINE_PATH = re.compile(r"(?<![\w.:/])/(?:home|root|Users|mnt|tmp|var|opt|data|work|workspace|scratch)/[\w.+-]+")
_WINDOWS_PATH = re.compile(r"\b[A-Za-z]:\\{1,2}Users\\{1,2}\w+")


@dataclass
class Upload:
    """What goes to the Hub.

    Attributes:
        files: name there to content.
        base_model: Hub id of the base.
        left_out: name of a file or folder here to why it isn't published.
        checks: what was checked, in words.
        notes: what is allowed and should be known.
    """

    files: dict[str, bytes | Path] = field(default_factory=dict)
    base_model: str = ""
    left_out: dict[str, str] = field(default_factory=dict)
    checks: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def size(self, name: str) -> int:
        """Of a file, in bytes."""
        content = self.files[name]
        return len(content) if isinstance(content, bytes) else content.stat().st_size

    def content(self, name: str) -> bytes:
        """Of a file."""
        content = self.files[name]
        return content if isinstance(content, bytes) else content.read_bytes()


def collect(
    folder: str | Path,
    repo_id: str,
    base_model: str | None = None,
    license: str | None = None,
    datasets: Sequence[str] = (),
    languages: Sequence[str] = (),
    include: Sequence[str] = (),
) -> Upload:
    """Read an adapter's folder and make what is to be published of it.

    Args:
        folder: of a trained adapter.
        repo_id: where it goes; the card's example loads it from there.
        base_model: Hub id of the base, if the adapter names a local folder.
        license, datasets, languages: of the card; they replace what it says.
        include: further files, as names or patterns like "*.html".

    Raises:
        OptionError: there is no whole adapter, its base is no Hub id, the card would be refused, or a file names a
            path of this machine.
    """
    folder = Path(folder)
    adapter = _adapter_folder(folder)
    upload = Upload()
    upload.files[WEIGHTS] = _checked_weights(adapter, upload)
    config = _read_json(adapter / CONFIG)
    _check_is_lora(config)
    old_base = config.get("base_model_name_or_path") or ""
    upload.base_model = base = _hub_base(base_model, old_base)
    upload.files[CONFIG] = _json_bytes(_published_config(config, base, upload))
    _add_tokenizer(folder, adapter, upload)
    _add_results(folder, base, upload)
    _add_more(folder, include, upload)
    text = _card(folder, repo_id, base, config, upload)
    upload.files[CARD] = _finished_card(text, license, datasets, languages, upload).encode()
    _explain_rest(folder, adapter, upload)
    _check_paths(upload, (folder, Path(old_base), Path.home(), Path.cwd()))
    return upload


# ---- The adapter ----------------------------------------------------------------------------------------------------


def _adapter_folder(folder: Path) -> Path:
    """The folder itself, or, of an adapter that has a name, the one of that name inside it."""
    if not folder.is_dir():
        raise OptionError(f"adapter {str(folder)!r}: there is no such folder.")
    if (folder / CONFIG).is_file():
        return folder
    named = [path.parent for path in folder.glob(f"*/{CONFIG}") if not path.parent.name.startswith("checkpoint-")]
    if len(named) == 1:
        return named[0]
    raise OptionError(f"{folder.name} holds no adapter ({CONFIG}): give the folder that trainer.save_model() wrote.")


def _checked_weights(adapter: Path, upload: Upload) -> Path:
    path = adapter / WEIGHTS
    if not path.is_file():
        if (adapter / "adapter_model.bin").is_file():
            raise OptionError(
                f"{adapter.name} holds adapter_model.bin, a pickle that runs code when it is loaded: load it and save "
                "it with safe_serialization=True."
            )
        raise OptionError(f"{adapter.name} has no {WEIGHTS}: the adapter is not whole. Save it again.")
    try:
        with safe_open(path, framework="pt") as tensors:
            names = list(tensors.keys())
            numbers = 0
            for name in names:
                tensor = tensors.get_tensor(name)
                numbers += tensor.numel()
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    raise OptionError(f"{WEIGHTS}: {name} holds NaN or infinity. Publish an earlier checkpoint.")
    except (SafetensorError, OSError) as error:
        raise OptionError(f"{WEIGHTS} can't be read ({error}): the adapter is not whole. Save it again.") from error
    if not names:
        raise OptionError(f"{WEIGHTS} is empty: the adapter is not whole. Save it again.")
    upload.checks.append(f"weights: {len(names)} tensors, {numbers:,} numbers, all finite")
    return path


def _check_is_lora(config: Mapping[str, Any]) -> None:
    if not config.get("peft_type"):
        raise OptionError(f"{CONFIG} names no peft_type: it is not the config of a PEFT adapter.")


def _hub_base(given: str | None, recorded: str) -> str:
    """The base's Hub id: others can't load an adapter whose config names a folder of this machine."""
    remedy = "Give the id of the same model on the Hub: --base_model NAME/MODEL (publish it first if it isn't there)."
    if given is not None:
        if not is_hub_id(given):
            raise OptionError(f"base_model={given!r} is not a Hub id. {remedy}")
        return given
    if not recorded:
        raise OptionError(f"The adapter does not say which base it belongs to. {remedy}")
    if not is_hub_id(recorded):
        name = public(recorded, is_path=True)
        raise OptionError(
            f"The adapter was trained on a model in a local folder ({name}), which nobody else can load. {remedy}"
        )
    return recorded


def _published_config(config: dict[str, Any], base: str, upload: Upload) -> dict[str, Any]:
    """The adapter's config with the base's Hub id, in the record of its reference too."""
    old = config.get("base_model_name_or_path")
    config = {**config, "base_model_name_or_path": base}
    if old != base:
        config["revision"] = None  # it was the other repository's
        upload.checks.append(f"base: {base}, in the place of {public(old, is_path=True) if old else 'none'}")
        upload.notes.append(f"that {base} is the model it was trained on is not checked here; dpo-peft score does")
    else:
        upload.checks.append(f"base: {base}")
    records = dict(config.get("auto_mapping") or {})
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


def _add_tokenizer(folder: Path, adapter: Path, upload: Upload) -> None:
    found = 0
    for pattern in TOKENIZER:
        for path in sorted({*adapter.glob(pattern)} or {*folder.glob(pattern)}):
            name = pattern.rpartition("/")[0]
            upload.files[f"{name}/{path.name}" if name else path.name] = path
            found += 1
    if "tokenizer_config.json" in upload.files:
        # How the tokenizer came here is of no use to others, and can name a folder of this machine.
        config = _read_json(adapter / "tokenizer_config.json" if adapter == folder else _either(folder, adapter))
        kept = {k: v for k, v in config.items() if k not in ("name_or_path", "is_local", "local_files_only")}
        upload.files["tokenizer_config.json"] = _json_bytes(kept)
    if not found:
        upload.notes.append("there is no tokenizer beside the adapter: others take that of the base")


def _either(folder: Path, adapter: Path) -> Path:
    return next(
        path for path in (adapter / "tokenizer_config.json", folder / "tokenizer_config.json") if path.is_file()
    )


def _add_results(folder: Path, base: str, upload: Upload) -> None:
    for name in RESULTS:
        path = folder / name
        if not path.is_file():
            continue
        upload.files[name] = path
        if name == "metrics.json":
            metrics = _read_json(path)
            metrics |= {"base_model": base} if "base_model" in metrics else {}
            upload.files[name] = _json_bytes(metrics)
        elif name == "recipe.yaml":
            named = re.sub(
                r"^model_name_or_path: .*$", f"model_name_or_path: {base}", path.read_text("utf-8"), flags=re.M
            )
            upload.files[name] = named.encode()


def _add_more(folder: Path, include: Sequence[str], upload: Upload) -> None:
    for pattern in include:
        if os.path.isabs(pattern) or ".." in Path(pattern).parts:
            raise OptionError(f"include {pattern!r}: give names or patterns inside the adapter's folder.")
        found = [path for path in sorted(folder.glob(pattern)) if path.is_file()]
        if not found:
            raise OptionError(f"include {pattern!r} fits no file in {folder.name}.")
        for path in found:
            if why := next(
                (why for name, why in LEFT_OUT.items() if fnmatch(path.name, name) and "pickle" in why), None
            ):
                raise OptionError(f"include {pattern!r}: {path.name} is {why}. It can't be published.")
            upload.files.setdefault(path.relative_to(folder).as_posix(), path)


def _explain_rest(folder: Path, adapter: Path, upload: Upload) -> None:
    for path in sorted(folder.iterdir()):
        published = path.name in upload.files or any(name.startswith(f"{path.name}/") for name in upload.files)
        if not published and path != adapter and not path.name.startswith("."):
            upload.left_out[path.name] = next(why for name, why in LEFT_OUT.items() if fnmatch(path.name, name))


def _check_paths(upload: Upload, local: Sequence[Path]) -> None:
    """No file that people read may name a folder of this machine, or hold a token of the Hub."""
    known = {str(path) for path in local if path.is_absolute() and len(path.parts) > 2}
    texts = [name for name in upload.files if name.endswith((".json", ".yaml", ".md", ".txt", ".html"))]
    for name in texts:
        if name in ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt"):
            continue  # a vocabulary, not prose
        text = upload.content(name).decode("utf-8", errors="replace")
        found = next((path for path in sorted(known) if path in text), None)
        if match := _MACHINE_PATH.search(text) or _WINDOWS_PATH.search(text):
            found = found or match[0]
        if found:
            raise OptionError(f"{name} names a path of a machine ({found}): take it out before publishing.")
        if re.search(r"\bhf_[A-Za-z0-9]{20,}", text):
            raise OptionError(f"{name} holds what looks like a token of the Hub: take it out, and revoke the token.")
    upload.checks.append(f"no path of a machine and no token in {len(texts)} text files")


# ---- The card -------------------------------------------------------------------------------------------------------


def _card(folder: Path, repo_id: str, base: str, config: Mapping[str, Any], upload: Upload) -> str:
    """The card as it lies here, with the repository and the base put into its text; a short one if there is none."""
    path = folder / CARD
    text = path.read_text("utf-8") if path.is_file() else ""
    if not text or PEFT_TEMPLATE in text:
        upload.notes.append(f"there is no {CARD} of the run: a short card was made")
        lora = {"rank": config.get("r"), "alpha": config.get("lora_alpha")}
        return str(model_card(RunSummary(repo_id, base, None, lora=lora, has_chat_template=False)))
    text = re.sub(r'^adapter = ".*".*$', f"adapter = {json.dumps(repo_id)}", text, count=1, flags=re.M)
    text = text.replace(BUNDLED_TEXT, link(base)).replace(f"{LOCAL_NOTE}\n\n", "")
    text = re.sub(rf"`[^`]+`{re.escape(LOCAL_TEXT)}", lambda _: link(base), text)
    old = config.get("base_model_name_or_path") or ""
    if is_repo_id(old) and old != base:
        text = text.replace(link(old), link(base))
    name = read_name(text)
    return (
        re.sub(rf"^# {re.escape(name)}$", f"# {repo_id.split('/')[-1]}", text, count=1, flags=re.M) if name else text
    )


def read_name(text: str) -> str:
    """The model's name in a card's model-index, or its first heading; empty for none."""
    try:
        index = read_head(text).get("model-index")
    except ValueError:
        return ""
    if isinstance(index, list) and index and isinstance(index[0], Mapping):
        return str(index[0].get("name", ""))
    heading = re.search(r"^# (.+)$", text, flags=re.M)
    return heading[1] if heading else ""


def _finished_card(
    text: str, license: str | None, datasets: Sequence[str], languages: Sequence[str], upload: Upload
) -> str:
    """The card with its metadata filled in, which the Hub will accept."""
    if found := [p for p in problems(text) if not p.startswith("there is no metadata")]:
        raise OptionError(f"{CARD}: {found[0]}")
    card = ModelCard(text)
    data: Any = card.data
    data.base_model, data.base_model_relation = upload.base_model, "adapter"
    data.library_name = data.library_name or "peft"
    data.pipeline_tag = data.pipeline_tag or "text-generation"
    if data.get("model_name"):
        data.model_name = (re.search(r"^# (.+)$", text, flags=re.M) or ["", data.model_name])[1]
    if license:
        for key, value in license_fields(license).items():
            data[key] = value
    for key, values in (("datasets", datasets), ("language", languages)):
        if values:
            data[key] = list(values)
    if missing := [name for name in datasets if not is_hub_id(name)]:
        raise OptionError(f"datasets: {missing[0]!r} is not a Hub id. Leave it out.")
    finished = str(card)
    if found := problems(finished):
        raise OptionError(f"{CARD}: {found[0]}")
    head = read_head(finished)
    upload.checks.append(f"card: the metadata ({', '.join(sorted(head))}) keeps the Hub's rules")
    advice: tuple[tuple[str, str], ...] = (("license", "license: --license"), ("datasets", "dataset: --datasets"))
    upload.notes += [f"the card names no {what}" for key, what in advice if key not in head]
    return finished


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise OptionError(f"{path.name} is not valid JSON ({error}). Save the adapter again.") from error
    if not isinstance(value, dict):
        raise OptionError(f"{path.name} is not a JSON object. Save the adapter again.")
    return value


def _json_bytes(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
