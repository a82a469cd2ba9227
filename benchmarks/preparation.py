"""What it costs to prepare rows: against tokenizing both sides of each once, and by the number of rows.

    python benchmarks/preparation.py [--tokenizer <folder or id>] [--tokens 400000 --repeats 3] [--rows 30000 300000]

Conversations of 1 to 299 turns with the same number of tokens in all, once as chats (user and assistant in turn) and
once as agents write them (tool turns in an order of its own in nearly every row), and trajectories of 101 to 801
turns. The baseline is `apply_chat_template(tokenize=True)` of the chosen and of the rejected conversation, in the same
turn of the same run. Then text rows from a JSON Lines file of 30,000 and of 300,000 rows: microseconds a row, read and
prepared, and of the second start, which finds both in the cache.

Times are those of this process (CPU), the fastest of `--repeats`. Writes benchmarks/results/preparation_cpu.json.
"""

import argparse
import json
import os
import platform
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_CACHE", tempfile.mkdtemp())  # before datasets is imported

from datasets import Dataset, disable_progress_bars
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dpo_peft import quickstart
from dpo_peft.artifacts.card import framework_versions
from dpo_peft.data import prepare_dataset
from dpo_peft.files import read_rows

HERE = Path(__file__).parent
TURNS = (1, 3, 11, 31, 101, 299)
TRAJECTORY_TURNS = (101, 401, 801)
WORDS = "the play was long and nobody knew why it ended so, but we liked 42 of its 7 songs".split()

Row = dict[str, Any]


def text(random_: random.Random, least: int = 6, most: int = 30) -> str:
    return " ".join(random_.choices(WORDS, k=random_.randint(least, most)))


def conversation(random_: random.Random, turns: int, agent: bool) -> list[dict[str, str]]:
    """Returns messages that end with a user's turn or a tool's."""
    roles: list[str] = ["user"]
    while len(roles) < turns:
        roles += ["assistant", *(["tool"] * random_.randint(1, 3) if agent and random_.random() < 0.7 else ["user"])]
    return [{"role": role, "content": text(random_)} for role in roles]


def rows_of(turns: int, tokens: int, agent: bool, trajectories: bool = False) -> list[Row]:
    """Returns so many rows that each number of turns has about the same number of tokens."""
    random_, count = random.Random(turns), max(32 if trajectories else 2, tokens // (30 * (turns + 2)))
    rows = []
    for _ in range(count):
        prompt = conversation(random_, turns, agent)
        good, bad = ([{"role": "assistant", "content": text(random_)}] for _ in range(2))
        rows.append(
            {"chosen": prompt + good, "rejected": prompt[: len(prompt) // 4 * 2 + 1] + bad}
            if trajectories
            else {"prompt": prompt, "chosen": good, "rejected": bad}
        )
    return rows


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def compare(tokenizer: PreTrainedTokenizerBase, rows: list[Row], repeats: int, data: str) -> dict[str, float]:
    """Returns seconds of preparing rows, of tokenizing both sides of them, and the ratio of the fastest of each."""
    dataset = Dataset.from_list(rows)

    def tokenize() -> None:
        for row in rows:
            for side in ("chosen", "rejected"):
                tokenizer.apply_chat_template(row.get("prompt", []) + row[side], tokenize=True)

    def prepare() -> None:
        prepare_dataset(dataset, tokenizer, max_length=None, load_from_cache_file=False, data=data)

    times = [(seconds(tokenize), seconds(prepare)) for _ in range(repeats)]
    plain, ours = (min(column) for column in zip(*times, strict=True))
    return {
        "rows": len(rows),
        "tokenize_s": round(plain, 3),
        "prepare_s": round(ours, 3),
        "ratio": round(ours / plain, 2),
    }


def scale(tokenizer: PreTrainedTokenizerBase, count: int) -> dict[str, float]:
    """Returns microseconds a row of text rows in a file: reading, preparing, and both once more."""
    random_, path = random.Random(0), Path(tempfile.mkdtemp()) / "rows.jsonl"
    with open(path, "w") as file:
        for number in range(count):
            answers = {side: f" {text(random_)}" for side in ("chosen", "rejected")}
            file.write(json.dumps({"prompt": f"{number} {text(random_)}", **answers}) + "\n")
    found: dict[str, float] = {"rows": count}
    rows: list[Any] = []
    for suffix in ("", "_again"):
        found[f"read{suffix}_us"] = round(1e6 * seconds(lambda: rows.append(read_rows(str(path)))) / count, 1)
        found[f"prepare{suffix}_us"] = round(1e6 * seconds(lambda: prepare_dataset(rows[-1], tokenizer)) / count, 1)
    path.unlink()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", default=str(quickstart.model_path()))
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, nargs="*", default=[30_000, 300_000])
    parser.add_argument("--output", default=str(HERE / "results" / "preparation_cpu.json"))
    args = parser.parse_args()
    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    results: dict[str, Any] = {"machine": platform.processor() or platform.machine(), "versions": framework_versions()}
    results |= {"tokenizer": Path(args.tokenizer).name, "tokens": args.tokens, "repeats": args.repeats}
    kinds = {"chats": (TURNS, False, "pairs"), "agents": (TURNS, True, "pairs")}
    kinds["trajectories"] = (TRAJECTORY_TURNS, True, "trajectories")
    for kind, (numbers, agent, data) in kinds.items():
        for turns in numbers:
            rows = rows_of(turns, args.tokens, agent, data == "trajectories")
            found = compare(tokenizer, rows, args.repeats, data)
            results.setdefault(kind, {})[turns] = found
            print(f"{kind:12} {turns:4} turns: {found}", flush=True)
    for count in args.rows:
        results.setdefault("text", {})[count] = scale(tokenizer, count)
        print(f"text {results['text'][count]}", flush=True)
    Path(args.output).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
