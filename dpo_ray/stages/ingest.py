"""The other way into `pair`: tokenise comparisons. Reads COMPARISONS, writes PREFERENCES; drops pairs by reason.

Text from outside is tokenised here, once, and length limits act here, once: reference and train see the same ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
from ray.data import Dataset

from dpo_ray.config import PreferenceRun, Preferences
from dpo_ray.engines.policies import PolicyRef, policy_ref
from dpo_ray.engines.render import cached_tokenizer, render
from dpo_ray.flow.artifact import Artifact
from dpo_ray.flow.part_commits import DROP_REASON, Grain, Part
from dpo_ray.flow.parts import Tasks, map_parts, mark_dropped, run_parts
from dpo_ray.flow.stage import Needs, Stage, StageContext, StageOutput
from dpo_ray.schemas import PREFERENCES, TOKENS

VERSION = 2
GRAIN = Grain("pair_id", "pair_id", PREFERENCES)
Fitted = tuple[list[int], list[int], str | None]
"""Token ids of chosen and rejected, and the drop reason."""


def stage(
    config: PreferenceRun, round_: int, start: str, slice_of_round: Callable[[Artifact, PreferenceRun, int], list[Part]]
) -> Stage:
    """Stage `pair` of round `round_`, with the tokenizer of the policy that the stage `start` committed."""
    block = config.preferences

    def run(context: StageContext) -> StageOutput:
        policy = policy_ref(context.inputs["policy"], trust_remote_code=config.trust_remote_code)
        return run_parts(
            lambda ds: ingest(ds, policy, block, round_),
            slice_of_round(context.inputs["preferences"], config, round_),
            context,
            GRAIN,
            stage="pair",
            ends=tasks(block),
            max_dropped=block.max_dropped,
            count=count_tokens,
        )

    return Stage(
        name="pair",
        round=round_,
        version=VERSION,
        config={"pairs_per_round": config.pairs_per_round, **result_config(block)},
        inputs={"preferences": "preferences", "policy": start},
        run=run,
        needs=Needs(1, block.resources.cpus, 0.0, "pair task", node_labels=block.resources.node_labels),
        resources=block.resources.model_dump(mode="json"),
    )


def result_config(block: Preferences) -> dict[str, Any]:
    """What of the block decides the token ids."""
    fields = {"label_source", "max_prompt_tokens", "max_tokens", "too_long", "chat_template_kwargs"}
    return block.model_dump(mode="json", include=fields)


def tasks(block: Preferences) -> Tasks:
    return Tasks(block.resources.cpus, node_labels=block.resources.node_labels)


def ingest(ds: Dataset, policy: PolicyRef, block: Preferences, round_: int) -> Dataset:
    """Turn rows of COMPARISONS into rows of PREFERENCES, marked where they cannot be used."""

    def tokenize(table: pa.Table) -> pa.Table:
        from dpo_ray.learn.tokens import tokenize_completion, turn_end_id

        tokenizer = cached_tokenizer(policy)
        end_id = turn_end_id(tokenizer, block.chat_template_kwargs)
        rendered = render(
            policy, table.select(["prompt", "tools"]).to_pylist(), block.chat_template_kwargs, block.max_prompt_tokens
        )
        fitted: list[Fitted] = []
        texts = zip(table["chosen"].to_pylist(), table["rejected"].to_pylist(), strict=True)
        for (prompt, reason), sides in zip(rendered, texts, strict=True):
            if reason is None:
                try:
                    chosen, rejected = (tokenize_completion(tokenizer, text, end_id) for text in sides)
                    fitted.append(fit(len(prompt), chosen, rejected, block.max_tokens, cut=block.too_long == "cut"))
                    continue
                except ValueError:
                    reason = "turn_token_in_text"
            fitted.append(([], [], reason))
        return _as_preferences(table, [ids for ids, _ in rendered], fitted, round_, block.label_source)

    return map_parts(ds, tokenize, tasks(block))


def fit(prompt_tokens: int, chosen: list[int], rejected: list[int], max_tokens: int, *, cut: bool) -> Fitted:
    """Hold prompt and completion to `max_tokens`, each side alone; a completion that is cut has no end token."""
    room = max_tokens - prompt_tokens
    if room < 1:
        return [], [], "prompt_too_long"
    if not cut and max(len(chosen), len(rejected)) > room:
        return [], [], "completion_too_long"
    chosen, rejected = chosen[:room], rejected[:room]
    return (chosen, rejected, None) if chosen != rejected else ([], [], "identical")


def count_tokens(table: pa.Table) -> dict[str, float]:
    """Counters of one part: completion tokens of the pairs."""
    return {"tokens": sum(len(ids) for c in ("chosen_token_ids", "rejected_token_ids") for ids in table[c].to_pylist())}


def _as_preferences(
    table: pa.Table, prompts: Sequence[list[int]], fitted: Sequence[Fitted], round_: int, label_source: str
) -> pa.Table:
    columns = {
        "round": pa.array([round_] * table.num_rows, pa.int32()),
        "prompt_token_ids": pa.array(prompts, TOKENS),
        "chosen_token_ids": pa.array([chosen for chosen, _, _ in fitted], TOKENS),
        "rejected_token_ids": pa.array([rejected for _, rejected, _ in fitted], TOKENS),
        "chosen_score": pa.nulls(table.num_rows, pa.float64()),  # a human says which, not by how much
        "rejected_score": pa.nulls(table.num_rows, pa.float64()),
        "label_source": pa.array([label_source] * table.num_rows, pa.string()),
        "chosen_sampler_logps": pa.nulls(table.num_rows, pa.float64()),  # nobody sampled them here
        "rejected_sampler_logps": pa.nulls(table.num_rows, pa.float64()),
        "sampler_id": pa.nulls(table.num_rows, pa.string()),
    }
    table = mark_dropped(table, [reason for _, _, reason in fitted])
    for name, column in columns.items():
        table = table.append_column(name, column)
    assert DROP_REASON in table.column_names
    return table
