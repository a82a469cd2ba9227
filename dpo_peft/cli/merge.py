"""`dpo-peft merge`: an adapter and its base as one plain model, kept only if it proves to be the adapter's model."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from ..errors import OptionError
from ..model.options import AdapterOptions
from .options import RowOptions, load_rows, option, parse_options, show

if TYPE_CHECKING:
    from ..merge.merging import MergeReport

EXAMPLES = (
    "dpo-peft merge outputs/quickstart --output_dir outputs/merged",
    "dpo-peft merge outputs/run --output_dir merged --dataset_name test.jsonl --dtype bfloat16",
    "dpo-peft merge outputs/run --output_dir merged --onto base16 --max_drift 0.2 --json",
)
BASES = {
    None: "its base as it was trained on, which was not quantized",
    "dequantized": "its 4-bit base, unpacked: what it was trained on",
    "base16": "the original base, before it was brought to 4 bits",
}


@dataclass(frozen=True)
class MergeOptions(RowOptions, AdapterOptions):
    """Options of `dpo-peft merge`, named as the arguments of `merge_adapter`."""

    output_dir: str = option("", "Folder for the merged model: a new one, or an empty one.")
    onto: str | None = option(
        None,
        "Base of a 4-bit training: its 4-bit weights unpacked, the default and closest, or the original.",
        choices=["dequantized", "base16"],
    )
    dtype: str | None = option(
        None,
        "Of the saved weights. Default: as the base was trained on.",
        choices=["bfloat16", "float16", "float32"],
    )
    max_drift: float | None = option(
        None,
        "Most nats per token, on average, that it may differ. Default 0.001, of float16 0.01, of bfloat16 0.03.",
    )
    dataset_name: str | None = option(
        None, "Preference pairs to compare on (Hub id or file); completions of a few prompts if not given."
    )
    max_rows: int | None = option(None, "How many of its rows, from the start; 64.")
    max_shard_size: str = option("5GB", "Most bytes of one file of weights.")
    device: str | None = option(None, "Where both models are run: a GPU if there is one. Merging is on the CPU.")
    json: bool = option(False, "Print the result as JSON.")


ROWS_ALONE = ("dataset_split", "dataset_config", "dataset_format")  # not arguments of `merge_adapter`


def merge(argv: Sequence[str]) -> None:
    """Merge an adapter into its base. The merged model is loaded again from disk and compared with the adapter's
    model; if it is too far from it, it is refused and removed."""
    options = parse_options(argv, MergeOptions, "merge", merge.__doc__, EXAMPLES, "adapter", "output_dir")
    if options.dataset_name is None:
        given = [name for name in (*ROWS_ALONE, "max_rows", "reference") if getattr(options, name) is not None]
        if given:
            raise OptionError(f"{', '.join(given)}: no effect without dataset_name. Leave out, or give it.")
    rows = None if options.dataset_name is None else load_rows(options)
    from ..merge.merging import merge_adapter  # after parsing: a typing error should not wait for the slowest imports

    others = (*ROWS_ALONE, "json")
    chosen = {name: value for name, value in vars(options).items() if value is not None and name not in others}
    report = merge_adapter(**chosen, dataset=rows)
    show(asdict(report), as_text(report), options.json)


def as_text(report: "MergeReport") -> str:
    """Returns the report for people."""
    drift = report.drift
    size, files = sum(report.files.values()), len(report.files)
    told = {
        "into": [BASES[report.onto]],
        "saved": [
            f"{report.dtype}, {size / 1e6:,.1f} MB in {files} file{'s' if files > 1 else ''}, embeddings "
            f"{'tied' if report.tied else 'not tied'}"
        ],
        "drift": [
            f"{drift.mean_token:.2g} nats per token on average (allowed: {report.max_drift:g}), "
            f"{drift.max_token:.2g} at most",
            f"{drift.mean_completion:.2g} nats per completion on average, {drift.max_completion:.2g} at most",
            f"on {drift.tokens:,} tokens of {drift.rows}, which the adapter itself moves by "
            f"{drift.adapter_token:.2g} each",
        ],
        "greedy": [f"{drift.greedy_equal} of {drift.greedy_prompts} completions are the same, token for token"],
    }
    if drift.accuracy_adapter is not None and drift.accuracy_merged is not None:
        told["margins"] = [
            f"accuracy {drift.accuracy_adapter:.3f} of the adapter's model, {drift.accuracy_merged:.3f} merged, on "
            f"{drift.pairs} pairs"
        ]
    suits = "by itself it suits vLLM's and llama.cpp's LoRA loaders, on the original base"
    told["adapter"] = report.serving or [suits]
    lines = [f"{report.output_dir} holds {report.adapter} merged into {report.base}."]
    for head, texts in told.items():
        lines += [f"  {name:<10}{text}" for name, text in zip([head, *[""] * len(texts)], texts, strict=False)]
    return "\n".join(lines)
