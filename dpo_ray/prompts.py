"""Read a prompt source into the PROMPTS table.

In: what `sources` reads, or `quickstart`. Out: an Intake whose rows are prompts.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator
from datetime import date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any, cast
from uuid import UUID

import pyarrow as pa

from dpo_ray import schemas, sources
from dpo_ray.config import Prompts
from dpo_ray.errors import ConfigError
from dpo_ray.intake import GROUP, LARGE_MESSAGES, Intake, Parsed, Target, split_group, take_in
from dpo_ray.sources import Columns, SourceRow, columns_to_read, source_rows

ROLES = ("system", "user", "assistant", "tool")
CHAT_START = re.compile(r"""\s*\[\s*\{\s*['"](role|content)['"]\s*:""")
QUICKSTART = "quickstart"
QUICKSTART_PROMPTS, QUICKSTART_SEED = 2048, 0  # a run's seed must not change what is held out
_TEXTS = dict.fromkeys(("prompt_id", "tools", "meta"), pa.large_string())
_USABLE = pa.schema([*pa.schema({"prompt": LARGE_MESSAGES} | _TEXTS), GROUP])


def read_prompts(config: Prompts, seed: int) -> Intake:
    """Read the source; train and eval conform to PROMPTS, in an order that depends on `seed` and the prompts alone.

    A plain text is one user turn; a text that is a JSON list of objects with a role is a chat. `tools` keeps the order
    of keys (the chat template renders them so), without the null keys that Arrow adds to structs. `meta` is a JSON
    object: times become ISO text, decimals text; of duplicates, that of the first.

    Raises:
        ConfigError: the source cannot be read, a mapped column is missing, or JSON cannot hold a column of `meta`.
        StageError: more than `max_dropped` of the rows are unusable, or too few are left to hold out `eval_prompts`.
    """
    columns = _columns(config)
    target = Target(
        block="prompts",
        rows="prompts",
        source=config.source,
        key="prompt_id",
        usable=_USABLE,
        schema=schemas.PROMPTS,
        num_eval=config.eval_prompts,
        max_dropped=config.max_dropped,
        check_columns=lambda present: columns_to_read(config, columns, present, config.source),
    )
    rows = quickstart_rows(config) if config.source == QUICKSTART else source_rows(config, columns)
    return take_in(itertools.islice(rows, config.num_prompts), lambda row: prompt_row(row, config), target, seed)


def _columns(config: Prompts) -> Columns:
    mapped = [("prompt_column", config.prompt_column)]
    mapped += [("tools_column", config.tools_column)] if config.tools_column else []
    mapped += [("meta_columns", name) for name in config.meta_columns or ()]
    return Columns(tuple(mapped), others=config.meta_columns is None)


def quickstart_rows(config: Prompts) -> Iterator[SourceRow]:
    """Yield the embedded prompts."""
    from dpo_ray.quickstart import reviews

    for i, row in enumerate(reviews.prompts(config.num_prompts or QUICKSTART_PROMPTS, QUICKSTART_SEED)):
        yield SourceRow(f"quickstart:row {i}", {"prompt": row["messages"], **row["meta"]})


def source_fingerprint(config: Prompts) -> dict[str, str]:
    """Return a hash of each thing that the source names; see `sources.source_fingerprint`."""
    return quickstart_fingerprint() if config.source == QUICKSTART else sources.source_fingerprint(config)


def quickstart_fingerprint() -> dict[str, str]:
    """Return a hash of what writes the embedded prompts and conversations."""
    path = Path(__file__).parent / "quickstart" / "reviews.py"
    return {"dpo_ray/quickstart/reviews.py": hashlib.sha256(path.read_bytes()).hexdigest()}


def prompt_row(row: SourceRow, config: Prompts) -> Parsed:
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
    group = split_group(messages, prompt_id, config.split_by)
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
