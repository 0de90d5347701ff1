"""Read a prompt source into the PROMPTS table: no duplicates, a fixed train/eval split, a fixed order.

In: a .jsonl, .csv or .parquet file or glob (a local path or any pyarrow.fs URI), `datasets:<hub id or directory>`, or
`quickstart`. Out: a PromptTable.
Invariant: every row of the source is in train, in eval, or in quarantine with its place and drop reason.

The split is a property of the content: groups of prompts that agree in `split_by` are ranked by the hash of that key
alone, and the first ones with `eval_prompts` rows together are held out, whatever the seed, the round and the order of
the source. The price: rows added to the source can carry groups at the border to the other side.
Of duplicates, the first in the source is kept, and its meta with it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Sequence
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any, NamedTuple, cast
from uuid import UUID

import pyarrow as pa

from dpo_ray import schemas
from dpo_ray.config import Prompts
from dpo_ray.errors import ConfigError, StageError
from dpo_ray.prompt_sources import BATCH_ROWS, SourceRow, columns_to_read, source_fingerprint, source_rows

__all__ = ["PromptTable", "read_prompts", "source_fingerprint"]

ROLES = ("system", "user", "assistant", "tool")
CHAT_START = re.compile(r"""\s*\[\s*\{\s*['"](role|content)['"]\s*:""")
QUARANTINE_CHARS = 4000

# 64-bit offsets: Arrow reorders a column in one piece, and that of a large source has more than 2 GB of text.
_LARGE_MESSAGES = pa.large_list(pa.struct({"role": pa.large_string(), "content": pa.large_string()}))
_USABLE = pa.schema({"prompt": _LARGE_MESSAGES} | dict.fromkeys(("prompt_id", "tools", "meta", "group"), pa.large_string()))
QUARANTINE = pa.schema(dict.fromkeys(("location", "drop_reason", "row"), pa.string()))


class PromptTable(NamedTuple):
    """All prompts of a source; rows_in counts every row that was read, dropped those in quarantine by reason."""

    train: pa.Table
    eval: pa.Table
    quarantine: pa.Table
    rows_in: int
    dropped: dict[str, int]


def read_prompts(config: Prompts, seed: int) -> PromptTable:
    """Read the source; train and eval conform to PROMPTS, in an order that depends on `seed` and the prompts alone.

    A plain text is one user turn; a text that is a JSON list of objects with a role is a chat. `tools` keeps the order
    of keys (the chat template renders them so), without the null keys that Arrow adds to structs. `meta` is a JSON
    object: times become ISO text, decimals text.

    Raises:
        ConfigError: the source cannot be read, a mapped column is missing, or JSON cannot hold a column of `meta`.
        StageError: more than `max_dropped` of the rows are unusable, or too few are left to hold out `eval_prompts`.
    """
    prompts, quarantine, rows_in = _read_rows(config)
    dropped = _check_dropped(quarantine, rows_in, config)
    groups, prompt_ids = prompts["group"].to_pylist(), prompts["prompt_id"].to_pylist()
    held_out = eval_groups(groups, config.eval_prompts)
    order = sorted(range(len(groups)), key=lambda i: hashlib.sha256(f"{seed}:{prompt_ids[i]}".encode()).digest())
    train = _take(prompts, [i for i in order if groups[i] not in held_out], "train")
    evaluation = _take(prompts, [i for i in order if groups[i] in held_out], "eval")
    assert rows_in == train.num_rows + evaluation.num_rows + quarantine.num_rows
    return PromptTable(train, evaluation, quarantine, rows_in, dropped)


def _read_rows(config: Prompts) -> tuple[pa.Table, pa.Table, int]:
    """Read the source into usable prompts, with the group that each is split by, and quarantine; count its rows."""
    usable, quarantined = [_USABLE.empty_table()], [QUARANTINE.empty_table()]
    columns: set[str] = set()
    ids: set[str] = set()
    rows_in = 0
    rows = itertools.islice(source_rows(config), config.num_prompts)
    while batch := list(itertools.islice(rows, BATCH_ROWS)):
        kept, dropped = [], []
        for row in batch:
            columns.update(row.values if isinstance(row.values, dict) else ())
            prompt, reason = prompt_row(row, config)
            if prompt is not None and prompt["prompt_id"] in ids:
                prompt, reason = None, "duplicate"
            if prompt is None:
                dropped.append({"location": row.location, "drop_reason": reason, "row": _row_json(row.values)})
            else:
                ids.add(prompt["prompt_id"])
                kept.append(prompt)
        usable.append(pa.Table.from_pylist(kept, _USABLE))
        quarantined.append(pa.Table.from_pylist(dropped, QUARANTINE))
        rows_in += len(batch)
    if columns:  # JSONL has no header: its columns are known once it is read
        columns_to_read(config, sorted(columns), config.source)
    return pa.concat_tables(usable).combine_chunks(), pa.concat_tables(quarantined), rows_in


def eval_groups(groups: Sequence[str], eval_prompts: int) -> set[str]:
    """Choose the groups that are held out, given the group of each row: the smallest, until they have enough rows."""
    sizes = Counter(groups)
    held_out: set[str] = set()
    rows = 0
    for group in sorted(sizes):
        if rows >= eval_prompts:
            break
        held_out.add(group)
        rows += sizes[group]
    if 2 * rows > len(groups):
        raise StageError(
            f"prompts: eval_prompts={eval_prompts} would hold out {rows} of {len(groups)} usable prompts, more than "
            f"half (they are {len(sizes)} groups, not to be divided); lower prompts.eval_prompts, add prompts, "
            "or set prompts.split_by to `prompt`"
        )
    return held_out


def _check_dropped(quarantine: pa.Table, rows_in: int, config: Prompts) -> dict[str, int]:
    """Count the dropped rows by reason, and raise if too many are unusable; duplicates are usable."""
    reasons = quarantine["drop_reason"].to_pylist()
    dropped = dict(sorted(Counter(reasons).items()))
    if rows_in == 0:
        raise StageError(f"prompts: {config.source!r} has no rows")
    bad = [i for i, reason in enumerate(reasons) if reason != "duplicate"]
    if bad and (len(bad) > config.max_dropped * rows_in or len(reasons) == rows_in):
        first = f"{quarantine['location'][bad[0]]} ({reasons[bad[0]]}): {str(quarantine['row'][bad[0]])[:200]}"
        raise StageError(
            f"prompts: {len(bad)} of {rows_in} rows of {config.source!r} are unusable, by reason {dropped}; the first: "
            f"{first}. Correct the source, or raise prompts.max_dropped (now {config.max_dropped:g})"
        )
    return dropped


def _take(prompts: pa.Table, indices: list[int], split: str) -> pa.Table:
    """Return these rows in this order as PROMPTS, in pieces that 32-bit offsets can hold."""
    pieces = [prompts.take(indices[start : start + BATCH_ROWS]) for start in range(0, len(indices), BATCH_ROWS)]
    pieces = [piece.append_column("split", pa.repeat(split, piece.num_rows)) for piece in pieces]
    return pa.concat_tables([schemas.conform(piece, schemas.PROMPTS, "prompts", "prompt_id") for piece in pieces])


def prompt_row(row: SourceRow, config: Prompts) -> tuple[dict[str, Any] | None, str | None]:
    """Return the row of PROMPTS with the group that it is split by, or None and the drop reason."""
    if not isinstance(row.values, dict):
        return None, row.drop_reason
    messages, reason = chat_messages(row.values.get(config.prompt_column), config.system_prompt)
    if reason:
        return None, reason
    tools, reason = canonical_tools(row.values.get(config.tools_column) if config.tools_column else None)
    if reason:
        return None, reason
    meta = _meta_json(row, config)
    try:
        prompt_id = schemas.prompt_id(messages, tools)
        meta.encode()
    except UnicodeEncodeError:  # a lone surrogate: bytes that are not UTF-8, or an escape such as \ud800
        return None, "invalid_unicode"
    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    first_user = next(m["content"] for m in messages if m["role"] == "user")
    key = (system, first_user) if config.split_by == "conversation" else (prompt_id,)
    group = schemas.content_id("split", *key)
    return {"prompt_id": prompt_id, "prompt": messages, "tools": tools, "meta": meta, "group": group}, None


def chat_messages(value: Any, system_prompt: str | None = None) -> tuple[list[dict[str, str]], str | None]:
    """Return the messages of a prompt, unstripped, with None; or with the reason why it cannot be one."""
    if isinstance(value, str):
        try:
            chat = json.loads(value) if value.lstrip().startswith("[") else None
        except (ValueError, RecursionError):
            if CHAT_START.match(value):
                return [], "malformed_json"
            chat = None
        is_chat = isinstance(chat, list) and all(isinstance(m, dict) and "role" in m for m in chat)
        value = chat if is_chat else [{"role": "user", "content": value}] if value.strip() else []
    if not value:
        return [], "null_prompt" if value is None else "empty_prompt"
    if not isinstance(value, list) or not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value):
        return [], "not_messages"
    if any(key not in ("role", "content") and extra is not None for m in value for key, extra in m.items()):
        return [], "unsupported_message_fields"
    if system_prompt and value[0]["role"] != "system":
        value = [{"role": "system", "content": system_prompt}, *value]
    roles, contents = [m["role"] for m in value], [m["content"] for m in value]
    known = all(role in ROLES for role in roles) and "system" not in roles[1:]
    if not known or "user" not in roles or roles[-1] not in ("user", "tool"):
        return [], "wrong_roles"
    if not all(content is None or isinstance(content, str) for content in contents):
        return [], "content_not_text"
    if not all(content and content.strip() for content in contents):
        return [], "empty_message"
    return [{"role": m["role"], "content": m["content"]} for m in value], None


def canonical_tools(value: Any) -> tuple[str | None, str | None]:
    """Return tool definitions (a list of objects, or its JSON) as compact JSON, None without any; and a drop reason."""
    try:
        tools = json.loads(value or "[]") if isinstance(value, str) else _without_null_keys(value)
        if not tools and (tools is None or tools == []):
            return None, None
        if not isinstance(tools, list) or not all(tool and isinstance(tool, dict) for tool in tools):
            return None, "bad_tools"
        return json.dumps(tools, ensure_ascii=False, allow_nan=False, separators=(",", ":")), None
    except (ValueError, TypeError, RecursionError):
        return None, "bad_tools"


def _without_null_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_null_keys(item) for key, item in value.items() if item is not None}
    return [_without_null_keys(item) for item in value] if isinstance(value, list) else value


def _meta_json(row: SourceRow, config: Prompts) -> str:
    values = cast(dict[str, Any], row.values)
    columns = config.meta_columns
    if columns is None:
        columns = [name for name in values if name not in (config.prompt_column, config.tools_column)]
    fields = []
    for name in columns:
        try:
            text = json.dumps(values.get(name), ensure_ascii=False, allow_nan=False, default=_scalar_text)
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"prompts: {row.location}: JSON cannot hold column {name!r}: {error}; list the columns that the scorer "
                "needs in prompts.meta_columns, without this one, or convert it in the source"
            ) from error
        fields.append(f"{json.dumps(name, ensure_ascii=False)}: {text}")
    return "{" + ", ".join(fields) + "}"


def _scalar_text(value: Any) -> str:
    if isinstance(value, (datetime, date, time)):
        return value.isoformat()
    if isinstance(value, (Decimal, UUID)):
        return str(value)
    raise TypeError(f"a {type(value).__name__} has no JSON form")


def _row_json(values: dict[str, Any] | str) -> str:
    """Return a quarantined row as JSON; a long one as an object with its beginning."""
    text = json.dumps(values, ensure_ascii=False, default=str)
    if len(text) > QUARANTINE_CHARS:
        text = json.dumps({"truncated": text[:QUARANTINE_CHARS]}, ensure_ascii=False)
    return text.encode("utf-8", "replace").decode()
