"""The arms of `train.py`: the train stage, its workers started by Ray Train, and the loop that they run without Ray."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dpo_work import PAD, Pair

Result = dict[str, Any]
"""losses, tokens, clocks (s, at the end of each step, when its metrics are read and logged) and peaks (bytes, of each
worker). The stage also gives step_s (s, of each step alone, as it logs them) and step_peak (bytes, of worker 0 when the last
step is taken: before its checkpoint and the export)."""
NEVER = 10**9
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


class Job(NamedTuple):
    """One run of one arm."""

    model: str
    """Directory."""
    pairs: Sequence[Pair]
    batch_pairs: int
    """Pairs of a step."""
    workers: int = 0
    """Of the train stage; 0 is the bare loop."""
    threads: int = 1
    """Of each worker."""
    checkpoint_steps: int = NEVER
    """The stage always saves once more after the last step, which is behind all that is timed."""


def run(job: Job, directory: str) -> Result:
    """Run one arm in this process, which has computed nothing yet and ends afterwards; `directory` is empty."""
    return stage(job, directory) if job.workers else bare(job, directory)


def bare(job: Job, directory: str) -> Result:
    """`dpo_steps` as a user of the library calls it: one rank of FSDP2, no Ray, no log, no checkpoint."""
    os.environ["OMP_NUM_THREADS"] = str(job.threads)  # as Ray sets it for a worker
    import torch
    import torch.distributed as dist

    from dpo_ray.learn import dpo, losses, matmul, meshes, objective, optim, probe, sharded_load
    from dpo_ray.pair_table import PairTable, columns_of
    from dpo_ray.train_worker import plan_steps

    torch.set_num_threads(job.threads)
    matmul.float32_matmul_fast_path()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # pyright: ignore
    block, pairs = config_of(job, directory).train, commit_pairs(job, directory)
    table = PairTable([pairs.uri(f) for f in pairs.tables()], columns_of(block), pairs.manifest.output_hash)
    model = sharded_load.load_sharded_policy(job.model, meshes.policy_mesh("cpu", 0), compute_dtype=torch.float32)
    path = probe.choose_path(model, table.longest(), pad_token_id=PAD, share_prompt="auto")
    steps = dpo.dpo_steps(
        model,
        optim.build_optimizer(model, learning_rate=block.learning_rate, weight_decay=0.0, betas=block.adam_betas),
        table.fetch,
        plan_steps(table.lengths, block, 1, seed=0, share_prompt=path.share_prompt),
        path,
        objective.Objective([losses.Term("sigmoid")], block.beta),
        table.lengths,
        learning_rate_for=lambda step: block.learning_rate,
        max_grad_norm=block.max_grad_norm,
        pad_token_id=PAD,
        device="cpu",
    )
    log: list[dict[str, float]] = []
    clocks = []
    for (metrics,) in steps:
        log.append(metrics)
        clocks.append(time.perf_counter())
    dist.destroy_process_group()
    return {**_read(log), "clocks": clocks, "peaks": [_peak()]}


def stage(job: Job, directory: str) -> Result:
    """The train stage on a Ray of its own, with as many CPUs as the workers have."""
    os.environ["RAY_OVERRIDE_RESOURCES"] = json.dumps({"CPU": job.workers * job.threads})
    for name in ("OMP_NUM_THREADS", "RAY_ADDRESS"):
        os.environ.pop(name, None)
    import ray

    from dpo_ray.flow import cluster
    from dpo_ray.flow.artifact import Artifact, Manifest
    from dpo_ray.flow.progress import Progress
    from dpo_ray.flow.stage import StageContext
    from dpo_ray.stages import train

    cluster.connect()
    train.run_worker = watched_worker
    metrics = {"path": job.model, "identity": "start", "revision": None}
    policy = Artifact(job.model, Manifest.model_construct(metrics=metrics, files=[]))
    target = f"{directory}/train"
    with open(os.devnull, "w") as quiet:
        inputs = {"pairs": commit_pairs(job, directory), "policy": policy}
        context = StageContext(target, "benchmark", inputs, None, lambda: None, Progress(quiet))
        train.stage(config_of(job, directory), 0, "policy", "pairs").run(context)
    ray.shutdown()
    log = [json.loads(line) for line in Path(target, "metrics.jsonl").read_text().splitlines()]
    seen = [json.loads(Path(target, f"seen-{rank}.json").read_text()) for rank in range(job.workers)]
    more = {"step_s": [line["step_time_s"] for line in log], "step_peak": int(log[-1]["peak_memory_gib"] * 2**30)}
    return {**_read(log), **more, "clocks": seen[0]["clocks"], "peaks": [own["peak"] for own in seen]}


def watched_worker(arguments: dict[str, Any]) -> None:
    """What each worker runs: `run_worker`, and it leaves behind when each step was logged and its peak memory."""
    import ray.train

    from dpo_ray import train_log, train_worker

    clocks: list[float] = []
    open_log = train_log.open_log

    def clocked(*given: Any) -> train_log.Log:
        log = open_log(*given)

        def write(lines: Sequence[train_log.Line]) -> None:
            log.write(lines)
            clocks.append(time.perf_counter())

        return log._replace(write=write)

    train_log.open_log = clocked
    train_worker.run_worker(arguments)
    rank = ray.train.get_context().get_world_rank()
    Path(arguments["directory"], f"seen-{rank}.json").write_text(json.dumps({"clocks": clocks, "peak": _peak()}))


def config_of(job: Job, directory: str) -> Any:
    """The configuration of the stage: metrics are read and logged after every step, ten times as often as by default."""
    from dpo_ray.config.run import PreferenceRun

    block = {
        "beta": 0.1,
        "learning_rate": 1e-5,
        "schedule": "constant",
        "warmup_steps": 0,
        "global_batch_size": job.batch_pairs,
        "dtype": "float32",
        "logging_steps": 1,
        "checkpoint_steps": job.checkpoint_steps,
        "checkpoints_kept": 1,
        "resources": {"workers": max(1, job.workers), "cpus": job.threads},
    }
    preferences = {"kind": "hh_rlhf", "source": "not read"}
    return PreferenceRun.model_validate(
        {"name": "benchmark", "root": directory, "policy": job.model, "preferences": preferences, "train": block}
    )


def commit_pairs(job: Job, directory: str) -> Any:
    """The pairs as the reference stage leaves them. The reference is flat, so that all losses start near ln 2."""
    import numpy as np
    import pyarrow as pa

    from dpo_ray.flow.artifact import Artifact, Manifest, write_table
    from dpo_ray.pair_table import REFERENCE, ROWS

    nats = np.log(_vocabulary(Path(job.model)))
    flat = [[-nats * len(pair.chosen) for pair in job.pairs], [-nats * len(pair.rejected) for pair in job.pairs]]
    prompts, chosen, rejected, *_ = zip(*job.pairs, strict=True)
    ids = list(map(str, range(len(job.pairs))))
    names = [*ROWS, *REFERENCE, "reference_id"]
    columns = dict(zip(names, [ids, prompts, chosen, rejected, *flat, ["flat"] * len(ids)], strict=True))
    record = write_table(f"{directory}/pairs", "part-00000.parquet", pa.table(columns))
    return Artifact(f"{directory}/pairs", Manifest.model_construct(files=[record], metrics={}, identity={}))


def add_tokenizer(model: Path) -> None:
    """Put a tokenizer of the special tokens alone beside a model: the stage loads it for the token that pads."""
    from dpo_work import SPECIAL
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({token: i for i, token in enumerate(SPECIAL)}, SPECIAL[PAD]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token=SPECIAL[PAD], chat_template=TEMPLATE)
    tokenizer.save_pretrained(model)


def _vocabulary(model: Path) -> int:
    return json.loads((model / "config.json").read_text())["vocab_size"]


def _read(log: Sequence[Mapping[str, float]]) -> Result:
    return {"losses": [metrics["loss"] for metrics in log], "tokens": [int(metrics["num_tokens"]) for metrics in log]}


def _peak() -> int:
    """The most that this process has had resident, in bytes."""
    import torch

    from dpo_ray.learn import speed

    return int(speed.peak_memory_gib(torch.device("cpu")) * speed.GIB)
