"""Choose chosen and rejected by score. Reads SCORED, writes PREFERENCES; a prompt without a pair is dropped by reason.

Prompts in == prompts with a pair + prompts dropped by reason; a prompt can give several pairs.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import pyarrow as pa
from ray.data import Dataset

from dpo_ray.config import Pair, RunConfig
from dpo_ray.flow.part_commits import DROP_REASON, PART, Grain
from dpo_ray.flow.parts import Tasks, map_parts, run_parts, split_into_parts
from dpo_ray.flow.stage import Needs, Stage, StageContext, StageOutput
from dpo_ray.schemas import PREFERENCES, content_id

VERSION = 2
GRAIN = Grain("prompt_id", "pair_id", PREFERENCES)
# Inside the stage a dropped prompt has no pair, so the pair's columns can be null; conform() checks the kept rows.
IN_FLIGHT = pa.schema(
    [f.with_nullable(True) for f in PREFERENCES] + [pa.field(PART, pa.string()), pa.field(DROP_REASON, pa.string())]
)


def stage(config: RunConfig, round_: int) -> Stage:
    def run(context: StageContext) -> StageOutput:
        parts = split_into_parts(context.inputs["scored"], config.pair.resources.rows_per_part)
        return run_parts(
            lambda ds: pair(ds, config.pair, config.seed),
            parts,
            context,
            GRAIN,
            stage="pair",
            ends=tasks(config.pair),
            count=count_pairs,
        )

    return Stage(
        name="pair",
        round=round_,
        version=VERSION,
        config={"seed": config.seed, **config.pair.model_dump(mode="json", exclude={"resources"})},
        inputs={"scored": f"round_{round_:02d}/score"},
        run=run,
        needs=Needs(1, config.pair.resources.cpus, 0.0, "pair task", node_labels=config.pair.resources.node_labels),
        resources=config.pair.resources.model_dump(mode="json"),
    )


def pair(ds: Dataset, block: Pair, seed: int) -> Dataset:
    """Turn rows of SCORED into rows of PREFERENCES, or one row with a drop reason."""

    def pair_table(table: pa.Table) -> pa.Table:
        rows = [out for row in table.to_pylist() for out in pair_prompt(row, block, seed)]
        return pa.Table.from_pylist(rows, schema=IN_FLIGHT)

    return map_parts(ds, pair_table, tasks(block))


def tasks(block: Pair) -> Tasks:
    return Tasks(block.resources.cpus, node_labels=block.resources.node_labels)


def pair_prompt(row: dict[str, Any], block: Pair, seed: int) -> list[dict[str, Any]]:
    """Rows of PREFERENCES for one row of SCORED; one row with a drop reason when it gives no pair.

    The reason of a prompt without a pair is that of its completions if too few were left (the commonest, by name), else
    that of the candidate pair.
    """
    usable, lost = [], Counter[str]()
    for completion in row["completions"]:
        reason = unusable(completion, block)
        if reason:
            lost[reason] += 1
        else:
            usable.append(completion)
    if len(usable) < 2:
        reason = min(lost, key=lambda r: (-lost[r], r)) if lost else "too_few_completions"
        return [_dropped(row, reason)]
    pairs, refused = [], Counter[str]()
    for chosen, rejected in candidates(usable, block, row["prompt_id"], seed):
        if reason := refusal(chosen, rejected, block):
            refused[reason] += 1
        else:
            pairs.append(_preference(row, chosen, rejected))
    return pairs or [_dropped(row, min(refused, key=lambda r: (-refused[r], r)))]


def unusable(completion: dict[str, Any], block: Pair) -> str | None:
    """Why a completion can be in no pair, or None."""
    if completion["drop_reason"]:
        return completion["drop_reason"].split(":")[0]
    if completion["score"] is None or not math.isfinite(completion["score"]):
        return "non_finite_score"
    if not completion["token_ids"] or (block.drop_empty and not completion["text"].strip()):
        return "empty"  # without tokens there is nothing to train on, whatever the config says
    if block.drop_length_cut and completion["finish_reason"] == "length":
        return "cut_by_length"
    return None


def candidates(
    usable: list[dict[str, Any]], block: Pair, prompt_id: str, seed: int
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """(chosen, rejected) by the block's method; sorting is stable, so the earlier sample wins a tie."""
    ranked = sorted(usable, key=lambda c: -c["score"])
    if block.method == "best_worst":
        yield ranked[0], ranked[-1]
    elif block.method == "random":
        a, b = sorted(random.Random(content_id("pair", seed, prompt_id)).sample(range(len(ranked)), 2))
        yield ranked[a], ranked[b]
    else:
        yield from combinations(ranked, 2)


def refusal(chosen: dict[str, Any], rejected: dict[str, Any], block: Pair) -> str | None:
    """Why two completions make no pair, or None."""
    if block.drop_identical and chosen["token_ids"] == rejected["token_ids"]:
        return "identical"
    if block.drop_ties and chosen["score"] == rejected["score"]:
        return "tie"
    if chosen["score"] - rejected["score"] < block.min_gap:
        return "below_min_gap"
    return None


def count_pairs(table: pa.Table) -> dict[str, float]:
    """Counters of one part: completion tokens of the pairs, and the sum of their score gaps."""
    gaps = zip(table["chosen_score"].to_pylist(), table["rejected_score"].to_pylist(), strict=True)
    tokens = sum(len(ids) for c in ("chosen_token_ids", "rejected_token_ids") for ids in table[c].to_pylist())
    return {"tokens": tokens, "score_gap_sum": sum(c - r for c, r in gaps)}


def _preference(row: dict[str, Any], chosen: dict[str, Any], rejected: dict[str, Any]) -> dict[str, Any]:
    return {
        **{k: row[k] for k in ("prompt_id", "round", "prompt", "prompt_token_ids", PART)},
        "pair_id": content_id(chosen["completion_id"], rejected["completion_id"]),
        "chosen": chosen["text"],
        "rejected": rejected["text"],
        "chosen_token_ids": chosen["token_ids"],
        "rejected_token_ids": rejected["token_ids"],
        "chosen_score": chosen["score"],
        "rejected_score": rejected["score"],
        "label_source": "score",
        "chosen_sampler_logps": chosen["sampler_logps_sum"],
        "rejected_sampler_logps": rejected["sampler_logps_sum"],
        "sampler_id": chosen["policy"] if chosen["policy"] == rejected["policy"] else None,
        DROP_REASON: None,
    }


def _dropped(row: dict[str, Any], reason: str) -> dict[str, Any]:
    return {**{k: row[k] for k in ("prompt_id", "round", "prompt", "prompt_token_ids", PART)}, DROP_REASON: reason}
