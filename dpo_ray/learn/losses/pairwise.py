"""Losses of the difference between chosen and rejected: only the margin of a pair matters, not either side alone.

Each is `name(logps, *, beta, options) -> (B,)`, differentiable; the reduction is the caller's. Names are TRL's.
Below, s = f'(pi / pi_ref) is the score of a completion, by default log(pi / pi_ref) (divergences.py); s_w of chosen,
s_l of rejected, |y_w| and |y_l| their tokens; delta = s_w - s_l.

Every loss here needs the reference. TRL returns the mean over a micro-batch; a mean over pairs of these values equals it.
"""

import math

import torch
from torch.nn import functional

from dpo_ray.learn.losses.divergences import divergence_scores
from dpo_ray.learn.losses.pairs import PairLogps, per_token


def sigmoid(
    logps: PairLogps,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    length_margin: float = 0.0,
    score_margin: float = 0.0,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float | None = None,
) -> torch.Tensor:
    """DPO: -log sigmoid(beta delta), Eq. 7, arXiv:2305.18290.

    Args:
        label_smoothing: cDPO: -(1 - e) log sigmoid(z) - e log sigmoid(-z), z = beta delta, with e the share of wrong
            labels; Eq. 3, https://ericmitchell.ai/cdpo.pdf. TRL 1.16 ignores it here.
        length_margin: R-DPO: z = beta delta + length_margin (|y_w| - |y_l|), arXiv:2403.19159: a longer chosen completion
            has part of its margin for free, and is pushed up less. Not in TRL.
        score_margin: ODPO with a linear offset: z = beta delta - score_margin * score_gap, arXiv:2402.10571: the margin
            has to grow with the gap of the scores. Needs score_gap. Not in TRL.
    """
    logits = beta * _delta(logps, f_divergence_type, f_alpha_divergence_coef)
    if length_margin:
        logits = logits + length_margin * (logps.chosen_tokens - logps.rejected_tokens)
    if score_margin:
        assert logps.score_gap is not None, "score_margin needs score_gap"
        logits = logits - score_margin * logps.score_gap
    return smoothed_logistic(logits, label_smoothing)


def robust(
    logps: PairLogps,
    *,
    beta: float,
    label_smoothing: float,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float | None = None,
) -> torch.Tensor:
    """Robust DPO: (-(1 - e) log sigmoid(z) + e log sigmoid(-z)) / (1 - 2 e), z = beta delta, arXiv:2403.00409.

    In the mean over labels that are flipped with probability e it equals DPO on the true labels. Negative for large z.

    Args:
        label_smoothing: e, below 0.5.
    """
    logits = beta * _delta(logps, f_divergence_type, f_alpha_divergence_coef)
    clean = -(1 - label_smoothing) * functional.logsigmoid(logits)
    flipped = -label_smoothing * functional.logsigmoid(-logits)
    return (clean - flipped) / (1 - 2 * label_smoothing)


def hinge(
    logps: PairLogps, *, beta: float, f_divergence_type: str = "reverse_kl", f_alpha_divergence_coef: float | None = None
) -> torch.Tensor:
    """SLiC's hinge on DPO's margin: max(0, 1 - beta delta); Section 2, arXiv:2305.10425, and arXiv:2309.06657."""
    return torch.relu(1 - beta * _delta(logps, f_divergence_type, f_alpha_divergence_coef))


def ipo(
    logps: PairLogps, *, beta: float, f_divergence_type: str = "reverse_kl", f_alpha_divergence_coef: float | None = None
) -> torch.Tensor:
    """IPO: (s_w / |y_w| - s_l / |y_l| - 1 / (2 beta))^2, Eq. 17, arXiv:2310.12036, where beta is called tau.

    Scores are averages over tokens, as IPO's authors say they trained (TRL does the same); the paper writes sums. beta has
    therefore another scale than in `sigmoid`.
    """
    chosen, rejected = divergence_scores(logps, f_divergence_type, f_alpha_divergence_coef)
    delta = per_token(chosen, logps.chosen_tokens) - per_token(rejected, logps.rejected_tokens)
    return (delta - 1 / (2 * beta)) ** 2


def sigmoid_norm(
    logps: PairLogps, *, beta: float, f_divergence_type: str = "reverse_kl", f_alpha_divergence_coef: float | None = None
) -> torch.Tensor:
    """Length-normalised DPO: -log sigmoid(beta (s_w / |y_w| - s_l / |y_l|)); Section 4.3, arXiv:2411.15124."""
    chosen, rejected = divergence_scores(logps, f_divergence_type, f_alpha_divergence_coef)
    delta = per_token(chosen, logps.chosen_tokens) - per_token(rejected, logps.rejected_tokens)
    return -functional.logsigmoid(beta * delta)


def exo_pair(
    logps: PairLogps,
    *,
    beta: float,
    label_smoothing: float,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float | None = None,
) -> torch.Tensor:
    """EXO for two completions: KL((p, 1 - p) || (1 - e, e)), p = sigmoid(beta delta); Eq. 16, arXiv:2402.00856.

    Args:
        label_smoothing: e, above 0 (the KL is infinite at 0); 1e-3 in the paper.
    """
    logits = beta * _delta(logps, f_divergence_type, f_alpha_divergence_coef)
    # Logarithms of Python floats, so that they are as exact as float64 losses; TRL takes them in float32.
    chosen = torch.sigmoid(logits) * (functional.logsigmoid(logits) - math.log1p(-label_smoothing))
    rejected = torch.sigmoid(-logits) * (functional.logsigmoid(-logits) - math.log(label_smoothing))
    return chosen + rejected


def discopop(
    logps: PairLogps,
    *,
    beta: float,
    discopop_tau: float = 0.05,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float | None = None,
) -> torch.Tensor:
    """DiscoPOP: (1 - m) (-log sigmoid(z)) + m exp(-z), m = sigmoid(z / tau), z = beta delta; Eq. 5, arXiv:2406.08414.

    Not convex: at z = 0, where training starts, its slope is (1 - ln 2) / (4 tau) - 3 / 4, which is positive below tau = 0.1:
    small margins fall before they rise.
    """
    logits = beta * _delta(logps, f_divergence_type, f_alpha_divergence_coef)
    modulation = torch.sigmoid(logits / discopop_tau)
    # m exp(-z) in one exponential: as a product it is 0 * inf = NaN for very negative z, as it is in TRL.
    exponential = torch.exp(functional.logsigmoid(logits / discopop_tau) - logits)
    return -functional.logsigmoid(logits) * (1 - modulation) + exponential


def smoothed_logistic(logits: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """-(1 - e) log sigmoid(z) - e log sigmoid(-z): cross-entropy of a label that is right with probability 1 - e."""
    losses = -functional.logsigmoid(logits)
    if not label_smoothing:
        return losses
    return (1 - label_smoothing) * losses - label_smoothing * functional.logsigmoid(-logits)


def _delta(logps: PairLogps, kind: str, coef: float | None) -> torch.Tensor:
    chosen, rejected = divergence_scores(logps, kind, coef)
    return chosen - rejected
