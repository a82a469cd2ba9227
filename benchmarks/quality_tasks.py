"""The tasks of quality.py: their rows, which of them are held out, and what a completion is worth."""

import json
import random
import statistics
from functools import cache
from itertools import permutations
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_peft import from_alpaca, from_oasst_tree, from_pandalm, from_tulu, quickstart
from dpo_peft.data import pandalm_decided
from dpo_peft.quickstart.sampling import sample_answers
from dpo_peft.rowfiles import READERS, ending
from dpo_peft.suites.checkers import KINDS
from dpo_peft.suites.instructions import make_prompts, reward

Run = dict[str, Any]
DRAWN = ("sentiment", "instructions")  # tasks whose pairs are the model's own
SAMPLES, AT_ONCE = 4, 512  # completions of a prompt; prompts in a batch
UNSEEN = list(KINDS)[::3]  # kinds of instructions that are never trained on
FILES = {
    "labels": [
        "tulu-human-eval/tulu1_human_eval.jsonl",
        "pandalm-testset/testset-v1.json",
        "oasst-en-tree/en_100_tree.jsonl",
    ],
    "rewrites": ["rasbt-instruction-preference/instruction-data-with-preference.json"],
}
LONGEST = {"cpu": 900, "cuda": 6000}  # characters of a judged pair as it is written
PLACES = (
    "the harbor hotel; the new noodle bar; the museum of clocks; a guided walk in the old town; the night bus; "
    "the corner bakery; a cooking class; the repair shop on Mill Lane; the open-air cinema; the city pool; "
    "a weekend on the farm; the second-hand bookshop; the ferry to the islands; a jazz evening; the zoo; "
    "the new phone; this pair of boots; the folding bicycle; a garden chair; the coffee machine; "
    "the documentary on bees; this detective novel; the puzzle game; a course on bread; the mountain hut"
).split("; ")
OPENINGS = (
    "We tried {} last week, and; About {} I can say that; After all the talk about {}, I; So here is {}:; "
    "My sister gave me {} for my birthday, and; I had waited a year for {}, then; Let me tell you about {}.; "
    "I had not expected that {}; What I remember of {} is; Nobody warned me that {}; For the price, {}; "
    "It was raining when we came to {}, and; I went back to {} because; If you are thinking of {}, then"
).split("; ")


class Task(NamedTuple):
    """Says how a task is trained and judged."""

    judged: tuple[int, ...]  # after these steps; the last one ends the training
    pairs: int  # a step
    rate: float
    beta: float
    held_out: int  # pairs, or prompts
    levels: tuple[float, ...]  # of KL, in nats a completion, at which the frontiers are compared
    tokens: int = 0  # of a sampled completion; 0: held-out pairs are judged instead


TASKS = {
    "quickstart": Task((12, 20, 32), 8, 6e-4, 0.5, 128, (0.7, 2.0), 96),
    "sentiment": Task((8, 16, 24), 8, 3e-4, 0.1, 64, (1.0, 4.0), 32),
    "instructions": Task((12,), 4, 5e-4, 0.1, 50, (), 64),
    "labels": Task((10,), 8, 3e-4, 0.1, 96, ()),
    "rewrites": Task((4, 8), 4, 5e-4, 0.1, 56, (0.5,)),
}


@cache
def vader() -> Any:
    """Returns the lexicon that judges a text's mood, from -1 to 1 (Hutto and Gilbert 2014)."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def rewards(task: str, rows: list[Run], texts: list[str]) -> list[float]:
    """Returns what a completion of each row's prompt is worth."""
    if task == "instructions":
        return reward(texts, instruction=[row["instruction"] for row in rows])
    if task == "sentiment":
        return [vader().polarity_scores(text)["compound"] for text in texts]
    return [quickstart.true_reward(text) for text in texts]


# ---- The model's own pairs


def asked(task: str, times: int) -> tuple[list[Run], list[Run]]:
    """Returns prompts to train on and those held out, in an order of no meaning."""
    if task == "sentiment":
        texts = [f"Continue this review in two sentences: {one.format(place)}" for one in OPENINGS for place in PLACES]
        random.Random(0).shuffle(texts)
        rows, cut = [{"prompt": text} for text in texts], 3 * TASKS[task].held_out
        return rows[cut:], rows[:cut]
    test = make_prompts(1, times * TASKS[task].held_out)
    held = {row["prompt"] for row in test}
    drawn = {row["prompt"]: row for row in make_prompts(0, 3 * len(test)) if row["prompt"] not in held}
    train = [row for row in drawn.values() if json.loads(row["instruction"])["kind"] not in UNSEEN]
    random.Random(0).shuffle(train)
    return train, test


def draw_pairs(task: str, file: Path, model: str, device: str, times: int = 1) -> None:
    """Writes the rows of a task: of the model's completions of a prompt the best and the worst, and of those that are
    as good or as bad the two that are nearest in length. Held-out instructions are prompts alone."""
    train, test = (
        [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in part]
        for part in asked(task, times)
    )
    sampled = train if task == "instructions" else [*test, *train]
    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(device).eval()
    columns = []
    for seed in range(SAMPLES):
        answers = []
        for start in range(0, len(sampled), AT_ONCE):
            prompts = [row["prompt"] for row in sampled[start : start + AT_ONCE]]
            answers += sample_answers(base, tokenizer, prompts, seed, TASKS[task].tokens)
        columns.append(tokenizer.batch_decode(answers, skip_special_tokens=True))
    worth = [rewards(task, sampled, texts) for texts in columns]
    pairs = []
    for row, texts, values in zip(sampled, zip(*columns, strict=True), zip(*worth, strict=True), strict=True):
        every = permutations(zip(texts, values, strict=True), 2)
        (better, high), (worse, low) = min(
            every, key=lambda two: (two[1][1] - two[0][1], abs(len(two[0][0]) - len(two[1][0])))
        )
        if high > low and worse.strip():
            sides = {"chosen": better, "rejected": worse}
            pairs.append(
                {"prompt": row["prompt"], **{k: [{"role": "assistant", "content": v}] for k, v in sides.items()}}
            )
    if task == "sentiment":
        held = [row["prompt"] for row in test]
        test = [row for row in pairs if row["prompt"] in held]
        pairs = [row for row in pairs if row["prompt"] not in held]
    file.write_text(json.dumps({"train": pairs, "test": test}, indent=0), "utf-8")


# ---- Rows


def read_pairs(task: str, data: list[str], held_out: int, device: str) -> tuple[list[Run], list[Run]]:
    """Returns the rows of a task to train on and those held out, no prompt in both."""
    if task == "quickstart":
        files = [Path(file).read_text("utf-8") for file in (quickstart.train_file(), quickstart.test_file())]
        # A sampled completion in each file opens a turn itself, where an answer-only adapter would begin anew.
        lines = ([line for line in file.splitlines() if "<|im_start|>" not in line] for file in files)
        train, test = ([json.loads(line) for line in one] for one in lines)
        return train, test[:held_out]
    if task in DRAWN:
        rows = json.loads(Path(data[0]).read_text("utf-8"))
        return rows["train"], rows["test"][:held_out]
    given = [row for file in data for _, row in READERS[ending(file)](Path(file))]
    if task == "labels":
        found = [pair for row in given for pair in judged_pairs(row) if len(str(pair)) <= LONGEST[device]]
    else:
        found = [from_alpaca(row) for row in given if row["chosen"] != row["rejected"]]
    random.Random(0).shuffle(found)
    # One pair of each held-out prompt: those of one prompt are not independent.
    held: dict[str, Run] = {}
    for row in found:
        if len(held) < held_out:
            held.setdefault(json.dumps(row["prompt"]), row)
    train = [row for row in found if json.dumps(row["prompt"]) not in held]
    if not train:
        raise SystemExit(f"--times: nothing is left to train on, as there are {len(held)} prompts. Take fewer.")
    return train, [*held.values()]


def judged_pairs(row: Run) -> list[Run]:
    """Returns the pairs of a row of the Tulu human evaluation, of PandaLM's test set or of OASST's trees: what people
    preferred, and what they liked least. There is none if they were tied, or where an answer is no text."""
    if "preference" in row:
        pair = from_tulu(row)
        share, sides = pair["preference"], [pair["chosen"], pair["rejected"]]
        found = [] if share == 0.5 else [(pair["prompt"], *(sides if share > 0.5 else sides[::-1]))]
    elif "annotator1" in row:
        known = pandalm_decided(row) and isinstance(row["response1"], str) and isinstance(row["response2"], str)
        found = [tuple(from_pandalm(row).values())] if known else []
    else:
        groups = [
            (g["prompt"], sorted(zip(g["ranks"], g["completions"], strict=True), key=itemgetter(0)))
            for g in from_oasst_tree(row)
        ]
        found = [(prompt, ranked[0][1], ranked[-1][1]) for prompt, ranked in groups if ranked[0][0] < ranked[-1][0]]
    pairs = [dict(zip(("prompt", "chosen", "rejected"), one, strict=True)) for one in found]
    texts = [[pair[side][0]["content"].strip() for side in ("chosen", "rejected")] for pair in pairs]
    return [pair for pair, (better, worse) in zip(pairs, texts, strict=True) if better and worse and better != worse]


def lengths(pairs: list[Run]) -> dict[str, float]:
    """Returns how many pairs there are, their mean words, and how often the better one is longer."""
    words = [[len(row[side][0]["content"].split()) for side in ("chosen", "rejected")] for row in pairs]
    better, worse = ([two[side] for two in words] for side in (0, 1))
    longer = statistics.mean((a > b) + (a == b) / 2 for a, b in words)
    found = {
        "words_chosen": statistics.mean(better),
        "words_rejected": statistics.mean(worse),
        "chosen_longer": longer,
    }
    return {"pairs": len(pairs), **{name: round(value, 3) for name, value in found.items()}}
