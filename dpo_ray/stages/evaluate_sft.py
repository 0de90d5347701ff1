"""Say whether supervised fine-tuning helped: -log p of what the assistant says in held-out conversations, before and after.

Writes `metrics.json`: the held-out loss with its standard error, as a mean over tokens and over conversations.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import pyarrow as pa
from ray.data import Dataset

from dpo_ray import ranking
from dpo_ray.config import SftRun
from dpo_ray.engines.policies import PolicyRef, policy_ref
from dpo_ray.flow import storage
from dpo_ray.flow.artifact import Artifact, read_table, record_files
from dpo_ray.flow.part_commits import Grain, Part
from dpo_ray.flow.parts import Actors, Tasks, map_parts, run_parts
from dpo_ray.flow.stage import Needs, Stage, StageContext, StageOutput
from dpo_ray.logps_actor import How, LogpsActor, per_token_name

VERSION = 1
ROLES = ("start", "policy")
SUMS = pa.schema(
    [
        pa.field("turns_id", pa.string(), nullable=False),
        pa.field("conversation_id", pa.string(), nullable=False),
        pa.field("tokens", pa.int64(), nullable=False),
        *(pa.field(f"{role}_logps", pa.float64(), nullable=False) for role in ROLES),
    ]
)


class Steps(NamedTuple):
    """What this stage borrows from the others; the pipeline hands it over."""

    held_out: Callable[[Artifact], list[Part]]
    tokenize: Callable[[Dataset, PolicyRef], Dataset]
    """CONVERSATIONS rows, tokenizer's policy -> TURNS rows."""
    tokenize_tasks: Tasks
    tokenize_config: dict[str, Any]


def stage(config: SftRun, start: str, trained: str, steps: Steps) -> Stage:
    """The stage; `start` and `trained` are keys of stages that committed a policy."""
    resources = config.evaluate.resources
    return Stage(
        name="evaluate",
        round=None,
        version=VERSION,
        config={"dtype": config.train.dtype, "tokenize": steps.tokenize_config},
        inputs={"conversations": "conversations", "start": start, "policy": trained},
        run=lambda context: _evaluate(config, context, steps),
        needs=Needs(resources.min_actors, resources.cpus, resources.gpus, "evaluation actor", 0.25, resources.node_labels),
        resources=resources.model_dump(mode="json"),
    )


def _evaluate(config: SftRun, context: StageContext, steps: Steps) -> StageOutput:
    policies = [policy_ref(context.inputs[role], trust_remote_code=config.trust_remote_code) for role in ROLES]
    how = How(config.train.dtype, config.train.share_prompt, config.evaluate.max_batch_tokens, per_token=True)
    resources = config.evaluate.resources
    actors = Actors(resources.min_actors, resources.max_actors, resources.cpus, resources.gpus, resources.node_labels)

    def score(ds: Dataset) -> Dataset:
        tokenized = steps.tokenize(ds, policies[0])
        return map_parts(tokenized, _TurnActor, actors, policies, how, resources.gpus > 0, resources.cpus)

    scored = run_parts(
        score,
        steps.held_out(context.inputs["conversations"]),
        context,
        Grain("conversation_id", "turns_id", SUMS),
        stage="evaluate",
        max_dropped=config.conversations.max_dropped,
        count=lambda table: {"tokens": float(sum(table["tokens"].to_pylist()))},
        directory=f"{context.directory}/scored",
    )
    rows = [row for f in scored.files for row in _rows(f"{context.directory}/scored/{f.path}")]
    metrics = {**scored.metrics, **summarize(rows)}
    storage.write_json(f"{context.directory}/metrics.json", metrics)
    return StageOutput(record_files(context.directory, "scored"), scored.rows_in, scored.rows_out, scored.dropped, metrics)


def _rows(path: str) -> list[dict[str, Any]]:
    return [] if "/quarantine/" in path else read_table(path).to_pylist()


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Metrics from rows of SUMS: losses are nats a token; `_se` is that of the mean over conversations."""
    tokens = sum(row["tokens"] for row in rows)
    metrics: dict[str, Any] = {"eval_conversations": len({row["conversation_id"] for row in rows}), "eval_tokens": tokens}
    for role, suffix in zip(ROLES, ("_start", ""), strict=True):
        own: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for row in rows:
            sums = own[row["conversation_id"]]
            sums[0] -= row[f"{role}_logps"]
            sums[1] += row["tokens"]
        mean, error = ranking.mean_and_error([nll / n for nll, n in own.values()])
        loss = sum(nll for nll, _ in own.values()) / tokens
        metrics |= {f"eval_loss{suffix}": loss, f"eval_perplexity{suffix}": math.exp(loss)}
        metrics |= {f"eval_conversation_loss{suffix}": mean, f"eval_conversation_loss{suffix}_se": error}
    return metrics


class _TurnActor:
    """Holds the policy and the one it started from in a Ray Data actor."""

    def __init__(self, policies: list[PolicyRef], how: How, use_gpu: bool, cpus: float) -> None:
        columns = [{"completion_token_ids": f"{role}_logps"} for role in ROLES]
        self.actors = [LogpsActor(p, how, c, use_gpu, cpus) for p, c in zip(policies, columns, strict=True)]

    def __call__(self, table: pa.Table) -> pa.Table:
        positions = table["assistant_positions"].to_pylist()
        usable = [i for i, own in enumerate(positions) if own]  # what is dropped passes through
        for role, actor in zip(ROLES, self.actors, strict=True):
            sums = [0.0] * table.num_rows
            values = actor(table.take(usable))[per_token_name(f"{role}_logps")].to_pylist() if usable else []
            for i, own in zip(usable, values, strict=True):
                sums[i] = sum(own[position] for position in positions[i])
            table = table.append_column(f"{role}_logps", pa.array(sums, pa.float64()))
        return table.append_column("tokens", pa.array([len(counted) for counted in positions], pa.int64()))
