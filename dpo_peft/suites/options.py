"""The options of `dpo-peft eval`. Nothing slow is imported here: a help should not wait."""

from dataclasses import dataclass, field

from ..model.options import AdapterOptions, option


@dataclass(frozen=True)
class EvalOptions(AdapterOptions):
    """What is evaluated, and by which suites."""

    adapter: str = option("", "Folder or Hub id of an adapter, or of a model.")
    suites: list[str] = field(
        default_factory=lambda: ["instructions", "neutral"],
        metadata={
            "help": "pairs:FILE, instructions, neutral, judge (the last three take a FILE too), or your own: "
            "package.module:function or file.py:function. Default: instructions neutral."
        },
    )
    limit: int | None = option(None, "Take the first so many rows, prompts or texts of each suite.")
    max_new_tokens: int = option(256, "Longest completion; they take the likeliest token each time.")
    batch_size: int = option(16, "Completions that are made at once.")
    max_tokens: int = option(16384, "Tokens of a forward pass: lower it if memory runs out.")
    seed: int = option(0, "Of the prompts of instructions, and of the bootstrap.")
    dataset_split: str = option("test", "Split of the pairs of a Hub dataset.")
    unneeded_columns: list[str] | None = option(None, "Columns of pairs with text that may stay unread.")
    judge_url: str | None = option(None, "OpenAI-compatible server, such as http://localhost:8000/v1.")
    judge_model: str | None = option(None, "Its model.")
    api_key: str | None = option(None, "Key of the server; OPENAI_API_KEY keeps it out of the list of processes.")
    output: str | None = option(None, "The JSON file. Default: eval.json in the adapter's folder, or else here.")
    overwrite: bool = option(False, "Replace output.")
    json: bool = option(False, "Print the result as JSON.")
