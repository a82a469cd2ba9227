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


# GiB that the fastest of the peers takes at its peak, on an H100 and lengths of the same distributions. Ours is given
# 2 % less: predictions are a little off.
PEERS_PEAK = {"uf": 15.4, "longprompt": 12.1, "hh": 21.6}
AUTO = {"max_tokens_per_microbatch": "auto"}


def gpu_short() -> list[Case]:
    """Within a peer's memory, with all of the card's, and the peers."""
    works = ("uf", "longprompt", "hh")
    cases = []
    for work in works:
        within = {**AUTO, "max_memory_gib": round(0.98 * PEERS_PEAK[work], 2)}
        cases.append(case("ours", work, note=f"within {PEERS_PEAK[work]} GiB", options=within))
        cases.append(case("ours", work, note="free", options=AUTO))
        cases.append(case("trl", work, warm=1, steps=3))
    more = (("uf", 16), ("hh", 128), ("longprompt", 4))
    cases += [case("ours", work, note=f"free {n}", samples=n, options=AUTO, warm=2, steps=4) for work, n in more]
    return [*cases, case("trl+liger", "uf", warm=1, steps=4)]


def gpu_more() -> list[Case]:
    """Other work, limits of memory, and a row that is much longer than the rest."""
    cases = [case("ours", "outlier", note="24gb", memory_gib=SMALLER_CARD, warm=1, steps=7, options=AUTO)]
    cases += gpu_70b()[:1]
    few = {"warm": 1, "steps": 3}
    cases += [case("ours", work, note="24gb", memory_gib=SMALLER_CARD, **few) for work in ("ctx16k", "ctx32k")]
    cases += [case("ours", "multi", options=AUTO), case("trl", "multi", warm=2, steps=4)]
    return [*cases, case("trl", "ctx16k", **few), case("ours", "ctx32k", **few), case("trl", "ctx32k", **few)]


def gpu() -> list[Case]:
    cases = gpu_short() + gpu_more() + [case("trl+liger", work) for work in ("hh", "longprompt")]
    return cases + [case("unsloth", work) for work in ("uf", "hh", "longprompt")]


def gpu_70b() -> list[Case]:
    fewer = {"shape": "70b", "warm": 1, "steps": 3}
    cases = [case("ours", "uf", note=str(samples), samples=samples, options=AUTO, **fewer) for samples in (16, 24)]
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


SETS = {
    "gpu": gpu,
    "gpu-short": gpu_short,
    "gpu-more": gpu_more,
    "cpu": cpu,
    "70b": gpu_70b,
    "24gb": gpu_24gb,
}
