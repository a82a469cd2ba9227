"""The shape of the source: folders keep their direction and budget, files and functions stay short, no machine's paths
are left in."""

import ast
import os
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest
from paths import REPO

from dpo_peft.moved import MOVED

PACKAGE = "dpo_peft"
ROOT = REPO / PACKAGE

# The core, bottom first: a folder or a module beside the folders imports what stands left of it.
CORE = (
    "version errors spelling credentials imports moved wings disk manifests losses forward data rowfiles files "
    "distributed objective config_checks config reference model training trainer"
).split()
# The wings, bottom first. A wing may import the core and the wings left of it; the core imports no wing.
WINGS = (
    "evaluation fused planning artifacts reward merge serving hub pairs chat suites conversion report sweep preview "
    "quickstart cli __main__"
).split()
ORDER = [*CORE, *WINGS]
# Narrower than the order: these import nothing of the package but what stands here.
ONLY = {"losses": {"errors", "imports"}, "forward": {"errors", "wings"}}

# Lines of a folder, docstrings and blanks included. These are ceilings on the way to those of the design, which
# dev/LOG.md lists; a feature that needs a higher one has to say why there.
BUDGETS = {
    "trainer": 400,
    "config": 350,
    "config_checks": 395,
    "objective": 485,
    "distributed": 375,
    "losses": 1100,
    "data": 4860,
    "forward": 3045,
    "reference": 1545,
    "model": 3645,
    "training": 3100,
    "evaluation": 1325,
    "fused": 3010,
    "planning": 2240,
    "artifacts": 1345,
    "reward": 880,
    "merge": 835,
    "serving": 840,
    "hub": 945,
    "pairs": 1230,
    "report": 1460,
    "quickstart": 480,
    "chat": 445,
    "suites": 890,
    "conversion": 450,
    "preview": 1300,
    "cli": 4495,
    "sweep": 215,
    "rowfiles": 345,
    "disk": 180,
    "manifests": 230,
}
MAX_PACKAGE_LINES = 42_960
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60  # without its docstring


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (REPO / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    """`dpo_peft/data/chat.py` -> "data.chat"; `dpo_peft/data/__init__.py` -> "data"."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


MODULES = {name_of(path): path for path in sources(PACKAGE)}


def imported_modules(code: str, name: str, is_package: bool = False) -> set[str]:
    """The modules of the package that a module's code imports, wherever the import stands."""
    found = set()
    here = [PACKAGE, *name.split(".")] if name else [PACKAGE]
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            up = node.level - is_package  # a package's own name is what `.` stands for in it
            base = [] if not node.level else here[: len(here) - up]
            base = base + (node.module.split(".") if node.module else [])
            # `from .data import chat` takes a module, `from .data import Example` a name of the package itself.
            full = [".".join([*base, alias.name]) for alias in node.names]
            targets = [one if one.removeprefix(f"{PACKAGE}.") in MODULES else ".".join(base) for one in full]
        else:
            continue
        found |= {t.removeprefix(PACKAGE).removeprefix(".") for t in targets if t.split(".")[0] == PACKAGE}
    return found


def unit_of(name: str) -> str:
    """The folder of a module, or the module itself if it stands beside the folders."""
    return name.split(".")[0]


def violations(code: str, name: str, is_package: bool = False) -> list[str]:
    """What a module with this code imports against the rules."""
    unit, bad = unit_of(name), []
    for target in sorted(imported_modules(code, name, is_package)):
        top = unit_of(target)
        if top == unit:
            continue
        if not top or ORDER.index(top) >= ORDER.index(unit):
            bad.append(f"{name} imports {target or PACKAGE}, which is not below it")
        elif unit in ONLY and top not in ONLY[unit]:
            bad.append(f"{name} imports {target}; {unit} may import {sorted(ONLY[unit])} only")
    return bad


def test_imports_point_down() -> None:
    bad = []
    for name, path in MODULES.items():
        if name:  # the package itself loads names on first use
            bad += violations(path.read_text("utf-8"), name, path.name == "__init__.py")
    assert not bad, "\n".join(bad)


def test_no_import_runs_in_a_circle() -> None:
    """Inside a folder modules may stand in any order, but none imports itself by way of others."""
    edges = {
        name: imported_modules(path.read_text("utf-8"), name, path.name == "__init__.py") - {name}
        for name, path in MODULES.items()
        if path.name != "__init__.py"
    }
    graph = {name: {target for target in targets if target in edges} for name, targets in edges.items()}
    assert list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("losses.pairwise", "from dpo_peft.config import DPOConfig"),
        ("losses.pairwise", "from ..forward.score import score"),
        ("forward.score", "def f():\n    import dpo_peft.data.collator"),  # late imports count
        ("forward.score", "if TYPE_CHECKING:\n    from ..data import PackedBatch"),  # for typing as well
        ("data.formats", "from dpo_peft.trainer import DPOTrainer"),
        ("training.metrics", "from dpo_peft import DPOTrainer"),
        ("training.metrics", "from ..artifacts import card"),  # a wing
        ("errors", "from .losses import pairwise"),
        ("config", "from dpo_peft.trainer import DPOTrainer"),
        ("trainer", "from . import cli"),
        ("planning.memory", "from ..hub.client import Hub"),  # a wing that stands right of it
    ],
)
def test_upward_import_is_caught(name: str, code: str) -> None:
    assert len(violations(code, name)) == 1


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("losses.pairwise", "from ..errors import OptionError\nimport torch"),
        ("forward.score", "from .attention import attend\nfrom dpo_peft.forward.layout import Layout"),
        ("reference.adapter_off", "from ..errors import OptionError\nfrom ..forward.score import score"),
        ("trainer", "from .config import DPOConfig\nfrom .training import metrics"),
        ("cli.train", "import dpo_peft_other"),
        ("hub.client", "from ..artifacts import card\nfrom ..data import Example"),
    ],
)
def test_downward_import_is_allowed(name: str, code: str) -> None:
    assert violations(code, name) == []


def lines_of(unit: str) -> int:
    return sum(len(path.read_text("utf-8").splitlines()) for name, path in MODULES.items() if unit_of(name) == unit)


def test_folders_keep_their_budgets() -> None:
    lines = {unit: lines_of(unit) for unit in ORDER}
    assert set(ORDER) >= {unit_of(name) for name in MODULES if name}, "a folder has no place in ORDER"
    over = {unit: (lines[unit], budget) for unit, budget in BUDGETS.items() if lines[unit] > budget}
    assert not over, f"lines and budget: {over}"
    assert sum(lines.values()) <= MAX_PACKAGE_LINES


def function_lengths(code: str) -> list[tuple[str, int]]:
    """(name, lines) of every function, its docstring not counted."""
    lengths = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            documented = ast.get_docstring(node) is not None
            docstring = (first.end_lineno or 0) - first.lineno + 1 if documented else 0
            lengths.append((node.name, (node.end_lineno or 0) - node.lineno + 1 - docstring))
    return lengths


def test_files_and_functions_are_short() -> None:
    bad = []
    for path in sources(PACKAGE, "recipes"):
        code, name = path.read_text("utf-8"), path.relative_to(REPO)
        if (lines := len(code.splitlines())) > MAX_FILE_LINES:
            bad.append(f"{name}: {lines} lines, at most {MAX_FILE_LINES}")
        bad += [
            f"{name}: {function}() has {lines} lines, at most {MAX_FUNCTION_LINES}"
            for function, lines in function_lengths(code)
            if lines > MAX_FUNCTION_LINES
        ]
    assert not bad, "\n".join(bad)


def test_function_length_leaves_out_the_docstring() -> None:
    code = 'def f():\n    """One\n\n    two."""\n    a = 1\n    return a\n'
    assert function_lengths(code) == [("f", 3)]


def repository_files() -> list[Path]:
    """Every file of the source tree but caches, environments and outputs."""
    skipped = {"outputs", "build", "dist", "__pycache__"}
    found = []
    for folder, folders, names in os.walk(REPO):
        folders[:] = [f for f in folders if f not in skipped and (not f.startswith(".") or f == ".ci")]
        found += [Path(folder) / name for name in names]
    return found


def test_no_path_of_a_machine() -> None:
    forbidden = ["/" + "work/", "/" + "root/", "/" + "home/"]  # put together here: this file is searched too
    bad = []
    for path in repository_files():
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue  # weights and pictures
        bad += [f"{path.relative_to(REPO)} holds {word}" for word in forbidden if word in text]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("name", sorted(MOVED))
def test_a_moved_module_is_found_under_its_old_name(name: str) -> None:
    assert import_module(f"{PACKAGE}.{name}") is import_module(f"{PACKAGE}.{MOVED[name]}")
