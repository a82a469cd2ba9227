"""`dpo-peft merge`: an adapter and its base as one plain model, kept only if it proves to be the adapter's model."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import OptionError
from ..files import CONVERTERS, READERS, read_rows
from .options import parse_options, required, show

if TYPE_CHECKING:
    from ..merge.merging import MergeReport

EXAMPLES = (
    "dpo-peft merge outputs/quickstart --output_dir outputs/merged",
    "dpo-peft merge outputs/run --output_dir merged --dataset_name test.jsonl --dtype bfloat16",
    "dpo-peft merge outputs/run --output_dir merged --onto base16 --max_drift 0.2 --json",
)
BASES = {
    None: "its base as it was trained on, which was not quantised",
    "dequantized": "its 4-bit base, unpacked: what it was trained on",
    "base16": "the original base, before it was brought to 4 bits",
}


@dataclass
class MergeOptions:
    """Options of `dpo-peft merge`."""

    adapter: str = field(default="", metadata={"help": "Folder or Hub id of the adapter."})
    output_dir: str = field(default="", metadata={"help": "Folder for the merged model: a new one, or an empty one."})
    onto: str | None = field(
        default=None,
        metadata={
            "help": "Which base of a 4-bit training: the 4-bit weights unpacked, which is the default and closest to "
            "the adapter's model, or the original.",
            "choices": ["dequantized", "base16"],
        },
    )
    base: str | None = field(default=None, metadata={"help": "Base model, if not where the adapter says."})
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Of the saved weights; as the base was loaded for the training if not given.",
            "choices": ["bfloat16", "float16", "float32"],
        },
    )
    max_drift: float | None = field(
        default=None,
        metadata={
            "help": "Most nats per token, on average, that the merged model may differ from the adapter's; if not "
            "given 0.001 in float32, 0.01 in float16, 0.03 in bfloat16."
        },
    )
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Preference pairs to compare on (Hub id or file); answers to a few prompts if not given."},
    )
    dataset_split: str | None = field(default=None, metadata={"help": "Split of a Hub dataset; 'test' if not given."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_format: str | None = field(
        default=None, metadata={"help": "Convert rows first.", "choices": list(CONVERTERS)}
    )
    max_rows: int | None = field(default=None, metadata={"help": "How many of its rows, from the start; 64."})
    reference: str | None = field(
        default=None, metadata={"help": "Adapter that was the reference, if not where the record says."}
    )
    max_shard_size: str = field(default="5GB", metadata={"help": "Most bytes of one file of weights."})
    device: str | None = field(
        default=None, metadata={"help": "Where both models are run: a GPU if there is one. Merging is on the CPU."}
    )
    json: bool = field(default=False, metadata={"help": "Print the result as JSON."})
    check_base: bool = field(default=True, metadata={"help": "Refuse a base that is not the one of the training."})
    quantize: bool | None = field(
        default=None, metadata={"help": "NF4 or not, in place of how the base was loaded for the training."}
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of an adapter on the Hub."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that ships with the model."})


def merge(argv: Sequence[str]) -> None:
    """Read options and rows, merge, compare, print the result.

    Raises:
        OptionError, DataError, ReferenceMismatchError: with the remedy.
        DriftError: the merged model was too far from the adapter's, and was removed.
    """
    options = parse_options(
        argv,
        MergeOptions,
        "merge",
        "Merge an adapter into its base. The merged model is loaded again from disk and compared with the adapter's "
        "model; if it is too far from it, it is refused and removed.",
        EXAMPLES,
    )
    required(options, "adapter", "output_dir")
    rows = read_pairs(options)
    from ..merge.merging import merge_adapter  # after parsing: a typing error should not wait for the slowest imports

    report = merge_adapter(
        options.adapter,
        options.output_dir,
        onto=options.onto,
        base=options.base,
        dtype=options.dtype,
        max_drift=options.max_drift,
        dataset=rows,
        dataset_name=options.dataset_name or "",
        max_rows=64 if options.max_rows is None else options.max_rows,
        max_shard_size=options.max_shard_size,
        device=options.device,
        reference=options.reference,
        quantize=options.quantize,
        check_base=options.check_base,
        trust_remote_code=options.trust_remote_code,
        revision=options.revision,
    )
    show(asdict(report), as_text(report), options.json)


def read_pairs(options: MergeOptions) -> Any:
    """The rows to compare on; None if none are given.

    Raises:
        OptionError: no such file or dataset, or options of a dataset without one.
    """
    if options.dataset_name is None:
        of_rows = ("dataset_split", "dataset_config", "dataset_format", "max_rows", "reference")
        if given := [name for name in of_rows if getattr(options, name) is not None]:
            raise OptionError(f"{', '.join(given)}: no effect without dataset_name. Leave out, or give it.")
        return None
    if Path(options.dataset_name).suffix in READERS:
        for name in ("dataset_split", "dataset_config"):
            if getattr(options, name) is not None:
                raise OptionError(f"{name} has no effect: {options.dataset_name} is a file. Leave it out.")
    split = options.dataset_split or "test"
    return read_rows(options.dataset_name, split, options.dataset_config, dataset_format=options.dataset_format)


def as_text(report: "MergeReport") -> str:
    """The report for people."""
    drift = report.drift
    size, files = sum(report.files.values()), len(report.files)
    lines = [
        f"{report.output_dir} holds {report.adapter} merged into {report.base}.",
        f"  into      {BASES[report.onto]}",
        f"  saved     {report.dtype}, {size / 1e6:,.1f} MB in {files} file{'s' if files > 1 else ''}, embeddings "
        f"{'tied' if report.tied else 'not tied'}",
        f"  drift     {drift.mean_token:.2g} nats per token on average (allowed: {report.max_drift:g}), "
        f"{drift.max_token:.2g} at most",
        f"            {drift.mean_completion:.2g} nats per answer on average, {drift.max_completion:.2g} at most",
        f"            on {drift.tokens:,} tokens of {drift.rows}, which the adapter itself moves by "
        f"{drift.adapter_token:.2g} each",
        f"  greedy    {drift.greedy_equal} of {drift.greedy_prompts} answers are the same, token for token",
    ]
    if drift.accuracy_adapter is not None and drift.accuracy_merged is not None:
        lines.append(
            f"  margins   accuracy {drift.accuracy_adapter:.3f} of the adapter's model, {drift.accuracy_merged:.3f} "
            f"merged, on {drift.pairs} pairs"
        )
    heads = ["  adapter   "] + ["            "] * len(report.serving)
    told = report.serving or ["by itself it suits vLLM's and llama.cpp's LoRA loaders, on the original base"]
    return "\n".join([*lines, *(head + text for head, text in zip(heads, told, strict=False))])
