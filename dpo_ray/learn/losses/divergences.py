"""f-DPO: other divergences than the reverse KL between policy and reference (arXiv:2309.16240).

A divergence of generator f replaces the log-ratio log t, t = pi / pi_ref, by f'(t). f'(t) leaves a term of the prompt alone,
which cancels in chosen minus rejected and nowhere else: only losses of that difference have this option, as in TRL.

Where TRL overflows to NaN, exponents are clamped: beyond exp(MAX_EXPONENT) a score stays at its bound, with gradient 0.
"""

import math
from collections.abc import Callable

import torch
from torch.nn import functional

from dpo_ray.learn.losses.pairs import PairLogps, log_ratios

MAX_EXPONENT = 80.0
"""exp of it is finite in float32 and bfloat16; TRL's bound for the alpha-divergence."""


def reverse_kl(log_ratios: torch.Tensor) -> torch.Tensor:
    """f'(t) = log t, but for a constant: standard DPO."""
    return log_ratios


def forward_kl(log_ratios: torch.Tensor) -> torch.Tensor:
    """f'(t) = 1 - 1 / t."""
    return 1 - torch.exp(torch.clamp(-log_ratios, max=MAX_EXPONENT))


def js_divergence(log_ratios: torch.Tensor) -> torch.Tensor:
    """f'(t) = log(2 t / (1 + t)) = log 2 + log sigmoid(log t)."""
    return math.log(2) + functional.logsigmoid(log_ratios)


def alpha_divergence(log_ratios: torch.Tensor, *, coef: float) -> torch.Tensor:
    """f'(t) = (t^(coef - 1) - 1) / (coef - 1), and its limit log t at coef = 1."""
    if abs(coef - 1) < 1e-6:
        return log_ratios
    exponents = torch.clamp((coef - 1) * log_ratios, max=MAX_EXPONENT)
    # Not expm1: TRL subtracts, and its values are the golden ones.
    return (torch.exp(exponents) - 1) / (coef - 1)


WITHOUT_COEFFICIENT: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "js_divergence": js_divergence,
}


def divergence_scores(logps: PairLogps, kind: str, coef: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """f'(pi / pi_ref) of chosen and of rejected, (B,) each.

    Args:
        kind: reverse_kl, forward_kl, js_divergence or alpha_divergence.
        coef: alpha of alpha_divergence; None with every other kind.
    """
    chosen, rejected = log_ratios(logps)
    if kind == "alpha_divergence":
        assert coef is not None, "alpha_divergence needs its coefficient"
        return alpha_divergence(chosen, coef=coef), alpha_divergence(rejected, coef=coef)
    assert coef is None, f"{kind} has no coefficient"
    score = WITHOUT_COEFFICIENT[kind]
    return score(chosen), score(rejected)
