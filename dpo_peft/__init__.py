"""DPO over LoRA on a 4-bit base. The reference is the same model with its adapter off.

    from dpo_peft import DPOConfig, DPOTrainer

Names are loaded on first use, so that `import dpo_peft` costs nothing.
"""

from importlib import import_module
from typing import Any

from . import moved
from .version import __version__

_HOME = {
    "DPOConfig": "config",
    "DPOTrainer": "trainer",
    "ImplicitReward": "reward",
    "dpo_loss": "losses",
    "sequence_logps": "forward",
    "answer_only": "data",
    "preprocess_dpo_sample": "data",
    "prepare_dataset": "data",
    "from_alpaca": "data",
    "from_hh": "data",
    "from_oasst_tree": "data",
    "from_pandalm": "data",
    "from_sharegpt": "data",
    "from_tulu": "data",
    "OptionError": "errors",
    "DataError": "errors",
    "ReferenceMismatchError": "errors",
    "NonFiniteError": "errors",
    "CheckpointError": "errors",
    "TrainingInterrupted": "errors",
}

__all__ = ["__version__", *_HOME]

moved.install(__path__)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
