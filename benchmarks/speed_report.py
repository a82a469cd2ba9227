"""Tables and a chart from the files of `speed.py`, put into docs/performance.md.

    python benchmarks/speed_report.py [benchmarks/results/speed_*.json]

A table stands in the page between `<!-- table NAME -->` and `<!-- end NAME -->`, where NAME is the file's name without
its ending; what stands around is written by hand and kept. A table that has no place yet goes to the end.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from dpo_peft.artifacts.curves import BLUE, GRAY, GREEN, INK, ORANGE

ROOT = Path(__file__).resolve().parent.parent
COLORS = {"ours": BLUE, "trl": GRAY, "trl+liger": ORANGE, "unsloth": GREEN}
NAMES = {"ours": "dpo-peft", "trl": "TRL", "trl+liger": "TRL + Liger layers", "unsloth": "Unsloth"}
PAGE = """# Performance

TODO: what was measured, and how to read it.

Each case trains LoRA of rank 16 on all linear layers of a random NF4 model, one optimizer step per batch, on rows with
fixed lengths. Pairs are counted per second of the timed steps, after a warm-up. The share of the bound compares with
6 floating-point operations per decoder weight and distinct token, at the rate of large matrix products measured in the
same run. A failed case is named with its error.

![Times as fast as TRL](images/performance.png)

## Figures

"""

Result = dict[str, Any]


def work_of(record: Result) -> tuple[Any, ...]:
    """What must be equal for speeds to be compared."""
    return record["shape"], record["work"], record.get("dtype", "bfloat16"), record.get("memory_gib")


def baseline(results: list[Result], record: Result) -> float | None:
    """Samples per second of TRL on the same work."""
    same = [
        r["samples_per_s"] for r in results if r.get("engine") == "trl" and work_of(r) == work_of(record) and ok(r)
    ]
    return max(same, default=None)


def ok(record: Result) -> bool:
    return "error" not in record


def short_error(error: str) -> str:
    return "out of memory" if "OutOfMemory" in error or "out of memory" in error else error.split("\n")[0][:80]


def in_words(options: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items()) or "defaults"


def case_table(results: list[Result]) -> list[str]:
    lines = [
        "| work | engine | options | samples | per s | x TRL | tokens/s | s/step | GiB | predicted | bound | loss |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in results:
        limit = f", {r['memory_gib']:g} GiB" if "memory_gib" in r else ""
        start = f"| {r['shape']} {r['work']}{limit} | {NAMES[r['engine']]} | {in_words(r.get('options', {}))} |"
        if not ok(r):
            lines.append(f"{start} {r.get('samples', '')} | {short_error(r['error'])} |" + " |" * 7)
            continue
        base = baseline(results, r)
        ratio = f"{r['samples_per_s'] / base:.2f}" if base else ""
        memory = [f"{r[name]:.1f}" if name in r else "" for name in ("peak_gib", "predicted_gib")]
        figures = [r["samples"], f"{r['samples_per_s']:.3g}", ratio, f"{r['tokens_per_s']:,.0f}"]
        figures += [f"{r['seconds_per_step']:.3g}", *memory, f"{r['share_of_bound']:.0%}", f"{r['loss']:.4f}"]
        lines.append(f"{start} {' | '.join(map(str, figures))} |")
    return lines


def turns_table(results: list[Result]) -> list[str]:
    lines = [
        "| case | turns | s/step | TRL s/step | times as fast (range) | by CPU time | losses apart | bound |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in results:
        if not ok(r):
            lines.append(f"| {r['name']} | {short_error(r['error'])} |" + " |" * 6)
            continue
        own, trl = (r["medians"][engine] for engine in ("ours", "trl"))
        wall, cpu = (r["times_as_fast"]["trl"][name] for name in ("seconds_per_step", "cpu_seconds_per_step"))
        spread = f"{wall['median']:.2f} ({wall['all'][0]:.2f} to {wall['all'][-1]:.2f}) | {cpu['median']:.2f}"
        seconds = f"{own['seconds_per_step']:.2f} | {trl['seconds_per_step']:.2f}"
        apart = f"{r['losses_apart']['trl']:.1e} | {own['share_of_bound']:.0%}"
        lines.append(f"| {r['name']} | {len(r['turns']['ours'])} | {seconds} | {spread} | {apart} |")
    return lines


def table(run: Result) -> str:
    """All cases of one file: those of one engine each, then those measured in turn."""
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items() if name != "dpo-peft")
    rate = ", ".join(f"{dtype} {value / 1e12:.3g} TFLOP/s" for dtype, value in run["matmul_flops"].items())
    lines = [
        f"{run['device']}, {run['machine']}; {versions}; commit {run['commit'][:12]}; matrix products {rate}.",
        "",
    ]
    single = [r for r in run["results"] if "engine" in r]
    in_turn = [r for r in run["results"] if "engines" in r]
    lines += case_table(single) if single else []
    lines += [""] * bool(single and in_turn) + (turns_table(in_turn) if in_turn else [])
    return "\n".join(lines)


def place(page: str, name: str, content: str) -> str:
    """The page with `content` between the marks of `name`."""
    block = f"<!-- table {name} -->\n{content}\n<!-- end {name} -->"
    pattern = rf"<!-- table {re.escape(name)} -->.*?<!-- end {re.escape(name)} -->"
    if re.search(pattern, page, flags=re.DOTALL):
        return re.sub(pattern, lambda _: block, page, flags=re.DOTALL)
    return f"{page.rstrip()}\n\n{block}\n"


def speedups(runs: list[Result]) -> dict[str, dict[str, float]]:
    """For each work that TRL was measured on: engine to how many times as fast as TRL its fastest case was."""
    found: dict[str, dict[str, float]] = {}
    for run in runs:
        for r in filter(ok, run["results"]):
            if "engines" in r:
                found[r["name"]] = {"ours": r["times_as_fast"]["trl"]["seconds_per_step"]["median"], "trl": 1.0}
            elif base := baseline(run["results"], r):
                limit = f"\n{r['memory_gib']:g} GiB" if "memory_gib" in r else ""
                engines = found.setdefault(f"{r['shape']} {r['work']}{limit}", {})
                engines[r["engine"]] = max(engines.get(r["engine"], 0.0), r["samples_per_s"] / base)
    return found


def draw(groups: dict[str, dict[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    engines = [engine for engine in COLORS if any(engine in group for group in groups.values())]
    width = 0.8 / max(len(engines), 1)
    figure, axes = plt.subplots(figsize=(max(5.0, 1.5 * len(groups)), 3.4), dpi=120, layout="constrained")
    for i, engine in enumerate(engines):
        bars = [
            (x + (i - (len(engines) - 1) / 2) * width, g[engine]) for x, g in enumerate(groups.values()) if engine in g
        ]
        drawn = axes.bar(*zip(*bars, strict=True), width, color=COLORS[engine], label=NAMES[engine])
        axes.bar_label(drawn, fmt="%.2g", fontsize=8, color=INK)
    axes.set_xticks(range(len(groups)), list(groups), fontsize=8)
    axes.set_ylabel("times as fast as TRL")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "performance.md")
    parser.add_argument("--chart", type=Path, default=ROOT / "docs" / "images" / "performance.png")
    args = parser.parse_args()
    files = args.files or sorted((ROOT / "benchmarks" / "results").glob("speed_*.json"))
    if not files:
        parser.error("no results: run benchmarks/speed.py first")
    runs = {path.stem: json.loads(path.read_text("utf-8")) for path in files}
    page = args.page.read_text("utf-8") if args.page.exists() else PAGE
    for name, run in runs.items():
        page = place(page, name, table(run))
    args.page.write_text(page, "utf-8")
    draw(speedups(list(runs.values())), args.chart)
    print(f"Wrote {args.page} and {args.chart}.")


if __name__ == "__main__":
    main()
