"""Functions of the user's own, by their import path: losses, and rewards that judge pairs."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from .errors import OptionError


def load_function(path: str, option: str) -> Callable[..., Any]:
    """Returns the function that `package.module:name` or `folder/file.py:name` names.

    Args:
        path: where it is.
        option: whose value that is, for messages.

    Raises:
        OptionError: there is no such module, file or function, or importing it fails.
    """
    where, _, name = path.rpartition(":")
    if not where or not name:
        raise OptionError(f"{option}={path!r}: write package.module:function or file.py:function.")
    try:
        module = _load_file(where) if where.endswith(".py") else import_module(where)
    except Exception as error:  # it is code of someone else's and may raise anything
        hint = "" if where.endswith(".py") else " A file is given as path/file.py:function."
        raise OptionError(f"{option}={path!r} can't be imported: {type(error).__name__}: {error}.{hint}") from error
    found = getattr(module, name, None)
    if not callable(found):
        what = "there is no such name" if found is None else f"it is a {type(found).__name__}, not a function"
        raise OptionError(f"{option}={path!r}: {what} in {where}.")
    return found


def _load_file(file: str) -> ModuleType:
    if not Path(file).is_file():
        raise OptionError("there is no such file")
    module = ModuleType(Path(file).stem)
    module.__file__ = file
    # Compiled here: Python's cache takes a file of the same size that changed within a second for the one before.
    exec(compile(Path(file).read_bytes(), file, "exec"), module.__dict__)  # noqa: S102 - the user's own file, by name
    return module
