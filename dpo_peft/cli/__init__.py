"""The command line, `dpo-peft COMMAND ...`: a module and a function of that name for each command.

A function's docstring is the description in its help. A command raises the package's own errors, each with its remedy;
`main` prints them and makes them exit codes.
"""

import os
import re
import select
import signal
import sys
import threading
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from .. import errors
from ..spelling import meant
from ..version import __version__
from . import help

__all__ = ["main"]

JOB = "DPO_PEFT_JOB"  # an environment variable: the folder of the job that this process belongs to (`launch`)
WRONG_INPUT = (errors.OptionError, errors.DataError, errors.ReferenceMismatchError, errors.CheckpointError)
REFUSED = (errors.DriftError, errors.PublishError, errors.StrictError, errors.NonFiniteError)
USAGE = """usage: dpo-peft COMMAND [options]

  quickstart  train the bundled model, offline, in 2 minutes:  dpo-peft quickstart
  data        look at preference rows before training:  dpo-peft data FILE [--model_name_or_path MODEL]
  init        write a config file to train by:  dpo-peft init --model_name_or_path MODEL --dataset_name FILE
  recipes     show or copy the config files that come along:  dpo-peft recipes [NAME --output FILE.yaml]
  plan        predict memory from the model's config:  dpo-peft plan --config FILE.yaml --gpu 24GB
  pairs       sample completions and make preference pairs of them:  dpo-peft pairs MODEL --prompts FILE --output FILE
  train       train a LoRA adapter on preferences:  dpo-peft train --config FILE.yaml [--any_option value]
  sweep       train several settings and choose one:  dpo-peft sweep FILE.yaml
  chat        talk to a trained adapter, or to its base:  dpo-peft chat ADAPTER
  compare     show completions before and after training:  dpo-peft compare ADAPTER --prompts FILE
  score       score completions by a trained adapter:  dpo-peft score ADAPTER --dataset_name FILE
  eval        say by offline suites whether it is better:  dpo-peft eval ADAPTER --suites pairs:FILE
  report      show runs as one HTML page:  dpo-peft report RUN [RUN ...]
  merge       put an adapter into its base:  dpo-peft merge ADAPTER --output_dir FOLDER
  export      write an adapter for llama.cpp or Ollama:  dpo-peft export ADAPTER --output_dir FOLDER --to ollama
  verify-serving  compare a server with what was trained:  dpo-peft verify-serving ADAPTER --base_gguf FILE
  push        publish an adapter with its card:  dpo-peft push ADAPTER --repo_id NAME/REPO
  cache       show or clear the reference's cached log-probs:  dpo-peft cache [--clear]
  bench       measure this GPU, for the planner and for others:  dpo-peft bench
  env         show versions and machine, for reports of faults:  dpo-peft env

dpo-peft help COMMAND lists its options, with examples and exit codes; dpo-peft --version."""
COMMANDS = tuple(re.findall(r"^  ([\w-]+)", USAGE, flags=re.MULTILINE))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0, or one of `help.EXIT_CODES`; 141 where what reads the output has
    ended, as `| head` does."""
    if JOB in os.environ:
        from .launch import worker

        worker(lambda: _main(argv))
    return _main(argv)


def _main(argv: Sequence[str] | None) -> int:
    try:
        try:
            return _run(argv)
        finally:
            print(end="", flush=True)  # fails here rather than as Python ends
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return 128 + signal.SIGPIPE
        _say(f"standard output can't be written: {error}.")
        return 3


def _run(argv: Sequence[str] | None) -> int:
    command, *rest = [*(sys.argv[1:] if argv is None else argv)] or ["help"]
    if command == "help" and rest:
        command, rest = rest[0], ["--help", *rest[1:]]
    if command in ("help", "-h", "--help"):
        print(USAGE)
        return 0
    if command == "--version":
        print(f"dpo-peft {__version__}")
        return 0
    if command not in COMMANDS:
        print(f"dpo-peft: {command!r} is not a command.{meant(command, COMMANDS)}\n\n{USAGE}", file=sys.stderr)
        return 2
    if {"-h", "--help"} & {*rest} and (kept := help.kept(command)):
        print(help.render(kept))
        raise SystemExit(0)
    from .options import show_progress  # which imports what reads rows: a help should wait for nothing

    show_progress()
    before = signal.getsignal(signal.SIGTERM)
    try:
        if before is signal.SIG_DFL and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _stop)  # what is half written is taken away
        # A command's module is loaded when the command is called: `help` should wait for nothing.
        name = command.replace("-", "_")
        getattr(import_module(f".{name}", __package__), name)(rest)
    except (*WRONG_INPUT, *REFUSED) as error:
        _say(_of_home(error) or str(error))
        # A checkpoint that can't be written, as the disk is full, has a cause; one that can't be resumed has none.
        unwritten = isinstance(error, errors.CheckpointError) and error.__cause__ is not None
        return 3 if unwritten or isinstance(error, REFUSED) else 2
    except KeyboardInterrupt:  # training saves a checkpoint first, and leaves as TrainingInterrupted
        _say("stopped.")
        return 130
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # of torch, which is not imported here
            raise
        told = str(error)
        if not told.startswith("Out of memory"):  # as training says it, with what to lower
            told = told.partition(" GPU ")[0]  # behind it torch says much of its allocator
            told += " Close other programs on the GPU, load the base in 4 bits, or lower lengths and batches."
        _say(told)
        return 3
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            raise
        told = _of_home(error) or f"{error}. Mend that, then give the same command again."
        _say(told)
        return 3
    finally:
        if signal.getsignal(signal.SIGTERM) is _stop:
            signal.signal(signal.SIGTERM, before)
    return 0


def _say(text: str) -> None:
    """Prints an error; in one of several processes it is kept, for their job to print it once."""
    from .options import printable

    line = printable(f"dpo-peft: {text}")
    if JOB in os.environ:
        from .launch import said

        said.append(line)
    else:
        print(line, file=sys.stderr)


def _of_home(error: Exception) -> str:
    """Returns what is wrong with the home folder if an error is of that: libraries keep files there, and the error
    blames what was being read. "" for other errors."""
    if {"HF_HOME", "XDG_CACHE_HOME"} & {*os.environ} or os.path.expanduser("~") not in str(error):
        return ""
    try:
        (Path.home() / ".cache" / "huggingface").mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        return f"The home folder can't be used: {error}. Give another place: HF_HOME=/tmp/huggingface dpo-peft ..."
    return ""


def _nobody_reads() -> bool:
    """Returns whether standard output is a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return bool(poll.poll(0))


def _stop(number: int, frame: object) -> None:
    raise SystemExit(128 + number)
