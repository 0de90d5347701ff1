"""Bytes at a path or URI, through pyarrow.fs (local disk, s3, gs, ...) with fsspec for every other scheme.

Nothing here relies on rename or append, which object stores do not have.
"""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from dpo_ray.errors import ConfigError


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem of an absolute path or URI, and the path inside it.

    Raises:
        ConfigError: the scheme is known neither to pyarrow nor to fsspec.
    """
    try:
        return pafs.FileSystem.from_uri(uri)
    except pa.ArrowInvalid as error:
        import fsspec  # only for schemes that Arrow lacks

        scheme = uri.split("://", 1)[0]
        try:
            fs, path = fsspec.url_to_fs(uri)  # the path as that filesystem itself writes it
            return pafs.PyFileSystem(pafs.FSSpecHandler(fs)), path
        except (ValueError, ImportError):
            raise ConfigError(f"{uri}: neither pyarrow.fs nor fsspec can open the scheme {scheme!r}") from error


def read_bytes(uri: str) -> bytes:
    fs, path = filesystem(uri)
    with fs.open_input_stream(path) as stream:
        return stream.read()


def write_bytes(uri: str, data: bytes | pa.Buffer) -> None:
    """Write a whole file, creating its directory."""
    fs, path = filesystem(uri)
    fs.create_dir(path.rsplit("/", 1)[0], recursive=True)
    with fs.open_output_stream(path) as stream:
        stream.write(data)


def exists(uri: str) -> bool:
    fs, path = filesystem(uri)
    return fs.get_file_info(path).type != pafs.FileType.NotFound


def list_files(uri: str, *, recursive: bool = False) -> list[str]:
    """Names of the files below `uri`, relative to it, sorted; empty where there is no such directory."""
    fs, path = filesystem(uri)
    infos = fs.get_file_info(pafs.FileSelector(path, allow_not_found=True, recursive=recursive))
    return sorted(info.path[len(path) :].lstrip("/") for info in infos if info.type == pafs.FileType.File)


def delete_directory(uri: str) -> None:
    fs, path = filesystem(uri)
    if fs.get_file_info(path).type == pafs.FileType.Directory:
        fs.delete_dir(path)


def copy_directory(source: str, target: str) -> None:
    """Copy every file below `source`, each at the same relative place below `target`."""
    source_fs, source_path = filesystem(source)
    target_fs, target_path = filesystem(target)
    target_fs.create_dir(target_path, recursive=True)
    pafs.copy_files(source_path, target_path, source_filesystem=source_fs, destination_filesystem=target_fs)


def is_local(uri: str) -> bool:
    return uri.startswith(("/", "file://"))


def read_json(uri: str) -> Any:
    return json.loads(read_bytes(uri))


def write_json(uri: str, value: Any) -> None:
    write_bytes(uri, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())
