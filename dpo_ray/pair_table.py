"""The pairs that a round trains on, as a training worker reads them.

In: parquet files of REFERENCED (or of PREFERENCES, for losses without a reference). Out: rows by index, and their lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpo_ray.config import Train
from dpo_ray.errors import StageError
from dpo_ray.flow.artifact import read_table

ROWS = ("pair_id", "prompt_token_ids", "chosen_token_ids", "rejected_token_ids")
REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
SCORES = ("chosen_score", "rejected_score")
TOKENS = ("ref_chosen_token_logps", "ref_rejected_token_logps")


def columns_of(block: Train) -> list[str]:
    """The columns of a pair that its loss needs."""
    asked = ((REFERENCE, block.needs_reference), (SCORES, block.needs_scores), (TOKENS, block.ld_alpha is not None))
    return [*ROWS, *(column for columns, needed in asked if needed for column in columns)]


class PairTable:
    """The pairs of a round, in Arrow memory; rows are taken by index.

    Raises:
        StageError: a value that the loss needs is missing, or no log-probability.
    """

    def __init__(self, uris: Sequence[str], columns: Sequence[str]) -> None:
        self.table = pa.concat_tables(read_table(uri, columns) for uri in uris).combine_chunks()
        self.columns = columns
        for column in columns:
            self._check(column)
        self.lengths = np.stack([pc.list_value_length(self.table[c]).to_numpy() for c in ROWS[1:]], axis=1)

    def _check(self, column: str) -> None:
        values = self.table[column]
        bad = pc.is_null(values)
        if column in REFERENCE:  # NaN passes through every comparison of training unseen
            bad = pc.or_(pc.fill_null(pc.invert(pc.is_finite(values)), True), pc.fill_null(pc.greater(values, 0.0), True))
        if num_bad := pc.sum(bad).as_py():
            first = pc.index(bad, True).as_py()
            expected = "a finite log-probability <= 0" if column in REFERENCE else "a value"
            raise StageError(
                f"train: {num_bad} of {len(values)} pairs have no usable {column}; the first is pair "
                f"{self.table['pair_id'][first]} with {values[first]}, expected {expected}. Run the stage before it again with "
                "--redo"
            )

    def __len__(self) -> int:
        return self.table.num_rows

    def fetch(self, rows: list[int]) -> Any:
        """The rows as learn.objective.PairRows."""
        from dpo_ray.learn.objective import PairRows

        taken = self.table.take(rows)
        return PairRows(**{c: taken[c].to_pylist() for c in self.columns})

    def longest(self) -> Any:
        """The pair with the longest prompt and completion, as learn.layout.Group."""
        from dpo_ray.learn.layout import Group

        pair = self.fetch([int((self.lengths[:, 0] + self.lengths[:, 1:].max(axis=1)).argmax())])
        return Group(pair.prompt_token_ids[0], [pair.chosen_token_ids[0], pair.rejected_token_ids[0]])
