"""The reference's log-probs on disk: exact, shared, bounded, and never wrong, whatever happens to the file."""

import functools
import hashlib
import logging
import math
import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import numpy as np
import pytest

from dpo_peft.errors import NonFiniteError, OptionError
from dpo_peft.reference import store
from dpo_peft.reference.cache import Entry, ReferenceCache, clear, default_folder, summary
from dpo_peft.reference.store import FILE_NAME

FORK = multiprocessing.get_context("fork")
REF, OTHER = "a1" * 16, "b2" * 16
PAGE = 4096


@functools.cache
def key(i: int) -> bytes:
    return hashlib.blake2b(str(i).encode(), digest_size=16).digest()


@functools.cache
def entry(i: int) -> Entry:
    """The one true entry of `key(i)`: odd ones with 0 to 39 tokens, even ones without. 1 has none, but has tokens."""
    rng = np.random.default_rng(i)
    tokens = -rng.random(rng.integers(40) if i > 1 else 0, dtype=np.float32)
    return Entry(float(-rng.random() * 100), tokens if i % 2 else None)


def fill(cache: ReferenceCache, indices: range) -> None:
    cache.put([key(i) for i in indices], [entry(i) for i in indices])


def is_true(found: Entry | None, i: int) -> bool:
    """Whether an entry is the true one, to the bit."""
    if found is None:
        return False
    tokens = [None if e.token_logps is None else e.token_logps.tobytes() for e in (found, entry(i))]
    return found.logp.hex() == entry(i).logp.hex() and tokens[0] == tokens[1]


def wrong(cache: ReferenceCache, indices: range) -> list[int]:
    """Which entries the cache gives out that are not the true ones. Misses are not wrong."""
    found = cache.get([key(i) for i in indices])
    return [i for i, e in zip(indices, found, strict=True) if e is not None and not is_true(e, i)]


def missed(cache: ReferenceCache, indices: range) -> int:
    return cache.peek([key(i) for i in indices]).count(None)


def sql(folder: Path, statements: str) -> list[Any]:
    """Run SQL behind the cache's back; what the last statement gives. The cache must be closed."""
    with closing(sqlite3.connect(folder / FILE_NAME, isolation_level=None)) as db:
        return [db.execute(statement).fetchall() for statement in statements.split(";")][-1]


def moved(folder: Path) -> list[str]:
    """The files moved aside, without their logs."""
    return sorted(path.name for path in folder.glob("*.corrupt-*") if path.name[-1].isdigit())


def in_processes(work: Callable[..., Any], arguments: list[tuple[Any, ...]]) -> list[Any]:
    """`work` in one forked process per argument list, all at once; what each returned."""

    def child(pipe: Any, args: tuple[Any, ...]) -> None:
        pipe.send(work(*args))

    jobs = []
    for args in arguments:
        mine, theirs = FORK.Pipe(duplex=False)
        jobs.append((FORK.Process(target=child, args=(theirs, args)), mine))
        jobs[-1][0].start()
        theirs.close()
    results = [pipe.recv() for _, pipe in jobs]  # EOFError if a child died
    for process, _ in jobs:
        process.join()
    return results


# Values


@pytest.mark.parametrize("logp", [-0.0, 0.0, -1.5, -math.pi * 1e3, 5e-324, -1.7976931348623157e308, 0.1 + 0.2])
def test_sum_comes_back_to_the_bit(tmp_path: Path, logp: float) -> None:
    with closing(ReferenceCache(tmp_path, REF)) as cache:
        cache.put([key(0)], [Entry(logp, None)])
    with closing(ReferenceCache(tmp_path, REF)) as cache:  # from disk
        found = cache.get([key(0)])[0]
    assert found is not None and found.logp.hex() == logp.hex() and found.token_logps is None


@pytest.mark.parametrize("values", [[], [-0.0], [-1.25, 1e-45, -3.4028235e38, 0.1]])
def test_tokens_come_back_to_the_bit(tmp_path: Path, values: list[float]) -> None:
    tokens = np.array(values, np.float32)
    with closing(ReferenceCache(tmp_path, REF, tokens=True)) as cache:
        cache.put([key(0)], [Entry(-1.0, tokens)])
        found = cache.get([key(0)])[0]
    assert found is not None and found.token_logps is not None
    assert found.token_logps.dtype == np.float32 and found.token_logps.tobytes() == tokens.tobytes()
    assert found.token_logps.flags.writeable  # torch.from_numpy warns about arrays that are not


def test_many_keys_in_any_order_with_repeats(tmp_path: Path) -> None:
    indices = random.Random(0).sample(range(3000), 3000)
    with closing(ReferenceCache(tmp_path, REF)) as cache:
        fill(cache, range(0, 3000, 2))
        asked = indices + indices[:10]
        found = cache.get([key(i) for i in asked])
        assert all(is_true(e, i) if i % 2 == 0 else e is None for i, e in zip(asked, found, strict=True))
        hits = sum(i % 2 == 0 for i in asked)
        assert (cache.hits, cache.misses, cache.stored) == (hits, len(asked) - hits, 1500)
        peeked = cache.peek([key(i) for i in asked])
        assert [at for at, e in enumerate(peeked) if e is None] == [at for at, i in enumerate(asked) if i % 2]
        assert (cache.hits, cache.misses) == (hits, len(asked) - hits)  # `peek` counts nothing
        assert cache.get([]) == [] and cache.peek([]) == []


def test_references_are_kept_apart(tmp_path: Path) -> None:
    with closing(ReferenceCache(tmp_path, REF)) as cache, closing(ReferenceCache(tmp_path, OTHER)) as other:
        cache.put([key(0)], [Entry(-1.0, None)])
        assert other.get([key(0)]) == [None]
        other.put([key(0)], [Entry(-2.0, None)])
        assert cache.get([key(0)]) == [Entry(-1.0, None)] and other.get([key(0)]) == [Entry(-2.0, None)]


def test_first_writer_wins(tmp_path: Path) -> None:
    with closing(ReferenceCache(tmp_path, REF)) as cache, closing(ReferenceCache(tmp_path, REF)) as second:
        cache.put([key(0), key(0)], [Entry(-1.0, None), Entry(-7.0, None)])
        second.put([key(0), key(1)], [Entry(-2.0, None), Entry(-3.0, None)])
        assert cache.get([key(0), key(1)]) == [Entry(-1.0, None), Entry(-3.0, None)]
        assert (cache.stored, second.stored, second.refused) == (1, 1, 0)


def test_entry_with_tokens_replaces_one_without_and_stays(tmp_path: Path) -> None:
    tokens = np.array([-1.0, -0.5], np.float32)
    with closing(ReferenceCache(tmp_path, REF)) as sums, closing(ReferenceCache(tmp_path, REF, tokens=True)) as cache:
        sums.put([key(0)], [Entry(-1.0, None)])
        assert cache.get([key(0)]) == [None] and cache.peek([key(0)]) == [None]
        cache.put([key(0)], [Entry(-1.5, tokens)])
        sums.put([key(0)], [Entry(-1.0, None)])
        for found in (cache.get([key(0)])[0], sums.get([key(0)])[0]):  # a sum serves with tokens as well
            assert found is not None and found.logp == -1.5 and found.token_logps is not None
            assert found.token_logps.tolist() == [-1.0, -0.5]


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_nothing_of_a_put_with_a_non_finite_value_is_stored(tmp_path: Path, bad: float) -> None:
    with closing(ReferenceCache(tmp_path, REF)) as cache:
        for poisoned in (Entry(bad, None), Entry(-1.0, np.array([-1.0, bad], np.float32))):
            with pytest.raises(NonFiniteError, match="Entry 1"):
                cache.put([key(0), key(1)], [entry(0), poisoned])
        assert cache.get([key(0), key(1)]) == [None, None] and isinstance(NonFiniteError(), ValueError)


def test_misuse_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="is a file"):
        ReferenceCache(tmp_path / "file", REF)
    with closing(ReferenceCache(tmp_path, REF)) as cache:
        with pytest.raises(ValueError, match="shorter"):
            cache.put([key(0), key(1)], [entry(0)])
        with pytest.raises(TypeError, match="float64"):  # rounding it would be silent
            cache.put([key(0)], [Entry(-1.0, np.zeros(2))])
        assert cache.peek([key(0)]) == [None]


def test_look_up_uses_the_index(tmp_path: Path) -> None:
    queries: list[str] = []
    with closing(ReferenceCache(tmp_path, REF)) as cache:
        fill(cache, range(10))
        cache.file.run(lambda db: db.set_trace_callback(queries.append), None)
        cache.get([key(i) for i in range(10)])
    assert len(queries) == 10
    for query in queries:
        plan = " ".join(str(row) for row in sql(tmp_path, f"EXPLAIN QUERY PLAN {query}"))
        assert "SEARCH entries USING INDEX" in plan and "(ref=? AND key=?)" in plan and "SCAN" not in plan


def test_default_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DPO_PEFT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert default_folder() == Path.home() / ".cache/dpo-peft/reference"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert default_folder() == Path("/xdg/dpo-peft/reference")
    monkeypatch.setenv("DPO_PEFT_CACHE", "~/own")
    assert default_folder() == Path.home() / "own/reference"


# Several processes


def fill_shuffled(folder: Path, seed: int, n: int, start: Any) -> tuple[int, int]:
    """Read and fill keys 0..n-1 in a process's own order; (stored, wrong)."""
    order = random.Random(seed).sample(range(n), n)
    start.wait()
    with closing(ReferenceCache(folder, REF)) as cache:
        bad = 0
        for at in range(0, n, 16):
            batch = order[at : at + 16]
            found = cache.get([key(i) for i in batch])
            bad += sum(e is not None and not is_true(e, i) for i, e in zip(batch, found, strict=True))
            new = [i for i, e in zip(batch, found, strict=True) if e is None]
            cache.put([key(i) for i in new], [entry(i) for i in new])
        assert cache.refused == 0
        return cache.stored, bad


@pytest.mark.attack("two writers")
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_fill_one_store_at_once(tmp_path: Path, processes: int) -> None:
    n, start = 600, FORK.Barrier(processes)
    results = in_processes(fill_shuffled, [(tmp_path, seed, n, start) for seed in range(processes)])
    assert sum(stored for stored, _ in results) == n  # each entry was written once, by whoever came first
    assert all(bad == 0 for _, bad in results)
    with closing(ReferenceCache(tmp_path, REF)) as cache:
        assert missed(cache, range(n)) == 0 and wrong(cache, range(n)) == []


@pytest.mark.attack("damaged or mixed files")
def test_processes_meet_a_damaged_file_at_once(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"no database" * 1000)
    n, start = 300, FORK.Barrier(4)
    results = in_processes(fill_shuffled, [(tmp_path, seed, n, start) for seed in range(4)])
    assert moved(tmp_path) == [f"{FILE_NAME}.corrupt-1"]  # nobody moved the new file away
    assert (tmp_path / f"{FILE_NAME}.corrupt-1").read_bytes() == b"no database" * 1000
    assert sum(stored for stored, _ in results) == n
    with closing(ReferenceCache(tmp_path, REF)) as cache:
        assert missed(cache, range(n)) == 0 and wrong(cache, range(n)) == []


def open_and_fill(folder: Path, rounds: int, start: Any) -> None:
    for i in range(rounds):
        start.wait()
        with closing(ReferenceCache(folder / str(i), REF)) as cache:
            fill(cache, range(3))


@pytest.mark.attack("two writers")
def test_processes_make_one_file_at_once(tmp_path: Path) -> None:
    start = FORK.Barrier(4)
    in_processes(open_and_fill, [(tmp_path, 25, start)] * 4)
    for i in range(25):
        with closing(ReferenceCache(tmp_path / str(i), REF)) as cache:
            assert missed(cache, range(3)) == 0 and moved(tmp_path / str(i)) == []


def test_only_the_damaged_file_is_moved(tmp_path: Path) -> None:
    """Another process has put a new file in its place between our error and our moving it."""
    with closing(ReferenceCache(tmp_path, REF)) as cache, closing(ReferenceCache(tmp_path, REF)) as other:
        fill(cache, range(3))
        other.close()
        (tmp_path / FILE_NAME).rename(tmp_path / "elsewhere")
        fill(other, range(3))
        cache.file._replace(sqlite3.DatabaseError("database disk image is malformed"))
        assert moved(tmp_path) == [] and missed(cache, range(3)) == 0
        cache.file._replace(sqlite3.DatabaseError("database disk image is malformed"))  # now it is ours
        assert moved(tmp_path) == [f"{FILE_NAME}.corrupt-1"] and missed(cache, range(3)) == 3


def test_parent_and_forked_child_use_the_same_cache(tmp_path: Path) -> None:
    cache = ReferenceCache(tmp_path, REF)
    fill(cache, range(100))
    parent_done, child_began = FORK.Event(), FORK.Event()

    def child() -> int:
        served = 100 - missed(cache, range(100))
        fill(cache, range(100, 200))
        child_began.set()
        parent_done.wait()  # the parent closes the file and opens it again meanwhile
        fill(cache, range(200, 300))
        return served

    mine, theirs = FORK.Pipe(duplex=False)
    process = FORK.Process(target=lambda: theirs.send(child()))
    process.start()
    child_began.wait()
    cache.close()
    fill(cache, range(300, 400))
    parent_done.set()
    assert mine.recv() == 100
    process.join()
    fill(cache, range(400, 500))
    assert missed(cache, range(500)) == 0 and wrong(cache, range(500)) == []
    cache.close()
    with closing(ReferenceCache(tmp_path, REF)) as fresh:
        assert missed(fresh, range(500)) == 0


def test_fork_leaves_no_connection_open(tmp_path: Path) -> None:
    with closing(ReferenceCache(tmp_path, REF)) as cache:
        fill(cache, range(3))
        assert in_processes(lambda: cache.file._db is None, [()]) == [True]
        assert cache.file._db is None and wrong(cache, range(3)) == [] and cache.hits == 3


def put_until_killed(folder: Path, first: int, pipe: Any) -> None:
    cache = ReferenceCache(folder, REF)
    for at in range(first, first + 100_000, 8):
        fill(cache, range(at, at + 8))
        pipe.send(at + 8)


@pytest.mark.attack("killed while writing")
def test_kill_at_any_moment_loses_nothing_that_was_stored(tmp_path: Path) -> None:
    rng, first = random.Random(0), 0
    for round_ in range(25):
        mine, theirs = FORK.Pipe(duplex=False)
        process = FORK.Process(target=put_until_killed, args=(tmp_path, first, theirs))
        process.start()
        theirs.close()
        if round_ >= 10:  # before, the kill falls into starting and making the file
            first = mine.recv()
        time.sleep(rng.random() * 0.03)
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        try:
            while True:
                first = mine.recv()
        except EOFError:
            pass
        with closing(ReferenceCache(tmp_path, REF)) as cache:
            assert missed(cache, range(first)) == 0
            assert wrong(cache, range(first + 16)) == [] and cache.corrupt == 0
            first += 8 - missed(cache, range(first, first + 8))  # one may be stored whose report was cut off
            assert first % 8 == 0  # wholly or not at all
    assert first > 100 and moved(tmp_path) == []


# Damage

N = 40


@pytest.fixture
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stores that don't wait for the disk: hundreds are opened, and none has to survive the machine."""
    monkeypatch.setattr(store, "_SETTINGS", (*store._SETTINGS, "synchronous = OFF"))


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A store of 40 entries under each of two references, interleaved."""
    folder = tmp_path_factory.mktemp("whole")
    for part in (range(0, N // 2), range(N // 2, N)):
        for reference in (OTHER, REF):
            with closing(ReferenceCache(folder, reference, "about it")) as cache:
                fill(cache, part)
    assert not (folder / f"{FILE_NAME}-wal").exists()
    return (folder / FILE_NAME).read_bytes()


def suffer(folder: Path, content: bytes) -> str:
    """Read, refill and read again a store with this content. Says how the damage showed; fails on a wrong value."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / FILE_NAME).write_bytes(content)
    cache = ReferenceCache(folder, REF)
    assert wrong(cache, range(N)) == []
    misses = cache.misses
    for _ in range(3):  # deleting a damaged entry can lose its neighbors: they are misses then
        lost = [i for i, e in enumerate(cache.peek([key(i) for i in range(N)])) if e is None]
        cache.put([key(i) for i in lost], [entry(i) for i in lost])
    assert missed(cache, range(N)) == 0 and wrong(cache, range(N)) == [] and cache.refused == 0
    cache.close()
    summary(folder)
    return "moved" if moved(folder) else "corrupt" if cache.corrupt else "miss" if misses else "unnoticed"


@pytest.mark.attack("damaged or mixed files")
@pytest.mark.usefixtures("no_sync")
def test_no_flipped_byte_gives_a_wrong_value(tmp_path: Path, whole_file: bytes) -> None:
    rng = random.Random(1)
    places = [*range(100), *range(100), *range(100, len(whole_file), 71)]  # the header twice, then every 71st place
    shown = {"moved": 0, "corrupt": 0, "miss": 0, "unnoticed": 0}
    for place in places:
        flipped = bytearray(whole_file)
        flipped[place] ^= rng.choice([1 << rng.randrange(8), 255, rng.randrange(1, 256)])
        shown[suffer(tmp_path / "store", bytes(flipped))] += 1
    assert len(places) > 600 and min(shown.values()) > 0, shown  # empty space and other references go unnoticed


@pytest.mark.attack("damaged or mixed files")
@pytest.mark.parametrize("value", [3, 255])
def test_header_that_forbids_writing_is_damage(tmp_path: Path, whole_file: bytes, value: int) -> None:
    assert suffer(tmp_path / "store", whole_file[:18] + bytes([value]) + whole_file[19:]) == "moved"


@pytest.mark.attack("damaged or mixed files")
@pytest.mark.usefixtures("no_sync")
def test_flips_in_every_part_of_an_entry_are_detected(tmp_path: Path, whole_file: bytes) -> None:
    tokens = entry(7).token_logps
    assert tokens is not None
    for part in (np.float64(entry(7).logp).tobytes(), tokens.tobytes(), key(7)):
        places = [i for i in range(len(whole_file)) if whole_file.startswith(part, i)]
        assert len(places) >= 2  # both references hold it
        for offset in range(len(part)):
            flipped = bytearray(whole_file)
            for place in places:
                flipped[place + offset] ^= 1 << offset % 8
            assert suffer(tmp_path / "store", bytes(flipped)) != "unnoticed"


@pytest.mark.attack("damaged or mixed files")
@pytest.mark.usefixtures("no_sync")
def test_garbage_truncation_and_mixed_up_pages_give_no_wrong_value(tmp_path: Path, whole_file: bytes) -> None:
    rng, pages = random.Random(2), len(whole_file) // PAGE
    contents = [whole_file[: rng.randrange(len(whole_file))] for _ in range(20)]
    contents += [whole_file[: page * PAGE] for page in range(pages)] + [whole_file + rng.randbytes(5000)]
    for page in range(pages):
        for start, end in ((0, PAGE), (8, PAGE), (2000, 2100), (PAGE - 64, PAGE)):
            damaged = bytearray(whole_file)
            damaged[page * PAGE + start : page * PAGE + end] = rng.randbytes(end - start)
            contents.append(bytes(damaged))
        for other in range(pages):
            damaged = bytearray(whole_file)
            damaged[page * PAGE : (page + 1) * PAGE] = whole_file[other * PAGE : (other + 1) * PAGE]
            contents.append(bytes(damaged))
    shown = [suffer(tmp_path / "store", content) for content in contents]
    assert shown.count("moved") > len(shown) / 3


def test_without_its_checksum_a_flipped_value_is_served(
    tmp_path: Path, whole_file: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = np.float64(entry(6).logp).tobytes()
    (tmp_path / FILE_NAME).write_bytes(whole_file.replace(value, bytes([value[0] ^ 1]) + value[1:]))
    monkeypatch.setattr(ReferenceCache, "_checksum", lambda *_: ANY)
    with closing(ReferenceCache(tmp_path, REF)) as cache:
        assert wrong(cache, range(N)) == [6]


@pytest.mark.attack("damaged or mixed files")
@pytest.mark.parametrize(
    "mix_up",
    [
        "DELETE FROM entries WHERE ref = 2; UPDATE entries SET ref = 2",  # the other reference's entries
        "UPDATE entries SET (logp, tokens, checksum) = (SELECT logp, tokens, checksum FROM entries AS e "
        "WHERE e.rowid = (entries.rowid - 1) / 20 * 40 + 21 - entries.rowid)",  # another key's
        "UPDATE entries SET tokens = NULL WHERE tokens IS NOT NULL",
        "UPDATE entries SET tokens = x'' WHERE tokens IS NULL",
        "UPDATE entries SET tokens = 0",
        "UPDATE entries SET logp = logp || substr(tokens, 1, 4), tokens = substr(tokens, 5) WHERE length(tokens) > 4",
        "UPDATE entries SET checksum = x'0000000000000000'",
    ],
)
def test_rows_that_are_whole_but_not_ours_are_misses(tmp_path: Path, whole_file: bytes, mix_up: str) -> None:
    (tmp_path / FILE_NAME).write_bytes(whole_file)
    count = "SELECT count(*) FROM entries"
    sql(tmp_path, mix_up)
    before = sql(tmp_path, count)[0][0]
    with closing(ReferenceCache(tmp_path, REF)) as cache:
        found = cache.get([key(i) for i in range(N)])
        assert all(e is None or is_true(e, i) for i, e in enumerate(found))
        assert cache.corrupt == cache.misses >= N // 3
        cache.close()
        assert before - sql(tmp_path, count)[0][0] == cache.corrupt  # they are deleted
        fill(cache, range(N))
        assert missed(cache, range(N)) == 0 and wrong(cache, range(N)) == []


def test_put_replaces_a_damaged_entry_that_no_one_has_read(tmp_path: Path) -> None:
    with closing(ReferenceCache(tmp_path, REF)) as cache:
        fill(cache, range(4))
        cache.close()
        sql(tmp_path, "UPDATE entries SET logp = x'00' WHERE rowid = 1")
        fill(cache, range(4))
        assert cache.stored == 5 and wrong(cache, range(4)) == [] and cache.hits == 4


@pytest.mark.attack("damaged or mixed files")
@pytest.mark.parametrize("statement", ["PRAGMA user_version = 99", "PRAGMA user_version = 0"])
def test_file_of_another_version_is_moved_aside(
    tmp_path: Path, whole_file: bytes, statement: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / FILE_NAME).write_bytes(whole_file)
    sql(tmp_path, statement)
    with closing(ReferenceCache(tmp_path, REF)) as cache, caplog.at_level(logging.WARNING):
        assert missed(cache, range(N)) == N
        fill(cache, range(N))
        assert wrong(cache, range(N)) == [] and cache.hits == N
    assert (tmp_path / f"{FILE_NAME}.corrupt-1").stat().st_size == len(whole_file)


def test_damage_is_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"no database" * 1000)
    with caplog.at_level(logging.WARNING), closing(ReferenceCache(tmp_path, REF)) as cache:
        for _ in range(3):
            fill(cache, range(3))
    assert len(caplog.records) == 1
    assert "corrupt-1" in caplog.text and "not a database" in caplog.text and "--clear" in caplog.text


def test_moved_or_deleted_file_is_noticed(tmp_path: Path) -> None:
    with closing(ReferenceCache(tmp_path / "store", REF)) as cache:
        fill(cache, range(5))
        shutil.rmtree(tmp_path / "store")
        assert missed(cache, range(5)) == 5
        fill(cache, range(5))
        with closing(ReferenceCache(tmp_path / "store", REF)) as other:  # not into a file without a name
            assert missed(other, range(5)) == 0


# Limits


def test_least_recently_used_reference_makes_room(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / FILE_NAME
    for reference in ("aa", "bb", "cc"):
        with closing(ReferenceCache(tmp_path, reference)) as cache:
            fill(cache, range(600))
    limit = path.stat().st_size + PAGE
    ReferenceCache(tmp_path, "aa", max_bytes=limit).close()  # used again, so bb is now the oldest
    with closing(ReferenceCache(tmp_path, "dd", max_bytes=limit)) as cache, caplog.at_level(logging.INFO, "dpo_peft"):
        fill(cache, range(600))
        assert cache.refused == 0 and wrong(cache, range(600)) == [] and cache.hits == 600
    assert "deleted 600 entries of reference bb" in caplog.text
    assert path.stat().st_size <= limit
    assert [usage.reference for usage in summary(tmp_path)] == ["dd", "aa", "cc"]
    with closing(ReferenceCache(tmp_path, "cc")) as cache, closing(ReferenceCache(tmp_path, "aa")) as second:
        assert missed(cache, range(600)) == 0 and missed(second, range(600)) == 0  # whole, not thinned out


def test_full_store_refuses_and_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    limit = 100_000
    with caplog.at_level(logging.WARNING), closing(ReferenceCache(tmp_path, REF, max_bytes=limit)) as cache:
        for at in range(0, 2000, 20):
            fill(cache, range(at, at + 20))
            assert (tmp_path / FILE_NAME).stat().st_size <= limit
        assert cache.stored > 200 and cache.refused > 500 and cache.stored + cache.refused == 2000
        assert missed(cache, range(2000)) == cache.refused and wrong(cache, range(2000)) == []
    assert (tmp_path / FILE_NAME).stat().st_size <= limit
    assert len(caplog.records) == 1 and "--clear" in caplog.text and "100,000" in caplog.text


@pytest.mark.attack("full disk")
def test_full_disk_stops_storing_and_serving_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), closing(ReferenceCache(tmp_path, REF)) as cache:
        fill(cache, range(100))
        cache.file.run(lambda db: db.execute("PRAGMA max_page_count = 1").fetchall(), None)  # SQLite then says: full
        for _ in range(2):
            fill(cache, range(100, 1000))
        assert cache.refused == 1800 and wrong(cache, range(1000)) == [] and cache.hits == 100
    assert len(caplog.records) == 1 and "full" in caplog.text
    with closing(ReferenceCache(tmp_path, REF)) as cache:
        assert missed(cache, range(100)) == 0 and moved(tmp_path) == []


def test_locked_store_is_given_up_for_the_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(store, "BUSY_SECONDS", 0.2)
    monkeypatch.setattr(store, "AFTER_BUSY_SECONDS", 0.1)
    with caplog.at_level(logging.WARNING), closing(ReferenceCache(tmp_path, REF)) as cache:
        fill(cache, range(10))
        with closing(sqlite3.connect(tmp_path / FILE_NAME, isolation_level=None)) as holder:
            holder.execute("BEGIN IMMEDIATE")
            fill(cache, range(10, 20))
            fill(cache, range(10, 20))
            assert (cache.stored, cache.refused) == (10, 20)
            assert missed(cache, range(10)) == 0  # reading goes on
            holder.execute("ROLLBACK")
        fill(cache, range(10, 20))
        assert cache.stored == 20 and len(caplog.records) == 1 and "locked" in caplog.text
        cache.close()
        with closing(sqlite3.connect(tmp_path / "logps.lock", isolation_level=None)) as holder:
            holder.execute("BEGIN EXCLUSIVE")
            assert missed(cache, range(20)) == 20
        assert missed(cache, range(20)) == 0 and moved(tmp_path) == []


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that other users can reach, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)
        os.chmod(name, 0o755)


def without_rights(work: Callable[[], Any]) -> Any:
    """`work` in a process of a user who is not root, for whom a file's mode means something."""

    def child() -> Any:
        if os.getuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        return work()

    return in_processes(child, [()])[0]


HOLD_OPEN = (
    "import sqlite3, sys; db = sqlite3.connect(sys.argv[1]); db.execute('SELECT * FROM refs').fetchall(); "
    "print('open', flush=True); sys.stdin.read()"
)


@pytest.mark.attack("read-only folder")
@pytest.mark.parametrize("leftover", ["", "lock", "log", "lock and log"])
def test_read_only_folder_is_read(public_folder: Path, leftover: str, caplog: pytest.LogCaptureFixture) -> None:
    cache = ReferenceCache(public_folder, REF)
    fill(cache, range(10))
    # While another process has the file open, its log stays: here it holds the entries.
    command = [sys.executable, "-c", HOLD_OPEN if "log" in leftover else "", str(public_folder / FILE_NAME)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    holder.stdout.readline()  # type: ignore[union-attr]
    cache.close()
    assert (public_folder / f"{FILE_NAME}-wal").exists() == ("log" in leftover)
    if "lock" not in leftover:
        (public_folder / "logps.lock").unlink()
    os.chmod(public_folder, 0o555)
    for path in public_folder.iterdir():
        path.chmod(0o444)

    def read() -> tuple[int, ...]:
        with caplog.at_level(logging.WARNING), closing(ReferenceCache(public_folder, REF)) as cache:
            fill(cache, range(10, 15))
            fill(cache, range(10, 15))
            bad = wrong(cache, range(15))
            return cache.hits, len(bad), cache.stored, cache.refused, caplog.text.count("can't be written")

    before = sorted(os.listdir(public_folder))
    assert without_rights(read) == (10, 0, 0, 10, 1)
    assert sorted(os.listdir(public_folder)) == before
    holder.communicate()


@pytest.mark.attack("read-only folder")
def test_folder_that_cannot_be_made_means_misses(public_folder: Path) -> None:
    os.chmod(public_folder, 0o555)

    def read() -> tuple[int, int, list[Any]]:
        with closing(ReferenceCache(public_folder / "sub", REF)) as cache:
            fill(cache, range(3))
            return missed(cache, range(3)), cache.refused, summary(public_folder / "sub")

    assert without_rights(read) == (3, 3, [])


# Summary and clearing out


def test_summary_and_clear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert summary(tmp_path / "none") == [] and clear(tmp_path / "none") == (0, 0)
    assert not (tmp_path / "none").exists()
    now = 1_700_000_000.0  # 2023-11-14
    for days, reference, n in ((30, "aa", 1000), (10, "bb", 500), (0, "cc", 300)):
        monkeypatch.setattr(time, "time", lambda days=days: now - days * 86400)
        with closing(ReferenceCache(tmp_path, reference, f"model {reference}")) as cache:
            fill(cache, range(n))
    rows = [(u.reference, u.about, u.entries, u.last_used) for u in summary(tmp_path)]
    assert rows == [
        ("cc", "model cc", 300, "2023-11-14"),
        ("bb", "model bb", 500, "2023-11-04"),
        ("aa", "model aa", 1000, "2023-10-15"),
    ]
    size = (tmp_path / FILE_NAME).stat().st_size
    assert 0.6 * size < sum(usage.bytes for usage in summary(tmp_path)) < size

    for bad in (dict(reference="zz"), dict(unused_days=-1)):
        with pytest.raises(OptionError):
            clear(tmp_path, **bad)  # type: ignore[arg-type]
    assert clear(tmp_path, "aa", unused_days=31) == (0, 0)
    entries, shrunk = clear(tmp_path, unused_days=20)
    assert entries == 1000 and shrunk == size - (tmp_path / FILE_NAME).stat().st_size > 0.4 * size
    entries, _ = clear(tmp_path, reference="cc")
    assert entries == 300 and [usage.reference for usage in summary(tmp_path)] == ["bb"]
    with closing(ReferenceCache(tmp_path, "bb")) as cache:
        assert missed(cache, range(500)) == 0
    (tmp_path / f"{FILE_NAME}.corrupt-1").write_bytes(bytes(10_000))
    entries, shrunk = clear(tmp_path)
    assert entries == 500 and shrunk > 10_000 and summary(tmp_path) == [] and moved(tmp_path) == []


def test_clear_under_a_cache_in_use(tmp_path: Path) -> None:
    with closing(ReferenceCache(tmp_path, REF)) as cache:
        fill(cache, range(100))
        assert clear(tmp_path)[0] == 100
        assert missed(cache, range(100)) == 100
        fill(cache, range(100))
        assert missed(cache, range(100)) == 0 and cache.stored == 200


def test_summary_of_damaged_text_is_still_a_summary(tmp_path: Path) -> None:
    with closing(ReferenceCache(tmp_path, REF)) as cache:
        fill(cache, range(2))
    sql(tmp_path, "UPDATE refs SET about = CAST(x'ff41' AS TEXT), last_used = 'never'")
    assert [(u.about, u.entries, u.last_used) for u in summary(tmp_path)] == [("\ufffdA", 2, "unknown")]
    assert moved(tmp_path) == []
