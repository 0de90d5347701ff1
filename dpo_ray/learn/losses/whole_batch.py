"""Losses that sort: a pair's loss depends on every pair of the global batch.

They are right only when `logps` holds the whole global batch: sorting each micro-batch or worker by itself is another
objective. TRL sorts each device's micro-batch. `terms.check_whole_batch` refuses a
layout that would cut the batch.
"""

import torch

from dpo_ray.learn.losses.pairs import PairLogps, log_ratios
from dpo_ray.learn.losses.pairwise import smoothed_logistic

WHOLE_BATCH = frozenset({"aot", "aot_unpaired"})


def aot(logps: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> torch.Tensor:
    """AOT, paired: -log sigmoid(beta (sort(a) - sort(b))), arXiv:2406.05882.

    a = log pi(chosen) - log pi(rejected), b the same under the reference; both sorted over the global batch. The i-th value
    belongs to the i-th smallest a, not to pair i. At one pair it is `sigmoid`.

    Args:
        label_smoothing: as in `sigmoid` (TRL's option, not the paper's).
    """
    assert logps.ref_chosen_logps is not None, "this loss needs reference log-probabilities"
    assert logps.ref_rejected_logps is not None, "this loss needs reference log-probabilities"
    policy = torch.sort(logps.chosen_logps - logps.rejected_logps).values
    reference = torch.sort(logps.ref_chosen_logps - logps.ref_rejected_logps).values
    return smoothed_logistic(beta * (policy - reference), label_smoothing)


def aot_unpaired(logps: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> torch.Tensor:
    """AOT, unpaired: -log sigmoid(beta (sort(s_w) - sort(s_l))), s = log(pi / pi_ref), arXiv:2406.05882.

    Chosen and rejected are sorted each by itself over the global batch: which rejected belongs to which chosen has no
    influence. The i-th value belongs to the i-th smallest of either side.

    Args:
        label_smoothing: as in `sigmoid` (TRL's option, not the paper's).
    """
    chosen, rejected = log_ratios(logps)
    delta = torch.sort(chosen).values - torch.sort(rejected).values
    return smoothed_logistic(beta * delta, label_smoothing)
