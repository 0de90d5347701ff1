"""Three and four gloo processes train as one does, on a prime number of pairs that divides over none of them.

What two ranks do is in test_two_ranks.py, and what a plan gives each rank in test_batches.py.
"""

import pytest
import torch.distributed as dist

from . import ranks, tiny, training

pytestmark = pytest.mark.slow
PAIRS = tiny.build_pairs(13)


def metrics_of(path: str, mesh, world_size: int):
    """Two epochs of steps of 12 pairs and 1: in the last one all ranks but one have nothing."""
    model = training.build(path, mesh)
    plan = training.plan(PAIRS, world_size, 60, batch_size=12, epochs=2)
    return training.train(model, training.build_adamw(model), PAIRS, plan)


def sharded_metrics(path: str, world_size: int):
    return metrics_of(path, dist.init_device_mesh("cpu", (world_size,)), world_size)


@pytest.mark.parametrize("world_size", [3, 4])
def test_more_ranks_metrics_equal_one_process_on_every_rank(policies, tmp_path, world_size):
    path = policies["qwen2"]
    results = ranks.run_ranks(sharded_metrics, world_size, tmp_path, path, world_size)
    expected = metrics_of(path, None, 1)
    for metrics in results:
        for got, want in zip(metrics, expected, strict=True):
            assert got == pytest.approx(want, rel=1e-5)
