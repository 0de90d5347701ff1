"""Add the reference policy's log-probabilities. Reads PREFERENCES, writes REFERENCED; drops nothing.

Runs once a round, with the very function that training uses, so training holds one model instead of two.
"""

from __future__ import annotations

import functools

import pyarrow as pa
from ray.data import ActorPoolStrategy, Dataset

from dpo_ray.config import ActorResources, Run
from dpo_ray.engines.policies import PolicyRef, policy_ref
from dpo_ray.flow.parts import Grain, run_parts, split_into_parts
from dpo_ray.flow.stage import Needs, Stage, StageContext, StageOutput
from dpo_ray.learn import LOGPS_VERSION
from dpo_ray.logps_actor import COMPUTED, How, LogpsActor
from dpo_ray.logps_cache import cache_directory
from dpo_ray.schemas import REFERENCED

VERSION = 1
GRAIN = Grain("pair_id", "pair_id", REFERENCED)


def stage(config: Run, round_: int, reference: str) -> Stage:
    """Stage of round `round_` under the policy that the stage `reference` committed."""
    block = config.reference

    def run(context: StageContext) -> StageOutput:
        policy = policy_ref(context.inputs["reference"], trust_remote_code=config.trust_remote_code)
        asked = how(config)
        if block.cache:
            asked = asked._replace(cache=cache_directory(config.root, policy.identity, asked.dtype))
        columns = {f"{side}_token_ids": f"ref_{side}_logps" for side in ("chosen", "rejected")}

        def add(ds: Dataset) -> Dataset:
            ds = add_logps(ds, policy, asked._replace(per_token=per_token(config)), columns, block.resources)
            name = functools.partial(_name_reference, identity=policy.identity)
            return ds.map_batches(name, batch_size=None, batch_format="pyarrow", num_cpus=0.1)

        parts = split_into_parts(context.inputs["pairs"], block.resources.rows_per_part)
        return run_parts(add, parts, context, GRAIN, stage="reference", count=count_tokens)

    return Stage(
        name="reference",
        round=round_,
        version=VERSION,
        config={"dtype": config.train.dtype, "logps_version": LOGPS_VERSION, "per_token": per_token(config)},
        inputs={"pairs": f"round_{round_:02d}/pair", "reference": reference},
        run=run,
        needs=needs(config),
        resources=block.resources.model_dump(mode="json"),
    )


def per_token(config: Run) -> bool:
    return config.reference.per_token or config.train.ld_alpha is not None


def needs(config: Run) -> Needs:
    resources = config.reference.resources
    return Needs(resources.min_actors, resources.cpus, resources.gpus, "logps actor", beside=0.25)


def how(config: Run) -> How:
    """What training and evaluation must have in common with this stage."""
    return How(config.train.dtype, config.train.share_prompt, config.reference.max_batch_tokens)


def add_logps(ds: Dataset, policy: PolicyRef, how: How, columns: dict[str, str], resources: ActorResources) -> Dataset:
    """For each (completion column -> output column), add the completion's log-probability under `policy`, in nats.

    Adds COMPUTED too: how many values of a row were not in the cache.
    """
    return ds.map_batches(
        LogpsActor,
        fn_constructor_args=(policy, how, columns, resources.gpus > 0, resources.cpus),
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(min_size=resources.min_actors, max_size=resources.max_actors),
        num_cpus=resources.cpus,
        num_gpus=resources.gpus,
    )


def count_tokens(table: pa.Table) -> dict[str, float]:
    """Of one part: tokens as the reference reads them, the prompt twice, and completions whose values were computed."""
    sizes = {c: sum(map(len, table[c].to_pylist())) for c in ("prompt_token_ids", "chosen_token_ids", "rejected_token_ids")}
    tokens = 2 * sizes["prompt_token_ids"] + sizes["chosen_token_ids"] + sizes["rejected_token_ids"]
    return {"tokens": tokens, "computed": float(sum(table[COMPUTED].to_pylist()))}


def _name_reference(table: pa.Table, identity: str) -> pa.Table:
    return table.append_column("reference_id", pa.array([identity] * table.num_rows, pa.string()))
