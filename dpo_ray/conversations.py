"""Read a source of chats into the CONVERSATIONS table.

In: what `sources` reads, or `quickstart`. Out: an Intake whose rows are conversations that end with an assistant's turn.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from dpo_ray import schemas, sources
from dpo_ray.config import Conversations
from dpo_ray.intake import GROUP, LARGE_MESSAGES, Intake, Parsed, Target, split_group, take_in
from dpo_ray.prompts import QUICKSTART, canonical_tools, chat_messages, quickstart_fingerprint
from dpo_ray.sources import Columns, SourceRow, columns_to_read, source_rows

QUICKSTART_SEED = 1  # not that of the embedded prompts, which a round samples on
_TEXTS = dict.fromkeys(("conversation_id", "tools"), pa.large_string())
_USABLE = pa.schema([*pa.schema({"messages": LARGE_MESSAGES} | _TEXTS), GROUP])


def read_conversations(config: Conversations, seed: int) -> Intake:
    """Read the source; train and eval conform to CONVERSATIONS, in an order that depends on `seed` and the rows alone.

    Raises:
        ConfigError: the source cannot be read, or a mapped column is missing.
        StageError: more than `max_dropped` of the rows are unusable, or too few are left to hold out
            `eval_conversations`.
    """
    mapped = [("messages_column", config.messages_column), ("tools_column", config.tools_column)]
    columns = Columns(tuple((option, name) for option, name in mapped if name), others=False)
    target = Target(
        block="conversations",
        rows="conversations",
        source=config.source,
        key="conversation_id",
        usable=_USABLE,
        schema=schemas.CONVERSATIONS,
        num_eval=config.eval_conversations,
        max_dropped=config.max_dropped,
        check_columns=lambda present: columns_to_read(config, columns, present, config.source),
    )
    rows = quickstart_rows(config) if config.source == QUICKSTART else source_rows(config, columns)
    return take_in(itertools.islice(rows, config.num_conversations), lambda row: conversation_row(row, config), target, seed)


def quickstart_rows(config: Conversations) -> Iterator[SourceRow]:
    """Yield requests for reviews, each with a review."""
    from dpo_ray.quickstart import reviews

    num = config.num_conversations or reviews.NUM_CONVERSATIONS
    for i, messages in enumerate(reviews.conversations(num, QUICKSTART_SEED)):
        yield SourceRow(f"quickstart:row {i}", {config.messages_column: messages})


def source_fingerprint(config: Conversations) -> dict[str, str]:
    """Return a hash of each thing that the source names; see `sources.source_fingerprint`."""
    return quickstart_fingerprint() if config.source == QUICKSTART else sources.source_fingerprint(config)


def conversation_row(row: SourceRow, config: Conversations) -> Parsed:
    """Return the row of CONVERSATIONS with the group that it is split by, or None and the drop reason."""
    if not isinstance(row.values, dict):
        return None, row.drop_reason
    value = row.values.get(config.messages_column)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None, "malformed_json"
    if not isinstance(value, list) or not value:
        return None, "not_messages" if value else "empty_conversation"
    answer, reason = _answer(value[-1])
    if reason:
        return None, reason
    messages, reason = chat_messages(value[:-1], config.system_prompt)
    if reason:
        return None, "no_prompt" if reason == "empty_prompt" else reason
    tools: str | None = None
    if config.tools_column:
        tools, reason = canonical_tools(row.values.get(config.tools_column))
        if reason:
            return None, reason
    messages = [*messages, answer]
    try:
        conversation_id = schemas.prompt_id(messages, tools)
    except UnicodeEncodeError:  # a lone surrogate: bytes that are not UTF-8, or an escape such as \ud800
        return None, "invalid_unicode"
    group = split_group(messages, conversation_id, config.split_by)
    parsed: dict[str, Any] = {"conversation_id": conversation_id, "messages": messages, "tools": tools, "group": group}
    return parsed, None


def _answer(message: Any) -> tuple[dict[str, str], str | None]:
    """The turn that a conversation ends with; the rules for what stands before it are those of prompts."""
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        return {}, "not_messages"
    if any(key not in ("role", "content") and extra is not None for key, extra in message.items()):
        return {}, "unsupported_message_fields"
    if message["role"] != "assistant":
        return {}, "wrong_roles"
    if not isinstance(message["content"], str):
        return {}, "content_not_text" if message["content"] is not None else "empty_message"
    if not message["content"].strip():
        return {}, "empty_message"
    return {"role": "assistant", "content": message["content"]}, None
