"""Sample K completions of each prompt. Reads PROMPTS, writes COMPLETIONS; drops prompts that do not render or fit.

The chat template is applied once, here. Token ids and finish reasons are kept as the engine returned them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa
from ray.data import Dataset

from dpo_ray.config import Generate, RunConfig, Sampling
from dpo_ray.engines.policies import PolicyRef, policy_ref
from dpo_ray.engines.pool import EnginePool
from dpo_ray.engines.requests import EngineSettings, Request, Sample
from dpo_ray.flow.artifact import Artifact
from dpo_ray.flow.part_commits import Grain, Part
from dpo_ray.flow.parts import Tasks, map_parts, mark_dropped, run_parts
from dpo_ray.flow.stage import EngineSpec, Needs, Stage, StageContext, StageOutput
from dpo_ray.schemas import COMPLETION, COMPLETIONS, TOKENS, completion_id, sample_seed

VERSION = 1
GRAIN = Grain("prompt_id", "prompt_id", COMPLETIONS)
# Engine arguments that change speed and memory, never what is sampled beyond rounding.
SPEED_ARGS = {"gpu_memory_utilization", "max_num_seqs", "max_num_batched_tokens", "swap_space", "cpu_offload_gb"}


def stage(
    config: RunConfig, round_: int, start: str, slice_of_round: Callable[[Artifact, RunConfig, int], list[Part]]
) -> Stage:
    """Stage of round `round_`, sampling from the policy that the stage `start` committed."""
    block = config.generate

    def run(context: StageContext) -> StageOutput:
        policy = policy_ref(context.inputs["policy"], trust_remote_code=config.trust_remote_code)
        return run_parts(
            lambda ds: generate(ds, context.engine, policy, block, block.sampling, round_, config.seed, block.num_completions),
            slice_of_round(context.inputs["prompts"], config, round_),
            context,
            GRAIN,
            stage="generate",
            ends=tasks(context.engine, block),
            max_dropped=block.max_dropped,
            count=count_completions,
        )

    return Stage(
        name="generate",
        round=round_,
        version=VERSION,
        config={"seed": config.seed, "prompts_per_round": config.prompts_per_round, **result_config(block)},
        inputs={"prompts": "prompts", "policy": start},
        run=run,
        needs=engine_needs(block),
        engine=engine_spec(config),
        resources=block.resources.model_dump(mode="json"),
    )


def result_config(block: Generate) -> dict[str, Any]:
    """What of the block decides the result."""
    config = block.model_dump(mode="json", exclude={"resources", "max_dropped", "max_engine_crashes"})
    config["engine_args"] = {k: v for k, v in block.engine_args.items() if k not in SPEED_ARGS}
    return config


def engine_needs(block: Generate) -> Needs:
    resources = block.resources
    return Needs(resources.min_actors, resources.cpus, resources.gpus, "engine", 0.25, resources.node_labels)


def engine_spec(config: RunConfig) -> EngineSpec:
    """The engine that generate and evaluate share."""
    block, resources = config.generate, config.generate.resources
    samplings = [block.sampling, *([config.evaluate.sampling] if config.evaluate.sampling else [])]
    settings = EngineSettings(
        kind=block.engine,
        dtype=block.dtype,
        max_model_len=block.max_prompt_tokens + max(s.max_new_tokens for s in samplings),
        engine_args=block.engine_args,
        tensor_parallel=resources.tensor_parallel,
        gpus=resources.gpus,
        cpus=resources.cpus,
        parts_in_flight=resources.parts_in_flight,
        closed=block.deterministic,
        node_labels=resources.node_labels,
    )

    def start(inputs: Mapping[str, Artifact]) -> EnginePool:
        first = inputs.get("start", inputs["policy"])  # evaluate samples from the round's start first
        policy = policy_ref(first, trust_remote_code=config.trust_remote_code)
        return EnginePool(settings, policy, resources.min_actors, resources.max_actors)

    return EngineSpec(repr(settings), start)


def generate(
    ds: Dataset,
    engine: EnginePool,
    policy: PolicyRef,
    block: Generate,
    sampling: Sampling,
    round_: int,
    seed: int,
    num_completions: int,
) -> Dataset:
    """Add round, prompt_token_ids and completions to rows of PROMPTS. Engines of another policy are replaced first."""
    engine.use(policy)
    parameters = {**sampling.model_dump(), "logps": block.sampler_logps}

    def sample(table: pa.Table) -> pa.Table:
        prompts = table.select(["prompt", "tools"]).to_pylist()
        rendered = engine.render(prompts, block.chat_template_kwargs, block.max_prompt_tokens)
        token_ids = [ids for ids, _ in rendered]
        table = mark_dropped(table, [reason for _, reason in rendered])
        ids = table["prompt_id"].to_pylist()
        keep = [i for i, (_, reason) in enumerate(rendered) if reason is None]
        requests = [Request(token_ids[i], sample_seed(seed, round_, ids[i]), num_completions) for i in keep]
        answers = engine.generate(requests, parameters, block.max_engine_crashes) if keep else []
        sampled = dict(zip(keep, answers, strict=True))
        crashed = {i for i, samples in sampled.items() if samples is None}
        table = mark_dropped(table, ["engine_crash" if i in crashed else None for i in range(table.num_rows)])
        completions = [
            [_completion(s, ids[i], round_, policy, k, seed) for k, s in enumerate(sampled.get(i) or [])]
            for i in range(table.num_rows)
        ]
        table = table.append_column("round", pa.array([round_] * table.num_rows, pa.int32()))
        table = table.append_column("prompt_token_ids", pa.array(token_ids, TOKENS))
        return table.append_column("completions", pa.array(completions, pa.list_(COMPLETION)))

    return map_parts(ds, sample, tasks(engine, block))


def tasks(engine: EnginePool, block: Generate) -> Tasks:
    """The tasks that wait for the engines: as many as the parts in flight."""
    return Tasks(cpus=0.1, at_a_time=engine.count * block.resources.parts_in_flight)


def count_completions(table: pa.Table) -> dict[str, float]:
    """Counters of one part: completions, their tokens, and how many were cut by length."""
    if not table.num_rows:
        return {}
    flat = table["completions"].combine_chunks().flatten()
    cut = sum(r == "length" for r in flat.field("finish_reason").to_pylist())
    return {"completions": len(flat), "tokens": len(flat.field("token_ids").flatten()), "cut_by_length": cut}


def _completion(sample: Sample, prompt: str, round_: int, policy: PolicyRef, k: int, seed: int) -> dict[str, Any]:
    return {
        "completion_id": completion_id(prompt, round_, policy.identity, k),
        "text": sample.text,
        "token_ids": sample.token_ids,
        "finish_reason": sample.finish_reason,
        "seed": sample_seed(seed, round_, prompt) + k,
        "sampler_logps_sum": sample.logps_sum,
        "policy": policy.identity,
        "drop_reason": None,
    }
