"""The pairs that a round trains on, as a training worker reads them.

In: parquet files of REFERENCED (or of PREFERENCES, for losses without a reference). Out: rows by index, and their lengths.
Invariant: rows come from a map of this node's copy (`node_copy.py`), so that a worker's heap does not grow with the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpo_ray.config import Train
from dpo_ray.errors import ConfigError, StageError
from dpo_ray.node_copy import BLOCK_ROWS, open_copy

ROWS = ("pair_id", "prompt_token_ids", "chosen_token_ids", "rejected_token_ids")
REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
SCORES = ("chosen_score", "rejected_score")
TOKENS = ("ref_chosen_token_logps", "ref_rejected_token_logps")


def columns_of(block: Train) -> list[str]:
    """The columns of a pair that its loss needs."""
    asked = ((REFERENCE, block.needs_reference), (SCORES, block.needs_scores), (TOKENS, block.ld_alpha is not None))
    return [*ROWS, *(column for columns, needed in asked if needed for column in columns)]


class PairTable:
    """The pairs of a round; rows are taken by index.

    `lengths` is a (pairs, 3) int32 memory map: tokens of prompt, chosen and rejected.

    Args:
        uris: the parquet files, in order.
        table_hash: hash of their contents, which is the output hash of the stage that committed them.

    Raises:
        StageError: a value that the loss needs is missing, or no log-probability.
    """

    def __init__(self, uris: Sequence[str], columns: Sequence[str], table_hash: str) -> None:
        self.columns = columns
        self.rows, self.lengths = open_copy(uris, columns, table_hash, lists=ROWS[1:])
        for column in columns:
            self._check(column)

    def _check(self, column: str) -> None:
        num_bad, first = 0, ""
        for block in self._blocks():
            values = block[column]
            bad = pc.is_null(values)
            if column in REFERENCE:  # NaN passes through every comparison of training unseen
                bad = pc.or_(pc.fill_null(pc.invert(pc.is_finite(values)), True), pc.fill_null(pc.greater(values, 0.0), True))
            if not num_bad and (row := pc.index(bad, True).as_py()) >= 0:
                first = f"{block['pair_id'][row]} with {values[row]}"
            num_bad += pc.sum(bad).as_py()
        if num_bad:
            expected = "a finite log-probability <= 0" if column in REFERENCE else "a value"
            raise StageError(
                f"train: {num_bad} of {len(self)} pairs have no usable {column}; the first is pair {first}, expected "
                f"{expected}. Run the stage before it again with --redo"
            )

    def _blocks(self) -> Iterator[pa.RecordBatch]:
        return (self.rows.get_batch(i) for i in range(self.rows.num_record_batches))

    def __len__(self) -> int:
        return len(self.lengths)

    def fetch(self, rows: list[int]) -> Any:
        """The rows as learn.objective.PairRows."""
        from dpo_ray.learn.objective import PairRows

        taken = [self.rows.get_batch(row // BLOCK_ROWS).slice(row % BLOCK_ROWS, 1) for row in rows]
        return PairRows(**{c: [row[c][0].as_py() for row in taken] for c in self.columns})

    def longest(self) -> Any:
        """The pair with the longest prompt and completion, as learn.layout.Group."""
        from dpo_ray.learn.layout import Group

        pair = self.fetch([int((self.lengths[:, 0] + self.lengths[:, 1:].max(axis=1)).argmax())])
        return Group(pair.prompt_token_ids[0], [pair.chosen_token_ids[0], pair.rejected_token_ids[0]])

    def check_budget(self, max_batch_tokens: int, *, share_prompt: bool) -> None:
        """Hold the longest pair, in the layout of the batches, against the budget of a micro-batch.

        Raises:
            ConfigError: it is longer.
        """
        name = lambda row: self.fetch([row]).pair_id[0]
        advice = "generate.max_prompt_tokens and generate.sampling.max_new_tokens, or preferences.max_tokens"
        check_budget(self.lengths, max_batch_tokens, share_prompt, "pair", ("chosen", "rejected"), name, advice)


def check_budget(
    lengths: np.ndarray,
    max_batch_tokens: int,
    share_prompt: bool,
    kind: str,
    completions: Sequence[str],
    name: Callable[[int], str],
    limits: str,
) -> None:
    """Hold the longest row of a table, in the layout of the batches, against the budget of a micro-batch.

    Args:
        lengths: (rows, 1 + C) tokens of prompt and completions.
        kind, completions, limits: what a row, its completions and the options that limit them are called.
        name: id of a row.

    Raises:
        ConfigError: it is longer.
    """
    from dpo_ray.learn.batches import row_tokens

    tokens = row_tokens(lengths, share_prompt=share_prompt)
    row = int(tokens.argmax())
    if tokens[row] > max_batch_tokens:
        parts = ", ".join(f"{part} {n}" for part, n in zip(("prompt", *completions), lengths[row].tolist(), strict=True))
        layout = "" if share_prompt else ", each completion in a row of its own behind the prompt, padded to the longest"
        raise ConfigError(
            f"train.max_batch_tokens={max_batch_tokens} is below the longest {kind}: {name(row)} has {tokens[row]} tokens "
            f"({parts}{layout}), and {int((tokens > max_batch_tokens).sum())} of {len(lengths)} {kind}s are too long. Set it "
            f"to at least {tokens[row]}, or lower the limits that let such {kind}s in: {limits}"
        )
