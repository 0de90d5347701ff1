"""The training loop: preference losses over planned batches, one optimizer step at a time.

In: a policy, an optimizer, a plan and a way to get rows. Out: one dict of metrics per step.
Invariants: a step does not depend on the number of ranks or on how its pairs are cut into micro-batches, up to rounding:
the loss is the sum over pairs divided by the pairs of the global batch, and gradients are summed over both. Between two
reads of the metrics the host waits for no result of the device, so that it runs ahead and a GPU never idles; what must
happen at once, that a step without finite loss and gradient changes nothing, happens on the device.

Shapes: B pairs.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import compress, takewhile
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from dpo_ray.errors import NonFiniteLossError, StageError
from dpo_ray.learn.batches import Step
from dpo_ray.learn.logps import Path
from dpo_ray.learn.losses import WHOLE_BATCH, check_whole_batch, needs_reference
from dpo_ray.learn.objective import Objective, PairResult, PairRows, pair_losses
from dpo_ray.learn.optim import clip_gradients, hold_back

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
KL = "kl_ref_to_policy"
"""Mean over the completions y of the global batch, chosen and rejected, of log ref(y|x) - log policy(y|x), in nats.

An unbiased estimate of KL(reference || policy) where the completions are samples of the reference and all of them are in
pairs; elsewhere only how much less likely the policy has made them. A batch's value can be negative. It is not
KL(policy || reference), which takes samples of the policy: `evaluate` reports that."""


class Taken(NamedTuple):
    """A step whose numbers are still on the device."""

    step: int
    means: torch.Tensor
    """(len(MEANS) + 2,) float64: of the global batch, as `MEANS`, `KL` and the gradient norm before clipping."""
    known: dict[str, float]
    """Metrics that the host knows."""
    losses: list[tuple[Sequence[str], torch.Tensor]]
    """pair_id and loss of this rank's pairs, per micro-batch."""


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
    read_after: Callable[[int], bool] = lambda steps: True,
    start_tolerance: float | None = None,
) -> Iterator[list[dict[str, float]]]:
    """Take the steps `start_step`, `start_step + 1`, ... of the plan; at every read, yield the metrics of each step since.

    Every rank runs this with the same plan and reads its own part of each step. The model's gradients must be summed
    over ranks, as `policy.shard` sets it up. Metrics are of the whole global batch, the same on every rank: `MEANS`,
    `KL` if a loss needs the reference, grad_norm (before clipping), learning_rate and num_tokens (of prompt + chosen and
    of prompt + rejected).

    Args:
        optimizer: a fused one, as `build_optimizer` makes it.
        fetch: rows of the table by index.
        path: what `probe.choose_path` found for the model.
        lengths: (pairs, 3) tokens of prompt, chosen and rejected of every row.
        learning_rate_for: step -> learning rate.
        read_after: steps taken in all -> whether to read then, which waits for the device; the last step is always read.
            A model without a tiled head (`Path.tiled_head`) waits once a micro-batch more.
        start_tolerance: the reference is the policy that training starts from, so that the loss of step 0 is known
            (`check_start`), and the host waits for it; None where the reference is another one.

    Raises:
        ConfigError: a loss that sorts the whole batch, and a plan that cuts it; an optimizer that is not fused.
        NonFiniteLossError: on every rank with the same pair ids, at the read after such a step; the metrics of the steps
            before it are yielded first. Policy and optimizer are as that step found them, since it and all that followed
            were held back.
        StageError: the loss of step 0 is not what it is known to be; the policy is as it was.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    if any(term.name in WHOLE_BATCH for term in objective.terms):  # else do not make a lazy plan cut every step at once
        num_micro_batches = max((len(micro_batches) for step in plan for micro_batches in step), default=0)
        check_whole_batch(objective.terms, world_size=len(plan[0]) if plan else 1, micro_batches=num_micro_batches)
    bad = torch.zeros((), device=device)
    unread: list[Taken] = []
    for step in range(start_step, len(plan)):
        rows_of_step = [row for micro_batches in plan[step] for rows in micro_batches for row in rows]
        num_pairs, (prompts, chosen, rejected) = len(rows_of_step), lengths[rows_of_step].sum(axis=0).tolist()
        sums = torch.zeros(len(MEANS) + 2, dtype=torch.float64, device=device)
        tolerance = start_tolerance if step == 0 else None
        losses: list[tuple[Sequence[str], torch.Tensor]] = []
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
                sums += _metric_sums(result, pairs)
                losses.append((pairs.pair_id, result.losses.detach()))
        grad_norm = clip_gradients(model, max_grad_norm).to(sums, non_blocking=True)
        if dist.is_initialized():
            dist.all_reduce(sums)
        if tolerance is not None:
            loss, *_, expected = (sums / num_pairs).tolist()
            check_start(loss, expected, tolerance)
        bad = torch.maximum(bad, (~(sums[0].isfinite() & grad_norm.isfinite())).float())
        hold_back(optimizer, bad)
        learning_rate = learning_rate_for(step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad()
        known = {"learning_rate": learning_rate, "num_tokens": 2 * prompts + chosen + rejected}
        unread.append(Taken(step, torch.cat([sums[:-1] / num_pairs, grad_norm[None]]), known, losses))
        if read_after(step + 1) or step + 1 == len(plan):
            metrics = _read(unread, with_kl=needs_reference(objective.terms))
            if good := list(takewhile(_finite, metrics)):
                yield good
            if len(good) < len(metrics):
                taken = unread[len(good)]
                raise NonFiniteLossError(_describe(taken, metrics[len(good)], fetch, plan[taken.step][rank]))
            unread = []


def _read(unread: list[Taken], *, with_kl: bool) -> list[dict[str, float]]:
    """Metrics of each step, by one copy from the device."""
    names = (*MEANS, KL, "grad_norm")
    read = torch.stack([taken.means for taken in unread]).tolist()
    metrics = [dict(zip(names, means, strict=True)) | taken.known for means, taken in zip(read, unread, strict=True)]
    return metrics if with_kl else [{name: value for name, value in m.items() if name != KL} for m in metrics]


def _finite(metrics: dict[str, float]) -> bool:
    return math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])


def check_start(loss: float, expected: float, tolerance: float) -> None:
    """Hold the loss of step 0 to its known value, where the reference is the policy itself: its log-ratios are 0.

    A loss that is not finite passes: it is another error, which names the pairs.

    Args:
        expected: the same loss with the reference's log-probabilities as the policy's, e.g. ln 2 for `sigmoid`.
        tolerance: absolute up to |expected| = 1, relative above.

    Raises:
        StageError: they differ by more.
    """
    if math.isfinite(loss) and abs(loss - expected) > tolerance * max(1.0, abs(expected)):
        raise StageError(
            f"train: the policy is its own reference, so the loss of step 0 must be {expected:.6g} within {tolerance:g}; got "
            f"{loss:.6g}. The reference log-probabilities are stale, or were computed in another way than training does "
            "(another dtype, other weights, changed model code): run the stage `reference` again with --redo reference"
        )


def _metric_sums(result: PairResult, pairs: PairRows) -> torch.Tensor:
    """Return sums over pairs in the order of `MEANS`, of `KL` (NaN without a reference), and of the losses at the reference."""
    margins = result.chosen_rewards - result.rejected_rewards
    per_pair = (
        *(result.losses.detach(), result.chosen_rewards, result.rejected_rewards, margins, margins > 0),
        *(result.chosen_logps, result.rejected_logps, result.losses_at_reference),
    )
    *means, at_reference = (values.sum(dtype=torch.float64) for values in per_pair)
    reference = math.nan
    if pairs.ref_chosen_logps is not None and pairs.ref_rejected_logps is not None:
        reference = float(np.sum(pairs.ref_chosen_logps) + np.sum(pairs.ref_rejected_logps))
    return torch.stack([*means, (reference - means[-2] - means[-1]) / 2, at_reference])


def _describe(taken: Taken, metrics: dict[str, float], fetch: Callable, micro_batches: list[list[int]]) -> str:
    """Say which pairs, of all ranks; every rank calls it."""
    own_bad = [pair_id for ids, losses in taken.losses for pair_id in compress(ids, (~losses.isfinite()).tolist())]
    own = (own_bad, [pair_id for rows in micro_batches if rows for pair_id in fetch(rows).pair_id])
    of_ranks = [own]
    if dist.is_initialized():
        of_ranks = [own] * dist.get_world_size()
        dist.all_gather_object(of_ranks, own)
    bad_pairs, pair_ids = ([pair_id for rank in of_ranks for pair_id in rank[i]] for i in range(2))
    where = f"step {taken.step}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}"
    if bad_pairs:
        return f"{where}; no finite loss for pairs {_listed(bad_pairs)}: check their log-probabilities"
    return f"{where}; pairs of the batch: {_listed(pair_ids)}; try a lower learning rate, or dtype float32"


def _listed(pair_ids: list[str], most: int = 64) -> str:
    more = f" and {len(pair_ids) - most} more" if len(pair_ids) > most else ""
    return f"{', '.join(pair_ids[:most]) or 'none'}{more}"
