"""`dpo-peft bench`: measures this GPU, and writes what it found into a file that can be shared."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import OptionError
from ..files import write_atomically
from .options import option, parse_options, show, show_progress

EXAMPLES = [
    "dpo-peft bench",
    "dpo-peft bench --shape 1b --minutes 2 --output rtx3060.json",
]
ISSUES = "https://github.com/dpo-peft/dpo-peft/issues"


@dataclass
class BenchArguments:
    """What is measured, and where it is written."""

    shape: str | None = option(None, "Shape of the random model: those of `plan`, or tiny. Default: 8b, or what fits.")
    minutes: float = option(5.0, "About how long it takes; more steps, surer figures.")
    output: str = option("bench.json", "The file, for an issue or for `dpo-peft plan --gpu bench.json`.")
    overwrite: bool = option(False, "Replace the file if there is one.")
    json: bool = option(False, "Print what is written.")


def bench(argv: Sequence[str]) -> None:
    """Measure this GPU without a download: rates of large products, of its memory and of unpacking 4-bit weights, and
    DPO on random weights beside what `plan` predicts. The file names no user, machine or folder."""
    options = parse_options(argv, BenchArguments, "bench", bench.__doc__, EXAMPLES)
    output = Path(options.output)
    if output.exists() and not options.overwrite or not output.parent.is_dir():
        raise OptionError(f"output={options.output!r}: give a new file in a folder that exists, or --overwrite.")
    if options.minutes <= 0:
        raise OptionError(f"minutes={options.minutes:g} must be above 0.")
    from ..planning.bench import bench as measure

    show_progress()
    found = measure(options.shape, options.minutes)
    write_atomically(output, json.dumps(found, indent=1) + "\n")
    show(found, f"{render(found)}\n\n{_how_to_share(found, options.output)}", options.json)


def render(found: Mapping[str, Any]) -> str:
    """Returns what was measured as lines for people."""
    gpu, rates, run = found["gpu"], found["rates"], found["run"]
    products = ", ".join(f"{name} {rate / 1e12:,.3g}" for name, rate in rates["flops"].items())
    copies = f"within memory {rates['copy_bytes_per_second'] / 1e9:,.4g}"
    if gpu:
        copies += f", from the CPU's (pinned) {rates['host_to_device_bytes_per_second'] / 1e9:,.4g}"
    lines = {
        "GPU": f"{gpu['name']}, {gpu['total'] / 2**30:.2f} GiB, driver {gpu['driver']}" if gpu else "none: a CPU",
        "large products": f"{products} TFLOP/s",
        "copies": f"{copies} GB/s",
        "NF4 unpacked": f"{rates['nf4_weights_per_second'] / 1e9:,.4g} billion weights/s",
        f"DPO, {run['shape']}": f"{run['samples_per_second']:,.3g} pairs/s, {run['tokens_per_second']:,.0f} tokens/s, "
        f"of {run['steps']} steps of {run['samples_per_step']} pairs",
    }
    if run["share_of_bound"] is not None:
        lines["share of the bound"] = f"{run['share_of_bound']:.0%}"
    if gpu:
        told = "not predicted" if run["predicted_peak"] is None else f"predicted {run['predicted_peak'] / 2**30:.2f}"
        lines["peak of memory"] = f"{run['peak'] / 2**30:.2f} GiB, {told}"
    return "\n".join(f"{name:<20}{text}" for name, text in lines.items())


def _how_to_share(found: Mapping[str, Any], output: str) -> str:
    if not found["gpu"]:
        return f"These are figures of a CPU: they say nothing about a GPU. They are in {output}."
    return f"To share it, attach {output} to an issue ({ISSUES}): it holds the above, versions and the date."
