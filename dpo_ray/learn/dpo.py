"""The training loop: preference losses over planned batches, one optimizer step at a time.

In: a policy, an optimizer, a plan and a way to get rows. Out: one dict of metrics per step.
Invariant: a step does not depend on the number of ranks or on how its pairs are cut into micro-batches, up to rounding:
the loss is the sum over pairs divided by the pairs of the global batch, and gradients are summed over both.

Shapes: B pairs.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import compress

import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from dpo_ray.errors import NonFiniteLossError
from dpo_ray.learn.batches import Step
from dpo_ray.learn.logps import Path
from dpo_ray.learn.losses import WHOLE_BATCH, check_whole_batch
from dpo_ray.learn.objective import Objective, PairResult, PairRows, pair_losses
from dpo_ray.learn.optim import clip_gradients

NO_PAIR = PairRows(["none"], [[0]], [[0]], [[0]], [0.0], [0.0], [0.0], [0.0], [[0.0]], [[0.0]])
MEANS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)
"""Metrics that are means over the pairs of the global batch, named as TRL names them."""


def dpo_steps(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    fetch: Callable[[list[int]], PairRows],
    plan: Sequence[Step],
    path: Path,
    objective: Objective,
    lengths: np.ndarray,
    *,
    learning_rate_for: Callable[[int], float],
    max_grad_norm: float,
    pad_token_id: int,
    device: torch.device | str,
    start_step: int = 0,
) -> Iterator[dict[str, float]]:
    """Take the steps `start_step`, `start_step + 1`, ... of the plan, yielding each one's metrics after it is taken.

    Every rank runs this with the same plan and reads its own part of each step. The model's gradients must be summed
    over ranks, as `policy.shard` sets it up. Metrics are of the whole global batch, the same on every rank: `MEANS`,
    grad_norm (before clipping), learning_rate and num_tokens (of prompt + chosen and of prompt + rejected).

    Args:
        fetch: rows of the table by index.
        path: what `probe.choose_path` found for the model.
        lengths: (pairs, 3) tokens of prompt, chosen and rejected of every row.
        learning_rate_for: step -> learning rate.

    Raises:
        ConfigError: a loss that sorts the whole batch, and a plan that cuts it.
        NonFiniteLossError: on every rank, before the optimizer changes the policy.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    if any(term.name in WHOLE_BATCH for term in objective.terms):  # else do not make a lazy plan cut every step at once
        num_micro_batches = max((len(micro_batches) for step in plan for micro_batches in step), default=0)
        check_whole_batch(objective.terms, world_size=len(plan[0]) if plan else 1, micro_batches=num_micro_batches)
    for step in range(start_step, len(plan)):
        rows_of_step = [row for micro_batches in plan[step] for rows in micro_batches for row in rows]
        num_pairs, (prompts, chosen, rejected) = len(rows_of_step), lengths[rows_of_step].sum(axis=0).tolist()
        sums = torch.zeros(len(MEANS), dtype=torch.float64, device=device)
        bad_pairs: list[str] = []
        for rows in plan[step][rank]:
            # A rank without rows left still runs one: the other ranks wait for it in FSDP's collectives.
            pairs = fetch(rows) if rows else NO_PAIR
            result = pair_losses(
                model,
                pairs,
                objective,
                path,
                mean_chosen_tokens=chosen / num_pairs,
                pad_token_id=pad_token_id,
                device=device,
            )
            (result.losses.sum() * (1 / num_pairs if rows else 0.0)).backward()
            if rows:
                sums += _metric_sums(result)
                bad_pairs += compress(pairs.pair_id, (~result.losses.isfinite()).tolist())
        grad_norm = clip_gradients(model, max_grad_norm)
        if dist.is_initialized():
            dist.all_reduce(sums)
        metrics = dict(zip(MEANS, (sums / num_pairs).tolist(), strict=True))
        if not math.isfinite(metrics["loss"]) or not math.isfinite(grad_norm):
            raise NonFiniteLossError(_describe(step, metrics["loss"], grad_norm, bad_pairs, fetch, plan[step][rank]))
        learning_rate = learning_rate_for(step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad()
        yield {**metrics, "grad_norm": grad_norm, "learning_rate": learning_rate, "num_tokens": 2 * prompts + chosen + rejected}


def _metric_sums(result: PairResult) -> torch.Tensor:
    """Return sums over pairs in the order of `MEANS`."""
    margins = result.chosen_rewards - result.rejected_rewards
    per_pair = (
        *(result.losses.detach(), result.chosen_rewards, result.rejected_rewards, margins, margins > 0),
        *(result.chosen_logps, result.rejected_logps),
    )
    return torch.stack([values.sum(dtype=torch.float64) for values in per_pair])


def _describe(
    step: int, loss: float, grad_norm: float, bad_pairs: list[str], fetch: Callable, micro_batches: list[list[int]]
) -> str:
    where = f"step {step}: loss {loss}, gradient norm {grad_norm}"
    if bad_pairs:
        return f"{where}; no finite loss on this rank for pairs {', '.join(bad_pairs[:5])}: check their log-probabilities"
    pair_ids = [pair_id for rows in micro_batches if rows for pair_id in fetch(rows).pair_id]
    first = ", ".join(pair_ids[:5]) or "none"
    return f"{where}; first pairs of this rank: {first}; try a lower learning rate, or dtype float32"
