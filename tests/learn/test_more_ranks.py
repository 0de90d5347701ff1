"""Three and four gloo processes train as one does, on a prime number of pairs that divides over none of them.

What two ranks do is in test_two_ranks.py, and what a plan gives each rank in test_batches.py.
"""

import os
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

from . import tiny, training

pytestmark = pytest.mark.slow
PAIRS = tiny.build_pairs(13)
COLLECTIVE_TIMEOUT_S, SPAWN_TIMEOUT_S = 60, 150


def metrics_of(path: str, mesh, world_size: int):
    """Two epochs of steps of 12 pairs and 1: in the last one all ranks but one have nothing."""
    model = training.build(path, mesh)
    plan = training.plan(PAIRS, world_size, 60, batch_size=12, epochs=2)
    return training.train(model, training.build_adamw(model), PAIRS, plan)


def run_rank(rank: int, world_size: int, root: Path, path: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(root / "store"), world_size)
    timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
    torch.save(metrics_of(path, dist.init_device_mesh("cpu", (world_size,)), world_size), root / f"metrics-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # torch's own teardown can abort while a thread of gloo still ends


@pytest.mark.parametrize("world_size", [3, 4])
def test_more_ranks_metrics_equal_one_process_on_every_rank(policies, tmp_path, world_size):
    path = policies["qwen2"]
    context = multiprocessing.start_processes(
        run_rank, args=(world_size, tmp_path, path), nprocs=world_size, join=False, start_method="spawn"
    )
    deadline = time.monotonic() + SPAWN_TIMEOUT_S
    try:
        while not context.join(timeout=1):  # raises what a rank raised
            assert time.monotonic() < deadline, f"{world_size} ranks took longer than {SPAWN_TIMEOUT_S} s"
    finally:
        for process in context.processes:
            process.kill()
    expected = metrics_of(path, None, 1)
    for rank in range(world_size):
        for got, want in zip(torch.load(tmp_path / f"metrics-{rank}.pt"), expected, strict=True):
            assert got == pytest.approx(want, rel=1e-5)
