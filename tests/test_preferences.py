import gzip
import json
import os
from collections import Counter
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_ray import schemas
from dpo_ray.config import ExplicitPreferences, TranscriptPreferences
from dpo_ray.errors import ConfigError, StageError
from dpo_ray.preferences import read_preferences


def explicit(source, seed=0, **fields):
    fields = {"eval_pairs": 2, "max_dropped": 1.0} | fields
    return read_preferences(ExplicitPreferences(kind="explicit", source=str(source), **fields), seed)


def transcripts(source, **fields):
    fields = {"eval_pairs": 2} | fields
    return read_preferences(TranscriptPreferences(kind="hh_rlhf", source=str(source), **fields), 0)


def good(num):
    return [{"prompt": f"question {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(num)]


def write(path, rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def all_rows(read):
    return [*read.train.to_pylist(), *read.eval.to_pylist()]


def test_explicit_pairs_conform_and_every_row_is_somewhere(tmp_path):
    read = explicit(write(tmp_path / "data.jsonl", good(10)))
    assert read.train.schema == read.eval.schema == schemas.COMPARISONS
    assert (read.rows_in, read.train.num_rows, read.eval.num_rows, read.dropped) == (10, 8, 2, {})
    assert {(r["prompt"][0]["content"], r["chosen"], r["rejected"]) for r in all_rows(read)} == {
        (f"question {i}", f"good {i}", f"bad {i}") for i in range(10)
    }
    assert len({r["pair_id"] for r in all_rows(read)}) == 10


def test_explicit_system_prompt_goes_before_prompts_without_one(tmp_path):
    read = explicit(write(tmp_path / "data.jsonl", good(6)), system_prompt="Be brief.")
    assert {(r["prompt"][0]["role"], r["prompt"][0]["content"]) for r in all_rows(read)} == {("system", "Be brief.")}


@pytest.mark.parametrize("kind", ["parquet", "csv", "datasets"])
def test_explicit_of_other_files_equals_jsonl(tmp_path, kind):
    rows = good(6)
    wanted = explicit(write(tmp_path / "data.jsonl", rows))
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    elif kind == "csv":
        lines = [",".join(row.values()) for row in rows]
        (tmp_path / "data.csv").write_text("\n".join([",".join(rows[0]), *lines]))
    else:
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    source = f"datasets:{tmp_path}/saved" if kind == "datasets" else tmp_path / f"data.{kind}"
    read = explicit(source)
    assert (read.train, read.eval) == (wanted.train, wanted.eval)


def test_data_dir_names_one_directory_of_a_data_set(tmp_path):
    for name in ("harmless", "helpful"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "train.jsonl", [{**row, "chosen": name} for row in good(6)])
    read = explicit(f"datasets:{tmp_path}", data_dir="harmless")
    assert {row["chosen"] for row in all_rows(read)} == {"harmless"}


UNUSABLE = [
    ("{not json", "malformed_json"),
    ({"prompt": None, "chosen": "a", "rejected": "b"}, "null_prompt"),
    ({"prompt": "p", "chosen": "", "rejected": "b"}, "empty_completion"),
    ({"prompt": "p", "chosen": "a", "rejected": " \n"}, "empty_completion"),
    ({"prompt": "p", "chosen": "a", "rejected": "a"}, "identical"),
    ({"prompt": "p", "chosen": [{"role": "user", "content": "a"}], "rejected": "b"}, "wrong_roles"),
    ({"prompt": "p", "chosen": "\ud800", "rejected": "b"}, "invalid_unicode"),
    (good(1)[0], "duplicate"),
]


@pytest.mark.parametrize(("row", "reason"), UNUSABLE, ids=[reason + str(i) for i, (_, reason) in enumerate(UNUSABLE)])
def test_unusable_row_is_quarantined_with_its_line_and_reason(tmp_path, row, reason):
    read = explicit(write(tmp_path / "data.jsonl", [*good(8), row]))
    (quarantined,) = read.quarantine.to_pylist()
    assert (quarantined["location"], quarantined["drop_reason"]) == (f"{tmp_path}/data.jsonl:9", reason)
    assert read.dropped == {reason: 1}
    assert read.rows_in == 9 == len(all_rows(read)) + 1


def test_unusable_rows_above_the_share_fail_with_counts(tmp_path):
    source = write(tmp_path / "data.jsonl", [*good(8), "{", {"prompt": "p", "chosen": "a", "rejected": "a"}])
    assert explicit(source, max_dropped=0.2).dropped == {"identical": 1, "malformed_json": 1}
    with pytest.raises(StageError, match=r"2 of 10 rows .*'identical': 1.*data.jsonl:9.*preferences.max_dropped"):
        explicit(source, max_dropped=0.19)


def test_same_answers_the_other_way_round_are_another_pair(tmp_path):
    """Two people may disagree; neither label is taken for a copy of the other."""
    row = good(1)[0]
    swapped = {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
    read = explicit(write(tmp_path / "data.jsonl", [*good(8), swapped]), eval_pairs=1)
    assert (len(all_rows(read)), read.dropped) == (9, {})


@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
def test_source_without_a_mapped_column_is_an_error_that_lists_those_there(tmp_path, column):
    rows = [{k: v for k, v in row.items() if k != column} for row in good(6)]
    with pytest.raises(ConfigError, match=rf"no column '{column}'.*preferences.{column}_column.*columns are \['"):
        explicit(write(tmp_path / "data.jsonl", rows))


def test_prompt_inside_the_completions_is_refused_never_guessed(tmp_path):
    turns = lambda answer: [{"role": "user", "content": "hi"}, {"role": "assistant", "content": answer}]
    source = write(tmp_path / "data.jsonl", [{"chosen": turns(f"a {i}"), "rejected": turns(f"b {i}")} for i in range(6)])
    with pytest.raises(ConfigError, match=r"no column 'prompt'.*never guessed.*hh_rlhf"):
        explicit(source)


def test_empty_source_is_an_error(tmp_path):
    with pytest.raises(StageError, match="no rows"):
        explicit(write(tmp_path / "data.jsonl", []))


# Real transcripts


@pytest.fixture(scope="module")
def hh_rlhf() -> Path:
    if "DPO_RAY_TEST_DATA" not in os.environ:
        pytest.skip("DPO_RAY_TEST_DATA names no directory with hh-rlhf/ (see tests/README.md)")
    return Path(os.environ["DPO_RAY_TEST_DATA"]) / "hh-rlhf/harmless-base-test.jsonl.gz"


@pytest.fixture(scope="module")
def real(hh_rlhf):
    return transcripts(hh_rlhf, eval_pairs=256)


def test_hh_rlhf_every_row_is_in_train_eval_or_quarantine(real):
    assert real.rows_in == 2312 == real.train.num_rows + real.eval.num_rows + sum(real.dropped.values())
    assert real.dropped == {"empty_completion": 4, "wrong_roles": 9}
    assert real.eval.num_rows >= 256


def test_hh_rlhf_rows_with_the_same_opening_never_straddle_the_split(real):
    train, held_out = (Counter(table["opening"].to_pylist()) for table in (real.train, real.eval))
    assert not train.keys() & held_out.keys()
    assert sum(n for n in (train + held_out).values() if n > 1) >= 250, "the data has conversations to divide"


def test_hh_rlhf_prompts_and_answers_put_together_are_the_transcripts_again(real, hh_rlhf):
    name = {"user": "Human", "assistant": "Assistant"}
    squeeze = lambda text: "".join(text.split())
    made = Counter()
    for row in all_rows(real):
        turns = "".join(f"{name[m['role']]}:{m['content']}" for m in row["prompt"])
        made[tuple(squeeze(f"{turns}Assistant:{row[side]}") for side in ("chosen", "rejected"))] += 1
    with gzip.open(hh_rlhf, "rt") as lines:
        given = Counter(tuple(squeeze(json.loads(line)[side]) for side in ("chosen", "rejected")) for line in lines)
    assert made <= given
    assert made.total() == 2312 - 13
