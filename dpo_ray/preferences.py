"""Read a source of existing preferences into the COMPARISONS table.

In: what `sources` reads, in a format of `ingest/`. Out: an Intake whose rows are comparisons, still text.
"""

from __future__ import annotations

import itertools
from typing import Any

import pyarrow as pa

from dpo_ray import schemas
from dpo_ray.config import ExplicitPreferences, Preferences
from dpo_ray.ingest import Comparison, explicit, hh_rlhf
from dpo_ray.intake import GROUP, LARGE_MESSAGES, Intake, Parsed, Target, split_group, take_in
from dpo_ray.prompts import canonical_tools, chat_messages
from dpo_ray.sources import Columns, SourceRow, columns_to_read, source_rows

_TEXTS = dict.fromkeys(("pair_id", "prompt_id", "opening", "tools", "chosen", "rejected"), pa.large_string())
_USABLE = pa.schema([*pa.schema({"prompt": LARGE_MESSAGES} | _TEXTS), GROUP])
NO_PROMPT = (
    ". A prompt is never guessed from what chosen and rejected have in common: give it a column of its own, or use "
    "preferences.kind `hh_rlhf` if these are transcripts of Human and Assistant"
)


def read_preferences(config: Preferences, seed: int) -> Intake:
    """Read the source; train and eval conform to COMPARISONS, in an order that depends on `seed` and the pairs alone.

    Raises:
        ConfigError: the source cannot be read, or a mapped column is missing.
        StageError: more than `max_dropped` of the rows are unusable, or too few are left to hold out `eval_pairs`.
    """
    columns = _columns(config)
    target = Target(
        block="preferences",
        rows="pairs",
        source=config.source,
        key="pair_id",
        usable=_USABLE,
        schema=schemas.COMPARISONS,
        num_eval=config.eval_pairs,
        max_dropped=config.max_dropped,
        check_columns=lambda present: columns_to_read(config, columns, present, config.source),
    )
    rows = itertools.islice(source_rows(config, columns), config.num_pairs)
    return take_in(rows, lambda row: comparison_row(row, config), target, seed)


def _columns(config: Preferences) -> Columns:
    if not isinstance(config, ExplicitPreferences):
        return Columns(tuple(("kind hh_rlhf", name) for name in hh_rlhf.COLUMNS), others=False)
    mapped = [(o, getattr(config, o)) for o in ("prompt_column", "chosen_column", "rejected_column", "tools_column")]
    return Columns(tuple((option, name) for option, name in mapped if name), others=False, advice=NO_PROMPT)


def comparison_row(row: SourceRow, config: Preferences) -> Parsed:
    """Return the row of COMPARISONS with the group that it is split by, or None and the drop reason."""
    if not isinstance(row.values, dict):
        return None, row.drop_reason
    tools: str | None = None
    if isinstance(config, ExplicitPreferences):
        found = explicit.comparison(row.values, config)
        if config.tools_column:
            tools, reason = canonical_tools(row.values.get(config.tools_column))
            if reason:
                return None, reason
    else:
        found = hh_rlhf.comparison(row.values)
    if isinstance(found, str):
        return None, found
    if reason := unusable(found):
        return None, reason
    messages, _ = chat_messages(found.prompt, config.system_prompt)
    try:
        prompt_id = schemas.prompt_id(messages, tools)
        pair_id = schemas.content_id(*(schemas.content_id(prompt_id, side) for side in (found.chosen, found.rejected)))
    except UnicodeEncodeError:  # a lone surrogate: bytes that are not UTF-8, or an escape such as \ud800
        return None, "invalid_unicode"
    parsed: dict[str, Any] = {
        "pair_id": pair_id,
        "prompt_id": prompt_id,
        "opening": split_group(messages, prompt_id, "conversation"),
        "prompt": messages,
        "tools": tools,
        "chosen": found.chosen,
        "rejected": found.rejected,
        "group": split_group(messages, prompt_id, config.split_by),
    }
    return parsed, None


def unusable(found: Comparison) -> str | None:
    """Why a comparison teaches nothing, or None."""
    if not found.chosen.strip() or not found.rejected.strip():
        return "empty_completion"
    return "identical" if found.chosen == found.rejected else None
