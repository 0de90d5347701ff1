import hashlib

import pyarrow as pa
import pytest

from dpo_ray.errors import SchemaError
from dpo_ray.flow.artifact import MANIFEST, read_artifact, read_table, record_files, write_table

from ..artifacts import commit, commit_tables

TABLE = pa.table({"id": ["a", "b"], "n": [1, 2]})


def test_write_table_record_describes_the_file_as_it_lies(tmp_path):
    record = write_table(str(tmp_path), "sub/part.parquet", TABLE)
    data = (tmp_path / "sub/part.parquet").read_bytes()
    assert (record.rows, record.bytes, record.sha256) == (2, len(data), hashlib.sha256(data).hexdigest())
    assert read_table(str(tmp_path / "sub/part.parquet")) == TABLE


def test_read_table_adds_no_columns_from_the_names_of_directories(tmp_path):
    write_table(str(tmp_path), "year=2026/part.parquet", TABLE)
    uri = f"{tmp_path}/year=2026/part.parquet"
    assert read_table(uri).column_names == ["id", "n"]
    assert read_table(uri, ["n"]) == TABLE.select(["n"])


def test_read_artifact_gives_back_what_was_committed(tmp_path):
    artifact = commit_tables(tmp_path, [TABLE, TABLE.slice(0, 1)])
    assert read_artifact(str(tmp_path)) == artifact
    assert [read_table(artifact.uri(f)).num_rows for f in artifact.tables()] == [2, 1]


def test_read_artifact_without_manifest_is_none_even_with_files(tmp_path):
    write_table(str(tmp_path), "part-00000.parquet", TABLE)
    assert read_artifact(str(tmp_path)) is None
    assert read_artifact(str(tmp_path / "nowhere")) is None


@pytest.mark.parametrize("length", [0, 40, -10])
def test_read_artifact_torn_manifest_is_no_commit(tmp_path, length):
    """A driver killed inside the write of the manifest has committed nothing; the stage runs again."""
    commit_tables(tmp_path, [TABLE])
    data = (tmp_path / MANIFEST).read_bytes()
    (tmp_path / MANIFEST).write_bytes(data[:length])
    assert read_artifact(str(tmp_path)) is None


@pytest.mark.parametrize("text", ["{}", '{"stage": "pair", "shape": "of another version"}', "[]"])
def test_read_artifact_whole_manifest_of_another_kind_is_a_schema_error(tmp_path, text):
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(SchemaError, match=MANIFEST):
        read_artifact(str(tmp_path))


def test_output_hash_is_that_of_contents_in_order_and_not_of_names_or_places(tmp_path):
    one, two = TABLE.slice(0, 1), TABLE.slice(1, 1)
    first = commit_tables(tmp_path / "first", [one, two]).manifest.output_hash
    assert commit_tables(tmp_path / "second", [one, two], prefix="other-").manifest.output_hash == first
    assert commit_tables(tmp_path / "third", [two, one]).manifest.output_hash != first
    assert commit_tables(tmp_path / "fourth", [one]).manifest.output_hash != first


def test_output_hash_of_a_policy_is_its_identity(tmp_path):
    file = write_table(str(tmp_path), "log.parquet", TABLE)
    assert commit(tmp_path, [file], {"identity": "abc"}).manifest.output_hash == "abc"


def test_tables_are_those_with_the_prefix_without_quarantine(tmp_path):
    names = ["train-0.parquet", "eval-0.parquet", "quarantine/train-0.parquet", "train-note.txt"]
    files = [write_table(str(tmp_path), name, TABLE) for name in names]
    assert [f.path for f in commit(tmp_path, files).tables("train-")] == ["train-0.parquet"]


def test_record_files_hashes_all_below_a_directory(tmp_path):
    (tmp_path / "policy/sub").mkdir(parents=True)
    for name in ("b.txt", "sub/a.txt"):
        (tmp_path / "policy" / name).write_bytes(name.encode())
    (tmp_path / "beside.txt").write_bytes(b"no")
    records = record_files(str(tmp_path), "policy")
    assert [r.path for r in records] == ["policy/b.txt", "policy/sub/a.txt"]
    assert [r.bytes for r in records] == [5, 9]
    assert records[1].sha256 == hashlib.sha256(b"sub/a.txt").hexdigest()
