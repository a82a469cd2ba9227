"""The command `dpo-peft push`: publish a trained adapter on the Hub, with its card, recipe, metrics and samples."""

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from ..errors import OptionError
from .options import parse_options, required, show

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

    adapter: str = field(default="", metadata={"help": "Folder of the adapter, as training wrote it."})
    repo_id: str = field(
        default="", metadata={"help": "NAME/REPO on the Hub, or REPO of your own account. Made if it isn't there."}
    )
    base_model: str | None = field(
        default=None, metadata={"help": "Hub id of the base, if the adapter was trained on a model in a local folder."}
    )
    private: bool = field(
        default=False,
        metadata={"help": "Only you (or the organisation) see it. Default: as it is, or as your account has it."},
    )
    public: bool = field(default=False, metadata={"help": "Everybody sees it, also if it was private."})
    gated: str | None = field(
        default=None,
        metadata={
            "help": "Who wants it must ask, and is let in at once (auto) or by hand (manual); 'off' opens it. "
            "Default: as it is.",
            "choices": ["auto", "manual", "off"],
        },
    )
    license: str | None = field(default=None, metadata={"help": "Licence of the adapter, for the card."})
    datasets: list[str] | None = field(default=None, metadata={"help": "Hub ids of the training data, for the card."})
    languages: list[str] | None = field(default=None, metadata={"help": "ISO 639 codes, such as en, for the card."})
    include: list[str] | None = field(
        default=None, metadata={"help": "Further files of the folder, as names or patterns such as '*.html'."}
    )
    revision: str | None = field(default=None, metadata={"help": "Branch to write to. Default: main."})
    create_pr: bool = field(default=False, metadata={"help": "Open a pull request instead of writing."})
    commit_message: str = field(default="Publish the adapter", metadata={"help": "Message of the commit."})
    overwrite: bool = field(
        default=False, metadata={"help": "Replace files of a repository that holds something else."}
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Check all that can be checked offline, list the files, and stop."}
    )
    attempts: int = field(default=4, metadata={"help": "How often a step that fails for a moment is tried."})
    json: bool = field(default=False, metadata={"help": "Print one JSON object."})


def push(argv: Sequence[str]) -> None:
    """`dpo-peft push`: check an adapter's folder and publish it, see `publish.publish`.

    Raises:
        OptionError: the adapter, the card, an option or the token is wrong; nothing was written.
        PublishError: the Hub refused or could not be reached.
    """
    about = (
        "Publish a trained adapter on the Hub: weights, config, tokenizer, model card, recipe, metrics, curves and\n"
        "samples. Needs a token with write access: `hf auth login`, or HF_TOKEN. All becomes visible at once, or\n"
        "nothing does; a command that was cut off is simply given again."
    )
    options = parse_options(argv, PushArguments, "push", about, EXAMPLES)
    required(options, "adapter", "repo_id")
    if options.private and options.public:
        raise OptionError("private contradicts public: give one of them.")
    from ..hub.publishing import publish

    result = publish(
        options.adapter,
        options.repo_id,
        private=True if options.private else False if options.public else None,
        gated=options.gated,
        revision=options.revision,
        commit_message=options.commit_message,
        create_pr=options.create_pr,
        base_model=options.base_model,
        licence=options.license,
        datasets=options.datasets or (),
        languages=options.languages or (),
        include=options.include or (),
        overwrite=options.overwrite,
        dry_run=options.dry_run,
        attempts=options.attempts,
        repeat=f"give the command again: {shlex.join(['dpo-peft', 'push', *argv])}",
    )
    contents = {**asdict(result), "dry_run": options.dry_run}
    show(contents, _dry(result) if options.dry_run else _done(result), options.json)


def _dry(result: "PublishResult") -> str:
    size = sum(result.uploaded.values())
    lines = [f"Would publish {len(result.uploaded)} files, {_bytes(size)}, as {result.url}"]
    return "\n".join([*lines, *_files(result), *_remarks(result), "Nothing was sent (dry_run)."])


def _done(result: "PublishResult") -> str:
    if result.pr_url:
        head = f"Opened the pull request {result.pr_url}"
    elif not result.uploaded:
        head = f"Everything is there already: {result.url} (commit {str(result.commit)[:8]})"
    else:
        head = f"Published {result.url} (commit {str(result.commit)[:8]})"
    return "\n".join([head, *_files(result), *_remarks(result)])


def _files(result: "PublishResult") -> list[str]:
    width = max(map(len, [*result.uploaded, *result.unchanged, *result.left_out]), default=0)
    lines = [f"  + {name:<{width}}  {_bytes(size):>9}" for name, size in result.uploaded.items()]
    lines += [f"  = {name:<{width}}  unchanged" for name in result.unchanged]
    return lines + [f"  - {name:<{width}}  left out: {why}" for name, why in result.left_out.items()]


def _remarks(result: "PublishResult") -> list[str]:
    return [f"  ok    {check}" for check in result.checks] + [f"  note  {note}" for note in result.notes]


def _bytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"
