"""`dpo-peft eval`: an adapter and its base by offline suites, in one run and one file."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..suites import EvalOptions
from .options import aligned, parse_options, show

EXAMPLES = (
    "dpo-peft eval outputs/quickstart",
    "dpo-peft eval outputs/run --suites pairs:reward-bench.parquet pairs:LLMBar/Natural/dataset.json neutral",
    "dpo-peft eval outputs/run --suites judge:prompts.jsonl --judge_url http://localhost:8000/v1 --judge_model NAME",
)


def eval(argv: Sequence[str]) -> None:
    """Say by offline suites whether an adapter is better than its base: accuracy on pairs, checkable instructions,
    what was lost on neutral text, a judge. One copy of the weights, with the adapter on and off."""
    options = parse_options(argv, EvalOptions, "eval", eval.__doc__, EXAMPLES, "adapter")
    from ..suites.run import evaluate

    result = evaluate(options)
    show(result, "" if options.json else describe(result), options.json)


def describe(result: Mapping[str, Any]) -> str:
    """Returns the table for people, and the commands of lm-eval."""
    from ..suites.figures import HEADS, table

    lines = aligned([HEADS, *table(result, details=True)])
    lines += ["", f"The base is {result['base']}. Intervals are of 95 %, differences of paired rows."]
    lines += [f"Result: {result['output']}", "Public benchmarks, where lm-eval is installed:"]
    return "\n".join([*lines, *(f"  {command}" for command in result["lm_eval"])])
