"""The command `dpo-peft pairs`: sample answers, have them judged, and make preference pairs of them."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import OptionError
from ..files import CONVERTERS, check_output, read_rows
from ..pairs.building import MATCHES, METHODS, Rules
from ..pairs.worklog import unfinished
from .options import parse_options, required, show

if TYPE_CHECKING:
    from ..pairs.engines import ModelSource
    from ..pairs.judges import Judge

ENGINES = ("transformers", "vllm")
EXAMPLES = (
    "dpo-peft pairs outputs/quickstart --prompts prompts.jsonl --output pairs.jsonl --reward rewards.py:reward",
    "dpo-peft pairs Qwen/Qwen3-8B --prompts prompts.jsonl --as_chat --output pairs.jsonl --reward_model NAME",
    "dpo-peft pairs outputs/sft --prompts train.jsonl --output pairs.jsonl --implicit_reward outputs/dpo",
    "dpo-peft pairs outputs/sft --prompts train.jsonl --output pairs.jsonl --reward rewards.py:reward \\\n"
    "      --method rso --num_candidates 64 --rso_accept 8 --rso_beta 0.5 --sft_output accepted.jsonl",
    "dpo-peft pairs --prompts answered.jsonl --score_column scores --method all --max_pairs 3 --output pairs.jsonl",
)
DESCRIPTION = (
    "Samples several answers to each prompt from a model or an adapter, scores them by a reward function, a reward "
    "model or a trained adapter, and writes preference pairs to train on. Answers and scores that the file of prompts "
    "has already are used as they are. A killed run goes on where it was when the same command is given again."
)


@dataclass
class PairsOptions:
    """What to sample, who judges, and how pairs are made."""

    model: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of a model or an adapter. Not with answers in the file."}
    )
    prompts: str | None = field(
        default=None,
        metadata={"help": "Hub id, or a JSON(L), Parquet or CSV file: prompt as text or messages, or pairs."},
    )
    output: str | None = field(default=None, metadata={"help": "The pairs: a .jsonl or .parquet file."})
    prompts_split: str = field(default="train", metadata={"help": "Split of a Hub dataset."})
    prompts_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_format: str | None = field(default=None, metadata={"help": "Convert rows first.", "choices": CONVERTERS})
    max_prompts: int | None = field(default=None, metadata={"help": "Use the first so many rows."})
    as_chat: bool = field(default=False, metadata={"help": "Make a prompt that is text a user's message."})

    num_candidates: int = field(default=8, metadata={"help": "Answers to each prompt."})
    temperature: float = field(default=1.0, metadata={"help": "Of the sampling; rejection sampling wants 1."})
    top_p: float = field(default=1.0, metadata={"help": "Sample from the likeliest tokens of this total probability."})
    top_k: int = field(default=0, metadata={"help": "Sample from so many likeliest tokens; 0 is no limit."})
    max_new_tokens: int = field(default=512, metadata={"help": "Longest answer."})
    seed: int = field(default=0, metadata={"help": "Each answer has a seed of its own, made from this one."})
    batch_size: int | None = field(
        default=None, metadata={"help": "Answers that are sampled at once: 32, or 512 with vllm, if not given."}
    )
    engine: str = field(default="transformers", metadata={"help": "Who samples.", "choices": ENGINES})
    gpu_memory_utilization: float | None = field(default=None, metadata={"help": "Share of the GPU for vllm."})

    reward: str | None = field(
        default=None, metadata={"help": "Reward function of TRL's signature: package.module:name or file.py:name."}
    )
    reward_model: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of a sequence classifier with one output."}
    )
    implicit_reward: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of a preference-trained adapter."}
    )
    score_column: str | None = field(
        default=None, metadata={"help": "Column with a score for each of `completions`, higher is better."}
    )

    method: str = field(default="best_worst", metadata={"help": "How pairs are made.", "choices": METHODS})
    min_margin: float = field(default=0.0, metadata={"help": "Least difference of the rewards of a pair."})
    max_pairs: int | None = field(default=None, metadata={"help": "Pairs of a prompt, with method all."})
    require_finished: bool | None = field(
        default=None, metadata={"help": "Leave out answers that max_new_tokens cut off: true if not given."}
    )
    rso_beta: float = field(default=0.5, metadata={"help": "Accept with probability exp((reward - best) / rso_beta)."})
    rso_accept: int = field(default=4, metadata={"help": "Answers that rejection sampling accepts per prompt."})
    rso_pairs: str = field(
        default="first_round", metadata={"help": "Pairs of the accepted ones.", "choices": list(MATCHES)}
    )
    sft_output: str | None = field(
        default=None, metadata={"help": "The accepted answers as prompt and completion: a .jsonl or .parquet file."}
    )
    lists_output: str | None = field(
        default=None,
        metadata={"help": "All usable answers as prompt, completions, scores: a .jsonl or .parquet file."},
    )

    base: str | None = field(default=None, metadata={"help": "An adapter's base, if it isn't where its config says."})
    quantize: bool | None = field(
        default=None, metadata={"help": "Load in 4 bits: as an adapter was trained, true for a model, if not given."}
    )
    dtype: str | None = field(
        default=None, metadata={"help": "Dtype of what isn't quantised: as trained, or bfloat16, if not given."}
    )
    check_base: bool = field(
        default=True, metadata={"help": "The base must be the one that the adapter was trained on, weight for weight."}
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the model on the Hub."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that ships with a model."})
    overwrite: bool = field(default=False, metadata={"help": "Replace output, and begin unfinished work anew."})
    json: bool = field(default=False, metadata={"help": "Print the summary as JSON."})


SAMPLING = (
    "model num_candidates temperature top_p top_k max_new_tokens batch_size engine gpu_memory_utilization base "
    "quantize dtype check_base revision require_finished"
).split()
NEEDS_RSO = "rso_beta rso_accept rso_pairs sft_output".split()
JUDGES = "reward reward_model implicit_reward score_column".split()
DEFAULTS = {f.name: f.default for f in fields(PairsOptions)}


def pairs(argv: Sequence[str]) -> None:
    """`dpo-peft pairs`: make pairs, and print what became of prompts and answers.

    Raises:
        OptionError, DataError, ReferenceMismatchError: with the remedy.
        SystemExit: stopped by Ctrl-C; what was finished is kept.
    """
    options = parse_options(argv, PairsOptions, "pairs", DESCRIPTION, EXAMPLES)
    result = make_pairs(options)
    show(result, describe(result), options.json)


def make_pairs(options: PairsOptions) -> dict[str, Any]:
    """What `dpo-peft pairs` does, as a function.

    Returns:
        What became of prompts and answers, see `pairs.Tally.summary`; and the files, how many prompts were read from
        unfinished work, and seconds.

    Raises:
        OptionError, DataError, ReferenceMismatchError: as the command.
    """
    required(options, "prompts", "output")
    outputs = _outputs(options)
    rules = _rules(options)
    from ..data.prompts import read_prompts
    from ..pairs.engines import Sampling  # now: a typing error should not wait for the slowest imports
    from ..pairs.run import PairRun

    assert options.prompts is not None
    rows = read_rows(options.prompts, options.prompts_split, options.prompts_config, False, options.dataset_format)
    if options.max_prompts is not None:
        rows = rows.select(range(min(options.max_prompts, len(rows))))
    _check_judge(options, rows.column_names)
    given = "completions" in rows.column_names
    _check_effect(options, given)
    prompts, skipped = read_prompts(rows, options.prompts, options.score_column, options.as_chat)
    if options.as_chat and not isinstance(rows[0].get("prompt"), str):
        raise OptionError("as_chat has no effect: the prompts are messages. Leave it out.")
    if options.overwrite:
        unfinished(outputs["output"]).unlink(missing_ok=True)
    run = PairRun(
        prompts=prompts,
        skipped=skipped,
        name=options.prompts,
        source=None if given else _source(options),
        sampling=Sampling(options.max_new_tokens, options.temperature, options.top_p, options.top_k),
        num_candidates=options.num_candidates,
        seed=options.seed,
        engine=options.engine,
        batch_size=options.batch_size or (512 if options.engine == "vllm" else 32),
        gpu_memory_utilization=options.gpu_memory_utilization,
        load_judge=lambda: load_judge(options),
        judge_name={name: value for name in JUDGES if (value := getattr(options, name)) is not None},
        rules=rules,
        outputs=outputs,
    )
    try:
        return run.run()
    except KeyboardInterrupt:
        print(f"\nStopped. {run.kept()} The same command goes on from there.", file=sys.stderr)
        raise SystemExit(130) from None


def load_judge(options: PairsOptions) -> "Judge | None":
    """The judge that the options name; None for scores that the rows have.

    Raises:
        OptionError: it can't be loaded.
    """
    from ..pairs.judges import RewardModel, load_function

    if options.reward is not None:
        return load_function(options.reward)
    if options.reward_model is not None:
        return RewardModel(options.reward_model, trust_remote_code=options.trust_remote_code)
    if options.implicit_reward is not None:
        from ..reward.implicit import ImplicitReward

        return ImplicitReward(options.implicit_reward)
    return None


def _outputs(options: PairsOptions) -> dict[str, Path]:
    named = {name: getattr(options, name) for name in ("output", "sft_output", "lists_output")}
    outputs = {name: check_output(name, path) for name, path in named.items() if path is not None}
    if len({path.resolve() for path in outputs.values()}) < len(outputs):
        raise OptionError(f"{', '.join(outputs)} name the same file: give each its own.")
    resumes = unfinished(outputs["output"]).is_file()
    for name, path in outputs.items():
        if path.exists() and not options.overwrite and not resumes:
            raise OptionError(f"{name}={str(path)!r} is there already: give another name, or --overwrite.")
    return outputs


def _rules(options: PairsOptions) -> Rules:
    positive = "num_candidates max_new_tokens batch_size max_prompts".split()
    for name in positive:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise OptionError(f"{name}={value} must be at least 1.")
    return Rules(
        method=options.method,
        min_margin=options.min_margin,
        max_pairs=options.max_pairs,
        require_finished=options.require_finished is not False,
        rso_beta=options.rso_beta,
        rso_accept=options.rso_accept,
        rso_pairs=options.rso_pairs,
        seed=options.seed,
    )


def _check_judge(options: PairsOptions, columns: Sequence[str]) -> None:
    given = [name for name in JUDGES if getattr(options, name) is not None]
    if len(given) == 1:
        return
    hint = (
        ""
        if given or not {"completions", "scores"} <= set(columns)
        else " The rows have scores: --score_column scores."
    )
    what = f"{', '.join(given)} are given" if given else "no judge is given"
    raise OptionError(f"{what}: give one of {', '.join(JUDGES)}.{hint}")


def _check_effect(options: PairsOptions, given: bool) -> None:
    """Refuse options that would do nothing."""

    def refuse(names: Sequence[str], why: str) -> None:
        if changed := [name for name in names if getattr(options, name) != DEFAULTS[name]]:
            raise OptionError(f"{', '.join(changed)}: no effect, {why}. Leave it out.")

    if given:
        refuse(SAMPLING, "the rows have answers in 'completions' already")
    elif options.model is None:
        raise OptionError(
            "model is missing: give a folder or Hub id to sample answers from, or rows with answers in 'completions'."
        )
    if not given and options.num_candidates < 2:
        raise OptionError("num_candidates must be at least 2, to make a pair.")
    if options.method != "rso":
        refuse(NEEDS_RSO, f"method is {options.method!r} and not 'rso'")
    elif not given and options.rso_accept > options.num_candidates:
        raise OptionError(
            f"rso_accept={options.rso_accept} is more than num_candidates={options.num_candidates}: nothing would be "
            "rejected. Sample more, or accept fewer."
        )
    if options.method != "all":
        refuse(["max_pairs"], f"method is {options.method!r} and not 'all'")
    if options.engine != "vllm":
        refuse(["gpu_memory_utilization"], "engine is not 'vllm'")


def _source(options: PairsOptions) -> "ModelSource":
    from ..pairs.engines import ModelSource

    assert options.model is not None
    return ModelSource(
        options.model,
        options.base,
        options.quantize,
        options.dtype,
        options.revision,
        options.trust_remote_code,
        options.check_base,
    )


def describe(result: dict[str, Any]) -> str:
    """The summary for people."""
    reward = result["reward"]
    lines = [
        f"{result['output']}: {result['pairs']:,} pairs from {result['prompts_with_pairs']:,} of "
        f"{result['prompts']:,} prompts, {result['candidates']:,} answers, {result['seconds']:.0f} s",
        f"  mean reward: answers {reward['candidates']:+.3f} (std {reward['candidates_std']:.3f}), chosen "
        f"{reward['chosen']:+.3f}, rejected {reward['rejected']:+.3f}, margin {reward['margin']:.3f}",
        f"  the chosen answer is the longer one in {result['longer_chosen']:.0%} of the pairs",
    ]
    if "acceptance_rate" in result:
        lines.append(f"  accepted {result['accepted']:,} answers, {result['acceptance_rate']:.0%} of the trials")
    if result["resumed_prompts"]:
        lines.append(f"  {result['resumed_prompts']:,} prompts were there from unfinished work")
    for name, what in (
        ("prompts_without_pairs", "prompts without a pair"),
        ("candidates_unused", "answers left out"),
        ("pairs_refused", "pairs left out"),
    ):
        if reasons := result[name]:
            each = ", ".join(f"{number:,} {reason}" for reason, number in reasons.items())
            lines.append(f"  {what}: {each}")
    lines += [f"  {result[name]}" for name in ("sft_output", "lists_output") if name in result]
    return "\n".join(lines)
