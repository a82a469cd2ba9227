"""Kills the commands of an adapter's whole life at random moments. Is anything finished lost, or half taken for whole?

    python benchmarks/life_kills.py [--kills 100] [--seed 0] [--out FILE]

A life is `pairs`, `train`, `score`, `merge`, `push` (to a local Hub) and `report`, on the bundled 4-bit model. Each
command gets SIGKILL at moments drawn over its length, and is given again until it comes to its end. After each kill
three things are looked at:

- what the commands before it had finished is there as it was, byte for byte;
- what the killed command was to write is not there, or whole: the same as in a life that nobody killed. Of an adapter
  `dpo-peft score` is the judge: it refuses the folder, or gives the straight life's scores;
- at the end of the life all of it is as in the straight life.

Two thirds of the kills fall into the last third of a command, where results are written. One thread; about a quarter
of an hour for 100 kills. Writes benchmarks/results/life_kills_cpu.json; exits with 1 if something was lost.
"""

# ruff: noqa: E402
import argparse
import hashlib
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

# Before torch is imported: attempts are forks of this process.
os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", WANDB_DISABLED="true", HF_TOKEN="hf_write")
os.environ.update(HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1", HF_DATASETS_OFFLINE="1")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests" / "helpers"), str(HERE)]

import torch
from hub_server import HubServer
from huggingface_hub import constants
from kill_harness import fork
from kills import commit

from dpo_peft import quickstart
from dpo_peft.artifacts.card import framework_versions
from dpo_peft.cli import main as dpo_peft

REWARD = """
def reward(prompts, completions, **columns):
    return [float(sum(map(ord, str(text))) % 97) for text in completions]
"""
REPO = "me/life"
BASE = "someone/base"
# They hold times, which differ between lives: for these, whole is being there to the last byte.
TIMED = {"README.md": "", "metrics.json": "}", "report.html": "</html>", "merge_report.json": "}", "recipe.yaml": ""}


def digest(name: str, content: bytes) -> str:
    """Of a file; of one that holds times whether its end is there."""
    if name in TIMED:
        return "whole" if content.rstrip().endswith(TIMED[name].encode()) and content else "half"
    return hashlib.sha256(content).hexdigest()


def digests(path: Path) -> dict[str, str]:
    """Of a file, or of the visible files below a folder but checkpoints; nothing if it is not there."""
    if path.is_file():
        return {path.name: digest(path.name, path.read_bytes())}
    files = (file for file in sorted(path.rglob("*")) if file.is_file())
    names = {str(file.relative_to(path)): file for file in files}
    return {
        name: digest(name, file.read_bytes())
        for name, file in names.items()
        if not re.match(r"\.|checkpoint-|logs/|runs/", name)
    }


@dataclass
class Life:
    """A folder in which the commands are given one after the other."""

    folder: Path
    hub: HubServer

    def path(self, name: str) -> Path:
        return self.folder / name

    def published(self) -> dict[str, str]:
        """What everybody sees of the repository."""
        repo = self.hub.repos.get(REPO)
        files = repo.files if repo and repo.find("main") else {}
        return {name: digest(name, blob.content) for name, blob in files.items() if name != ".gitattributes"}


@dataclass(frozen=True)
class Command:
    """A command of the life.

    Attributes:
        name: of the command.
        argv: its arguments, for a life.
        output: what it makes, in the life's folder; None: what is published.
        essential: of a folder the files that make the result; the others may be missing after a kill, not half there.
    """

    name: str
    argv: Callable[[Life], list[str]]
    output: str | None
    essential: tuple[str, ...] = ()

    def state(self, life: Life) -> dict[str, str]:
        found = life.published() if self.output is None else digests(life.path(self.output))
        return {name: value for name, value in found.items() if not self.essential or name in self.essential}


def train(life: Life) -> list[str]:
    options = {
        "model_name_or_path": quickstart.model_path(),
        "dataset_name": life.path("pairs.jsonl"),
        "output_dir": life.path("run"),
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_length": 256,
        "resume_from_checkpoint": "latest",
        "report_to": "none",
        "disable_tqdm": "true",
        "use_cpu": "true",
        "bf16": "false",
        "dtype": "float32",
    }
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


COMMANDS = (
    Command(
        "pairs",
        lambda life: (
            [str(quickstart.model_path()), "--prompts", str(life.path("prompts.jsonl"))]
            + ["--output", str(life.path("pairs.jsonl")), "--reward", f"{life.path('reward.py')}:reward"]
            + "--num_candidates 3 --max_new_tokens 12 --batch_size 6 --require_finished false".split()
        ),
        "pairs.jsonl",
    ),
    Command("train", train, "run", ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json")),
    Command(
        "score",
        lambda life: (
            [str(life.path("run")), "--dataset_name", str(life.path("pairs.jsonl"))]
            + ["--output", str(life.path("scores.jsonl"))]
        ),
        "scores.jsonl",
    ),
    Command("merge", lambda life: [str(life.path("run")), "--output_dir", str(life.path("merged"))], "merged"),
    Command("push", lambda life: [str(life.path("run")), "--repo_id", REPO, "--base_model", BASE], None),
    Command("report", lambda life: [str(life.path("run")), "--output", str(life.path("report.html"))], "report.html"),
)


@dataclass
class Figures:
    """What was tried and what was found."""

    lives: int = 0
    kills: dict[str, int] = field(default_factory=lambda: {command.name: 0 for command in COMMANDS})
    left: dict[str, int] = field(default_factory=lambda: {"nothing": 0, "whole": 0, "refused": 0})
    lost: list[str] = field(default_factory=list)


class Killer:
    """Lives of adapters below a folder, the first one straight."""

    def __init__(self, folder: Path, hub: HubServer, draw: random.Random):
        self.folder, self.hub, self.draw, self.figures = folder, hub, draw, Figures()
        self.prompts = [json.loads(line)["prompt"] for line in Path(quickstart.train_file()).open(encoding="utf-8")][
            :8
        ]
        life = self.new_life("straight")
        self.seconds, self.straight = {}, {}
        for command in COMMANDS:
            began = time.monotonic()
            if self.attempt(command, life, None) != 0:
                raise SystemExit(f"{command.name} fails without a kill:\n{life.path('log.txt').read_text()[-4000:]}")
            self.seconds[command.name] = time.monotonic() - began
            self.straight[command.name] = command.state(life)
        print({name: round(seconds, 1) for name, seconds in self.seconds.items()}, flush=True)

    def new_life(self, name: str) -> Life:
        """Each life has the same path while it is lived: paths stand in results."""
        self.hub.repos.pop(REPO, None)
        folder = self.folder / "life"
        if folder.exists():
            folder.rename(self.folder / f"before-{name}")
        folder.mkdir()
        rows = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in self.prompts)
        (folder / "prompts.jsonl").write_text(rows, encoding="utf-8")
        (folder / "reward.py").write_text(REWARD)
        return Life(folder, self.hub)

    def attempt(self, command: Command, life: Life, kill_after: float | None, argv: list[str] | None = None) -> int:
        """Gives a command; returns its exit code, -9 if it was killed."""

        def task() -> None:
            os._exit(dpo_peft([command.name, *(argv or command.argv(life))]))

        child, began = fork(life.path("log.txt"), task), time.monotonic()
        while True:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            if kill_after is not None and time.monotonic() - began >= kill_after:
                os.kill(child, signal.SIGKILL)
            time.sleep(1e-3)

    def live(self, name: str, kills_of_a_command: int) -> None:
        """One life; what is lost on the way stands in `figures.lost`."""
        life = self.new_life(name)
        self.figures.lives += 1
        for place, command in enumerate(COMMANDS):
            code = -signal.SIGKILL
            for _ in range(kills_of_a_command):
                late = self.draw.random() < 2 / 3
                share = self.draw.uniform(0.7, 1.0) if late else self.draw.uniform(0, 0.7)
                code = self.attempt(command, life, share * self.seconds[command.name])
                if code != -signal.SIGKILL:
                    break
                self.figures.kills[command.name] += 1
                self.look(life, place, f"life {name}, {command.name} killed at {share:.3f}")
            if code == -signal.SIGKILL:
                code = self.attempt(command, life, None)
            # Killed after its last write, a command finds its own result there, and says so.
            if code != 0 and command.state(life) != self.straight[command.name]:
                said = life.path("log.txt").read_text().splitlines()[-3:]
                self.figures.lost.append(f"life {name}: {command.name} ended with {code}: {said}")
                print("LOST", self.figures.lost[-1], flush=True)
                return
            self.compare(command, life, f"life {name}, {command.name} at its end")

    def look(self, life: Life, place: int, when: str) -> None:
        """What a kill left."""
        for before in COMMANDS[:place]:
            self.compare(before, life, f"{when}: {before.name}")
        command = COMMANDS[place]
        found = command.state(life)
        if command.name == "train" and "adapter_config.json" in digests(life.path("run")):
            output = life.path("judged.jsonl")
            argv = [str(life.path("run")), "--dataset_name", str(life.path("pairs.jsonl")), "--output", str(output)]
            if self.attempt(COMMANDS[2], life, None, argv) == 2:
                self.figures.left["refused"] += 1
            else:
                self.figures.left["whole"] += 1
                self.compare(command, life, when)
            output.unlink(missing_ok=True)
        elif not found:
            self.figures.left["nothing"] += 1
        else:
            self.figures.left["whole"] += 1
            self.compare(command, life, when)

    def compare(self, command: Command, life: Life, when: str) -> None:
        found, straight = command.state(life), self.straight[command.name]
        different = sorted(name for name in found.keys() | straight.keys() if found.get(name) != straight.get(name))
        if different:
            self.figures.lost.append(f"{when}: {', '.join(different)}")
            print("LOST", self.figures.lost[-1], flush=True)


@contextmanager
def local_hub(folder: Path) -> Iterator[HubServer]:
    """A Hub on this machine, with the client of this process turned to it."""
    ThreadingHTTPServer.handle_error = lambda *_: None  # type: ignore[method-assign]  # killed clients are no news
    with HubServer() as server:
        server.add_account("me", "hf_write", "write")
        server.add_repo(BASE, {"config.json": b"{}"})
        constants.HF_HUB_OFFLINE = False
        constants.ENDPOINT = server.url
        constants.HUGGINGFACE_CO_URL_TEMPLATE = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        constants.HF_TOKEN_PATH = constants.HF_STORED_TOKENS_PATH = str(folder / "token")
        yield server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="at least that many in all")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "life_kills_cpu.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    started, source = time.time(), commit()
    with tempfile.TemporaryDirectory(prefix="lives-") as name, local_hub(Path(name)) as hub:
        killer = Killer(Path(name), hub, random.Random(args.seed))
        while sum(killer.figures.kills.values()) < args.kills:
            killer.live(str(killer.figures.lives), 3)
            print(killer.figures.lives, killer.figures.kills, killer.figures.left, flush=True)
    results: dict[str, Any] = {
        "device": "cpu, one thread",
        "versions": framework_versions(),
        "commit": source,
        "options": {"kills": args.kills, "seed": args.seed},
        "seconds": round(time.time() - started, 1),
        **vars(killer.figures),
    }
    args.out.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps({name: results[name] for name in ("lives", "kills", "left", "lost")}, indent=2))
    sys.exit(bool(killer.figures.lost))


if __name__ == "__main__":
    main()
