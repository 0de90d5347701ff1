"""Read a source in one task of the cluster, and write what came of it: files `train-*`, `eval-*` and `quarantine/rows-*`."""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa
import ray

from dpo_ray.config import DataResources
from dpo_ray.flow.artifact import FileRecord, write_table
from dpo_ray.flow.parts import MAX_DEATHS, first_cause
from dpo_ray.flow.stage import StageOutput
from dpo_ray.intake import Intake


def take_in_files(read: Callable[[], Intake], directory: str, *, rows_per_file: int, resources: DataResources) -> StageOutput:
    """Run `read` where the cluster has room, and commit-ready files below `directory`.

    Raises:
        DpoRayError: what `read` raised, as it raised it.
    """
    where = {"num_cpus": resources.cpus, "label_selector": resources.node_labels}
    task = ray.remote(_read_and_write).options(max_retries=MAX_DEATHS, **where)
    try:
        return ray.get(task.remote(read, directory, rows_per_file))
    except ray.exceptions.RayError as error:  # the user needs our message, not Ray's wrapping of it
        raise first_cause(error, directory.rpartition("/")[2]) from None


def _read_and_write(read: Callable[[], Intake], directory: str, rows_per_file: int) -> StageOutput:
    taken = read()
    tables = {"train": taken.train, "eval": taken.eval, "quarantine/rows": taken.quarantine}
    files = [file for name, table in tables.items() for file in _write(directory, name, table, rows_per_file)]
    metrics = {"train": taken.train.num_rows, "eval": taken.eval.num_rows}
    return StageOutput(files, taken.rows_in, taken.train.num_rows + taken.eval.num_rows, taken.dropped, metrics)


def _write(directory: str, name: str, table: pa.Table, rows: int) -> list[FileRecord]:
    slices = [table.slice(at, rows) for at in range(0, table.num_rows, rows)]
    return [write_table(directory, f"{name}-{i:05d}.parquet", s) for i, s in enumerate(slices)]
