import json

import pytest

from dpo_ray import schemas
from dpo_ray.config import Conversations
from dpo_ray.conversations import read_conversations
from dpo_ray.errors import ConfigError, StageError


def chat(*contents, system=None):
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *turns] if system else turns


def read(source, seed=0, **fields):
    fields = {"eval_conversations": 2, "max_dropped": 1.0} | fields
    return read_conversations(Conversations(source=str(source), **fields), seed)


def write(path, chats):
    path.write_text("\n".join(json.dumps({"messages": messages, "other": 1}) for messages in chats))
    return path


def all_rows(taken):
    return [*taken.train.to_pylist(), *taken.eval.to_pylist()]


def test_conversations_conform_and_every_row_is_somewhere(tmp_path):
    chats = [chat(f"question {i}", f"answer {i}", "more", "and more") for i in range(8)]
    taken = read(write(tmp_path / "data.jsonl", chats))
    assert taken.train.schema == taken.eval.schema == schemas.CONVERSATIONS
    assert (taken.rows_in, taken.train.num_rows, taken.eval.num_rows, taken.dropped) == (8, 6, 2, {})
    assert sorted(json.dumps(row["messages"]) for row in all_rows(taken)) == sorted(map(json.dumps, chats))
    assert len({row["conversation_id"] for row in all_rows(taken)}) == 8


def test_conversations_of_a_csv_are_json_texts(tmp_path):
    import csv

    chats = [chat(f"question {i}", 'yes, "sure"') for i in range(6)]
    with (tmp_path / "data.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["messages"], *([json.dumps(messages)] for messages in chats)])
    assert all_rows(read(tmp_path / "data.csv")) == all_rows(read(write(tmp_path / "data.jsonl", chats)))


def test_conversations_system_prompt_goes_before_those_without_one(tmp_path):
    chats = [*(chat(f"question {i}", "yes") for i in range(4)), chat("question", "no", system="Be long.")]
    taken = read(write(tmp_path / "data.jsonl", chats), system_prompt="Be brief.")
    assert sorted(row["messages"][0]["content"] for row in all_rows(taken)) == ["Be brief."] * 4 + ["Be long."]


BAD = {
    "no messages": ("empty_conversation", None),
    "empty": ("empty_conversation", []),
    "text": ("malformed_json", "hello"),
    "no role": ("not_messages", [*chat("a"), {"content": "b"}]),
    "ends with a user": ("wrong_roles", chat("a", "b", "c")),
    "answer alone": ("no_prompt", chat("a", "b")[1:]),
    "two answers": ("wrong_roles", [*chat("a", "b"), {"role": "assistant", "content": "c"}]),
    "empty answer": ("empty_message", chat("a", "  ")),
    "no answer text": ("empty_message", [*chat("a"), {"role": "assistant", "content": None}]),
    "parts": ("content_not_text", [*chat("a"), {"role": "assistant", "content": [{"type": "text"}]}]),
    "tool call": ("unsupported_message_fields", [*chat("a"), {"role": "assistant", "content": "b", "tool_calls": [{}]}]),
    "unknown role": ("wrong_roles", [{"role": "narrator", "content": "a"}, *chat("b", "c")]),
    "surrogate": ("invalid_unicode", chat("a", "\ud800")),
}


def test_conversations_that_cannot_be_used_are_in_quarantine_by_reason(tmp_path):
    good = [chat(f"question {i}", "yes") for i in range(5)]
    taken = read(write(tmp_path / "data.jsonl", [*good, good[0], *(messages for _, messages in BAD.values())]))
    assert taken.rows_in == 6 + len(BAD)
    reasons = {row["location"].rpartition(":")[2]: row["drop_reason"] for row in taken.quarantine.to_pylist()}
    assert reasons == {"6": "duplicate"} | {str(i): reason for i, (reason, _) in enumerate(BAD.values(), start=7)}


def test_conversations_with_the_same_opening_never_straddle_the_split(tmp_path):
    chats = [chat(f"question {i % 5}", f"answer {i}") for i in range(40)]
    taken = read(write(tmp_path / "data.jsonl", chats), eval_conversations=8)
    openings = [{row["messages"][0]["content"] for row in table.to_pylist()} for table in (taken.train, taken.eval)]
    assert openings[0]
    assert openings[1]
    assert not openings[0] & openings[1]


def test_conversations_without_the_mapped_column_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no column 'chat', which conversations.messages_column names"):
        read(write(tmp_path / "data.jsonl", [chat("a", "b")] * 3), messages_column="chat")


def test_conversations_too_many_of_which_are_unusable_stop_the_stage(tmp_path):
    with pytest.raises(StageError, match=r"conversations: 2 of 3 rows .*'wrong_roles': 2"):
        read(write(tmp_path / "data.jsonl", [chat("a", "b"), chat("a"), chat("c")]), max_dropped=0.5)


def test_conversations_of_the_quickstart_are_requests_with_reviews():
    taken = read("quickstart", num_conversations=20)
    assert (taken.rows_in, taken.train.num_rows, taken.dropped) == (20, 18, {})
    assert {tuple(m["role"] for m in row["messages"]) for row in all_rows(taken)} == {("user", "assistant")}
