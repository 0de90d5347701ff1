"""Rows of a source of prompts or preferences, each with its place, and the fingerprint of what the source names.

In: a .jsonl, .csv or .parquet file or glob (a local path or any pyarrow.fs URI), or `datasets:<hub id or directory>`.
Out: SourceRows, in the order of the source.
Invariant: a row that cannot be parsed is a SourceRow too, with its text and a drop reason.
"""

from __future__ import annotations

import csv
import fnmatch
import glob
import hashlib
import io
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from dpo_ray.config import DATASETS, URI, Source
from dpo_ray.errors import ConfigError

FORMATS = (".jsonl", ".csv", ".parquet")
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
BATCH_ROWS = 1024


class SourceRow(NamedTuple):
    """One row as the source has it; its text alone, and a drop reason, where it cannot be parsed."""

    location: str
    values: dict[str, Any] | str
    drop_reason: str | None = None


class SourceFile(NamedTuple):
    filesystem: fs.FileSystem
    path: str
    name: str


class Columns(NamedTuple):
    """Which columns of a source are read."""

    mapped: tuple[tuple[str, str], ...]
    """(option of the configuration, column that it names); each must be there."""
    others: bool
    """Whether the other columns are read too."""
    advice: str = ""
    """What else to do where a mapped column is missing."""


def columns_to_read(config: Source, columns: Columns, present: Sequence[str], source: str) -> list[str]:
    """Return the columns that the config maps, or all of `present`; raise if a mapped one is not there."""
    for option, name in columns.mapped:
        if name not in present:
            raise ConfigError(
                f"{config.block}: {source!r} has no column {name!r}, which {config.block}.{option} names; its columns are "
                f"{list(present)}: set {config.block}.{option} to one of them{columns.advice}"
            )
    wanted = {name for _, name in columns.mapped}
    return [name for name in present if columns.others or name in wanted]


def source_rows(config: Source, columns: Columns) -> Iterator[SourceRow]:
    """Yield the rows of the source, files in the order of their names."""
    if config.source.startswith(DATASETS):
        yield from _dataset_rows(config, columns)
        return
    for file in source_files(config):
        try:
            yield from _READERS[file.name.removesuffix(".gz").rsplit(".", 1)[1]](file, config, columns)
        except (OSError, pa.ArrowException, csv.Error) as error:
            raise ConfigError(f"{config.block}: {file.name!r} cannot be read: {error}") from error


def _jsonl_rows(file: SourceFile, config: Source, columns: Columns) -> Iterator[SourceRow]:
    with _open_text(file, newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except (ValueError, RecursionError):
                values = None
            location = f"{file.name}:{number}"
            if isinstance(values, dict):
                yield SourceRow(location, values)
            else:
                yield SourceRow(location, line.rstrip(), "malformed_json")


def _csv_rows(file: SourceFile, config: Source, columns: Columns) -> Iterator[SourceRow]:
    csv.field_size_limit(2**31 - 1)  # the default refuses a prompt of more than 128 KB
    with _open_text(file, newline="") as lines:
        reader = csv.reader(lines)
        header = next(reader, [])
        columns_to_read(config, columns, header, file.name)
        start = reader.line_num + 1
        for fields in reader:
            location, start = f"{file.name}:{start}", reader.line_num + 1
            if len(fields) == len(header):
                yield SourceRow(location, dict(zip(header, fields, strict=True)))
            elif fields:
                yield SourceRow(location, ",".join(fields), "malformed_csv")


def _parquet_rows(file: SourceFile, config: Source, columns: Columns) -> Iterator[SourceRow]:
    with file.filesystem.open_input_file(file.path) as opened:
        parquet = pq.ParquetFile(opened)
        names = columns_to_read(config, columns, parquet.schema_arrow.names, file.name)
        batches = parquet.iter_batches(BATCH_ROWS, columns=names)
        yield from _numbered(file.name, (values for batch in batches for values in batch.to_pylist()))


_READERS = {"jsonl": _jsonl_rows, "csv": _csv_rows, "parquet": _parquet_rows}


def _open_text(file: SourceFile, newline: str) -> io.TextIOWrapper:
    stream = file.filesystem.open_input_stream(file.path)  # decompresses by the ending of the name
    return io.TextIOWrapper(cast(Any, stream), encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def _numbered(source: str, rows: Iterable[dict[str, Any]]) -> Iterator[SourceRow]:
    return (SourceRow(f"{source}:row {i}", values) for i, values in enumerate(rows))


def source_files(config: Source) -> list[SourceFile]:
    """Return the files that a path, glob or URI names, in the order of their names; raise ConfigError for none."""
    source = config.source
    try:
        files = _uri_files(source) if URI.match(source) else _local_files(source)
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"{config.block}.source: {source!r} cannot be listed: {error}") from error
    if not files:
        raise ConfigError(
            f"{config.block}.source: {source!r} names no file (working directory {os.getcwd()}); correct the path"
        )
    for file in files:
        if not file.name.removesuffix(".gz").endswith(FORMATS):
            raise ConfigError(f"{config.block}.source: {file.name!r} is none of {FORMATS}; convert it, or name files in a glob")
    return files


def _local_files(source: str) -> list[SourceFile]:
    path = os.path.expanduser(source)
    names = [path] if os.path.isfile(path) else sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))
    return [SourceFile(fs.LocalFileSystem(), name, name) for name in names]


def _uri_files(uri: str) -> list[SourceFile]:
    """List a URI with `*` and `[...]` in any part of its path; `?` starts the options of the filesystem."""
    scheme, rest = uri.split("://", 1)
    pattern, _, options = rest.partition("?")
    parts = pattern.split("/")
    fixed = list(itertools.takewhile(lambda part: not set("*[") & set(part), parts))
    wanted = parts[len(fixed) :]
    filesystem, base = fs.FileSystem.from_uri(f"{scheme}://{'/'.join(fixed)}" + (f"?{options}" if options else ""))
    if not wanted:
        infos = [filesystem.get_file_info(base)]
    else:
        infos = filesystem.get_file_info(fs.FileSelector(base, allow_not_found=True, recursive=len(wanted) > 1))
    files = []
    for info in sorted(infos, key=lambda info: info.path):
        found = info.path[len(base) :].strip("/").split("/") if wanted else []
        matches = len(found) == len(wanted) and all(map(fnmatch.fnmatchcase, found, wanted))
        if info.type == fs.FileType.File and matches:
            files.append(SourceFile(filesystem, info.path, f"{scheme}://{info.path}"))
    return files


def _dataset_rows(config: Source, columns: Columns) -> Iterator[SourceRow]:
    import datasets  # takes seconds; only this source needs it

    directory = _dataset_directory(config)
    try:
        if directory and any((directory / name).exists() for name in ("state.json", "dataset_dict.json")):
            dataset = datasets.load_from_disk(str(directory))
        else:
            name = str(directory or config.source.removeprefix(DATASETS))
            dataset = datasets.load_dataset(
                name, config.subset, data_dir=config.data_dir, split=config.source_split, revision=config.revision
            )
    except IndexError as error:  # the library's own, from joining no files
        raise ConfigError(
            f"{config.block}.source: {config.source!r} has a split without rows, which `datasets` cannot load; leave it out"
        ) from error
    except Exception as error:  # the library raises errors of many kinds for what it cannot find, reach or parse
        raise ConfigError(f"{config.block}.source: {config.source!r} cannot be loaded: {error}") from error
    if isinstance(dataset, datasets.DatasetDict):
        if config.source_split not in dataset:
            raise ConfigError(
                f"{config.block}.source_split: {config.source!r} has no split {config.source_split!r}; it has {list(dataset)}"
            )
        dataset = dataset[config.source_split]
    dataset = cast(datasets.Dataset, dataset)
    names = columns_to_read(config, columns, dataset.column_names, config.source)
    batches = cast(Iterator[dict], dataset.with_format(None).select_columns(names).iter(BATCH_ROWS))
    rows = (dict(zip(batch, row, strict=True)) for batch in batches for row in zip(*batch.values(), strict=True))
    yield from _numbered(config.source, rows)


def _dataset_directory(config: Source) -> Path | None:
    """Return the local directory of a `datasets:` source, None if it is a hub id."""
    name = config.source.removeprefix(DATASETS)
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise ConfigError(f"{config.block}.source: {name!r} is a file; name it without {DATASETS!r}")
    if not HUB_ID.fullmatch(name):
        raise ConfigError(
            f"{config.block}.source: {name!r} is neither a directory (working directory {os.getcwd()}) nor a hub id"
        )
    return None


def source_fingerprint(config: Source) -> dict[str, str]:
    """Return a hash of each thing that the source names: sha256 of a file, commit of a hub dataset.

    Raises:
        ConfigError: the source does not exist, or the hub cannot be asked for the commit.
    """
    if not config.source.startswith(DATASETS):
        return {file.name: _sha256(file) for file in source_files(config)}
    directory = _dataset_directory(config)
    if directory is None:
        return {config.source.removeprefix(DATASETS): _hub_commit(config)}
    names = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    # Hidden files and cache-*.arrow are what the library itself writes beside the data when it is used.
    data = [name for name in names if not re.search(r"(^|/)(\.|cache-[^/]*\.arrow$)", name)]
    if not data:
        raise ConfigError(f"{config.block}.source: {config.source!r} is a directory without files")
    return {name: _sha256(SourceFile(fs.LocalFileSystem(), str(directory / name), name)) for name in data}


def _sha256(file: SourceFile) -> str:
    digest = hashlib.sha256()
    with file.filesystem.open_input_stream(file.path, compression=None) as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _hub_commit(config: Source) -> str:
    if config.revision and re.fullmatch("[0-9a-f]{40}", config.revision):
        return config.revision  # a commit needs no hub: clusters without one read a cached copy
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    name = config.source.removeprefix(DATASETS)
    try:
        return cast(str, huggingface_hub.dataset_info(name, revision=config.revision, timeout=30).sha)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise ConfigError(
            f"{config.block}.source: the hub has no dataset {name!r} at revision {config.revision or 'main'!r} that this user "
            f"can read: {error}; correct the name or log in"
        ) from error
    except Exception as error:  # the hub's client raises errors of several HTTP libraries
        raise ConfigError(
            f"{config.block}.source: the hub cannot be reached for the commit of {name!r}: {error}; give "
            f"{config.block}.revision as a full commit, or a local copy of the dataset"
        ) from error
