"""Completes fixed prompts at each evaluation: `samples.jsonl`, a few of them in the log, and tables in trackers."""

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState

from ..config import DPOConfig
from ..data.images import Images
from ..disk import part_of
from ..distributed import meet, rank
from ..errors import OptionError
from ..files import write_rows
from ..model.generation import end_tokens, sample_completions
from ..training.pictures import PICTURES, keep_pictures

logger = logging.getLogger(__name__)

SAMPLES = "samples.jsonl"
SHOWN, SHOWN_CHARACTERS = 3, 240  # of the samples, in the log

Row = dict[str, Any]  # a line of a file of rows


class KeptRows(TrainerCallback):
    """Rows that a run adds to, in a file of its folder and in each of its checkpoints."""

    def __init__(self, run_dir: str, name: str):
        self.run_dir, self.name = Path(run_dir), name
        self.rows: list[Row] = []

    def on_train_begin(self, args: object, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Begins the run's file anew: what is there is an earlier run's, or of steps that are taken again."""
        path = self.run_dir / self.name
        if state.global_step == 0:
            self.rows = []
        if rank() == 0:
            if path.is_file() and not _of_a_run(path):
                raise OptionError(f"{path} is in the way, and no run wrote it: move it, or give another output_dir.")
            for left in (path, part_of(path)):
                left.unlink(missing_ok=True)
            self.state_dict(self.run_dir)

    def state_dict(self, folder: Path) -> dict[str, object]:
        """Writes the rows so far into a folder."""
        if self.rows:
            write_rows(folder / self.name, self.rows)
        return {}

    def load_state_dict(self, state: Mapping[str, object], folder: Path) -> None:
        """Takes up a run's rows from its checkpoint; there is no file where there were none."""
        path = folder / self.name
        lines = path.read_text("utf-8").splitlines() if path.is_file() else []
        self.rows = [json.loads(line) for line in lines]


def _of_a_run(path: Path) -> bool:
    """Whether a file begins as those do that runs write."""
    with open(path, "rb") as file, suppress(ValueError, TypeError):
        return b"" == (line := file.readline()) or "step" in json.loads(line)
    return False


class Samples(KeptRows):
    """Completes fixed prompts, the first different ones of prepared evaluation rows, the same at each evaluation, and
    keeps them in `samples.jsonl`; by the main process. Those of the trainer's callbacks that are of `report_to` get
    them as tables."""

    def __init__(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        args: DPOConfig,
        rows: Iterable[Row],
        autocast: Callable[[], AbstractContextManager[object]],
        callbacks: Sequence[TrainerCallback],
        images: Images | None = None,
    ):
        super().__init__(args.output_dir, SAMPLES)
        self.model, self.tokenizer, self.args, self._data, self._autocast = model, tokenizer, args, rows, autocast
        self._callbacks, self._images = callbacks, images
        self._prompts: list[Row] | None = None
        self._shown = Conversation(tokenizer)

    def on_train_begin(self, args: object, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Begins the run's file, with the completions before training."""
        super().on_train_begin(args, state, control)
        if state.global_step == 0:
            if rank() == 0:
                (self.run_dir / PICTURES).unlink(missing_ok=True)
            self.take(0)
            meet()

    def take(self, step: int, again: bool = False) -> None:
        """Samples a step's completions, once unless `again`."""
        known = any(row["step"] == step for row in self.rows)
        if not self.args.sample_prompts or rank() != 0 or (known and not again):
            return
        if self._prompts is None:
            self._prompts = self._choose_prompts()
            self._pictures = keep_pictures(self.run_dir, self._images, self._prompts)
        try:
            rows = [{"step": step, "prompt_number": i, **row} for i, row in enumerate(self._complete())]
        except torch.OutOfMemoryError as error:
            why = "they don't fit into memory. Lower sample_prompts or sample_max_new_tokens"
            logger.warning("No samples at step %d: %s. (%s)", step, why, str(error).split("\n")[0])
            torch.cuda.empty_cache()
            return
        self.rows = [row for row in self.rows if row["step"] != step] + rows
        self.state_dict(self.run_dir)
        logger.info("Samples at step %d:\n%s", step, in_short(rows))
        send_table(self._callbacks, rows, step)

    def renew(self, step: int) -> None:
        """Samples a step again, if it was sampled: another adapter has been loaded."""
        if any(row["step"] == step for row in self.rows):
            self.take(step, again=True)

    def _choose_prompts(self) -> list[Row]:
        """Returns the first different prompts that leave room for a completion."""
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        longest = None if positions is None else positions - self.args.sample_max_new_tokens
        wanted, room = self.args.sample_prompts, self.args.sample_max_new_tokens
        chosen = list(islice(distinct_prompts(self._data, longest), wanted))
        if len(chosen) < wanted:
            logger.warning(
                "sample_prompts=%d: the evaluation rows have %d different prompts that leave room for "
                "sample_max_new_tokens=%d, so these are sampled.",
                *(wanted, len(chosen), room),
            )
        return chosen

    def _complete(self) -> list[Row]:
        prompts, ends = self._prompts or [], end_tokens(self.model, self.tokenizer)
        prompt_ids = [list(row["prompt_ids"]) for row in prompts]
        with self._autocast():
            completions = sample_completions(
                self.model,
                self.tokenizer,
                prompt_ids,
                seed=[self.args.seed + i for i in range(len(prompt_ids))],  # the same at each step, to be compared
                max_new_tokens=self.args.sample_max_new_tokens,
                temperature=self.args.sample_temperature,
                images=[self._images.sample(row) for row in prompts] if self._images else (),
            )
        return [
            {
                "prompt": self._shown(prompt),
                **({"images": pictures} if pictures else {}),
                "completion": self.tokenizer.decode(ids, skip_special_tokens=True),
                "tokens": len(ids),
                "finished": bool(ids) and ids[-1] in ends,
            }
            for prompt, pictures, ids in zip(prompt_ids, self._pictures, completions, strict=True)
        ]


class Conversation:
    """Shows a prompt's tokens as the text of its conversation: what the tokenizer's chat template puts around the
    turns is taken away, and if there are several, each has its role before it. Without a template, and where a prompt
    isn't written by it, only special tokens go."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._turns = self._around("user", "assistant", "user")  # before, between and behind three turns
        self._system = self._around("system", "user")

    def _around(self, *roles: str) -> list[str]:
        """Returns what the template writes before, between and behind turns; nothing if it can't be told."""
        marks = [f"qzx{i}xzq" for i in range(len(roles))]
        turns = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
        if self._tokenizer.chat_template is None:
            return []
        try:
            text = self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception:  # a template may refuse any conversation
            return []
        parts = re.split("|".join(marks), str(text))
        return parts if len(parts) == len(roles) + 1 and all(parts[1:]) else []

    def __call__(self, ids: Sequence[int]) -> str:
        """Returns the text of a prompt."""
        text = str(self._tokenizer.decode(ids))
        if not self._turns or not text.endswith(self._turns[-1]):
            return str(self._tokenizer.decode(ids, skip_special_tokens=True))
        head, to_assistant, to_user, tail = self._turns
        text, roles = text.removesuffix(tail), {to_assistant: "assistant", to_user: "user"}
        first = "user"
        if self._system and not text.startswith(head or "\0") and text.startswith(self._system[0]):
            first, head, roles = "system", self._system[0], {**roles, self._system[1]: "user"}
        text = text.removeprefix(head)
        cut = re.split("(" + "|".join(map(re.escape, sorted(roles, key=len, reverse=True))) + ")", text)
        turns = [(first, cut[0]), *((roles[sign], turn) for sign, turn in zip(cut[1::2], cut[2::2], strict=True))]
        for token in self._tokenizer.all_special_tokens:
            turns = [(role, turn.replace(token, "")) for role, turn in turns]
        return turns[0][1].strip() if len(turns) == 1 else "\n".join(f"{role}: {turn.strip()}" for role, turn in turns)


def distinct_prompts(rows: Iterable[Row], longest: int | None) -> Iterator[Row]:
    """Yields the different prompts of prepared rows, in their order, but the empty and those longer than `longest`."""
    seen = set()
    for row in rows:
        prompt = tuple(row["prompt_ids"])
        found = prompt, row.get("images")
        if prompt and found not in seen and (longest is None or len(prompt) <= longest):
            seen.add(found)
            yield row


def send_table(callbacks: Iterable[TrainerCallback], rows: Sequence[Row], step: int) -> None:
    """Sends samples of a step as a table to those trackers of `report_to` that are running: TensorBoard, Weights &
    Biases and trackio."""
    if not rows:
        return
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[row.get(name) for name in columns] for row in rows]
    for callback in callbacks:
        tracker: Any = callback  # their loggers are no part of a callback's type
        name = type(tracker).__name__
        if name == "TensorBoardCallback" and tracker.tb_writer is not None:
            lines: list[list[Any]] = [columns, ["---"] * len(columns), *cells]
            table = "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)
            tracker.tb_writer.add_text("samples", table, step)
        elif name == "WandbCallback" and tracker._initialized:
            table = tracker._wandb.Table(columns=columns, data=cells)
            tracker._wandb.log({"samples": table, "train/global_step": step})
        elif name == "TrackioCallback" and tracker._initialized:
            import pandas

            table = tracker._trackio.Table(dataframe=pandas.DataFrame(cells, columns=columns))
            tracker._trackio.log({"samples": table, "train/global_step": step})


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", "<br>")


def in_short(rows: Sequence[Row]) -> str:
    """Returns the first few samples, cut, for people."""
    lines = []
    for row in rows[:SHOWN]:
        texts = (" ".join(row[name].split()) for name in ("prompt", "completion"))
        prompt, completion = (t if len(t) <= SHOWN_CHARACTERS else t[:SHOWN_CHARACTERS] + " ..." for t in texts)
        lines.append(f"> {prompt}\n  {completion}" + ("" if row["finished"] else " [cut]"))
    return "\n".join(lines)
