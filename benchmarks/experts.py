"""One layer's experts, forward and backward: in 4 bits by groups of rows, against the model's own in 16 bits.

    python benchmarks/experts.py [--shape small|30b-a3b|gpt-oss-20b] [--tokens N] [--turns 3] [--out FILE]

Each engine builds the same random layer in a process of its own, in turn, so many times; the best turn counts. Own:
the family's eager code, its weights in bfloat16. Interface: transformers' grouped_mm on them. Ours: NF4. Each also
with an adapter of rank 16 on its experts, PEFT's (which adds it to all weights) beside the first two. `tokens_per_s`
is of forward and backward together; `peak_gib` what the process, or on a GPU its allocator, has at its peak beyond
what it had before the layer was built. Prints the table, and writes
it to benchmarks/results/experts_cpu.json on a CPU.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import bitsandbytes  # noqa: F401  # its own memory is not the layer's
import psutil
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import CONFIG_MAPPING
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from dpo_peft.artifacts.card import framework_versions  # noqa: E402
from dpo_peft.forward.experts import convert  # noqa: E402
from dpo_peft.model.experts import group_adapters, pack  # noqa: E402

# Kind of layer, its config, experts of a token, tokens of a pass.
SHAPES: dict[str, tuple[Any, str, dict[str, int], int, int]] = {
    "small": (
        Qwen3MoeExperts,
        "qwen3_moe",
        dict(hidden_size=512, moe_intermediate_size=256, num_experts=32, num_experts_per_tok=4),
        4,
        1024,
    ),
    "30b-a3b": (
        Qwen3MoeExperts,
        "qwen3_moe",
        dict(hidden_size=2048, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8),
        8,
        8192,
    ),
    "gpt-oss-20b": (
        GptOssExperts,
        "gpt_oss",
        dict(hidden_size=2880, intermediate_size=2880, num_local_experts=32, num_experts_per_tok=4),
        4,
        8192,
    ),
}
ENGINES = ("own", "interface", "ours", "own+lora", "interface+lora", "ours+lora")


def layer(engine: str, shape: str, device: torch.device) -> nn.Module:
    """Returns the experts of one layer as the engine holds them."""
    kind, model, sizes, _, _ = SHAPES[shape]
    config = CONFIG_MAPPING[model](**sizes)
    config._experts_implementation = "grouped_mm" if engine.startswith("interface") else "eager"
    torch.manual_seed(0)
    with torch.device("meta"):
        experts = kind(config).to(torch.bfloat16)
    for name, weight in experts.named_parameters():
        made: Any = nn.Parameter(0.02 * torch.randn(weight.shape, dtype=torch.bfloat16), requires_grad=False)
        if engine.startswith("ours") and weight.ndim == 3:
            made = pack(made, device, "nf4", True, torch.uint8)
        experts._parameters[name] = made.to(device)
        del made
    if engine.startswith("ours"):
        convert(experts, ("gate_up_proj", "down_proj"))
    holder = nn.ModuleDict({"experts": experts})
    if engine.endswith("+lora"):
        targets = ["experts.gate_up_proj", "experts.down_proj"]
        holder = get_peft_model(
            holder, LoraConfig(r=16, target_modules=[], target_parameters=targets)
        ).base_model.model
        if engine.startswith("ours"):
            group_adapters(holder)
    return holder["experts"]


def measure(engine: str, shape: str, tokens: int, device: torch.device) -> dict[str, float]:
    """Builds the layer, and times forward and backward with a gradient of the input."""
    kind_sizes, chosen = SHAPES[shape][2], SHAPES[shape][3]
    count = kind_sizes.get("num_experts", kind_sizes.get("num_local_experts", 0))
    process, gpu = psutil.Process(), device.type == "cuda"
    before = process.memory_info().rss
    experts = layer(engine, shape, device)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, kind_sizes["hidden_size"], generator=generator).to(device, torch.bfloat16)
    ids = torch.rand(tokens, count, generator=generator).topk(chosen).indices.to(device)
    weights = torch.rand(tokens, chosen, generator=generator).to(device, torch.bfloat16)
    x.requires_grad_()
    if gpu:
        torch.cuda.reset_peak_memory_stats()

    def once() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            experts(x, ids, weights).float().sum().backward()
        if gpu:
            torch.cuda.synchronize()

    once()
    repeats, start = 0, time.perf_counter()
    while repeats < 3 or time.perf_counter() - start < 2:
        once()
        repeats += 1
    seconds = (time.perf_counter() - start) / repeats
    peak = torch.cuda.max_memory_allocated() if gpu else _peak() - before
    return {"tokens_per_s": tokens / seconds, "peak_gib": peak / 2**30}


def _peak() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="30b-a3b" if device.type == "cuda" else "small")
    parser.add_argument("--tokens", type=int, help="of a pass; default: the shape's own")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path, help="on a CPU, default: benchmarks/results/experts_cpu.json")
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)  # of a process of its own
    args = parser.parse_args()
    tokens = args.tokens or SHAPES[args.shape][4]
    if args.engine:
        print(json.dumps(measure(args.engine, args.shape, tokens, device)))
        return
    found: dict[str, dict[str, float]] = {}
    for _ in range(args.turns):
        for engine in ENGINES:
            command = [sys.executable, __file__, "--engine", engine, "--shape", args.shape, "--tokens", str(tokens)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            one = json.loads(done.stdout.splitlines()[-1])
            if one["tokens_per_s"] > found.get(engine, one | {"tokens_per_s": 0.0})["tokens_per_s"]:
                found[engine] = one
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    for engine, one in found.items():
        own = found["own+lora" if engine.endswith("+lora") else "own"]
        one["speed_of_own"] = one["tokens_per_s"] / own["tokens_per_s"]
        one["memory_of_own"] = one["peak_gib"] / own["peak_gib"]
        print(f"{engine:16s} " + "  ".join(f"{key} {value:.3g}" for key, value in one.items()))
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = subprocess.run(command, capture_output=True, text=True, cwd=HERE).stdout.strip()
    facts = {"device": name, "threads": torch.get_num_threads(), "shape": args.shape, "tokens": tokens}
    facts |= {"commit": commit, "versions": framework_versions(), "results": found}
    if device.type == "cpu" or args.out:
        out = args.out or HERE / "results" / "experts_cpu.json"
        out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    beside = {f"{engine}, {key}": found[engine][key] for engine in ("ours", "ours+lora") for key in found[engine]}
    print("RESULT " + json.dumps({"shape": args.shape, "tokens": tokens, "found": found, **beside}))


if __name__ == "__main__":
    main()
