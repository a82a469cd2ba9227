"""The shape of the source: imports point down only, files and functions stay short, no machine's paths are left in."""

import ast
import os
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
PACKAGE = "dpo_peft"

# The rule, bottom first: a module may import from the lines above its own, and on its own line from names left of it.
# `dpo_peft/__init__.py` is "__init__". A new module needs its place here.
LAYERS = [
    ["errors", "losses"],
    ["forward"],
    ["data"],
    ["files"],
    ["shapes", "memory", "planner", "plan_report"],
    ["frozen", "reference", "identity", "store", "cache", "checkpoints", "parallel", "microbatch", "modeling"],
    ["sampling", "trained", "merge_weights"],
    [
        "objective_options",
        "evaluation_options",
        "objective",
        "metrics",
        "diagnostics",
        "sample_log",
        "watch",
        "plots",
        "citations",
        "card_rules",
        "card",
        "recipe",
        "results",
        "serving",
        "hub",
        "publish_files",
        "publish",
    ],
    [
        "budget",
        "option_names",
        "config",
        "arguments",
        "cached_reference",
        "resumable",
        "stepping",
        "referenced",
        "saving",
        "evaluation",
    ],
    [
        "agreement",
        "reward",
        "scored",
        "prompts",
        "engines",
        "judges",
        "worklog",
        "rso",
        "pairs",
        "pair_run",
        "drift",
        "merge",
        "report_run",
        "report_svg",
        "report_charts",
        "report_facts",
        "report_samples",
        "report_pages",
        "report",
    ],
    ["trainer"],
    ["quickstart"],
    [
        "cli_options",
        "cli_plan",
        "cli_cache",
        "cli_score",
        "cli_pairs",
        "cli_merge",
        "cli_push",
        "cli_report",
        "cli",
        "__init__",
    ],
]
# The same inside a package: a module may import the modules left of it; its `__init__` may import all of them.
ORDER_WITHIN = {
    "losses": (
        "objective scores pairwise anchored distributional reference_free listwise unpaired "
        "registry_reference registry_others"
    ).split(),
    "forward": (
        "layout unpack triton_kernels kernels triton_attention shared_attention attention projection fused recognize "
        "logprobs score probe"
    ).split(),
    "data": (
        "report values fingerprint tokenize truncate schema parse chat turns answers sample convert worker prepare "
        "batch"
    ).split(),
    "quickstart": "lexicon topics reward text fluency sampling forms judging".split(),
}
# Narrower than the layers: these may import nothing of the package but what stands here.
ONLY = {"losses": {"errors", "losses"}}
# Who may read the config: everyone else takes plain arguments.
CONFIG_READERS = {"arguments", "referenced", "trainer", "cli_plan", "cli", "quickstart", "__init__"}

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60  # without its docstring


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (REPO / folder).rglob("*.py"))


def module_parts(path: Path) -> tuple[str, ...]:
    """`dpo_peft/data/chat.py` -> ("data", "chat"); `dpo_peft/data/__init__.py` -> ("data", "__init__")."""
    return path.relative_to(REPO / PACKAGE).with_suffix("").parts


def imported_modules(code: str, parts: tuple[str, ...]) -> list[tuple[int, tuple[str, ...]]]:
    """(line, parts of the imported name below the package) of every import of the package, wherever it stands."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # A relative import starts `level` names up from the module's own full name.
            base = [PACKAGE, *parts][: -node.level] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            names = [base + [alias.name] for alias in node.names]
        else:
            continue
        found += [(node.lineno, tuple(name[1:])) for name in names if name[0] == PACKAGE]
    return found


def position(unit: str) -> tuple[int, int]:
    for layer, units in enumerate(LAYERS):
        if unit in units:
            return layer, units.index(unit)
    raise AssertionError(f"{PACKAGE}/{unit} has no place in LAYERS of tests/test_structure.py")


def violations(code: str, parts: tuple[str, ...]) -> list[str]:
    """What a module with this code imports against the rules."""
    unit, where, bad = parts[0], ".".join(parts), []
    for line, target in imported_modules(code, parts):
        # `from dpo_peft import X` takes X from the package's `__init__`, unless X is itself a module.
        top = target[0] if target and any(target[0] in units for units in LAYERS) else "__init__"
        name = f"{where}:{line} imports {top}"
        if top == unit and len(parts) > 1:
            bad += within_package(parts, target, name)
        elif position(top) >= position(unit):
            bad.append(f"{name}, which is not below it")
        elif unit in ONLY and top not in ONLY[unit]:
            bad.append(f"{name}; {unit} may import {sorted(ONLY[unit])} only")
        elif top == "config" and unit not in CONFIG_READERS:
            bad.append(f"{name}; only {sorted(CONFIG_READERS)} read the config")
    return bad


def within_package(parts: tuple[str, ...], target: tuple[str, ...], name: str) -> list[str]:
    order = ORDER_WITHIN[parts[0]]
    if parts[1] == "__init__":
        return []
    if len(target) < 2 or target[1] not in order:
        return [f"{name}.__init__ from inside it, or a module that has no place in ORDER_WITHIN"]
    if parts[1] not in order:
        return [f"{'.'.join(parts)} has no place in ORDER_WITHIN of tests/test_structure.py"]
    return [] if order.index(target[1]) < order.index(parts[1]) else [f"{name}.{target[1]}, which is not left of it"]


def test_imports_point_down() -> None:
    bad = [v for path in sources(PACKAGE) for v in violations(path.read_text("utf-8"), module_parts(path))]
    assert not bad, "\n".join(bad)


def test_every_module_has_a_place() -> None:
    for path in sources(PACKAGE):
        parts = module_parts(path)
        position(parts[0])
        if len(parts) > 1 and parts[1] != "__init__":
            assert parts[1] in ORDER_WITHIN[parts[0]], f"{'/'.join(parts)} has no place in ORDER_WITHIN"


@pytest.mark.parametrize(
    ("parts", "code"),
    [
        (("losses", "pairwise"), "from dpo_peft.config import DPOConfig"),
        (("losses", "pairwise"), "from ..forward.score import score"),
        (("forward", "score"), "def f():\n    import dpo_peft.data.batch"),  # late imports count
        (("forward", "score"), "if TYPE_CHECKING:\n    from ..data import PackedBatch"),  # for typing as well
        (("forward", "layout"), "from .score import score"),  # a sibling that comes later
        (("forward", "score"), "from . import attention, unheard_of"),
        (("data", "schema"), "from dpo_peft.data import Example"),  # the package from inside it
        (("metrics",), "from .config import DPOConfig"),
        (("metrics",), "from dpo_peft import DPOTrainer"),
        (("errors",), "from .losses import pairwise"),
        (("config",), "from dpo_peft.trainer import DPOTrainer"),
        (("trainer",), "from . import cli"),
    ],
)
def test_upward_import_is_caught(parts: tuple[str, ...], code: str) -> None:
    assert len(violations(code, parts)) == 1


@pytest.mark.parametrize(
    ("parts", "code"),
    [
        (("losses", "pairwise"), "from ..errors import OptionError\nimport torch"),
        (("forward", "score"), "from .attention import attend\nfrom dpo_peft.forward.layout import Layout"),
        (("data", "__init__"), "from .schema import Example"),
        (("reference",), "from .errors import OptionError\nfrom .forward.score import score"),
        (("trainer",), "from .config import DPOConfig\nfrom . import metrics"),
        (("__init__",), "from .trainer import DPOTrainer"),
        (("cli",), "import dpo_peft_other"),
    ],
)
def test_downward_import_is_allowed(parts: tuple[str, ...], code: str) -> None:
    assert violations(code, parts) == []


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
