"""`dpo-peft sweep FILE.yaml`: trains several settings of the options on one base, and chooses one."""

import itertools
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import DataError, OptionError
from ..files import as_list
from .options import aligned, option, parse_options, show, split_config

EXAMPLES = (
    "dpo-peft sweep grid.yaml",
    "dpo-peft sweep grid.yaml --output_dir sweeps/beta --rungs 0.1 0.3 1 --keep 0.34 --max_kl 20",
    "dpo-peft sweep grid.yaml --dry_run",
)
# They act on the base itself, which all settings share, or say where a run is.
_FIXED = ("output_dir", "disable_dropout", "resume_from_checkpoint", "overwrite_output_dir", "run_name")
_DEFAULTS: dict[str, Any] = {"eval_strategy": "steps", "save_strategy": "no", "save_total_limit": 1}


@dataclass
class SweepArguments:
    """What is tried, and how it is chosen."""

    grid: str = option("", "YAML file of train's options, with grid (option: [values]) or settings (a list).")
    output_dir: str | None = option(None, "Folder of all runs. Default: output_dir of the file.")
    rungs: list[float] | None = option(None, "Shares of the steps at which runs are judged. Default 0.25 0.5 1.")
    keep: float = option(0.34, "Share of the runs that goes on from each.")
    max_kl: float | None = option(None, "Choose none whose KL on held-out rows is above, nats a completion.")
    dry_run: bool = option(False, "Check every setting without weights, say what would be trained, and stop.")
    json: bool = option(False, "Print the result as one JSON object on stdout, everything else on stderr.")


def sweep(argv: Sequence[str]) -> None:
    """Train several settings on one base: rows are tokenized and the reference is computed once, and most steps go to
    settings that do well early. The best on held-out rows is chosen. The same command goes on after a stop."""
    options = parse_options(argv, SweepArguments, "sweep", sweep.__doc__, EXAMPLES, "grid")
    base, settings = read_grid(options.grid)
    folder = Path(options.output_dir or base.get("output_dir") or "outputs/sweep")
    from ..sweep import RUNGS, check_sweep, run_sweep

    rungs = options.rungs or RUNGS
    check_sweep(settings, rungs, options.keep, options.max_kl)
    with redirect_stdout(sys.stderr):
        inputs = {}
        for name, setting in settings.items():
            with _named(name):
                inputs[name] = _checked(base | setting, folder / name, min(rungs[0], 0.5))
    if options.dry_run:
        show({"settings": settings}, "\n".join([f"{len(settings)} settings, all sound:", *settings]), options.json)
        return
    from .train import build_trainer

    with redirect_stdout(sys.stderr):
        how = rungs, options.keep, options.max_kl
        found = run_sweep(lambda name: build_trainer(*inputs[name]()), settings, folder, *how)
    show(found, as_text(found), options.json)


def read_grid(file: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Returns the options that all settings share, and the settings by name; an OptionError for a wrong file."""
    _, base = split_config(["--config", file])
    if "config" in base:
        base = split_config(["--config", str(base.pop("config"))])[1] | base
    grid, listed = base.pop("grid", None), base.pop("settings", None)
    if not isinstance(grid or {}, Mapping) or not all(isinstance(v, list) and v for v in (grid or {}).values()):
        raise OptionError(f"{file}: grid must hold an option and a list of its values a line, as beta: [0.05, 0.1].")
    if not isinstance(listed or [], list) or not all(isinstance(one, Mapping) for one in listed or []):
        raise OptionError(f"{file}: settings must be a list of options, as - {{loss_type: ipo, beta: 0.2}}.")
    crossed = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())] if grid else [{}]
    found = [{**dict(one), **of_grid} for one in listed or [{}] for of_grid in crossed]
    if both := set(grid or {}) & {name for one in listed or [] for name in one}:
        raise OptionError(
            f"{file}: {', '.join(sorted(both))} stands in grid and in settings. Leave it to one of them."
        )
    if fixed := sorted({name for one in found for name in one} & {*_FIXED}):
        raise OptionError(f"{file}: {', '.join(fixed)} can't differ between the settings of a sweep. Take it out.")
    settings = {_name(one): one for one in found}
    if len(settings) < 2 or len(settings) < len(found):
        why = "fewer than two settings" if len(found) < 2 else "a setting twice"
        raise OptionError(f"{file} holds {why}: give grid, as beta: [0.05, 0.1], or settings.")
    return base, settings


def _name(setting: Mapping[str, Any]) -> str:
    """Returns a setting in words that may name a folder."""
    lists = {option: value if isinstance(value, list) else [value] for option, value in setting.items()}
    parts = (f"{option}-{'+'.join(map(str, values))}" for option, values in lists.items())
    return "_".join(parts).replace("/", ".").replace(" ", "") or "as-given"


@contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except (OptionError, DataError) as error:
        raise type(error)(f"Setting {name}: {error}") from error


def _checked(options: dict[str, Any], folder: Path, first: float) -> Callable[[], Any]:
    """Checks a setting without its weights. Returns a function that makes the arguments of `build_trainer` anew."""
    from ..losses.registry import find_objective
    from .dry_run import dry_run
    from .train import inputs_of, parse

    def made() -> Any:
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            yaml.safe_dump(options, file)
            file.flush()
            return parse(["--config", file.name])

    held_out = {} if "eval_strategy" in options else {"eval_steps": first}
    options = {**_DEFAULTS, **held_out, **options, "output_dir": str(folder)}
    compared = any(find_objective(name).needs_reference for name in as_list(options.get("loss_type", "sigmoid")))
    if compared and not {"precompute_ref_log_probs", "cache_ref_log_probs", "sync_ref_model"} & {*options}:
        streamed = options.get("dataset_streaming") or options.get("streaming")
        how = "cache_ref_log_probs" if streamed else "precompute_ref_log_probs"
        options |= {how: True, "ref_cache_tokens": True}  # tokens: the KL needs them
    data, args, model = made()
    if args.eval_strategy == "no" or args.save_only_model or args.world_size > 1:
        raise OptionError(
            "a sweep judges runs on held-out rows, stops and resumes them, in one process: leave eval_strategy no, "
            "save_only_model and several processes out."
        )
    dry_run(args, model, inputs_of(data, args, model), 1)
    return made


def as_text(found: Mapping[str, Any]) -> str:
    """Returns a table of the settings, the best first, and the choice."""
    rows = [("", "steps", "accuracy", "balanced", "margin", "KL")]
    for name in found["order"]:
        last = found["results"][name][-1]
        figures = (last[one] for one in ("accuracy", "balanced", "margin", "kl"))
        rows.append((name, f"{last['steps']}", *("" if value is None else f"{value:.3f}" for value in figures)))
    lines = aligned(rows)
    lines += [f"{name} failed: {why}" for name, why in found["failed"].items()]
    steps = found["steps"]
    share = f"{steps['trained']:,} steps, {steps['trained'] / max(steps['full'], 1):.0%} of those of the full grid"
    lines += ["", f"Choice: {found['reason']}. Trained: {share}."]
    return "\n".join(lines + ([f"Page: {found['page']}"] if "page" in found else []))
