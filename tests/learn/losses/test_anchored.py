"""Values by hand on `two_pairs` with beta 0.5: r_w = 1, r_l = -1, and a pair with policy = reference.

softplus(x) = log(1 + e^x): softplus(-1) = 0.313261688, softplus(1) = 1.313261688. sigmoid(1) = 0.731058579.
"""

import math

import pytest
import torch

from dpo_ray.learn.losses import anchored
from tests.learn.losses.batch import two_pairs

BETA = 0.5
NAMES = ("nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nca_pair", (0.313261687518 + 0.5 * 1.313261687518 + 0.5 * 0.313261687518, 2 * math.log(2))),
        ("bco_pair", (2 * 0.313261687518, 2 * math.log(2))),
        ("sppo_hard", ((2 - 1) ** 2 + (-2 + 1) ** 2, 1**2 + 1**2)),
        ("apo_zero", (2 * (1 - 0.731058578630), 1.0)),
        ("apo_down", (0.731058578630 + 1 - 0.880797077978, 1.0)),
    ],
)
def test_loss_matches_hand_numbers(name, expected):
    """apo_down: sigmoid(1) + 1 - sigmoid(2)."""
    assert getattr(anchored, name)(two_pairs(), beta=BETA).tolist() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("name", "sign_of_chosen"), [(n, 1 if n == "apo_down" else -1) for n in NAMES])
def test_gradient_lowers_rejected_and_moves_chosen_as_the_loss_says(name, sign_of_chosen):
    """apo_down alone lowers chosen; on pair 1 its two pulls on chosen cancel. nca_pair has reached its target for chosen
    (sigmoid(r) = 2 / 3) on neither pair at beta 0.1."""
    chosen, rejected = two_pairs().chosen_logps.requires_grad_(), two_pairs().rejected_logps.requires_grad_()
    losses = getattr(anchored, name)(two_pairs(chosen_logps=chosen, rejected_logps=rejected), beta=0.1)
    gradients = torch.autograd.grad(losses[0], (chosen, rejected))
    assert gradients[0][0] * sign_of_chosen > 0
    assert gradients[1][0] > 0


@pytest.mark.parametrize("name", NAMES)
def test_loss_depends_on_each_side_by_itself(name):
    """Chosen and rejected one nat up keeps the margin and changes the loss: what sets these losses apart."""
    logps = two_pairs()
    moved = logps._replace(chosen_logps=logps.chosen_logps + 1, rejected_logps=logps.rejected_logps + 1)
    change = getattr(anchored, name)(moved, beta=BETA) - getattr(anchored, name)(logps, beta=BETA)
    assert change[0].abs() > 1e-3  # on pair 1 apo_zero is symmetric
