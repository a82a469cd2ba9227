"""How the core uses a wing without importing it: by name, when it is needed, and only if it is there.

A wing is a folder that training can do without: `fused`, `planning`, ... What the core takes from one is a
function or class of the wing's `__init__`; where the folder is missing, the core goes on without.
"""

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from .errors import OptionError


def required(name: str, option: str) -> ModuleType:
    """Return a wing that an option needs.

    Raises:
        OptionError: the folder is not there.
    """
    if (found := wing(name)) is None:
        raise OptionError(f"{option}: this copy of the package has no dpo_peft/{name}. Leave it out.")
    return found


def wing(name: str) -> ModuleType | None:
    """Return the package `dpo_peft.<name>`, imported at its first use; None if the folder is not there."""
    full = f"{__package__}.{name}"
    return import_module(full) if find_spec(full) is not None else None
