"""Train a policy: with DPO on REFERENCED (PREFERENCES, for losses without a reference), or with SFT on TURNS.

Writes `policy/`: a directory that vLLM and transformers load.

With LoRA, `policy/` has the adapters merged into its weights, so that every later stage and round loads a plain policy,
and `adapter/` has them alone, as PEFT loads them.

Ray Train starts the workers (train_worker.py); train_saving.py writes the checkpoints and train_state.py reads them; what
the workers compute is learn/.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow.compute as pc

from dpo_ray import train_log
from dpo_ray.config import Run, Train, TrainBlock
from dpo_ray.engines.policies import policy_ref
from dpo_ray.errors import StageError
from dpo_ray.flow import storage
from dpo_ray.flow.artifact import Artifact, FileRecord, read_table, record_files
from dpo_ray.flow.stage import Needs, Stage, StageContext, StageOutput
from dpo_ray.train_worker import run_worker

VERSION = 1
MAX_BOARD_DEATHS = 8
CHANGES_NO_RESULT = {"resources", "checkpoint_steps", "logging_steps", "report_to", "max_batch_tokens", "share_prompt"}
CHANGES_NO_RESULT |= {"checkpoints_kept", "max_failures", "max_setup_failures", "max_preemptions", "collective_timeout_s"}
"""Settings that can change between two attempts at one result: they change it by rounding at most."""


def stage(config: Run, round_: int | None, start: str, rows: str) -> Stage:
    """Stage of round `round_` (None: of no round), from the policy of the stage `start` on the rows of the stage `rows`."""
    block = config.train
    train_log.check_reports(block.report_to)
    return Stage(
        name="train",
        round=round_,
        version=VERSION,
        config={
            "seed": config.seed,
            **block.model_dump(mode="json", exclude={*CHANGES_NO_RESULT, "lora"}),
            **({"lora": block.lora.model_dump(mode="json")} if block.lora else {}),
        },
        inputs={"pairs": rows, "policy": start},
        run=lambda context: _train(config, round_, context),
        needs=needs(block),
        resources=block.resources.model_dump(mode="json"),
    )


def needs(block: TrainBlock) -> Needs:
    resources = block.resources
    return Needs(resources.min_workers, resources.cpus, resources.gpus, "train worker", node_labels=resources.node_labels)


def _train(config: Run, round_: int | None, context: StageContext) -> StageOutput:
    import ray
    import ray.train
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from dpo_ray.train_failures import StopAtOurErrors, fit, run_until_started
    from dpo_ray.train_network import OnRaysNetwork
    from dpo_ray.train_scaling import Trainer

    pairs, block, resources = context.inputs["pairs"], config.train, config.train.resources
    rows = sum(f.rows or 0 for f in pairs.tables())
    # The name holds the fingerprint: a rerun resumes its own checkpoints, and no other round's are ever picked up.
    state, name = f"{context.directory}/state", f"attempt-{context.fingerprint[:12]}"
    # On the driver's own node, so that no other node's end takes them.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = ray.remote(_Board).options(num_cpus=0, max_restarts=MAX_BOARD_DEATHS, scheduling_strategy=here).remote()
    arguments = {
        "config": config,
        "round": round_,
        "policy": policy_ref(context.inputs["policy"], trust_remote_code=config.trust_remote_code),
        "reference": check_reference(pairs) if isinstance(block, Train) and block.needs_reference else None,
        "tables": [pairs.uri(f) for f in pairs.tables()],
        "table_hash": pairs.manifest.output_hash,
        "directory": context.directory,
        "fingerprint": context.fingerprint,
        "state": f"{state}/{name}",
        "board": board,
    }
    # What is offloaded is reduced where it lies, so that CPU tensors need a backend too.
    on_gpu = "cpu:gloo,cuda:nccl" if resources.cpu_offload else "nccl"
    if isinstance(resources.workers, tuple):
        context.release_engine()  # Ray counts how many workers fit from what nodes have, not from what is free
    filesystem, path = storage.filesystem(state)
    trainer = Trainer(
        run_worker,
        train_loop_config=arguments,
        scaling_config=ray.train.ScalingConfig(
            num_workers=resources.workers,
            use_gpu=resources.gpus > 0,
            resources_per_worker={"CPU": resources.cpus, **({"GPU": resources.gpus} if resources.gpus else {})},
            label_selector=resources.node_labels or None,
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=ray.train.FailureConfig(
                max_failures=block.max_failures,
                controller_failure_limit=block.max_setup_failures,
                max_preemption_failures=block.max_preemptions,
            ),
            callbacks=[StopAtOurErrors()],
        ),
        torch_config=OnRaysNetwork(backend=on_gpu if resources.gpus else "gloo", timeout_s=block.collective_timeout_s),
    )

    def attempt() -> None:
        done = ray.remote(fit).options(num_cpus=0, max_retries=0, scheduling_strategy=here).remote(trainer)
        while not ray.wait([done], timeout=0.5)[0]:
            if latest := _latest(board):
                context.progress.update(*latest)
        ray.get(done)

    run_until_started(attempt, max_failures=block.max_failures, max_setup_failures=block.max_setup_failures)
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


def _latest(board: Any) -> tuple[int, int, dict[str, float]] | None:
    """The workers' latest progress; None while the board starts again, for which training does not end."""
    from ray import get
    from ray.exceptions import GetTimeoutError, RayActorError

    try:
        return get(board.latest.remote(), timeout=5)
    except (RayActorError, GetTimeoutError):
        return None


def check_reference(pairs: Artifact) -> str:
    """The policy that the pairs' reference log-probabilities are of, which must be the same for every pair.

    Raises:
        StageError: they are of several policies, or of another one than the stage that wrote them was given.
    """

    def ids(file: FileRecord) -> list[str]:
        return pc.unique(read_table(pairs.uri(file), ["reference_id"])["reference_id"]).to_pylist()

    with ThreadPoolExecutor(16) as readers:
        found = sorted({one for own in readers.map(ids, pairs.tables()) for one in own})
    planned = pairs.manifest.identity.get("inputs", {}).get("reference")
    expected = [planned] if planned else found[:1]
    if not found or found != expected:
        raise StageError(
            f"train: the reference log-probabilities in {pairs.directory} are of {', '.join(found) or 'no policy'}; expected "
            f"{planned or 'one policy'} alone. Run that stage again with --redo reference"
        )
    return found[0]


class _Board:
    """Where workers put their latest progress, for the driver to read."""

    def __init__(self) -> None:
        self.value: tuple[int, int, dict[str, float]] | None = None

    def put(self, done: int, total: int, metrics: dict[str, float]) -> None:
        self.value = (done, total, metrics)

    def latest(self) -> tuple[int, int, dict[str, float]] | None:
        return self.value
