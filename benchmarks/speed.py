"""How fast our trainer is beside others: one case's pairs per second, peak memory, losses, in this process.

    python benchmarks/speed.py "8b uf ours free"                    a case of speed_cases.py by its name
    python benchmarks/speed.py '{"engine": "ours", "work": "demo", "shape": "tiny"}' --device cpu

gpu_queue.py runs the sets of speed_cases.py so, one process each, and keeps the figures. Models have random NF4
weights and are made on the device; rows are random ids with fixed lengths. Prints a line `RESULT {...}`, with the
error of a case that fails. A case with several engines measures them in turn and compares the losses of their steps.
"""

import argparse
import gc
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in recipes/quickstart.py, before torch is imported
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

from gpu_queue import end_with_parent, rounded, without_folders
from speed_cases import SETS, Case

PACKAGES = "torch transformers peft trl bitsandbytes datasets accelerate triton liger-kernel unsloth".split()
DTYPES = {"cuda": ["bfloat16"], "cpu": ["float32", "bfloat16"]}
HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))  # the checkout's package, where it isn't installed


def clean(device: str) -> None:
    """Frees what the run before held."""
    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def measure(case: Case, device: str) -> dict[str, Any]:
    """Returns the figures of a case, or for one with several engines the comparison of all its turns."""
    if "processes" in case:
        return in_processes(case, device)
    if "engines" not in case:
        import torch
        from speed_peers import run_case

        clean(device)
        if device == "cuda" and "memory_gib" in case:
            total = torch.cuda.mem_get_info()[1] / 2**30
            torch.cuda.set_per_process_memory_fraction(min(1.0, case["memory_gib"] / total))
        return run_case(case, device)
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in case["engines"]}
    shared = {name: value for name, value in case.items() if name not in ("engines", "turns")}
    for _ in range(case.get("turns", 3)):
        for name, given in case["engines"].items():
            options = {option: value for option, value in given.items() if option != "engine"}
            found = measure({**shared, "engine": given.get("engine", name), "options": options}, device)
            turns[name].append(found)
    return compare(turns)


def in_processes(case: Case, device: str) -> dict[str, Any]:
    """Returns the figures of the first of several processes on this one device, with the losses of all."""
    number = case["processes"]
    one = json.dumps({name: value for name, value in case.items() if name != "processes"})
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    started = []
    for rank in range(number):
        env = {"RANK": str(rank), "WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number), "MASTER_PORT": port}
        env |= {"LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}  # all on one device
        command = [sys.executable, str(HERE / "speed.py"), one, "--device", device]
        given: dict[str, Any] = dict(env={**os.environ, **env}, stdout=subprocess.PIPE, text=True)
        started.append(subprocess.Popen(command, **given, preexec_fn=end_with_parent))
    printed = [process.communicate()[0] for process in started]
    figures = [json.loads(line[7:]) for out in printed for line in out.splitlines() if line.startswith("RESULT ")]
    if errors := [one["error"] for one in figures if "error" in one] or ["a process ended"] * (len(figures) < number):
        raise RuntimeError(errors[0])
    figures[0]["losses"] = [sum(parts) for parts in zip(*(one["losses"] for one in figures), strict=True)]
    figures[0]["loss"] = figures[0]["losses"][-1]
    if "peak_gib" in figures[0]:
        figures[0]["peak_gib"] = max(one["peak_gib"] for one in figures)
    return figures[0]


def compare(turns: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Returns medians over the turns, the ratio to the first engine within each turn, and how far losses are apart,
    and margins where they were logged at each step."""
    first, *others = turns
    medians, ratios = {}, {}
    apart: dict[str, dict[str, float]] = {"losses": {}, "margins": {}}
    names = ("seconds_per_step", "cpu_seconds_per_step", "samples_per_s", "tokens_per_s")
    for engine, found in turns.items():
        medians[engine] = {name: statistics.median(turn[name] for turn in found) for name in names}
    for engine in others:
        pairs = list(zip(turns[engine], turns[first], strict=True))
        ratios[engine] = {
            name: sorted(theirs[name] / own[name] for theirs, own in pairs)
            for name in ("seconds_per_step", "cpu_seconds_per_step")
        }
        for what in apart:
            steps = [zip(theirs.get(what, []), own.get(what, []), strict=True) for theirs, own in pairs]
            if found_apart := [abs(a - b) for turn in steps for a, b in turn]:
                apart[what][engine] = max(found_apart)
    moved = {
        f"{what}_move_by": max(values) - min(values)  # or equal values would say little
        for what in apart
        if (values := turns[first][0].get(what))
    }
    bound = {"bound_flops_per_step": turns[first][0]["bound_flops_per_step"]}
    ratios = {
        engine: {n: dict(median=statistics.median(v), all=v) for n, v in r.items()} for engine, r in ratios.items()
    }
    differences = {f"{what}_apart": values for what, values in apart.items() if values}
    return {"medians": medians, "times_as_fast": ratios, **differences, **moved, **bound, "turns": turns}


def matmul_flops(device: str, dtype: str) -> float:
    """Returns the median rate of large square matrix products, in floating-point operations per second."""
    import torch

    size = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    wait, seconds = torch.cuda.synchronize if device == "cuda" else lambda: None, []
    for _ in range(9):
        wait()
        start = time.perf_counter()
        for _ in range(4):
            torch.mm(a, b)
        wait()
        seconds.append((time.perf_counter() - start) / 4)
    return 2 * size**3 / statistics.median(seconds)


def commit_here() -> str:
    """Returns the checkout's commit, marked where code that is measured differs from it; "" without git."""

    def git(*command: str) -> str:
        return subprocess.run(["git", *command], capture_output=True, text=True, cwd=HERE.parent).stdout.strip()

    if shutil.which("git") is None or not (commit := git("rev-parse", "HEAD")):
        return ""
    return commit + "-dirty" * bool(git("status", "--porcelain", "dpo_peft", "benchmarks/*.py"))


def describe(device: str, commit: str | None = None) -> dict[str, Any]:
    """Returns where and on what a figure was measured, and the rate of large matrix products there.

    It imports no more than torch, since the queue waits for it.
    """
    import torch

    installed = {dist.name.lower(): dist.version for dist in metadata.distributions()}
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "total_gib": round(torch.cuda.mem_get_info()[1] / 2**30, 2) if device == "cuda" else None,
        "commit": commit or commit_here(),
        "versions": ", ".join(f"{name} {installed[name]}" for name in PACKAGES if name in installed),
        "load_average": round(os.getloadavg()[0], 2),
        "matmul_flops": {dtype: matmul_flops(device, dtype) for dtype in DTYPES[device]},
    }


def find_case(text: str) -> Case:
    """Returns the case of that name, or that JSON."""
    if text.startswith("{"):
        return json.loads(text)
    return {case["name"]: case for make in SETS.values() for case in make()}[text]


def main() -> None:
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", nargs="?", help="a name in speed_cases.py, or a case as JSON")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--describe", action="store_true", help="print where a figure would be measured instead")
    parser.add_argument("--commit", help="of this checkout, where there is no git")
    args = parser.parse_args()
    case = find_case(args.case) if args.case else {}
    if case.get("engine") == "unsloth":  # before anything that it patches
        os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
        import unsloth

        unsloth.PatchDPOTrainer()
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit(f"No GPU here: torch {torch.__version__} finds none. `--device cpu` runs tiny models instead.")
    if args.describe:
        return print(json.dumps(describe(args.device, args.commit)))
    from datasets import disable_progress_bars

    disable_progress_bars()
    try:
        found = measure(case, args.device)
    except Exception as error:  # out of memory, or whatever an engine raises
        traceback.print_exc()  # for the log
        found = {"error": without_folders(f"{type(error).__name__}: {error}")[:600]}
    print("RESULT " + json.dumps(rounded(found)), flush=True)


if __name__ == "__main__":
    main()
