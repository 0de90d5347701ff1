import errno
import itertools
from typing import ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from dpo_ray.errors import ConfigError
from dpo_ray.flow import artifact, lease, storage

from ..waiting import wait_until

_buckets = itertools.count()


@pytest.fixture(params=["path", "file_uri", "space", "signs", "fsspec"])
def root(request, tmp_path):
    """A place to write to, in every form that `root` can have."""
    signs = tmp_path / "50% #1?x=y é"
    return {
        "path": str(tmp_path),
        "file_uri": f"file://{tmp_path}",
        "space": str(tmp_path / "with a space"),
        "signs": str(signs),
        "fsspec": f"memory://bucket-{next(_buckets)}/prefix",
    }[request.param]


def test_bytes_written_are_read_back(root):
    storage.write_bytes(f"{root}/a/b/file.bin", b"\x00one")
    assert storage.read_bytes(f"{root}/a/b/file.bin") == b"\x00one"
    storage.write_bytes(f"{root}/a/b/file.bin", b"2")
    assert storage.read_bytes(f"{root}/a/b/file.bin") == b"2"


def test_exists_tells_files_and_directories_from_nothing(root):
    assert not storage.exists(f"{root}/a/file")
    storage.write_bytes(f"{root}/a/file", b"x")
    assert storage.exists(f"{root}/a/file")
    assert not storage.exists(f"{root}/a/other")


def test_list_files_gives_relative_names_in_order(root):
    for name in ("b.txt", "a.txt", "sub/c.txt"):
        storage.write_bytes(f"{root}/dir/{name}", b"x")
    storage.write_bytes(f"{root}/dir-beside/d.txt", b"x")
    assert storage.list_files(f"{root}/dir") == ["a.txt", "b.txt"]
    assert storage.list_files(f"{root}/dir", recursive=True) == ["a.txt", "b.txt", "sub/c.txt"]


def test_list_files_where_nothing_is_gives_none(root):
    assert storage.list_files(f"{root}/nowhere") == []


def test_copy_directory_keeps_relative_places_and_the_source(root):
    for name in ("a.txt", "sub/b.txt"):
        storage.write_bytes(f"{root}/from/{name}", name.encode())
    storage.copy_directory(f"{root}/from", f"{root}/to/deep")
    for place in ("from", "to/deep"):
        assert storage.list_files(f"{root}/{place}", recursive=True) == ["a.txt", "sub/b.txt"]
        assert storage.read_bytes(f"{root}/{place}/sub/b.txt") == b"sub/b.txt"


def test_delete_directory_deletes_all_of_it_and_nothing_beside(root):
    storage.write_bytes(f"{root}/dir/sub/a.txt", b"x")
    storage.write_bytes(f"{root}/dir2/a.txt", b"x")
    storage.delete_directory(f"{root}/dir")
    storage.delete_directory(f"{root}/dir")
    assert storage.list_files(f"{root}/dir", recursive=True) == []
    assert storage.exists(f"{root}/dir2/a.txt")


def test_json_written_is_read_back(root):
    value = {"a": [1, 2.5, None, "é"]}
    storage.write_json(f"{root}/value.json", value)
    assert storage.read_json(f"{root}/value.json") == value


def test_filesystem_of_an_unknown_scheme_is_a_config_error_that_names_it():
    with pytest.raises(ConfigError, match="nosuch"):
        storage.read_bytes("nosuch://bucket/file")


@pytest.mark.parametrize(("uri", "local"), [("/a/b", True), ("file:///a", True), ("s3://b/a", False), ("memory://a", False)])
def test_is_local_tells_paths_from_object_stores(uri, local):
    assert storage.is_local(uri) is local


# Storage that is away for a while


class Away(MemoryFileSystem):
    """A filesystem that fails as often as it is told to, each call once."""

    protocol = "away"
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    failures: ClassVar[list[Exception]] = []

    def info(self, path, **kwargs):
        return self._or_fail(super().info, path, **kwargs)

    def _open(self, path, mode="rb", **kwargs):
        return self._or_fail(super()._open, path, mode, **kwargs)

    def _or_fail(self, call, *args, **kwargs):
        if self.failures:
            raise self.failures.pop(0)
        return call(*args, **kwargs)


@pytest.fixture
def away(monkeypatch):
    """Says which errors come next; half a second of pauses becomes a millisecond."""
    fsspec.register_implementation("away", Away, clobber=True)
    monkeypatch.setattr(storage, "FIRST_PAUSE_S", 0.001)
    storage.write_bytes("away://bucket/file", b"whole")
    yield Away.failures.extend
    Away.failures.clear()


PASSING = [
    OSError(errno.EIO, "Input/output error"),
    OSError(errno.ESTALE, "Stale file handle"),
    ConnectionResetError("reset by peer"),
    TimeoutError("no answer"),
    OSError("When reading 'a' in bucket 'b': AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 7"),
    OSError("When reading 'a' in bucket 'b': AWS Error SLOW_DOWN during GetObject operation: reduce your request rate"),
]
LASTING = [
    FileNotFoundError("gone"),
    PermissionError("not yours"),
    OSError(errno.ENOSPC, "No space left on device"),
    OSError("When reading 'a' in bucket 'b': AWS Error ACCESS_DENIED during GetObject operation: Access Denied."),
    OSError("When testing for existence of bucket 'b': AWS Error NO_SUCH_BUCKET during HeadBucket operation"),
    OSError("Couldn't deserialize thrift: don't know what type"),
]


@pytest.mark.parametrize("error", PASSING, ids=str)
def test_storage_that_is_away_for_a_while_is_waited_for(away, error):
    away([error] * 3)
    assert storage.read_bytes("away://bucket/file") == b"whole"
    away([error] * 3)
    storage.write_bytes("away://bucket/other", b"new")
    away([error] * 2)
    assert storage.read_bytes("away://bucket/other") == b"new"
    assert Away.failures == []


@pytest.mark.parametrize("error", LASTING, ids=str)
def test_storage_error_that_another_try_meets_again_comes_at_once(away, error):
    away([error, PASSING[0]])
    with pytest.raises(type(error)):
        storage.read_bytes("away://bucket/file")
    assert len(Away.failures) == 1


def test_storage_that_stays_away_ends_in_its_own_error(away, monkeypatch):
    monkeypatch.setattr(storage, "PATIENCE_S", 0.05)
    away([OSError(errno.EIO, "Input/output error")] * 1000)
    with pytest.raises(OSError, match="Input/output error"):
        storage.read_bytes("away://bucket/file")


def test_manifest_and_tables_are_read_and_written_through_an_outage(away):
    away([PASSING[0]] * 2)
    record = artifact.write_table("away://bucket/stage", "part-0.parquet", artifact.pa.table({"a": [1, 2]}))
    away([PASSING[2]] * 2)
    assert artifact.read_table("away://bucket/stage/part-0.parquet")["a"].to_pylist() == [1, 2]
    away([PASSING[3]] * 2)
    (again,) = artifact.record_files("away://bucket", "stage")
    assert again.sha256 == record.sha256
    assert Away.failures == []


def test_lease_outlives_storage_that_is_away(away, monkeypatch):
    """Its heartbeat skips what it cannot write, and goes on."""
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.01)
    held = lease.Lease("away://bucket/run")
    monkeypatch.setattr(storage, "PATIENCE_S", 0.0)
    before = storage.read_json(held.uri)["time"]
    away([OSError(errno.EIO, "Input/output error")] * 5)
    wait_until(lambda: not Away.failures)
    wait_until(lambda: storage.read_json(held.uri)["time"] > before + 0.05)
    held.check()
    held.release()
