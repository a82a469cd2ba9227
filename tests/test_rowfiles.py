"""Rows are read from files as they stand there: nothing is rewritten, no other file is read, a fault has a place."""

import bz2
import csv
import gzip
import json
import os
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, config

from dpo_peft import rowfiles
from dpo_peft.errors import DataError, OptionError
from dpo_peft.files import read_rows, without_splits

TEXTS = [
    *("007", "1e3", "1.10", "N/A", "NA", "", "None", "null", "nan", "true", "-", "0x1F", "12345678901234567890"),
    *(
        "2024-01-02T03:04:05Z",
        "2024-01-02",
        "é",
        "😀",
        "\u2028",
        "a\nb",
        "a\r\nb",
        'q"x,',
        " a ",
        "\t",
        "\ufeffb",
        "[1]",
    ),
]
WHOLE = [{"prompt": f"q{i}", "chosen": " a", "rejected": " b"} for i in range(12)]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix in (".csv", ".tsv"):
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.attack("hostile rows")
@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "rows.jsonl", "rows.json", "rows.parquet"])
def test_ten_thousand_random_texts_come_back_as_they_are(name: str, tmp_path: Path) -> None:
    """Also where a whole stretch of them looks like numbers, or like dates."""
    random_ = random.Random(0)
    rows = [
        {
            "prompt": f"{i:03}",
            "chosen": random_.choice(TEXTS) + random_.choice(TEXTS),
            "rejected": random_.choice(TEXTS),
        }
        for i in range(10_000)
    ]
    rows += [{"prompt": "2024-01-02T03:04:05Z", "chosen": "1.10", "rejected": "NA"}] * 25_000
    path = write(tmp_path / name, rows)
    assert read_rows(path).to_list() == rows
    assert list(read_rows(path, streaming=True)) == rows


@pytest.mark.attack("hostile names")
@pytest.mark.parametrize("name", ["pairs[1].jsonl", "run*.jsonl", "run?.csv", "a[!b]{c}.parquet", "~x%20 é.json"])
def test_a_name_that_looks_like_a_pattern_is_a_file(name: str, tmp_path: Path) -> None:
    mine, others = [{"prompt": "mine"}], [{"prompt": "another's"}]
    for other in ("pairs1", "run-old", "run1", "ac"):
        write(tmp_path / f"{other}{Path(name).suffix}", others)
    assert read_rows(write(tmp_path / name, mine)).to_list() == mine


def test_a_pattern_that_is_no_file_is_all_that_match_it(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", [{"prompt": "b"}])
    write(tmp_path / "a.csv", [{"prompt": "a"}])
    assert read_rows(str(tmp_path / "*")).to_list() == [{"prompt": "a"}, {"prompt": "b"}]
    with pytest.raises(OptionError, match="there is no such file"):
        read_rows(str(tmp_path / "c*.jsonl"))


@pytest.mark.parametrize("streaming", [False, True])
def test_folders_of_save_to_disk(streaming: bool, tmp_path: Path) -> None:
    first, second = Dataset.from_list(WHOLE[:4]), Dataset.from_list(WHOLE[4:])
    first.save_to_disk(tmp_path / "one")
    DatasetDict({"train": first, "test": second}).save_to_disk(tmp_path / "two")
    assert list(read_rows(str(tmp_path / "one"), streaming=streaming)) == WHOLE[:4]
    assert list(read_rows(str(tmp_path / "two"), "test", streaming=streaming)) == WHOLE[4:]
    with pytest.raises(OptionError, match="no split 'validation': it has train, test"):
        read_rows(str(tmp_path / "two"), "validation")
    assert without_splits(str(tmp_path / "one")) and not without_splits(str(tmp_path / "two"))
    (tmp_path / "one" / "dataset_info.json").write_text("{")
    with pytest.raises(OptionError, match="can't be read"):
        read_rows(str(tmp_path / "one"))


def test_a_folder_of_files_has_the_splits_that_their_names_say(tmp_path: Path) -> None:
    """Their texts are taken as they are, as those of one file."""
    rows = [{"prompt": text, "chosen": "007"} for text in ("1.10", "N/A", "2024-01-02")]
    for name, row in zip(("train-0.csv", "train-1.csv", "test.csv"), rows, strict=True):
        write(tmp_path / name, [row])
    assert read_rows(str(tmp_path)).to_list() == rows[:2]
    assert read_rows(str(tmp_path), "test").to_list() == rows[2:]
    with pytest.raises(OptionError, match="no split 'validation': it has train, test"):
        read_rows(str(tmp_path), "validation")


def test_several_names_are_read_one_after_the_other(tmp_path: Path) -> None:
    """Files have the types of all rows; a saved dataset goes along."""
    Dataset.from_list([{"prompt": "c", "margin": 2.0}]).save_to_disk(tmp_path / "saved")
    names = [
        write(tmp_path / "a.jsonl", [{"prompt": "a", "margin": 1}]),
        write(tmp_path / "b.csv", [{"prompt": "b", "margin": 0.5}]),
    ]
    expected = [{"prompt": "a", "margin": 1.0}, {"prompt": "b", "margin": 0.5}]
    assert read_rows(names).to_list() == expected
    assert read_rows([names[1], str(tmp_path / "saved")]).to_list() == [expected[1], {"prompt": "c", "margin": 2.0}]
    with pytest.raises(OptionError, match="there is no such file"):
        read_rows([names[0], str(tmp_path / "none.jsonl")])
    with pytest.raises(OptionError, match="don't go together"):
        Dataset.from_list([{"prompt": [1]}]).save_to_disk(tmp_path / "other")
        read_rows([str(tmp_path / "saved"), str(tmp_path / "other")])


@pytest.mark.parametrize("streaming", [False, True])
def test_zst_files(streaming: bool, tmp_path: Path) -> None:
    """One frame or several, as parallel packers write them; half of one is no end of the rows."""
    rows = [{"prompt": f"q{i} é", "chosen": " a", "rejected": " b"} for i in range(3_000)]
    plain = Path(write(tmp_path / "rows.jsonl", rows)).read_bytes()
    cut = plain.index(b"\n", len(plain) // 2) - 5
    codec, path = pa.Codec("zstd"), tmp_path / "packed.jsonl.zst"
    for frames in ([plain], [plain[:cut], plain[cut:]], [plain[:cut], b"", plain[cut:]]):
        path.write_bytes(b"".join(codec.compress(frame, asbytes=True) for frame in frames))
        assert list(read_rows(str(path), streaming=streaming)) == rows
    whole = path.read_bytes()
    for content in (whole[:-9], whole[: len(whole) // 2], whole[:3], b"no zstd at all"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"packed.jsonl.zst can't be read after line \d+: .+ Remedy: "):
            list(read_rows(str(path), streaming=streaming))
    (tmp_path / "t.csv.zst").write_bytes(codec.compress(b"prompt,chosen\n007,NA\n", asbytes=True))
    assert list(read_rows(str(tmp_path / "t.csv.zst"), streaming=streaming)) == [{"prompt": "007", "chosen": "NA"}]


@pytest.mark.attack("stale caches")
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.parquet"])
def test_a_file_written_again_is_read_again_whatever_its_time_says(name: str, tmp_path: Path) -> None:
    for text in ("old", "new"):  # of one length
        path = write(tmp_path / name, [{"prompt": text}])
        os.utime(path, (1_700_000_000, 1_700_000_000))
        assert read_rows(path).to_list() == [{"prompt": text}]


@pytest.mark.parametrize("ending", [".jsonl.gz", ".csv.gz", ".json.bz2", ".gz"])
def test_compressed_files(ending: str, tmp_path: Path) -> None:
    plain = Path(write(tmp_path / f"rows{Path(ending).stem if ending != '.gz' else '.jsonl'}", WHOLE))
    pack = bz2.compress if ending.endswith("bz2") else gzip.compress
    path = tmp_path / f"packed{ending}"
    path.write_bytes(pack(plain.read_bytes()))
    assert read_rows(str(path)).to_list() == WHOLE
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(DataError, match=r"can't be read after line \d+: .+ Remedy: "):
        read_rows(str(path))


def test_numbers_and_labels_of_a_csv_are_numbers_and_labels(tmp_path: Path) -> None:
    row = {"prompt": "1", "completion": "2.0", "label": "False", "margin": "0.50", "preference": ""}
    (read,) = read_rows(write(tmp_path / "rows.csv", [row])).to_list()
    assert read == {"prompt": "1", "completion": "2.0", "label": False, "margin": 0.5, "preference": None}


def test_types_are_those_of_all_rows(tmp_path: Path) -> None:
    """Integers before floats, None before a value, keys that only later rows have."""
    rows = [{"margin": 1, "tools": None}] * 30_000 + [{"margin": 0.5, "tools": [{"a": "b"}], "late": "x"}]
    read = read_rows(write(tmp_path / "rows.jsonl", rows))
    assert read[0] == {"margin": 1.0, "tools": None, "late": None} and read[30_000] == rows[-1]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.json"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_second_start_reads_types_and_rows_from_the_cache(
    name: str, streaming: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": f"{name} {streaming} {i}", "margin": 0.5 if i else 1.0} for i in range(5)]
    path, passes, reader = Path(write(tmp_path / name, rows)), list[int](), rowfiles.READERS[Path(name).suffix]
    monkeypatch.setitem(rowfiles.READERS, path.suffix, lambda path: passes.append(0) or reader(path))
    assert list(read_rows(str(path), streaming=streaming)) == rows and len(passes) == 2  # types, then rows
    assert list(read_rows(str(path), streaming=streaming)) == rows and len(passes) == (3 if streaming else 2)
    (kept,) = (config.HF_DATASETS_CACHE / "dpo_peft_types").glob(f"{rowfiles._digest([path])}*")
    kept.write_bytes(b"half")
    assert list(read_rows(str(path), streaming=streaming)) == rows
    changed = [{**row, "margin": "much"} for row in rows]
    write(path, changed[:1] if path.suffix != ".csv" else [{**rows[0], "margin": 7.0}])
    assert next(iter(read_rows(str(path), streaming=streaming)))["margin"] in ("much", 7.0)


def test_a_stream_of_parquet_reads_no_more_than_its_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "rows.parquet", WHOLE)
    monkeypatch.setattr(rowfiles, "_digest", lambda paths: pytest.fail("reads the whole file"))
    assert list(read_rows(path, streaming=True)) == WHOLE


LINES = [json.dumps(row) for row in WHOLE]
BAD: dict[str, tuple[str, str | bytes, str]] = {  # file, its bytes, what the message says
    "half a line": (
        "a.jsonl",
        "\n".join([*LINES[:6], '{"prompt": "x", "chosen": ', *LINES[6:]]),
        "line 7: is no JSON",
    ),
    "cut off": ("a.jsonl", "\n".join(LINES)[:-30], "line 12: is no JSON"),
    "one key twice": (
        "a.jsonl",
        LINES[0] + '\n{"prompt": "q", "chosen": "a", "chosen": "b"}',
        "line 2: .*'chosen' stands twice",
    ),
    "one key of a message twice": (
        "a.json",
        '[{"chosen": [{"role": "user", "role": "system"}]}]',
        "'role' stands twice",
    ),
    "a list a line": ("a.jsonl", "\n".join([*LINES, '["q", "a"]']), "line 13: is no JSON|line 13: holds list"),
    "a list of texts": ("a.json", '["q", "a"]', "item 1: holds str, not an object"),
    "latin1": ("a.jsonl", "\n".join(LINES[:3]).encode() + b'\n{"prompt": "caf\xe9"}', "line 4: byte 15 is no UTF-8"),
    "latin1 table": ("a.csv", b"prompt,chosen\nq,a\nq,caf\xe9\n", "line 3: byte 5 is no UTF-8"),
    "ragged": ("a.csv", "prompt,chosen\nq,a\nq,a,b\n", "line 3: has 3 cells, the first line 2"),
    "open quotes": ("a.csv", 'prompt,chosen\nq,a\nq,"a\nq,b\n', "line 3: is no CSV"),
    "one name twice": ("a.csv", "prompt,prompt\nq,a\n", "line 1: two columns have one name"),
    "margin in words": ("a.csv", "prompt,margin\nq,1\nq,much\n", "line 3: margin is 'much', not a number"),
    "text and list": (
        "a.jsonl",
        '{"chosen": "a"}\n' * 9 + '{"chosen": [{"role": "assistant"}]}\n' + '{"chosen": "a"}\n' * 9,
        "line 10: 'chosen' does not go with the rows before",
    ),
    "text and list, far apart": (
        "a.jsonl",
        '{"chosen": "a"}\n' * 10_000 + '{"chosen": ["a"]}\n' * 2,
        "line 10001 and after: a column's type changes",
    ),
    "surrogate": ("a.jsonl", '{"a": "b"}\n{"a": "\\ud800"}\n', "line 2: 'a' does not go with the rows before"),
    "deep": ("a.jsonl", '{"a": ' + "[" * 20_000 + "]" * 20_000 + "}", "line 1: is nested too deeply"),
    "nothing": ("a.jsonl", "\n \n", "there are no rows"),
    "names alone": ("a.csv", "prompt,chosen\n", "there are no rows"),
    "no parquet": ("a.parquet", "PAR1 or not", "is no Parquet file"),
    "no gzip": ("a.jsonl.gz", "\n".join(LINES), "can't be read after line"),
}


@pytest.mark.attack("hostile rows")
@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_read_is_named_by_file_and_line(case: str, tmp_path: Path) -> None:
    name, content, words = BAD[case]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=words) as caught:
        read_rows(str(path))
    assert str(path) in str(caught.value)
