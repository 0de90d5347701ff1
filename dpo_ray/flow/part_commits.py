"""Parts of a row-wise stage: fixed, keyed sets of rows, loaded together and committed together.

`_parts/<part>.json` is the commit of a part: it names the file of the kept rows, the file of the dropped ones and their
reasons, and the attempt that it belongs to. Every id that went in came out once or was dropped by reason.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ValidationError

from dpo_ray.errors import SchemaError, StageError
from dpo_ray.flow import storage
from dpo_ray.flow.artifact import FileRecord, read_table, write_table
from dpo_ray.schemas import conform

PART = "_part"
DROP_REASON = "drop_reason"
MAX_PART_BYTES = 64 << 20  # above this Ray splits a block, and a part would no longer be one


class Slice(NamedTuple):
    """Rows start..stop of one committed file."""

    uri: str
    start: int
    stop: int


class Part(NamedTuple):
    name: str
    slices: tuple[Slice, ...]

    @property
    def rows(self) -> int:
        return sum(s.stop - s.start for s in self.slices)


class Grain(NamedTuple):
    """How the rows of a stage are keyed."""

    key_in: str
    key_out: str
    schema: pa.Schema


class PartRecord(BaseModel):
    """The commit of one part."""

    part: str
    attempt: str
    """Fingerprint of the stage and of the rows that the part was made of."""
    file: FileRecord | None
    """None when every row was dropped."""
    quarantine: FileRecord | None
    rows_in: int
    rows_out: int
    dropped: dict[str, int]
    counters: dict[str, float]


def load_part(descriptors: pa.Table) -> pa.Table:
    """The rows of the one part that is described, with PART, and DROP_REASON (null: kept).

    Raises:
        StageError: they have more bytes than one block may.
    """
    (descriptor,) = descriptors.to_pylist()
    tables = [read_table(s["uri"]).slice(s["start"], s["stop"] - s["start"]) for s in descriptor["slices"]]
    table = pa.concat_tables(tables).combine_chunks()
    if table.nbytes > MAX_PART_BYTES:
        raise StageError(
            f"{descriptor['part']} has {table.nbytes >> 20} MiB in {table.num_rows} rows, above {MAX_PART_BYTES >> 20} MiB; "
            "lower resources.rows_per_part of this stage"
        )
    table = table.append_column(PART, pa.array([descriptor["part"]] * table.num_rows))
    return table.append_column(DROP_REASON, pa.nulls(table.num_rows, pa.string()))


def make_sink(
    directory: str,
    attempts: Mapping[str, str],
    parts: Mapping[str, Part],
    grain: Grain,
    stage: str,
    count: Callable[[pa.Table], Mapping[str, float]],
) -> Callable[[pa.Table], pa.Table]:
    """A function that checks one part, writes it and commits it; it gives its PartRecord as JSON, one row of `record`.

    Raises (when it is called):
        StageError: rows were lost or doubled.
        SchemaError: an id stands twice, or a row is not of the grain's schema.
    """

    def sink(table: pa.Table) -> pa.Table:
        (part,) = set(table[PART].to_pylist())
        kept = table.filter(pc.is_null(table[DROP_REASON]))
        dropped = table.filter(pc.is_valid(table[DROP_REASON])).drop_columns([PART])
        _check_keys(stage, parts[part], kept, dropped, grain)
        counters = dict(count(kept))
        kept = conform(kept, grain.schema, stage, grain.key_in)
        # A name of its own for every attempt: a zombie task can never overwrite what another one committed.
        token = uuid.uuid4().hex[:8]
        record = PartRecord(
            part=part,
            attempt=attempts[part],
            file=write_table(directory, f"{part}-{token}.parquet", kept) if kept.num_rows else None,
            quarantine=write_table(directory, f"quarantine/{part}-{token}.parquet", dropped) if dropped.num_rows else None,
            rows_in=parts[part].rows,
            rows_out=kept.num_rows,
            dropped=dict(Counter(r.split(":")[0] for r in dropped[DROP_REASON].to_pylist())),
            counters=counters,
        )
        data = record.model_dump_json()
        storage.write_bytes(f"{directory}/_parts/{part}.json", data.encode())
        return pa.table({"record": [data]})

    return sink


def _check_keys(stage: str, part: Part, kept: pa.Table, dropped: pa.Table, grain: Grain) -> None:
    """Every id that went in came out or was dropped by reason, no other did, and no output id stands twice."""
    kept_in, dropped_in = (set(t[grain.key_in].to_pylist()) for t in (kept, dropped))
    slices = [read_table(s.uri, [grain.key_in]).slice(s.start, s.stop - s.start) for s in part.slices]
    wanted = {i for s in slices for i in s[grain.key_in].to_pylist()}
    if len(kept_in) + len(dropped_in) != part.rows or kept_in | dropped_in != wanted:
        raise StageError(
            f"{stage}: {part.name} has {part.rows} rows in, {len(kept_in)} of them out and {len(dropped_in)} dropped by reason "
            f"(counted by {grain.key_in}); each must come out once, or be dropped"
        )
    repeated = [v["values"] for v in pc.value_counts(kept[grain.key_out]).to_pylist() if v["counts"] > 1]
    if repeated:
        raise SchemaError(f"{stage}: {part.name} has {grain.key_out}={repeated[0]!r} more than once; ids are unique in a table")


def check_unique(directory: str, files: Sequence[FileRecord], key: str, stage: str) -> None:
    """Raises SchemaError where an id stands in two parts."""
    ids = pa.concat_tables(read_table(f"{directory}/{f.path}", [key]) for f in files)[key]
    if len(pc.unique(ids)) != len(ids):
        repeated = next(v["values"] for v in pc.value_counts(ids).to_pylist() if v["counts"] > 1)
        raise SchemaError(f"{stage}: {key}={repeated!r} stands in more than one part; ids are unique in a table")


def committed_parts(directory: str, attempts: Mapping[str, str]) -> dict[str, PartRecord]:
    """Parts that an earlier attempt of the same stage committed; others, and torn records, do not count."""
    records = {}
    for name in storage.list_files(f"{directory}/_parts"):
        try:
            record = PartRecord.model_validate_json(storage.read_bytes(f"{directory}/_parts/{name}"))
        except ValidationError:
            continue
        if attempts.get(record.part) == record.attempt:
            records[record.part] = record
    return records
