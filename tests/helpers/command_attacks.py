"""One command under attack in a folder: `python command_attacks.py FOLDER COMMAND EVERY`, one of `WORDS`.

Each try is a fork, made before anything ran. It acts before the file operation of its number, as Python announces it:

- killed: the process is gone;
- full: this and every later operation that needs room fails with ENOSPC;
- read-only: every operation that writes fails with EROFS, from the first;
- limit: the system itself lets no file grow beyond some bytes (EFBIG), whatever library writes it.

After each try inputs and everything finished must be as they were, outputs whole or not there; given again, the
command must leave the folder as a straight run leaves it. Prints, as JSON, the tries and what went wrong by kind.
"""

import errno
import gc
import json
import os
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOM = {"open", "os.rename", "os.mkdir"}
OPERATIONS = ROOM | {"os.remove", "os.rmdir", "os.truncate"}
TIMED = set("README.md metrics.json manifest.json merge_report.json recipe.yaml curves.png training_args.json".split())
TRAIN = (
    "train --model_name_or_path base --dataset_name rows.jsonl --use_cpu true --bf16 false --dtype float32 "
    "--quantize_base false --max_steps 1 --save_strategy no --report_to none --logging_steps 1"
).split()
# Words, what is written, and the word with which an output that is there may be replaced.
WORDS = {
    "report": ("report run --output page.html".split(), "page.html", "--overwrite"),
    "pairs": ("pairs --prompts given.jsonl --score_column rating --output pairs.jsonl".split(), "pairs.jsonl", ""),
    "score": ("score run --dataset_name rows.jsonl --output scores.jsonl".split(), "scores.jsonl", "--overwrite"),
    "merge": ("merge run --output_dir merged --max_drift 9".split(), "merged", ""),
    "train": ([*TRAIN, "--output_dir", "new"], "new", "--overwrite_output_dir=true"),
}
LEFT: list[dict[str, bytes | str | int]] = []


def contents(folder: Path) -> dict[str, bytes | str]:
    """Of each file below a folder; of those that hold times, that they are there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): "" if path.name in TIMED else path.read_bytes() for path in files}


def writes(event: str, arguments: Any, folder: str) -> bool:
    if event not in OPERATIONS or not os.path.abspath(os.fsdecode(arguments[0])).startswith(folder):
        return False
    return event != "open" or bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def attempt(words: list[str], folder: Path, attack: Callable[[bool], None] | None = None) -> tuple[int, str]:
    """Runs a command in a fork; its exit status (9 for one that was killed, 0 to 3 by itself) and what it said."""
    from dpo_peft.cli import main

    reader, writer = os.pipe()
    if child := os.fork():
        os.close(writer)
        with os.fdopen(reader, "rb") as told:
            said = told.read().decode("utf-8", "replace")
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said
    code = 1
    try:
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        os.chdir(folder)
        if attack is not None:
            sync, place = os.fsync, str(folder)
            os.fsync = lambda descriptor: (attack(True), sync(descriptor))[1]  # type: ignore[assignment,func-returns-value]

            def hook(event: str, arguments: Any) -> None:
                if event in OPERATIONS and isinstance(arguments[0], str | bytes | os.PathLike):
                    if writes(event, arguments, place):
                        attack(event in ROOM)

            sys.addaudithook(hook)
        code = main(words)
        sys.stderr.flush()
        sys.stdout.flush()
    except BaseException as error:
        os.write(2, f"Traceback {type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(code)


def at(moment: int, act: Callable[[], None], once: bool) -> Callable[[bool], None]:
    count = iter(range(10**9))

    def attack(needs_room: bool) -> None:
        now = next(count)
        if now == moment or now > moment and not once and needs_room:
            act()

    return attack


def die() -> None:
    os._exit(9)


def fail(number: int) -> Callable[[], None]:
    def act() -> None:
        raise OSError(number, os.strerror(number))

    return act


def no_larger_than(limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def judged(
    folder: Path, before: Any, straight: Any, command: str, code: int, said: str, allowed: tuple[int, ...]
) -> str:
    """What is wrong after a try and after the same command again; the folder is as before then. From a state of the
    folder that was left before, the command has already been given again."""
    words, output, replace = WORDS[command]
    now, problems = contents(folder), []
    state = {name: content or (folder / name).stat().st_size for name, content in now.items()}
    if code not in allowed or "Traceback" in said:
        problems.append(f"exit {code}: {said[-300:]}")
    problems += [f"{name} changed" for name, content in before.items() if now.get(name) != content]
    there = {name: content for name, content in now.items() if name.split("/")[0] == output}
    whole = {name: content for name, content in straight.items() if name.split("/")[0] == output}
    if command != "train" and there and there != whole:  # of a training's result readers judge: see test_results.py
        problems.append(f"half: {sorted(there)}")
    if state not in LEFT:
        LEFT.append(state)
        code, said = attempt([*words, *([replace] if replace else [])], folder)
        again = contents(folder)
        if code == 2 and there == whole:  # it is refused, as all is there
            again = {name: content for name, content in again.items() if not Path(name).name.startswith(".")}
        elif code:
            problems.append(f"again, exit {code}: {said[-300:]}")
        differ = sorted(name for name in {*again, *straight} if again.get(name) != straight.get(name))
        problems += [f"again, not as straight: {differ}"] if differ else []
    for name in {*contents(folder)} - {*before}:
        (folder / name).unlink()
    shutil.rmtree(folder / output, ignore_errors=True)
    return "; ".join(problems)


def in_place(path: Path, html: bytes, private: bool) -> None:
    """A naive writer, which the attacks must find."""
    with open(path, "wb", buffering=0) as file:
        file.write(html[:100])
        os.fsync(file.fileno())
        file.write(html[100:])


def attacks(folder: Path, command: str, every: int) -> dict[str, Any]:
    words = WORDS[command][0]
    before = contents(folder)
    code, said = attempt(words, folder)
    straight = contents(folder)
    problem = judged(folder, before, straight, command, code, said, (0,))
    found: dict[str, Any] = {"straight": [1, [problem] if problem else []]}

    def tried(kind: str, *given: Any, allowed: tuple[int, ...]) -> int:
        code, said = attempt(words, folder, *given)
        problem = judged(folder, before, straight, command, code, said, allowed)
        tries = found.setdefault(kind, [0, []])
        tries[0] += 1
        tries[1] += [f"{kind} at {tries[0]}: {problem}"] if problem else []
        return code

    moment = 0
    while tried("killed", at(moment, die, True), allowed=(0, 9)):
        moment += every
    for later in range(0, moment, every):
        tried("full", at(later, fail(errno.ENOSPC), False), allowed=(0, 2, 3))
    tried("read-only", at(0, fail(errno.EROFS), False), allowed=(2, 3))
    for limit in (0, 50):

        def limited(needs_room: bool, limit: int = limit) -> None:
            no_larger_than(limit)

        tried("limit", limited, allowed=(2, 3))
    return found


if __name__ == "__main__":
    import dpo_peft.trainer  # noqa: F401  before the forks: each would import it again
    from dpo_peft.artifacts import card, curves  # noqa: F401
    from dpo_peft.cli import merge, pairs, report, score, train  # noqa: F401
    from dpo_peft.merge import merging  # noqa: F401
    from dpo_peft.pairs import run  # noqa: F401
    from dpo_peft.report import page  # noqa: F401
    from dpo_peft.reward import judgments  # noqa: F401

    if sys.argv[4:] == ["naive"]:
        page.write_atomically = in_place  # type: ignore[assignment]
    gc.freeze()  # what is imported stays shared by the forks
    print(json.dumps(attacks(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))))
