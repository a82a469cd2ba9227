"""`python -m dpo_peft.losses [NAME ...]` prints what docs/objectives.md says of each loss; notes by hand follow it."""

import sys
import textwrap

from .registry import REGISTRY, Objective


def entry(objective: Objective) -> str:
    """Returns the beginning of a loss's section, in Markdown."""
    options = ", ".join(f"`{name}`" for name in objective.options if name != "beta") or "none"
    beta = "none" if objective.default_beta is None else f"{objective.default_beta:g}"
    bullets = (f"beta: {beta}. {objective.why_beta}", f"options: {options}", f"source: {objective.source}")
    listed = "\n".join(_wrapped(f"- {bullet}", "  ") for bullet in bullets)
    return f"#### `{objective.name}`\n\n    {objective.formula}\n\n{_wrapped(objective.use_when)}\n\n{listed}\n"


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, 119, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False)


if __name__ == "__main__":
    print("\n".join(entry(REGISTRY[name]) for name in sys.argv[1:] or REGISTRY))
