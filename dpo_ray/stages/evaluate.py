"""Say whether the round helped: the new policy against the one it started from, on held-out prompts.

Samples every policy with the same seeds, scores with the same scorer, and writes `metrics.json` and `samples.jsonl`. KL is
estimated from the new policy's samples at temperature 1; implicit-reward accuracy on pairs of the starting policy's samples.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pyarrow as pa
from ray.data import Dataset

from dpo_ray import ranking
from dpo_ray.config import RunConfig, Sampling
from dpo_ray.engines.policies import PolicyRef, policy_ref
from dpo_ray.errors import StageError
from dpo_ray.flow import fit, storage
from dpo_ray.flow.artifact import Artifact, FileRecord, read_table, record_files, write_table
from dpo_ray.flow.part_commits import Grain, Part, Slice
from dpo_ray.flow.parts import Tasks, run_parts
from dpo_ray.flow.stage import EngineSpec, Needs, Stage, StageContext, StageOutput
from dpo_ray.schemas import COMPLETIONS, SCORED, TOKENS

VERSION = 1
SEQUENCES = pa.schema(
    [
        pa.field("sequence_id", pa.string(), nullable=False),
        pa.field("prompt_token_ids", TOKENS, nullable=False),
        pa.field("completion_token_ids", TOKENS, nullable=False),
    ]
)
AT_TEMPERATURE_1 = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
NO_PENALTY = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
MAX_ENGINE_MISMATCH = 0.1
"""Nats a token, far above the rounding of bfloat16."""


class Steps(NamedTuple):
    """What evaluate borrows from the other stages; the pipeline hands it over."""

    held_out: Callable[[Artifact, RunConfig], list[Part]]
    generate: Callable[[Dataset, Any, PolicyRef, Sampling, int], Dataset]
    """(PROMPTS rows, engine, policy, sampling, number of completions) -> COMPLETIONS rows."""
    generate_tasks: Callable[[Any], Tasks]
    """engine -> the tasks that `generate` runs as."""
    score: Callable[[Dataset], Dataset]
    score_tasks: Tasks | None
    pair: Callable[[dict[str, Any]], list[dict[str, Any]]]
    """One row of SCORED -> rows of PREFERENCES."""
    logps: Callable[[Dataset, PolicyRef], Dataset]
    """SEQUENCES rows -> the same with `logps`."""
    logps_needs: Needs
    score_needs: Needs
    score_sources: Callable[[], dict[str, str]]
    score_config: dict[str, Any]


def stage(config: RunConfig, round_: int, start: str, reference: str, engine: EngineSpec, needs: Needs, steps: Steps) -> Stage:
    """Stage of round `round_`; `start` and `reference` are keys of stages that committed a policy."""
    inputs = {"prompts": "prompts", "start": start, "policy": f"round_{round_:02d}/train", "reference": reference}
    if round_ > 0:
        inputs["initial"] = "policy"
    block = config.evaluate
    return Stage(
        name="evaluate",
        round=round_,
        version=VERSION,
        config={
            "seed": config.seed,
            "beta": config.train.beta,
            "dtype": config.train.dtype,
            "score": steps.score_config,
            "pair": config.pair.model_dump(mode="json", exclude={"resources"}),
            "generate": config.generate.model_dump(
                mode="json", include={"engine", "dtype", "max_prompt_tokens", "chat_template_kwargs", "deterministic"}
            ),
            **block.model_dump(mode="json", exclude={"resources", "sampling"}),
            "sampling": sampling(config).model_dump(mode="json"),
        },
        inputs=inputs,
        external=steps.score_sources,
        run=lambda context: _evaluate(config, context, steps),
        needs=needs,
        engine=engine,
        resources=block.resources.model_dump(mode="json"),
    )


def sampling(config: RunConfig) -> Sampling:
    return config.evaluate.sampling or config.generate.sampling


def _evaluate(config: RunConfig, context: StageContext, steps: Steps) -> StageOutput:
    block, how = config.evaluate, sampling(config)
    plain = how.model_copy(update=AT_TEMPERATURE_1 | NO_PENALTY)
    prompts = steps.held_out(context.inputs["prompts"], config)
    refs = {
        role: policy_ref(context.inputs[role], trust_remote_code=config.trust_remote_code)
        for role in ("start", "policy", "reference", "initial")
        if role in context.inputs
    }
    start_completions = max(block.num_completions, block.best_of, 2)  # two make a pair for the implicit rewards
    counts = {"start": start_completions, "policy": block.num_completions, "initial": block.num_completions}
    sampled = {
        role: _sample(context, steps, prompts, refs[role], how, counts[role], f"samples/{role}")
        for role in ("start", "initial", "policy")  # the policy last: its engine is what the next round begins with
        if role in refs
    }
    if how != plain:
        sampled["kl"] = _sample(context, steps, prompts, refs["policy"], plain, 1, "samples/kl")
    if not (fit.fits_now(steps.logps_needs) and fit.fits_now(steps.score_needs)):
        context.release_engine()

    scored = {
        role: _rows(context, _score(context, steps, table, role), f"scored/{role}")
        for role, table in sampled.items()
        if role != "kl"
    }
    pairs = [p for row in scored["start"] for p in steps.pair({**row, "_part": None}) if p.get("pair_id")]
    kl_rows = _rows(context, sampled["kl"], "samples/kl") if "kl" in sampled else scored["policy"]
    sequences = pa.Table.from_pylist([*_kl_sequences(kl_rows), *_pair_sequences(pairs)], schema=SEQUENCES)
    file = write_table(context.directory, "sequences.parquet", sequences)
    logps = {role: _logps(context, steps, file, refs[role], f"logps/{role}") for role in ("policy", "reference")}

    mismatch = engine_mismatch(kl_rows, logps["policy"])
    if mismatch > MAX_ENGINE_MISMATCH:
        raise StageError(
            f"evaluate: the engine's log-probabilities of its own samples are {mismatch:.3g} nats a token away from those of "
            f"{refs['policy'].path} (rounding stays below {MAX_ENGINE_MISMATCH:g}): it does not sample from that policy. "
            "Check that it loads this architecture as transformers does; `generate.engine: hf` samples with transformers"
        )
    metrics = compare(config, scored, logps["policy"], logps["reference"], pairs) | {"engine_mismatch": mismatch}
    storage.write_json(f"{context.directory}/metrics.json", metrics)
    lines = [json.dumps(s, ensure_ascii=False) for s in samples_for_people(scored)]
    storage.write_bytes(f"{context.directory}/samples.jsonl", ("\n".join(lines) + "\n").encode())
    files = [f for below in ("samples", "scored", "logps") for f in record_files(context.directory, below)]
    return StageOutput(files, len(scored["start"]), len(scored["policy"]), {}, metrics)


def engine_mismatch(rows: list[dict[str, Any]], policy_logps: dict[str, float]) -> float:
    """|engine - policy| log-probability of the engine's own samples, in nats a token.

    Sampled log-probabilities are what shows that engine and trainer hold the same policy: a wrong one still writes text.
    """
    completions = [c for row in rows for c in row["completions"] if c["token_ids"]]
    errors = [abs(c["sampler_logps_sum"] - policy_logps[f"kl/{c['completion_id']}"]) for c in completions]
    return sum(errors) / max(1, sum(len(c["token_ids"]) for c in completions))


def compare(
    config: RunConfig,
    scored: dict[str, list[dict[str, Any]]],
    policy_logps: dict[str, float],
    reference_logps: dict[str, float],
    pairs: list[dict[str, Any]],
) -> dict[str, Any]:
    """The round's metrics from scored samples and log-probabilities (nats). Scores are matched by prompt_id and sample."""
    block = config.evaluate
    scores = {role: ranking.scores_by_prompt(rows, block.num_completions) for role, rows in scored.items()}
    metrics: dict[str, Any] = {"prompts": len(scored["policy"])}
    for against in ("start", "initial"):
        if against in scores:
            rate = ranking.win_rate(scores["policy"], scores[against], block.bootstrap_samples, config.seed)
            suffix = "" if against == "start" else "_initial"
            metrics |= {
                f"win_rate{suffix}": rate.value,
                f"win_rate{suffix}_low": rate.low,
                f"win_rate{suffix}_high": rate.high,
            }
            metrics[f"tie_rate{suffix}"] = rate.ties
    for role, rows in scored.items():
        suffix = "" if role == "policy" else f"_{role}"
        metrics |= {f"{k}{suffix}": v for k, v in ranking.describe(rows, block.num_completions).items()}
    if block.best_of > 1:
        metrics[f"best_of_{block.best_of}_start"] = ranking.best_of(scored["start"], block.best_of)
    log_ratios = [policy_logps[i] - reference_logps[i] for i in policy_logps if i.startswith("kl/")]
    metrics["kl"], metrics["kl_se"] = ranking.mean_and_error(log_ratios)
    if pairs:
        ratio = {i: policy_logps[i] - reference_logps[i] for i in policy_logps if not i.startswith("kl/")}
        margins = [config.train.beta * (ratio[f"chosen/{p['pair_id']}"] - ratio[f"rejected/{p['pair_id']}"]) for p in pairs]
        metrics["eval_pairs"] = len(pairs)
        metrics["eval_rewards/accuracies"] = sum(m > 0 for m in margins) / len(margins)
        metrics["eval_rewards/margins"] = sum(margins) / len(margins)
    return metrics


def samples_for_people(scored: dict[str, list[dict[str, Any]]], limit: int = 50) -> Iterator[dict[str, Any]]:
    """The first prompts with one completion of each policy and its score."""
    policy = {row["prompt_id"]: row for row in scored["policy"]}
    for row in scored["start"][:limit]:
        if other := policy.get(row["prompt_id"]):
            sides = {"start": row["completions"][0], "policy": other["completions"][0]}
            yield {
                "prompt": row["prompt"][-1]["content"],
                **{k: {"completion": c["text"], "score": c["score"]} for k, c in sides.items()},
            }


def _sample(
    context: StageContext, steps: Steps, prompts: list[Part], policy: PolicyRef, how: Sampling, n: int, below: str
) -> list[FileRecord]:
    output = run_parts(
        lambda ds: steps.generate(ds, context.engine, policy, how, n),
        prompts,
        context,
        Grain("prompt_id", "prompt_id", COMPLETIONS),
        stage=f"evaluate {below}",
        ends=steps.generate_tasks(context.engine),
        directory=f"{context.directory}/{below}",
    )
    return output.files


def _score(context: StageContext, steps: Steps, samples: list[FileRecord], role: str) -> list[FileRecord]:
    """Score the samples of one policy, file by file."""
    parts = [
        Part(f"part-{i:05d}", (Slice(f"{context.directory}/samples/{role}/{f.path}", 0, f.rows or 0),))
        for i, f in enumerate(f for f in samples if not f.path.startswith("quarantine/"))
    ]
    return run_parts(
        steps.score,
        parts,
        context,
        Grain("prompt_id", "prompt_id", SCORED),
        stage=f"evaluate scored/{role}",
        ends=steps.score_tasks,
        directory=f"{context.directory}/scored/{role}",
    ).files


def _logps(context: StageContext, steps: Steps, file: FileRecord, policy: PolicyRef, below: str) -> dict[str, float]:
    """sequence_id -> log-probability in nats under `policy`."""
    rows, size = file.rows or 0, 256
    uri = f"{context.directory}/{file.path}"
    parts = [Part(f"part-{i:05d}", (Slice(uri, at, min(at + size, rows)),)) for i, at in enumerate(range(0, rows, size))]
    schema = pa.schema([SEQUENCES.field("sequence_id"), pa.field("logps", pa.float32(), nullable=False)])
    output = run_parts(
        lambda ds: steps.logps(ds, policy),
        parts,
        context,
        Grain("sequence_id", "sequence_id", schema),
        stage=f"evaluate {below}",
        directory=f"{context.directory}/{below}",
    )
    return {row["sequence_id"]: row["logps"] for row in _rows(context, output.files, below)}


def _rows(context: StageContext, files: list[FileRecord], below: str) -> list[dict[str, Any]]:
    kept = [f for f in files if not f.path.startswith("quarantine/")]
    return [row for f in kept for row in read_table(f"{context.directory}/{below}/{f.path}").to_pylist()]


def _kl_sequences(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for row in rows:
        for completion in row["completions"]:
            if completion["token_ids"]:
                yield _sequence(f"kl/{completion['completion_id']}", row["prompt_token_ids"], completion["token_ids"])


def _pair_sequences(pairs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for p in pairs:
        for side in ("chosen", "rejected"):
            yield _sequence(f"{side}/{p['pair_id']}", p["prompt_token_ids"], p[f"{side}_token_ids"])


def _sequence(sequence_id: str, prompt: list[int], completion: list[int]) -> dict[str, Any]:
    return {"sequence_id": sequence_id, "prompt_token_ids": prompt, "completion_token_ids": completion}
