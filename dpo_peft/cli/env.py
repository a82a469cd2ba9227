"""`dpo-peft env`: versions, machine and folders, for a report of a fault."""

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass

from .options import option, parse_options, show

EXAMPLES = ["dpo-peft env", "dpo-peft env --json"]
VARIABLES = (
    "CUDA_VISIBLE_DEVICES DPO_PEFT_CACHE HF_HOME HF_HUB_OFFLINE OMP_NUM_THREADS PYTORCH_CUDA_ALLOC_CONF".split()
)


@dataclass
class EnvArguments:
    """How it is printed."""

    json: bool = option(False, "Print one JSON object, sizes in GiB.")


def env(argv: Sequence[str]) -> None:
    """Show versions, machine and folders, for a report. No token is among them."""
    options = parse_options(argv, EnvArguments, "env", env.__doc__, EXAMPLES)
    import psutil
    import torch
    from huggingface_hub.constants import HF_HUB_CACHE

    from ..artifacts.card import framework_versions
    from ..planning.bench import driver
    from ..reference.cache import default_folder

    memory = psutil.virtual_memory()
    found = {
        "platform": platform.platform(),
        "python": platform.python_version(),
        **framework_versions(),
        "CUDA of torch": torch.version.cuda or torch.version.hip or "none: a CPU build",
        "GPU driver": driver(),
        "GPU": [gpu(number) for number in range(torch.cuda.device_count())] or "none",
        "CPU": f"{platform.processor() or platform.machine()}, {psutil.cpu_count(logical=False)} cores",
        "memory_gib": round(memory.total / 2**30, 1),
        "free_memory_gib": round(memory.available / 2**30, 1),
        "cache of models": HF_HUB_CACHE,
        "cache of the reference": str(default_folder()),
        **{name: os.environ[name] for name in VARIABLES if name in os.environ},
    }
    show(found, "\n".join(f"{name:<24}{value}" for name, value in found.items()), options.json)


def gpu(number: int) -> str:
    """Returns name, memory and compute capability of a GPU."""
    import torch

    has = torch.cuda.get_device_properties(number)
    return f"{has.name}, {has.total_memory / 2**30:.1f} GiB, compute capability {has.major}.{has.minor}"
