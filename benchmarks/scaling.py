"""The figures of docs/scaling.md: what 8, 64 and 512 processes and 100 million pairs cost, simulated and computed.

    python benchmarks/scaling.py --tokenizer <folder or id> --rows <file of preference rows>

Simulated here, in CPU time of one process: the rows of a file, prepared, are read and shared out as each of so many
processes does it in every step; a stream of them is prepared, and skipped as a run that is resumed does it; an order
of the rows is drawn; the caches of several machines are filled in one pass and asked in the next. Computed: bytes that
cross and the time they take by bandwidth, against the time of the products. Writes
benchmarks/results/scaling_cpu.json.
"""

import argparse
import gc
import itertools
import json
import os
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_CACHE", tempfile.mkdtemp())  # before datasets is imported

import torch
from datasets import concatenate_datasets, disable_progress_bars
from transformers import AutoTokenizer

from dpo_peft.artifacts.card import framework_versions
from dpo_peft.data import prepare_dataset, rows_digest
from dpo_peft.data.collator import PreferenceCollator
from dpo_peft.files import read_rows
from dpo_peft.training.packing import longest_first

RESULT = Path(__file__).parent / "results" / "scaling_cpu.json"
PROCESSES, PER_DEVICE = (8, 64, 512), 8
SIDES = ("chosen_ids", "rejected_ids")
# hidden, inner, layers, width of keys and values, vocabulary
SHAPES = {"8B": (4096, 14336, 32, 1024, 128256), "70B": (8192, 28672, 80, 1024, 128256)}
RANK = 16
# Bytes a second and card: within a machine; between machines, 400 Gbit/s a card, and 100; a card's PCIe 4.0 slot.
LINKS = {"NVLink": 400e9, "400 Gbit/s": 45e9, "100 Gbit/s": 11e9, "PCIe 4.0 x16": 25e9}
# FLOP a second that products reach, about 40 % of the peak in 16 bits.
RATES = {"H100": 400e12, "RTX 4090": 66e12}
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def sizes(row: dict[str, Any]) -> int:
    return len(row["prompt_ids"]) + sum(map(len, row["completion_ids"]))


def simulate_step(prepared: Any, processes: int) -> dict[str, float]:
    """Returns what a process spends on its part of a step, and how level the parts of all are in tokens."""
    random_, number = random.Random(0), processes * PER_DEVICE
    indices = [random_.randrange(len(prepared)) for _ in range(number)]
    rows: list[Any] = []
    read = seconds(lambda: rows.extend(prepared.__getitems__(indices)))
    lengths = [sizes(row) for row in rows]
    shares: list[list[int]] = []

    def share() -> None:
        order = sorted(range(number), key=lambda i: -lengths[i])
        shares.extend(longest_first(order, lengths, processes))

    shared = seconds(share)
    assert sorted(itertools.chain(*shares)) == list(range(number))
    tokens = [sum(lengths[i] for i in share) for share in shares]
    in_turn = [sum(lengths[rank::processes]) for rank in range(processes)]
    own, collate = [indices[i] for i in shares[0]], PreferenceCollator()
    return {
        "rows_of_a_step": number,
        "read_ms": 1e3 * read,
        "share_ms": 1e3 * shared,
        "read_own_only_ms": 1e3 * seconds(lambda: prepared.__getitems__(own)),
        "collate_own_ms": 1e3 * seconds(lambda: collate([rows[i] for i in shares[0]])),
        "slowest_over_mean_by_tokens": max(tokens) / statistics.mean(tokens),
        "slowest_over_mean_in_turn": max(in_turn) / statistics.mean(in_turn),
    }


def simulate_stream(rows: Any, tokenizer: Any) -> dict[str, float]:
    """Returns the cost of a row of a stream that is prepared as it is read, and of reading its text alone."""
    stream, summary = prepare_dataset(rows.to_iterable_dataset(), tokenizer)
    taken = min(1000, len(rows))
    each = 1e3 / taken
    prepared = each * seconds(lambda: list(itertools.islice(stream, taken)))
    bare = each * seconds(lambda: list(itertools.islice(rows.to_iterable_dataset(), taken)))
    assert summary.source_rows >= taken
    ids = prepare_dataset(rows.select(range(taken)), tokenizer)[0].map(
        lambda row: {"prompt_ids": row["prompt_ids"], **dict(zip(SIDES, row["completion_ids"], strict=True))},
        remove_columns=["completion_ids", "row"],
    )
    stream, _ = prepare_dataset(ids.to_iterable_dataset(), tokenizer)
    of_ids = 1e3 / len(ids) * seconds(lambda: list(stream))
    return {"prepared_ms_a_row": prepared, "token_ids_ms_a_row": of_ids, "text_alone_ms_a_row": bare}


def simulate_order(number: int) -> dict[str, float]:
    """Draws an order as torch's RandomSampler does."""
    gc.collect()
    before, held = memory(), list[Any]()
    took = seconds(lambda: held.append(torch.randperm(number).tolist()))
    return {"rows": number, "s": took, "bytes_a_row": (memory() - before) / number}


def memory() -> int:
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmRSS"))) * 1024


def simulate_caches(number: int = 100_000) -> dict[str, float]:
    """Returns the share of rows that a machine's own cache has in the second of two passes, by number of machines."""
    found = {}
    for machines in (1, 8, 64):
        random_, kept = random.Random(0), dict[int, int]()
        for _ in range(2):
            order = random_.sample(range(number), number)
            hits = sum(kept.get(row) == place % machines for place, row in enumerate(order))
            kept = {row: place % machines for place, row in enumerate(order)}
        found[str(machines)] = hits / number
    return found


def compute(shape: str) -> dict[str, float]:
    """Returns what a step moves, by the model's shape; times of rings, which take 2 or 1 times (n - 1) / n bytes."""
    hidden, inner, layers, narrow, vocabulary = SHAPES[shape]
    linear = [(hidden, hidden)] * 2 + [(hidden, narrow)] * 2 + [(hidden, inner)] * 3
    weights = layers * sum(a * b for a, b in linear)
    lora = RANK * layers * sum(a + b for a, b in linear)
    found = {"weights_in_layers": weights, "lora_weights": lora, "layer_4bit_MB": weights * NF4_BYTES / layers / 1e6}
    found |= {"base_4bit_GB": weights * NF4_BYTES / 1e9, "base_file_GB": 2 * (weights + 2 * vocabulary * hidden) / 1e9}
    found |= {"gradients_MB": 4 * lora / 1e6, "checkpoint_MB": 3 * 4 * lora / 1e6}
    for link, bandwidth in LINKS.items():
        found[f"all_reduce_ms {link}"] = 1e3 * 2 * 4 * lora / bandwidth
        found[f"gather_base_ms {link}"] = 1e3 * weights * NF4_BYTES / bandwidth
    for card, rate in RATES.items():
        found[f"ms_for_1000_tokens {card}"] = 1e3 * 6 * weights * 1000 / rate
    return found


def hidden_from() -> dict[str, float]:
    """Returns how many tokens of a micro-batch hide two gathers of the base, in the forward and in the backward pass:
    the model's size cancels out, as bytes and products both grow with it."""
    each = {f"{card}, {link}": (rate, bandwidth) for card, rate in RATES.items() for link, bandwidth in LINKS.items()}
    return {name: 2 * NF4_BYTES * rate / (6 * bandwidth) for name, (rate, bandwidth) in each.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--rows", required=True)
    args = parser.parse_args()
    disable_progress_bars()
    tokenizer, rows = AutoTokenizer.from_pretrained(args.tokenizer), read_rows(args.rows)
    prepared, summary = prepare_dataset(rows, tokenizer)
    print(summary)
    prepared = concatenate_datasets([prepared] * 20)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    results = {
        "rows": {"tokens_a_row": summary.total_tokens / summary.kept_rows, "longest": summary.longest},
        "steps": {processes: simulate_step(prepared, processes) for processes in PROCESSES},
        "stream": simulate_stream(rows, tokenizer),
        "digest_ms": 1e3 * seconds(lambda: rows_digest(prepared)),
        "order": [simulate_order(number) for number in (1_000_000, 10_000_000)],
        "hits_in_second_pass_by_machines": simulate_caches(),
        "computed": {shape: compute(shape) for shape in SHAPES},
        "tokens_that_hide_two_gathers": hidden_from(),
    }
    about = {"versions": framework_versions(), "device": "CPU", "commit": commit.stdout.strip()}
    facts = json.loads(json.dumps({**about, "results": results}), parse_float=lambda text: float(f"{float(text):.4g}"))
    RESULT.write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
    print(json.dumps(facts["results"], indent=1))


if __name__ == "__main__":
    main()
