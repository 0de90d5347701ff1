import numpy as np
import pyarrow as pa
import pytest

from dpo_ray.flow.artifact import write_table
from dpo_ray.logps_cache import SCHEMA, Entry, cache_directory, completion_key, read_cache, write_cache

ONE, TWO = completion_key([1, 2], [3]), completion_key([1], [2, 3])


def test_completion_key_knows_the_boundary_and_every_id():
    keys = {ONE, TWO, completion_key([1, 2], [4]), completion_key([5, 2], [3]), completion_key([1, 2, 3], []), b""}
    assert len(keys) == 6
    assert completion_key(np.array([1, 2], np.int32), [3]) == ONE


def test_cache_directory_differs_in_policy_dtype_and_version(monkeypatch):
    names = {
        cache_directory("/r", "a", "float32"),
        cache_directory("/r", "b", "float32"),
        cache_directory("/r", "a", "bfloat16"),
    }
    monkeypatch.setattr("dpo_ray.logps_cache.LOGPS_VERSION", 99)
    assert len(names | {cache_directory("/r", "a", "float32")}) == 4


def test_cache_gives_back_what_was_written_by_anybody(tmp_path):
    write_cache(str(tmp_path), {ONE: Entry(-1.5, None)})
    write_cache(str(tmp_path), {TWO: Entry(-3.0, np.array([-1.0, -2.0], np.float32))})
    known = read_cache(str(tmp_path))
    assert known[ONE] == Entry(-1.5, None)
    assert known[TWO].token_logps.tolist() == [-1.0, -2.0]


def test_cache_prefers_the_entry_that_has_tokens(tmp_path):
    for _ in range(3):
        write_cache(str(tmp_path), {ONE: Entry(-1.5, None)})
        write_cache(str(tmp_path), {ONE: Entry(-1.5, np.array([-1.5], np.float32))})
    assert read_cache(str(tmp_path))[ONE].token_logps is not None


def test_cache_that_is_not_there_is_empty(tmp_path):
    assert read_cache(str(tmp_path / "nowhere")) == {}
    write_cache(str(tmp_path / "still"), {})
    assert not (tmp_path / "still").exists()


@pytest.mark.parametrize("torn", [b"", b"PAR1", None])
def test_cache_file_torn_by_a_kill_loses_itself_alone(tmp_path, torn):
    write_cache(str(tmp_path), {ONE: Entry(-1.5, None)})
    write_cache(str(tmp_path), {TWO: Entry(-3.0, None)})
    first = sorted(tmp_path.iterdir())[0]
    first.write_bytes(first.read_bytes()[:-20] if torn is None else torn)
    assert len(read_cache(str(tmp_path))) == 1


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 0.5])
def test_cache_value_that_is_no_log_probability_is_not_used(tmp_path, value):
    table = pa.table(
        [pa.array([ONE], pa.binary(16)), pa.array([value], pa.float32()), pa.array([None], SCHEMA[2].type)], SCHEMA
    )
    write_table(str(tmp_path), "a.parquet", table)
    assert read_cache(str(tmp_path)) == {}
