"""Tables and a chart from the files of gpu_queue.py, put into docs/performance.md; the queue calls it at its end.

    python benchmarks/speed_report.py [benchmarks/results/speed_*.json]

A table stands in the page between `<!-- table NAME -->` and `<!-- end NAME -->`, where NAME is the file's name without
its ending; what stands around is written by hand and kept. A table that has no place yet goes to the end. Cases of
speed_cases.py that were not measured on a card stand in its table, too.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from speed_cases import cpu, gpu

from dpo_peft.artifacts.curves import BLUE, GRAY, GREEN, INK, ORANGE

ROOT = Path(__file__).resolve().parent.parent
COLORS = {"ours": BLUE, "trl": GRAY, "trl+liger": ORANGE, "unsloth": GREEN}
NAMES = {"ours": "dpo-peft", "trl": "TRL", "trl+liger": "TRL + Liger layers", "unsloth": "Unsloth"}
Result = dict[str, Any]


def work_of(record: Result) -> tuple[Any, ...]:
    """What must be equal for speeds to be compared."""
    return tuple(record.get(name) for name in ("shape", "work", "samples", "dtype", "memory_gib"))


def baseline(results: list[Result], record: Result) -> float | None:
    """Samples per second of TRL on the same work."""
    same = [
        r["samples_per_s"] for r in results if r.get("engine") == "trl" and ok(r) and work_of(r) == work_of(record)
    ]
    return max(same, default=None)


def ok(record: Result) -> bool:
    return "error" not in record


def short_error(error: str) -> str:
    if "OutOfMemory" in error or "out of memory" in error:
        return "out of memory"
    return error.strip().split("\n")[-1 if error.startswith("exit status") else 0][:80].replace("|", "/")


def share(record: Result, figures: Result) -> str:
    """The time of the operations of the bound, at the rate of the card's large products, as a share of the step's."""
    rate = record["matmul_flops"][record.get("dtype", "bfloat16")]
    return f"{record['bound_flops_per_step'] / rate / figures['seconds_per_step']:.0%}"


def lines_of(head: str, kinds: str, rows: list[list[Any]]) -> list[str]:
    """A table of these columns, those of kind "r" to the right; a short row is filled up."""
    columns = head.split(" | ")
    rule = "|" + "|".join("---:" if kind == "r" else "---" for kind in kinds) + "|"
    filled = [[*map(str, row), *[""] * (len(columns) - len(row))] for row in rows]
    return [f"| {head} |", rule, *(f"| {' | '.join(row)} |" for row in filled), ""]


def case_table(results: list[Result]) -> list[str]:
    rows: list[list[Any]] = []
    for r in results:
        start = [r.get("commit", "")[:7], r["name"]]
        if not ok(r):
            rows.append([*start, r.get("samples", ""), short_error(r["error"])])
            continue
        base = baseline(results, r)
        memory = [f"{r[name]:.1f}" if name in r else "" for name in ("peak_gib", "predicted_gib")]
        figures = [r["samples"], f"{r['samples_per_s']:.3g}", f"{r['samples_per_s'] / base:.2f}" if base else ""]
        figures += [f"{r['tokens_per_s']:,.0f}", f"{r['seconds_per_step']:.3g}", *memory, share(r, r)]
        rows.append([*start, *figures, f"{r['loss']:.4f}"])
    head = "commit | case | samples | per s | x TRL | tokens/s | s/step | GiB | predicted | bound | loss"
    return lines_of(head, "ll" + 9 * "r", rows)


def turns_table(results: list[Result]) -> list[str]:
    """Each engine beside the first of its case."""
    rows: list[list[Any]] = []
    for r in results:
        start = [r.get("commit", "")[:7], r["name"]]
        if not ok(r):
            rows.append([*start, short_error(r["error"])])
            continue
        first, *others = r["medians"]
        for other in others:
            own, its = r["medians"][first], r["medians"][other]
            wall, cpu_time = (r["times_as_fast"][other][f"{kind}seconds_per_step"] for kind in ("", "cpu_"))
            seconds = [f"{first} {own['seconds_per_step']:.2f}", f"{other} {its['seconds_per_step']:.2f}"]
            spread = f"{wall['median']:.2f} ({wall['all'][0]:.2f} to {wall['all'][-1]:.2f})"
            apart = [f"{r[what][other]:.1e}" if what in r else "" for what in ("losses_apart", "margins_apart")]
            bound = share(r, own) if r["bound_flops_per_step"] else ""
            rows.append([*start, len(r["turns"][first]), *seconds, spread, f"{cpu_time['median']:.2f}", *apart, bound])
    head = (
        "commit | case | turns | s/step | beside | times as fast (range) | by CPU time | losses apart | margins apart"
    )
    return lines_of(f"{head} | bound", "ll" + 8 * "r", rows)


def other_table(results: list[Result]) -> list[str]:
    """Numbers that a program found, but for those that say where and how it ran."""
    where = {"seconds", "took", "load_average", "total_gib", "tokens"}
    rows = []
    for r in results:
        found = {name: value for name, value in r.items() if isinstance(value, (int, float)) and name not in where}
        shown = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
        rows.append([r.get("commit", "")[:7], r["name"], shown if ok(r) else short_error(r["error"])])
    return lines_of("commit | case | found", "lll", rows)


def in_order(card: Result) -> list[Result]:
    """The results of a card in the order of the cases, with those that are not measured, and what else there is."""
    expected = cpu() if card["device"] == "cpu" else gpu()
    found: list[Result] = []
    for case in expected:
        of_case = [record for record in card["results"] if record["name"] == case["name"]]
        found += of_case or [{**case, "error": "not measured"}]
    names = {case["name"] for case in expected}
    return found + [record for record in card["results"] if record["name"] not in names]


def table(card: Result) -> str:
    """All cases of one card: those of one engine each, those measured in turn, and the others."""
    last = card["results"][-1]
    rate = ", ".join(f"{dtype} {value / 1e12:.3g} TFLOP/s" for dtype, value in last["matmul_flops"].items())
    lines = [f"{card['device']}, {last['machine']}; {last['versions']}; matrix products {rate}.", ""]
    kinds: dict[Any, list[Result]] = {case_table: [], turns_table: [], other_table: []}
    for record in in_order(card):
        in_turn = "engines" in record or "medians" in record
        kinds[case_table if "engine" in record else turns_table if in_turn else other_table].append(record)
    for make, records in kinds.items():
        lines += make(records) if records else []
    return "\n".join(lines).rstrip()


def place(page: str, name: str, content: str) -> str:
    """The page with `content` between the marks of `name`."""
    block = f"<!-- table {name} -->\n{content}\n<!-- end {name} -->"
    pattern = rf"<!-- table {re.escape(name)} -->.*?<!-- end {re.escape(name)} -->"
    if re.search(pattern, page, flags=re.DOTALL):
        return re.sub(pattern, lambda _: block, page, flags=re.DOTALL)
    return f"{page.rstrip()}\n\n{block}\n"


def speedups(cards: list[Result]) -> dict[str, dict[str, float]]:
    """For each work that TRL was measured on: engine to how many times as fast as TRL its fastest case was.

    An adapter on less than everything, and products in 8 bits, are other work.
    """
    found: dict[str, dict[str, float]] = {}
    for card in cards:
        name = "" if card["device"] == "cpu" else "\n" + card["device"].removeprefix("NVIDIA ").split()[0]
        for r in filter(ok, card["results"]):
            if "trl" in r.get("times_as_fast", {}) and "engines" in r:
                found[r["name"]] = {"ours": r["times_as_fast"]["trl"]["seconds_per_step"]["median"], "trl": 1.0}
            elif "engine" not in r or "adapter" in r or "fp8_products" in r.get("options", {}):
                continue
            elif base := baseline(card["results"], r):
                limit = f"\n{r['memory_gib']:g} GiB" if "memory_gib" in r else ""
                engines = found.setdefault(f"{r['shape']} {r['work']}{limit}{name}", {})
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


def write_page(
    files: list[Path] | None = None,
    page: Path = ROOT / "docs" / "performance.md",
    chart: Path = ROOT / "docs" / "images" / "performance.png",
) -> None:
    """Puts the tables and the chart of these files, or of all results, into the page."""
    paths = files or sorted((ROOT / "benchmarks" / "results").glob("speed_*.json"))
    cards = {path.stem: json.loads(path.read_text("utf-8")) for path in paths}
    text = page.read_text("utf-8")
    for name, card in cards.items():
        text = place(text, name, table(card))
    page.write_text(text, "utf-8")
    draw(speedups(list(cards.values())), chart)
    print(f"Wrote {page} and {chart}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="default: all of benchmarks/results")
    write_page(parser.parse_args().files)


if __name__ == "__main__":
    main()
