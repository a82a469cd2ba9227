"""`dpo-peft train --num_processes N`: starts the processes of a run, passes signals on, and says once how it ended.

How they are set up is accelerate's: a file of recipes/accelerate or one of the user's becomes the environment of
processes that run the same command. The first of them prints; what the others print goes to a file, of which is shown
what the first has not said. Each says how it ended in the folder of the job (`worker`), and the job says it once.
"""

import argparse
import atexit
import ctypes
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

import yaml

from ..errors import OptionError
from ..spelling import meant
from . import JOB, help
from .options import as_words, option, printable, recipe_files, show_progress, split_config

logger = logging.getLogger(__name__)
PR_SET_PDEATHSIG = 1
# Seconds after a process has failed: then the others, which may wait for it for ever, are asked to end, and ended.
ENDINGS = ((5, signal.SIGTERM), (15, signal.SIGKILL))
RELAYED = 5  # seconds between two looks at the warnings of all
TAIL = 20  # lines of what a process printed before it died


@dataclass(frozen=True)
class LaunchArguments:
    """How many processes train, and where."""

    num_processes: int | None = option(None, "Processes that train, one for each GPU, on all machines together.")
    accelerate_config: str | None = option(None, "How they share the work: ddp, fsdp2, or a YAML file of accelerate.")
    num_machines: int | None = option(None, "Machines; the command is started on each. Default 1.")
    machine_rank: int | None = option(None, "Which of them this one is, from 0.")
    main_process_ip: str | None = option(None, "Address of machine 0, for the others.")
    main_process_port: int | None = option(None, "Port of machine 0, for the others.")
    gpu_ids: str | None = option(None, "GPUs of this machine to train on, such as 0,1. Default all.")


@dataclass
class Job:
    """Processes of one run on this machine."""

    processes: int  # how many the run has, on all machines
    ranks: range  # those of this machine
    env: dict[str, str]  # what they get in their environment, but for what tells them apart
    address: tuple[str, int]  # host and port at which all of them meet; port 0 is any that is free
    dry_run: bool  # nothing is to be started

    def __post_init__(self) -> None:
        self._workers: dict[int, subprocess.Popen[bytes]] = {}  # by rank
        self._received: list[int] = []  # signals
        self._ended: set[int] = set()  # ranks that did not end by themselves
        self._shown: set[str] = set()
        self._waiting: set[str] = set()

    def run(self, argv: Sequence[str]) -> None:
        """Runs `dpo-peft train` in all processes, to the end of all of them.

        Raises:
            SystemExit: with the status that a single process would have ended with, after saying why.
            OptionError: the port is taken.
        """
        with tempfile.TemporaryDirectory(prefix="dpo-peft-") as name, self._signals():
            folder = Path(name)
            store = self._start(folder, argv)
            try:
                self._wait(folder)
            finally:
                self._send(signal.SIGKILL)
            self._relay(folder, last=True)
            del store
            code = self._say_how_it_ended(folder)
        if code:
            raise SystemExit(code)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Inside, signals are passed on: the processes head sessions, which a terminal's Ctrl-C doesn't reach."""

        def receive(number: int, frame: object) -> None:
            self._received.append(number)
            self._send(number)

        with ExitStack() as restored:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if (before := signal.getsignal(number)) is not signal.SIG_IGN:
                    restored.callback(signal.signal, number, before)
                    signal.signal(number, receive)
            yield

    def _start(self, folder: Path, argv: Sequence[str]) -> object:
        """Starts the processes. Returns the store where they meet, which ends with the last reference to it."""
        from torch.distributed import TCPStore

        host, port = self.address
        store = None
        if self.ranks.start == 0:
            try:
                store = TCPStore(host, port, is_master=True, wait_for_workers=False)
            except RuntimeError as error:
                raise OptionError(
                    f"main_process_port={port} of {host} can't be used: {str(error).splitlines()[0]} Give another one."
                ) from error
            port = store.port
        shared = self.env | {"MASTER_ADDR": host, "MASTER_PORT": str(port), JOB: str(folder)}
        shared |= {"WORLD_SIZE": str(self.processes), "LOCAL_WORLD_SIZE": str(len(self.ranks))}
        for local, rank in enumerate(self.ranks):
            env = shared | {"RANK": str(rank), "LOCAL_RANK": str(local)}
            with (folder / f"{rank}.log").open("wb") as log:
                output = None if local == 0 else log
                self._workers[rank] = subprocess.Popen(
                    command(argv),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env=env,
                    start_new_session=True,
                )
        for number in self._received:  # one may have come in between
            self._send(number)
        return store

    def _send(self, number: int) -> None:
        for worker in self._workers.values():
            if worker.poll() is not None:
                continue
            if number == signal.SIGKILL:
                os.killpg(worker.pid, number)  # with what it has started
                worker.wait()
            else:
                worker.send_signal(number)

    def _asked(self) -> set[int]:
        """Returns how a process ends that was told to by a signal to this one."""
        return {code for number in self._received for code in (-number, 128 + number)}

    def _wait(self, folder: Path) -> None:
        """Waits for all processes. When one fails, or at a second signal, the others are given a few seconds."""
        began: float | None = None
        endings, looked = [*ENDINGS], time.monotonic()
        while running := {rank for rank, worker in self._workers.items() if worker.poll() is None}:
            now = time.monotonic()
            codes = {worker.returncode for worker in self._workers.values()}
            if began is None and (codes - {None, 0} - self._asked() or len(self._received) > 1):
                began = now
            if began is not None and endings and now > began + endings[0][0]:
                self._ended |= running
                self._send(endings.pop(0)[1])
            if now > looked + RELAYED:
                self._relay(folder)
                looked = now
            time.sleep(0.05)

    # ---- What they say ----------------------------------------------------------------------------------------------

    def _relay(self, folder: Path, last: bool = False) -> None:
        """Shows warnings of the other processes that the first has not shown, once it has had time to."""
        main, *others = (_read(folder / f"{rank}.warnings").split("\0")[:-1] for rank in self.ranks)
        self._shown |= {*main}
        for rank, texts in zip(self.ranks[1:], others, strict=True):
            for text in texts:
                if text not in self._shown and (last or text in self._waiting):
                    self._shown.add(text)
                    logger.warning("Process %d: %s", rank, text)
                self._waiting.add(text)

    def _say_how_it_ended(self, folder: Path) -> int:
        """Prints each error once. Returns the exit status."""
        codes = {rank: worker.returncode for rank, worker in self._workers.items() if worker.returncode}
        files = [file for rank in self.ranks if (file := folder / f"{rank}.end").is_file()]
        files.sort(key=lambda file: file.stat().st_mtime_ns)
        ends = [(int(file.stem), *json.loads(file.read_text())) for file in files]
        told = [(rank, code, text) for rank, code, text in ends if text.startswith("dpo-peft: ")]
        by_main = {text for rank, _, text in told if rank == self.ranks.start}
        for text in dict.fromkeys(text for _, _, text in told):
            rank = next(rank for rank, _, one in told if one == text)
            print(text if text in by_main else f"dpo-peft: process {rank}: {text[10:]}", file=sys.stderr)
        if not codes:
            return 0
        if self._received and not told and ({*codes.values()} & self._asked() or not ends):
            return 128 + self._received[0]
        for rank in codes.keys() - {rank for rank, _, _ in ends} - self._ended:  # died without a word
            code = codes[rank]
            if code > 0:
                self._say(folder, rank, f"ended with exit status {code}.")
                return code
            why = "; the system does so when memory runs out" if -code == signal.SIGKILL else ""
            name, tail = signal.Signals(-code).name, 0 if -code == signal.SIGKILL else TAIL
            self._say(folder, rank, f"was ended by {name} (exit status {128 - code}){why}.", tail)
            return 128 - code
        rank, code, text = ends[0]  # what others met later may be that this one was gone
        if text not in ("", *(one for _, _, one in told)):
            self._say(folder, rank, f"failed (exit status {code}):\n{text.rstrip()}", tail=0)
        return code

    def _say(self, folder: Path, rank: int, text: str, tail: int = TAIL) -> None:
        """Prints what became of a process, and what it had printed last."""
        lines = [f"dpo-peft: process {rank} of {self.processes} {text}"]
        lines += _read(folder / f"{rank}.log").splitlines()[-tail:] if tail else []
        print(printable("\n".join(lines)), file=sys.stderr)


def command(argv: Sequence[str]) -> list[str]:
    """Returns the command line of each process."""
    # Modules beside the user's files stand for nothing of ours, unless they do in this process too.
    safe = [] if os.getcwd() in sys.path else ["-P"]
    return [sys.executable, *safe, "-m", str(__package__), "train", *argv]


def _read(file: Path) -> str:
    return file.read_text("utf-8", "replace") if file.is_file() else ""


# ---- In each process ------------------------------------------------------------------------------------------------

said: list[str] = []  # errors, for the job to print


def worker(run: Callable[[], int]) -> NoReturn:
    """Runs a command as one process of a job, says how it ended, and ends."""
    folder, rank = Path(os.environ[JOB]), os.environ["RANK"]
    if sys.platform == "linux":  # if the job is killed, this process is told
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    show_progress()
    warnings = logging.FileHandler(folder / f"{rank}.warnings", encoding="utf-8", delay=True)
    warnings.setLevel(logging.WARNING)
    warnings.terminator = "\0"
    logging.getLogger("dpo_peft").addHandler(warnings)
    text = ""
    try:
        code = run()
    except SystemExit as end:
        code, text = (int(end.code or 0), "") if not isinstance(end.code, str) else (1, end.code)
    except BaseException:
        code, text = 1, traceback.format_exc()
    if code:
        (folder / f"{rank}.end").write_text(json.dumps([code, said[0] if said else text]))
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    # An orderly end may wait for a process that is gone; and a native thread of a library may abort it.
    os._exit(code)


# ---- What is asked for ----------------------------------------------------------------------------------------------


def job(argv: Sequence[str]) -> Job | None:
    """Returns the job that the options of `dpo-peft train` ask for; None if this process is to train.

    Raises:
        OptionError: an impossible number, an unknown config, more processes than GPUs, or processes that were launched
            already.
    """
    asked = _parse(argv)
    given = {f.name: value for f in fields(LaunchArguments) if (value := getattr(asked, f.name)) is not None}
    if not given or JOB in os.environ or {*help.ASKED} & {*argv}:
        return None
    if launched := {"RANK", "WORLD_SIZE"} & {*os.environ}:
        number = int(os.environ.get("WORLD_SIZE") or 1)
        for name, value in given.items():
            if (name, value) != ("num_processes", number):
                raise OptionError(
                    f"{name}={value!r} has no effect: this is one of {number} processes that were launched already "
                    f"({launched.pop()} is set). Leave it out, or start `dpo-peft train` by itself."
                )
        return None
    if given.get("accelerate_config") == "single_gpu":  # TRL's
        del given["accelerate_config"]
        given.setdefault("num_processes", 1)
    if not {"num_processes", "accelerate_config"} & {*given}:
        name, value = next(iter(given.items()))
        raise OptionError(f"{name}={value!r} has no effect without num_processes: give it too, or leave this out.")
    if given.get("num_processes", 2) == 1 and "accelerate_config" not in given:
        return None
    return _resolve(given, bool(asked.use_cpu), bool(asked.dry_run))


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """Returns the options that are read here, of file and command line; importing all others takes many seconds."""

    def refuse(message: str) -> NoReturn:
        raise OptionError(message)

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = refuse  # type: ignore[method-assign]
    kinds = {f.name: int if "int" in str(f.type) else str for f in fields(LaunchArguments)}
    for name, kind in kinds.items():
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", type=kind)
    for name in ("dry_run", "use_cpu"):
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", nargs="?", const=True, type=_is_yes)
    words, from_file = split_config(argv)
    read = {action.dest for action in parser._actions}
    own = as_words({name: value for name, value in from_file.items() if name in read})
    return parser.parse_known_args([*own, *words])[0]


def _is_yes(text: str) -> bool:
    return text.lower() in ("1", "true", "yes", "y", "t")


def _resolve(given: dict[str, Any], use_cpu: bool, dry_run: bool) -> Job | None:
    """Has accelerate read its file, with the options over it."""
    import torch
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    name = given.pop("accelerate_config", "ddp")
    words = [f"--{option}={value}" for option, value in given.items()]
    words += ["--config_file", str(_config(name)), "--num_cpu_threads_per_process", "1"]  # it is set below
    try:
        args, config, _ = _validate_launch_command(launch_command_parser().parse_args([*words, "dpo_peft"]))
        kind = getattr(config.distributed_type, "value", config.distributed_type)
        if kind not in ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP"):
            raise ValueError(f"distributed_type {kind} is not offered. Take --accelerate_config fsdp2 or ddp.")
        address = (args.main_process_ip or "127.0.0.1", args.main_process_port or 0)
        args.main_process_port = 0  # which one is free is found out as it is taken
        env = prepare_multi_gpu_env(args)
    except (ValueError, TypeError, AttributeError, OSError, yaml.YAMLError) as error:
        raise OptionError(f"accelerate_config={name!r}: {error}") from error
    total, machines, machine = args.num_processes, args.num_machines or 1, int(args.machine_rank or 0)
    _check_machines(total, machines, machine, args.main_process_ip is not None and address[1] > 0)
    if total == 1 and kind != "FSDP":
        return None
    local = total // machines
    gpus = 0 if use_cpu or args.use_cpu else torch.cuda.device_count()
    if gpus and args.gpu_ids not in (None, "all"):
        gpus = min(gpus, len(str(args.gpu_ids).split(",")))
    if gpus and local > gpus:
        raise OptionError(
            f"num_processes={total}: {local} on this machine, which has {gpus} GPU{'s' * (gpus > 1)} for them. Give "
            f"--num_processes {gpus * machines}, or with use_cpu as many as you like."
        )
    if not gpus:
        env["ACCELERATE_USE_CPU"] = "true"
    threads = max(torch.get_num_threads() // local, 1)
    env |= {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    env |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}  # the store is the job's
    return Job(total, range(machine * local, (machine + 1) * local), env, address, dry_run)


def _check_machines(total: int, machines: int, machine: int, has_address: bool) -> None:
    if total < 1 or machines < 1 or total % machines:
        raise OptionError(
            f"num_processes={total} on num_machines={machines}: give a whole number of processes, as many on each "
            "machine; num_processes counts those of all."
        )
    if not 0 <= machine < machines:
        raise OptionError(f"machine_rank={machine}: machines are counted from 0 to {machines - 1} (num_machines - 1).")
    if machines > 1 and not has_address:
        raise OptionError(
            f"num_machines={machines}: give main_process_ip and main_process_port, the address of machine 0 and a "
            "free port there, the same on all machines."
        )


def _config(name: str) -> Path:
    if (path := Path(name)).is_file():
        return path
    own = {path.stem: path for path in recipe_files().values() if path.parent.name == "accelerate"}
    if name not in own:
        raise OptionError(
            f"accelerate_config={name!r} is neither a file nor one of {', '.join(own)}.{meant(name, own)}"
        )
    return own[name]
