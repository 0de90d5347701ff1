"""An Arrow IPC copy of a committed table on this node's disk, so that processes read rows from a map and not from a heap.

In: parquet files at paths or URIs, which would decode onto the heap. Out: a memory map of some of their columns.
Invariants: a copy is keyed by the hash of its table, so where the table lies does not matter and a changed one is another;
it is made once per node, whichever and however many processes ask for it; no process holds more of the table than a few
blocks of rows, not even the one that makes the copy.

Copies lie below the system's temporary directory, which TMPDIR moves. Whoever makes a copy first removes those that nobody
opened for KEPT_DAYS; a process that still reads one keeps its map, since a deleted file lives on until it is closed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dpo_ray.errors import StageError
from dpo_ray.flow import storage

CACHE = Path(tempfile.gettempdir()) / f"dpo-ray-tables-{os.getuid()}"
FORMAT = "1"
BLOCK_ROWS = 512
"""Rows of every block but the last, so that the place of a row is a division."""
KEPT_DAYS = 3
ROWS, LENGTHS = "rows.arrow", "lengths.int32"


class NodeCopy(NamedTuple):
    """A table in memory maps; neither array nor rows lie on the heap."""

    rows: pa.RecordBatchFileReader
    """Blocks of BLOCK_ROWS rows, in the order of the table."""
    lengths: np.ndarray
    """(rows, list columns) int32."""


def open_copy(uris: Sequence[str], columns: Sequence[str], table_hash: str, *, lists: Sequence[str]) -> NodeCopy:
    """Map this node's copy of a table, and make it where there is none.

    A lock lets one process make a copy while the others wait for it; it ends with its process, even a killed one.

    Args:
        uris: the parquet files of the table, in order.
        columns: what is copied.
        table_hash: hash of the table's contents.
        lists: list columns whose lengths are kept beside the rows.

    Raises:
        StageError: the table has no rows, or the copy cannot be written.
    """
    key = hashlib.sha256("\n".join([FORMAT, table_hash, *columns, "", *lists]).encode()).hexdigest()
    target = CACHE / key
    if whole := _open(target, len(lists)):
        return whole
    try:
        with _lock():
            if whole := _open(target, len(lists)):  # another process made it meanwhile
                return whole
            _make(target, uris, columns, lists)
            whole = _open(target, len(lists))
            assert whole is not None, f"{target} cannot be read back"
            return whole
    except OSError as error:
        raise StageError(
            f"{len(uris)} table files, the first {uris[0]}, could not be copied to {target} on this node: {error}. Free space "
            "there, or start Ray with TMPDIR on a larger disk"
        ) from error


def _open(target: Path, num_lists: int) -> NodeCopy | None:
    """Map a copy and mark it as used; None where there is none, or one that lost its end when the power went."""
    try:
        os.utime(target)
        rows = pa.ipc.open_file(pa.memory_map(str(target / ROWS)))
        lengths = np.memmap(target / LENGTHS, np.int32, mode="r").reshape(-1, num_lists)
        last = rows.num_record_batches - 1
        whole = last * BLOCK_ROWS + rows.get_batch(last).num_rows == len(lengths)
    except (OSError, pa.ArrowInvalid, ValueError):
        return None
    return NodeCopy(rows, lengths) if whole else None


@contextmanager
def _lock() -> Iterator[None]:
    CACHE.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@storage.patient
def _make(target: Path, uris: Sequence[str], columns: Sequence[str], lists: Sequence[str]) -> None:
    """Write a copy beside its place and move it there; called with the lock, so all that is torn here has no owner."""
    unused = time.time() - KEPT_DAYS * 24 * 3600
    for old in CACHE.iterdir():
        if old.is_dir() and (old == target or old.name.startswith("torn-") or old.stat().st_mtime < unused):
            shutil.rmtree(old)
    torn = Path(tempfile.mkdtemp(prefix="torn-", dir=CACHE))
    try:
        _write(torn, uris, columns, lists)
        os.rename(torn, target)
    except BaseException:
        shutil.rmtree(torn)
        raise


def _write(directory: Path, uris: Sequence[str], columns: Sequence[str], lists: Sequence[str]) -> None:
    blocks = _blocks(uris, columns)
    first = next(blocks, None)
    if first is None:
        raise StageError(f"{len(uris)} table files have no rows")
    with pa.ipc.new_file(str(directory / ROWS), first.schema) as rows, open(directory / LENGTHS, "wb") as lengths:
        while first is not None:
            rows.write(first)
            of_lists = [pc.fill_null(pc.list_value_length(first[column]), 0).to_numpy(zero_copy_only=False) for column in lists]
            np.stack(of_lists, axis=1).astype(np.int32).tofile(lengths)
            first = next(blocks, None)


def _blocks(uris: Sequence[str], columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Blocks of BLOCK_ROWS rows over the borders of files."""
    held: list[pa.RecordBatch] = []
    for uri in uris:
        fs, path = storage.filesystem(uri)
        with fs.open_input_file(path) as file:
            for batch in pq.ParquetFile(file).iter_batches(BLOCK_ROWS, columns=list(columns)):
                held.append(batch.select(list(columns)))
                if sum(b.num_rows for b in held) >= BLOCK_ROWS:
                    whole = pa.Table.from_batches(held)
                    yield whole.slice(0, BLOCK_ROWS).combine_chunks().to_batches()[0]
                    held = whole.slice(BLOCK_ROWS).to_batches()
    if held:
        yield pa.Table.from_batches(held).combine_chunks().to_batches()[0]
