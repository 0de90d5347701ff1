"""The conversations that a policy is taught by, as a training worker reads them.

In: parquet files of TURNS. Out: rows by index, and their lengths.
Invariant: as of `pair_table`, rows come from a map of this node's copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dpo_ray.node_copy import BLOCK_ROWS, open_copy
from dpo_ray.pair_table import check_budget

COLUMNS = ("turns_id", "prompt_token_ids", "completion_token_ids", "assistant_positions")


class TurnTable:
    """Rows of assistant turns, taken by index.

    `lengths` is (rows, 2) int32, tokens of prompt and completion; `num_targets` (rows,) int32, those that the loss is of.

    Args:
        uris: the parquet files, in order.
        table_hash: hash of their contents, which is the output hash of the stage that committed them.

    Raises:
        StageError: the table has no rows.
    """

    def __init__(self, uris: Sequence[str], table_hash: str) -> None:
        self.rows, lengths = open_copy(uris, COLUMNS, table_hash, lists=COLUMNS[1:])
        self.lengths, self.num_targets = lengths[:, :2], lengths[:, 2]

    def __len__(self) -> int:
        return len(self.lengths)

    def fetch(self, rows: list[int]) -> Any:
        """The rows as learn.sft.ConversationRows."""
        from dpo_ray.learn.sft import ConversationRows

        taken = [self.rows.get_batch(row // BLOCK_ROWS).slice(row % BLOCK_ROWS, 1) for row in rows]
        return ConversationRows(**{c: [row[c][0].as_py() for row in taken] for c in COLUMNS})

    def longest(self) -> Any:
        """The longest row, as learn.layout.Group."""
        from dpo_ray.learn.layout import Group

        row = self.fetch([int(self.lengths.sum(axis=1).argmax())])
        return Group(row.prompt_token_ids[0], [row.completion_token_ids[0]])

    def check_budget(self, max_batch_tokens: int, *, share_prompt: bool) -> None:
        """Hold the longest row against the budget of a micro-batch.

        Raises:
            ConfigError: it is longer.
        """
        name = lambda row: self.fetch([row]).turns_id[0]
        limits = "conversations.max_tokens"
        check_budget(self.lengths, max_batch_tokens, share_prompt, "conversation", ("turns",), name, limits)
