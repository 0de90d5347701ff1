"""Anthropic's HH-RLHF: `chosen` and `rejected` are transcripts of a whole conversation (arXiv:2204.05862).

Every turn begins with a blank line and `Human:` or `Assistant:`; Human begins, the turns alternate, and Assistant has the
last one. The completions are the last turns; the turns before must be the same in both transcripts. They are compared,
never guessed from the common prefix: two answers that begin with the same words would lose these to the prompt.
"""

from __future__ import annotations

import re
from typing import Any

from dpo_ray.ingest import Comparison

COLUMNS = ("chosen", "rejected")
TURN = re.compile(r"\n\n(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}


def comparison(values: dict[str, Any]) -> Comparison | str:
    """Return the row's comparison, turns without the spaces around them, or the reason why it cannot be used."""
    chosen, rejected = (transcript(values.get(column)) for column in COLUMNS)
    if isinstance(chosen, str) or isinstance(rejected, str):
        return next(side for side in (chosen, rejected) if isinstance(side, str))
    if chosen[:-1] != rejected[:-1]:
        return "different_prompts"
    if any(not m["content"] for m in chosen[:-1]):
        return "empty_message"
    return Comparison(chosen[:-1], chosen[-1]["content"], rejected[-1]["content"])


def transcript(text: Any) -> list[dict[str, str]] | str:
    """Return the messages of a transcript, the assistant's last, or the reason why it is none."""
    if not isinstance(text, str):
        return "null_transcript" if text is None else "not_text"
    before, *turns = TURN.split(text)
    if before.strip() or not turns:
        return "no_transcript"
    messages = [{"role": ROLES[turns[i]], "content": turns[i + 1].strip()} for i in range(0, len(turns), 2)]
    alternate = [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
    return messages if alternate else "wrong_roles"
