"""The training loop: planned batches, one optimizer step at a time, whatever is minimised.

In: a policy, an optimizer, a plan, a way to get rows and a forward over some of them. Out: metrics of every step.
Invariants: a step does not depend on the number of ranks or on how its rows are cut into micro-batches, up to rounding:
the loss is the sum over rows divided by the rows of the global batch, and gradients are summed over both. Between two
reads of the metrics the host waits for no result of the device, so that it runs ahead and a GPU never idles; what must
happen at once, that a step without finite loss and gradient changes nothing, happens on the device.

Shapes: B rows of a micro-batch, M metrics that are means over rows.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import compress, takewhile
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from dpo_ray.errors import NonFiniteLossError
from dpo_ray.learn.batches import Step
from dpo_ray.learn.optim import clip_gradients, hold_back


class Losses(NamedTuple):
    """What a forward says of B rows."""

    losses: torch.Tensor
    """(B,) with gradient; the step minimises their sum divided by the rows of the global batch."""
    sums: torch.Tensor
    """(M + extra,) float64, detached: sums over the B rows of what `Goal.means` names, then of what `check` reads."""


class Goal(NamedTuple):
    """What a loop minimises."""

    forward: Callable[[Any, list[int], bool], Losses]
    """(rows as `fetch` gives them, indices of all rows of the global batch, whether it is step 0) -> Losses."""
    means: Sequence[str]
    """Names of the metrics that are means over the rows of the global batch; the first is `loss`."""
    nothing: Any
    """Rows for a rank that has none left; their losses do not count."""
    rows: str
    """What a row is called in messages."""
    check: Callable[[list[float]], None] | None = None
    """Called in step 0, before the policy changes, with `sums` divided by the rows; the host waits for it."""
    num_extra: int = 0
    """How many sums `check` reads behind those of `means`."""


class Taken(NamedTuple):
    """A step whose numbers are still on the device."""

    step: int
    means: torch.Tensor
    """(M + 1,) float64: of the global batch, as `means` names them, and the gradient norm before clipping."""
    known: dict[str, float]
    """Metrics that the host knows."""
    losses: list[tuple[Sequence[str], torch.Tensor]]
    """Id and loss of this rank's rows, per micro-batch."""


def take_steps(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    fetch: Callable[[list[int]], Any],
    plan: Sequence[Step],
    goal: Goal,
    lengths: np.ndarray,
    *,
    learning_rate_for: Callable[[int], float],
    max_grad_norm: float,
    device: torch.device | str,
    start_step: int = 0,
    read_after: Callable[[int], bool] = lambda steps: True,
) -> Iterator[list[dict[str, float]]]:
    """Take the steps `start_step`, `start_step + 1`, ... of the plan; at every read, yield the metrics of each step since.

    Every rank runs this with the same plan and reads its own part of each step. The model's gradients must be summed
    over ranks, as `policy.shard` sets it up. Metrics are of the whole global batch, the same on every rank: the
    goal's means, grad_norm (before clipping), learning_rate and num_tokens (of every prompt + completion).

    Args:
        optimizer: a fused one, as `build_optimizer` makes it.
        fetch: rows of the table by index, as a named tuple of columns of which the first has the rows' ids.
        lengths: (rows, 1 + C) tokens of a row's prompt and of its C completions.
        learning_rate_for: step -> learning rate.
        read_after: steps taken in all -> whether to read then, which waits for the device; the last step is always read.
            A model without a tiled head (`logps.Path.tiled_head`) waits once a micro-batch more.

    Raises:
        ConfigError: an optimizer that is not fused.
        NonFiniteLossError: on every rank with the same row ids, at the read after such a step; the metrics of the steps
            before it are yielded first. Policy and optimizer are as that step found them, since it and all that followed
            were held back.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    num_means = len(goal.means)
    bad = torch.zeros((), device=device)
    unread: list[Taken] = []
    for step in range(start_step, len(plan)):
        rows_of_step = [row for micro_batches in plan[step] for rows in micro_batches for row in rows]
        num_rows = len(rows_of_step)
        sums = torch.zeros(num_means + goal.num_extra, dtype=torch.float64, device=device)
        losses: list[tuple[Sequence[str], torch.Tensor]] = []
        for rows in plan[step][rank]:
            # A rank without rows left still runs one: the other ranks wait for it in FSDP's collectives.
            fetched = fetch(rows) if rows else goal.nothing
            result = goal.forward(fetched, rows_of_step, step == 0)
            (result.losses.sum() * (1 / num_rows if rows else 0.0)).backward()
            if rows:
                sums += result.sums
                losses.append((fetched[0], result.losses.detach()))
        grad_norm = clip_gradients(model, max_grad_norm).to(sums, non_blocking=True)
        if dist.is_initialized():
            dist.all_reduce(sums)
        if step == 0 and goal.check:
            goal.check((sums / num_rows).tolist())
        bad = torch.maximum(bad, (~(sums[0].isfinite() & grad_norm.isfinite())).float())
        hold_back(optimizer, bad)
        learning_rate = learning_rate_for(step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad()
        known = {"learning_rate": learning_rate, "num_tokens": posed_tokens(lengths[rows_of_step])}
        unread.append(Taken(step, torch.cat([sums[:num_means] / num_rows, grad_norm[None]]), known, losses))
        if read_after(step + 1) or step + 1 == len(plan):
            metrics = _read(unread, goal.means)
            if good := list(takewhile(_finite, metrics)):
                yield good
            if len(good) < len(metrics):
                taken = unread[len(good)]
                raise NonFiniteLossError(_describe(taken, metrics[len(good)], fetch, plan[taken.step][rank], goal.rows))
            unread = []


def posed_tokens(lengths: np.ndarray) -> int:
    """Tokens of prompt + completion of every completion of some rows: the work as it is asked for."""
    prompts, *completions = lengths.sum(axis=0).tolist()
    return len(completions) * prompts + sum(completions)


def _read(unread: list[Taken], means: Sequence[str]) -> list[dict[str, float]]:
    """Metrics of each step, by one copy from the device."""
    read = torch.stack([taken.means for taken in unread]).tolist()
    return [dict(zip((*means, "grad_norm"), of, strict=True)) | taken.known for of, taken in zip(read, unread, strict=True)]


def _finite(metrics: dict[str, float]) -> bool:
    return math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])


def _describe(taken: Taken, metrics: dict[str, float], fetch: Callable, micro_batches: list[list[int]], rows_: str) -> str:
    """Say which rows, of all ranks; every rank calls it."""
    own_bad = [row_id for ids, losses in taken.losses for row_id in compress(ids, (~losses.isfinite()).tolist())]
    own = (own_bad, [row_id for rows in micro_batches if rows for row_id in fetch(rows)[0]])
    of_ranks = [own]
    if dist.is_initialized():
        of_ranks = [own] * dist.get_world_size()
        dist.all_gather_object(of_ranks, own)
    bad_ids, ids = ([row_id for rank in of_ranks for row_id in rank[i]] for i in range(2))
    where = f"step {taken.step}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}"
    if bad_ids:
        return f"{where}; no finite loss for {rows_} {_listed(bad_ids)}: check their log-probabilities"
    return f"{where}; {rows_} of the batch: {_listed(ids)}; try a lower learning rate, or dtype float32"


def _listed(ids: list[str], most: int = 64) -> str:
    more = f" and {len(ids) - most} more" if len(ids) > most else ""
    return f"{', '.join(ids[:most]) or 'none'}{more}"
