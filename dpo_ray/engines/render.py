"""Apply the chat template, once: for prompts beside the engines, for existing preferences in ingest."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from dpo_ray.engines.policies import PolicyRef, local_path
from dpo_ray.errors import ConfigError

Rendered = tuple[list[int], str | None]  # prompt token ids, drop reason


def render(
    policy: PolicyRef, rows: Sequence[Mapping[str, Any]], template_kwargs: Mapping[str, Any], max_tokens: int
) -> list[Rendered]:
    """Token ids of each row's `prompt` (with its `tools`), or why it cannot be used.

    Raises:
        ConfigError: the tokenizer or its template is wrong for every row.
    """
    from dpo_ray.learn.tokens import render_prompt

    rendered: list[Rendered] = []
    for row in rows:
        tools = json.loads(row["tools"]) if row["tools"] else None
        try:
            ids = render_prompt(
                cached_tokenizer(policy), row["prompt"], tools=tools, chat_template_kwargs=dict(template_kwargs)
            )
        except ConfigError:
            raise
        except Exception as error:  # the user's template may raise anything, on this row alone
            rendered.append(([], f"template_error: {error}"[:200]))
            continue
        rendered.append((ids, None) if len(ids) <= max_tokens else ([], "prompt_too_long"))
    return rendered


@functools.lru_cache(maxsize=4)
def cached_tokenizer(policy: PolicyRef) -> Any:
    """The policy's tokenizer, loaded once a process."""
    from dpo_ray.learn.tokens import load_tokenizer

    return load_tokenizer(local_path(policy), policy.revision, policy.trust_remote_code)
