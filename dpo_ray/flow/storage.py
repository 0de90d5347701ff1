"""Bytes at a path or URI, through pyarrow.fs (local disk, s3, gs, ...) with fsspec for every other scheme.

Nothing here relies on rename or append, which object stores do not have. Storage that is away for a minute is waited for:
what fails for a reason that can pass is tried again at growing intervals, for PATIENCE_S.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import time
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from dpo_ray.errors import ConfigError

P = ParamSpec("P")
T = TypeVar("T")
PATIENCE_S = 150.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 15.0
LASTING = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EINVAL, errno.ENAMETOOLONG, errno.ELOOP, errno.ENODEV),
}
"""Errors that another try meets again."""
LASTING_KINDS = (FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError, PermissionError)
LASTING_WORDS = (
    *("access_denied", "permission_denied", "unauthenticated", "no_such_bucket", "invalid_access_key", "invalid_client_token"),
    *("unrecognized_client", "signature_does_not_match", "response_code_301", "response_code_400", "response_code_403"),
)
"""The same in the messages of object stores, which have no number; spaces count as `_`."""
PASSING_WORDS = ("aws_error", "google::cloud", "curl", "connection", "network", "timed_out", "timeout", "unavailable")
"""In those that are worth another try. What has neither a number nor one of these is a file that cannot be understood."""


def patient(call: Callable[P, T]) -> Callable[P, T]:
    """The same function, called again while storage fails for a reason that can pass; in the end it raises the last error."""

    @functools.wraps(call)
    def again(*args: P.args, **kwargs: P.kwargs) -> T:
        started, pause = time.monotonic(), FIRST_PAUSE_S
        while True:
            try:
                return call(*args, **kwargs)
            except OSError as error:
                waited = time.monotonic() - started
                if not passes(error) or waited + pause > PATIENCE_S:
                    raise
                logging.getLogger(__name__).warning("storage has failed for %.0f s and is tried again: %s", waited, error)
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    return again


def passes(error: OSError) -> bool:
    """Whether another try may succeed."""
    text = str(error).lower().replace(" ", "_")
    if error.errno in LASTING or isinstance(error, LASTING_KINDS) or any(word in text for word in LASTING_WORDS):
        return False
    numbered = error.errno is not None or isinstance(error, ConnectionError | TimeoutError)
    return numbered or any(word in text for word in PASSING_WORDS)


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


@patient
def read_bytes(uri: str) -> bytes:
    fs, path = filesystem(uri)
    with fs.open_input_stream(path) as stream:
        return stream.read()


def write_bytes_once(uri: str, data: bytes | pa.Buffer) -> None:
    """`write_bytes` without another try."""
    fs, path = filesystem(uri)
    fs.create_dir(path.rsplit("/", 1)[0], recursive=True)
    with fs.open_output_stream(path) as stream:
        stream.write(data)


@patient
def write_bytes(uri: str, data: bytes | pa.Buffer) -> None:
    """Write a whole file, creating its directory."""
    write_bytes_once(uri, data)


@patient
def exists(uri: str) -> bool:
    fs, path = filesystem(uri)
    return fs.get_file_info(path).type != pafs.FileType.NotFound


@patient
def list_files(uri: str, *, recursive: bool = False) -> list[str]:
    """Names of the files below `uri`, relative to it, sorted; empty where there is no such directory."""
    fs, path = filesystem(uri)
    if fs.get_file_info(path).type == pafs.FileType.NotFound:  # asked first: fsspec's listing takes an outage for no directory
        return []
    infos = fs.get_file_info(pafs.FileSelector(path, allow_not_found=True, recursive=recursive))
    return sorted(info.path[len(path) :].lstrip("/") for info in infos if info.type == pafs.FileType.File)


@patient
def delete_file(uri: str) -> None:
    """Delete a file; none there is no error, since a try whose answer was lost may have done it."""
    fs, path = filesystem(uri)
    with contextlib.suppress(FileNotFoundError):
        fs.delete_file(path)


@patient
def delete_directory(uri: str) -> None:
    fs, path = filesystem(uri)
    if fs.get_file_info(path).type == pafs.FileType.Directory:
        fs.delete_dir(path)


@patient
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


def json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def write_json(uri: str, value: Any) -> None:
    write_bytes(uri, json_bytes(value))
