"""The sets of cases that `speed.py` knows by name. A case is a dict, so that a JSON file can hold others.

name        unique; `--only` searches in it
engine      ours, trl, trl+liger, unsloth
work        of speed_models: uf, hh, longprompt, multi, demo, ctx16k, ctx32k
shape       of speed_models: 8b, 70b, small, tiny
samples     of a step; default: the work's own
options     for the engine's config, such as {"gradient_checkpointing": false}
dtype       bfloat16 (default) or float32, in which all engines get the same float32 adapters
warm, steps steps before the clock starts, and timed ones
memory_gib  limit of the allocator, for the figures of a smaller card
engines, turns  instead of engine and options: {engine: options}, measured in turn, so many times
"""

from typing import Any

Case = dict[str, Any]

SMALLER_CARD = 23.0  # GiB that a process gets of a card of 24 GB


def case(engine: str, work: str, shape: str = "8b", note: str = "", **more: Any) -> Case:
    name = " ".join(filter(None, (shape, work, engine, note)))
    return {"name": name, "engine": engine, "work": work, "shape": shape, **more}


def ours_both_ways(work: str) -> list[Case]:
    stored = {"gradient_checkpointing": False}
    return [case("ours", work), case("ours", work, note="stored", options=stored)]


def gpu_short() -> list[Case]:
    cases = [one for work in ("uf", "hh", "longprompt") for one in [*ours_both_ways(work), case("trl", work)]]
    return [*cases, case("trl+liger", "uf")]


def gpu() -> list[Case]:
    cases = gpu_short()
    cases += [case(engine, work) for work in ("multi", "ctx16k", "ctx32k") for engine in ("ours", "trl")]
    cases += [case("ours", "uf", note="stored 16", samples=16, options={"gradient_checkpointing": False})]
    cases += [case("trl+liger", work) for work in ("hh", "longprompt")]
    return cases + [case("unsloth", work) for work in ("uf", "hh", "longprompt")]


def gpu_70b() -> list[Case]:
    fewer = {"shape": "70b", "warm": 2, "steps": 3}
    cases = [case("ours", "uf", note=str(samples), samples=samples, **fewer) for samples in (4, 16, 24)]
    return cases + [case(engine, "uf", note="4", samples=4, **fewer) for engine in ("trl", "trl+liger")]


def gpu_24gb() -> list[Case]:
    kinds = [(engine, work) for work in ("uf", "ctx16k", "ctx32k") for engine in ("ours", "trl", "trl+liger")]
    return [case(engine, work, note="24gb", memory_gib=SMALLER_CARD) for engine, work in kinds]


def compared(note: str, dtype: str, **options: Any) -> Case:
    """Ours and TRL in turn, with the same options.

    SGD at a rate at which the losses move: Adam turns the rounding noise of tiny gradients into whole steps, after
    which losses can't be compared.
    """
    shared = {"optim": "sgd", "learning_rate": 0.05, **options}
    return {
        "name": f"small demo {note}",
        "engines": {"ours": shared, "trl": shared},
        "work": "demo",
        "shape": "small",
        "dtype": dtype,
        "warm": 1,
        "steps": 4,
        "turns": 3,
    }


def cpu() -> list[Case]:
    return [
        compared("float32", "float32"),
        compared("float32 stored", "float32", gradient_checkpointing=False),
        compared("bfloat16", "bfloat16"),
    ]


SETS = {"gpu": gpu, "gpu-short": gpu_short, "cpu": cpu, "70b": gpu_70b, "24gb": gpu_24gb}
