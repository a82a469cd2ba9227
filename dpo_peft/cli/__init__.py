"""The command line, `dpo-peft COMMAND ...`: a module and a function of that name for each command.

A command raises the package's own errors, each with its remedy; `main` prints them and makes them exit codes.
"""

import signal
import sys
import threading
from collections.abc import Sequence
from importlib import import_module

from .. import errors
from ..version import __version__
from .options import printable, show_progress

__all__ = ["main"]

WRONG_INPUT = (
    errors.OptionError,
    errors.DataError,
    errors.ReferenceMismatchError,
    errors.NonFiniteError,
    errors.CheckpointError,
)
REFUSED = (errors.DriftError, errors.PublishError)
COMMANDS = (
    *("quickstart", "plan", "pairs", "train", "chat", "compare", "score", "report", "merge", "export", "push"),
    *("cache", "env"),
)
USAGE = """usage: dpo-peft COMMAND [options]

  plan    predict memory from the model's config:  dpo-peft plan --config FILE.yaml --gpu 24GB
  pairs   sample completions and make preference pairs of them:  dpo-peft pairs MODEL --prompts FILE --output FILE
  train   train a LoRA adapter on preferences:  dpo-peft train --config FILE.yaml [--any_option value]
  score   score completions by a trained adapter:  dpo-peft score ADAPTER --dataset_name FILE
  chat    talk to a trained adapter, or to its base:  dpo-peft chat ADAPTER
  compare  show completions before and after training:  dpo-peft compare ADAPTER --prompts FILE
  report  show runs as one HTML page:  dpo-peft report RUN [RUN ...]
  merge   put an adapter into its base:  dpo-peft merge ADAPTER --output_dir FOLDER
  export  write an adapter for llama.cpp or Ollama:  dpo-peft export ADAPTER --output_dir FOLDER --to ollama
  push    publish an adapter with its card:  dpo-peft push ADAPTER --repo_id NAME/REPO
  cache   show or clear the reference's cached log-probs:  dpo-peft cache [--clear]
  env     show versions and machine, for reports of faults:  dpo-peft env
  quickstart  train the bundled model, offline, in 2 minutes:  dpo-peft quickstart

dpo-peft help COMMAND lists its options, with examples and exit codes; dpo-peft --version."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0, or one of `options.EXIT_CODES`."""
    command, *rest = [*(sys.argv[1:] if argv is None else argv)] or ["help"]
    if command == "help" and rest:
        command, rest = rest[0], ["--help"]
    if command in ("help", "-h", "--help"):
        print(USAGE)
        return 0
    if command == "--version":
        print(f"dpo-peft {__version__}")
        return 0
    if command not in COMMANDS:
        print(f"dpo-peft: {command!r} is not a command.\n\n{USAGE}", file=sys.stderr)
        return 2
    show_progress()
    before = signal.getsignal(signal.SIGTERM)
    try:
        if before is signal.SIG_DFL and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _stop)  # what is half written is taken away
        # A command's module is loaded when the command is called: `help` should wait for nothing.
        getattr(import_module(f".{command}", __package__), command)(rest)
    except (*WRONG_INPUT, *REFUSED) as error:
        print(printable(f"dpo-peft: {error}"), file=sys.stderr)
        return 3 if isinstance(error, REFUSED) else 2
    except KeyboardInterrupt:  # training saves a checkpoint first, and leaves as TrainingInterrupted
        print("dpo-peft: stopped.", file=sys.stderr)
        return 130
    except OSError as error:
        print(printable(f"dpo-peft: {error}. Mend that, then give the same command again."), file=sys.stderr)
        return 3
    finally:
        if signal.getsignal(signal.SIGTERM) is _stop:
            signal.signal(signal.SIGTERM, before)
    return 0


def _stop(number: int, frame: object) -> None:
    raise SystemExit(128 + number)
