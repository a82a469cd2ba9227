"""The bundled pairs in the form that a kind of data needs: single judged completions, ranked lists, conversations.

Lists are sampled from the bundled model and ranked by the true reward. The other forms only rearrange the pairs.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from ..files import write_rows
from ..model.base import load_base
from ..model.rebuilding import keep_weights
from .reward import true_reward
from .sampling import sample_answers

MOST_LISTS = 320
SHORTEST, LONGEST = 2, 6  # completions of a prompt
SAMPLED_AT_ONCE = 128

Row = dict[str, Any]


def write_form(data: str, pairs_file: str, folder: str | Path, model: str, most_lists: int = MOST_LISTS) -> str:
    """Writes the pairs of `pairs_file` as JSON lines of `data`, the kind an objective learns from; returns the path.

    - "pairs": `pairs_file` itself.
    - "singles": each completion is a row of its own; see `singles`.
    - "lists": new completions of the same prompts; see `ranked_lists`. 320 lists take about a minute on a CPU.
    - "trajectories": two pairs make two conversations of two turns; see `trajectories`.

    Args:
        data: as above.
        pairs_file: JSON lines of prompt, chosen and rejected as chat messages.
        folder: gets the file. One that lies there already is used as it is.
        model: folder of the model that writes the lists.
        most_lists: use the first so many prompts for lists.
    """
    if data == "pairs":
        return pairs_file
    limit = f"-{most_lists}" if data == "lists" else ""
    path = Path(folder) / f"{Path(pairs_file).stem}-{data}{limit}.jsonl"
    if not path.is_file():
        pairs = [json.loads(line) for line in Path(pairs_file).read_text(encoding="utf-8").splitlines()]
        if data == "lists":
            rows = ranked_lists([pair["prompt"] for pair in pairs[:most_lists]], model)
        else:
            rows = {"singles": singles, "trajectories": trajectories}[data](pairs)
        write_rows(path, rows)  # at once: a run that is stopped here leaves no short file behind
    return str(path)


def singles(pairs: Sequence[Row], seed: int = 0) -> list[Row]:
    """Returns every completion by itself, in random order: prompt, completion and label (True for a chosen one)."""
    rows = [
        {"prompt": pair["prompt"], "completion": pair[name], "label": name == "chosen"}
        for pair in pairs
        for name in ("chosen", "rejected")
    ]
    random.Random(seed).shuffle(rows)
    return rows


def trajectories(pairs: Sequence[Row], seed: int = 0) -> list[Row]:
    """Returns each pair followed by another one, as whole conversations in `chosen` and `rejected`.

    The two of a row have the first request in common and part at the first reply. In every third row the first reply
    is the same too, a chosen or a rejected one by turns.
    """
    order = random.Random(seed).sample(range(len(pairs)), len(pairs))
    rows = []
    for number, (i, j) in enumerate(zip(order, [*order[1:], *order[:1]], strict=True)):
        first, second = pairs[i], pairs[j]
        shared = None if number % 3 else ("chosen", "rejected")[number // 3 % 2]
        rows.append(
            {
                name: [*first["prompt"], *first[shared or name], *second["prompt"], *second[name]]
                for name in ("chosen", "rejected")
            }
        )
    return rows


def ranked_lists(prompts: Sequence[list[dict[str, str]]], model: str, seed: int = 0) -> list[Row]:
    """Returns what the model writes for each prompt, with the true rewards: prompt, `completions`, `scores`.

    By turns 2, 3, 4, 5 and 6 completions are sampled. One of a list is the best: another with the same reward is
    left out, and a prompt for which only one remains is left out too.
    """
    base = load_base(model, init_kwargs={"dtype": "float32"}, device=torch.device("cpu"))
    keep_weights(base)
    tokenizer = AutoTokenizer.from_pretrained(model)
    owners = [i for i in range(len(prompts)) for _ in range(SHORTEST + i % (LONGEST - SHORTEST + 1))]
    texts: list[list[str]] = [[] for _ in prompts]
    for start in range(0, len(owners), SAMPLED_AT_ONCE):
        part = owners[start : start + SAMPLED_AT_ONCE]
        answers = sample_answers(base, tokenizer, [prompts[i] for i in part], seed + start)
        for i, text in zip(part, tokenizer.batch_decode(answers, skip_special_tokens=True), strict=True):
            texts[i].append(text)
    rows = [_ranked(prompt, answers) for prompt, answers in zip(prompts, texts, strict=True)]
    return [row for row in rows if row is not None]


def _ranked(prompt: list[dict[str, str]], texts: list[str]) -> Row | None:
    scores = {text: true_reward(text) for text in texts}  # one that was sampled twice counts once
    best = max(scores, key=lambda text: scores[text])
    kept = [text for text in scores if text == best or scores[text] < scores[best]]
    if len(kept) < SHORTEST:
        return None
    completions = [[{"role": "assistant", "content": text}] for text in kept]
    return {"prompt": prompt, "completions": completions, "scores": [scores[text] for text in kept]}
