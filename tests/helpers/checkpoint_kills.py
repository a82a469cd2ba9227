"""Saves that are killed, for the tests of `checkpoints.py`: `python checkpoint_kills.py EXPERIMENT FOLDER ...`.

Every byte of a checkpoint follows from its generation's number, so what is left after a kill can be judged without the
manifest. An experiment forks a child per kill; it is run as a program, because a process that has torch loaded forks
a hundred times slower. It prints its result as JSON.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpo_peft import manifests
from dpo_peft.disk import one_writer
from dpo_peft.training import checkpoints
from dpo_peft.training.checkpoints import MANIFEST, commit, newest_whole, recover, rotate, staging_folder

Writer = Callable[[Path, int, int], Path]  # run folder, step, generation -> the checkpoint

NAMES = ["adapter_model.safetensors", "optimizer.pt", "trainer_state.json", "reference/adapter_model.safetensors"]
# What Python announces to audit hooks before it does it. Syncs are not announced.
OPERATIONS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree")


def content(generation: int, name: str) -> bytes:
    """A file's bytes in one generation; they start with its number, and their length differs too."""
    draw = random.Random(f"{generation} {name}")
    return generation.to_bytes(4, "big") + draw.randbytes(draw.randrange(200, 3000))


def write(folder: Path, generation: int) -> None:
    for name in NAMES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content(generation, name))


def generation_in(folder: Path) -> int:
    """The generation that a folder holds in full; an error if it is none, or parts of two."""
    generation = int.from_bytes((folder / NAMES[0]).read_bytes()[:4], "big")
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found.pop(MANIFEST, None) is not None, f"{folder.name} has no manifest"
    assert found == {name: content(generation, name) for name in NAMES}, f"{folder.name} is not one generation"
    return generation


def save(run_dir: Path, step: int, generation: int) -> Path:
    write(staging_folder(run_dir, step) / f"checkpoint-{step}", generation)
    return commit(run_dir, step)


def save_in_place(run_dir: Path, step: int, generation: int) -> Path:
    """The naive way: the files of the last generation are overwritten one by one, then sealed."""
    write(run_dir / f"checkpoint-{step}", generation)
    checkpoints.seal(run_dir / f"checkpoint-{step}", step)
    return run_dir / f"checkpoint-{step}"


def save_after_deleting(run_dir: Path, step: int, generation: int) -> Path:
    """Less naive: written beside the old one, which is deleted before the new one is sealed."""
    write(staging_folder(run_dir, step) / f"checkpoint-{step}", generation)
    shutil.rmtree(run_dir / f"checkpoint-{step}", ignore_errors=True)
    return commit(run_dir, step)


def survivor(run_dir: Path) -> int:
    """What a resumed run would go on from; nothing hidden is left, and a second recovery has nothing to do."""
    recover(run_dir)
    assert [path.name for path in run_dir.iterdir() if path.name.startswith(".")] == []
    assert recover(run_dir) == []
    newest, passed_over = newest_whole(run_dir)
    assert newest is not None, f"no checkpoint is left: {passed_over}"
    return generation_in(newest)


# ---- Experiments ----------------------------------------------------------------------------------------------------


def do_not_sync(descriptor: int) -> None:
    """In place of `os.fsync`, where it costs too much time: a kill, unlike a power cut, loses nothing unsynced."""


def in_child(work: Callable[[], None], die_at: int | None = None) -> int:
    """Fork a child that does some work; its process id.

    With `die_at` it dies, as if killed, before its file operation of that number (from 0). A sync counts as one.
    """
    child = os.fork()
    if child:
        return child
    try:
        if die_at is not None:
            left = iter(range(die_at))

            def count() -> None:
                if next(left, None) is None:
                    os._exit(9)

            os.fsync = lambda descriptor: count()
            sys.addaudithook(lambda event, arguments: count() if event in OPERATIONS else None)
        work()
        os._exit(0)
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
        os._exit(1)


def died(child: int) -> bool:
    """Wait for a child of a sweep; whether it died on the way, not at its end."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code not in (0, 9):
        raise SystemExit(f"A child failed with {code}.")
    return code == 9


def loss(run_dir: Path, committed: int) -> list[str]:
    """What a kill has done to a run's folder, if it is worse than the end of the last or of the next save.

    Before any recovery too, every folder that is named like a checkpoint must be one.
    """
    try:
        for checkpoint in run_dir.glob("checkpoint-*"):
            generation_in(checkpoint)
        left = survivor(run_dir)
    except (AssertionError, FileNotFoundError) as error:
        return [f"{type(error).__name__}: {error}"]
    return [] if left in (committed, committed + 1) else [f"generation {left}, and {committed} had been committed"]


def sweep(folder: Path, writer: str) -> dict[str, Any]:
    """Replace a checkpoint, add one and rotate, dying before every file operation in turn.

    Generation 1 stands at step 7 and is replaced by 2; then 3 is saved as step 8, and only one is left.
    """
    os.fsync = do_not_sync
    losses, states, moment, ended = [], set(), 0, False
    while not ended:
        run_dir, note = folder / str(moment), os.open(folder / "committed", os.O_RDWR | os.O_CREAT)
        os.pwrite(note, bytes([1]), 0)
        save(run_dir, 7, 1)

        def work(run_dir: Path = run_dir, note: int = note) -> None:
            for step, generation in ((7, 2), (8, 3)):
                WRITERS[writer](run_dir, step, generation)
                os.pwrite(note, bytes([generation]), 0)
                rotate(run_dir, 1)

        ended = not died(in_child(work, moment))
        states.add(" ".join(sorted(path.name for path in run_dir.iterdir())))
        losses += [f"before operation {moment}: {text}" for text in loss(run_dir, os.pread(note, 1, 0)[0])]
        os.close(note)
        shutil.rmtree(run_dir)
        moment += 1
    return {"moments": moment, "states": sorted(states), "losses": losses}


def sweep_recovery(folder: Path) -> dict[str, Any]:
    """Die in a save, then before every file operation of the recovery, from every list of files that can be met."""
    os.fsync = do_not_sync
    starts: dict[str, Path] = {}
    ended, losses, moments = False, [], 0
    while not ended:
        run_dir = folder / str(moments)
        save(run_dir, 7, 1)
        ended = not died(in_child(lambda run_dir=run_dir: save(run_dir, 7, 2), moments))
        starts.setdefault(" ".join(sorted(str(path.relative_to(run_dir)) for path in run_dir.rglob("*"))), run_dir)
        moments += 1
    moments = 0
    for start in starts.values():
        ended, moment = False, 0
        while not ended:
            run_dir = folder / "again"
            shutil.copytree(start, run_dir)
            ended = not died(in_child(lambda run_dir=run_dir: recover(run_dir), moment))
            losses += [f"{start.name}, {moment}: {text}" for text in loss(run_dir, 1)]
            shutil.rmtree(run_dir)
            moment += 1
        moments += moment
    return {"starts": len(starts), "moments": moments, "losses": losses}


# ---- The result of a run, in a folder that holds other things too ---------------------------------------------------


def result_names(generation: int) -> list[str]:
    """The first run draws curves; the second has none, and an adapter with a name."""
    names = ["adapter_model.safetensors", "adapter_config.json", "README.md", "metrics.json"]
    return [*names, "curves.png" if generation == 1 else "policy/adapter_config.json"]


def save_result(run_dir: Path, generation: int) -> None:
    with manifests.whole_result(run_dir) as staged:
        for name in result_names(generation):
            (staged / name).parent.mkdir(exist_ok=True)
            (staged / name).write_bytes(content(generation, name))


def save_result_in_place(run_dir: Path, generation: int) -> None:
    """The naive way, with a manifest at the end."""
    for name in result_names(generation):
        (run_dir / name).parent.mkdir(exist_ok=True)
        (run_dir / name).write_bytes(content(generation, name))
    manifests.seal(run_dir, None)


def result_loss(run_dir: Path) -> list[str]:
    """What is wrong after a kill: a reader takes a mixture for an adapter, or a new start finds one."""
    try:
        manifests.check_one_run(run_dir)
        with one_writer("output_dir", run_dir, inside=True):
            recover(run_dir)
        found = {str(p.relative_to(run_dir)): p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}
        assert found.pop("notes.txt") == b"mine" and found.pop(MANIFEST)
        generation = int.from_bytes(found["metrics.json"][:4], "big")
        assert found == {n: content(generation, n) for n in result_names(generation)}, f"a mixture: {sorted(found)}"
    except (AssertionError, OSError, ValueError) as error:
        return [f"{type(error).__name__}: {error}"]
    return []


def sweep_result(folder: Path, writer: str, every: str) -> dict[str, Any]:
    """Replace a result, dying before every file operation in turn; then, from every so many-th list of files that
    this leaves, die again in bringing it to an end."""
    os.fsync = do_not_sync
    save_result(folder / "first", 1)
    (folder / "first" / "notes.txt").write_text("mine")
    starts: dict[str, Path] = {}
    losses, moments, ended = [], 0, False
    while not ended:
        run_dir = Path(shutil.copytree(folder / "first", folder / str(moments)))
        ended = not died(in_child(lambda run_dir=run_dir: RESULT_WRITERS[writer](run_dir, 2), moments))
        starts.setdefault(" ".join(sorted(str(path.relative_to(run_dir)) for path in run_dir.rglob("*"))), run_dir)
        moments += 1
    for start in list(starts.values())[:: int(every)]:
        ended, moment = not (start / manifests.SAVED).exists(), 0  # only then there is something to bring to an end
        while True:
            run_dir = Path(shutil.copytree(start, folder / "again"))
            if not ended:
                ended = not died(in_child(lambda run_dir=run_dir: manifests.check_one_run(run_dir), moment))
            losses += [f"{start.name}, {moment}: {text}" for text in result_loss(run_dir)]
            shutil.rmtree(run_dir)
            moment += 1
            if ended:
                break
        moments += moment
    return {"starts": len(starts), "moments": moments, "losses": losses}


def torture(run_dir: Path, writer: str, kills: str) -> dict[str, Any]:
    """Kill a process at random moments that saves generation after generation, each step twice; until a loss.

    After every kill the survivor must be at least the last generation whose saving had returned. Every other process
    does not sync: most kills would land in that.
    """
    draw, last, unfinished, losses = random.Random(0), 1, 0, []
    WRITERS[writer](run_dir, 0, last)
    for number in range(int(kills)):
        reader, note = os.pipe()

        def work(start: int = last, note: int = note, number: int = number) -> None:
            if number % 2:
                os.fsync = do_not_sync
            for generation in range(start + 1, start + 10_000):
                WRITERS[writer](run_dir, generation // 2, generation)
                os.write(note, generation.to_bytes(4, "big"))
                rotate(run_dir, 1)

        child = in_child(work)
        os.close(note)
        time.sleep(draw.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(reader, "rb") as told:
            committed = int.from_bytes(told.read()[-4:], "big") or last
        unfinished += any(path.name.startswith(".") for path in run_dir.iterdir())
        losses += [f"kill {number}: {text}" for text in loss(run_dir, committed)]
        if losses:
            break
        last = survivor(run_dir)
    return {"unfinished": unfinished, "generations": last, "losses": losses}


WRITERS: dict[str, Writer] = {f.__name__: f for f in (save, save_in_place, save_after_deleting)}
RESULT_WRITERS = {f.__name__: f for f in (save_result, save_result_in_place)}
EXPERIMENTS: dict[str, Callable[..., dict[str, Any]]] = {
    f.__name__: f for f in (sweep, sweep_recovery, sweep_result, torture)
}

if __name__ == "__main__":
    print(json.dumps(EXPERIMENTS[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])))
