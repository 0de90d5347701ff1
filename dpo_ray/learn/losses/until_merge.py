"""Preference losses: free functions over (B,) tensors, B pairs. The reduction is the caller's."""

from typing import NamedTuple

import torch
from torch.nn import functional


class PairLoss(NamedTuple):
    """What a loss says about each pair; all (B,)."""

    losses: torch.Tensor
    chosen_rewards: torch.Tensor
    """beta * (chosen_logps - ref_chosen_logps), detached."""
    rejected_rewards: torch.Tensor
    """beta * (rejected_logps - ref_rejected_logps), detached."""


def sigmoid_loss(
    chosen_logps: torch.Tensor,
    rejected_logps: torch.Tensor,
    ref_chosen_logps: torch.Tensor,
    ref_rejected_logps: torch.Tensor,
    *,
    beta: float,
) -> PairLoss:
    """DPO: -log sigmoid(margin), Eq. 7 of arXiv:2305.18290.

    Args:
        chosen_logps, rejected_logps: (B,) log-probabilities under the policy, sums in nats.
        ref_chosen_logps, ref_rejected_logps: (B,) the same under the frozen reference.
        beta: strength of the pull to the reference.
    """
    chosen_rewards = beta * (chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * (rejected_logps - ref_rejected_logps)
    losses = -functional.logsigmoid(chosen_rewards - rejected_rewards)
    return PairLoss(losses, chosen_rewards.detach(), rejected_rewards.detach())
