"""Say whether a round on existing preferences helped: the new policy against its reference, on held-out pairs.

Nothing is sampled and no scorer is needed. Writes `metrics.json`: implicit-reward accuracy with its interval, margins,
and the KL divergence to the reference along the held-out completions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pyarrow as pa
from ray.data import Dataset

from dpo_ray import ranking
from dpo_ray.config import ActorResources, PreferenceRun, Train
from dpo_ray.engines.policies import PolicyRef, local_path, policy_ref
from dpo_ray.flow import storage
from dpo_ray.flow.artifact import Artifact, FileRecord, read_table, record_files
from dpo_ray.flow.part_commits import Grain, Part, Slice
from dpo_ray.flow.parts import Actors, Tasks, map_parts, run_parts
from dpo_ray.flow.stage import Needs, Stage, StageContext, StageOutput
from dpo_ray.intake import split_group
from dpo_ray.schemas import PREFERENCES

VERSION = 2
SIDES = ("chosen", "rejected")
MEASURES = ("logps", "ref_logps", "kl", "tokens")
COMPARED = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("opening", pa.string(), nullable=False),
        *(pa.field(f"{side}_{measure}", pa.float64(), nullable=False) for side in SIDES for measure in MEASURES),
    ]
)


class Steps(NamedTuple):
    """What this stage borrows from the others; the pipeline hands it over."""

    held_out: Callable[[Artifact, PreferenceRun], list[Part]]
    ingest: Callable[[Dataset, PolicyRef], Dataset]
    """COMPARISONS rows, tokenizer's policy -> PREFERENCES rows."""
    ingest_tasks: Tasks
    ingest_config: dict[str, Any]


def stage(config: PreferenceRun, round_: int, start: str, reference: str, steps: Steps) -> Stage:
    """Stage `evaluate` of round `round_`; `start` and `reference` are keys of stages that committed a policy."""
    block, resources = config.evaluate, config.evaluate.resources
    return Stage(
        name="evaluate",
        round=round_,
        version=VERSION,
        config={
            "seed": config.seed,
            "beta": config.train.beta,
            "dtype": config.train.dtype,
            "bootstrap_samples": block.bootstrap_samples,
            "ingest": steps.ingest_config,
        },
        inputs={
            "preferences": "preferences",
            "start": start,
            "policy": f"round_{round_:02d}/train",
            "reference": reference,
        },
        run=lambda context: _evaluate(config, context, steps),
        needs=Needs(resources.min_actors, resources.cpus, resources.gpus, "evaluation actor", 0.25, resources.node_labels),
        resources=resources.model_dump(mode="json"),
    )


def _evaluate(config: PreferenceRun, context: StageContext, steps: Steps) -> StageOutput:
    start, policy, reference = (
        policy_ref(context.inputs[role], trust_remote_code=config.trust_remote_code)
        for role in ("start", "policy", "reference")
    )
    block, resources = config.evaluate, config.evaluate.resources
    actors = Actors(resources.min_actors, resources.max_actors, resources.cpus, resources.gpus, resources.node_labels)
    pairs = run_parts(
        lambda ds: steps.ingest(ds, start),
        steps.held_out(context.inputs["preferences"], config),
        context,
        Grain("pair_id", "pair_id", PREFERENCES),
        stage="evaluate pairs",
        ends=steps.ingest_tasks,
        max_dropped=config.preferences.max_dropped,
        directory=f"{context.directory}/pairs",
    )
    compared = run_parts(
        lambda ds: map_parts(ds, _CompareActor, actors, policy, reference, config.train, block.max_batch_tokens, resources),
        _parts(f"{context.directory}/pairs", pairs.files, resources.rows_per_part),
        context,
        Grain("pair_id", "pair_id", COMPARED),
        stage="evaluate compare",
        directory=f"{context.directory}/compared",
    )
    rows = [r for f in compared.files for r in read_table(f"{context.directory}/compared/{f.path}").to_pylist()]
    metrics = summarize(rows, config.train.beta, block.bootstrap_samples, config.seed)
    storage.write_json(f"{context.directory}/metrics.json", metrics)
    files = [f for below in ("pairs", "compared") for f in record_files(context.directory, below)]
    return StageOutput(files, pairs.rows_in, pairs.rows_out, pairs.dropped, metrics)


def summarize(rows: list[dict[str, Any]], beta: float, bootstrap_samples: int, seed: int) -> dict[str, Any]:
    """Metrics from rows of COMPARED, named as TRL names them; rewards are beta * log-ratio (section 4, arXiv:2305.18290)."""
    rewards = {side: [beta * (r[f"{side}_logps"] - r[f"{side}_ref_logps"]) for r in rows] for side in SIDES}
    margins = [c - r for c, r in zip(*rewards.values(), strict=True)]
    won: dict[str, list[float]] = {}
    for row, margin in zip(rows, margins, strict=True):
        won.setdefault(row["opening"], []).append(float(margin > 0))
    accuracy = ranking.mean_by_group(won, bootstrap_samples, seed)
    margin, margin_se = ranking.mean_and_error(margins)
    kl, kl_se = ranking.mean_and_error([r[f"{side}_kl"] for r in rows for side in SIDES])
    tokens = {side: sum(r[f"{side}_tokens"] for r in rows) for side in SIDES}
    return {
        "eval_pairs": len(rows),
        "eval_conversations": len(won),
        "eval_loss": sum(math.log1p(math.exp(-abs(m))) + max(-m, 0.0) for m in margins) / len(margins),
        "eval_rewards/accuracies": accuracy.value,
        "eval_rewards/accuracies_low": accuracy.low,
        "eval_rewards/accuracies_high": accuracy.high,
        "eval_rewards/margins": margin,
        "eval_rewards/margins_se": margin_se,
        **{f"eval_rewards/{side}": sum(rewards[side]) / len(rows) for side in SIDES},
        **{f"eval_logps/{side}": sum(r[f"{side}_logps"] for r in rows) / len(rows) for side in SIDES},
        "kl": kl,
        "kl_se": kl_se,
        "kl_per_token": sum(r[f"{side}_kl"] for r in rows for side in SIDES) / sum(tokens.values()),
        **{f"mean_tokens_{side}": tokens[side] / len(rows) for side in SIDES},
    }


def _parts(directory: str, files: list[FileRecord], rows_per_part: int) -> list[Part]:
    """The tokenised pairs, file by file."""
    kept = [f for f in files if not f.path.startswith("quarantine/")]
    cuts = [(f, at) for f in kept for at in range(0, f.rows or 0, rows_per_part)]
    return [
        Part(f"part-{i:05d}", (Slice(f"{directory}/{f.path}", at, min(at + rows_per_part, f.rows or 0)),))
        for i, (f, at) in enumerate(cuts)
    ]


class _CompareActor:
    """Holds the policy and its reference in a Ray Data actor."""

    def __init__(
        self, policy: PolicyRef, reference: PolicyRef, train: Train, max_batch_tokens: int, resources: ActorResources
    ) -> None:
        import torch

        from dpo_ray.learn.matmul import float32_matmul_fast_path
        from dpo_ray.learn.policy import load_policy
        from dpo_ray.learn.tokens import load_tokenizer, pad_token_id

        torch.set_num_threads(max(1, math.ceil(resources.cpus)))
        float32_matmul_fast_path()
        self.models: list[Any] = []
        for ref in (policy, reference):
            where: dict[str, Any] = {"revision": ref.revision, "trust_remote_code": ref.trust_remote_code}
            model: Any = load_policy(local_path(ref), dtype=getattr(torch, train.dtype), **where)
            self.models.append(model.to("cuda" if resources.gpus else "cpu"))
        self.pad = pad_token_id(load_tokenizer(local_path(policy), policy.revision, policy.trust_remote_code))
        self.train, self.max_batch_tokens = train, max_batch_tokens
        self.probed: list[Any] = [None, None]

    def __call__(self, table: pa.Table) -> pa.Table:
        from dpo_ray.learn.layout import Group

        openings = [
            split_group(messages, key, "conversation")
            for messages, key in zip(table["prompt"].to_pylist(), table["prompt_id"].to_pylist(), strict=True)
        ]
        table = table.append_column("opening", pa.array(openings, pa.string()))
        sides = [table[f"{side}_token_ids"].to_pylist() for side in SIDES]
        groups = [Group(p, own) for p, *own in zip(table["prompt_token_ids"].to_pylist(), *sides, strict=True)]
        compared = self._compare(groups) if groups else []
        for i, side in enumerate(SIDES):
            rows = [(*pair[i], float(len(group.completions[i]))) for pair, group in zip(compared, groups, strict=True)]
            for m, measure in enumerate(MEASURES):
                table = table.append_column(f"{side}_{measure}", pa.array([row[m] for row in rows], pa.float64()))
        return table

    def _compare(self, groups: list[Any]) -> list[list[Any]]:
        from dpo_ray.learn.compare import compare_completions
        from dpo_ray.learn.probe import path_for

        how = {"pad_token_id": self.pad, "share_prompt": self.train.share_prompt}
        models = zip(self.models, self.probed, strict=True)
        self.probed = [path_for(model, groups, known, **how) for model, known in models]
        policy, reference = self.models
        paths, budget = [probed.path for probed in self.probed], self.max_batch_tokens
        return compare_completions(policy, reference, groups, paths, max_batch_tokens=budget, pad_token_id=self.pad)
