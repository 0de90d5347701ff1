"""The columns of every table between stages, and `conform`, which holds a table to them.

| table | grain | written by |
|---|---|---|
| PROMPTS | prompt | prompts |
| COMPLETIONS | prompt | generate |
| SCORED | prompt | score |
| COMPARISONS | pair | preferences |
| PREFERENCES | pair | pair, ingest |
| REFERENCED | pair | reference |
| CONVERSATIONS | conversation | conversations |
| TURNS | row of turns | tokenize |

Ids are content hashes; every match is by key, never by position. A field that is not nullable is never null.
While a table is inside a stage it also carries PART and DROP_REASON (see flow/parts.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from dpo_ray.errors import SchemaError

TOKENS = pa.list_(pa.int32())
MESSAGES = pa.list_(pa.struct([pa.field("role", pa.string()), pa.field("content", pa.string())]))


def _required(name: str, type_: pa.DataType) -> pa.Field:
    return pa.field(name, type_, nullable=False)


PROMPTS = pa.schema(
    [
        _required("prompt_id", pa.string()),
        _required("prompt", MESSAGES),
        _required("split", pa.string()),  # train or eval
        pa.field("tools", pa.string()),  # JSON list for the chat template
        pa.field("meta", pa.string()),  # JSON object: the source's other columns
    ]
)

_COMPLETION = [
    _required("completion_id", pa.string()),
    pa.field("text", pa.string()),
    pa.field("token_ids", TOKENS),  # as sampled, with the stop token that the engine returned
    pa.field("finish_reason", pa.string()),  # stop or length
    pa.field("seed", pa.int64()),
    pa.field("sampler_logps_sum", pa.float64()),  # nats: the engine's own sum over token_ids, before temperature and top-p
    pa.field("policy", pa.string()),  # identity of the policy that sampled it
    pa.field("drop_reason", pa.string()),
]
COMPLETION = pa.struct(_COMPLETION)
SCORED_COMPLETION = pa.struct([*_COMPLETION, pa.field("score", pa.float64())])

_PROMPT_WITH_TOKENS = [*PROMPTS, _required("round", pa.int32()), _required("prompt_token_ids", TOKENS)]
COMPLETIONS = pa.schema([*_PROMPT_WITH_TOKENS, _required("completions", pa.list_(COMPLETION))])
SCORED = pa.schema([*_PROMPT_WITH_TOKENS, _required("completions", pa.list_(SCORED_COMPLETION))])

COMPARISONS = pa.schema(
    [
        _required("pair_id", pa.string()),
        _required("prompt_id", pa.string()),
        _required("opening", pa.string()),  # hash of system prompt and first user turn
        _required("prompt", MESSAGES),
        _required("split", pa.string()),  # train or eval
        pa.field("tools", pa.string()),  # JSON list for the chat template
        _required("chosen", pa.string()),
        _required("rejected", pa.string()),
    ]
)
PREFERENCES = pa.schema(
    [
        _required("pair_id", pa.string()),
        _required("prompt_id", pa.string()),
        _required("round", pa.int32()),
        _required("prompt", MESSAGES),
        _required("prompt_token_ids", TOKENS),
        _required("chosen", pa.string()),
        _required("rejected", pa.string()),
        _required("chosen_token_ids", TOKENS),
        _required("rejected_token_ids", TOKENS),
        pa.field("chosen_score", pa.float64()),
        pa.field("rejected_score", pa.float64()),
        _required("label_source", pa.string()),
        pa.field("chosen_sampler_logps", pa.float64()),  # sampler_logps_sum of the completion
        pa.field("rejected_sampler_logps", pa.float64()),
        pa.field("sampler_id", pa.string()),  # identity of the policy that sampled both; null where no one policy did
    ]
)
REFERENCED = pa.schema(
    [
        *PREFERENCES,
        _required("ref_chosen_logps", pa.float32()),  # sums over the completion, nats
        _required("ref_rejected_logps", pa.float32()),
        _required("reference_id", pa.string()),
        pa.field("ref_chosen_token_logps", pa.list_(pa.float32())),  # of each token, where asked for
        pa.field("ref_rejected_token_logps", pa.list_(pa.float32())),
    ]
)
CONVERSATIONS = pa.schema(
    [
        _required("conversation_id", pa.string()),
        _required("messages", MESSAGES),
        _required("split", pa.string()),  # train or eval
        pa.field("tools", pa.string()),  # JSON list for the chat template
    ]
)
TURNS = pa.schema(
    [
        _required("turns_id", pa.string()),
        _required("conversation_id", pa.string()),
        _required("prompt_token_ids", TOKENS),  # up to where the first assistant turn of the row begins
        _required("completion_token_ids", TOKENS),  # from there to the end of the last one
        _required("assistant_positions", TOKENS),  # in the completion: what the loss is of
    ]
)


def content_id(*parts: Any) -> str:
    """128 bits of the SHA-256 of the canonical JSON of `parts`, as hex."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def prompt_id(messages: Sequence[Mapping[str, str]], tools: str | None = None) -> str:
    """Id of the canonical messages, with the tool definitions where there are any; meta does not count."""
    turns = [[m["role"], m["content"]] for m in messages]
    return content_id(turns, tools) if tools else content_id(turns)


def completion_id(prompt: str, round_: int, policy: str, k: int) -> str:
    """Id of sample `k` of a prompt in a round: K samples may be equal in text, so content alone is not a key."""
    return content_id(prompt, round_, policy, k)


def sample_seed(seed: int, round_: int, prompt: str) -> int:
    """Seed of sample 0 of a prompt; sample k has this plus k. 47 bits, so that every engine's integer holds it."""
    return int(content_id("seed", seed, round_, prompt)[:12], 16) >> 1


def conform(table: pa.Table, schema: pa.Schema, stage: str, key: str) -> pa.Table:
    """Select, order and cast the columns of `schema`, and check its non-null fields.

    Raises:
        SchemaError: a column is missing, does not cast, or holds a null; the message names the first bad `key`.
    """
    columns = []
    for field in schema:
        if field.name not in table.column_names:
            raise SchemaError(f"{stage}: column {field.name!r} is missing; got {table.column_names}, expected {schema.names}")
        column = table[field.name]
        if not field.nullable and column.null_count:
            row = pc.index(pc.is_null(column), True).as_py()
            raise SchemaError(
                f"{stage}: column {field.name!r} is null at {key}={table[key][row].as_py()!r}; expected {field.type}"
            )
        try:
            columns.append(column if column.type == field.type else column.cast(field.type))
        except pa.ArrowException as error:
            raise SchemaError(f"{stage}: column {field.name!r} is {column.type}, expected {field.type}: {error}") from error
    return pa.Table.from_arrays(columns, schema=schema)
