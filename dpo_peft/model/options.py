"""The options that say how an adapter's base is made again, with the help that the command line shows.

They stand apart from the work, in `adapter_source`, so that a command's help waits for no slow import.
"""

from dataclasses import dataclass, field
from typing import Any


def option(default: object, help: str, **metadata: object) -> Any:
    """Returns the field of an options class: its default, its line in the help, and `choices` if it has some."""
    return field(default=default, metadata={"help": help, **metadata})


@dataclass(frozen=True)
class AdapterOptions:
    """Which adapter, and what replaces the way in which its base was made for the training.

    A base whose recorded quantization or dtype is replaced is not compared with the one of the training.
    """

    adapter: str = option("", "Folder or Hub id of the adapter.")
    base: str | None = option(None, "Base model, if not where the adapter says.")
    quantize: bool | None = option(None, "NF4 or not, in place of how the base was loaded for the training.")
    dtype: str | None = option(None, "Replaces the dtype of what is not quantized.")
    reference: str | None = option(None, "Adapter that was the reference, if not where the record says.")
    check_base: bool = option(True, "Refuse a base that is not the one of the training.")
    revision: str | None = option(None, "Branch, tag or commit of an adapter on the Hub.")
    trust_remote_code: bool = option(False, "Run code that ships with the model.")
