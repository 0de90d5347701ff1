"""What every loss is computed from: log-probabilities and token counts of B pairs, and the quantities derived from them.

Shapes: every tensor is (B,), B pairs. Log-probabilities are sums over the completion's tokens, in nats.
"""

from typing import NamedTuple

import torch


class PairLogps(NamedTuple):
    """B pairs as a loss sees them; all (B,). Nothing is cast: give float64 and the losses are float64."""

    chosen_logps: torch.Tensor
    """log pi(chosen | prompt) under the policy. With LD-DPO, the desensitised sums (modifiers.py)."""
    rejected_logps: torch.Tensor
    ref_chosen_logps: torch.Tensor | None
    """The same under the frozen reference; None where no loss of the sum needs it."""
    ref_rejected_logps: torch.Tensor | None
    chosen_tokens: torch.Tensor
    """Tokens of each completion, the end token included; an empty one counts as one token in a mean."""
    rejected_tokens: torch.Tensor
    score_gap: torch.Tensor | None = None
    """Score of chosen minus score of rejected; None without scores."""
    full_chosen_logps: torch.Tensor | None = None
    """Plain sums of chosen for `sft` beside LD-DPO, which leaves desensitised ones in chosen_logps; else None."""


class ImplicitRewards(NamedTuple):
    """What metrics report of a pair; (B,), detached."""

    chosen: torch.Tensor
    rejected: torch.Tensor


def log_ratios(logps: PairLogps) -> tuple[torch.Tensor, torch.Tensor]:
    """log(pi / pi_ref) of chosen and of rejected, (B,) each."""
    assert logps.ref_chosen_logps is not None, "this loss needs reference log-probabilities"
    assert logps.ref_rejected_logps is not None, "this loss needs reference log-probabilities"
    return logps.chosen_logps - logps.ref_chosen_logps, logps.rejected_logps - logps.ref_rejected_logps


def mean_logps(logps: PairLogps) -> tuple[torch.Tensor, torch.Tensor]:
    """log pi per token of chosen and of rejected, (B,) each."""
    return per_token(logps.chosen_logps, logps.chosen_tokens), per_token(logps.rejected_logps, logps.rejected_tokens)


def per_token(sums: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Sums over completions divided by their tokens; a completion without tokens has the sum 0 and stays 0."""
    return sums / tokens.clamp(min=1)


def implicit_rewards(logps: PairLogps, *, beta: float) -> ImplicitRewards:
    """Rewards that the policy implies, for metrics.

    With a reference beta * log(pi / pi_ref), the same for every loss and divergence, as TRL's DPOTrainer reports them.
    Without one (simpo, orpo) beta * (log pi per token), as TRL's CPOTrainer and ORPOTrainer report them.
    """
    chosen, rejected = mean_logps(logps) if logps.ref_chosen_logps is None else log_ratios(logps)
    return ImplicitRewards(beta * chosen.detach(), beta * rejected.detach())
