"""From rows of a source to a split table: no duplicates, a fixed train/eval split, a fixed order.

In: SourceRows and a function that parses one. Out: an Intake.
Invariant: every row of the source is in train, in eval, or in quarantine with its place and drop reason.

The split is a property of the content: groups of rows that agree in their split key are ranked by the hash of that key
alone, and the first ones with enough rows together are held out, whatever the seed, the round and the order of the
source. The price: rows added to the source can carry groups at the border to the other side.
Of duplicates, the first in the source is kept.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from dpo_ray import schemas
from dpo_ray.errors import StageError
from dpo_ray.sources import BATCH_ROWS, SourceRow

QUARANTINE_CHARS = 4000
QUARANTINE = pa.schema(dict.fromkeys(("location", "drop_reason", "row"), pa.string()))
GROUP = pa.field("group", pa.large_string())
# 64-bit offsets: Arrow reorders a column in one piece, and that of a large source has more than 2 GB of text.
LARGE_MESSAGES = pa.large_list(pa.struct({"role": pa.large_string(), "content": pa.large_string()}))

Parsed = tuple[dict[str, Any] | None, str | None]
"""A usable row with its `group`, or None and the drop reason."""


class Intake(NamedTuple):
    """All rows of a source; rows_in counts every row that was read, dropped those in quarantine by reason."""

    train: pa.Table
    eval: pa.Table
    quarantine: pa.Table
    rows_in: int
    dropped: dict[str, int]


class Target(NamedTuple):
    """What the rows become."""

    block: str
    """Name of the configuration's block, for messages; options are `max_dropped` and `eval_<rows>`."""
    rows: str
    """What a row is: prompts or pairs."""
    source: str
    key: str
    usable: pa.Schema
    """Columns of a parsed row, with `group`."""
    schema: pa.Schema
    """Of the committed table, with `split`."""
    num_eval: int
    max_dropped: float
    check_columns: Callable[[list[str]], object]
    """Raises when the columns of all rows lack a mapped one: JSONL has no header, so they are known once it is read."""


def split_group(messages: Sequence[Mapping[str, str]], prompt_id: str, split_by: str) -> str:
    """Return what is never divided between train and eval: the conversation's opening, or the prompt alone."""
    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    first_user = next(m["content"] for m in messages if m["role"] == "user")
    key = (system, first_user) if split_by == "conversation" else (prompt_id,)
    return schemas.content_id("split", *key)


def take_in(rows: Iterator[SourceRow], parse: Callable[[SourceRow], Parsed], target: Target, seed: int) -> Intake:
    """Parse all rows and split them; train and eval conform to `target.schema`, in an order by `seed` and key alone.

    Raises:
        StageError: there are no rows, more than `max_dropped` of them are unusable, or too few are left to hold out
            `num_eval`.
    """
    usable, quarantine, rows_in = _parse_rows(rows, parse, target)
    dropped = _check_dropped(quarantine, rows_in, target)
    groups, keys = usable["group"].to_pylist(), usable[target.key].to_pylist()
    held_out = eval_groups(groups, target)
    order = sorted(range(len(groups)), key=lambda i: hashlib.sha256(f"{seed}:{keys[i]}".encode()).digest())
    train = _take(usable, [i for i in order if groups[i] not in held_out], "train", target)
    evaluation = _take(usable, [i for i in order if groups[i] in held_out], "eval", target)
    assert rows_in == train.num_rows + evaluation.num_rows + quarantine.num_rows
    return Intake(train, evaluation, quarantine, rows_in, dropped)


def eval_groups(groups: Sequence[str], target: Target) -> set[str]:
    """Choose the groups that are held out, given the group of each row: the smallest, until they have enough rows."""
    sizes = Counter(groups)
    held_out: set[str] = set()
    rows = 0
    for group in sorted(sizes):
        if rows >= target.num_eval:
            break
        held_out.add(group)
        rows += sizes[group]
    if 2 * rows > len(groups):
        block, option = target.block, f"eval_{target.rows}"
        raise StageError(
            f"{block}: {option}={target.num_eval} would hold out {rows} of {len(groups)} usable {target.rows}, more than "
            f"half (they are {len(sizes)} groups, not to be divided); lower {block}.{option}, add {target.rows}, "
            f"or set {block}.split_by to `prompt`"
        )
    return held_out


def _parse_rows(
    rows: Iterator[SourceRow], parse: Callable[[SourceRow], Parsed], target: Target
) -> tuple[pa.Table, pa.Table, int]:
    """Return the usable rows, those in quarantine, and how many were read."""
    usable, quarantined = [target.usable.empty_table()], [QUARANTINE.empty_table()]
    seen: set[str] = set()
    columns: set[str] = set()
    rows_in = 0
    while batch := list(itertools.islice(rows, BATCH_ROWS)):
        kept, dropped = [], []
        for row in batch:
            columns.update(row.values if isinstance(row.values, dict) else ())
            parsed, reason = parse(row)
            if parsed is not None and parsed[target.key] in seen:
                parsed, reason = None, "duplicate"
            if parsed is None:
                dropped.append({"location": row.location, "drop_reason": reason, "row": _row_json(row.values)})
            else:
                seen.add(parsed[target.key])
                kept.append(parsed)
        usable.append(pa.Table.from_pylist(kept, target.usable))
        quarantined.append(pa.Table.from_pylist(dropped, QUARANTINE))
        rows_in += len(batch)
    if columns:
        target.check_columns(sorted(columns))
    return pa.concat_tables(usable).combine_chunks(), pa.concat_tables(quarantined), rows_in


def _check_dropped(quarantine: pa.Table, rows_in: int, target: Target) -> dict[str, int]:
    """Count the dropped rows by reason, and raise if too many are unusable; duplicates are usable."""
    reasons = quarantine["drop_reason"].to_pylist()
    dropped = dict(sorted(Counter(reasons).items()))
    if rows_in == 0:
        raise StageError(f"{target.block}: {target.source!r} has no rows; name a file or split that has some")
    bad = [i for i, reason in enumerate(reasons) if reason != "duplicate"]
    if bad and (len(bad) > target.max_dropped * rows_in or len(reasons) == rows_in):
        first = f"{quarantine['location'][bad[0]]} ({reasons[bad[0]]}): {str(quarantine['row'][bad[0]])[:200]}"
        raise StageError(
            f"{target.block}: {len(bad)} of {rows_in} rows of {target.source!r} are unusable, by reason {dropped}; the first: "
            f"{first}. Correct the source, or raise {target.block}.max_dropped (now {target.max_dropped:g})"
        )
    return dropped


def _take(usable: pa.Table, indices: list[int], split: str, target: Target) -> pa.Table:
    """Return these rows in this order under `target.schema`, in pieces that 32-bit offsets can hold."""
    pieces = [usable.take(indices[start : start + BATCH_ROWS]) for start in range(0, len(indices), BATCH_ROWS)]
    pieces = [piece.append_column("split", pa.repeat(split, piece.num_rows)) for piece in pieces]
    empty = [target.schema.empty_table()]
    return pa.concat_tables(empty + [schemas.conform(piece, target.schema, target.block, target.key) for piece in pieces])


def _row_json(values: dict[str, Any] | str) -> str:
    """Return a quarantined row as JSON; a long one as an object with its beginning."""
    text = json.dumps(values, ensure_ascii=False, default=str)
    if len(text) > QUARANTINE_CHARS:
        text = json.dumps({"truncated": text[:QUARANTINE_CHARS]}, ensure_ascii=False)
    return text.encode("utf-8", "replace").decode()
