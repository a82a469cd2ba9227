"""Tells pickles, and archives that may hold some, by their content: whoever loads a pickle runs the code in it."""

import pickletools
import re

PICKLE = "a pickle: who loads it runs its code"
ARCHIVE = "an archive, whose content can't be searched for tokens and pickles"
# zip, gzip, bzip2, xz, zstd, lz4, 7z, rar, zlib (joblib), tar
_ARCHIVE = re.compile(
    rb"PK\x03\x04|\x1f\x8b|BZh\d|\xfd7zXZ|\x28\xb5\x2f\xfd|\x04\x22\x4d\x18|7z\xbc\xaf|Rar!|\x78[\x01\x9c\xda]"
    rb"|[\s\S]{257}ustar"
)
_NAME = re.compile(r"[\w.]+ [\w.]+")  # module and function
# What of a pickle's opcodes names or calls something.
_ACTS = {"GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "REDUCE", "BUILD", "EXT1", "EXT2", "EXT4"}


def pickled(content: bytes) -> str | None:
    """Returns what keeps a file from being published: it is a pickle or holds one, or is an archive. None otherwise.

    torch.save's files are zip archives, or pickles in its old format; NumPy's hold pickles where they hold objects.
    """
    of_torch = content.startswith(b"PK\x03\x04") and b"data.pkl" in content
    of_numpy = content.startswith(b"\x93NUMPY") and b"|O" in content[:1024]
    if of_torch or of_numpy or _is_pickle(content):
        return PICKLE
    return ARCHIVE if _ARCHIVE.match(content) else None


def _is_pickle(content: bytes) -> bool:
    """Says whether a file is a pickle. The first byte of one of protocol 2 or later is that of no text. Earlier ones
    are text: opcodes up to a STOP, where the file ends or before which something is named or called."""
    if content[:1] == b"\x80" and content[1:2] <= b"\x0f":
        return True
    acts, end = False, 0
    try:
        for opcode, argument, at in pickletools.genops(content):
            if opcode.name in ("GLOBAL", "INST") and not _NAME.fullmatch(str(argument)):  # prose, not to be imported
                return False
            acts, end = acts or opcode.name in _ACTS, at or 0
    except Exception:  # it reads whatever it is given, and fails in many ways
        return False
    return acts or not content[end + 1 :].strip()
