"""GPUs by name, and how much of their memory tensors can take."""

import difflib
import re
from typing import NamedTuple

from ..errors import OptionError
from .memory import GIB, RESERVE

# GiB that CUDA reports in all, which is less than is printed on the box.
GPUS = {
    "T4": 14.56, "V100-16GB": 15.77, "V100-32GB": 31.73, "A10": 22.03, "A10G": 22.03, "L4": 22.03, "A30": 23.5,
    "RTX3060": 11.75, "RTX3080": 9.75, "RTX3090": 23.68, "RTX4070": 11.72, "RTX4080": 15.69, "RTX4090": 23.63,
    "RTX5080": 15.5, "RTX5090": 31.36, "RTXA6000": 47.4, "RTX6000Ada": 47.4, "RTXPRO6000": 94.9, "A40": 44.4,
    "L40": 44.4, "L40S": 44.4, "A100-40GB": 39.39, "A100-80GB": 79.15, "H100": 79.1, "H100-NVL": 93.1,
    "H200": 139.7, "GH200": 94.5, "B200": 178.3,
}  # fmt: skip
HOPPER = ("H100", "H200", "GH200")  # those that attention's own kernels run on
SOLD_AS = 0.98  # of a GPU that is sold as 24 GB, what CUDA reports of 24 GiB


class Gpu(NamedTuple):
    """A GPU."""

    name: str
    total: float  # bytes

    @property
    def usable(self) -> float:
        """Bytes that tensors can take."""
        return max(self.total - RESERVE, 0.0)


def parse_gpu(text: str) -> Gpu:
    """Reads a GPU's name ("H100", "rtx 4090", "A100-40GB") or size ("24GB" as it is sold, "23.5GiB" exactly).

    Raises:
        OptionError: no such GPU, or a size that none has.
    """
    if size := re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(GB|GiB|G)\s*", text, flags=re.IGNORECASE):
        number, exact = float(size[1]), size[2].lower() == "gib"
        if not 1 <= number <= 10000:
            raise OptionError(f"gpu={text!r}: a GPU has 1 to 10000 GB.")
        return Gpu(text.strip(), number * GIB * (1 if exact else SOLD_AS))
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
    return Gpu(known[wanted], GPUS[known[wanted]] * GIB)


def is_hopper(gpu: str | None) -> bool:
    """Returns whether a GPU's name is that of one of NVIDIA's Hopper generation."""
    return gpu is not None and _plain(gpu).startswith(tuple(map(_plain, HOPPER)))


def _plain(name: str) -> str:
    return re.sub(r"nvidia|geforce|[^a-z0-9]", "", name.lower())
