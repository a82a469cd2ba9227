"""Modules under the names that they had in 0.1: `import dpo_peft.planner` gives `dpo_peft.planning.steps`."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "agreement": "reward.agreement",
    "cli_pairs": "pairs",
    "diagnostics": "training.diagnostics",
    "engines": "pairs.engines",
    "frozen": "reference.frozen_adapter",
    "identity": "reference.fingerprint",
    "judges": "pairs.judges",
    "memory": "planning.memory",
    "modeling": "model.loading",
    "planner": "planning.steps",
    "publish": "hub.publishing",
    "sampling": "model.generation",
    "serving": "model.serving",
    "shapes": "planning.shapes",
    "trained": "model.adapter_source",
}


class MovedModules(MetaPathFinder, Loader):
    """Finds a moved module where it is now. It is the same module object under both names."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a spec for an old name, and None for every other."""
        package, _, name = fullname.rpartition(".")
        return ModuleSpec(fullname, self) if package == __package__ and name in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Import the module by its new name."""
        module = import_module(f"{__package__}.{MOVED[spec.name.rpartition('.')[2]]}")
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Give the module, which has run under its new name, its own spec back."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


def install() -> None:
    """Look old names up after everything else has been tried."""
    sys.meta_path.append(MovedModules())
