"""What of a look should be acted on: sentences, each with its remedy."""

from collections.abc import Iterator, Mapping
from typing import Any

from ..data.summary import NOTABLE
from .reading import SIDES
from .style import NOTABLE as APART

LEARNS = {
    "refusal or apology first": "to refuse or apologize",
    "a question last": "to end with questions",
    "another script than the prompt": "to reply in another language",
}


def named(rows: Mapping[str, Any]) -> str:
    """Returns the first rows of something that was found: "rows 3, 17, …" or "rows 9 and 2, 12 and 7, …"."""
    first = [one if isinstance(one, int) else " and ".join(map(str, one)) for one in rows["first"]]
    more = ", …" if rows["rows"] > len(first) else ""
    return f"row{'s' if rows['rows'] > 1 or ' ' in str(first[0]) else ''} {', '.join(map(str, first))}{more}"


def advise(facts: Mapping[str, Any], max_unusable_share: float = 0.5) -> list[str]:
    """Returns what to do about a dataset, from the facts of a `Look`."""
    rows, usable, repeats = facts["rows"], facts["usable"], facts["repeats"]
    found, lost = [], sum(one["rows"] for one in facts["unusable"].values())
    if lost > max_unusable_share * rows or (lost and not usable):
        found.append(f"Training would stop: {lost:,} of {rows:,} rows can't be used (max_unusable_share).")
    elif lost > NOTABLE * rows:
        most = max(facts["unusable"].values(), key=lambda one: one["rows"])
        found.append(f"{lost:,} of {rows:,} rows would be left out, most as {most['meaning']}: {most['remedy']}.")
    if (same := repeats["contradictions"])["rows"]:
        found.append(
            f"{same['rows']:,} rows say the opposite of another ({named(same)}): they cancel each other. Remove one "
            "of each two, or give the share of such labels as label_smoothing."
        )
    if (twice := repeats["duplicates"])["rows"] > NOTABLE * rows:
        found.append(f"{twice['rows']:,} rows repeat an earlier one ({named(twice)}) and count double: remove them.")
    if (near := repeats["near_duplicates"])["rows"] > NOTABLE * rows:
        found.append(
            f"{near['rows']:,} rows are nearly an earlier one ({named(near)}): look at some, and keep one of each."
        )
    return [*found, *_of_tokens(facts), *_of_template(facts), *_of_bias(facts["bias"], facts["data"])]


def leak_advice(leak: Mapping[str, Any], name: str) -> list[str]:
    """Returns what to do where evaluation rows have prompts of the training rows."""
    found, near = [], leak["near_prompts"]
    whole = f"{leak['near_rows']['rows']:,} rows stand in both with their completions, or nearly so."
    for one, what in (leak, "a prompt that is"), (near, "nearly a prompt that is"):
        if one["rows"]:
            found.append(
                f"{one['rows']:,} of {leak['of']:,} rows of {name} have {what} trained on ({named(one)} of the "
                f"training rows): the evaluation flatters. {whole} Take these prompts out of one of the two."
            )
    return found


def _of_tokens(facts: Mapping[str, Any]) -> Iterator[str]:
    tokens, usable = facts["tokens"], facts["usable"]
    if tokens is None or not usable:
        return
    longest = facts["longest"]
    if tokens["rows_truncated"] > NOTABLE * usable:
        yield (
            f"{tokens['rows_truncated']:,} of {usable:,} rows are cut to max_length={tokens['max_length']}, and "
            f"{tokens['ends_lost']:,} completions lose their end: the longest row has "
            f"{longest:,} tokens. Raise max_length, or remove long rows."
        )
    if tokens["spelled"] > NOTABLE * usable:
        yield (
            f"{tokens['spelled']:,} rows spell special tokens in their text, where each acts as one: take them out."
        )


def _of_template(facts: Mapping[str, Any]) -> Iterator[str]:
    template, by = facts["template"], facts["rendered_by"]
    if template is None:
        return
    if template["completions_without_stop"] > NOTABLE * facts["usable"]:
        yield (
            f"{template['completions_without_stop']:,} completions don't end with {' or '.join(template['stops'])}, "
            "where generation stops: the model would not learn to stop. Use a chat template that ends turns with it."
        )
    text = facts["format"].startswith("text")
    if text and by and template["family"] not in (by, None):
        yield (
            f"The prompts hold control tokens of another template ({by}) than the model's ({template['family']}): the "
            "model doesn't know them. Give the rows as messages."
        )
    elif text and not by and template["family"] is not None:
        yield (
            f"The prompts are plain text, and the model's chat template ({template['family']}) is not used: it would "
            "be trained on what a chat never shows it. Set as_chat to true, or give the rows as messages."
        )


def _of_bias(bias: Mapping[str, Any] | None, data: str) -> Iterator[str]:
    if bias is None:
        return
    better, worse = SIDES.get(data, ("desirable", "undesirable"))
    only = bias["length"]["length_only"]
    if (only["low"] > 0.5 or only["high"] < 0.5) and abs(only["value"] - 0.5) >= APART:
        which = "longer" if only["value"] > 0.5 else "shorter"
        remedy = ", and try loss_type simpo, or ld_alpha" if data == "pairs" else ""
        yield (
            f'"The {which} is better" is right in {max(only["value"], 1 - only["value"]):.0%} of the comparisons, and '
            f"the model will learn that too. Look at the length-balanced accuracy{remedy}."
        )
    for name, form in bias["forms"].items():
        if form["notable"]:
            verb, what = "learn" if form["better"] > form["worse"] else "unlearn", LEARNS.get(name, name)
            yield (
                f"{better} has {name} in {form['better']:.0%}, {worse} in {form['worse']:.0%}: the model will {verb} "
                f"{what}. If that is not meant, balance the rows."
            )
