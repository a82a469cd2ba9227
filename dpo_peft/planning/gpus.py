"""GPUs by name, and how much of their memory tensors can take."""

import difflib
import json
import re
from pathlib import Path
from typing import NamedTuple

from ..errors import OptionError
from .memory import GIB, RESERVE
from .steps import Pace

# GiB that CUDA reports in all, which is less than is printed on the box.
GPUS = {
    "T4": 14.56, "V100-16GB": 15.77, "V100-32GB": 31.73, "A10": 22.03, "A10G": 22.03, "L4": 22.03, "A30": 23.5,
    "RTX3060": 11.75, "RTX3080": 9.75, "RTX3090": 23.68, "RTX4070": 11.72, "RTX4080": 15.69, "RTX4090": 23.63,
    "RTX5080": 15.5, "RTX5090": 31.36, "RTXA6000": 47.4, "RTX6000Ada": 47.4, "RTXPRO6000": 94.9, "A40": 44.4,
    "L40": 44.4, "L40S": 44.4, "A100-40GB": 39.39, "A100-80GB": 79.15, "H100": 79.1, "H100-NVL": 93.1,
    "H200": 139.7, "GH200": 94.5, "B200": 178.3,
}  # fmt: skip
# TFLOP/s of products in 16 bits, accumulated in float32, not sparse, as the makers' data sheets have them.
TFLOPS = {
    "T4": 65, "V100-16GB": 125, "V100-32GB": 125, "A10": 125, "A10G": 70, "L4": 121, "A30": 165, "RTX3060": 25.5,
    "RTX3080": 59.5, "RTX3090": 71, "RTX4070": 58, "RTX4080": 97.5, "RTX4090": 165, "RTX5080": 112.5,
    "RTX5090": 209.5, "RTXA6000": 155, "RTX6000Ada": 364, "RTXPRO6000": 504, "A40": 150, "L40": 181, "L40S": 362,
    "A100-40GB": 312, "A100-80GB": 312, "H100": 989, "H100-NVL": 835, "H200": 989, "GH200": 990, "B200": 2250,
}  # fmt: skip
# Of them, what training reaches: 57 to 70 % of what large products reach on an H100, which is 773 of 989.
REACHED = 0.5
# GB/s (10^9) from pinned CPU memory, measured by nvbandwidth: 24.8 on an A100 and 26 on an RTX 4090 (PCIe 4), 56 on an
# RTX 5090 (PCIe 5); half of PCIe 4 on PCIe 3. Rounded down.
PCIE3, PCIE4, PCIE5, C2C = 12, 25, 50, 350
_LINKS = {
    **dict.fromkeys(("T4", "V100-16GB", "V100-32GB"), PCIE3),
    **dict.fromkeys(("RTX5080", "RTX5090", "RTXPRO6000", "H100", "H100-NVL", "H200", "B200"), PCIE5),
    "GH200": C2C,
}
# GB/s from another GPU of the machine: by NVLink where it is built in, else by PCIe (22 to 26 on RTX A6000).
NVLINK, PEERS = 200, 20
_NVLINKED = ("A100-40GB", "A100-80GB", "H100", "H200", "B200")
HOPPER = ("H100", "H200", "GH200")  # those that attention's own kernels run on
OF_PRODUCTS = 0.6  # of the rate of large products that was measured, what training reaches: rounded from the same
SOLD_AS = 0.98  # of a GPU that is sold as 24 GB, what CUDA reports of 24 GiB


class Gpu(NamedTuple):
    """A GPU."""

    name: str
    total: float  # bytes
    like: str  # the GPU whose speed it has
    measured: tuple[float, float] | None = None  # by `bench`: FLOP/s of training, bytes/s from pinned CPU memory

    def pace(self, sharded: bool, gb_per_second: float | None = None) -> Pace:
        """Returns how fast it computes, and how fast layers come: from other GPUs if they are sharded, else from the
        CPU's memory. `gb_per_second` is what was measured of the latter."""
        link = (NVLINK if self.like in _NVLINKED else PEERS) if sharded else _LINKS.get(self.like, PCIE4)
        flops, bandwidth = REACHED * TFLOPS[self.like] * 1e12, (gb_per_second or link) * 1e9
        if self.measured is not None:
            flops, bandwidth = self.measured[0], bandwidth if sharded or gb_per_second else self.measured[1]
        return Pace(flops, bandwidth)

    @property
    def usable(self) -> float:
        """Bytes that tensors can take."""
        return max(self.total - RESERVE, 0.0)


def parse_gpu(text: str) -> Gpu:
    """Reads a GPU's name ("H100", "rtx 4090", "A100-40GB"), its size ("24GB" as it is sold, "23.5GiB" exactly), or a
    file of `dpo-peft bench` ("bench.json").

    Raises:
        OptionError: no such GPU, or a size that none has; or a file that says nothing of one.
    """
    if text.endswith(".json"):
        return _measured(text)
    if size := re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(GB|GiB|G)\s*", text, flags=re.IGNORECASE):
        number, exact = float(size[1]), size[2].lower() == "gib"
        if not 1 <= number <= 10000:
            raise OptionError(f"gpu={text!r}: a GPU has 1 to 10000 GB.")
        return of_size(text.strip(), number * GIB * (1 if exact else SOLD_AS))
    known, wanted = {_plain(name): name for name in GPUS}, _plain(text)
    if f"rtx{wanted}" in known:  # "4090"
        wanted = f"rtx{wanted}"
    if wanted not in known:
        if wanted.isdecimal():
            alike = [name for name in GPUS if wanted in name] or [*GPUS]
            raise OptionError(
                f"gpu={text!r} is neither a name nor a size. For {text} GB write --gpu {wanted}GB; known names: "
                f"{', '.join(alike)}."
            )
        close = [name for plain, name in known.items() if plain.startswith(wanted or " ")]
        close = close or [known[name] for name in difflib.get_close_matches(wanted, known, n=3, cutoff=0.5)]
        hint = f"Did you mean {' or '.join(close)}?" if close else f"Known: {', '.join(GPUS)}."
        raise OptionError(f"gpu={text!r} is not a GPU that is known here. {hint} Or give its size, as in --gpu 24GB.")
    return Gpu(known[wanted], GPUS[known[wanted]] * GIB, known[wanted])


def of_size(name: str, total: float) -> Gpu:
    """Returns a GPU of so many bytes: as fast as the one that its driver's name says, or the slowest of that size."""
    series = {known: _plain(known.split("-")[0]) for known in GPUS}
    named = [known for known in GPUS if series[known] in _plain(name)]  # of an A100 also the A10
    named = [known for known in named if len(series[known]) == max(len(series[one]) for one in named)]

    def unlike(known: str) -> tuple[float, float]:
        away = abs(GPUS[known] * GIB - total)
        return away if away > 0.05 * total else 0.0, TFLOPS[known]

    return Gpu(name, total, min(named or GPUS, key=unlike))


def _measured(file: str) -> Gpu:
    try:
        found = json.loads(Path(file).read_text("utf-8"))
        if (gpu := found["gpu"]) is not None:
            flops = OF_PRODUCTS * max(found["rates"]["flops"][name] for name in ("bfloat16", "float16"))
            measured = flops, found["rates"]["host_to_device_bytes_per_second"]
            return of_size(gpu["name"], gpu["total"])._replace(measured=measured)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OptionError(f"gpu={file!r} is not a file that `dpo-peft bench` wrote ({error!r}).") from error
    raise OptionError(
        f"gpu={file!r} was measured on a CPU: measure where there is a GPU, or give one by name or size."
    )


def is_hopper(gpu: str | None) -> bool:
    """Returns whether a GPU's name is that of one of NVIDIA's Hopper generation."""
    return gpu is not None and _plain(gpu).startswith(tuple(map(_plain, HOPPER)))


def _plain(name: str) -> str:
    return re.sub(r"nvidia|geforce|[^a-z0-9]", "", name.lower())
