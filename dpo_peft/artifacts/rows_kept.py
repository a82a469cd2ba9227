"""What is recorded of the data for those who judge a run: how long its rows are, the held-out pairs that the adapter
judges most wrongly, and prompts as the turns of a conversation."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from matplotlib.ticker import MaxNLocator
from transformers import PreTrainedTokenizerBase

from ..data.images import Images
from ..files import write_rows
from ..training.pictures import keep_pictures

WORST_PAIRS, MOST_WORST = "worst_pairs.jsonl", 10
# A role that a chat template writes between special tokens is a word of its own line once they are stripped; Llama 3's
# last one follows the text.
_ROLE = re.compile(r"^(system|user|assistant|model|tool)\n+", flags=re.M)
_NAMED = re.compile(r"^(system|user|assistant): ", flags=re.M)  # as samples are recorded now
_BEGINS, _ENDS = re.compile(r"(system|user)\n"), re.compile(r"(assistant|model)\s*$")


def turns(prompt: str) -> list[tuple[str, str]]:
    """Returns (role, text) of the turns of a prompt. Text that is no chat, as far as that can be seen from its bare
    role words, is one turn without a role."""
    text = prompt.strip("\n")
    if _NAMED.match(text) and len(_NAMED.findall(text)) > 1:
        _, *parts = _NAMED.split(text)
    elif _BEGINS.match(text) and _ENDS.search(text):
        _, *parts = _ROLE.split(_ENDS.sub("", text) + "\n")
    else:
        return [("", text)]
    return [(role, said.strip("\n")) for role, said in zip(parts[::2], parts[1::2], strict=True)]


def spoken(prompt: str) -> str:
    """Returns a prompt with each turn under the name of its role; a question alone needs none."""
    said = turns(prompt)
    return said[0][1] if len(said) == 1 else "\n\n".join(f"{role}: {text}" for role, text in said)


def length_counts(rows: object) -> dict[str, list[int]] | None:
    """Returns how many prompts, completions and whole rows (the prompt and the longest completion) of a prepared
    dataset have how many tokens: `edges` of bins, and the counts of each name. None for a stream."""
    if not isinstance(rows, Dataset) or not len(rows):
        return None
    found: dict[str, list[np.ndarray]] = {}
    for batch in rows.select_columns(["prompt_ids", "completion_ids"]).with_format("arrow").iter(10_000):
        prompts, completions = (batch[name].combine_chunks() for name in batch.column_names)
        prompt, number = (np.asarray(pc.list_value_length(column)) for column in (prompts, completions))
        lengths = np.asarray(pc.list_value_length(pc.list_flatten(completions)))
        paired = (number == 2).all()
        sides = {"chosen": lengths[::2], "rejected": lengths[1::2]} if paired else {"completion": lengths}
        longest = np.maximum.reduceat(lengths, np.cumsum(number) - number)
        for name, values in {"prompt": prompt, **sides, "whole row": prompt + longest}.items():
            found.setdefault(name, []).append(values)
    joined = {name: np.concatenate(parts) for name, parts in found.items()}
    ticks = MaxNLocator(nbins=24, integer=True, steps=[1, 2, 2.5, 5, 10]).tick_values(0, joined["whole row"].max() + 1)
    edges = [int(tick) for tick in ticks if tick >= 0]
    return {"edges": edges, **{name: np.histogram(of, edges)[0].tolist() for name, of in joined.items()}}


def write_worst_pairs(
    folder: Path, datasets: Mapping[str, object], tokenizer: PreTrainedTokenizerBase, images: Images | None = None
) -> None:
    """Writes the texts of the pairs that the newest evaluation in `eval_examples.jsonl` judges most wrongly, beside
    it: `worst_pairs.jsonl`, which the adapter is not published with.

    Args:
        folder: of both files.
        datasets: name of an evaluation, as its pairs have it, to its prepared rows.
        tokenizer: that they were made with.
        images: the processor, if they may hold images, whose pictures are kept too.
    """
    examples = folder / "eval_examples.jsonl"
    lines = examples.read_text("utf-8").splitlines() if examples.is_file() else []
    worst = []
    for name, pairs in wrong_pairs([json.loads(line) for line in lines]).items():
        if isinstance(rows := datasets.get(name), Dataset):
            place = {number: at for at, number in enumerate(rows["row"])}
            for pair in pairs[:MOST_WORST]:
                row = rows[place[pair["row"]]]
                texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in row["completion_ids"]]
                prompt = tokenizer.decode(row["prompt_ids"], skip_special_tokens=True)
                known = {"step": pair["step"], "dataset": name, "row": pair["row"]}
                if row.get("images"):
                    known["images"] = keep_pictures(folder, images, [row])[0]
                worst.append({**known, "prompt": prompt, "chosen": texts[0], "rejected": texts[1]})
    if worst:
        write_rows(folder / WORST_PAIRS, worst)


def wrong_pairs(examples: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Returns dataset -> the pairs of its newest evaluation whose rejected completion has the higher reward, the
    largest margin first; rewards may be None or NaN."""
    found: dict[str, list[dict[str, Any]]] = {}
    newest: dict[str, int] = {}
    for row in examples:
        newest[row["dataset"]] = max(row["step"], newest.get(row["dataset"], 0))
    for row in examples:
        rewards = row["reward_chosen"], row["reward_rejected"]
        if row["step"] == newest[row["dataset"]] and None not in rewards and -math.inf < rewards[0] - rewards[1] < 0:
            found.setdefault(row["dataset"], []).append(row)
    return {
        name: sorted(of, key=lambda row: row["reward_chosen"] - row["reward_rejected"]) for name, of in found.items()
    }
