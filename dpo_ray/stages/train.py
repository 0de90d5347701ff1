"""Train the round's policy with DPO. Reads REFERENCED, writes `policy/`: a directory that vLLM and transformers load.

With LoRA, `policy/` has the adapters merged into its weights, so that every later stage and round loads a plain policy,
and `adapter/` has them alone, as PEFT loads them.

Ray Train starts the workers (train_worker.py) and keeps the checkpoints; what they compute is learn/.
"""

from __future__ import annotations

import json
from typing import Any

from dpo_ray import train_log
from dpo_ray.config import Run
from dpo_ray.engines.policies import policy_ref
from dpo_ray.errors import DpoRayError, StageError
from dpo_ray.flow import storage
from dpo_ray.flow.artifact import record_files
from dpo_ray.flow.stage import Needs, Stage, StageContext, StageOutput
from dpo_ray.train_worker import run_worker

VERSION = 1
CHANGES_NO_RESULT = ("checkpoint_steps", "logging_steps", "report_to", "max_batch_tokens", "share_prompt")
"""But by rounding."""


def stage(config: Run, round_: int, start: str) -> Stage:
    """Stage of round `round_`, starting from the policy that the stage `start` committed."""
    block = config.train
    train_log.check_reports(block.report_to)
    return Stage(
        name="train",
        round=round_,
        version=VERSION,
        config={
            "seed": config.seed,
            **block.model_dump(mode="json", exclude={"resources", *CHANGES_NO_RESULT, "lora"}),
            **({"lora": block.lora.model_dump(mode="json")} if block.lora else {}),
        },
        inputs={"pairs": f"round_{round_:02d}/{'reference' if block.needs_reference else 'pair'}", "policy": start},
        run=lambda context: _train(config, round_, context),
        needs=Needs(block.resources.workers, block.resources.cpus, block.resources.gpus, "train worker"),
        resources=block.resources.model_dump(mode="json"),
    )


def _train(config: Run, round_: int, context: StageContext) -> StageOutput:
    import ray
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    pairs, resources = context.inputs["pairs"], config.train.resources
    rows = sum(f.rows or 0 for f in pairs.tables())
    arguments = {
        "config": config,
        "round": round_,
        "policy": policy_ref(context.inputs["policy"], trust_remote_code=config.trust_remote_code),
        "tables": [pairs.uri(f) for f in pairs.tables()],
        "table_hash": pairs.manifest.output_hash,
        "directory": context.directory,
    }
    scaling = ray.train.ScalingConfig(
        num_workers=resources.workers,
        use_gpu=resources.gpus > 0,
        resources_per_worker={"CPU": resources.cpus, **({"GPU": resources.gpus} if resources.gpus else {})},
    )
    board = ray.remote(_Board).options(num_cpus=0).remote()
    fit = ray.remote(_fit).options(num_cpus=0, max_retries=0)
    # The name holds the fingerprint: a rerun resumes its own checkpoints, and no other round's are ever picked up.
    run_config = ray.train.RunConfig(
        name=f"attempt-{context.fingerprint[:12]}",
        storage_path=f"{context.directory}/state",
        failure_config=ray.train.FailureConfig(max_failures=2),
        checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
    )
    # What is offloaded is reduced where it lies, so that CPU tensors need a backend too.
    on_gpu = "cpu:gloo,cuda:nccl" if resources.cpu_offload else "nccl"
    torch_config = TorchConfig(backend=on_gpu if resources.gpus else "gloo")
    trainer = TorchTrainer(
        run_worker,
        train_loop_config={**arguments, "board": board},
        scaling_config=scaling,
        run_config=run_config,
        torch_config=torch_config,
    )
    done = fit.remote(trainer)
    while not ray.wait([done], timeout=0.5)[0]:
        latest = ray.get(board.latest.remote())
        if latest:
            context.progress.update(*latest)
    try:
        ray.get(done)
    except ray.exceptions.RayTaskError as error:
        raise StageError(f"train: {_message(error.cause)}") from error
    if refusal := ray.get(board.refusal.remote()):
        raise StageError(f"train: {refusal}")
    metrics = [json.loads(line) for line in storage.read_bytes(f"{context.directory}/metrics.jsonl").splitlines()]
    identity = storage.read_json(f"{context.directory}/identity.json")["identity"]
    summary = {f"{when}_{k}": m[k] for when, m in (("first", metrics[0]), ("last", metrics[-1])) for k in m if k != "step"}
    return StageOutput(
        [*record_files(context.directory, "policy"), *record_files(context.directory, "adapter")],
        rows,
        rows,
        {},
        {"identity": identity, "steps": len(metrics), "tokens": sum(m["num_tokens"] for m in metrics), **summary},
    )


def _fit(trainer: Any) -> None:
    """Run the trainer in a task of its own, so that the driver can show progress meanwhile."""
    trainer.fit()


def _message(error: Any) -> str:
    """What a worker said on purpose, in its own words; else all that Ray Train says."""
    failures = [getattr(failure, "_base_exc", failure) for failure in getattr(error, "worker_failures", {}).values()]
    return next((str(failure) for failure in failures if isinstance(failure, DpoRayError)), str(error))


class _Board:
    """Where workers put their latest progress, or why they cannot train this policy, for the driver to read."""

    def __init__(self) -> None:
        self.value: tuple[int, int, dict[str, float]] | None = None
        self.why: str | None = None

    def refuse(self, why: str) -> None:
        self.why = why

    def refusal(self) -> str | None:
        return self.why

    def put(self, done: int, total: int, metrics: dict[str, float]) -> None:
        self.value = (done, total, metrics)

    def latest(self) -> tuple[int, int, dict[str, float]] | None:
        return self.value
