"""What a stage leaves behind: files, and `_manifest.json`, which is written last and IS the commit.

Readers open only the files that a manifest lists, so a torn attempt is never read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from dpo_ray.errors import SchemaError
from dpo_ray.flow import storage

MANIFEST = "_manifest.json"


class FileRecord(BaseModel):
    """One committed file. `rows` is None for files that are no tables."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    """Relative to the stage's directory."""
    rows: int | None
    bytes: int
    sha256: str


class Manifest(BaseModel):
    """The record of one committed stage."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str
    round: int | None
    fingerprint: str
    identity: dict[str, Any]
    """What the fingerprint is the hash of: version, config, inputs, external."""
    files: list[FileRecord]
    rows_in: int
    rows_out: int
    dropped: dict[str, int]
    """Rows by the reason for which they were dropped."""
    metrics: dict[str, Any]
    seconds: float
    resources: dict[str, Any]
    versions: dict[str, str]
    git_commit: str | None
    committed_at: str

    @property
    def output_hash(self) -> str:
        """Identity of the stage's output: that of the policy it made, else its files' contents in order, not their names."""
        if identity := self.metrics.get("identity"):
            return identity
        return hashlib.sha256("\n".join(f.sha256 for f in self.files).encode()).hexdigest()


@dataclass(frozen=True)
class Artifact:
    """A committed stage: where it is and what its manifest says."""

    directory: str
    manifest: Manifest

    def uri(self, file: FileRecord) -> str:
        return f"{self.directory}/{file.path}"

    def tables(self, prefix: str = "part-") -> list[FileRecord]:
        """The table files whose name starts with `prefix`, in order."""
        return [f for f in self.manifest.files if f.path.startswith(prefix) and f.path.endswith(".parquet")]


def read_artifact(directory: str) -> Artifact | None:
    """The committed stage in `directory`, or None when nothing is committed there; a torn manifest commits nothing.

    Raises:
        SchemaError: there is a manifest, but it is not one of ours.
    """
    path = f"{directory}/{MANIFEST}"
    if not storage.exists(path):
        return None
    try:
        return Artifact(directory, Manifest.model_validate_json(storage.read_bytes(path)))
    except ValidationError as error:
        if error.errors()[0]["type"] == "json_invalid":
            return None
        raise SchemaError(
            f"{path} is not a manifest of this version of dpo-ray; use another `name` or `root`: {error}"
        ) from error


def write_manifest(directory: str, manifest: Manifest) -> Artifact:
    """Commit: write the manifest after every file that it lists."""
    storage.write_bytes(f"{directory}/{MANIFEST}", manifest.model_dump_json(indent=2).encode())
    return Artifact(directory, manifest)


def write_table(directory: str, path: str, table: pa.Table) -> FileRecord:
    """Write a parquet file and return its record."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    data = sink.getvalue()
    storage.write_bytes(f"{directory}/{path}", data)
    return FileRecord(path=path, rows=table.num_rows, bytes=data.size, sha256=hashlib.sha256(data).hexdigest())


@storage.patient
def read_table(uri: str, columns: Iterable[str] | None = None) -> pa.Table:
    fs, path = storage.filesystem(uri)
    with fs.open_input_file(path) as file:
        return pq.read_table(file, columns=None if columns is None else list(columns))


def record_files(directory: str, below: str) -> list[FileRecord]:
    """Records of the files that a stage wrote by itself below `directory`/`below`, hashed as they lie there."""
    names = storage.list_files(f"{directory}/{below}", recursive=True)
    return [_record_file(directory, f"{below}/{name}") for name in names]


@storage.patient
def _record_file(directory: str, path: str) -> FileRecord:
    fs, place = storage.filesystem(f"{directory}/{path}")
    digest, size = hashlib.sha256(), 0
    with fs.open_input_stream(place) as stream:
        while chunk := stream.read(1 << 24):
            digest.update(chunk)
            size += len(chunk)
    return FileRecord(path=path, rows=None, bytes=size, sha256=digest.hexdigest())
