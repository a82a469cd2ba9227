"""Near duplicates and leaks on real rows: what is there, what of planted ones is found, and how long it takes.

    python benchmarks/near_duplicates.py DATA.jsonl [--scale 20000]

DATA is a file of preference rows, such as harmless-base/test.jsonl.gz of HH. A twentieth of the rows is planted anew
with one to four words of each text changed: recall is over those that a comparison of all with all finds to be as
alike as that. A tenth is looked at as held out, with planted ones of the rest. `--scale` rows are put together of the
set's sentences, for the time. Writes benchmarks/results/near_duplicates.json.
"""

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

from datasets import Dataset

from dpo_peft.files import read_rows
from dpo_peft.preview import look
from dpo_peft.preview.near import SIMILAR, Near, jaccard
from dpo_peft.preview.reading import Item

RESULTS = Path(__file__).parent / "results" / "near_duplicates.json"


def items(rows: Dataset) -> list[Item]:
    """Returns prompt and completions of rows, as texts: HH transcripts part before the last turn."""
    found = []
    for n, row in enumerate(rows):
        prompt = row.get("prompt") or row["chosen"].rpartition("\n\nAssistant:")[0]
        both = [row[side].removeprefix(prompt) for side in ("chosen", "rejected")]
        found.append(Item(n, prompt=prompt, completions=both))
    return found


def changed(item: Item, row: int, draw: random.Random) -> Item:
    """Returns a row with one to four words of each text changed."""

    def change(text: str) -> str:
        words = text.split()
        for _ in range(draw.randint(1, 4) if words else 0):
            words[draw.randrange(len(words))] = f"word{draw.randrange(1000)}"
        return " ".join(words)

    return Item(row, prompt=change(item.prompt), completions=[*map(change, item.completions)])


def near(some: list[Item]) -> Near:
    found = Near()
    for item in some:
        found.add(item)
    return found


def by_all(some: Near, known: Near) -> set[int]:
    """Returns the rows of some that are as alike to one that is known, by comparing all with all."""
    whole, of_known = some._whole(), known._whole()
    return {
        row
        for i, row in enumerate(some.rows)
        if any(
            jaccard(whole[i], of_known[j]) >= SIMILAR and jaccard(some.completions[i], known.completions[j]) >= SIMILAR
            for j in range(len(of_known))
        )
    }


def main(file: str, scale: int) -> None:
    draw, rows = random.Random(0), read_rows(file)
    repeats = look(rows).facts["repeats"]
    result: dict[str, Any] = {"rows": len(rows), "found": {n: repeats[n] for n in ("duplicates", "near_duplicates")}}
    every = items(rows)
    train, held_out = every[: len(every) * 9 // 10], every[len(every) * 9 // 10 :]
    planted = [changed(one, len(every) + n, draw) for n, one in enumerate(draw.sample(train, len(every) // 20))]
    known, others = near(train), near([*held_out, *planted])
    prompts, whole = known.leaks(others)
    truth, found = by_all(others, near(train)), {row for row, _ in whole}
    marked = {one.row for one in planted}
    result["leaks"] = {
        "compared": len(train) * len(others.rows),
        "planted": len(planted),
        "planted_and_as_alike": len(truth & marked),
        "recall": len(found & truth) / len(truth),
        "precision": len(found & truth) / len(found),
        "not_planted": sorted(found - marked)[:5],
        "near_prompts": len(prompts),
    }
    sentences = [one for item in every for text in [item.prompt, *item.completions] for one in text.split(".") if one]
    some = [
        Item(n, prompt=". ".join(draw.sample(sentences, 4)), completions=[". ".join(draw.sample(sentences, 6))] * 2)
        for n in range(scale)
    ]
    some = [one if n % 20 else changed(some[n - 1], n, draw) for n, one in enumerate(some)]
    started = time.process_time()
    found_near = len((made := near(some)).rows_in())
    seconds = time.process_time() - started
    words = sum(len(text.split()) for one in some for text in [one.prompt, *one.completions])
    result["scale"] = {"rows": scale, "words_a_row": words / scale, "cpu_seconds": seconds, "near": found_near}
    result["scale"]["shingles"] = sum(map(len, made._whole()))
    RESULTS.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[3]) if "--scale" in sys.argv else 20_000)
