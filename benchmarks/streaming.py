"""What layers that come and go cost: streamed from the CPU's memory, and sharded over two processes by FSDP2.

    python benchmarks/streaming.py                  on a GPU with 40 GB, and 128 GB of CPU memory: about ten minutes
    python benchmarks/streaming.py --shape tiny     on a CPU, in half a minute: the numbers are those of a resident run

On a GPU the 8B shape is trained resident, streamed at the same packed size, and in shards over two processes on this
one GPU; the 70B shape is streamed within 24 GB, a cap on the process. Goals: streamed at least 0.85 times as fast as
resident, peaks as planned within 5 % (shards: 10 %). Models have random NF4 weights, rows are those of `speed.py`.
Every case runs in processes of its own; one that fails is recorded with its error. On a CPU losses and adapters must
be equal bit for bit where layers are streamed, losses within 1e-6 where they are sharded. Results are written to
benchmarks/results/streaming_<device>.json, and the exit status is 1 if a goal is missed.
"""

import argparse
import hashlib
import json
import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))  # the checkout's package, where it isn't installed

Case = dict[str, Any]
CAP = 24  # 10^9 bytes that the GPU of the 70B case is given
RATIO, NEAR, NEAR_SHARDED, SAME = 0.85, 0.05, 0.10, 1e-6
TIMEOUT = 900


def cases(shape: str, device: str) -> list[Case]:
    """The cases to run: name, shape, and the options of the trainer."""
    packed = {"max_tokens_per_microbatch": 8192 if device == "cuda" else 400}
    few = {"engine": "ours", "work": "uf" if device == "cuda" else "demo", "shape": shape, "warm": 2, "steps": 4}
    few |= {"samples": 16} if device == "cuda" else {"samples": 2, "dtype": "float32", "warm": 1, "steps": 3}
    sharded = {**packed, "fsdp": "full_shard", "ddp_backend": "gloo"}
    found: list[Case] = [
        {"name": "resident", **few, "options": packed},
        {"name": "streamed", **few, "options": {**packed, "stream_layers": 32 if device == "cuda" else 2}},
        {"name": "sharded", **few, "processes": 2, "options": sharded},
    ]
    if device == "cuda":
        auto = {"max_tokens_per_microbatch": "auto", "stream_layers": "auto", "optim": "adamw_8bit"}
        found.append({**few, "name": "within 24 GB", "shape": "70b", "cap_gb": CAP, "warm": 1, "options": auto})
    return found


def child(case: Case, device: str) -> None:
    """Runs one process of a case, and prints its figures."""
    import speed_peers
    import torch

    build, make = speed_peers.ours, speed_peers.make_model
    trainers = []

    def ours(*args: Any) -> Any:
        trainers.append(build(*args))
        return trainers[-1]

    away = {"stream_layers", "fsdp"} & case["options"].keys()
    # What is not resident is made in the CPU's memory, as it is loaded.
    speed_peers.make_model = lambda shape, device, dtype: make(shape, "cpu" if away else device, dtype)
    speed_peers.ours = ours
    share = case["samples"] // case.get("processes", 1)  # the step is the same
    case["options"] = {**case["options"], "gradient_checkpointing": True, "per_device_train_batch_size": share}
    if device == "cuda" and "cap_gb" in case:
        torch.cuda.set_per_process_memory_fraction(case["cap_gb"] * 1e9 / torch.cuda.mem_get_info()[1])
    found = speed_peers.run_case(case, device)
    trained = sorted((n, p.detach().cpu()) for n, p in trainers[0][0].model.named_parameters() if p.requires_grad)
    found["adapter"] = hashlib.sha256(b"".join(p.numpy().tobytes() for _, p in trained)).hexdigest()
    print("CHILD " + json.dumps(found), flush=True)


def run(case: Case, device: str) -> dict[str, Any]:
    """Returns the figures of a case's first process, or its error."""
    number = case.get("processes", 1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, __file__, "--child", json.dumps(case), "--device", device]
    started = []
    for rank in range(number):
        env = {"RANK": str(rank), "WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number), "MASTER_PORT": port}
        env |= {"LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}  # all on one GPU
        env = {**os.environ, **env} if number > 1 else dict(os.environ)
        started.append(subprocess.Popen(command, env=env, stdout=-1, stderr=-1, text=True))
    try:
        ended = [one.communicate(timeout=TIMEOUT) for one in started]
    except subprocess.TimeoutExpired:
        return {"error": f"took longer than {TIMEOUT} s"}
    finally:
        for one in started:
            one.kill()
    lines = [line[6:] for out, _ in ended for line in out.splitlines() if line.startswith("CHILD ")]
    if len(lines) < number:
        from speed import without_folders

        return {"error": without_folders(next(err for _, err in ended if err).strip())[-600:]}
    figures = [json.loads(line) for line in lines]
    figures[0]["losses"] = [sum(parts) for parts in zip(*(one["losses"] for one in figures), strict=True)]
    if "peak_gib" in figures[0]:
        figures[0]["peak_gib"] = max(one["peak_gib"] for one in figures)
    return figures[0]


def judged(found: dict[str, dict[str, Any]], device: str) -> dict[str, bool]:
    """Returns which goals are met; one whose case failed is not."""
    resident, streamed, sharded = (found[name] for name in ("resident", "streamed", "sharded"))
    if any("error" in one for one in found.values()):
        return {f"{name} runs": "error" not in one for name, one in found.items()}
    if device == "cpu":
        apart = max(abs(a - b) for a, b in zip(resident["losses"], sharded["losses"], strict=True))
        same = (streamed["losses"], streamed["adapter"]) == (resident["losses"], resident["adapter"])
        return {"streamed is equal bit for bit": same, "sharded losses are equal within 1e-6": apart <= SAME}
    goals = {"streamed is at least 0.85 times as fast": streamed["samples_per_s"] >= RATIO * resident["samples_per_s"]}
    for name, one in found.items():
        near = NEAR_SHARDED if name == "sharded" else NEAR
        goals[f"{name}: peak as planned"] = abs(one["peak_gib"] / one["predicted_gib"] - 1) <= near
    return goals


def main() -> None:
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="8b", help="8b; or tiny, for a CPU")
    parser.add_argument("--only", default="", help="the names of cases, with commas between")
    parser.add_argument("--device", choices=["cpu", "cuda"], help=argparse.SUPPRESS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(json.loads(args.child), args.device)
    from speed import rounded, write

    device = "cpu" if args.shape == "tiny" else "cuda"
    chosen = [case for case in cases(args.shape, device) if not args.only or case["name"] in args.only.split(",")]
    found = {}
    for case in chosen:
        found[case["name"]] = run(case, device)
        shown = {k: v for k, v in found[case["name"]].items() if k not in ("plan", "adapter")}
        print(case["name"], json.dumps(rounded(shown)), flush=True)
    goals = {} if args.only else judged(found, device)
    out = HERE / "results" / f"streaming_{device}.json"
    write({"device": device, "cases": chosen, "found": found, "goals": goals}, out)
    print(json.dumps(goals, indent=1))
    sys.exit(not all(goals.values()))


if __name__ == "__main__":
    main()
