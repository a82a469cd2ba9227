"""What the report tests share: folders of runs made by hand, and the page read back by a parser of its own."""

import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

HOSTILE = (
    "<script>hacked = 1</script></style><img src=x onerror='hacked = 2'>\"'&amp;<!-- \u202e\x00\x1b ]]> {{ 7*7 }}"
)
VOID = {"meta", "link", "br", "img", "input", "hr"}
METRICS = {
    "loss": lambda t: math.log(2) * (1 - 0.8 * t),
    "rewards/accuracies": lambda t: 0.5 + 0.4 * t,
    "accuracies/length_only": lambda t: 0.47,
    "rewards/margins": lambda t: 3 * t,
    "rewards/chosen": lambda t: t,
    "rewards/rejected": lambda t: -2 * t,
    "logps/chosen": lambda t: -50 - 2 * t,
    "logps/rejected": lambda t: -51 - 9 * t,
    "sample_weight": lambda t: 0.5 - 0.4 * t,
    "kl": lambda t: 8 * t * t,
}


def log_of(steps: int, every: int = 10, prefix: str = "eval_", seed: int = 0) -> list[dict[str, float]]:
    """A log with noise: training at every step, evaluation at each `every`-th and the last."""
    draw, log = random.Random(seed), []
    for step in range(1, steps + 1):
        t = step / steps
        noisy = {key: value(t) + draw.gauss(0, 0.02) for key, value in METRICS.items()}
        log.append({"step": step, "epoch": t, **noisy, "learning_rate": 1e-4 * (1 - t), "grad_norm": 1.0 + t})
        if step % every == 0 or step == steps:
            log.append({"step": step, "epoch": t, **{prefix + key: value(t) for key, value in METRICS.items()}})
    log.append({"step": steps, "epoch": 1.0, "train_runtime": 125.0, "train_loss": 0.3})
    return log


def examples_of(steps: Iterable[int], pairs: int, seed: int = 0, dataset: str = "eval") -> list[dict[str, Any]]:
    """Pairs whose margin grows with the step and with the difference in length."""
    rows = []
    for step in steps:
        draw = random.Random(seed)
        for row in range(pairs):
            chosen, rejected = draw.randint(5, 60), draw.randint(5, 60)
            margin = step * (0.05 + 0.002 * (chosen - rejected)) + draw.gauss(0, 0.5) * (step > 0)
            rows.append(
                {
                    "step": step,
                    "dataset": dataset,
                    "row": row,
                    "reward_chosen": margin / 2,
                    "reward_rejected": -margin / 2,
                    "logp_chosen": -50.0,
                    "logp_rejected": -55.0,
                    "tokens_chosen": chosen,
                    "tokens_rejected": rejected,
                }
            )
    return rows


def samples_of(steps: Iterable[int], prompts: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "prompt_number": number,
            "prompt": prompt,
            "completion": f"Answer to {number} after {step}.",
            "tokens": 7,
            "finished": step > 0,
        }
        for step in steps
        for number, prompt in enumerate(prompts)
    ]


def make_run(folder: Path, steps: int = 40, **facts: Any) -> Path:
    """A run's folder with everything a report can show; `facts` go into metrics.json over the usual ones."""
    folder.mkdir(parents=True, exist_ok=True)
    usual = {
        "log_history": log_of(steps),
        "options": {"beta": 0.1, "learning_rate": 1e-4, "output_dir": str(folder), "loss_type": ["sigmoid"]},
        "objective": "`sigmoid`",
        "beta": 0.1,
        "reward": "log_ratio",
        "reference": "the same weights with the adapter switched off.",
        "base_model": "someone/tiny",
        "adapter": {"rank": 16, "alpha": 32},
        "quantization": {"load_in_4bit": True},
        "environment": {"python": "3.11", "device": "cpu"},
        "versions": {"torch": "2.13.0"},
        "seconds": 125.0,
        "data": {
            "train": {"name": "train", "source_rows": 100, "kept_rows": 98, "dropped": {"identical": 2}},
            "eval": {"name": "eval", "source_rows": 60, "kept_rows": 60, "completions": 120},
        },
    }
    write_json(folder / "metrics.json", {**usual, **facts})
    write_json(folder / "adapter_config.json", {"r": 16, "lora_alpha": 32, "base_model_name_or_path": "someone/tiny"})
    write_lines(folder / "samples.jsonl", samples_of((0, 20, 40), ("First?", "Second?")))
    write_lines(folder / "eval_examples.jsonl", examples_of((0, 40), 60))
    return folder


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), "utf-8")


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


# ---- The page, read back --------------------------------------------------------------------------------------------


@dataclass
class Node:
    """An element of a page."""

    tag: str
    attributes: dict[str, str]
    children: list["Node | str"] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def all(self, tag: str = "", **attributes: str) -> list["Node"]:
        """Every element below with this tag and these attributes (`class_` for class: one of the classes)."""
        found = []
        for child in self.children:
            if isinstance(child, Node):
                same = not tag or child.tag == tag
                for name, value in attributes.items():
                    given = child.attributes.get(name.rstrip("_").replace("_", "-"), "")
                    same = same and (value in given.split() if name == "class_" else value == given)
                found += ([child] if same else []) + child.all(tag, **attributes)
        return found

    def one(self, tag: str = "", **attributes: str) -> "Node":
        (found,) = self.all(tag, **attributes)
        return found


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open = [Node("", {})]

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        node = Node(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def read_page(html: bytes | Path) -> Node:
    """The page as a tree; it must be well formed."""
    reader = _Reader()
    reader.feed((html.read_bytes() if isinstance(html, Path) else html).decode("utf-8"))
    reader.close()
    assert len(reader.open) == 1, f"<{reader.open[-1].tag}> is not closed"
    return reader.open[0]


def chart(page: Node, title: str) -> Node:
    """The figure under this heading."""
    (found,) = (figure for figure in page.all("figure") if figure.all("h3")[0].text == title)
    return found


def trace_of(figure: Node, label: str) -> Node:
    """The group of a chart that draws this line, these marks or this distribution."""
    return figure.one("g", data_label=label)


def points_of(figure: Node, label: str) -> list[tuple[float, float]]:
    """What a trace shows when it is pointed at."""
    numbers = [float(word) for word in trace_of(figure, label).attributes["data-points"].split()]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def table_of(node: Node) -> list[list[str]]:
    """The rows of the table below a node, heads first."""
    return [[cell.text for cell in row.all("th") + row.all("td")] for row in node.one("table").all("tr")]
