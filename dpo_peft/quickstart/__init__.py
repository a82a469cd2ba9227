"""The quickstart's embedded default: a small chat model, preference pairs sampled from it, and their true reward.

`recipes/build_quickstart_model.py` rebuilds the model and the pairs from a grammar.
"""

import json
from pathlib import Path

from .fluency import known_trigram_share
from .reward import review_reward, true_reward

__all__ = [
    "config_file",
    "eval_prompts",
    "known_trigram_share",
    "model_path",
    "review_reward",
    "test_file",
    "train_file",
    "true_reward",
]

_HERE = Path(__file__).parent


def config_file() -> str:
    """Returns the options of the demo: recipes/quickstart.yaml of a checkout, which the wheel holds here."""
    file = "quickstart.yaml"
    return str(_HERE / file if (_HERE / file).is_file() else _HERE.parents[1] / "recipes" / file)


def model_path() -> str:
    """Returns the folder of the small Llama with tokenizer and chat template, for `from_pretrained`."""
    return str(_HERE / "model")


def train_file() -> str:
    """Returns a file of preference pairs, JSON lines of prompt, chosen, rejected, chosen_reward, rejected_reward."""
    return str(_HERE / "data" / "train.jsonl")


def test_file() -> str:
    """Returns a file of held-out pairs like those of `train_file`; no subject of a prompt is in both."""
    return str(_HERE / "data" / "test.jsonl")


def eval_prompts() -> list[list[dict[str, str]]]:
    """Returns the held-out prompts, each a list of chat messages, in the order of `test_file`."""
    with open(test_file(), encoding="utf-8") as lines:
        return [json.loads(line)["prompt"] for line in lines]
