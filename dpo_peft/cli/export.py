"""`dpo-peft export`: an adapter as llama.cpp and Ollama load it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from ..model.options import AdapterOptions
from .options import option, parse_options, show

EXAMPLES = (
    "dpo-peft export outputs/run --output_dir served --to gguf --llama_cpp llama.cpp",
    "dpo-peft export outputs/run --output_dir served --to ollama --served_base llama3.1:8b",
)


@dataclass(frozen=True)
class ExportOptions(AdapterOptions):
    """Options of `dpo-peft export`, named as the arguments of `export_adapter`."""

    output_dir: str = option("", "Folder for adapter.gguf and, for Ollama, a Modelfile: a new one, or an empty one.")
    to: str = option("gguf", "For llama.cpp, or for Ollama.", choices=["gguf", "ollama"])
    llama_cpp: str | None = option(
        None, "Folder of llama.cpp, whose converter is used; that of LLAMA_CPP, or the one on PATH, if not given."
    )
    served_base: str | None = option(
        None, "What is served as the base: Ollama's name of it, or a GGUF file. The base's folder if not given."
    )
    system: str | None = option(None, "System message for Ollama, if it was trained with one.")
    json: bool = option(False, "Print the result as JSON.")
    # The base is not loaded here.
    quantize: bool | None = field(default=None, init=False)
    dtype: str | None = field(default=None, init=False)
    reference: str | None = field(default=None, init=False)
    check_base: bool = field(default=True, init=False)


def export(argv: Sequence[str]) -> None:
    """Convert an adapter to GGUF by llama.cpp's own converter, and write a Modelfile for Ollama."""
    options = parse_options(argv, ExportOptions, "export", export.__doc__, EXAMPLES, "adapter", "output_dir")
    from ..model.adapter_source import AdapterSource
    from ..serving.exporting import export_adapter

    given = {name: getattr(options, name) for name in ("output_dir", "to", "llama_cpp", "served_base", "system")}
    done = export_adapter(AdapterSource.of(options), **given)
    head = f"{options.output_dir} holds {' and '.join(done.files)}. To serve it:"
    text = "\n".join([head, *(f"  {command}" for command in done.commands), *done.notes])
    show({"output_dir": options.output_dir, **asdict(done)}, text, options.json)
