"""The training loop: DPO over planned batches, one optimizer step at a time.

In: a policy, an optimizer, a plan and a way to get rows. Out: one dict of metrics per step.
Invariant: a step does not depend on the number of ranks or on how its pairs are cut into micro-batches, up to rounding:
the loss is the sum over pairs divided by the pairs of the global batch, and gradients are summed over both.

Shapes: B pairs.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import compress
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from dpo_ray.errors import NonFiniteLossError
from dpo_ray.learn.batched import lay_out
from dpo_ray.learn.batches import Step
from dpo_ray.learn.layout import Group, TokenIds
from dpo_ray.learn.logps import Path, completion_logps
from dpo_ray.learn.losses import PairLoss, sigmoid_loss
from dpo_ray.learn.optim import clip_gradients

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


class PairRows(NamedTuple):
    """Rows of the REFERENCED table, one entry per pair in every column."""

    pair_id: Sequence[str]
    prompt_token_ids: Sequence[TokenIds]
    chosen_token_ids: Sequence[TokenIds]
    rejected_token_ids: Sequence[TokenIds]
    ref_chosen_logps: Sequence[float] | np.ndarray
    """Sums in nats."""
    ref_rejected_logps: Sequence[float] | np.ndarray


def dpo_steps(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    fetch: Callable[[list[int]], PairRows],
    plan: Sequence[Step],
    path: Path,
    *,
    beta: float,
    learning_rate_for: Callable[[int], float],
    max_grad_norm: float,
    pad_token_id: int,
    device: torch.device | str,
    start_step: int = 0,
) -> Iterator[dict[str, float]]:
    """Take the steps `start_step`, `start_step + 1`, ... of the plan, yielding each one's metrics after it is taken.

    Every rank runs this with the same plan and reads its own part of each step. The model's gradients must be summed
    over ranks, as `policy.shard` sets it up, and `path` is what `probe.choose_path` found for it. Metrics are of the
    whole global batch, the same on every rank: `MEANS`, grad_norm (before clipping), learning_rate and num_tokens (of
    prompt + chosen and of prompt + rejected, in this step).

    Raises:
        NonFiniteLossError: on every rank, before the optimizer changes the policy.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    for step in range(start_step, len(plan)):
        num_pairs = sum(len(rows) for micro_batches in plan[step] for rows in micro_batches)
        sums = torch.zeros(len(MEANS) + 1, dtype=torch.float64, device=device)
        bad_pairs: list[str] = []
        for rows in plan[step][rank]:
            # A rank without rows left still runs one: the other ranks wait for it in FSDP's collectives.
            pairs = fetch(rows) if rows else PairRows(["none"], [[0]], [[0]], [[0]], [0.0], [0.0])
            result, logps, num_tokens = _pair_losses(model, pairs, path, beta, pad_token_id, device)
            (result.losses.sum() * (1 / num_pairs if rows else 0.0)).backward()
            if rows:
                sums += _metric_sums(result, logps, num_tokens)
                bad_pairs += compress(pairs.pair_id, (~result.losses.isfinite()).tolist())
        grad_norm = clip_gradients(model, max_grad_norm)
        if dist.is_initialized():
            dist.all_reduce(sums)
        *means, num_tokens = sums.tolist()
        metrics = dict(zip(MEANS, (total / num_pairs for total in means), strict=True))
        if not math.isfinite(metrics["loss"]) or not math.isfinite(grad_norm):
            raise NonFiniteLossError(_describe(step, metrics["loss"], grad_norm, bad_pairs, fetch, plan[step][rank]))
        learning_rate = learning_rate_for(step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad()
        yield {**metrics, "grad_norm": grad_norm, "learning_rate": learning_rate, "num_tokens": num_tokens}


def _pair_losses(
    model: PreTrainedModel, pairs: PairRows, path: Path, beta: float, pad_token_id: int, device: torch.device | str
) -> tuple[PairLoss, torch.Tensor, int]:
    """Return the losses of B pairs, the policy's (2, B) log-probabilities and the tokens of prompt + chosen and of prompt +
    rejected."""
    columns = (pairs.prompt_token_ids, pairs.chosen_token_ids, pairs.rejected_token_ids)
    groups = [Group(prompt, sides) for prompt, *sides in zip(*columns, strict=True)]
    # One forward for chosen and rejected: FSDP gathers the weights once per forward.
    logps = completion_logps(model, lay_out(groups, path, pad_token_id).to(device), path).view(-1, 2)
    ref_chosen_logps = torch.as_tensor(pairs.ref_chosen_logps, dtype=torch.float32, device=device)
    ref_rejected_logps = torch.as_tensor(pairs.ref_rejected_logps, dtype=torch.float32, device=device)
    result = sigmoid_loss(logps[:, 0], logps[:, 1], ref_chosen_logps, ref_rejected_logps, beta=beta)
    num_tokens = sum(2 * len(g.prompt) + sum(map(len, g.completions)) for g in groups)
    return result, logps.detach().T, num_tokens


def _metric_sums(result: PairLoss, logps: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Return sums over pairs in the order of `MEANS`, then the number of tokens."""
    margins = result.chosen_rewards - result.rejected_rewards
    per_pair = (result.losses.detach(), result.chosen_rewards, result.rejected_rewards, margins, margins > 0)
    sums = torch.stack([values.sum(dtype=torch.float64) for values in (*per_pair, *logps)])
    return torch.cat([sums, sums.new_tensor([num_tokens])])


def _describe(
    step: int, loss: float, grad_norm: float, bad_pairs: list[str], fetch: Callable, micro_batches: list[list[int]]
) -> str:
    where = f"step {step}: loss {loss}, gradient norm {grad_norm}"
    if bad_pairs:
        return f"{where}; no finite loss on this rank for pairs {', '.join(bad_pairs[:5])}: check their log-probabilities"
    pair_ids = [pair_id for rows in micro_batches if rows for pair_id in fetch(rows).pair_id]
    first = ", ".join(pair_ids[:5]) or "none"
    return f"{where}; first pairs of this rank: {first}; try a lower learning rate, or dtype float32"
