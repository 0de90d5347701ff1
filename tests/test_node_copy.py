"""Copies of small tables at every kind of place; that no heap grows with the table is in test_pair_table.py."""

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest

from dpo_ray import node_copy
from dpo_ray.errors import StageError
from dpo_ray.flow.artifact import write_table
from dpo_ray.node_copy import BLOCK_ROWS, open_copy

COLUMNS = ["id", "tokens"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(node_copy, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def made(num_rows: int, start: int = 0) -> pa.Table:
    tokens = [list(range(i % 5)) for i in range(start, start + num_rows)]
    columns = {"unused": ["x"] * num_rows, "tokens": tokens, "id": [f"row-{i}" for i in range(start, start + num_rows)]}
    return pa.table(columns, schema=pa.schema({"unused": pa.string(), "tokens": pa.list_(pa.int32()), "id": pa.string()}))


def written(directory, sizes) -> list[str]:
    """Files of so many rows each, numbered through."""
    starts = np.cumsum([0, *sizes]).tolist()
    for i, size in enumerate(sizes):
        write_table(str(directory), f"part-{i:05d}.parquet", made(size, starts[i]))
    return [f"{directory}/part-{i:05d}.parquet" for i in range(len(sizes))]


def copies(cache) -> list[str]:
    return sorted(p.name for p in cache.iterdir() if p.is_dir())


def rows_of(copy) -> list[dict]:
    return [row for i in range(copy.rows.num_record_batches) for row in copy.rows.get_batch(i).to_pylist()]


@pytest.mark.parametrize("sizes", [[1], [3, 0, 2], [BLOCK_ROWS], [BLOCK_ROWS - 1, 2], [100] * 11, [2 * BLOCK_ROWS + 1, 7]])
def test_copy_holds_the_rows_in_order_in_blocks_of_one_size(tmp_path, sizes):
    copy = open_copy(written(tmp_path, sizes), COLUMNS, "h", lists=["tokens"])
    assert rows_of(copy) == made(sum(sizes)).select(COLUMNS).to_pylist()
    blocks = [copy.rows.get_batch(i).num_rows for i in range(copy.rows.num_record_batches)]
    assert blocks[:-1] == [BLOCK_ROWS] * (len(blocks) - 1)
    assert copy.lengths.tolist() == [[i % 5] for i in range(sum(sizes))]


@pytest.mark.parametrize("place", ["path", "file", "memory"])
def test_copy_is_made_once_wherever_the_table_lies_and_keyed_by_its_hash(tmp_path, cache, place):
    at = {"path": str(tmp_path), "file": f"file://{tmp_path}", "memory": f"memory://{uuid.uuid4().hex}"}[place]
    uris = written(f"{at}/table", [3, 2])
    first = rows_of(open_copy(uris, COLUMNS, "h", lists=["tokens"]))
    gone = ["/nowhere/part-00000.parquet"]
    assert rows_of(open_copy(gone, COLUMNS, "h", lists=["tokens"])) == first  # from the copy: its own source is not read
    assert len(copies(cache)) == 1
    for other in ({"table_hash": "h2"}, {"columns": ["tokens"]}, {"lists": ["tokens", "tokens"]}):
        with pytest.raises(StageError, match="nowhere"):
            open_copy(**({"uris": gone, "columns": COLUMNS, "table_hash": "h", "lists": ["tokens"]} | other))
    assert len(copies(cache)) == 1
    assert cache.stat().st_mode & 0o077 == 0


def test_copy_is_made_once_by_workers_that_start_together(tmp_path, cache, monkeypatch):
    """A lock of a file is held by who opened it, so threads exclude each other as processes do."""
    uris, write, together, writes = written(tmp_path, [2000]), node_copy._write, threading.Barrier(4), []

    def counted(*arguments):
        writes.append(arguments)
        write(*arguments)

    def worker(_):
        together.wait(timeout=60)
        return rows_of(open_copy(uris, COLUMNS, "h", lists=["tokens"]))

    monkeypatch.setattr(node_copy, "_write", counted)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(worker, range(4)))
    assert found == [made(2000).select(COLUMNS).to_pylist()] * 4
    assert len(writes) == 1
    assert len(copies(cache)) == 1


KILLED = """
import os, pathlib, signal, sys
from dpo_ray import node_copy
node_copy.CACHE = pathlib.Path(sys.argv[1])
write = node_copy._write
def torn(directory, *arguments):
    write(directory, *arguments)
    os.kill(os.getpid(), signal.SIGKILL)
node_copy._write = torn
node_copy.open_copy([sys.argv[2]], ["id", "tokens"], "h", lists=["tokens"])
"""


def test_copy_of_a_process_killed_before_its_end_is_made_again(tmp_path, cache):
    (uri,) = written(tmp_path, [10])
    done = subprocess.run([sys.executable, "-c", KILLED, str(cache), uri], timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert [name[:5] for name in copies(cache)] == ["torn-"]
    assert len(rows_of(open_copy([uri], COLUMNS, "h", lists=["tokens"]))) == 10
    assert [name[:5] == "torn-" for name in copies(cache)] == [False]


@pytest.mark.parametrize("name", [node_copy.ROWS, node_copy.LENGTHS])
@pytest.mark.parametrize("left", [0, 0.5, None])
def test_copy_that_lost_its_end_is_made_again(tmp_path, cache, name, left):
    uris = written(tmp_path, [10])
    open_copy(uris, COLUMNS, "h", lists=["tokens"])
    file = cache / copies(cache)[0] / name
    file.unlink() if left is None else os.truncate(file, int(file.stat().st_size * left))
    assert rows_of(open_copy(uris, COLUMNS, "h", lists=["tokens"])) == made(10).select(COLUMNS).to_pylist()


def test_copies_that_nobody_opened_for_days_go_when_another_is_made_and_their_readers_keep_them(tmp_path, cache):
    uris = written(tmp_path, [10])
    reader = open_copy(uris, COLUMNS, "old", lists=["tokens"])
    (old,) = copies(cache)
    open_copy(uris, COLUMNS, "used", lists=["tokens"])
    days_ago = time.time() - (node_copy.KEPT_DAYS + 1) * 24 * 3600
    for name in copies(cache):
        os.utime(cache / name, (days_ago, days_ago))
    open_copy(uris, COLUMNS, "used", lists=["tokens"])
    assert old in copies(cache)
    open_copy(uris, COLUMNS, "new", lists=["tokens"])
    assert old not in copies(cache)
    assert len(copies(cache)) == 2
    assert rows_of(reader) == made(10).select(COLUMNS).to_pylist()
    assert reader.lengths.sum() == 20


def test_copy_of_no_rows_is_a_stage_error(tmp_path, cache):
    with pytest.raises(StageError, match="2 table files have no rows"):
        open_copy(written(tmp_path, [0, 0]), COLUMNS, "h", lists=["tokens"])
    assert copies(cache) == []


def test_copy_that_cannot_be_written_says_where_and_what_to_do(tmp_path, cache):
    cache.write_text("a file where the directory should be")
    with pytest.raises(StageError, match=rf"could not be copied to {cache}.*TMPDIR"):
        open_copy(written(tmp_path, [3]), COLUMNS, "h", lists=["tokens"])
