"""The pages of documentation as blocks of code, and what runs them: bundled model and rows in the place of the Hub's.

A block is fenced, or indented by four spaces where its first line starts with a program. `<!-- not run: REASON -->`
before a block exempts it.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from paths import REPO

from dpo_peft import files
from dpo_peft.cli import main
from dpo_peft.quickstart import model_path, train_file
from dpo_peft.reference.cache import Entry, ReferenceCache, default_folder

PAGES = [REPO / "README.md", REPO / "CONTRIBUTING.md", REPO / "recipes" / "README.md", *(REPO / "docs").glob("*.md")]
KINDS = "python console json yaml text".split()
PROGRAM = re.compile(r"(?:\$ |(?:accelerate|bash|cat|dpo-peft|git|llama-server|make|ollama|pip|python3?|vllm) )")
BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]+) -->\n+)?"
    r"(?:^```(?P<kind>\w*)[^\n]*\n(?P<fenced>.*?)^```|"
    r"(?<=\n\n)(?P<indented>    \S[^\n]*\n(?:(?:    [^\n]*)?\n)*))",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    """A block of a page. `kind`: what stands behind the fence; an indented one is "console" or "text"."""

    line: int
    kind: str
    text: str
    reason: str | None  # why it isn't run

    @property
    def commands(self) -> list[str]:
        """Lines that are typed: those after `$ ` if there is any, else all; a backslash joins lines."""
        lines = re.sub(r"\\\n\s*", "", self.text).splitlines() if self.kind == "console" else []
        return [line[2:] for line in lines if line.startswith("$ ")] or [line for line in lines if line]


def blocks_of(page: str) -> Iterator[Block]:
    for found in BLOCK.finditer(page):
        line, kind, text = page.count("\n", 0, found.start()) + 1, found["kind"], found["fenced"]
        if kind is None:
            text = re.sub("^    ", "", found["indented"], flags=re.MULTILINE)
            kind = "console" if PROGRAM.match(text) else "text"
        yield Block(line, kind, text, found["reason"])


# ---- Stand-ins ------------------------------------------------------------------------------------------------------

# In Python and commands: models of the Hub, and what would take long.
NAMES = [
    (r"(Qwen|unsloth)/[\w.-]+", "model"),
    (r"\bMODEL\b", "model"),
    (r"--gpu H100", "--gpu 24GB"),
    (r"dpo_peft/quickstart/data/(train|test).jsonl", "test.jsonl"),
    (r"--max_prompts \d+", "--max_prompts 4"),
    (r"--num_candidates \d+", "--num_candidates 8"),
]
SHORT = {
    "train": "--max_steps 2 --use_cpu true --bf16 false --dtype float32 --report_to none",
    "pairs": "--dtype float32 --max_new_tokens 40 --require_finished false --batch_size 64",
    "chat": "--max_new_tokens 8",
    "compare": "--max_new_tokens 8",
    "push": "--base_model me/my-base",
    "plan --config": "--model_name_or_path model",
}
# Stands in for llama.cpp's converter.
CONVERTER = "import pathlib, sys\npathlib.Path(sys.argv[-1]).write_text('gguf')\n"
THEIRS = "model_name_or_path: model\nstage: dpo\nfinetuning_type: lora\ndataset: mine\noutput_dir: outputs/theirs\n"


def stand_ins(text: str) -> str:
    for pattern, instead in NAMES:
        text = re.sub(pattern, instead, text)
    return text


def furnish(folder: Path, page: str, adapter: Path) -> None:
    """Puts into a folder what the commands of a page take as given: files that are not theirs to write."""
    code = "".join(block.text for block in blocks_of(page))
    made = set(re.findall(r"(?:--output |output_dir[ =]\"?)([\w./-]+)", code))
    rows = [json.loads(line) for line in Path(train_file()).read_text("utf-8").splitlines()[:24]]
    texts = [{name: row[name][0]["content"] for name in ("prompt", "chosen", "rejected")} for row in rows]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    table = "".join(",".join(json.dumps(text).replace('\\"', '""') for text in row.values()) + "\n" for row in texts)
    config = "model_name_or_path: model\ndataset_name: mine.jsonl\noutput_dir: outputs/run\n"
    losses = [block.text for block in blocks_of(page) if "def my_loss" in block.text]
    rewards = [block.text for block in blocks_of(page) if "def reward" in block.text]
    given = {
        **dict.fromkeys(("mine.jsonl", "pairs.jsonl", "test.jsonl", "a.jsonl"), lines),
        **dict.fromkeys(("run.yaml", "FILE.yaml"), config),
        "prompts.jsonl": "".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows[:2]),
        "prompts.txt": texts[0]["prompt"],
        "question.txt": texts[0]["prompt"],
        "mine.csv": "question,good,bad\n" + table,
        "b.csv": "prompt,chosen,rejected\n" + table,
        "theirs.yaml": THEIRS,
        "my_losses.py": "".join(losses),
        "rewards.py": "".join(rewards),
        "llama.cpp/convert_lora_to_gguf.py": CONVERTER,
        "FOLDER/.keep": "",
    }
    for name, text in given.items():
        if name not in made:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text, "utf-8")
    (folder / "models").mkdir()
    for link, target in {"model": model_path(), "models/Qwen3-8B": model_path(), "recipes": REPO / "recipes"}.items():
        (folder / link).symlink_to(target)
    (folder / "dpo_peft").symlink_to(REPO / "dpo_peft")
    if re.search(r"^(?:\$ )?dpo-peft train --config run.yaml\b", code, re.MULTILINE):
        made.add("outputs/run")
    for name in {*re.findall(r"\boutputs/[\w.-]*\w", code)} - made:
        if not Path(name).suffix or name[-1].isdigit():
            shutil.copytree(adapter, folder / name)
            if "sft" in name:  # as another program saves it
                config = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
                (folder / name / "adapter_config.json").write_text(json.dumps({**config, "auto_mapping": None}))
                (folder / name / "manifest.json").unlink()


# ---- Running --------------------------------------------------------------------------------------------------------


def run_command(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a line in this process; of make what it would do, and what is piped into a command by the shell.

    Raises:
        AssertionError: it ends with another status than 0.
    """
    before, _, command = stand_ins(line).rpartition(" | ")
    words = shlex.split(command, comments=True)
    typed = subprocess.run(before, shell=True, check=True, capture_output=True, text=True).stdout if before else ""
    if words[0] == "make":
        subprocess.run([*words, "--dry-run", "-C", REPO], check=True, stdout=subprocess.DEVNULL)
        return
    assert words[0] == "dpo-peft", f"{line}: {words[0]} isn't run: <!-- not run: needs ... --> before the block?"
    for begin, short in SHORT.items():
        if words[1 : 1 + len(begin.split())] == begin.split():
            words += [word for pair in re.findall("(--[^ ]+) ([^ ]+)", short) if pair[0] not in words for word in pair]
    if "--reference ID" in line:
        with closing(ReferenceCache(default_folder(), "ID", "")) as cache:
            cache.put([b"key"], [Entry(-1.0, np.zeros(4, np.float32))])
    monkeypatch.setattr(sys, "stdin", StringIO(typed))
    try:
        status = main(words[1:])
    except SystemExit as ended:
        status = int(ended.code or 0)
    assert status == 0, f"{line}: exit {status}"


def run_page(
    page: str, folder: Path, monkeypatch: pytest.MonkeyPatch, adapter: Path, space: dict[str, Any]
) -> dict[str, Any]:
    """Runs the blocks of a page in a folder, in order. Returns `space`, with the names that its Python has defined.

    Args:
        page: its text.
        folder: an empty one.
        monkeypatch: undoes what is set.
        adapter: stands for every adapter that the page takes as given.
        space: names with which the page's Python begins.
    """
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DPO_PEFT_CACHE", str(folder / "cache"))
    furnish(folder, page, adapter)
    for block in (block for block in blocks_of(page) if block.reason is None):
        if block.kind == "python":
            exec(compile("\n" * block.line + stand_ins(block.text), "page", "exec"), space)
        elif block.kind == "yaml":
            (folder / "block.yaml").write_text(block.text, "utf-8")
            words = "--model_name_or_path model --dataset_name mine.jsonl --eval_dataset_name test.jsonl --dry_run"
            run_command(f"dpo-peft train --config block.yaml {words} --output_dir block", monkeypatch)
        elif block.kind == "json":
            (folder / "block.jsonl").write_text(block.text, "utf-8")
            run_command("dpo-peft data block.jsonl", monkeypatch)
            assert len(files.read_rows("block.jsonl", "train")) == len(block.text.splitlines())
        for line in block.commands:
            run_command(line, monkeypatch)
    return space
