"""The options of `make_pairs` and `dpo-peft pairs`. Nothing slow is imported here: a help should not wait."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from ..errors import OptionError
from ..files import CONVERTERS, check_output
from ..model.options import option
from .rejection_sampling import MATCHES
from .worklog import unfinished

METHODS = ("best_worst", "all", "rso")
SAMPLING = (
    "model num_candidates temperature top_p top_k max_new_tokens batch_size engine gpu_memory_utilization base "
    "quantize dtype check_base revision require_finished"
).split()
RSO = "rso_beta rso_accept rso_pairs sft_output".split()
JUDGES = "reward reward_model implicit_reward score_column".split()


@dataclass
class PairsOptions:
    """What to sample, who judges, and how pairs are made.

    Raises:
        OptionError: a value out of range.
    """

    model: str | None = option(None, "Folder or Hub id of a model or an adapter. Not with completions in the file.")
    prompts: str | None = option(
        None, "Hub id, or a JSON(L), Parquet or CSV file: prompt as text or messages, or pairs."
    )
    output: str | None = option(None, "The pairs: a .jsonl or .parquet file.")
    prompts_split: str = option("train", "Split of a Hub dataset.")
    prompts_config: str | None = option(None, "Configuration of a Hub dataset.")
    dataset_format: str | None = option(
        None, "What the rows are, where their columns don't say it.", choices=list(CONVERTERS)
    )
    column_map: list[str] | None = option(None, "Columns of other names, as old:new, such as question:prompt.")
    max_prompts: int | None = option(None, "Use the first so many rows.")
    as_chat: bool | None = option(
        None,
        "Make prompts that are text the user's turns. Default: as an adapter was trained, and for a model if it has a "
        "chat template and the prompts aren't rendered already.",
    )

    num_candidates: int = option(8, "Completions of each prompt.")
    temperature: float = option(1.0, "Of the sampling; rejection sampling wants 1.")
    top_p: float = option(1.0, "Sample from the likeliest tokens of this total probability.")
    top_k: int = option(0, "Sample from so many likeliest tokens; 0 is no limit.")
    max_new_tokens: int = option(512, "Longest completion.")
    seed: int = option(0, "Each completion has a seed of its own, made from this one.")
    batch_size: int | None = option(None, "Completions that are sampled at once: 32, or 512 with vllm, if not given.")
    engine: str = option("transformers", "Who samples.", choices=("transformers", "vllm"))
    gpu_memory_utilization: float | None = option(None, "Share of the GPU for vllm.")

    reward: str | None = option(None, "Reward function of TRL's signature: package.module:name or file.py:name.")
    reward_model: str | None = option(None, "Folder or Hub id of a sequence classifier with one output.")
    implicit_reward: str | None = option(None, "Folder or Hub id of a preference-trained adapter.")
    score_column: str | None = option(None, "Column with a score for each of `completions`, higher is better.")

    method: str = option("best_worst", "How pairs are made.", choices=METHODS)
    min_margin: float = option(0.0, "Least difference of the rewards of a pair.")
    max_pairs: int | None = option(None, "Pairs of a prompt, with method all.")
    require_finished: bool | None = option(
        None, "Leave out completions that max_new_tokens cut off: true if not given."
    )
    rso_beta: float = option(0.5, "Accept with probability exp((reward - best) / rso_beta).")
    rso_accept: int = option(4, "Completions that rejection sampling accepts per prompt.")
    rso_pairs: str = option("first_round", "Pairs of the accepted ones.", choices=list(MATCHES))
    sft_output: str | None = option(
        None, "The accepted completions as prompt and completion: a .jsonl or .parquet file."
    )
    lists_output: str | None = option(
        None, "All usable completions as prompt, completions, scores: a .jsonl or .parquet file."
    )

    base: str | None = option(None, "An adapter's base, if it isn't where its config says.")
    quantize: bool | None = option(None, "Load in 4 bits: as an adapter was trained, true for a model, if not given.")
    dtype: str | None = option(None, "Dtype of what isn't quantized: as trained, or bfloat16, if not given.")
    check_base: bool = option(True, "The base must be the one that the adapter was trained on, weight for weight.")
    revision: str | None = option(None, "Branch, tag or commit of the model on the Hub.")
    trust_remote_code: bool = option(False, "Run code that ships with a model.")
    overwrite: bool = option(False, "Replace output, and begin unfinished work anew.")
    json: bool = option(False, "Print the summary as JSON.")

    def __post_init__(self) -> None:
        counts = ("num_candidates", "max_new_tokens", "batch_size", "max_prompts", "max_pairs")
        for name, right, must in (
            ("method", self.method in METHODS, f"be one of {', '.join(METHODS)}"),
            ("rso_pairs", self.rso_pairs in MATCHES, f"be one of {', '.join(MATCHES)}"),
            ("min_margin", 0 <= self.min_margin < math.inf, "be 0 or above"),
            ("rso_beta", 0 < self.rso_beta < math.inf, "be a number above 0"),
            ("rso_accept", self.rso_accept >= 2, "be at least 2, to make a pair"),
            *((name, (number := getattr(self, name)) is None or number >= 1, "be at least 1") for name in counts),
        ):
            if not right:
                raise OptionError(f"{name}={getattr(self, name)!r} must {must}.")

    @property
    def judge(self) -> dict[str, str]:
        """The options that name a judge, and their values."""
        return {name: value for name in JUDGES if (value := getattr(self, name)) is not None}

    @property
    def outputs(self) -> dict[str, Path]:
        """The files to write, by option.

        Raises:
            OptionError: another ending, or a folder.
        """
        named = {name: getattr(self, name) for name in ("output", "sft_output", "lists_output")}
        return {name: check_output(name, path) for name, path in named.items() if path is not None}

    def check(self) -> None:
        """Refuses files that are missing, or in the way, before anything is read.

        Raises:
            OptionError: naming the first one.
        """
        for name in ("prompts", "output"):
            if not getattr(self, name):
                raise OptionError(f"{name} is missing: give it by --{name} or in the config file.")
        outputs = self.outputs
        for name, path in outputs.items():
            check_output(name, path, [self.prompts or ""])
        if len({path.resolve() for path in outputs.values()}) < len(outputs):
            raise OptionError(f"{', '.join(outputs)} name the same file: give each its own.")
        resumes = unfinished(outputs["output"]).is_file()
        for name, path in outputs.items():
            if path.exists() and not self.overwrite and not resumes:
                raise OptionError(f"{name}={str(path)!r} is there already: give another name, or --overwrite.")

    def check_for(self, columns: Sequence[str]) -> None:
        """Refuses options that go ill with the rows' columns or with each other, and those that would do nothing.

        Raises:
            OptionError: naming them.
        """
        given = "completions" in columns
        if len(self.judge) != 1:
            scored = given and "scores" in columns and not self.judge
            hint = " The rows have scores: --score_column scores." if scored else ""
            what = f"{', '.join(self.judge)} are given" if self.judge else "no judge is given"
            raise OptionError(f"{what}: give one of {', '.join(JUDGES)}.{hint}")
        if not given and self.model is None:
            raise OptionError(
                "model is missing: give a folder or Hub id to sample from, or rows with completions in 'completions'."
            )
        for names, idle, why in (
            (SAMPLING, given, "the rows have completions in 'completions' already"),
            (RSO, self.method != "rso", f"method is {self.method!r} and not 'rso'"),
            (["max_pairs"], self.method != "all", f"method is {self.method!r} and not 'all'"),
            (["gpu_memory_utilization"], self.engine != "vllm", "engine is not 'vllm'"),
        ):
            changed = [f.name for f in fields(self) if f.name in names and getattr(self, f.name) != f.default]
            if idle and changed:
                raise OptionError(f"{', '.join(changed)}: no effect, {why}. Leave it out.")
        if not given and self.num_candidates < 2:
            raise OptionError("num_candidates must be at least 2, to make a pair.")
        if not given and self.method == "rso" and self.rso_accept > self.num_candidates:
            raise OptionError(
                f"rso_accept={self.rso_accept} is more than num_candidates={self.num_candidates}: nothing would be "
                "rejected. Sample more, or accept fewer."
            )
