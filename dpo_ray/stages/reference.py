"""Add the reference policy's log-probabilities. Reads PREFERENCES, writes REFERENCED; drops nothing.

Runs once a round, with the very function that training uses, so training holds one model instead of two. With
`reuse: sampler` it computes a probe alone, and takes over what the engine said when it sampled the pairs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from ray.data import Dataset

from dpo_ray.config import ActorResources, Run
from dpo_ray.engines.policies import PolicyRef, policy_ref
from dpo_ray.errors import StageError
from dpo_ray.flow.artifact import read_table, write_table
from dpo_ray.flow.part_commits import Grain, Part, Slice
from dpo_ray.flow.parts import Actors, Tasks, map_parts, run_parts, split_into_parts
from dpo_ray.flow.stage import Needs, Stage, StageContext, StageOutput
from dpo_ray.learn import LOGPS_VERSION
from dpo_ray.logps_actor import COMPUTED, How, LogpsActor
from dpo_ray.logps_cache import cache_directory
from dpo_ray.sampler_logps import COLUMNS, SIDES, check_sampled, choose_probe, measure, objection
from dpo_ray.schemas import REFERENCED

VERSION = 2
GRAIN = Grain("pair_id", "pair_id", REFERENCED)
LOGPS_COLUMNS = {f"{side}_token_ids": f"ref_{side}_logps" for side in SIDES}


def stage(config: Run, round_: int, reference: str) -> Stage:
    """Stage of round `round_` under the policy that the stage `reference` committed."""
    block = config.reference

    def run(context: StageContext) -> StageOutput:
        policy = policy_ref(context.inputs["reference"], trust_remote_code=config.trust_remote_code)

        def add(ds: Dataset) -> Dataset:
            ds = add_logps(ds, policy, own_how(config, policy.identity), LOGPS_COLUMNS, block.resources)
            name = functools.partial(_name_reference, identity=policy.identity)
            return map_parts(ds, name, Tasks(cpus=0.1))

        parts = split_into_parts(context.inputs["pairs"], block.resources.rows_per_part)
        if block.reuse == "none":
            return run_parts(add, parts, context, GRAIN, stage="reference", count=count_tokens)
        probed = probe_sampler(config, context, policy.identity, add)
        take = functools.partial(_take_from_sampler, identity=policy.identity)
        reuse = lambda ds: map_parts(ds, take, Tasks())
        return replace(run_parts(reuse, parts, context, GRAIN, stage="reference", ends=Tasks()), metrics=probed)

    return Stage(
        name="reference",
        round=round_,
        version=VERSION,
        config={
            "dtype": config.train.dtype,
            "logps_version": LOGPS_VERSION,
            "per_token": per_token(config),
            "reuse": block.reuse,
            **({"beta": config.train.beta} if block.reuse == "sampler" else {}),  # it scales what the probe allows
        },
        inputs={"pairs": f"round_{round_:02d}/pair", "reference": reference},
        run=run,
        needs=needs(config),
        resources=block.resources.model_dump(mode="json"),
    )


def per_token(config: Run) -> bool:
    return config.reference.per_token or config.train.ld_alpha is not None


def needs(config: Run) -> Needs:
    resources = config.reference.resources
    return Needs(resources.min_actors, resources.cpus, resources.gpus, "logps actor", 0.25, resources.node_labels)


def how(config: Run) -> How:
    """What training and evaluation must have in common with this stage."""
    return How(config.train.dtype, config.train.share_prompt, config.reference.max_batch_tokens)


def own_how(config: Run, reference: str) -> How:
    """As this stage computes under the policy `reference` (an identity): with the cache, per token where asked to."""
    asked = how(config)._replace(per_token=per_token(config))
    return asked._replace(cache=cache_directory(config.root, reference, asked.dtype)) if config.reference.cache else asked


def add_logps(ds: Dataset, policy: PolicyRef, how: How, columns: dict[str, str], resources: ActorResources) -> Dataset:
    """For each (completion column -> output column), add the completion's log-probability under `policy`, in nats.

    Adds COMPUTED too: how many values of a row were not in the cache.
    """
    actors = Actors(resources.min_actors, resources.max_actors, resources.cpus, resources.gpus, resources.node_labels)
    return map_parts(ds, LogpsActor, actors, policy, how, columns, resources.gpus > 0, resources.cpus)


def probe_sampler(config: Run, context: StageContext, reference: str, add: Callable[[Dataset], Dataset]) -> dict[str, float]:
    """Compute the values of a few pairs with `add`, as the stage would, and compare the engine's with them.

    Returns:
        The metrics of the stage: how far off the engine is, and what the probe computed.

    Raises:
        StageError: the reference did not sample every pair, or the engine is too far off.
    """
    pairs, directory = context.inputs["pairs"], f"{context.directory}/probe"
    ids: list[str] = []
    gaps: list[np.ndarray] = []
    for file in pairs.tables():
        table = read_table(pairs.uri(file), ["pair_id", "sampler_id", *COLUMNS, *(f"{side}_token_ids" for side in SIDES)])
        check_sampled(table, reference)
        ids += table["pair_id"].to_pylist()
        gaps.append(np.abs(np.diff(_lengths(table), axis=1))[:, 0])
    chosen = pa.array(choose_probe(ids))
    tables = (read_table(pairs.uri(file)) for file in pairs.tables())
    sample = pa.concat_tables([table.filter(pc.is_in(table["pair_id"], chosen)) for table in tables])
    write_table(directory, "pairs.parquet", sample)
    rows = config.reference.resources.rows_per_part
    cuts = [(at, min(at + rows, sample.num_rows)) for at in range(0, sample.num_rows, rows)]
    parts = [Part(f"part-{i:05d}", (Slice(f"{directory}/pairs.parquet", *cut),)) for i, cut in enumerate(cuts)]
    # Not in the stage's files: the output is what the engine said, whatever the rounding of the probe.
    computed = run_parts(add, parts, context, GRAIN, stage="reference probe", count=count_tokens, directory=directory)
    table = pa.concat_tables(read_table(f"{directory}/{file.path}") for file in computed.files)
    sampler, exact = (np.stack([table[c] for c in of], axis=1) for of in (COLUMNS, [f"ref_{side}_logps" for side in SIDES]))
    probe = measure(sampler, exact, _lengths(table), np.concatenate(gaps), config.train.beta)
    if reason := objection(probe):
        raise StageError(f"reference: {reason}")
    figures = {"probe_pairs": probe.pairs, "sampler_bias": probe.bias, "sampler_error_p99": probe.error_p99}
    return {**computed.metrics, **figures, "sampler_length_reward": probe.length_reward}


def _lengths(table: pa.Table) -> np.ndarray:
    """(pairs, 2) tokens of chosen and rejected."""
    return np.stack([pc.list_value_length(table[f"{side}_token_ids"]).to_numpy() for side in SIDES], axis=1)


def count_tokens(table: pa.Table) -> dict[str, float]:
    """Of one part: tokens as the reference reads them, the prompt twice, and completions whose values were computed."""
    sizes = {c: sum(map(len, table[c].to_pylist())) for c in ("prompt_token_ids", "chosen_token_ids", "rejected_token_ids")}
    tokens = 2 * sizes["prompt_token_ids"] + sizes["chosen_token_ids"] + sizes["rejected_token_ids"]
    return {"tokens": tokens, "computed": float(sum(table[COMPUTED].to_pylist()))}


def _take_from_sampler(table: pa.Table, identity: str) -> pa.Table:
    for side in SIDES:
        table = table.append_column(f"ref_{side}_logps", table[f"{side}_sampler_logps"].cast(pa.float32()))
        table = table.append_column(f"ref_{side}_token_logps", pa.nulls(table.num_rows, pa.list_(pa.float32())))
    return _name_reference(table, identity)


def _name_reference(table: pa.Table, identity: str) -> pa.Table:
    return table.append_column("reference_id", pa.array([identity] * table.num_rows, pa.string()))
