"""Kills training runs and resumes them, and compares how they end with a run that was never killed.

`Torturer` is the whole of it. Importing torch and its friends takes seconds, so this process does it once, and every
attempt at a run is a fork that starts from the same state. The fork says on a `Board`, in memory that both share, what
it is doing; this process ends it by SIGKILL at a moment drawn beforehand and starts the next attempt. After a few
kills an attempt is let through. What it ends with must be, bit for bit, what the straight run ended with.

Nothing of the package is asked about the files of a killed run: what is there is judged by names alone.
"""

import ctypes
import enum
import json
import mmap
import os
import random
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from kill_scenarios import Scenario, build
from run_figures import TIMED
from transformers import TrainerCallback

TIMEOUT = 300  # seconds without which an attempt ends; longer is a failure
# Logged figures that are not the run's: times, and what the cache held already (more, after a kill).
OF_THE_ATTEMPT = re.compile(rf"({'|'.join(TIMED)})$|^ref_cache/")

Spoil = Callable[[Any], None] | None  # breaks a trainer on purpose


# ---- In the child ---------------------------------------------------------------------------------------------------


class Phase(enum.IntEnum):
    STARTING = 0  # building the trainer, loading the checkpoint
    STEP = 1
    SAVING = 2
    EVALUATING = 3
    BETWEEN = 4  # fetching batches, logging
    ENDING = 5  # after the training, writing the result


class Board(ctypes.Structure):
    """What a child is doing; in memory that it shares with its parent, so that it tells where a killed child died."""

    _fields_ = [
        ("phase", ctypes.c_int),
        ("resumed_at", ctypes.c_int),  # the step that the training went on from; -1 before that
        ("entered", ctypes.c_int * len(Phase)),  # how often each phase was entered
        ("seconds", ctypes.c_double * len(Phase)),  # spent in each phase
        ("since", ctypes.c_double),
    ]

    @classmethod
    def new(cls) -> "Board":
        board = cls.from_buffer(mmap.mmap(-1, ctypes.sizeof(cls)))
        board.resumed_at, board.since = -1, time.monotonic()
        return board

    def enter(self, phase: Phase) -> None:
        now = time.monotonic()
        self.seconds[self.phase] += now - self.since
        self.since, self.phase = now, phase
        self.entered[phase] += 1


class Watch(TrainerCallback):
    """Writes on the board what the trainer is doing."""

    def __init__(self, board: Board):
        self.board = board

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.board.resumed_at = state.global_step
        self.board.enter(Phase.BETWEEN)

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.board.enter(Phase.STEP)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.board.enter(Phase.BETWEEN)

    def around(self, method: Callable[..., Any], phase: Phase) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.board.enter(phase)
            try:
                return method(*args, **kwargs)
            finally:
                self.board.enter(Phase.BETWEEN)

        return watched


def comparable(trainer: Any) -> dict[str, Any]:
    """What a run ends with: adapter weights (frozen copies too), optimizer state, and what was logged of the run."""
    weights = {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad or ".lora_" in n}
    optimizer = trainer.optimizer.state_dict()["state"]
    return {
        "weights": weights,
        "optimizer": {f"{index}.{name}": t for index, state in optimizer.items() for name, t in state.items()},
        "logs": [
            {name: value for name, value in log.items() if not OF_THE_ATTEMPT.search(name)}
            for log in trainer.state.log_history
        ],
        "step": trainer.state.global_step,
    }


def work(scenario: Scenario, base: Path, folder: Path, resume: Any, spoil: Spoil, board: Board) -> None:
    """One attempt, in the child."""
    torch.set_num_threads(1)
    tempfile.tempdir = str(folder / "tmp")  # what a killed attempt leaves there goes with the folder
    Path(tempfile.tempdir).mkdir(exist_ok=True)
    trainer = build(scenario, base, folder)
    if spoil is not None:
        spoil(trainer)
    watch = Watch(board)
    trainer.add_callback(watch)
    trainer._save_checkpoint = watch.around(trainer._save_checkpoint, Phase.SAVING)
    trainer.evaluate = watch.around(trainer.evaluate, Phase.EVALUATING)
    trainer.train(resume_from_checkpoint=resume(folder / "run") if callable(resume) else resume)
    board.enter(Phase.ENDING)
    torch.save(comparable(trainer), folder / "result.unfinished")
    (folder / "result.unfinished").rename(folder / "result.pt")


def fork(log: Path, task: Callable[[], None]) -> int:
    """Run `task` in a child whose output goes to a file; it exits with 0 if the task came to its end."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:  # nothing of the parent's may run in the child, whatever happens
        with open(log, "a", buffering=1) as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
            sys.stdout = sys.stderr = stream
            try:
                task()
                code = 0
            except BaseException:
                traceback.print_exc()
    finally:
        os._exit(code)


# ---- In the parent --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kill:
    """The moment: `share` of the mean length of `phase` after that is entered for the `nth` time.

    A phase of None is the attempt as a whole.
    """

    phase: Phase | None
    nth: int
    share: float

    @staticmethod
    def draw(draw: random.Random) -> "Kill":
        often = 3 * [(Phase.SAVING, 2)] + 2 * [(Phase.STEP, 6), (None, 1)]
        phase, latest = draw.choice([*often, (Phase.EVALUATING, 1), (Phase.ENDING, 1)])
        return Kill(phase, draw.randint(1, latest), draw.random())


@dataclass
class Attempt:
    """How one attempt went."""

    kill: Kill | None
    expected: int  # the step of the newest checkpoint that it found and that nobody had damaged
    killed: bool = False
    phase: Phase = Phase.STARTING  # where it died or ended
    resumed_at: int = -1  # -1: it died before the training began
    unfinished: int = 0  # checkpoints being written that it left
    damaged: str = ""  # the file of the newest checkpoint that was damaged afterwards


@dataclass
class Run:
    """A run that was killed and resumed until it came to its end."""

    scenario: str
    seed: int | str
    attempts: list[Attempt] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)  # from the straight run; none: bit-identical
    seconds: float = 0.0

    @property
    def killed(self) -> list[Attempt]:
        return [attempt for attempt in self.attempts if attempt.killed]


class RunFailed(AssertionError):
    """An attempt failed, did not end, or went on from an older checkpoint than it could have."""


class Torturer:
    """Runs one scenario, straight and killed, in folders below `folder`; `base` is what `make_base` made."""

    def __init__(self, scenario: Scenario, base: Path, folder: Path):
        self.scenario, self.base, self.folder = scenario, base, folder / scenario.name
        self.lengths: dict[Phase | None, float] = {}  # mean seconds of a phase in the straight run; None: of all
        folder, board = self._new_folder("straight"), Board.new()
        self._attempt(folder, Attempt(None, 0), None, None, board)  # a plain train()
        self.straight = torch.load(folder / "result.pt")
        self.lengths = {phase: board.seconds[phase] / max(board.entered[phase], 1) for phase in Phase}
        self.lengths[None] = sum(board.seconds)

    def torture(
        self,
        seed: int | str,
        kills: int | Sequence[Kill],
        damage: float = 0.0,
        resume: Any = "latest",
        spoil: Spoil = None,
    ) -> Run:
        """Kill attempts, let the next one through and compare its end with the straight run's.

        Args:
            seed: of the moments and of the damage; its own for each run of a `Torturer`.
            kills: attempts that may be killed, or when to; one that ends before its moment ends the run.
            damage: the share of kills after which a file of the newest checkpoint is damaged too, as a power cut may;
                only where an older checkpoint is left to go on from.
            resume: the argument of `train`, or what gives it for the run's folder.
            spoil: breaks the trainer of each attempt.
        """
        draw, run = random.Random(f"{self.scenario.name} {seed}"), Run(self.scenario.name, seed)
        moments = [Kill.draw(draw) for _ in range(kills)] if isinstance(kills, int) else kills
        folder, started, broken = self._new_folder(f"seed-{seed}"), time.monotonic(), []
        try:
            for kill in [*moments, None]:
                whole = [path for path in checkpoints(folder) if not any(one.lies_in(path) for one in broken)]
                run.attempts.append(attempt := Attempt(kill, max(map(step_of, whole), default=0)))
                self._attempt(folder, attempt, resume, spoil, Board.new())
                if not attempt.killed:
                    break
                if draw.random() < damage and len(found := checkpoints(folder)) > 1:
                    broken.append(Damage.do(found[-1], draw))
                    attempt.damaged = broken[-1].file.name
            run.differences = differences(self.straight, torch.load(folder / "result.pt"))
        except RunFailed as failure:
            run.differences = [str(failure)]
        run.seconds = time.monotonic() - started
        return run

    def _new_folder(self, name: str) -> Path:
        folder = self.folder / name
        (folder / "run").mkdir(parents=True)
        return folder

    def _attempt(self, folder: Path, attempt: Attempt, resume: Any, spoil: Spoil, board: Board) -> None:
        """Make one attempt, and note in `attempt` how it went."""
        log = folder / "log.txt"
        child = fork(log, lambda: work(self.scenario, self.base, folder, resume, spoil, board))
        status, hangs = self._wait(child, attempt.kill, board)
        attempt.killed = status == -signal.SIGKILL
        attempt.phase, attempt.resumed_at = Phase(board.phase), board.resumed_at
        attempt.unfinished = sum(path.is_dir() and path.name.startswith(".") for path in (folder / "run").iterdir())
        fault = f"ended with {status}" if status not in (0, -signal.SIGKILL) else ""
        if hangs or (attempt.killed and attempt.kill is None):
            fault = f"had no end in {TIMEOUT} s" if hangs else "was killed by somebody else"
        if 0 <= attempt.resumed_at < attempt.expected:
            fault = "went on from an older checkpoint than there is"
        if fault:
            raise RunFailed(f"{attempt} {fault}:\n{log.read_text()[-6000:]}")

    def _wait(self, child: int, kill: Kill | None, board: Board) -> tuple[int, bool]:
        """Wait for the child's end, or bring it about: its exit code (negative: a signal), and whether it hung."""
        began, due = time.monotonic(), None
        while True:
            ended, status = os.waitpid(child, os.WNOHANG)
            now = time.monotonic()
            hangs = now > began + TIMEOUT
            if ended:
                return os.waitstatus_to_exitcode(status), hangs
            if kill and due is None and (kill.phase is None or board.entered[kill.phase] >= kill.nth):
                due = (began if kill.phase is None else now) + kill.share * self.lengths[kill.phase]
            if hangs or (due is not None and now >= due):
                os.kill(child, signal.SIGKILL)
            time.sleep(2e-4)


def checkpoints(folder: Path) -> list[Path]:
    """What is named like a checkpoint in a run's folder, oldest first."""
    return sorted((p for p in (folder / "run").iterdir() if re.fullmatch(r"checkpoint-\d+", p.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


@dataclass(frozen=True)
class Damage:
    """A file of a checkpoint that lost bytes, has wrong ones or is gone."""

    file: Path
    content: bytes | None  # what it holds since

    @staticmethod
    def do(checkpoint: Path, draw: random.Random) -> "Damage":
        file = draw.choice(sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.stat().st_size))
        content, at = file.read_bytes(), draw.randrange(file.stat().st_size)
        flipped = content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]
        damage = Damage(file, draw.choice([None, content[:at], flipped]))
        file.unlink() if damage.content is None else file.write_bytes(damage.content)
        return damage

    def lies_in(self, checkpoint: Path) -> bool:
        """Whether it is still there: the run may have written the checkpoint again."""
        now = self.file.read_bytes() if self.file.is_file() else None
        return self.file.is_relative_to(checkpoint) and now == self.content


def differences(straight: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Where two results of `comparable` are not the same bits; nothing if they are."""
    found = [] if straight["step"] == other["step"] else [f"ended at step {other['step']}, not {straight['step']}"]
    for kind in ("weights", "optimizer"):
        a, b = straight[kind], other[kind]
        found += [f"{kind}: {name} is in one only" for name in sorted(a.keys() ^ b.keys())]
        found += [f"{kind}: {name} differs" for name in sorted(a.keys() & b.keys()) if not same_bits(a[name], b[name])]
    if len(straight["logs"]) != len(other["logs"]):
        found.append(f"logs: {len(other['logs'])} lines, not {len(straight['logs'])}")
    for a, b in zip(straight["logs"], other["logs"], strict=False):
        names = [name for name in sorted(a.keys() | b.keys()) if json.dumps(a.get(name)) != json.dumps(b.get(name))]
        found += [f"logs: step {a['step']}: {name} is {b.get(name)}, not {a.get(name)}" for name in names]
    return found


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are the same, zeros of either sign and NaNs included."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))
