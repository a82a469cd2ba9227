"""Counts how often control moves from one part of the package to another during one optimizer step.

    python benchmarks/step_path.py [--moves 110 --rooms 10] [--edges] [--json FILE.json]

Trains the bundled model by DPO with the default options (NF4, bfloat16, checkpointed and fused layers, reference by
switching the adapter off), four pairs a step on the CPU, and follows the fourth step with `sys.setprofile`: from the
end of step 3 to the end of step 4. That is one whole turn of the training loop: the log entry, fetching and laying out
the micro-batch, reference and policy, loss, backward, clipping, optimizer step, callbacks.

A *room* is what stands directly in the package's folder: a subfolder with everything below it, or a module. A *move*
is a call or a return by which control passes from a function in one room to a function in another. Frames of torch,
transformers and peft in between don't count: a hook that the training loop calls was reached from the innermost
function of the package that is below it on the stack. A call and its return are two moves.

By this definition the package had 176 moves between 17 rooms at commit 3deedc7. Other definitions are printed beside
it: the same between files, between folders alone (modules of the top count as one room), calls without returns, and
the same without the log entry or without checkpointed layers. `--moves` and `--rooms` are limits: the exit status is 1
above them. Figures do not depend on the machine's speed; they may on the versions of the libraries.
"""

import argparse
import json
import logging
import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")  # before torch is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from datasets import Dataset, disable_progress_bars
from transformers import PrinterCallback, TrainerCallback
from transformers.utils import logging as transformers_logging

import dpo_peft
from dpo_peft import DPOConfig, DPOTrainer

PACKAGE = Path(dpo_peft.__file__).parent
PREFIX = f"{PACKAGE}{os.sep}"
STEP = 4  # the step that is followed: what is done once has been done by then
VARIANTS: dict[str, dict[str, Any]] = {
    "default options, logged": {},
    "without the log entry": {"logging_steps": 100},
    "without checkpointed layers": {"gradient_checkpointing": False},
    "float32, plain layers": {"bf16": False, "gradient_checkpointing": False, "fused_layers": False},
}


class Event(NamedTuple):
    """A call or a return: the files of the package that control left and went to; "" outside of it."""

    call: bool
    left: str
    went_to: str


def own_file(frame: FrameType | None) -> str:
    """The file of the innermost function of the package, from a frame downwards."""
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(PREFIX):
            return Path(name[len(PREFIX) :]).as_posix()
        frame = frame.f_back
    return ""


class Follow(TrainerCallback):
    """Notes every call and return in the package during one step."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == STEP - 1:
            sys.setprofile(self._note)
        elif state.global_step == STEP:
            sys.setprofile(None)

    def _note(self, frame: FrameType, event: str, argument: Any) -> None:
        if event in ("call", "return") and frame.f_code.co_filename.startswith(PREFIX):
            own, below = own_file(frame), own_file(frame.f_back)
            self.events.append(Event(True, below, own) if event == "call" else Event(False, own, below))


def follow(**options: Any) -> list[Event]:
    """The calls and returns of one step of a run with these options."""
    with open(PACKAGE / "quickstart" / "data" / "train.jsonl", encoding="utf-8") as lines:
        rows = [json.loads(line) for _, line in zip(range(64), lines, strict=False)]
    pairs = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]
    followed = Follow()
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "output_dir": folder,
            "max_steps": STEP + 1,
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "use_cpu": True,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            **options,
        }
        trainer = DPOTrainer(
            str(PACKAGE / "quickstart" / "model"),
            args=DPOConfig(**settings),
            train_dataset=Dataset.from_list(pairs),
            callbacks=[followed],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return followed.events


# ---- Counting -------------------------------------------------------------------------------------------------------


def room_of(file: str) -> str:
    """What stands directly in the package's folder: "forward/score.py" is in "forward", "trainer.py" is itself."""
    return file.split("/")[0]


def folder_of(file: str) -> str:
    """A subfolder of the package, or "." for all modules that lie in none."""
    return file.split("/")[0] if "/" in file else "." if file else ""


def moves(events: list[Event], place: Callable[[str], str]) -> list[Event]:
    """The events that pass from one place to another, files replaced by their places."""
    placed = (Event(event.call, place(event.left), place(event.went_to)) for event in events)
    return [event for event in placed if event.left != event.went_to]


def places(events: list[Event], place: Callable[[str], str]) -> set[str]:
    """Every place that was visited, those without a move included."""
    return {place(file) for event in events for file in (event.left, event.went_to) if file}


def counts(events: list[Event]) -> dict[str, int]:
    """Moves, calls alone, and places, by each definition of a place."""
    found = {}
    for name, place in (("rooms", room_of), ("files", str), ("folders", folder_of)):
        passed = moves(events, place)
        found |= {f"moves between {name}": len(passed), f"calls between {name}": sum(one.call for one in passed)}
        found[name] = len(places(events, place))
    return found


def entries(events: list[Event]) -> Counter[str]:
    """How often each file was entered by a call from another one."""
    return Counter(event.went_to for event in moves(events, str) if event.call)


def edges(events: list[Event]) -> Counter[tuple[str, str]]:
    """How often a room called another one."""
    return Counter((event.left, event.went_to) for event in moves(events, room_of) if event.call)


# ---- The command ----------------------------------------------------------------------------------------------------


def table(found: dict[str, dict[str, int]]) -> str:
    """The counts of every run, a line each."""
    columns = list(next(iter(found.values())))
    width = max(map(len, found))
    lines = [f"{'':<{width}}  " + "  ".join(columns)]
    for name, numbers in found.items():
        lines.append(f"{name:<{width}}  " + "  ".join(f"{numbers[c]:>{len(c)}}" for c in columns))
    return "\n".join(lines)


def in_words(events: list[Event], with_edges: bool) -> str:
    """The counts of the step, the files that were entered, and if asked for which room called which."""
    passed = counts(events)
    lines = [f"{passed['moves between rooms']} moves between {passed['rooms']} rooms, in {passed['files']} files", ""]
    lines += [f"{'file':<36} entries from other files"]
    lines += [f"{file:<36} {number:>7}" for file, number in entries(events).most_common()]
    if with_edges:
        lines += ["", f"{'calls between rooms':<36}  number"]
        for (caller, called), number in edges(events).most_common():
            lines.append(f"{caller or 'outside'} -> {called}".ljust(37) + f"{number:>7}")
    return "\n".join(lines)


def quiet() -> None:
    torch.set_num_threads(1)
    disable_progress_bars()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("dpo_peft").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def main() -> int:
    """Count, print, and compare with the limits; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moves", type=int, help="Most moves between rooms.")
    parser.add_argument("--rooms", type=int, help="Most rooms.")
    parser.add_argument("--edges", action="store_true", help="Show which room called which.")
    parser.add_argument("--json", type=Path, metavar="FILE.json", help="Write the counts, too.")
    options = parser.parse_args()
    quiet()
    followed = {name: follow(**changed) for name, changed in VARIANTS.items()}
    found = {name: counts(events) for name, events in followed.items()}
    main_run = next(iter(VARIANTS))
    print(in_words(followed[main_run], options.edges))
    print(f"\n{table(found)}")
    if options.json is not None:
        entered = dict(entries(followed[main_run]).most_common())
        options.json.write_text(json.dumps({"counts": found, "entries": entered}, indent=1) + "\n", encoding="utf-8")
    limits = {"moves between rooms": options.moves, "rooms": options.rooms}
    above = {what: most for what, most in limits.items() if most is not None and found[main_run][what] > most}
    for what, most in above.items():
        print(f"too many: {found[main_run][what]} {what}, at most {most}")
    return 1 if above else 0


if __name__ == "__main__":
    sys.exit(main())
