"""The parser of each command, for the pages that are made of it and the test that checks commands on pages."""

import argparse
import importlib
from typing import Any


class Found(BaseException):
    """Carries a command's parser out of it, before it parses."""


def parser_of(command: str) -> argparse.ArgumentParser:
    """Returns the parser of a command, as it builds it."""
    parse = argparse.ArgumentParser.parse_known_args

    def stop(parser: argparse.ArgumentParser, *given: Any) -> Any:
        if not parser.prog.startswith("dpo-peft "):  # of options that are read before all others
            return parse(parser, *given)
        raise Found(parser)

    argparse.ArgumentParser.parse_known_args = stop  # type: ignore[method-assign, assignment]
    name = command.replace("-", "_")
    try:
        getattr(importlib.import_module(f"dpo_peft.cli.{name}"), name)([])
    except Found as found:
        return found.args[0]
    finally:
        argparse.ArgumentParser.parse_known_args = parse  # type: ignore[method-assign]
    raise ValueError(f"dpo-peft {command} has no parser")
