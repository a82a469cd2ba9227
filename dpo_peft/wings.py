"""How the core uses a wing without importing it: by name, when it is needed, and only if it is there.

A wing is a folder that training can do without: `fused`, `planning`, ... What the core takes from one is a
function or class of the wing's `__init__`; where the folder is missing, the core goes on without.
"""

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType


def wing(name: str) -> ModuleType | None:
    """Return the package `dpo_peft.<name>`, imported at its first use; None if the folder is not there."""
    full = f"{__package__}.{name}"
    return import_module(full) if find_spec(full) is not None else None
