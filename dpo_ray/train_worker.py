"""What each training worker runs: load its shard of the policy, take every planned step, write the policy.

Batches are planned from an index of row lengths, the same on every rank, so no rank can run out of steps before another.
"""

from __future__ import annotations

import functools
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from dpo_ray.config import Run, Train
from dpo_ray.engines.policies import PolicyRef, local_path
from dpo_ray.flow import storage
from dpo_ray.pair_table import PairTable, columns_of

START_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
"""How far the loss of step 0 may lie from its known value, by compute type."""


def run_worker(arguments: dict[str, Any]) -> None:
    """Run on every worker of the trainer that stages/train.py starts; `arguments` come from there."""
    import ray.train
    import torch
    import torch.distributed as dist

    from dpo_ray import train_state
    from dpo_ray.learn import dpo, losses, matmul, objective, optim

    config: Run = arguments["config"]
    block, start, directory = config.train, arguments["policy"], arguments["directory"]
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(max(1, int(block.resources.cpus)))
        matmul.float32_matmul_fast_path()
    torch.manual_seed(config.seed)

    table = PairTable(arguments["tables"], columns_of(block))
    model, optimizer, path, pad_token_id = _load(start, block, device, world_size, table.longest())
    plan = plan_steps(table.lengths, block, world_size, seed=config.seed + arguments["round"], share_prompt=path.share_prompt)
    group: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=block.collective_timeout_s))
    owner = (arguments["state"], arguments["fingerprint"], start.identity)
    where = train_state.Where(*owner, group, context.get_local_rank())
    done, log = train_state.resume(where, model, optimizer)
    pairs_done = sum(len(rows) for step in plan[:done] for micro in step for rows in micro)
    steps = dpo.dpo_steps(
        model,
        optimizer,
        table.fetch,
        plan,
        path,
        objective.Objective([losses.Term(*term) for term in block.terms()], block.beta, block.wpo, block.ld_alpha),
        table.lengths,
        learning_rate_for=lambda step: optim.learning_rate_at(
            step, len(plan), peak=block.learning_rate, warmup_ratio=block.warmup_ratio, schedule=block.schedule
        ),
        max_grad_norm=block.max_grad_norm,
        pad_token_id=pad_token_id,
        device=device,
        start_step=done,
        start_tolerance=START_TOLERANCE[block.dtype] if arguments["reference"] == start.identity else None,
    )
    publish = functools.partial(write_log, directory)
    how = {"every": block.checkpoint_steps, "num_steps": len(plan), "kept": block.checkpoints_kept, "publish": publish}
    with train_state.saving(where, model, optimizer, **how) as save:
        for metrics in steps:
            done += 1
            log.append(metrics)
            pairs_done += sum(len(rows) for micro in plan[done - 1] for rows in micro)
            if rank == 0:
                shown = {k: metrics[k] for k in ("loss", "rewards/margins", "rewards/accuracies")}
                arguments["board"].put.remote(pairs_done, len(table) * block.epochs, shown)
            save(done, log)
    _export(model, start, directory, block, rank)
    if rank == 0:
        write_log(directory, log)


def _load(start: PolicyRef, block: Train, device: Any, world_size: int, longest: Any) -> tuple[Any, Any, Any, int]:
    """The policy with float32 master weights, sharded over all workers, its optimizer, its path and the token that pads."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh

    from dpo_ray.learn import optim, policy, probe, tokens

    path, where = local_path(start), {"revision": start.revision, "trust_remote_code": start.trust_remote_code}
    pad_token_id = tokens.pad_token_id(tokens.load_tokenizer(path, **where))
    whole: Any = policy.load_policy(path, dtype=torch.float32, **where)
    whole.to(device)
    chosen = probe.choose_path(whole, longest, pad_token_id=pad_token_id, share_prompt=block.share_prompt)
    model = policy.shard(
        whole,
        init_device_mesh(device.type, (world_size,)),
        compute_dtype=getattr(torch, block.dtype),
        activation_checkpointing=block.activation_checkpointing,
    )
    optimizer = optim.build_optimizer(
        model, learning_rate=block.learning_rate, weight_decay=block.weight_decay, betas=block.adam_betas
    )
    return model, optimizer, chosen, pad_token_id


def _export(model: Any, start: PolicyRef, directory: str, block: Train, rank: int) -> None:
    from dpo_ray.learn.policy import export_policy, policy_identity

    where = {"revision": start.revision, "trust_remote_code": start.trust_remote_code}
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "policy"
        export_policy(model, target, source=local_path(start), **where)
        if rank == 0:
            storage.delete_directory(f"{directory}/policy")
            storage.copy_directory(str(target), f"{directory}/policy")
            storage.write_json(f"{directory}/identity.json", {"identity": policy_identity(target)})


def plan_steps(lengths: np.ndarray, block: Train, world_size: int, *, seed: int, share_prompt: bool) -> list[Any]:
    """Every step of every epoch: per rank a list of micro-batches of row indices."""
    from dpo_ray.learn.batches import plan_epoch

    return [
        step
        for epoch in range(block.epochs)
        for step in plan_epoch(
            lengths,
            global_batch_size=block.global_batch_size,
            world_size=world_size,
            max_batch_tokens=block.max_batch_tokens,
            seed=seed,
            epoch=epoch,
            share_prompt=share_prompt,
        )
    ]


def write_log(directory: str, log: list[dict[str, float]]) -> None:
    """All metrics up to now, one JSON object a step."""
    from dpo_ray.train_state import lines

    storage.write_bytes(f"{directory}/metrics.jsonl", lines(log))
