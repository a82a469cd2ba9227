"""An adapter and its base as one plain model, that must prove to be the adapter's model before it is kept.

An adapter trained on a 4-bit base has learned around that base's rounding error. There are two bases to add it to:

    "dequantized"  the 4-bit weights as the forward pass of the training unpacked them: what is added to is what was
                   trained on, and only the rounding to the saved dtype is left;
    "base16"       the original, which has no such error: another model, by as much as 4 bits changed the base.

The first is the default. Either way the merged model is saved beside its place, loaded again from disk by plain
transformers and compared with the adapter's model; beyond `max_drift` it is refused and nothing is left behind.

Base weights are unpacked, added to in float32 and rounded layer by layer: beside the 4-bit base there is never more
than one full copy of the weights in memory.
"""

import gc
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from huggingface_hub import ModelCard, ModelCardData
from peft import PeftConfig
from safetensors import SafetensorError
from transformers import PreTrainedModel

from ..artifacts.card import cell, is_hub_id, link, shown_name
from ..artifacts.card_rules import hub_repo
from ..disk import one_writer, open_by_umask, remove, sync, write_atomically
from ..errors import DriftError, OptionError
from ..forward.rotary import fix_rope
from ..model.adapter_source import UNRECORDED, AdapterSource, TrainedAdapter, rope_length_of
from ..model.adapters import moved_base
from ..model.base import load_base
from ..model.gguf import BlocksQuantizer
from ..model.rebuilding import quantization_options, resize_as_saved
from ..training.arguments import hold_images
from .drift import AdapterObserved, Drift, compare, observe, observe_adapter, pair_rows
from .loaders import serving_problems
from .weights import dequantize, is_tied, merge_into, quiet

ONTO = ("dequantized", "base16")
# Nats per token, on average, that the merged model may be off, by the coarsest dtype that it was saved or computed in;
# see docs/merging.md for what was measured.
MAX_DRIFT = {"float32": 0.001, "float16": 0.01, "bfloat16": 0.03}
_SIZE = re.compile(r"\d+(\.\d+)?\s*[KMGT]?B", re.IGNORECASE)


@dataclass(frozen=True)
class MergeReport:
    """What was merged into what, and how far the result is from the adapter's model."""

    adapter: str
    base: str
    onto: str | None  # one of `ONTO`; None: the base was not quantized, there is only one
    dtype: str
    tied: bool  # input and output embeddings are one tensor
    output_dir: str
    files: dict[str, int]  # weights: file name to bytes
    max_drift: float  # the limit, in nats per token on average
    drift: Drift
    serving: list[str]  # what vLLM and llama.cpp would say to the adapter itself


def merge_adapter(
    adapter: str,
    output_dir: str | Path,
    onto: str | None = None,
    *,
    dtype: str | None = None,
    max_drift: float | None = None,
    dataset: Dataset | None = None,
    dataset_name: str = "the dataset",
    max_rows: int = 64,
    max_shard_size: str = "5GB",
    device: torch.device | str | None = None,
    **made: Any,
) -> MergeReport:
    """Merges an adapter into its base, saves the model, loads it again and compares it with the adapter's model.

    Args:
        adapter: folder or Hub id.
        output_dir: a folder that does not exist yet, or an empty one. It appears once the model is accepted.
        onto: one of `ONTO`; None is "dequantized" for an adapter of a 4-bit base, and otherwise the base as it is.
        dtype: of the saved weights: "float32", "bfloat16" or "float16"; None keeps that of the base in training.
        max_drift: most nats per token, on average, that the log-probs may differ by; None is by dtype (`MAX_DRIFT`):
            the coarsest of the saved one and those in which the adapter's model computes.
        dataset: preference pairs to compare on, which shows the accuracy of the margins too. None compares on
            completions that the adapter's model writes to a few prompts.
        dataset_name: how the report calls it.
        max_rows: so many rows of it, from the start.
        max_shard_size: of a file of weights, such as "5GB".
        device: where both models are run. Weights are merged on the CPU.
        made: options of `AdapterSource`: base, quantize, reference, check_base, trust_remote_code, revision. The
            reference decides the margins on a dataset, and isn't needed without one.

    Raises:
        OptionError: an option that can't be honored, or an output folder with something in it.
        ReferenceMismatchError: the base is not the one of the training.
        DataError: rows that can't be used.
        DriftError: the merged model is too far from the adapter's; nothing is left behind.
    """
    output = _check(output_dir, onto, dtype, max_drift, max_shard_size)
    with _unfinished(output) as folder:
        source = AdapterSource(adapter, **made)
        _check_scope(source)
        if source.reference is not None and dataset is None:
            raise OptionError("reference has no effect without a dataset: leave it out.")
        # Rows come before the model: a bad row is found in seconds, not after minutes of loading.
        rows = None if dataset is None else _rows(dataset, source, shown_name(dataset_name), max_rows)
        loaded = source.load(device, with_reference=dataset is not None)
        processor = loaded.images.processor if loaded.images else loaded.tokenizer
        onto, dtype, config = _plan(loaded, onto, dtype)
        seen = observe_adapter(loaded, rows)
        bare = _take_base(loaded) if onto != "base16" else None
        del loaded  # its 4-bit base is unpacked by now, or makes room for the original
        gc.collect()
        if bare is None:
            bare = original_base(source)
        merged = merge_into(bare, adapter, config, getattr(torch, dtype), source.from_hub)
        del bare
        limit = MAX_DRIFT[_coarsest(dtype, seen)] if max_drift is None else max_drift
        tied = is_tied(merged.config)
        with quiet():
            merged.save_pretrained(folder, max_shard_size=max_shard_size)
        processor.save_pretrained(folder)
        open_by_umask(folder)
        del merged
        gc.collect()
        drift = measure_drift(folder, dtype, seen, source.trust_remote_code)
        if not drift.mean_token <= limit:
            raise DriftError(_refusal(drift, limit, onto, dtype))
        report = MergeReport(
            adapter=shown_name(adapter),
            base=shown_name(source.base_name),
            onto=onto,
            dtype=dtype,
            tied=tied,
            output_dir=str(output_dir),
            files={path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))},
            max_drift=limit,
            drift=drift,
            serving=serving_problems(config),
        )
        _describe(folder, report, adapter, source.base_name, processor is not seen.tokenizer)
    return report


def _rows(dataset: Dataset, source: AdapterSource, name: str, max_rows: int) -> Any:
    """Returns the rows on which the drift is measured, prepared."""
    reader = source.images(needed=hold_images(dataset)) or source.tokenizer()
    return pair_rows(dataset, reader, name, source.read() or UNRECORDED, max_rows)


def _check(
    output_dir: str | Path, onto: str | None, dtype: str | None, max_drift: float | None, max_shard_size: str
) -> Path:
    """Returns the output folder, if everything that can be known beforehand is right."""
    for name, value, choices in (("onto", onto, ONTO), ("dtype", dtype, MAX_DRIFT)):
        if value is not None and value not in choices:
            raise OptionError(f"{name}={value!r}: use one of {', '.join(choices)}.")
    if max_drift is not None and not max_drift >= 0:
        raise OptionError(f"max_drift={max_drift} must be 0 or more nats per token.")
    if not _SIZE.fullmatch(max_shard_size):
        raise OptionError(f"max_shard_size={max_shard_size!r}: write a size such as 5GB or 500MB.")
    output = Path(output_dir)
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise OptionError(f"output_dir={str(output_dir)!r} is not an empty folder: give a new one, or empty it first.")
    return output


def _plan(source: TrainedAdapter, onto: str | None, dtype: str | None) -> tuple[str | None, str, PeftConfig]:
    """Returns base and dtype of the merged model, and the adapter's config."""
    base, config = source.model.get_base_model(), source.model.peft_config[source.policy]
    quantized = bool(quantization_options(getattr(base.config, "quantization_config", None)))
    if isinstance(getattr(base, "hf_quantizer", None), BlocksQuantizer):
        if onto == "base16":
            raise OptionError(f"onto='base16': the base of {source.source!r} is a GGUF file. Leave onto out.")
        quantized = True
    elif not quantized and getattr(base, "hf_quantizer", None) is not None:
        raise OptionError(
            f"The base of {source.source!r} is quantized by {type(base.hf_quantizer).__name__}: only bases in 4 or 8 "
            "bits of bitsandbytes, of a GGUF file, or not quantized, can be merged into."
        )
    if onto is not None and not quantized:
        raise OptionError(
            f"onto={onto!r} has no effect: {source.source!r} was trained on a base that is not quantized, and is "
            "merged into that. Leave it out."
        )
    if onto == "base16" and (moved := moved_base(config)) is not None and config.init_lora_weights is not False:
        raise OptionError(f"onto='base16': the adapter's {moved}, and does not fit the original. Leave onto out.")
    own = str(base.get_input_embeddings().weight.dtype).removeprefix("torch.")
    return onto or ("dequantized" if quantized else None), dtype or own, config


def measure_drift(folder: Path, dtype: str, seen: AdapterObserved, trust_remote_code: bool) -> Drift:
    """Loads the saved model as anybody would, and compares.

    It is run as the adapter's model was, so that what is measured is the weights: computing in bfloat16 alone moves
    log-probs by ten times what rounding the merged weights to bfloat16 does.
    """
    wider = torch.promote_types(getattr(torch, dtype), seen.dtype)
    model = load_base(str(folder), None, False, {"dtype": wider}, trust_remote_code, seen.device)
    fix_rope(model, rope_length_of(model, seen.setup, seen.setup.max_length))
    merged = observe(model.eval(), seen.tokenizer, seen.rows, seen.setup.precision, "merged model")
    return compare(seen, merged)


def _coarsest(dtype: str, seen: AdapterObserved) -> str:
    """Returns the coarsest of the dtypes in which the merged model was saved and the two were compared."""
    used = {dtype, str(seen.dtype).removeprefix("torch."), seen.setup.precision}
    return max(used & MAX_DRIFT.keys(), key=MAX_DRIFT.__getitem__)


def _take_base(source: TrainedAdapter) -> PreTrainedModel:
    """Returns the base out of the adapter's model, its 4-bit weights unpacked, on the CPU."""
    base = source.model.unload()
    dequantize(base)
    for tensor in [*base.parameters(), *base.buffers()]:
        tensor.data = tensor.data.cpu()
    return base


def original_base(source: AdapterSource) -> PreTrainedModel:
    """Returns the base as it is published."""
    revision = source.config.revision
    kwargs = {"dtype": "auto", **({"revision": revision} if revision else {})}
    trained = source.read()
    class_name = trained.class_name if trained else None
    base = load_base(source.base_name, None, False, kwargs, source.trust_remote_code, None, class_name)
    if getattr(base, "hf_quantizer", None) is not None:
        raise OptionError(
            f"onto='base16': {source.base_name!r} is itself quantized, there is no original. Leave onto out."
        )
    resize_as_saved(base, source.adapter, source.from_hub)
    return base


@contextmanager
def _unfinished(output: Path) -> Iterator[Path]:
    """Yields a folder that takes the place of `output` at the end, and is gone if anything goes wrong. What a killed
    merge left there is deleted."""
    beside = output.with_name(f".{output.name}.unfinished")
    folder = beside / output.name
    with one_writer("output_dir", output):
        remove(beside)
        try:
            folder.mkdir(parents=True)
            yield folder
            if output.is_dir():
                output.rmdir()
            folder.rename(output)
            sync(output.parent)
        except SafetensorError as error:  # its way to say that the disk is full
            raise OSError(f"{output} can't be written: {error}") from error
        finally:
            remove(beside)


def _refusal(drift: Drift, limit: float, onto: str | None, dtype: str) -> str:
    if onto == "base16":
        remedy = (
            "The adapter was trained on the 4-bit base, and the original is another model: merge into the base as it "
            "was trained on (onto='dequantized')"
        )
    elif dtype != "float32":
        remedy = f"Rounding the merged weights to {dtype} may take the training away: save them with dtype='float32'"
    else:
        remedy = "Adapter and base may not belong together: check that base and versions are those of the training"
    return (
        f"The merged model is {drift.mean_token:.3g} nats per token from the adapter's model, on average over "
        f"{drift.tokens:,} tokens of {drift.rows}; at most {limit:g} are allowed, and the adapter itself moves them "
        f"by {drift.adapter_token:.3g}. Nothing was kept. {remedy}, or allow more with max_drift."
    )


def _describe(folder: Path, report: MergeReport, adapter: str, base: str, sees: bool) -> None:
    """Writes merge.json and a README. Both may be published: the names in them are no paths."""
    facts = {name: value for name, value in asdict(report).items() if name != "output_dir"}
    write_atomically(folder / "merge.json", json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    task = "image-text-to-text" if sees else "text-generation"
    data = ModelCardData(library_name="transformers", pipeline_tag=task, tags=["dpo-peft", "merge"])
    if is_hub_id(base):
        data["base_model"], data["base_model_relation"] = hub_repo(base), "finetune"
    drift = report.drift
    which = {"dequantized": "the quantized base, dequantized, that it was trained on", "base16": "the original base"}
    text = (
        f"# {cell(Path(report.output_dir).resolve().name)}\n\nThe adapter {link(adapter)} merged into {link(base)}: "
        f"{which.get(report.onto or '', 'the base that it was trained on')}, saved in {report.dtype}.\n\n"
        f"Against the adapter's model, on {drift.tokens:,} tokens of {drift.rows}: {drift.mean_token:.3g} nats per "
        f"token on average, {drift.max_token:.3g} at most; the adapter moves these tokens by "
        f"{drift.adapter_token:.3g}. {drift.greedy_equal} of {drift.greedy_prompts} greedy completions are the same.\n"
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(folder / "README.md")


def _check_scope(source: AdapterSource) -> None:
    if source.config.alora_invocation_tokens:
        raise OptionError(
            f"{source.adapter!r} acts on completions alone (alora_invocation_tokens), merged weights would act on the "
            "prompt too. Serve the adapter: `dpo-peft export` for llama.cpp's llama-server, or by PEFT."
        )
