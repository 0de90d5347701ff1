"""Give every completion a score. Reads COMPLETIONS, writes SCORED; drops no prompt.

A completion that the scorer cannot judge keeps its place with a drop_reason, so one bad completion does not lose its prompt.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa
from ray.data import Dataset

from dpo_ray.config import DataResources, FunctionScore, RewardModelScore, RunConfig
from dpo_ray.errors import StageError
from dpo_ray.flow.part_commits import Grain
from dpo_ray.flow.parts import Actors, Tasks, map_parts, run_parts, split_into_parts
from dpo_ray.flow.stage import Needs, Stage, StageContext, StageOutput
from dpo_ray.schemas import SCORED, SCORED_COMPLETION
from dpo_ray.scorers.function import call, function_sources, load_function

VERSION = 1
DROPPED = "dropped_completions/"
GRAIN = Grain("prompt_id", "prompt_id", SCORED)
Judgement = tuple[float | None, str | None]  # score, drop reason


def stage(config: RunConfig, round_: int) -> Stage:
    block = config.score

    def run(context: StageContext) -> StageOutput:
        parts = split_into_parts(context.inputs["completions"], block.resources.rows_per_part)
        output = run_parts(
            lambda ds: score(ds, block, config.trust_remote_code),
            parts,
            context,
            GRAIN,
            stage="score",
            ends=tasks(block),
            count=count_scores,
        )
        check_dropped(output.metrics, block.max_dropped)
        return output

    return Stage(
        name="score",
        round=round_,
        version=VERSION,
        config=result_config(block),
        inputs={"completions": f"round_{round_:02d}/generate"},
        external=lambda: sources(block),
        run=run,
        needs=needs(block),
        resources=block.resources.model_dump(mode="json"),
    )


def result_config(block: FunctionScore | RewardModelScore) -> dict[str, Any]:
    """What of the block decides the result."""
    return block.model_dump(mode="json", exclude={"resources", "max_dropped", "max_batch_tokens"})


def sources(block: FunctionScore | RewardModelScore) -> dict[str, str]:
    """Content hash of the function's source, or of the reward model."""
    if isinstance(block, FunctionScore):
        return function_sources(block.function)
    from dpo_ray.engines.policies import model_identity

    return {"model": model_identity(block.model, block.revision)}


def needs(block: FunctionScore | RewardModelScore) -> Needs:
    resources = block.resources
    if isinstance(resources, DataResources):
        return Needs(1, resources.cpus, 0.0, "scorer task", node_labels=resources.node_labels)
    return Needs(resources.min_actors, resources.cpus, resources.gpus, "reward model", 0.25, resources.node_labels)


def check_dropped(counters: Mapping[str, float], max_dropped: float) -> None:
    """Raise when more than `max_dropped` of the completions could not be scored.

    Raises:
        StageError: with the counts by reason.
    """
    dropped = {k.removeprefix(DROPPED): int(n) for k, n in counters.items() if k.startswith(DROPPED)}
    lost = sum(dropped.values())
    if lost > max_dropped * (counters["completions"] + lost):
        reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(dropped.items()))
        raise StageError(
            f"score: {lost} of {int(counters['completions']) + lost} completions could not be scored ({reasons}), more than "
            f"the allowed share of {max_dropped:g}; the error is in their drop_reason, in the stage's parts. Mend the scorer, "
            "or raise score.max_dropped"
        )


def score(ds: Dataset, block: FunctionScore | RewardModelScore, trust_remote_code: bool = False) -> Dataset:
    """Add `score` to every completion of rows of COMPLETIONS."""
    if isinstance(block, FunctionScore):
        judge = functools.partial(_judge_by_function, block=block)
        return map_parts(ds, functools.partial(_score_table, judge=judge, block=block), function_tasks(block))
    resources = block.resources
    how = Actors(resources.min_actors, resources.max_actors, resources.cpus, resources.gpus, resources.node_labels)
    return map_parts(ds, _RewardModelActor, how, block, trust_remote_code)


def tasks(block: FunctionScore | RewardModelScore) -> Tasks | None:
    """The tasks that call the function; None for a reward model, which has actors."""
    return function_tasks(block) if isinstance(block, FunctionScore) else None


def function_tasks(block: FunctionScore) -> Tasks:
    return Tasks(block.resources.cpus, node_labels=block.resources.node_labels)


def count_scores(table: pa.Table) -> dict[str, float]:
    """Counters of one part: scored completions, the sum of their scores, and completions dropped by reason."""
    counters: dict[str, float] = {"completions": 0.0, "score_sum": 0.0}
    for completions in table["completions"].to_pylist():
        for completion in completions:
            if completion["drop_reason"]:
                reason = DROPPED + completion["drop_reason"].split(":")[0]
                counters[reason] = counters.get(reason, 0.0) + 1
            elif completion["score"] is not None and completion["score"] == completion["score"]:
                counters["completions"] += 1
                counters["score_sum"] += completion["score"]
    return counters


def _score_table(
    table: pa.Table,
    judge: Callable[[list[dict[str, Any]]], list[Judgement]],
    block: FunctionScore | RewardModelScore,
) -> pa.Table:
    rows, places = [], []
    prompts = table.select(["prompt_id", "prompt", "meta"]).to_pylist()
    completions = table["completions"].to_pylist()
    for p, samples in zip(prompts, completions, strict=True):
        meta = json.loads(p["meta"]) if p["meta"] else {}
        for sample in samples:
            if sample["drop_reason"] is None:
                text = _answer(sample["text"], block.reasoning_end)
                rows.append(
                    {
                        "prompt_id": p["prompt_id"],
                        "prompt": p["prompt"],
                        "completion": text,
                        "meta": meta,
                        "finish_reason": sample["finish_reason"],
                    }
                )
                places.append(sample)
            sample["score"] = None
    for row, sample, judged in zip(rows, places, judge(rows) if rows else [], strict=True):
        sample["score"], sample["drop_reason"] = _finite(judged, row, sample, block)
    column = pa.array(completions, pa.list_(SCORED_COMPLETION))
    return table.set_column(table.column_names.index("completions"), "completions", column)


def _finite(
    judged: Judgement, row: dict[str, Any], sample: dict[str, Any], block: FunctionScore | RewardModelScore
) -> Judgement:
    value, reason = judged
    if reason is None and (value is None or not math.isfinite(value)):
        if not block.drop_non_finite:
            raise StageError(
                f"score: completion {sample['completion_id']} of prompt {row['prompt_id']} has the score {value}; expected a "
                "finite number. Mend the scorer, or set score.drop_non_finite to true"
            )
        return None, "non_finite_score"
    return judged


def _answer(text: str, reasoning_end: str | None) -> str:
    """The completion after its last reasoning marker; all of it where there is none."""
    return text.rpartition(reasoning_end)[2].lstrip() if reasoning_end else text


@functools.lru_cache(maxsize=8)
def _function(spec: str) -> Any:
    return load_function(spec)


def _judge_by_function(rows: list[dict[str, Any]], block: FunctionScore) -> list[Judgement]:
    return call(_function(block.function), rows)


class _RewardModelActor:
    """Holds the reward model in a Ray Data actor."""

    def __init__(self, block: RewardModelScore, trust_remote_code: bool) -> None:
        from dpo_ray.scorers.reward_model import RewardModel

        self.block = block
        self.model = RewardModel(
            block.model,
            revision=block.revision,
            trust_remote_code=trust_remote_code,
            dtype=block.dtype,
            use_gpu=block.resources.gpus > 0,
        )

    def __call__(self, table: pa.Table) -> pa.Table:
        return _score_table(table, self._judge, self.block)

    def _judge(self, rows: list[dict[str, Any]]) -> list[Judgement]:
        conversations = [[*r["prompt"], {"role": "assistant", "content": r["completion"]}] for r in rows]
        scores = self.model.score(conversations, max_tokens=self.block.max_tokens, max_batch_tokens=self.block.max_batch_tokens)
        return [(s, None if s is not None else "too_long_for_reward_model") for s in scores]
