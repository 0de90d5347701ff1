"""Tokenise conversations, once. Reads CONVERSATIONS, writes TURNS; drops conversations by reason.

One conversation gives one row, or several where the chat template renders earlier turns in another way (`learn/turns.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pyarrow as pa
from ray.data import Dataset

from dpo_ray.config import Conversations, SftRun
from dpo_ray.engines.policies import PolicyRef, policy_ref
from dpo_ray.engines.render import cached_tokenizer
from dpo_ray.errors import ConfigError
from dpo_ray.flow.artifact import Artifact
from dpo_ray.flow.part_commits import Grain, Part
from dpo_ray.flow.parts import Tasks, map_parts, mark_dropped, run_parts
from dpo_ray.flow.stage import Needs, Stage, StageContext, StageOutput
from dpo_ray.schemas import TOKENS, TURNS, content_id

VERSION = 1
GRAIN = Grain("conversation_id", "turns_id", TURNS)
_COLUMNS = ("prompt_token_ids", "completion_token_ids", "assistant_positions")


def stage(config: SftRun, start: str, parts: Callable[[Artifact], list[Part]]) -> Stage:
    """The stage, with the tokenizer of the policy that the stage `start` committed."""
    block = config.conversations

    def run(context: StageContext) -> StageOutput:
        policy = policy_ref(context.inputs["policy"], trust_remote_code=config.trust_remote_code)
        return run_parts(
            lambda ds: tokenize(ds, policy, block),
            parts(context.inputs["conversations"]),
            context,
            GRAIN,
            stage="tokenize",
            ends=tasks(block),
            max_dropped=block.max_dropped,
            count=count_tokens,
        )

    return Stage(
        name="tokenize",
        round=None,
        version=VERSION,
        config=result_config(block),
        inputs={"conversations": "conversations", "policy": start},
        run=run,
        needs=Needs(1, block.resources.cpus, 0.0, "tokenize task", node_labels=block.resources.node_labels),
        resources=block.resources.model_dump(mode="json"),
    )


def result_config(block: Conversations) -> dict[str, Any]:
    """What of the block decides the token ids."""
    return block.model_dump(mode="json", include={"max_tokens", "chat_template_kwargs"})


def tasks(block: Conversations) -> Tasks:
    return Tasks(block.resources.cpus, node_labels=block.resources.node_labels)


def tokenize(ds: Dataset, policy: PolicyRef, block: Conversations) -> Dataset:
    """Turn rows of CONVERSATIONS into rows of TURNS; a conversation that cannot be used keeps its row, marked."""

    def turns(table: pa.Table) -> pa.Table:
        from dpo_ray.learn.tokens import turn_end_id

        tokenizer = cached_tokenizer(policy)
        end_id = turn_end_id(tokenizer, block.chat_template_kwargs)
        source: list[int] = []
        reasons: list[str | None] = []
        rows: list[tuple[list[int], ...]] = []
        for i, row in enumerate(table.select(["messages", "tools"]).to_pylist()):
            fitted, reason = fit(tokenizer, row["messages"], row["tools"], end_id, block)
            for one in fitted or [([], [], [])]:
                source.append(i)
                reasons.append(reason)
                rows.append(tuple(one))
        taken = mark_dropped(table.take(source), reasons)
        ids = [content_id(key, *own) for key, own in zip(taken["conversation_id"].to_pylist(), rows, strict=True)]
        taken = taken.append_column("turns_id", pa.array(ids, pa.string()))
        for name, column in zip(_COLUMNS, zip(*rows, strict=True), strict=True):
            taken = taken.append_column(name, pa.array(column, TOKENS))
        return taken

    return map_parts(ds, turns, tasks(block))


def fit(tokenizer: Any, messages: list, tools: str | None, end_id: int, block: Conversations) -> tuple[list[Any], str | None]:
    """The rows of a conversation as learn.turns.Turns, or none and the drop reason.

    Raises:
        ConfigError: the tokenizer or its template is wrong for every conversation.
    """
    from dpo_ray.learn.turns import turn_rows

    try:
        rows = turn_rows(
            tokenizer,
            messages,
            end_id,
            tools=json.loads(tools) if tools else None,
            chat_template_kwargs=dict(block.chat_template_kwargs),
        )
    except ConfigError:
        raise
    except Exception as error:  # the user's template may raise anything, on this conversation alone
        return [], f"template_error: {error}"[:200]
    if any(len(row.prompt) + len(row.completion) > block.max_tokens for row in rows):
        return [], "conversation_too_long"
    return rows, None


def count_tokens(table: pa.Table) -> dict[str, float]:
    """Counters of one part: all tokens of its rows, and those that the loss is of."""
    sizes = {c: float(sum(map(len, table[c].to_pylist()))) for c in _COLUMNS}
    targets = sizes.pop("assistant_positions")
    return {"tokens": sum(sizes.values()), "assistant_tokens": targets}
