"""`dpo-peft verify-serving`: whether a server gives the model that was trained."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from ..errors import DriftError, OptionError
from ..model.options import AdapterOptions
from .options import RowOptions, load_rows, option, parse_options, show

if TYPE_CHECKING:
    from ..serving.verify import ServingReport

EXAMPLES = (
    "dpo-peft verify-serving outputs/run --base_gguf model.Q4_K_M.gguf --dataset_name test.jsonl",
    "dpo-peft verify-serving outputs/run --engine vllm --url http://localhost:8000 --served_model run",
    "dpo-peft verify-serving outputs/run --engine transformers --json",
)
PLACES = "engine base_gguf adapter_gguf llama_cpp url api_key served_model served_base merged".split()
ROWS_ALONE = ("dataset_split", "dataset_config", "dataset_format", "column_map", "max_rows")


@dataclass(frozen=True)
class VerifyOptions(RowOptions, AdapterOptions):
    """Options of `dpo-peft verify-serving`, named as the fields of `Served` and the arguments of `verify_serving`."""

    engine: str = option("llama.cpp", "Where it is served.", choices=["llama.cpp", "vllm", "transformers"])
    base_gguf: str | None = option(None, "llama.cpp's base, a GGUF file; the base itself if it was trained on one.")
    adapter_gguf: str | None = option(None, "llama.cpp's adapter, as it is served; made as by `export` if not given.")
    llama_cpp: str | None = option(None, "Folder of llama.cpp, for its converter.")
    url: str | None = option(None, "A running llama-server or vLLM, such as http://localhost:8000.")
    api_key: str | None = option(None, "Key of the server; OPENAI_API_KEY keeps it out of the list of processes.")
    served_model: str | None = option(None, "vLLM's name of the adapter, or of the merged model.")
    served_base: str | None = option(None, "transformers' base; that of the training, as published, if not given.")
    merged: bool = option(False, "The base that is served holds the adapter already.")
    dataset_name: str | None = option(
        None, "Preference pairs to compare on, held out ones (Hub id or file); texts of the model if not given."
    )
    max_rows: int | None = option(None, "How many of its rows, from the start; 64.")
    max_token_difference: float | None = option(
        None,
        "Most nats per token, on average, that log-probs may differ by; if not given 0.02, or half of what the "
        "adapter moves them by, if that is less.",
    )
    min_signs: float = option(0.98, "Least share of pairs whose margin has the same sign.")
    device: str | None = option(None, "Where the trained model runs: a GPU if there is one.")
    json: bool = option(False, "Print the result as JSON.")


def verify_serving(argv: Sequence[str]) -> None:
    """Compares, prints the result, and raises a DriftError if what is served is not what was trained."""
    about = (
        "Compare a served model with the trained one: log-probs, margins and greedy texts, on the same token ids. "
        "The result goes into serving.json and the card beside the adapter."
    )
    options = parse_options(argv, VerifyOptions, "verify-serving", about, EXAMPLES, "adapter")
    if options.dataset_name is None:
        given = [name for name in (*ROWS_ALONE, "reference") if getattr(options, name) is not None]
        if given:
            raise OptionError(f"{', '.join(given)}: no effect without dataset_name. Leave out, or give it.")
    rows = None if options.dataset_name is None else load_rows(options)
    from ..artifacts.card import shown_name
    from ..model.adapter_source import AdapterSource
    from ..serving import verify

    report = verify.verify_serving(
        AdapterSource.of(options),
        verify.Served(**{name: getattr(options, name) for name in PLACES}),
        dataset=rows,
        dataset_name=shown_name(options.dataset_name or ""),
        max_rows=options.max_rows or 64,
        max_token_difference=options.max_token_difference,
        min_signs=options.min_signs,
        device=options.device,
    )
    show(asdict(report), as_text(report), options.json)
    if report.problems:
        raise DriftError(f"What is served is not what was trained. {' '.join(report.problems)}")


def as_text(report: "ServingReport") -> str:
    """Returns the report for people."""
    from ..merge.drift import strength

    drift = report.drift
    lines = [
        f"{report.served}, beside {report.adapter} as it was trained:",
        f"  tokens    {drift.mean_token:.2g} nats apart on average (allowed: {report.max_token_difference:.2g}), "
        f"{drift.max_token:.2g} at most",
        f"            on {drift.tokens:,} tokens of {drift.rows}, which the adapter itself moves by "
        f"{drift.adapter_token:.2g} each",
    ]
    if report.rounding is not None:
        lines.append(
            f"            and llama.cpp's rounding of activations by {report.rounding.mean_token:.2g} "
            f"({report.rounding.greedy_equal} greedy texts the same)"
        )
    if drift.strength is not None:
        lines.append(f"  adapter   acts with {strength(drift)} of the strength that was trained")
    lines.append(f"  greedy    {drift.greedy_equal} of {drift.greedy_prompts} texts are the same, token for token")
    if drift.pairs:
        lines.append(
            f"  margins   {drift.signs_equal} of {drift.pairs} of the same sign (needed: {report.min_signs:.0%}); "
            f"accuracy {drift.accuracy_adapter:.3f} as trained, {drift.accuracy_merged:.3f} served"
        )
    return "\n".join([*lines, *([] if report.problems else ["What is served is what was trained."])])
