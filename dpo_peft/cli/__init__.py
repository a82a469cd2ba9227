"""The command line: one module a command."""

from .train import main

__all__ = ["main"]
