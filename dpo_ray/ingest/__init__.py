"""Formats of existing preferences, one file each: a row of a source to a Comparison, or the reason why it is none."""

from __future__ import annotations

from typing import NamedTuple


class Comparison(NamedTuple):
    """One prompt and its two completions, as text."""

    prompt: list[dict[str, str]]
    """Chat messages; the last one is the user's or a tool's."""
    chosen: str
    rejected: str
