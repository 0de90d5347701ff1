import pyarrow as pa
import pytest

from dpo_ray import node_copy
from dpo_ray.errors import ConfigError
from dpo_ray.learn.sft import ConversationRows
from dpo_ray.schemas import TURNS
from dpo_ray.turn_table import TurnTable

from .artifacts import commit_tables

ROWS = [([5, 6], [7, 8, 9], [0, 2]), ([5], [10, 11, 12, 13], [1]), ([5, 6, 7], [14], [0])]


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.setattr(node_copy, "CACHE", tmp_path / "cache")
    columns = ("prompt_token_ids", "completion_token_ids", "assistant_positions")
    made = [dict(zip(columns, row, strict=True)) | {"turns_id": f"t{i}", "conversation_id": "c"} for i, row in enumerate(ROWS)]
    whole = pa.Table.from_pylist(made, TURNS)
    artifact = commit_tables(tmp_path / "turns", [whole.slice(0, 2), whole.slice(2)])
    return TurnTable([artifact.uri(f) for f in artifact.tables()], artifact.manifest.output_hash)


def test_turn_table_fetches_rows_by_index(table):
    assert table.fetch([2, 0]) == ConversationRows(["t2", "t0"], *map(list, zip(ROWS[2], ROWS[0], strict=True)))


def test_turn_table_lengths_and_targets(table):
    assert table.lengths.tolist() == [[2, 3], [1, 4], [3, 1]]
    assert table.num_targets.tolist() == [2, 1, 1]


def test_turn_table_longest_is_the_row_of_most_tokens(table):
    assert (table.longest().prompt, table.longest().completions) == ([5, 6], [[7, 8, 9]])


def test_turn_table_check_budget_names_the_longest_row(table):
    table.check_budget(5, share_prompt=True)
    with pytest.raises(ConfigError, match=r"max_batch_tokens=4 is below the longest conversation: t0 has 5 tokens \(prompt 2, "
                       r"turns 3\), and 2 of 3 .*conversations.max_tokens"):  # fmt: skip
        table.check_budget(4, share_prompt=True)
