"""DPO steps: what the loop of `steps` minimises when its rows are pairs, and what it logs of them.

In: a policy, an optimizer, a plan and a way to get pairs. Out: metrics of every step.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from dpo_ray.errors import StageError
from dpo_ray.learn.batches import Step
from dpo_ray.learn.logps import Path
from dpo_ray.learn.losses import WHOLE_BATCH, check_whole_batch, needs_reference
from dpo_ray.learn.objective import Objective, PairResult, PairRows, pair_losses
from dpo_ray.learn.steps import Goal, Losses, take_steps

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
    """`steps.take_steps` over pairs: metrics are `MEANS`, `KL` if a loss needs the reference, and those of every loop.

    Args:
        optimizer, fetch, plan, learning_rate_for, max_grad_norm, start_step, read_after: as `take_steps` has them.
        path: what `probe.choose_path` found for the model.
        lengths: (pairs, 3) tokens of prompt, chosen and rejected of every row.
        start_tolerance: the reference is the policy that training starts from, so that the loss of step 0 is known
            (`check_start`), and the host waits for it; None where the reference is another one.

    Raises:
        ConfigError: a loss that sorts the whole batch, and a plan that cuts it; an optimizer that is not fused.
        NonFiniteLossError: as `take_steps` raises it.
        StageError: the loss of step 0 is not what it is known to be; the policy is as it was.
    """
    if any(term.name in WHOLE_BATCH for term in objective.terms):  # else do not make a lazy plan cut every step at once
        num_micro_batches = max((len(micro_batches) for step in plan for micro_batches in step), default=0)
        check_whole_batch(objective.terms, world_size=len(plan[0]) if plan else 1, micro_batches=num_micro_batches)
    with_kl = needs_reference(objective.terms)

    def forward(pairs: PairRows, batch: list[int], first: bool) -> Losses:
        result = pair_losses(
            model,
            pairs,
            objective,
            path,
            mean_chosen_tokens=float(lengths[batch, 1].mean()),
            pad_token_id=pad_token_id,
            device=device,
            at_reference=first and start_tolerance is not None,
        )
        return Losses(result.losses, _metric_sums(result, pairs, with_kl=with_kl))

    def check(means: list[float]) -> None:
        assert start_tolerance is not None
        check_start(means[0], means[-1], start_tolerance)

    names = (*MEANS, KL) if with_kl else MEANS
    goal = Goal(forward, names, NO_PAIR, "pairs", check if start_tolerance is not None else None, num_extra=1)
    yield from take_steps(
        model,
        optimizer,
        fetch,
        plan,
        goal,
        lengths,
        learning_rate_for=learning_rate_for,
        max_grad_norm=max_grad_norm,
        device=device,
        start_step=start_step,
        read_after=read_after,
    )


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


def _metric_sums(result: PairResult, pairs: PairRows, *, with_kl: bool) -> torch.Tensor:
    """Return sums over pairs in the order of `MEANS`, of `KL` if asked for, and of the losses at the reference."""
    margins = result.chosen_rewards - result.rejected_rewards
    per_pair = (
        *(result.losses.detach(), result.chosen_rewards, result.rejected_rewards, margins, margins > 0),
        *(result.chosen_logps, result.rejected_logps, result.losses_at_reference),
    )
    *means, at_reference = (values.sum(dtype=torch.float64) for values in per_pair)
    if not with_kl:
        return torch.stack([*means, at_reference])
    assert pairs.ref_chosen_logps is not None, "no reference log-probabilities"
    assert pairs.ref_rejected_logps is not None, "no reference log-probabilities"
    reference = float(np.sum(pairs.ref_chosen_logps) + np.sum(pairs.ref_rejected_logps))
    return torch.stack([*means, (reference - means[-2] - means[-1]) / 2, at_reference])
