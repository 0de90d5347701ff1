import json

import pyarrow as pa
import pytest

from dpo_ray import schemas
from dpo_ray.errors import SchemaError
from dpo_ray.schemas import completion_id, conform, content_id, prompt_id, sample_seed

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]
SCHEMA = pa.schema(
    [pa.field("id", pa.string(), nullable=False), pa.field("n", pa.int32(), nullable=False), pa.field("x", pa.float64())]
)


def table(**columns):
    return pa.table({"id": ["a", "b"], "n": [1, 2], "x": [0.5, None]} | columns)


def test_prompt_id_is_stable_across_releases():
    """The literal is the contract: ids of committed tables must not change when the code does."""
    assert prompt_id(CHAT) == content_id([["system", "Be brief."], ["user", "2+2?"]])
    assert len(prompt_id(CHAT)) == 32
    assert int(prompt_id(CHAT), 16) >= 0


def test_prompt_id_ignores_the_order_of_keys_and_other_fields():
    assert prompt_id([{"content": m["content"], "role": m["role"], "name": "x"} for m in CHAT]) == prompt_id(CHAT)


@pytest.mark.parametrize(
    "other",
    [
        CHAT[1:],
        CHAT[::-1],
        [*CHAT[:1], {"role": "user", "content": "2+2? "}],
        [{"role": "user", "content": "Be brief."}, CHAT[1]],
    ],
)
def test_prompt_id_other_messages_have_another_id(other):
    assert prompt_id(other) != prompt_id(CHAT)


def test_prompt_id_tools_count():
    tools = json.dumps([{"name": "add"}])
    assert len({prompt_id(CHAT), prompt_id(CHAT, tools), prompt_id(CHAT, "[]")}) == 3


def test_content_id_does_not_confuse_where_one_part_ends():
    assert len({content_id("a", "bc"), content_id("ab", "c"), content_id("abc"), content_id(["a", "bc"])}) == 4
    assert content_id({"a": 1, "b": 2}) == content_id({"b": 2, "a": 1})


def test_completion_id_differs_by_prompt_round_policy_and_sample():
    ids = {completion_id(p, r, policy, k) for p in "ab" for r in (0, 1) for policy in "xy" for k in range(4)}
    assert len(ids) == 2 * 2 * 2 * 4


def test_sample_seed_is_distinct_per_seed_round_and_prompt():
    seeds = {sample_seed(s, r, f"prompt {p}") for s in range(5) for r in range(5) for p in range(200)}
    assert len(seeds) == 5 * 5 * 200
    assert all(0 <= s < 2**47 for s in seeds)


def test_sample_seed_does_not_change_between_calls():
    assert sample_seed(0, 1, "p") == sample_seed(0, 1, "p")


def test_conform_selects_orders_and_casts():
    got = conform(pa.table({"more": [1, 2], "x": [0.5, None], "n": [1, 2], "id": ["a", "b"]}), SCHEMA, "pair", "id")
    assert got.schema == SCHEMA
    assert got.to_pylist() == [{"id": "a", "n": 1, "x": 0.5}, {"id": "b", "n": 2, "x": None}]


def test_conform_empty_table_keeps_the_schema():
    assert conform(table().slice(0, 0), SCHEMA, "pair", "id").schema == SCHEMA


@pytest.mark.parametrize(
    ("columns", "named"),
    [
        ({"n": [1, None]}, ["pair", "'n'", "null", "id='b'", "int32"]),
        ({"n": ["1", "two"]}, ["pair", "'n'", "string", "int32"]),
        ({"n": [1, 2**40]}, ["pair", "'n'", "int64", "int32"]),
        ({"n": [{"a": 1}, {"a": 2}]}, ["pair", "'n'", "struct", "int32"]),
    ],
)
def test_conform_error_names_stage_column_expected_and_got(columns, named):
    with pytest.raises(SchemaError) as error:
        conform(table(**columns), SCHEMA, "pair", "id")
    assert [n for n in named if n not in str(error.value)] == []


def test_conform_missing_column_names_it_and_what_there_is():
    with pytest.raises(SchemaError) as error:
        conform(table().drop_columns(["x"]), SCHEMA, "pair", "id")
    assert all(named in str(error.value) for named in ("pair", "'x'", "['id', 'n']"))


@pytest.mark.parametrize(
    "completions",
    [
        [[{"text": "t"}]],  # the id is missing
        [[{"completion_id": None, "text": "t"}]],
        [[{**{f.name: None for f in schemas.COMPLETION}, "completion_id": "c", "score": 1.0, "token_ids": "abc"}]],
        [["text alone"]],
    ],
)
def test_conform_completions_of_another_shape_are_a_schema_error(completions):
    prompt = {"prompt_id": "p", "prompt": CHAT, "split": "train", "tools": None, "meta": None}
    row = prompt | {"round": 0, "prompt_token_ids": [1]}
    wrong = pa.Table.from_pylist([row]).append_column("completions", pa.array(completions))
    with pytest.raises(SchemaError, match="completions"):
        conform(wrong, schemas.COMPLETIONS, "generate", "prompt_id")


def test_tables_downstream_keep_the_columns_of_those_before():
    assert set(schemas.PROMPTS.names) < set(schemas.COMPLETIONS.names) == set(schemas.SCORED.names)
    assert set(schemas.PREFERENCES.names) < set(schemas.REFERENCED.names)
