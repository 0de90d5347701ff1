"""Add the reference policy's log-probabilities. Reads PREFERENCES, writes REFERENCED; drops nothing.

Runs once a round, with the very function that training uses, so training holds one model instead of two.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import pyarrow as pa
from ray.data import ActorPoolStrategy, Dataset

from dpo_ray.config import ActorResources, Run
from dpo_ray.engines.policies import PolicyRef, local_path, policy_ref
from dpo_ray.errors import StageError
from dpo_ray.flow.parts import Grain, run_parts, split_into_parts
from dpo_ray.flow.stage import Needs, Stage, StageContext, StageOutput
from dpo_ray.learn import LOGPS_VERSION
from dpo_ray.schemas import REFERENCED

VERSION = 1
GRAIN = Grain("pair_id", "pair_id", REFERENCED)
Ids = tuple[int, ...]


class How(NamedTuple):
    """How log-probabilities are computed."""

    dtype: str
    share_prompt: Literal["auto", "always", "never"]
    max_batch_tokens: int


def stage(config: Run, round_: int, reference: str) -> Stage:
    """Stage of round `round_` under the policy that the stage `reference` committed."""
    block = config.reference

    def run(context: StageContext) -> StageOutput:
        policy = policy_ref(context.inputs["reference"], trust_remote_code=config.trust_remote_code)
        columns = {"chosen_token_ids": "ref_chosen_logps", "rejected_token_ids": "ref_rejected_logps"}

        def add(ds: Dataset) -> Dataset:
            ds = add_logps(ds, policy, how(config), columns, block.resources)
            name = functools.partial(_name_reference, identity=policy.identity)
            return ds.map_batches(name, batch_size=None, batch_format="pyarrow", num_cpus=0.1)

        parts = split_into_parts(context.inputs["pairs"], block.resources.rows_per_part)
        return run_parts(add, parts, context, GRAIN, stage="reference", count=count_tokens)

    return Stage(
        name="reference",
        round=round_,
        version=VERSION,
        config={"dtype": config.train.dtype, "logps_version": LOGPS_VERSION},
        inputs={"pairs": f"round_{round_:02d}/pair", "reference": reference},
        run=run,
        needs=needs(config),
        resources=block.resources.model_dump(mode="json"),
    )


def needs(config: Run) -> Needs:
    resources = config.reference.resources
    return Needs(resources.min_actors, resources.cpus, resources.gpus, "logps actor", beside=0.25)


def how(config: Run) -> How:
    """What training and evaluation must have in common with this stage."""
    return How(config.train.dtype, config.train.share_prompt, config.reference.max_batch_tokens)


def add_logps(ds: Dataset, policy: PolicyRef, how: How, columns: dict[str, str], resources: ActorResources) -> Dataset:
    """For each (completion column -> output column), add the completion's log-probability under `policy`, in nats."""
    return ds.map_batches(
        _LogpsActor,
        fn_constructor_args=(policy, how, columns, resources.gpus > 0, resources.cpus),
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(min_size=resources.min_actors, max_size=resources.max_actors),
        num_cpus=resources.cpus,
        num_gpus=resources.gpus,
    )


def count_tokens(table: pa.Table) -> dict[str, float]:
    """Tokens of one part as the reference reads them: prompt twice, chosen and rejected once."""
    sizes = {c: sum(map(len, table[c].to_pylist())) for c in ("prompt_token_ids", "chosen_token_ids", "rejected_token_ids")}
    return {"tokens": 2 * sizes["prompt_token_ids"] + sizes["chosen_token_ids"] + sizes["rejected_token_ids"]}


def _name_reference(table: pa.Table, identity: str) -> pa.Table:
    return table.append_column("reference_id", pa.array([identity] * table.num_rows, pa.string()))


class _LogpsActor:
    """Holds one policy in a Ray Data actor."""

    def __init__(self, policy: PolicyRef, how: How, columns: dict[str, str], use_gpu: bool, cpus: float) -> None:
        import torch

        from dpo_ray.learn.matmul import float32_matmul_fast_path
        from dpo_ray.learn.policy import load_policy
        from dpo_ray.learn.tokens import load_tokenizer, pad_token_id

        torch.set_num_threads(max(1, math.ceil(cpus)))
        float32_matmul_fast_path()
        path = local_path(policy)
        where: dict[str, Any] = {"revision": policy.revision, "trust_remote_code": policy.trust_remote_code}
        model: Any = load_policy(path, dtype=getattr(torch, how.dtype), **where)
        self.model = model.to("cuda" if use_gpu else "cpu")
        self.pad = pad_token_id(load_tokenizer(path, **where))
        self.how, self.columns = how, columns
        self.path: Any = None

    def __call__(self, table: pa.Table) -> pa.Table:
        prompts = [tuple(ids) for ids in table["prompt_token_ids"].to_pylist()]
        sides = {source: [tuple(ids) for ids in table[source].to_pylist()] for source in self.columns}
        logps = self._logps({pair for completions in sides.values() for pair in zip(prompts, completions, strict=True)})
        for source, target in self.columns.items():
            values = [logps[pair] for pair in zip(prompts, sides[source], strict=True)]
            for key, value in zip(table.column(0).to_pylist(), values, strict=True):
                if not (math.isfinite(value) and value <= 0.0):
                    raise StageError(
                        f"reference: {source} of {key} has the log-probability {value}; expected a finite value <= 0"
                    )
            table = table.append_column(target, pa.array(values, pa.float32()))
        return table

    def _logps(self, wanted: Iterable[tuple[Ids, Ids]]) -> dict[tuple[Ids, Ids], float]:
        """The log-probability of each (prompt, completion), every prompt computed once where the model allows it."""
        from dpo_ray.learn.batched import group_tokens, score_groups
        from dpo_ray.learn.layout import Group
        from dpo_ray.learn.probe import choose_path

        completions: dict[Ids, list[Ids]] = {}
        for prompt, completion in sorted(wanted):
            completions.setdefault(prompt, []).append(completion)
        groups = [Group(prompt, own) for prompt, own in completions.items()]
        if not groups:
            return {}
        if self.path is None:
            longest = max(groups, key=lambda group: group_tokens(group, share_prompt=True))
            self.path = choose_path(self.model, longest, pad_token_id=self.pad, share_prompt=self.how.share_prompt)
        values = score_groups(self.model, groups, self.path, max_batch_tokens=self.how.max_batch_tokens, pad_token_id=self.pad)
        return {
            (prompt, completion): value
            for (prompt, own), logps in zip(completions.items(), values, strict=True)
            for completion, value in zip(own, logps, strict=True)
        }
