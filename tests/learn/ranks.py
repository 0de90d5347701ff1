"""Run a function on several gloo processes. A rank waits 60 s at most in a collective, and the parent 150 s for all.

Importing torch and transformers takes a process seconds, so a server does it once a session, and every rank is its fork.
"""

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

COLLECTIVE_TIMEOUT_S, SPAWN_TIMEOUT_S = 60, 150
IMPORTED_ONCE = ["dpo_ray.learn.sharded_load", "torch.distributed.checkpoint", "peft"]


def run_ranks(
    function: Callable[..., Any], world_size: int, root: Path, *args: Any, start_method: str = "forkserver"
) -> list[Any]:
    """Return what `function(*args)`, picklable, gives on each rank; raises what a rank raises.

    Args:
        start_method: "spawn" for processes that start with this one's environment, which a fork has no part in.
    """
    root.mkdir(exist_ok=True)
    multiprocessing.set_forkserver_preload(IMPORTED_ONCE)
    context = multiprocessing.start_processes(
        _run_rank, args=(world_size, root, function, args), nprocs=world_size, join=False, start_method=start_method
    )
    deadline = time.monotonic() + SPAWN_TIMEOUT_S
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, f"{world_size} ranks took longer than {SPAWN_TIMEOUT_S} s"
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(root / f"result-{rank}.pt", weights_only=False) for rank in range(world_size)]


def _run_rank(rank: int, world_size: int, root: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(root / "store"), world_size)
    timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
    torch.save(function(*args), root / f"result-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # torch's own teardown can abort while a thread of gloo still ends
