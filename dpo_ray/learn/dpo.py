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

from dpo_ray.errors import NonFiniteLossError, StageError
from dpo_ray.learn.batches import Step
from dpo_ray.learn.logps import Path
from dpo_ray.learn.losses import check_whole_batch
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
    start_tolerance: float | None = None,
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
        start_tolerance: the reference is the policy that training starts from, so that the loss of step 0 is known
            (`check_start`); None where it is another one.

    Raises:
        ConfigError: a loss that sorts the whole batch, and a plan that cuts it.
        NonFiniteLossError: on every rank with the same pair ids, before the optimizer changes the policy.
        StageError: the loss of step 0 is not what it is known to be.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    num_micro_batches = max((len(micro_batches) for step in plan for micro_batches in step), default=0)
    check_whole_batch(objective.terms, world_size=len(plan[0]) if plan else 1, micro_batches=num_micro_batches)
    for step in range(start_step, len(plan)):
        rows_of_step = [row for micro_batches in plan[step] for rows in micro_batches for row in rows]
        num_pairs, (prompts, chosen, rejected) = len(rows_of_step), lengths[rows_of_step].sum(axis=0).tolist()
        sums = torch.zeros(len(MEANS) + 1, dtype=torch.float64, device=device)
        tolerance = start_tolerance if step == 0 else None
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
                at_reference=tolerance is not None,
            )
            (result.losses.sum() * (1 / num_pairs if rows else 0.0)).backward()
            if rows:
                sums += _sums(result)
                bad_pairs += compress(pairs.pair_id, (~result.losses.isfinite()).tolist())
        grad_norm = clip_gradients(model, max_grad_norm)
        if dist.is_initialized():
            dist.all_reduce(sums)
        *means, expected = (sums / num_pairs).tolist()
        metrics = dict(zip(MEANS, means, strict=True))
        if not math.isfinite(metrics["loss"]) or not math.isfinite(grad_norm):
            raise NonFiniteLossError(_describe(step, metrics["loss"], grad_norm, bad_pairs, fetch, plan[step][rank]))
        if tolerance is not None:
            check_start(metrics["loss"], expected, tolerance)
        learning_rate = learning_rate_for(step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad()
        yield {**metrics, "grad_norm": grad_norm, "learning_rate": learning_rate, "num_tokens": 2 * prompts + chosen + rejected}


def check_start(loss: float, expected: float, tolerance: float) -> None:
    """Hold the loss of step 0 to its known value, where the reference is the policy itself: its log-ratios are 0.

    Args:
        expected: the same loss with the reference's log-probabilities as the policy's, e.g. ln 2 for `sigmoid`.
        tolerance: absolute up to |expected| = 1, relative above.

    Raises:
        StageError: they differ by more.
    """
    if abs(loss - expected) > tolerance * max(1.0, abs(expected)):
        raise StageError(
            f"train: the policy is its own reference, so the loss of step 0 must be {expected:.6g} within {tolerance:g}; got "
            f"{loss:.6g}. The reference log-probabilities are stale, or were computed in another way than training does "
            "(another dtype, other weights, changed model code): run the stage `reference` again with --redo reference"
        )


def _sums(result: PairResult) -> torch.Tensor:
    """Return sums over pairs in the order of `MEANS`, and of the losses at the reference."""
    margins = result.chosen_rewards - result.rejected_rewards
    per_pair = (
        *(result.losses.detach(), result.chosen_rewards, result.rejected_rewards, margins, margins > 0),
        *(result.chosen_logps, result.rejected_logps, result.losses_at_reference),
    )
    return torch.stack([values.sum(dtype=torch.float64) for values in per_pair])


def _describe(
    step: int, loss: float, grad_norm: float, bad_pairs: list[str], fetch: Callable, micro_batches: list[list[int]]
) -> str:
    """Say which pairs, of all ranks."""
    own = (bad_pairs, [pair_id for rows in micro_batches if rows for pair_id in fetch(rows).pair_id])
    of_ranks = [own]
    if dist.is_initialized():
        of_ranks = [own] * dist.get_world_size()
        dist.all_gather_object(of_ranks, own)
    bad_pairs, pair_ids = ([pair_id for rank in of_ranks for pair_id in rank[i]] for i in range(2))
    where = f"step {step}: loss {loss}, gradient norm {grad_norm}"
    if bad_pairs:
        return f"{where}; no finite loss for pairs {_listed(bad_pairs)}: check their log-probabilities"
    return f"{where}; pairs of the batch: {_listed(pair_ids)}; try a lower learning rate, or dtype float32"


def _listed(pair_ids: list[str], most: int = 64) -> str:
    more = f" and {len(pair_ids) - most} more" if len(pair_ids) > most else ""
    return f"{', '.join(pair_ids[:most]) or 'none'}{more}"
