"""Losses with an anchor: chosen and rejected are pushed against the reference each by itself, not only apart.

Each is `name(logps, *, beta) -> (B,)`, differentiable; the reduction is the caller's. Names are TRL's.
Below, r = beta log(pi / pi_ref), r_w of chosen and r_l of rejected. Every loss here needs the reference.
"""

import torch
from torch.nn import functional

from dpo_ray.learn.losses.pairs import PairLogps, log_ratios


def nca_pair(logps: PairLogps, *, beta: float) -> torch.Tensor:
    """NCA for two completions: -log sigmoid(r_w) - log sigmoid(-r_w) / 2 - log sigmoid(-r_l) / 2, arXiv:2402.05369."""
    chosen, rejected = _rewards(logps, beta)
    noise = functional.logsigmoid(-chosen) + functional.logsigmoid(-rejected)
    return -functional.logsigmoid(chosen) - 0.5 * noise


def bco_pair(logps: PairLogps, *, beta: float) -> torch.Tensor:
    """BCO on pairs: -log sigmoid(r_w) - log sigmoid(-r_l), arXiv:2404.04656.

    The paper subtracts a running mean of the rewards from r; it is 0 here, as in TRL 1.16, so that a pair's loss does not
    depend on the pairs around it.
    """
    chosen, rejected = _rewards(logps, beta)
    return -functional.logsigmoid(chosen) - functional.logsigmoid(-rejected)


def sppo_hard(logps: PairLogps, *, beta: float) -> torch.Tensor:
    """SPPO with hard labels: (r_w / beta - 1 / (2 beta))^2 + (r_l / beta + 1 / (2 beta))^2; Eq. 4.7, arXiv:2405.00675.

    The paper's win probability is 1 for chosen and 0 for rejected, its eta is 1 / beta.
    """
    chosen, rejected = log_ratios(logps)
    return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2


def apo_zero(logps: PairLogps, *, beta: float) -> torch.Tensor:
    """APO-zero: 1 - sigmoid(r_w) + sigmoid(r_l); Eq. 7, arXiv:2408.06266. For chosen completions that beat the policy."""
    chosen, rejected = _rewards(logps, beta)
    return 1 - torch.sigmoid(chosen) + torch.sigmoid(rejected)


def apo_down(logps: PairLogps, *, beta: float) -> torch.Tensor:
    """APO-down: sigmoid(r_w) + 1 - sigmoid(r_w - r_l); Eq. 8, arXiv:2408.06266. For a policy that beats the chosen ones.

    The one loss here that lowers chosen too: d loss / d r_w is positive while r_w is nearer to 0 than r_w - r_l is.
    """
    chosen, rejected = _rewards(logps, beta)
    return torch.sigmoid(chosen) + 1 - torch.sigmoid(chosen - rejected)


def _rewards(logps: PairLogps, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    chosen, rejected = log_ratios(logps)
    return beta * chosen, beta * rejected
