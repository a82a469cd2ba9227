"""A config file of ours in the making."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

PROGRAMS = {"axolotl": "Axolotl", "llamafactory": "LLaMA-Factory"}
PART_NAMES = {"path": "dataset_name", "name": "dataset_config", "split": "dataset_train_split"}
Given = dict[str, Any]


@cache
def names() -> dict[str, Any]:
    """Returns what names.yaml says, by program."""
    return yaml.safe_load(files(__package__).joinpath("names.yaml").read_text("utf-8"))


@dataclass
class Made:
    """Our options, with what each was made from, and what was not taken over."""

    program: str
    given: Given
    options: dict[str, tuple[Any, str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        known = names()[self.program]
        renamed = {**known["options"], **{name: name for name in known.get("same", ())}}
        for key, value in self.given.items():
            if key in renamed:
                self.put(renamed[key], value, key)
            elif key not in known["handled"]:
                self.leave(key, _reason(key, known["left_out"]))
        for name, value in known["defaults"].items():
            if name not in self.options:
                self.put(name, value, f"{PROGRAMS[self.program]}'s default")

    def put(self, name: str, value: Any, origin: str) -> None:
        """Takes a value over, and says what it was made from."""
        if name.endswith("_strategy") and value is False:  # YAML's reading of no
            value = "no"
        self.options[name] = (value, "" if origin == name else origin)

    def leave(self, key: str, reason: str, value: Any = None) -> None:
        """Says why a key is not taken over."""
        shown = json.dumps(self.given.get(key) if value is None else value, default=str, ensure_ascii=False)
        self.notes.append(f"{key}: {shown if len(shown) < 60 else shown[:57] + '...'} - {reason}")

    def value(self, name: str) -> Any:
        """Returns an option of ours, or None."""
        return self.options.get(name, (None, ""))[0]

    def dropout(self) -> None:
        """A dropout of LoRA acts only where dropout is not switched off."""
        if self.value("lora_dropout"):
            self.put("disable_dropout", False, "lora_dropout")

    def evaluation(self, share: Any, key: str) -> None:
        """Holds rows out for evaluation, at the end of each epoch if nothing else is said."""
        if share:
            self.put("test_split_size", share, key)
        if (share or self.value("eval_dataset_name")) and not self.value("eval_strategy"):
            self.put("eval_strategy", "steps" if self.value("eval_steps") else "epoch", key)
        elif self.value("eval_strategy") in (False, "no", None) and self.value("eval_steps"):
            self.leave("eval_steps", "no rows are held out for evaluation")
            self.options.pop("eval_steps")

    def optimizer(self, key: str) -> None:
        """Takes an optimizer over that transformers knows by that name."""
        from transformers.training_args import OptimizerNames

        if (name := self.given.get(key)) is None:
            return
        if name in [one.value for one in OptimizerNames]:
            self.put("optim", name, key)
        else:
            self.leave(key, "transformers has no optimizer of that name; adamw_torch_fused is taken")

    def datasets(self, parts: list[Given], origin: str) -> None:
        """Puts one dataset's parts into options of their own, several into a mixture."""
        parts = [{key: value for key, value in part.items() if value} for part in parts]
        if len(parts) == 1 and "data_files" not in parts[0] and "data_dir" not in parts[0]:
            for key, value in parts[0].items():
                self.put(PART_NAMES.get(key, key), value, origin)
        else:
            self.put("datasets", parts, origin)

    def text(self, path: str) -> str:
        """Returns the file. A key that nothing was made from is named, too."""
        made = {word for name, (_, origin) in self.options.items() for word in [name, *re.split(r"[,:. ]+", origin)]}
        noted = {re.split("[:.]", note)[0] for note in self.notes}
        for key in [one for one in self.given if one not in made | noted]:
            self.leave(key, "nothing to take over: it is off, the default, or said by another key")
        lines = [
            f"# Made from {path}, of {PROGRAMS[self.program]}. Look through it; dpo-peft train --config reads it."
        ]
        for name, (value, origin) in self.options.items():
            (shown,) = yaml.safe_dump([value], default_flow_style=True, width=1e9, sort_keys=False).splitlines()
            lines.append(f"{name}: {shown[1:-1]}" + (f"  # {origin}" if origin else ""))
        if self.notes:
            lines += ["", "# Not taken over:", *(f"#   {' '.join(note.split())}" for note in self.notes)]
        return "\n".join(lines) + "\n"


def _reason(key: str, left_out: Mapping[str, list[str]]) -> str:
    for reason, patterns in left_out.items():
        if any(fnmatch(key, pattern) for pattern in patterns):
            return reason
    return "not a key that this converter knows"
