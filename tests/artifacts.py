"""Committed inputs for a stage under test, the context that the runner would hand it, and what it wrote."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from dpo_ray.flow.artifact import Artifact, FileRecord, Manifest, read_table, write_manifest, write_table
from dpo_ray.flow.stage import StageContext, StageOutput


class Silent:
    """Takes progress and shows nothing; keeps the last call."""

    def __init__(self) -> None:
        self.last: tuple[int, int, Mapping[str, float]] | None = None

    def begin(self, step: str) -> None: ...

    def update(self, done: int, total: int, counters: Mapping[str, float]) -> None:
        self.last = (done, total, counters)

    def waits(self, text: str) -> None: ...

    def stage_started(self, key: str) -> None: ...

    def stage_done(self, key: str, manifest: Manifest, *, skipped: bool) -> None: ...


def context(
    directory: Path | str, inputs: Mapping[str, Artifact] | None = None, engine: Any = None, fingerprint: str = "f1"
) -> StageContext:
    return StageContext(str(directory), fingerprint, inputs or {}, engine, lambda: None, Silent())


def commit(
    directory: Path | str,
    files: list[FileRecord],
    metrics: Mapping[str, Any] | None = None,
    inputs: Mapping[str, str] | None = None,
) -> Artifact:
    rows = sum(f.rows or 0 for f in files)
    manifest = Manifest(
        stage="made",
        round=0,
        fingerprint="made",
        identity={"inputs": dict(inputs or {})},
        files=files,
        rows_in=rows,
        rows_out=rows,
        dropped={},
        metrics=dict(metrics or {}),
        seconds=1.0,
        resources={},
        versions={},
        git_commit=None,
        committed_at="2026-01-01T00:00:00+00:00",
    )
    return write_manifest(str(directory), manifest)


def commit_tables(
    directory: Path | str, tables: Sequence[pa.Table], prefix: str = "part-", inputs: Mapping[str, str] | None = None
) -> Artifact:
    """Commit one file a table.

    Args:
        inputs: role -> output hash of what the tables were made from.
    """
    files = [write_table(str(directory), f"{prefix}{i:05d}.parquet", t) for i, t in enumerate(tables)]
    return commit(directory, files, inputs=inputs)


def commit_policy(directory: Path | str, path: str, identity: str) -> Artifact:
    return commit(directory, [], {"path": path, "identity": identity, "revision": None})


def kept(directory: Path | str, output: StageOutput) -> list[dict[str, Any]]:
    """Rows that a stage committed, in order."""
    return _rows(directory, [f for f in output.files if not f.path.startswith("quarantine/")])


def quarantined(directory: Path | str, output: StageOutput) -> list[dict[str, Any]]:
    return _rows(directory, [f for f in output.files if f.path.startswith("quarantine/")])


def _rows(directory: Path | str, files: list[FileRecord]) -> list[dict[str, Any]]:
    return [row for f in files for row in read_table(f"{directory}/{f.path}").to_pylist()]
