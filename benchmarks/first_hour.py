"""Plays ten first hours: the commands of docs/first-steps.md, typed as they stand there, each time in a new place.

    python benchmarks/first_hour.py [--turns 10] [--shapes chat orca ...] [--install_once]

A turn is a new virtual environment (with --install_once that of the first turn), a new home and an empty folder with
nothing but a file of preferences. The file has another shape each time; the rows are 240 of the bundled model's.
Nothing of this environment is passed on but the PATH of the system; the package index is the only address. Where the
page names a model of the Hub, the bundled one stands in. Every command has to leave with 0, the trained adapter has to
judge held-out pairs better than it did at the start, and `dpo-peft chat` has to answer.

Writes to benchmarks/results/first_hour_cpu.json, after each turn, what each command took.
"""

import argparse
import csv
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
RESULTS = REPO / "benchmarks" / "results" / "first_hour_cpu.json"
PAGE = REPO / "docs" / "first-steps.md"
ROWS, SYSTEM = 240, "You write short reviews."
Row = dict[str, Any]


def parts(row: Row) -> tuple[str, str, str]:
    """Returns the question and both completions of a row of the bundled data, as text."""
    return tuple(row[name][0]["content"] for name in ("prompt", "chosen", "rejected"))  # type: ignore[return-value]


def as_lines(shape: Callable[[str, str, str], Row | list[Row]]) -> Callable[[list[Row], Path], Path]:
    """Returns a writer of JSON lines: one of `shape(question, chosen, rejected)` for each row, or several."""

    def write(rows: list[Row], folder: Path) -> Path:
        made = [shape(*parts(row)) for row in rows]
        lines = [line for one in made for line in (one if isinstance(one, list) else [one])]
        path = folder / "mine.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
        return path

    return write


def as_csv(rows: list[Row], folder: Path) -> Path:
    """Writes plain text in three columns."""
    path = folder / "mine.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([("prompt", "chosen", "rejected"), *map(parts, rows)])
    return path


def said(role: str, text: str) -> dict[str, str]:
    """Returns a message."""
    return {"role": role, "content": text}


# What the file of each turn looks like.
SHAPES: dict[str, Callable[[list[Row], Path], Path]] = {
    "chat": as_lines(
        lambda q, a, b: dict(prompt=[said("user", q)], chosen=[said("assistant", a)], rejected=[said("assistant", b)])
    ),
    "csv": as_csv,
    "orca": as_lines(lambda q, a, b: dict(system=SYSTEM, question=q, chosen=a, rejected=b)),
    "alpaca pair": as_lines(lambda q, a, b: dict(instruction=q, input="", output=[a, b])),
    "sharegpt": as_lines(
        lambda q, a, b: dict(
            conversations=[{"from": "human", "value": q}],
            chosen={"from": "gpt", "value": a},
            rejected={"from": "gpt", "value": b},
        )
    ),
    "openai": as_lines(
        lambda q, a, b: dict(
            input={"messages": [said("user", q)]},
            preferred_output=[said("assistant", a)],
            non_preferred_output=[said("assistant", b)],
        )
    ),
    "messages and texts": as_lines(lambda q, a, b: dict(messages=[said("user", q)], chosen=a, rejected=b)),
    "ratings": as_lines(lambda q, a, b: dict(instruction=q, generations=[b, a], ratings=[2.0, 4.5])),
    "arena": as_lines(
        lambda q, a, b: dict(
            conversation_a=[said("user", q), said("assistant", b)],
            conversation_b=[said("user", q), said("assistant", a)],
            winner="model_b",
        )
    ),
    "whole conversations": as_lines(
        lambda q, a, b: dict(
            chosen=[said("user", q), said("assistant", a)], rejected=[said("user", q), said("assistant", b)]
        )
    ),
}


def commands(page: str, replaced: dict[str, str]) -> list[str]:
    """Returns the command lines of a page, those after `$ ` in its console blocks, with names replaced."""
    blocks = re.findall(r"```console\n(.*?)```", page, flags=re.DOTALL)
    lines = [line[2:] for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.startswith("$ ")]
    for name, value in replaced.items():
        lines = [line.replace(name, value) for line in lines]
    return lines


def play(shape: str, wheel: Path, constraints: Path, venv: Path) -> dict[str, Any]:
    """Plays one first hour; a `venv` that is there is not made again. Returns the seconds of its commands, and
    what came out.

    Raises:
        SystemExit: a command left with another code than 0, or what it should have left isn't there.
    """
    bundled = REPO / "dpo_peft" / "quickstart"
    rows = [json.loads(line) for line in (bundled / "data" / "train.jsonl").read_text("utf-8").splitlines()[:ROWS]]
    folder = Path(tempfile.mkdtemp(prefix="first-hour-"))
    try:
        (folder / "home").mkdir()
        mine = SHAPES[shape](rows, folder)
        shutil.copytree(bundled / "model", folder / "model")
        installed = venv.exists()
        if not installed:
            subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        env = {
            "PATH": f"{venv}/bin:/usr/local/bin:/usr/bin:/bin",
            "HOME": str(folder / "home"),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
        }
        names = {
            "pip install dpo-peft": f"pip install --quiet -c {constraints} {wheel}",
            "mine.jsonl": mine.name,
            "Qwen/Qwen3-8B": "./model",
        }
        steps = []
        for line in commands(PAGE.read_text("utf-8"), names)[installed:]:
            started = time.time()
            done = subprocess.run(["bash", "-c", line], cwd=folder, env=env, capture_output=True, text=True)
            steps.append({"command": line.replace(str(wheel), wheel.name).replace(str(constraints), constraints.name)})
            steps[-1] |= {"seconds": round(time.time() - started, 1)}
            print(f"  {steps[-1]['seconds']:7.1f} s  {steps[-1]['command']}", flush=True)
            if done.returncode:
                raise SystemExit(
                    f"{shape}: {line}: exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
                )
        metrics = folder / "outputs" / "run" / "metrics.json"
        saved = json.loads(metrics.read_text("utf-8"))
        accuracy = saved["eval_last"]["rewards/accuracies"]
        answer = done.stdout.strip()
        if not accuracy > 0.6 or not answer:
            raise SystemExit(f"{shape}: accuracy {accuracy}, the last command said {answer!r}")
        total = sum(step["seconds"] for step in steps)
        return {"shape": shape, "seconds": round(total, 1), "accuracy": accuracy, "said": answer, "steps": steps}
    finally:
        shutil.rmtree(folder)


def main() -> None:
    """Builds the wheel, plays the turns, writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=len(SHAPES))
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--constraints", type=Path, default=REPO / "constraints.txt")
    parser.add_argument("--install_once", action="store_true")
    options = parser.parse_args()
    built = Path(tempfile.mkdtemp(prefix="wheel-"))
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", built, REPO], check=True)
    (wheel,) = built.glob("*.whl")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=REPO, capture_output=True, text=True)
    turns: list[dict[str, Any]] = []
    result = {"commit": commit.stdout.strip(), "cores": os.cpu_count(), "turns": turns}
    for number in range(options.turns):
        shape = options.shapes[number % len(options.shapes)]
        print(f"{number + 1}: {shape}", flush=True)
        venv = built / ("venv" if options.install_once else f"venv-{number}")
        turns.append(play(shape, wheel, options.constraints.resolve(), venv))
        RESULTS.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
        if not options.install_once:
            shutil.rmtree(venv)
    shutil.rmtree(built)


if __name__ == "__main__":
    main()
