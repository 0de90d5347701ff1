"""Reference log-probabilities that were computed before, on storage that every node sees.

In: the token ids of prompt and completion. Out: what was computed for exactly these, or nothing.
A cache is a directory of parquet files, one written per part and never changed; its name holds everything else that a
value depends on: the policy's identity, the compute dtype and the version of `learn/logps.py`. It can be deleted at any time.
"""

from __future__ import annotations

import hashlib
import math
import uuid
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from dpo_ray.flow import storage
from dpo_ray.flow.artifact import read_table, write_table
from dpo_ray.learn import LOGPS_VERSION

SCHEMA = pa.schema(
    [
        pa.field("key", pa.binary(16), nullable=False),
        pa.field("logps", pa.float32(), nullable=False),
        pa.field("token_logps", pa.list_(pa.float32())),
    ]
)


class Entry(NamedTuple):
    """What the reference says of one completion."""

    logps: float
    """Sum in nats."""
    token_logps: np.ndarray | None
    """float32, of each token; None where they were not asked for."""


def cache_directory(root: str, identity: str, dtype: str) -> str:
    """The cache of one policy below a root, which all runs there share."""
    return f"{root}/.logps/{identity}-{dtype}-v{LOGPS_VERSION}"


def completion_key(prompt_token_ids: Sequence[int], completion_token_ids: Sequence[int]) -> bytes:
    """128 bits of the SHA-256 of the ids, with the place of the boundary."""
    digest = hashlib.sha256(len(prompt_token_ids).to_bytes(8, "little"))
    for ids in (prompt_token_ids, completion_token_ids):
        digest.update(np.asarray(ids, "<i8").tobytes())
    return digest.digest()[:16]


def read_cache(directory: str) -> dict[bytes, Entry]:
    """Every usable entry; a file torn by a kill, and a value that is no log-probability, are as if they were not there."""
    entries: dict[bytes, Entry] = {}
    for name in storage.list_files(directory):
        try:
            table = read_table(f"{directory}/{name}").cast(SCHEMA)
        except (pa.ArrowInvalid, ValueError, OSError):
            continue
        tokens = table["token_logps"].to_pylist()
        for key, logps, own in zip(table["key"].to_pylist(), table["logps"].to_pylist(), tokens, strict=True):
            if math.isfinite(logps) and logps <= 0 and (own is not None or key not in entries):
                entries[key] = Entry(logps, None if own is None else np.array(own, np.float32))
    return entries


def write_cache(directory: str, entries: Mapping[bytes, Entry]) -> None:
    """Add entries, as a file of their own: nobody else writes to it."""
    if entries:
        columns = [list(entries), [e.logps for e in entries.values()], [e.token_logps for e in entries.values()]]
        arrays = [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
        write_table(directory, f"{uuid.uuid4().hex}.parquet", pa.table(arrays, schema=SCHEMA))
