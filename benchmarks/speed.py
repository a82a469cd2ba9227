"""How fast our trainer is beside others: pairs per second, peak memory and the share of the bound, in one run.

    python benchmarks/speed.py --cases gpu-short --out benchmarks/results/speed_h100.json
    python benchmarks/speed.py --cases cpu

`--cases` names a set of speed_cases.py or a JSON file with a list of cases. Models have random NF4 weights and are
made on the device; rows are random ids with fixed lengths. The JSON is written after every case and a line
`RESULT {...}` printed; a case that fails is recorded with its error and the others go on. On the CPU, ours and TRL are
measured in turn on one model, and the losses of their steps are compared. `python benchmarks/speed_report.py` turns
the files into docs/performance.md.

Engines that patch transformers for the whole process (Liger layers, Unsloth) run in a process of their own.
"""

import argparse
import gc
import importlib.util
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in recipes/quickstart.py, before torch is imported
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

from speed_cases import SETS, Case

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))  # the checkout's package, where it isn't installed
ISOLATED = {"trl+liger": "liger_kernel", "unsloth": "unsloth"}  # engine to the package that it needs
TIMEOUT = 400  # seconds for a case in a process of its own
PROCESS_START = time.monotonic()


def run_here(case: Case, device: str, profile: bool) -> dict[str, Any]:
    """The figures of a case, or its error."""
    import torch
    from speed_peers import run_case

    try:
        if device == "cuda":
            total = torch.cuda.mem_get_info()[1] / 2**30
            torch.cuda.set_per_process_memory_fraction(min(1.0, case.get("memory_gib", total) / total))
        return run_case(case, device, profile)
    except Exception as error:  # out of memory, or whatever an engine raises: the other cases go on
        return {"error": without_folders(f"{type(error).__name__}: {error}")[:600]}


def without_folders(text: str) -> str:
    """Files by their names alone: results are committed, and say nothing of the machine's folders."""
    return re.sub(r"(?<![\w.])/(?:[\w.+-]+/)+", "", text)


def clean(device: str) -> None:
    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def run_apart(case: Case, device: str, profile: bool) -> dict[str, Any]:
    """The same in a process of its own."""
    if importlib.util.find_spec(ISOLATED[case["engine"]]) is None:
        return {"error": "not importable"}
    command = [sys.executable, str(HERE / "speed.py"), "--child", json.dumps(case), "--device", device]
    try:
        done = subprocess.run([*command, *["--profile"] * profile], capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return {"error": f"took longer than {TIMEOUT} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("CHILD ")]
    ended = f"exit status {done.returncode}: {without_folders(done.stderr.strip())[-600:]}"
    return json.loads(lines[-1][6:]) if lines else {"error": ended}


def child(args: argparse.Namespace) -> None:
    case = json.loads(args.child)
    if case["engine"] == "unsloth":
        os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
        import unsloth

        unsloth.PatchDPOTrainer()
    print("CHILD " + json.dumps(run_here(case, args.device, args.profile)), flush=True)


def measure(case: Case, device: str, profile: bool) -> dict[str, Any]:
    """One case, or for one with several engines, all its turns."""
    if "engines" not in case:
        clean(device)  # of the case before, whose tensors an error may have held until now
        run = run_apart if case["engine"] in ISOLATED else run_here
        return run(case, device, profile and case["engine"] == "ours")
    turns: dict[str, list[dict[str, Any]]] = {engine: [] for engine in case["engines"]}
    shared = {name: value for name, value in case.items() if name not in ("engines", "turns")}
    for _ in range(case.get("turns", 3)):
        for engine, options in case["engines"].items():
            found = measure({**shared, "engine": engine, "options": options}, device, profile=False)
            if "error" in found:
                return {"error": f"{engine}: {found['error']}"}
            turns[engine].append(found)
    return compare(turns)


def compare(turns: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians over the turns, the ratio to the first engine within each turn, and how far losses are apart."""
    first, *others = turns
    medians, ratios, apart = {}, {}, {}
    names = ("seconds_per_step", "cpu_seconds_per_step", "samples_per_s", "tokens_per_s")
    for engine, found in turns.items():
        medians[engine] = {name: statistics.median(turn[name] for turn in found) for name in names}
    for engine in others:
        pairs = list(zip(turns[engine], turns[first], strict=True))
        ratios[engine] = {
            name: sorted(theirs[name] / own[name] for theirs, own in pairs)
            for name in ("seconds_per_step", "cpu_seconds_per_step")
        }
        steps = [zip(theirs["losses"], own["losses"], strict=True) for theirs, own in pairs]
        apart[engine] = max(abs(a - b) for turn in steps for a, b in turn)
    losses = turns[first][0]["losses"]
    moved = {"losses_move_by": max(losses) - min(losses)}  # or equal losses would say little
    bound = {"bound_flops_per_step": turns[first][0]["bound_flops_per_step"]}
    ratios = {
        engine: {n: dict(median=statistics.median(v), all=v) for n, v in r.items()} for engine, r in ratios.items()
    }
    return {"medians": medians, "times_as_fast": ratios, "losses_apart": apart, **moved, **bound, "turns": turns}


def add_bound(found: dict[str, Any], rate: float) -> None:
    """The time that the counted operations would take at the measured rate, as a share of the time taken."""
    if flops := found.get("bound_flops_per_step"):
        for figures in found.get("medians", {"": found}).values():
            figures["share_of_bound"] = flops / rate / figures["seconds_per_step"]


def rounded(value: Any) -> Any:
    """Floats to six significant digits, all through."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def describe(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    from speed_models import matmul_flops

    from dpo_peft.artifacts.card import PACKAGES, framework_versions

    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    if not (commit := args.commit):
        commit = subprocess.run(command, capture_output=True, text=True, cwd=HERE).stdout.strip()
    dtypes = ("bfloat16",) if args.device == "cuda" else ("float32", "bfloat16")
    return {
        "cases": Path(args.cases).stem,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "memory_gib": round(torch.cuda.mem_get_info()[1] / 2**30, 2) if args.device == "cuda" else None,
        "commit": commit,
        "versions": framework_versions([*PACKAGES, "triton", "liger-kernel", "unsloth"]),
        "load_average": round(os.getloadavg()[0], 2),
        "matmul_flops": {dtype: matmul_flops(args.device, getattr(torch, dtype)) for dtype in dtypes},
        "results": [],
    }


def read_cases(args: argparse.Namespace) -> list[Case]:
    cases = SETS[args.cases]() if args.cases in SETS else json.loads(Path(args.cases).read_text("utf-8"))
    given = {name: getattr(args, name) for name in ("warm", "steps", "turns") if getattr(args, name) is not None}
    return [{**case, **given} for case in cases if re.search(args.only, case["name"])]


def write(result: dict[str, Any], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_suffix(".part")
    part.write_text(json.dumps(rounded(result), indent=1) + "\n")
    part.replace(out)


def run_all(args: argparse.Namespace) -> None:
    cases, result = read_cases(args), describe(args)
    for case in cases:
        if time.monotonic() - PROCESS_START > args.budget:
            found: dict[str, Any] = {"error": "not run: out of time"}
        else:
            found = measure(case, args.device, args.profile)
        add_bound(found, result["matmul_flops"].get(case.get("dtype", "bfloat16"), float("inf")))
        if profile := found.get("profile"):
            name = re.sub(r"\W+", "_", case["name"])
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.with_name(f"{args.out.stem}.{name}.profile.txt").write_text(profile.pop("table"))
        result["results"].append({**case, **found})
        result["seconds"] = time.monotonic() - PROCESS_START
        write(result, args.out)
        shown = {name: value for name, value in found.items() if name not in ("turns", "losses", "profile")}
        print("RESULT " + json.dumps(rounded({"name": case["name"], **shown})), flush=True)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="cpu", help=f"{', '.join(SETS)}, or a JSON file")
    parser.add_argument("--only", default="", help="cases whose name this regular expression finds")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/speed_<set>.json")
    parser.add_argument("--budget", type=float, default=float("inf"), help="start no case after so many seconds")
    parser.add_argument("--commit", help="of this checkout, where there is no git")
    parser.add_argument("--profile", action="store_true", help="profile one more step of ours")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    for name in ("warm", "steps", "turns"):
        parser.add_argument(f"--{name}", type=int, help="instead of the cases' own")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out = args.out or HERE / "results" / f"speed_{Path(args.cases).stem}.json"
    return args


def main() -> None:
    warnings.filterwarnings("ignore")
    args = read_arguments()
    if args.child:
        return child(args)
    import torch
    from datasets import disable_progress_bars

    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    disable_progress_bars()
    run_all(args)


if __name__ == "__main__":
    main()
