import itertools

import pytest

from dpo_ray.errors import ConfigError
from dpo_ray.flow import storage

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
