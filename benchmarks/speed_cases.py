"""The cases that gpu_queue.py runs and speed.py knows by name. A case is a dict, so that a JSON file can hold others.

name        unique: what has another meaning than before gets another name
seconds     that its process takes, until it is known; `limit` kills it, if not twice that and half a minute
command     arguments of Python instead of all that follows, for a program that prints `RESULT {...}` itself
engine      ours, trl, trl+liger, unsloth
work        of speed_models: uf, hh, longprompt, multi, demo, ctx16k, ctx32k, outlier
shape       of speed_models: 8b, 70b, small, tiny
samples     of a step; default: the work's own
options     for the engine's config, such as {"gradient_checkpointing": false}
adapter     of ours, if it isn't on all layers and tokens: "answer-only", "upper half", "answer-only, upper half"
attention   of ours: a name in CANDIDATES of attention.py
dtype       bfloat16 (default) or float32, in which all engines get the same float32 adapters
warm, steps steps before the clock starts, and timed ones
memory_gib  limit of the allocator, for the figures of a smaller card
processes   that share the step, on this one device
profile     true: of one more step, the kernels that took longest
engines     instead of engine and options: {name: options}, measured in turn, `turns` times; the name is the engine,
            unless the options name it
"""

from typing import Any

Case = dict[str, Any]

SMALLER_CARD = 23.0  # GiB that a process gets of a card of 24 GB
# GiB that the fastest of the peers takes at its peak, on an H100 and lengths of the same distributions. Ours is given
# 2 % less: predictions are a little off.
PEERS_PEAK = {"uf": 15.4, "longprompt": 12.1, "hh": 21.6}
AUTO: dict[str, Any] = {"max_tokens_per_microbatch": "auto"}
FEW: dict[str, Any] = {"warm": 1, "steps": 3}
ADAPTERS = ("answer-only", "upper half", "answer-only, upper half")
ATTENTIONS = ("packed", "flex", "varlen", "merged")


def case(engine: str, work: str, note: str = "", shape: str = "8b", seconds: float = 40, **more: Any) -> Case:
    name = " ".join(filter(None, (shape, work, engine, note)))
    return {"name": name, "seconds": seconds, "engine": engine, "work": work, "shape": shape, **more}


def ours(work: str, note: str = "", **more: Any) -> Case:
    """Ours with micro-batches that fill the memory it has."""
    return case("ours", work, note, **{**more, "options": {**AUTO, **more.get("options", {})}})


def within(work: str, note: str = "", **more: Any) -> Case:
    """The same within the peers' memory."""
    limit = {"max_memory_gib": round(0.98 * PEERS_PEAK[work], 2), **more.pop("options", {})}
    note = ", ".join(filter(None, (f"within {PEERS_PEAK[work]} GiB", note)))
    return ours(work, note, **more, options=limit)


def gpu() -> list[Case]:
    """What is asked of a GPU, the most valuable first."""
    small: dict[str, Any] = {"memory_gib": SMALLER_CARD}
    cases = [ours("outlier", "24gb", **small, warm=1, steps=7), case("ours", "ctx16k", "24gb", **small, **FEW)]
    cases += [ours("uf", "16", shape="70b", seconds=120, samples=16, warm=1, steps=2)]
    cases += [make(work, **note) for work in PEERS_PEAK for make, note in ((within, {}), (ours, {"note": "free"}))]
    cases += [ours("multi")]
    cases += [make("longprompt", name, adapter=name) for name in ADAPTERS for make in (within, ours)]
    cases += [case("ours", "ctx32k", "24gb", **small, **FEW, seconds=60), case("ours", "ctx32k", **FEW, seconds=60)]
    cases += [program("pytest -m gpu", 240, "gpu_tests.py")]
    kernels = ("tests/fused/test_attention.py", "tests/fused/test_elementwise.py")
    cases += [program("tests of kernels", 180, "gpu_tests.py", *kernels)]
    offloaded = {"activation_offloading": True}
    cases += [case("ours", "ctx32k", "24gb, offloaded", **small, **FEW, seconds=75, options=offloaded)]
    cases += [within("longprompt", "profiled", profile=True, seconds=60)]
    return [*cases, *peers(), drift("bfloat16"), *streamed(), *attentions(), *fp8(), *larger(), *families()]


def peers() -> list[Case]:
    """TRL, TRL with Liger layers and Unsloth, which saves its model and loads it."""
    found = [case("trl", work, seconds=60, **FEW) for work in PEERS_PEAK]
    found += [case("trl+liger", work, seconds=60, warm=1, steps=4) for work in PEERS_PEAK]
    found += [case("unsloth", work, seconds=150, warm=1, steps=4) for work in PEERS_PEAK]
    found += [case("trl", work, seconds=75, **FEW) for work in ("multi", "ctx16k", "ctx32k")]
    limited = [(engine, work) for work in ("uf", "ctx16k") for engine in ("trl", "trl+liger")]
    return found + [case(*one, "24gb", seconds=75, memory_gib=SMALLER_CARD, **FEW) for one in limited]


def drift(dtype: str) -> Case:
    """30 steps on fused layers beside the model's own, which run twice, and once more in other micro-batches: how far
    losses and margins are apart."""
    shared = {"engine": "ours", **AUTO, "logging_steps": 1, "learning_rate": 1e-4}
    own = {**shared, "fused_layers": False}
    packed = {**own, "max_tokens_per_microbatch": 1500}
    engines = {"own layers": own, "the same again": own, "packed otherwise": packed, "fused layers": shared}
    fixed = {"work": "uf", "shape": "8b", "samples": 4, "warm": 1, "steps": 29, "turns": 1, "dtype": dtype}
    return {"name": f"8b drift of 30 steps in {dtype}", "seconds": 150, "engines": engines, **fixed}


def streamed() -> list[Case]:
    """Layers that come from the CPU's memory, and from another process, beside resident ones at one packed size."""
    few: dict[str, Any] = {"samples": 16, "warm": 2, "steps": 4, "seconds": 90}
    packed = {"max_tokens_per_microbatch": 8192, "gradient_checkpointing": True}
    sharded = {**packed, "fsdp": "full_shard", "ddp_backend": "gloo", "per_device_train_batch_size": 8}
    auto = {"stream_layers": "auto", "gradient_checkpointing": True, "optim": "adamw_8bit"}
    return [
        ours("uf", "resident", **few, options=packed),
        ours("uf", "streamed", **few, options={**packed, "stream_layers": 32}),
        ours("uf", "sharded", **few, processes=2, options=sharded),
        ours("uf", "24gb, streamed", **{**few, "seconds": 300}, shape="70b", memory_gib=SMALLER_CARD, options=auto),
    ]


def attentions() -> list[Case]:
    return [ours(work, f"attention {name}", attention=name) for name in ATTENTIONS for work in PEERS_PEAK]


def fp8() -> list[Case]:
    products = {"fp8_products": True, "fused_layers": True}
    return [make(work, "fp8", options=products) for work in PEERS_PEAK for make in (within, ours)]


def larger() -> list[Case]:
    """More pairs in a step, and the 70B shape beside the peers."""
    more = (("uf", 16), ("hh", 128), ("longprompt", 4))
    cases = [ours(work, f"free {n}", samples=n, warm=2, steps=4) for work, n in more]
    cases += [ours("uf", "24gb", memory_gib=SMALLER_CARD)]
    fewer: dict[str, Any] = {"shape": "70b", "seconds": 150, **FEW}
    return (
        cases
        + [ours("uf", "24", samples=24, **fewer), ours("uf", "4", samples=4, **fewer)]
        + [case("trl", "uf", "4", samples=4, **fewer)]
    )


def program(name: str, seconds: float, script: str, *arguments: str) -> Case:
    return {"name": name, "seconds": seconds, "command": [f"benchmarks/{script}", *arguments]}


def families() -> list[Case]:
    cuda = ("--device", "cuda")
    names = ("gemma3", "qwen3_5", "qwen3_moe")
    cases = [program(f"family {name}", 240, "families.py", *cuda, "--turns", "1", "--only", name) for name in names]
    shapes = ("30b-a3b", "gpt-oss-20b")
    cases += [program(f"experts {name}", 150, "experts.py", "--turns", "1", "--shape", name) for name in shapes]
    cases += [program("pictures", 240, "images.py", *cuda, "--shape", "8b", "--turns", "1")]
    # A case that the deadline ends has kept its runs, and goes on with the others the next time.
    more = {"sentiment": "3", "instructions": "8", "labels": "3"}
    tasks = {name: ("--task", name, "--times", times) for name, times in more.items()}
    tasks["instructions"] += ("--tokens", "256")
    return cases + [
        {**program(f"quality {name}", 240, "quality.py", *cuda, *what), "limit": 3600} for name, what in tasks.items()
    ]


def compared(note: str, dtype: str, **options: Any) -> Case:
    """Ours and TRL in turn, with the same options.

    SGD at a rate at which the losses move: Adam turns the rounding noise of tiny gradients into whole steps, after
    which losses can't be compared.
    """
    shared = {"optim": "sgd", "learning_rate": 0.05, **options}
    fixed = {"work": "demo", "shape": "small", "dtype": dtype, "warm": 1, "steps": 4, "turns": 3}
    return {"name": f"small demo {note}", "seconds": 90, "engines": {"ours": shared, "trl": shared}, **fixed}


def cpu() -> list[Case]:
    return [
        compared("float32", "float32"),
        compared("float32 stored", "float32", gradient_checkpointing=False),
        compared("bfloat16", "bfloat16"),
    ]


def tiny(cases: list[Case]) -> list[Case]:
    """The cases that train and need nothing of a GPU, on tiny models: to see that they run."""
    few = {"shape": "tiny", "work": "demo", "samples": 2, "warm": 1, "steps": 2, "turns": 1, "seconds": 60}
    found = []
    for one in cases:
        if "work" in one and "attention" not in one and one.get("engine") not in ("unsloth", "trl+liger"):
            of_gpus = ("max_memory_gib", "activation_offloading")
            options = {name: value for name, value in one.get("options", {}).items() if name not in of_gpus}
            if "stream_layers" in options:
                options |= {"stream_layers": 2, "optim": "adamw_torch"}
            if "per_device_train_batch_size" in options:
                options["per_device_train_batch_size"] = 1
            work = "multi" if one["work"] == "multi" else "demo"
            found.append({**one, **few, "work": work, **({"options": options} if "options" in one else {})})
    return found


SETS = {"gpu": gpu, "cpu": cpu}
