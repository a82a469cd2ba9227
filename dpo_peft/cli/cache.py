"""`dpo-peft cache`: lists what is kept of which reference's log-probs, and makes room."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import OptionError
from ..reference.cache import clear, default_folder, summary
from .options import option, parse_options, show

EXAMPLES = [
    "dpo-peft cache",
    "dpo-peft cache --clear --unused_days 30",
    "dpo-peft cache --dir FOLDER --clear --reference ID",
    "dpo-peft cache --json",
]


@dataclass
class CacheArguments:
    """Which entries, and what becomes of them."""

    dir: str | None = option(None, "Folder of the cache. Default: that of training.")
    clear: bool = option(False, "Delete entries: all, or those that the options name.")
    reference: str | None = option(None, "With clear: of this reference alone (its id).")
    unused_days: float | None = option(None, "With clear: of references that no run has opened for so many days.")
    json: bool = option(False, "Print one JSON object, sizes in bytes.")


def cache(argv: Sequence[str]) -> None:
    """Show or clear the reference's cached log-probs (see cache_ref_log_probs and precompute_ref_log_probs)."""
    options = parse_options(argv, CacheArguments, "cache", cache.__doc__, EXAMPLES)
    if not options.clear and (options.reference or options.unused_days is not None):
        raise OptionError("reference and unused_days have no effect without clear: give --clear too.")
    folder = Path(options.dir or default_folder())
    if options.dir and not folder.is_dir():
        raise OptionError(f"dir={options.dir!r}: there is no such folder.")
    if options.clear:
        entries, size = clear(folder, options.reference, options.unused_days)
        result = {"dir": str(folder), "deleted_entries": entries, "deleted_bytes": size}
        show(result, f"Deleted {entries:,} entries, {size / 1e6:,.1f} MB.", options.json)
        return
    references = summary(folder)
    lines = [
        f"{one.reference}  {one.entries:>9,} entries  {one.bytes / 1e6:>9,.1f} MB  {one.last_used}  {one.about}"
        for one in references
    ]
    kept = {"dir": str(folder), "references": [one._asdict() for one in references]}
    show(kept, "\n".join(lines) or f"Nothing is kept in {folder}.", options.json)
