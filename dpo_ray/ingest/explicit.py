"""Columns with an explicit prompt: TRL's standard (text) and conversational (messages) preference formats.

A completion is text, a list of one assistant message, or the prompt's own messages followed by one (as
ultrafeedback_binarized has it): those are compared with the prompt. A row without a prompt column is refused as a whole
(see `preferences`): a prompt guessed from the common prefix of the completions swallows the words that both begin with.
"""

from __future__ import annotations

import json
from typing import Any

from dpo_ray.config import ExplicitPreferences
from dpo_ray.ingest import Comparison
from dpo_ray.prompts import CHAT_START, chat_messages


def comparison(values: dict[str, Any], config: ExplicitPreferences) -> Comparison | str:
    """Return the row's comparison, its texts as they are, or the reason why it cannot be used."""
    prompt, reason = chat_messages(values.get(config.prompt_column))
    if reason:
        return reason
    chosen, rejected = (completion(values.get(c), prompt) for c in (config.chosen_column, config.rejected_column))
    for _, reason in (chosen, rejected):
        if reason:
            return reason
    return Comparison(prompt, chosen[0], rejected[0])


def completion(value: Any, prompt: list[dict[str, str]]) -> tuple[str, str | None]:
    """Return the text of a completion with None, or with the reason why it cannot be used."""
    if isinstance(value, str) and CHAT_START.match(value):  # messages as JSON, as CSV has them
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return "", "malformed_json"
    if isinstance(value, str):
        return value, None
    if not value:
        return "", "null_completion" if value is None else "empty_completion"
    if not isinstance(value, list) or not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value):
        return "", "not_messages"
    if any(key not in ("role", "content") and extra is not None for m in value for key, extra in m.items()):
        return "", "unsupported_message_fields"
    before, last = [(m["role"], m["content"]) for m in value[:-1]], value[-1]
    if before and before != [(m["role"], m["content"]) for m in prompt]:
        return "", "different_prompts" if last["role"] == "assistant" else "wrong_roles"
    if last["role"] != "assistant":
        return "", "wrong_roles"
    if not isinstance(last["content"], str):
        return "", "null_completion" if last["content"] is None else "content_not_text"
    return last["content"], None
