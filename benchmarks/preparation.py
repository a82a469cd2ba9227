"""What it costs to prepare rows: against tokenizing both sides of each once, and by the number of rows.

    python benchmarks/preparation.py [--tokenizer <folder or id>] [--tokens 400000 --repeats 3] [--rows 30000 300000]

Conversations of 1 to 299 turns with the same number of tokens in all, once as chats (user and assistant in turn) and
once as agents write them (tool turns in an order of its own in nearly every row), and trajectories of 101 to 801
turns. The baseline is `apply_chat_template(tokenize=True)` of the chosen and of the rejected conversation, in the same
turn of the same run. Then text rows from a JSON Lines file of 30,000 and of 300,000 rows: microseconds a row, read and
prepared, and of the second start, which finds both in the cache. Those times are of this process (CPU), the fastest of
`--repeats`. Writes benchmarks/results/preparation_cpu.json.

    python benchmarks/preparation.py --tiny 100000 300000 1000000 --tiny_chats 100000

instead prepares so many rows of a few words, as text and as conversations: all the way to what a trainer holds
(prepared, counted, its fingerprint, the look whether the model embeds them), and by TRL's own
`DPOTrainer._prepare_dataset`, in turns, each in a process and a cache of its own. CPU and wall seconds, peak memory,
bytes in the cache, the ratio to TRL's, and how far one row's cost at each size is from that at the first. Writes
benchmarks/results/preparation_tiny_cpu.json.
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_CACHE", tempfile.mkdtemp())  # before datasets is imported

from datasets import Dataset, disable_progress_bars
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dpo_peft import DPOConfig, quickstart
from dpo_peft.artifacts.card import framework_versions
from dpo_peft.data import prepare_dataset, rows_digest
from dpo_peft.files import read_rows
from dpo_peft.model.loading import load_model
from dpo_peft.objective import TrainingObjective
from dpo_peft.training.building import Preparation

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


def write_tiny(path: Path, count: int, chats: bool) -> None:
    """Writes rows with a few words of prompt, chosen and rejected completion, as text or as a turn each."""
    random_ = random.Random(0)
    with open(path, "w") as file:
        for number in range(count):
            row: Row = {"prompt": f"{number} {text(random_, 2, 6)}"}
            row |= {side: f" {text(random_, 2, 6)} {side}" for side in ("chosen", "rejected")}
            if chats:
                row = {k: [{"role": "user" if k == "prompt" else "assistant", "content": v}] for k, v in row.items()}
            file.write(json.dumps(row) + "\n")


def tiny_ours(path: str, tokenizer: PreTrainedTokenizerBase, measure: Callable[..., Any]) -> None:
    """Takes the rows to where a trainer begins its first step; and once more, as a second start or process does."""
    with tempfile.TemporaryDirectory() as folder:
        args = DPOConfig(folder, report_to="none", use_cpu=True, as_chat=False)  # text as TRL takes it
        model = load_model(str(quickstart.model_path()), quantize=False)
        for name in ("prepare", "again"):
            rows = read_rows(path)
            prepare = Preparation(args, TrainingObjective(["sigmoid"]), tokenizer)
            prepared = measure(name, lambda p=prepare, r=rows: p.training(r))
            measure(f"{name}_look", lambda p=prepare: (p.told_by, p.fit(model)))
        assert prepare.reports["train"].kept_rows == len(prepared) == len(rows)
        measure("digest", lambda: rows_digest(prepared))
        random_ = random.Random(1)
        batches = [random_.choices(range(len(prepared)), k=32) for _ in range(300)]
        measure("read_300_batches_of_32", lambda: [prepared.__getitems__(batch) for batch in batches])


def tiny_trl(path: str, tokenizer: PreTrainedTokenizerBase, measure: Callable[..., Any]) -> None:
    from trl import DPOTrainer

    rows, trainer = read_rows(path), SimpleNamespace(_tokenizer=tokenizer)
    args = SimpleNamespace(dataset_num_proc=None, max_length=1024, truncation_mode="keep_start")
    made = measure("prepare", lambda: DPOTrainer._prepare_dataset(trainer, rows, tokenizer, args, "train"))
    assert len(made) == len(rows)


def job(who: str, path: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Prints, as the last line, what one of them took: seconds by part, peak memory, bytes that its cache grew by."""
    cache, found = Path(os.environ["HF_DATASETS_CACHE"]), dict[str, float]()

    def measure(name: str, work: Callable[[], object]) -> object:
        wall, cpu = time.perf_counter(), time.process_time()
        made = work()
        found[f"{name}_s"], found[f"{name}_wall_s"] = time.process_time() - cpu, time.perf_counter() - wall
        return made

    work = {"ours": tiny_ours, "trl": tiny_trl}[who]
    write_tiny(first := Path(path).with_name("first.jsonl"), 100, "chats" in path)
    work(str(first), tokenizer, lambda _, one: one())  # imports, threads
    measure("read", lambda: read_rows(path))  # and both find it in the cache
    before, peak = bytes_in(cache), peak_mib()
    work(path, tokenizer, measure)
    print(json.dumps({**found, "cache_bytes": bytes_in(cache) - before, "before_mib": peak, "peak_mib": peak_mib()}))


def bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def peak_mib() -> float:
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))) / 1024


def tiny(kind: str, count: int, tokenizer: str) -> dict[str, Any]:
    """Returns what `job` finds, and the ratio."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as home:
        write_tiny(path := Path(home, f"{kind}.jsonl"), count, kind == "chats")
        for who in ("ours", "trl"):
            command = [sys.executable, __file__, "--job", who, str(path), "--tokenizer", tokenizer]
            env = {**os.environ, "HF_DATASETS_CACHE": f"{home}/{who}"}
            done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
            found[who] = {name: round(value, 3) for name, value in json.loads(done.stdout.splitlines()[-1]).items()}
    whole = found["ours"]["prepare_s"] + found["ours"]["prepare_look_s"]
    found |= {"us_a_row": round(1e6 * whole / count, 1), "ratio_to_trl": round(whole / found["trl"]["prepare_s"], 3)}
    print(f"{count:,} rows, {kind}: {found}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", default=str(quickstart.model_path()))
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, nargs="*", default=[30_000, 300_000])
    parser.add_argument("--tiny", type=int, nargs="*", default=[])
    parser.add_argument("--tiny_chats", type=int, nargs="*", default=[])
    parser.add_argument("--job", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--output", default=str(HERE / "results" / "preparation_cpu.json"))
    args = parser.parse_args()
    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    if args.job:
        job(*args.job, tokenizer)
        return
    if args.tiny or args.tiny_chats:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        about = {"device": "CPU", "versions": framework_versions(), "commit": commit.stdout.strip()}
        file = HERE / "results" / "preparation_tiny_cpu.json"
        kept = json.loads(file.read_text())["results"] if file.exists() else {}  # of other sizes
        for kind, counts in {"text": args.tiny, "chats": args.tiny_chats}.items():
            for count in counts:
                of_kind = {**kept.get(kind, {}), str(count): tiny(kind, count, args.tokenizer)}
                kept[kind] = dict(sorted(of_kind.items(), key=lambda item: int(item[0])))
                first = next(iter(kept[kind].values()))["us_a_row"]
                for of_size in kept[kind].values():
                    of_size["one_costs_times_as_much_as_at_first"] = round(of_size["us_a_row"] / first, 3)
                facts = {**about, "tokenizer": Path(args.tokenizer).name, "results": kept}
                file.write_text(json.dumps(facts, indent=1) + "\n")
        return
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
