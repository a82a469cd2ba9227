"""Modules under the names that they had in 0.1: `import dpo_peft.planner` gives `dpo_peft.planning.steps`."""

import sys
from importlib import import_module
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "agreement": "reward.agreement",
    "cli_pairs": "pairs",
    "diagnostics": "evaluation.diagnostics",
    "engines": "pairs.engines",
    "frozen": "reference.frozen_adapter",
    "identity": "reference.fingerprint",
    "judges": "pairs.judges",
    "memory": "planning.memory",
    "modeling": "model.loading",
    "planner": "planning.steps",
    "publish": "hub.publishing",
    "sampling": "model.generation",
    "shapes": "planning.shapes",
    "trained": "model.adapter_source",
}


# Stands in the package's `__path__` after its folder: who imports `dpo_peft.<name>` and finds no file asks here.
PLACE = f"{__package__}: modules under their old names"


class MovedModules(Loader):
    """Finds a moved module where it is now. It is the same module object under both names."""

    def __init__(self, place: str):
        if place != PLACE:
            raise ImportError  # Python's way to say that another finder is responsible

    def find_spec(self, fullname: str, target: ModuleType | None = None) -> ModuleSpec | None:
        """Returns a spec for an old name, and None for every other."""
        return ModuleSpec(fullname, self) if fullname.rpartition(".")[2] in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Imports the module by its new name."""
        module = import_module(f"{__package__}.{MOVED[spec.name.rpartition('.')[2]]}")
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Gives the module, which has run under its new name, its own spec back."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


def install(path: list[str]) -> None:
    """Lets old names be found too.

    Args:
        path: the package's `__path__`.
    """
    sys.path_hooks.append(MovedModules)
    path.append(PLACE)
