"""Options of a command: words, file and command line, what is refused, and the help. Rows from and to files."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

import pytest

from dpo_peft.cli.options import option_of, parse_options, required, show
from dpo_peft.errors import OptionError
from dpo_peft.files import read_rows, write_atomically, write_rows


@dataclass
class Some:
    """Options of a command for tests."""

    adapter: list[str] = field(default_factory=list, metadata={"help": "Folders."})
    number: int = field(default=3, metadata={"help": "How many."})
    share: float = field(default=0.5, metadata={"help": "What share."})
    json: bool = field(default=False, metadata={"help": "Print JSON."})
    name: str | None = field(default=None, metadata={"help": "A name.", "choices": ["a", "b"]})


def parse(*argv: str) -> Some:
    return parse_options(argv, Some, "some", "Does something.", ["dpo-peft some one two", "dpo-peft some --number 4"])


def test_leading_words_are_the_first_option() -> None:
    assert parse("one", "two", "--number", "4").adapter == ["one", "two"]
    assert parse("--adapter", "one", "--json") == Some(adapter=["one"], json=True)
    assert parse() == Some()


def test_the_command_line_overrides_the_file(tmp_path: Path) -> None:
    (tmp_path / "o.yaml").write_text("adapter: [x]\nnumber: 7\nshare: 0.25\n")
    assert parse("--config", str(tmp_path / "o.yaml"), "--number", "8") == Some(["x"], 8, 0.25)
    assert parse("y", f"--config={tmp_path / 'o.yaml'}").adapter == ["y"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--numbr", "4"], "'numbr' is not an option of `dpo-peft some`. Did you mean 'number'"),
        (["--zzz", "4"], "`dpo-peft some --help` lists them all"),
        (["--number", "four"], "invalid int value: 'four'"),
        (["--name", "c"], "invalid choice: 'c'"),
        (["--number"], "expected one argument"),
        (["--number", "4", "5"], "'5' belongs to no option"),
        (["--num", "4"], "'num' is not an option"),  # no abbreviations: another option may come to share them
        (["--config", "none.yaml"], "there is no such file"),
    ],
)
def test_what_it_refuses(argv: list[str], message: str) -> None:
    with pytest.raises(OptionError) as error:
        parse(*argv)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [("number: [", "not valid YAML"), ("- 1", "option: value"), ("numbr: 2", "Did you mean")],
)
def test_bad_files(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "o.yaml").write_text(content)
    with pytest.raises(OptionError, match=message):
        parse("--config", str(tmp_path / "o.yaml"))


def test_a_value_of_the_file_has_the_options_type(tmp_path: Path) -> None:
    (tmp_path / "o.yaml").write_text("number: many\n")
    with pytest.raises(OptionError, match="number"):
        parse("--config", str(tmp_path / "o.yaml"))
    (tmp_path / "o.yaml").write_text("share: 1e-3\nname: c\n")  # YAML reads 1e-3 as text
    with pytest.raises(OptionError, match="invalid choice: 'c'"):
        parse("--config", str(tmp_path / "o.yaml"))
    (tmp_path / "o.yaml").write_text("share: 1e-3\nname: null\njson: true\n")
    assert parse("--config", str(tmp_path / "o.yaml")) == Some(share=0.001, json=True)


def test_the_help_has_examples_and_exit_codes(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        parse("--help")
    shown = capsys.readouterr().out
    assert end.value.code == 0
    for part in ("Does something.", "dpo-peft some one two", "exit codes:", "--share", "(default 0.5)"):
        assert part in shown


def test_a_missing_option_is_named() -> None:
    with pytest.raises(OptionError, match="name is missing: give it by --name"):
        required(Some(adapter=["x"]), "adapter", "name")


def test_results_are_text_or_strict_json(capsys: pytest.CaptureFixture) -> None:
    show({"a": float("nan"), "b": [1.5, float("inf")]}, "text", as_json=True)
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [1.5, None]}
    show({"a": 1}, "text", as_json=False)
    assert capsys.readouterr().out == "text\n"


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_rows_come_back(tmp_path: Path, name: str) -> None:
    rows = [{"prompt": "ä\n", "n": i, "list": [i, 2.5]} for i in range(3)]
    assert read_rows(str(write_rows(tmp_path / "new" / name, rows))).to_list() == rows
    assert [path.name for path in (tmp_path / "new").iterdir()] == [name]


@pytest.mark.attack("killed while writing")
def test_a_file_appears_once_it_is_whole(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [{"a": 1}])

    def broken():
        yield {"a": 2}
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError):
        write_rows(tmp_path / "rows.jsonl", broken())
    assert read_rows(str(tmp_path / "rows.jsonl")).to_list() == [{"a": 1}]


@pytest.mark.parametrize("path", ["rows.txt", "rows"])
def test_other_endings_are_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(OptionError, match="must end in .jsonl or .parquet"):
        write_rows(tmp_path / path, [])


def test_an_option_like_another_ones() -> None:
    @dataclass
    class Other:
        number: int = option_of(Some, "number")
        name: str | None = option_of(Some, "name", help="Another name.")

    assert Other() == Other(3, None)
    told = {f.name: dict(f.metadata) for f in fields(Other)}
    assert told == {"number": {"help": "How many."}, "name": {"help": "Another name.", "choices": ["a", "b"]}}


@pytest.mark.parametrize(("rank", "expected"), [("0", "news\nwarning\n"), ("1", "warning\n")])
def test_news_are_plain_lines_on_stderr_once_per_job(rank: str, expected: str) -> None:
    code = (
        "import logging; from dpo_peft.cli.options import show_progress; show_progress(); show_progress()\n"
        "logger = logging.getLogger('dpo_peft.data'); logger.debug('detail'); logger.info('news')\n"
        "logger.warning('warning'); logging.getLogger('other').info('no')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "RANK": rank}
    )
    assert (done.stdout, done.stderr) == ("", expected)


@pytest.mark.attack("killed while writing")
def test_a_broken_write_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    assert write_atomically(path, "ä\n").read_bytes() == "ä\n".encode()
    assert write_atomically(path, b"\x00").read_bytes() == b"\x00"

    def broken() -> Iterator[str]:
        yield "half"
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_atomically(path, broken())
    assert path.read_bytes() == b"\x00"
    write_atomically(path, (text for text in ("a", "b")))
    assert path.read_text() == "ab" and [file.name for file in path.parent.iterdir()] == ["file.txt"]
