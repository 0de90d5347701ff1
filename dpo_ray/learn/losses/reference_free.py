"""Losses without a reference: simpo, and the two parts of ORPO (its odds ratio, and the likelihood of chosen).

Each is `name(logps, *, beta, options) -> (B,)`, differentiable; the reduction is the caller's.
Below, m = log pi / |y| is the log-probability per token of a completion; m_w of chosen, m_l of rejected.
"""

import math

import torch
from torch.nn import functional

from dpo_ray.learn.losses.pairs import PairLogps, mean_logps, per_token

REFERENCE_FREE = frozenset({"simpo", "orpo", "sft"})


def simpo(logps: PairLogps, *, beta: float, simpo_gamma: float = 0.5) -> torch.Tensor:
    """SimPO: -log sigmoid(beta (m_w - m_l) - gamma), arXiv:2405.14734. As TRL's CPOTrainer with loss_type simpo.

    Args:
        simpo_gamma: the target margin gamma, in units of the logit (the paper tunes gamma / beta).
    """
    chosen, rejected = mean_logps(logps)
    return -functional.logsigmoid(beta * (chosen - rejected) - simpo_gamma)


def orpo(logps: PairLogps, *, beta: float) -> torch.Tensor:
    """ORPO's odds-ratio term: -beta log sigmoid(log odds(m_w) - log odds(m_l)); Eqs. 4 and 7, arXiv:2403.07691.

    odds(m) = p / (1 - p) with p = exp(m). beta is the paper's lambda, as in TRL's ORPOTrainer. ORPO is the sum of `sft`
    and this.
    """
    chosen, rejected = mean_logps(logps)
    log_odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    return -beta * functional.logsigmoid(log_odds)


def sft(logps: PairLogps, *, beta: float | None = None, mean_chosen_tokens: float | None = None) -> torch.Tensor:
    """Negative log-likelihood of chosen: a term that keeps the chosen completions likely. beta has no effect.

    By default -log pi(chosen) / |y_w|, so that the mean over pairs weighs every completion alike.

    Args:
        mean_chosen_tokens: chosen tokens of the global batch divided by its pairs. -log pi(chosen) is divided by it
            instead of by |y_w|, so that the mean over the pairs of the global batch is the mean over its chosen tokens.
            TRL's `sft` is this on each device's micro-batch; over several of them TRL averages the means.
    """
    chosen = logps.chosen_logps if logps.full_chosen_logps is None else logps.full_chosen_logps
    if mean_chosen_tokens is None:
        return -per_token(chosen, logps.chosen_tokens)
    return -chosen / max(mean_chosen_tokens, 1.0)


def _log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) for x <= 0, exact on both sides of -ln 2.

    x = 0, a probability of one, is moved to the nearest value below: the odds are large and not infinite, and the gradient
    is no NaN.
    """
    x = torch.clamp(x, max=-torch.finfo(x.dtype).eps)
    # Each branch gets an input that is safe for it: `where` alone lets the gradient of the other one through as NaN.
    near = x > -math.log(2)
    small = torch.log(-torch.expm1(torch.where(near, x, -1.0)))
    large = torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    return torch.where(near, small, large)
