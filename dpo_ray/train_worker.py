"""What each training worker runs: load its shard of the policy, take every planned step, write the policy.

Batches are planned from an index of row lengths, the same on every rank, so no rank can run out of steps before another.
"""

from __future__ import annotations

import json
import tempfile
from typing import Any

import numpy as np

from dpo_ray.config import Run, Train
from dpo_ray.engines.policies import PolicyRef, local_path
from dpo_ray.errors import ConfigError
from dpo_ray.flow import storage
from dpo_ray.pair_table import PairTable, columns_of


def run_worker(arguments: dict[str, Any]) -> None:
    """Run on every worker of the trainer that stages/train.py starts; `arguments` come from there."""
    import ray
    import ray.train
    import torch
    import torch.distributed as dist

    from dpo_ray.learn import checkpoint, dpo, losses, matmul, objective, optim

    config: Run = arguments["config"]
    block, start, directory = config.train, arguments["policy"], arguments["directory"]
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(max(1, int(block.resources.cpus)))
        matmul.float32_matmul_fast_path()
    else:
        torch.cuda.set_device(device)  # meshes and collectives take the current one
    torch.manual_seed(config.seed)

    table = PairTable(arguments["tables"], columns_of(block))
    try:
        model, optimizer, path, pad_token_id = _load(
            start, block, device, table.longest(), seed=config.seed + arguments["round"]
        )
    except ConfigError as error:  # every rank has it, and would have it again
        ray.get(arguments["board"].refuse.remote(str(error)))
        return
    plan = plan_steps(table.lengths, block, world_size, seed=config.seed + arguments["round"], share_prompt=path.share_prompt)
    done = 0
    if latest := ray.train.get_checkpoint():
        with latest.as_directory() as saved:
            done = checkpoint.load_checkpoint(saved, model, optimizer)
    log = read_log(directory, done)
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
    )
    for metrics in steps:
        done += 1
        log.append(metrics)
        pairs_done += sum(len(rows) for micro in plan[done - 1] for rows in micro)
        if rank == 0:
            shown = {k: metrics[k] for k in ("loss", "rewards/margins", "rewards/accuracies")}
            arguments["board"].put.remote(pairs_done, len(table) * block.epochs, shown)
        if done % block.checkpoint_steps == 0 and done < len(plan):
            if rank == 0:
                write_log(directory, log)
            with tempfile.TemporaryDirectory() as shard:
                checkpoint.save_checkpoint(shard, model, optimizer, done)
                ray.train.report({"step": done}, checkpoint=ray.train.Checkpoint.from_directory(shard))
    _export(model, start, directory, rank)
    if rank == 0:
        write_log(directory, log)
    dist.barrier()


def _load(start: PolicyRef, block: Train, device: Any, longest: Any, *, seed: int) -> tuple[Any, Any, Any, int]:
    """The policy with float32 master weights, sharded over all workers, its optimizer, its path and the token that pads."""
    import ray.train
    import torch

    from dpo_ray.learn import adapters, meshes, optim, probe, sharded_load, tokens

    path, where = local_path(start), {"revision": start.revision, "trust_remote_code": start.trust_remote_code}
    pad_token_id = tokens.pad_token_id(tokens.load_tokenizer(path, **where))
    dtype, node = getattr(torch, block.dtype), ray.train.get_context().get_node_rank()
    lora = block.lora and adapters.Lora(block.lora.r, block.lora.alpha, block.lora.target_modules)
    model = sharded_load.load_sharded_policy(
        path,
        meshes.policy_mesh(device.type, node, copy_per_node=block.resources.shard == "node"),
        compute_dtype=dtype,
        activation_checkpointing=block.activation_checkpointing,
        cpu_offload=block.resources.cpu_offload,
        lora=lora,
        seed=seed,
        **where,
    )
    chosen = probe.choose_path(model, longest, pad_token_id=pad_token_id, share_prompt=block.share_prompt)
    optimizer = optim.build_optimizer(
        model, learning_rate=block.learning_rate, weight_decay=block.weight_decay, betas=block.adam_betas
    )
    return model, optimizer, chosen, pad_token_id


def _export(model: Any, start: PolicyRef, directory: str, rank: int) -> None:
    """Every worker writes and hashes its part of `policy/`; adapters, merged there, are kept in `adapter/` too."""
    import torch.distributed as dist

    from dpo_ray.learn.adapters import adapted, export_adapters
    from dpo_ray.learn.export import export_policy
    from dpo_ray.learn.policy_files import file_hashes, identity_of

    where = {"revision": start.revision, "trust_remote_code": start.trust_remote_code}
    if rank == 0:
        for made in ("policy", "adapter"):
            storage.delete_directory(f"{directory}/{made}")
    dist.barrier()
    if adapted(model):
        with tempfile.TemporaryDirectory() as scratch:
            export_adapters(model, scratch, source=start.path)
            if rank == 0:
                storage.copy_directory(scratch, f"{directory}/adapter")
    with tempfile.TemporaryDirectory() as scratch:
        local = storage.is_local(directory)
        target = storage.filesystem(f"{directory}/policy")[1] if local else scratch
        written = export_policy(model, target, source=local_path(start), **where)
        hashes = file_hashes(target, written)
        if written and not local:
            storage.copy_directory(scratch, f"{directory}/policy")
    parts: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(parts, hashes)
    if rank == 0:
        identity = identity_of({name: sha for part in parts for name, sha in part.items()})
        storage.write_json(f"{directory}/identity.json", {"identity": identity})


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


def read_log(directory: str, done: int) -> list[dict[str, float]]:
    """Metrics of the steps before a resume; [] at the start."""
    if done == 0:
        return []
    lines = storage.read_bytes(f"{directory}/metrics.jsonl").splitlines()
    return [json.loads(line) for line in lines[:done]]


def write_log(directory: str, log: list[dict[str, float]]) -> None:
    """All metrics up to now, one JSON object a step."""
    storage.write_bytes(f"{directory}/metrics.jsonl", "".join(json.dumps(m) + "\n" for m in log).encode())
