"""`dpo-peft push`: publishes a trained adapter on the Hub, with its card, recipe, metrics and samples."""

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from ..errors import OptionError
from .options import option, parse_options, show

if TYPE_CHECKING:  # it loads torch, which a help should not wait for
    from ..hub.publishing import PublishResult

EXAMPLES = [
    "dpo-peft push outputs/qwen3-8b-dpo --repo_id me/qwen3-8b-dpo --dry_run",
    "dpo-peft push outputs/qwen3-8b-dpo --repo_id me/qwen3-8b-dpo --license apache-2.0 --private",
    "dpo-peft push outputs/run --repo_id me/run --base_model HuggingFaceTB/SmolLM2-135M-Instruct",
    "dpo-peft push outputs/run --repo_id some-org/run --create_pr --json",
]


@dataclass
class PushArguments:
    """What goes where."""

    adapter: str = option("", "Folder of the adapter, as training wrote it.")
    repo_id: str = option("", "NAME/REPO on the Hub, or REPO of your own account. Made if it isn't there.")
    base_model: str | None = option(
        None, "Hub id of the base, if the adapter was trained on a model in a local folder."
    )
    private: bool = option(
        False, "Only you (or the organization) see it. Default: as it is, or as your account has it."
    )
    public: bool = option(False, "Everybody sees it, also if it was private.")
    gated: str | None = option(
        None,
        "Who wants it must ask, and is let in at once (auto) or by hand (manual); 'off' opens it. Default: as it is.",
        choices=["auto", "manual", "off"],
    )
    license: str | None = option(None, "License of the adapter, for the card.")
    datasets: list[str] | None = option(None, "Hub ids of the training data, for the card.")
    languages: list[str] | None = option(None, "ISO 639 codes, such as en, for the card.")
    include: list[str] | None = option(None, "Further files of the folder, as names or patterns such as '*.html'.")
    revision: str | None = option(None, "Branch to write to. Default: main.")
    create_pr: bool = option(False, "Open a pull request instead of writing.")
    commit_message: str = option("Publish the adapter", "Message of the commit.")
    overwrite: bool = option(False, "Replace files of a repository that holds something else.")
    dry_run: bool = option(False, "Check all that can be checked offline, list the files, and stop.")
    attempts: int = option(4, "How often a step that fails for a moment is tried.")
    json: bool = option(False, "Print one JSON object.")


def push(argv: Sequence[str]) -> None:
    """Checks an adapter's folder and publishes it, see `hub.publishing.publish`."""
    about = (
        "Publish a trained adapter on the Hub: weights, config, tokenizer, model card, recipe, metrics, curves and\n"
        "samples. Needs a token with write access: `hf auth login`, or HF_TOKEN. All becomes visible at once, or\n"
        "nothing does; a command that was cut off is simply given again."
    )
    options = parse_options(argv, PushArguments, "push", about, EXAMPLES, "adapter", "repo_id")
    if options.private and options.public:
        raise OptionError("private contradicts public: give one of them.")
    from ..hub.publishing import publish

    others = ("adapter", "public", "private", "json")
    given = {name: value for name, value in vars(options).items() if value is not None and name not in others}
    result = publish(
        options.adapter,
        private=True if options.private else False if options.public else None,
        repeat=f"give the command again: {shlex.join(['dpo-peft', 'push', *argv])}",
        **given,
    )
    show({**asdict(result), "dry_run": options.dry_run}, as_text(result, options.dry_run), options.json)


def as_text(result: "PublishResult", dry_run: bool) -> str:
    """Returns the result for people."""
    commit = f"{result.url} (commit {str(result.commit)[:8]})"
    if dry_run:
        size = sum(result.uploaded.values())
        head = f"Would publish {len(result.uploaded)} files, {_bytes(size)}, as {result.url}"
    elif result.pr_url:
        head = f"Opened the pull request {result.pr_url}"
    else:
        head = f"Published {commit}" if result.uploaded else f"Everything is there already: {commit}"
    width = max(map(len, [*result.uploaded, *result.unchanged, *result.left_out]), default=0)
    lines = [head, *(f"  + {name:<{width}}  {_bytes(size):>9}" for name, size in result.uploaded.items())]
    lines += [f"  = {name:<{width}}  unchanged" for name in result.unchanged]
    lines += [f"  - {name:<{width}}  left out: {why}" for name, why in result.left_out.items()]
    lines += [f"  ok    {check}" for check in result.checks] + [f"  note  {note}" for note in result.notes]
    return "\n".join([*lines, "Nothing was sent (dry_run)."] if dry_run else lines)


def _bytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"
