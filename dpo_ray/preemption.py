"""Notices that a node of a training run is about to be taken away, agreed on by all ranks at the same step.

Ray learns of it when a node drains: by SIGTERM to `ray start` on it, as Kubernetes ends a pod (it then drains for
RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S, 30 s), by an autoscaler, or by `ray drain-node`. Ray Train's watcher then tells
every worker, each at its own moment. Its `ray.train.get_preemption_info` would make them agree by a call that all must answer
in every step; this reads what the worker was told, and exchanges it beside the step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


def watch(group: dist.ProcessGroup, told: Callable[[], int] | None = None) -> Callable[[], bool]:
    """Give a function that every rank calls after every step: whether there is a new notice, the same answer on all.

    The answer is of the step before: the exchange runs on the CPU while the next step does, and nobody waits for the device.

    Args:
        group: over gloo, used by nothing else.
        told: how many nodes this rank knows to be going; Ray Train's own word if None.
    """
    told = told or nodes_going
    pending: tuple[torch.Tensor, Any] | None = None
    known = 0

    def noticed() -> bool:
        nonlocal pending, known
        agreed = known
        if pending:
            most, work = pending
            work.wait()
            agreed = int(most)
        most = torch.tensor(told())
        pending = most, dist.all_reduce(most, dist.ReduceOp.MAX, group=group, async_op=True)
        new, known = agreed > known, max(agreed, known)
        return new

    return noticed


def nodes_going() -> int:
    """How many nodes of this run Ray Train has told this worker to be going."""
    from ray.train.v2._internal.execution.context import get_train_context

    info = get_train_context().preemption_context.preemption_info
    return 0 if info is None else len(info.preempted_node_ids)
