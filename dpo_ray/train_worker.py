"""What each training worker runs: load its shard of the policy, take every planned step, write the policy.

Batches are planned from an index of row lengths, the same on every rank, so no rank can run out of steps before another.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np

from dpo_ray import train_log
from dpo_ray.config import Run, TrainBlock
from dpo_ray.engines.policies import PolicyRef, local_path
from dpo_ray.flow import storage


def run_worker(arguments: dict[str, Any]) -> None:
    """Run on every worker of the trainer that stages/train.py starts; `arguments` come from there."""
    import ray.train
    import torch.distributed as dist

    from dpo_ray.train_state import check_ours

    model, where = _train(arguments)  # states and gradients end there: a writer of the export gathers whole files of weights
    check_ours(where)
    _export(model, arguments["policy"], arguments["directory"], ray.train.get_context().get_world_rank())
    dist.barrier()


def _train(arguments: dict[str, Any]) -> tuple[Any, Any]:
    """Take the steps that are left, and save; return the model, and where its checkpoints lie."""
    import ray.train

    from dpo_ray import train_saving, train_state
    from dpo_ray.learn import speed
    from dpo_ray.train_objectives import open_work

    config: Run = arguments["config"]
    block, start, directory, board = config.train, arguments["policy"], arguments["directory"], arguments["board"]
    rank, world_size = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    device, seed = _set_up(config), config.seed + (arguments["round"] or 0)
    table, take, shown, num_targets = open_work(arguments)
    table.check_budget(block.max_batch_tokens, share_prompt=block.share_prompt != "never")  # before the policy is loaded
    model, optimizer, path, pad_token_id = _load(start, block, device, table.longest(), seed=seed)
    table.check_budget(block.max_batch_tokens, share_prompt=path.share_prompt)
    plan = plan_steps(table.lengths, block, world_size, seed=seed, share_prompt=path.share_prompt)
    where, noticed = _checkpoints(arguments), _notices(block)
    urgent: set[int] = set()
    done, lines = train_state.resume(where, model, optimizer)
    log = train_log.open_log(directory, config, arguments["round"], lines, where.ours) if rank == 0 else train_log.SILENT
    saving: Any = {"every": block.checkpoint_steps, "num_steps": len(plan), "kept": block.checkpoints_kept}
    saving["publish"] = lambda _: log.publish()
    measured, num_rows = _measured(model, block, device, world_size), len(table) * block.epochs
    tokens = sum(line["num_tokens"] for line in lines)
    if rank == 0:
        board.put.remote(plan.rows_before(done), num_rows, {"tokens": tokens})

    def read_after(step: int) -> bool:
        if noticed():
            urgent.add(step)
        return step in urgent or step % block.logging_steps == 0 or step % block.checkpoint_steps == 0

    steps = take(
        model,
        optimizer,
        plan,
        path,
        learning_rate_for=functools.partial(_learning_rate, block, len(plan)),
        max_grad_norm=block.max_grad_norm,
        pad_token_id=pad_token_id,
        device=device,
        start_step=done,
        read_after=read_after,
    )
    counted: Any = {"share_prompt": path.share_prompt, "num_targets": num_targets}
    with contextlib.ExitStack() as closing, train_saving.saving(where, model, optimizer, **saving) as save:
        closing.callback(log.close)
        started = time.perf_counter()
        for metrics in steps:
            seconds, taken = time.perf_counter() - started, plan[done : done + len(metrics)]
            timed = speed.interval_metrics(taken, table.lengths, seconds, *measured, **counted)
            memory = {"peak_memory_gib": speed.peak_memory_gib(device)}
            for of_step, of_interval in zip(metrics, timed, strict=True):
                done += 1
                lines.append({"step": done, "epoch": done * block.epochs / len(plan), **of_step, **of_interval, **memory})
            log.write(lines[-len(metrics) :])
            if rank == 0:
                tokens += sum(line["num_tokens"] for line in lines[-len(metrics) :])
                seen = {name: lines[-1][name] for name in shown if name in lines[-1]}
                board.put.remote(plan.rows_before(done), num_rows, {**seen, "tokens": tokens})
            save(done, lines, done in urgent)
            started = time.perf_counter()
    return model, where


def _set_up(config: Run) -> Any:
    """Make this process ready to compute; return its device."""
    import ray.train
    import torch

    from dpo_ray.learn import matmul

    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(max(1, int(config.train.resources.cpus)))
        matmul.float32_matmul_fast_path()
    else:
        torch.cuda.set_device(device)  # meshes and collectives take the current one
    torch.manual_seed(config.seed)
    return device


def _checkpoints(arguments: dict[str, Any]) -> Any:
    """Where this run's checkpoints lie, as train_state.Where; every rank calls it, for a group of their own."""
    import ray.train
    import torch.distributed as dist

    from dpo_ray.train_owner import take_over
    from dpo_ray.train_state import Where

    timeout = timedelta(seconds=arguments["config"].train.collective_timeout_s)
    group: Any = dist.new_group(backend="gloo", timeout=timeout)
    owner = (arguments["state"], arguments["fingerprint"], arguments["policy"].identity)
    first = ray.train.get_context().get_world_rank() == 0
    ours = {"ours": take_over(arguments["state"])} if first else {}
    return Where(*owner, group, ray.train.get_context().get_local_rank(), **ours)


def _notices(block: TrainBlock) -> Callable[[], bool]:
    """Whether a node is about to be taken away, as preemption.watch; every rank calls it, for a group of their own."""
    import torch.distributed as dist

    from dpo_ray import preemption

    group: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=block.collective_timeout_s))
    return preemption.watch(group)


def _measured(model: Any, block: TrainBlock, device: Any, world_size: int) -> tuple[Any, float]:
    """FLOPs of a token, and FLOP/s that all workers could reach."""
    import torch

    from dpo_ray.learn import speed

    return speed.token_flops(model), world_size * speed.matmul_peak(device, getattr(torch, block.dtype))


def _learning_rate(block: TrainBlock, num_steps: int, step: int) -> float:
    from dpo_ray.learn.optim import learning_rate_at

    warmup_steps = block.num_warmup_steps(num_steps)
    return learning_rate_at(step, num_steps, peak=block.learning_rate, warmup_steps=warmup_steps, schedule=block.schedule)


def _load(start: PolicyRef, block: TrainBlock, device: Any, longest: Any, *, seed: int) -> tuple[Any, Any, Any, int]:
    """The policy with float32 master weights, sharded over all workers, its optimizer, its path and the token that pads."""
    import ray.train
    import torch

    from dpo_ray.learn import adapters, meshes, optim, probe, sharded_load, tokens

    path, where = local_path(start), {"revision": start.revision, "trust_remote_code": start.trust_remote_code}
    pad_token_id = tokens.pad_token_id(tokens.load_tokenizer(path, **where))
    dtype, node = getattr(torch, block.dtype), ray.train.get_context().get_node_rank()
    elastic = isinstance(block.resources.workers, tuple)
    lora = block.lora and adapters.Lora(block.lora.r, block.lora.alpha, block.lora.target_modules)
    model = sharded_load.load_sharded_policy(
        path,
        meshes.policy_mesh(device.type, node, copy_per_node=block.resources.shard == "node", elastic=elastic),
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


def plan_steps(lengths: np.ndarray, block: TrainBlock, world_size: int, *, seed: int, share_prompt: bool) -> Any:
    """Every step of every epoch, as learn.batches.Plan."""
    from dpo_ray.learn.batches import Plan

    return Plan(
        lengths,
        epochs=block.epochs,
        global_batch_size=block.global_batch_size,
        world_size=world_size,
        max_batch_tokens=block.max_batch_tokens,
        seed=seed,
        share_prompt=share_prompt,
    )
