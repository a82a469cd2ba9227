"""The options that say how an adapter's base is made again, with the help that the command line shows.

They stand apart from the work, in `adapter_source`, so that a command's help waits for no slow import.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class AdapterOptions:
    """Which adapter, and what replaces the way in which its base was made for the training.

    A base whose recorded quantization or dtype is replaced is not compared with the one of the training.
    """

    adapter: str = field(default="", metadata={"help": "Folder or Hub id of the adapter."})
    base: str | None = field(default=None, metadata={"help": "Base model, if not where the adapter says."})
    quantize: bool | None = field(
        default=None, metadata={"help": "NF4 or not, in place of how the base was loaded for the training."}
    )
    dtype: str | None = field(default=None, metadata={"help": "Replaces the dtype of what is not quantized."})
    reference: str | None = field(
        default=None, metadata={"help": "Adapter that was the reference, if not where the record says."}
    )
    check_base: bool = field(default=True, metadata={"help": "Refuse a base that is not the one of the training."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of an adapter on the Hub."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that ships with the model."})
