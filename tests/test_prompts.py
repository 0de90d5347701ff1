import csv
import gzip
import hashlib
import json
import subprocess
import sys
from datetime import date, datetime
from decimal import Decimal

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_ray import intake, schemas
from dpo_ray.config import Prompts
from dpo_ray.errors import ConfigError, StageError
from dpo_ray.intake import Intake
from dpo_ray.prompts import chat_messages, read_prompts, source_fingerprint

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " hi\n"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "2+2?"},
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"b": 1, "a": 2}}}]


def write_jsonl(path, rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    data = "\n".join(lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def texts(num):
    return [{"prompt": f"question {i}"} for i in range(num)]


def read(source, seed=0, **fields) -> Intake:
    fields = {"eval_prompts": 2, "max_dropped": 1.0} | fields
    return read_prompts(Prompts(source=str(source), **fields), seed)


def all_rows(table):
    return {row["prompt_id"]: row for row in [*table.train.to_pylist(), *table.eval.to_pylist()]}


def contents(table):
    return sorted(row["prompt"][-1]["content"] for row in all_rows(table).values())


def reasons(table):
    return [(row["location"], row["drop_reason"]) for row in table.quarantine.to_pylist()]


def with_row(tmp_path, row, **fields):
    """Read a source of 8 good rows and `row` after them."""
    return read(write_jsonl(tmp_path / "data.jsonl", [*texts(8), row]), **fields)


# Sources


@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz"])
def test_jsonl_text_prompts_become_conforming_user_turns(tmp_path, name):
    table = read(write_jsonl(tmp_path / name, texts(10)))
    assert contents(table) == sorted(f"question {i}" for i in range(10))
    assert table.train.schema == table.eval.schema == schemas.PROMPTS
    assert set(table.train["split"].to_pylist()) == {"train"}
    assert set(table.eval["split"].to_pylist()) == {"eval"}
    for prompt_id, row in all_rows(table).items():
        assert prompt_id == schemas.prompt_id(row["prompt"])
        assert [m["role"] for m in row["prompt"]] == ["user"]
    assert (table.rows_in, table.dropped, table.quarantine.num_rows) == (10, {}, 0)


def test_csv_prompts_keep_quoted_newlines_and_text_values(tmp_path):
    path = tmp_path / "data.csv"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([["prompt", "answer"], *([f'a "q"\nline {i}', "007"] for i in range(9)), ["", "1"]])
    with path.open("a") as file:
        file.write("one field,too,many\n" + "x" * 200_000 + ",1\n")
    table = read(path)
    assert 'a "q"\nline 0' in contents(table)
    assert "x" * 200_000 in contents(table)
    assert '{"answer": "007"}' in [row["meta"] for row in all_rows(table).values()]
    assert reasons(table) == [(f"{path}:20", "empty_prompt"), (f"{path}:21", "malformed_csv")]


def test_parquet_nested_messages_are_kept_as_given(tmp_path):
    chats = [[*CHAT, {"role": "assistant", "content": "4"}, {"role": "user", "content": f"And {i}?"}] for i in range(9)]
    path = tmp_path / "data.parquet"
    pq.write_table(pa.table({"chat": [*chats, None], "label": range(10)}), path, row_group_size=4)
    table = read(path, prompt_column="chat", split_by="prompt")
    rows = all_rows(table)
    for i, chat in enumerate(chats):
        row = rows[schemas.prompt_id(chat)]
        assert row["prompt"] == chat
        assert json.loads(row["meta"]) == {"label": i}
    assert reasons(table) == [(f"{path}:row 9", "null_prompt")]


def test_parquet_null_extra_message_field_is_no_field(tmp_path):
    """Arrow gives every message of a column the fields of any of them."""
    chats = [[{"role": "user", "content": f"q{i}", "name": "bob" if i == 3 else None}] for i in range(9)]
    pq.write_table(pa.table({"prompt": chats}), tmp_path / "data.parquet")
    table = read(tmp_path / "data.parquet")
    assert table.dropped == {"unsupported_message_fields": 1}
    assert '"name": "bob"' in table.quarantine["row"][0].as_py()


def test_glob_reads_every_file_in_name_order(tmp_path):
    for name in ("b", "a"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": f"{name} {i}"} for i in range(4)])
    assert len(all_rows(read(tmp_path / "*.jsonl"))) == 8
    assert contents(read(tmp_path / "*.jsonl", num_prompts=4, eval_prompts=1)) == [f"a {i}" for i in range(4)]


@pytest.mark.parametrize("pattern", ["one/data.jsonl", "one/*.jsonl", "*/*.jsonl", "*/data.json[l]"])
def test_uri_file_or_glob_equals_local_path(tmp_path, pattern):
    (tmp_path / "one").mkdir()
    local = write_jsonl(tmp_path / "one" / "data.jsonl", texts(6))
    write_jsonl(tmp_path / "other.jsonl", texts(9))
    table = read(f"file://{tmp_path}/{pattern}")
    assert table.train == read(local).train
    assert list(source_fingerprint(Prompts(source=f"file://{tmp_path}/{pattern}"))) == [f"file://{local}"]


@pytest.mark.parametrize("as_dict", [False, True])
def test_datasets_saved_to_disk_keeps_nested_prompts(tmp_path, as_dict):
    dataset = datasets.Dataset.from_list([{"prompt": [*CHAT[:1], {"role": "user", "content": str(i)}]} for i in range(8)])
    saved = datasets.DatasetDict(test=dataset) if as_dict else dataset.with_format("numpy")
    saved.save_to_disk(tmp_path / "saved")
    table = read(f"datasets:{tmp_path}/saved", source_split="test" if as_dict else "train")
    assert contents(table) == [str(i) for i in range(8)]
    if as_dict:
        with pytest.raises(ConfigError, match=r"no split 'train'; it has \['test'\]"):
            read(f"datasets:{tmp_path}/saved")


def test_datasets_directory_of_files_is_loaded_with_mixed_tools(tmp_path, monkeypatch):
    """The library stores columns of mixed type as JSON; rows must come decoded."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    rows = [{"prompt": CHAT[1:2], "tools": TOOLS, "n": 1}, {"prompt": CHAT, "tools": [{"other": 1}], "n": "x"}]
    write_jsonl(tmp_path / "data" / "train.jsonl", [*rows, {"prompt": [{"role": "user", "content": "x"}]}])
    table = read(f"datasets:{tmp_path}/data", tools_column="tools", eval_prompts=1)
    got = {row["prompt"][-1]["content"]: row for row in all_rows(table).values()}
    assert json.loads(got[" hi\n"]["tools"]) == TOOLS
    assert got["2+2?"]["meta"] == '{"n": "x"}'


def test_quickstart_gives_num_prompts_with_meta_and_a_split_without_seed():
    table = read("quickstart", num_prompts=50, eval_prompts=10)
    assert (table.rows_in, len(all_rows(table))) == (50, 50)
    assert set(json.loads(table.train["meta"][0].as_py())) == {"kind", "title"}
    other = read("quickstart", seed=1, num_prompts=50, eval_prompts=10)
    assert set(other.eval["prompt_id"].to_pylist()) == set(table.eval["prompt_id"].to_pylist())
    assert read("quickstart").rows_in == 2048


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{tmp}/none.jsonl", "names no file"),
        ("{tmp}/*.parquet", "names no file"),
        ("{tmp}", "names no file"),
        ("file://{tmp}/none.jsonl", "names no file"),
        ("file://{tmp}/none/*.jsonl", "names no file"),
        ("nosuchscheme://bucket/a.jsonl", "cannot be listed"),
        ("{tmp}/notes.txt", "is none of"),
        ("datasets:{tmp}/none", "neither a directory"),
        ("datasets:{tmp}/notes.txt", "is a file; name it without"),
    ],
)
def test_source_that_is_not_there_raises(tmp_path, source, message):
    (tmp_path / "notes.txt").write_text("hello")
    source = source.format(tmp=tmp_path)
    with pytest.raises(ConfigError, match=message):
        read(source)
    with pytest.raises(ConfigError, match=message):
        source_fingerprint(Prompts(source=source))


def test_datasets_directory_without_data_raises(tmp_path):
    with pytest.raises(ConfigError, match="cannot be loaded"):
        read(f"datasets:{tmp_path}")
    with pytest.raises(ConfigError, match="without files"):
        source_fingerprint(Prompts(source=f"datasets:{tmp_path}"))


@pytest.mark.parametrize("name", ["data.parquet", "data.jsonl.gz"])
def test_damaged_file_raises_with_its_name(tmp_path, name):
    path = tmp_path / name
    if name.endswith("gz"):
        path.write_bytes(gzip.compress(b'{"prompt": "a"}\n' * 100)[:-12])
    else:
        path.write_bytes(b"PAR1 not really")
    with pytest.raises(ConfigError, match=rf"{name}' cannot be read"):
        read(path)


# Columns


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet", "datasets"])
@pytest.mark.parametrize(
    ("fields", "option"),
    [
        ({"prompt_column": "question"}, "prompt_column"),
        ({"tools_column": "question"}, "tools_column"),
        ({"meta_columns": ("answer", "question")}, "meta_columns"),
    ],
)
def test_missing_column_raises_with_those_present(tmp_path, suffix, fields, option):
    table = pa.table({"prompt": ["a", "b", "c", "d"], "answer": ["1", "2", "3", "4"]})
    path = tmp_path / f"data.{suffix}"
    if suffix == "jsonl":
        write_jsonl(path, table.to_pylist())
    elif suffix == "csv":
        path.write_text("prompt,answer\na,1\n")
    elif suffix == "parquet":
        pq.write_table(table, path)
    else:
        datasets.Dataset(table).save_to_disk(path)
    source = f"datasets:{path}" if suffix == "datasets" else str(path)
    with pytest.raises(ConfigError, match=rf"no column 'question', which prompts.{option} names") as error:
        read(source, eval_prompts=1, **fields)
    assert source in str(error.value)
    assert "'answer'" in str(error.value)
    assert "'prompt'" in str(error.value)


def test_jsonl_column_of_some_rows_is_not_missing(tmp_path):
    table = with_row(tmp_path, {"prompt": "q", "tools": TOOLS}, tools_column="tools")
    assert [row["tools"] for row in all_rows(table).values()].count(None) == 8


def test_meta_holds_every_other_column_or_the_listed_ones(tmp_path):
    row = {"prompt": "q", "tools": TOOLS, "answer": {"x": [1, None]}, "tag": "\u00e9"}
    source = write_jsonl(tmp_path / "data.jsonl", [*texts(3), row])
    metas = lambda **fields: {r["meta"] for r in all_rows(read(source, tools_column="tools", **fields)).values()}
    assert metas() == {"{}", '{"answer": {"x": [1, null]}, "tag": "\u00e9"}'}
    assert metas(meta_columns=("tag",)) == {'{"tag": null}', '{"tag": "\u00e9"}'}
    assert metas(meta_columns=()) == {"{}"}


def test_meta_times_and_decimals_become_text(tmp_path):
    values = {"at": datetime(2026, 1, 2, 3), "on": date(2026, 1, 2), "price": Decimal("1.10"), "big": 2**62}
    pq.write_table(pa.Table.from_pylist([{"prompt": f"q{i}", **values} for i in range(4)]), tmp_path / "data.parquet")
    meta = json.loads(read(tmp_path / "data.parquet").train["meta"][0].as_py())
    assert meta == {"at": "2026-01-02T03:00:00", "on": "2026-01-02", "price": "1.10", "big": 2**62}


@pytest.mark.parametrize("value", [b"\x89PNG", float("nan"), float("inf")])
def test_meta_value_without_json_form_raises_unless_not_mapped(tmp_path, value):
    rows = [{"prompt": f"q{i}", "odd": value, "answer": i} for i in range(4)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    with pytest.raises(ConfigError, match=r"data.parquet:row 0: JSON cannot hold column 'odd'.*prompts.meta_columns"):
        read(tmp_path / "data.parquet")
    assert read(tmp_path / "data.parquet", meta_columns=("answer",)).rows_in == 4


# Messages


@pytest.mark.parametrize("as_text", [False, True])
def test_chat_is_kept_unstripped(as_text):
    assert chat_messages(json.dumps(CHAT) if as_text else CHAT) == (CHAT, None)


@pytest.mark.parametrize(
    "text", ["hello", "[1, 2]", "[brackets", '[{"a": 1}] fix this', '[{"a": 1}]', '{"role": "user"}', " x "]
)
def test_text_that_is_no_chat_is_one_user_turn(text):
    assert chat_messages(text) == ([{"role": "user", "content": text}], None)


def test_tool_turn_may_end_a_prompt():
    chat = [*CHAT, {"role": "assistant", "content": "add(2, 2)"}, {"role": "tool", "content": "4"}]
    assert chat_messages(chat) == (chat, None)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("hi", [{"role": "system", "content": "S"}, {"role": "user", "content": "hi"}]),
        (CHAT, CHAT),
        (CHAT[1:2], [{"role": "system", "content": "S"}, CHAT[1]]),
    ],
)
def test_system_prompt_goes_before_prompts_without_one(value, expected):
    assert chat_messages(value, "S") == (expected, None)


def turns(*roles):
    return [{"role": role, "content": "x"} for role in roles]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "null_prompt"),
        ("", "empty_prompt"),
        (" \n", "empty_prompt"),
        ([], "empty_prompt"),
        ("[]", "empty_prompt"),
        ('[{"role": "user", "content": "cut of', "malformed_json"),
        ("[{'role': 'user', 'content': 'a Python repr'}]", "malformed_json"),
        (7, "not_messages"),
        ({"role": "user", "content": "x"}, "not_messages"),
        (["a", "b"], "not_messages"),
        ([{"from": "human", "value": "x"}], "not_messages"),
        ([{"role": "user"}], "not_messages"),
        ([{"role": "user", "content": "x", "name": "bob"}], "unsupported_message_fields"),
        (
            [*CHAT, {"role": "assistant", "content": None, "tool_calls": [{}]}, *turns("tool")],
            "unsupported_message_fields",
        ),
        (turns("assistant"), "wrong_roles"),
        (turns("user", "assistant"), "wrong_roles"),
        (turns("system"), "wrong_roles"),
        (turns("system", "tool"), "wrong_roles"),
        (turns("user", "system", "user"), "wrong_roles"),
        (turns("system", "system", "user"), "wrong_roles"),
        (turns("developer", "user"), "wrong_roles"),
        ([{"role": ["user"], "content": "x"}], "wrong_roles"),
        ([{"role": "user", "content": None}], "empty_message"),
        ([{"role": "user", "content": " "}], "empty_message"),
        ([{"role": "system", "content": ""}, *turns("user")], "empty_message"),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], "content_not_text"),
    ],
)
def test_unusable_prompt_is_quarantined_by_reason(tmp_path, value, reason):
    table = with_row(tmp_path, {"prompt": value, "answer": 4})
    assert table.dropped == {reason: 1}
    assert reasons(table) == [(f"{tmp_path}/data.jsonl:9", reason)]
    assert json.loads(table.quarantine["row"][0].as_py()) == {"prompt": value, "answer": 4}
    assert (table.rows_in, len(all_rows(table))) == (9, 8)


def test_prompt_of_invalid_unicode_is_quarantined(tmp_path):
    path = tmp_path / "data.jsonl"
    good = "".join(json.dumps(row) + "\n" for row in texts(8)).encode()
    path.write_bytes(good + b'{"prompt": "caf\xe9"}\n{"prompt": "\\ud800"}\n{"prompt": "x", "answer": "\\ud800"}')
    table = read(path)
    assert table.dropped == {"invalid_unicode": 3}
    assert json.loads(table.quarantine["row"][0].as_py()) == {"prompt": "caf?"}


# Tools


@pytest.mark.parametrize("as_text", [False, True])
def test_tools_become_compact_json_with_keys_in_order(tmp_path, as_text):
    table = with_row(tmp_path, {"prompt": "q", "tools": json.dumps(TOOLS) if as_text else TOOLS}, tools_column="tools")
    row = next(row for row in all_rows(table).values() if row["tools"])
    assert row["tools"] == '[{"type":"function","function":{"name":"add","parameters":{"b":1,"a":2}}}]'
    assert row["prompt_id"] == schemas.prompt_id(row["prompt"], row["tools"])


def test_tools_from_parquet_lose_the_null_keys_of_structs(tmp_path):
    tools = [[{"name": "f", "parameters": {"a": 1}}, {"name": "g", "parameters": {"b": ["x"]}}]] * 4
    pq.write_table(pa.table({"prompt": list("abcd"), "tools": tools}), tmp_path / "data.parquet")
    table = read(tmp_path / "data.parquet", tools_column="tools")
    assert json.loads(table.train["tools"][0].as_py()) == tools[0]


@pytest.mark.parametrize("tools", [None, [], "", "[]", "null"])
def test_tools_empty_are_null(tmp_path, tools):
    table = with_row(tmp_path, {"prompt": "q", "tools": tools}, tools_column="tools")
    assert {row["tools"] for row in all_rows(table).values()} == {None}


@pytest.mark.parametrize("tools", ["[{", "text", {"name": "f"}, ["f"], [None], [{}], 3, 0, '[{"x": NaN}]'])
def test_tools_that_are_no_list_of_objects_are_quarantined(tmp_path, tools):
    assert with_row(tmp_path, {"prompt": "q", "tools": tools}, tools_column="tools").dropped == {"bad_tools": 1}


# Quarantine and limits


@pytest.mark.parametrize("line", ['{"prompt": "cut', "[1]", '"text"', "[" * 100_000])
def test_malformed_jsonl_line_is_quarantined_with_its_number(tmp_path, line):
    source = write_jsonl(tmp_path / "data.jsonl", [*texts(4), "", line, {"prompt": "after"}])
    table = read(source)
    assert reasons(table) == [(f"{source}:6", "malformed_json")]
    assert table.rows_in == 6
    row = json.loads(table.quarantine["row"][0].as_py())
    assert row == line or json.dumps(line).startswith(row["truncated"])


def test_quarantined_row_is_cut_when_long(tmp_path):
    table = with_row(tmp_path, {"prompt": None, "text": "x" * 100_000})
    assert len(table.quarantine["row"][0].as_py()) < 5000
    assert json.loads(table.quarantine["row"][0].as_py())["truncated"].startswith('{"prompt": null')


def test_duplicates_after_the_first_are_dropped_and_do_not_count_as_unusable(tmp_path):
    rows = [{"prompt": f"question {i % 5}", "n": i} for i in range(20)]
    table = read(write_jsonl(tmp_path / "data.jsonl", rows), max_dropped=0.0)
    assert table.dropped == {"duplicate": 15}
    assert sorted(json.loads(row["meta"])["n"] for row in all_rows(table).values()) == [0, 1, 2, 3, 4]
    assert reasons(table)[0] == (f"{tmp_path}/data.jsonl:6", "duplicate")


def test_duplicate_prompt_with_other_tools_is_another_prompt(tmp_path):
    table = with_row(tmp_path, {"prompt": "question 0", "tools": TOOLS}, tools_column="tools")
    assert len(all_rows(table)) == 9


def test_max_dropped_is_a_limit_that_raises_with_counts(tmp_path):
    source = write_jsonl(tmp_path / "data.jsonl", [*texts(8), {"prompt": None}, {"prompt": turns("assistant")}])
    assert read(source, max_dropped=0.2).dropped == {"null_prompt": 1, "wrong_roles": 1}
    with pytest.raises(StageError, match=r"2 of 10 rows .*'null_prompt': 1, 'wrong_roles': 1.*data.jsonl:9 \(null_prompt\)"):
        read(source, max_dropped=0.19)


def test_source_without_usable_rows_raises_with_counts(tmp_path):
    with pytest.raises(StageError, match=r"3 of 3 rows .*'malformed_json': 3"):
        read(write_jsonl(tmp_path / "data.jsonl", ["{", "{", "{"]))
    with pytest.raises(StageError, match="has no rows"):
        read(write_jsonl(tmp_path / "empty.jsonl", []))


def test_num_prompts_limits_the_rows_read(tmp_path):
    table = read(write_jsonl(tmp_path / "data.jsonl", ["{", *texts(20)]), num_prompts=11)
    assert (table.rows_in, len(all_rows(table))) == (11, 10)


# Split and order


def conversations(num):
    """Rows in groups of up to 4 turns, which share system prompt and first user turn."""
    first = lambda i: [{"role": "system", "content": f"s{i % 3}"}, {"role": "user", "content": f"u{i}"}]
    more = lambda n: turns("assistant", "user") * n
    return [{"prompt": first(i) + more(n), "n": i} for i in range(num) for n in range(1 + i % 4)]


def test_split_and_order_do_not_depend_on_source_order_or_batches(tmp_path, monkeypatch):
    rows = conversations(40)
    forward = read(write_jsonl(tmp_path / "a.jsonl", rows), eval_prompts=15, seed=3)
    monkeypatch.setattr(intake, "BATCH_ROWS", 7)
    backward = read(write_jsonl(tmp_path / "b.jsonl", rows[::-1]), eval_prompts=15, seed=3)
    assert forward.train.to_pylist() == backward.train.to_pylist()
    assert forward.eval.to_pylist() == backward.eval.to_pylist()
    assert backward.train.column("prompt").num_chunks > 1


def test_order_is_the_seeded_hash_of_the_ids_and_the_split_has_no_seed(tmp_path):
    source = write_jsonl(tmp_path / "data.jsonl", texts(50))
    tables = [read(source, seed=seed, eval_prompts=10) for seed in (0, 1)]
    for seed, table in enumerate(tables):
        for ids in (table.train["prompt_id"].to_pylist(), table.eval["prompt_id"].to_pylist()):
            assert ids == sorted(ids, key=lambda id_: hashlib.sha256(f"{seed}:{id_}".encode()).hexdigest())
    assert tables[0].train["prompt_id"] != tables[1].train["prompt_id"]
    assert set(tables[0].eval["prompt_id"].to_pylist()) == set(tables[1].eval["prompt_id"].to_pylist())


def test_split_by_conversation_never_divides_a_group(tmp_path):
    table = read(write_jsonl(tmp_path / "data.jsonl", conversations(40)), eval_prompts=15)
    groups = lambda part: {json.loads(meta)["n"] for meta in part["meta"].to_pylist()}
    assert 15 <= table.eval.num_rows <= 18
    assert not groups(table.train) & groups(table.eval)


def test_split_by_prompt_divides_conversations_and_takes_exactly_as_many(tmp_path):
    table = read(write_jsonl(tmp_path / "data.jsonl", conversations(40)), eval_prompts=15, split_by="prompt")
    assert table.eval.num_rows == 15


def test_split_of_a_longer_source_moves_border_groups_alone(tmp_path):
    """Held-out prompts of the longer source are new ones, or were held out before."""
    short = read(write_jsonl(tmp_path / "a.jsonl", texts(100)), eval_prompts=20)
    long = read(write_jsonl(tmp_path / "b.jsonl", texts(120)), eval_prompts=20)
    assert not set(long.eval["prompt_id"].to_pylist()) & set(short.train["prompt_id"].to_pylist())
    assert len(set(long.eval["prompt_id"].to_pylist()) & set(short.eval["prompt_id"].to_pylist())) >= 10


# Fingerprint


def test_fingerprint_of_files_is_the_hash_of_their_bytes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "a.jsonl.gz", texts(2))
    write_jsonl(tmp_path / "b.jsonl", texts(2))
    sha256 = lambda path: hashlib.sha256(path.read_bytes()).hexdigest()
    assert source_fingerprint(Prompts(source="a.jsonl.gz")) == {"a.jsonl.gz": sha256(tmp_path / "a.jsonl.gz")}
    assert list(source_fingerprint(Prompts(source="*.jsonl*"))) == ["a.jsonl.gz", "b.jsonl"]


def test_fingerprint_of_local_dataset_follows_its_data_alone(tmp_path):
    datasets.Dataset.from_list(texts(4)).save_to_disk(tmp_path / "saved")
    config = Prompts(source=f"datasets:{tmp_path}/saved")
    before = source_fingerprint(config)
    assert "data-00000-of-00001.arrow" in before
    (tmp_path / "saved" / "cache-0123.arrow").write_text("left by Dataset.map")
    assert source_fingerprint(config) == before
    (tmp_path / "saved" / "state.json").write_text("{}")
    assert source_fingerprint(config) != before


def test_fingerprint_of_quickstart_is_its_source():
    assert list(source_fingerprint(Prompts(source="quickstart"))) == ["dpo_ray/quickstart/reviews.py"]


def test_fingerprint_of_hub_dataset_is_its_commit(monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    info = lambda name, revision, timeout: huggingface_hub.DatasetInfo(id=name, sha=commit)
    monkeypatch.setattr(huggingface_hub, "dataset_info", info)
    assert source_fingerprint(Prompts(source="datasets:org/name", revision="v1")) == {"org/name": commit}


def test_fingerprint_of_hub_out_of_reach_raises_unless_the_commit_is_given(monkeypatch):
    def dataset_info(name, revision, timeout):
        raise OSError("no route")

    monkeypatch.setattr(huggingface_hub, "dataset_info", dataset_info)
    with pytest.raises(ConfigError, match=r"hub cannot be reached for the commit of 'org/name': no route"):
        source_fingerprint(Prompts(source="datasets:org/name"))
    assert source_fingerprint(Prompts(source="datasets:org/name", revision="a" * 40)) == {"org/name": "a" * 40}


def test_import_loads_no_torch_ray_or_datasets():
    code = "import sys, dpo_ray.prompts; print({'torch', 'ray', 'datasets', 'vllm'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
