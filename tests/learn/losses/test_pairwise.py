"""Values by hand on `two_pairs`: log-ratios 2 and -2 (delta 4) over 4 and 2 tokens, and a pair with policy = reference.

With beta 0.5, z = 2 and 0. Below, softplus(x) = log(1 + e^x) = -log sigmoid(-x): softplus(-2) = 0.126928011,
softplus(2) = 2.126928011, softplus(0) = ln 2.
"""

import math

import pytest
import torch

from dpo_ray.learn.losses import pairwise
from tests.learn.losses.batch import swapped, two_pairs

BETA = 0.5
LN2 = math.log(2)
REQUIRED = {"robust": {"label_smoothing": 0.1}, "exo_pair": {"label_smoothing": 0.001}}
NAMES = ("sigmoid", "robust", "hinge", "ipo", "sigmoid_norm", "exo_pair", "discopop")


def losses_of(name, logps, beta=BETA, **options):
    return getattr(pairwise, name)(logps, beta=beta, **REQUIRED.get(name, {}) | options)


def assert_losses(losses, *expected):
    assert losses.tolist() == pytest.approx(expected, rel=1e-8)


def test_sigmoid_is_softplus_of_minus_the_margin():
    assert_losses(losses_of("sigmoid", two_pairs()), 0.12692801104297, LN2)


def test_sigmoid_with_label_smoothing_mixes_both_directions():
    """0.9 * 0.126928011 + 0.1 * 2.126928011 = 0.326928011; at margin 0 both directions are ln 2."""
    assert_losses(losses_of("sigmoid", two_pairs(), label_smoothing=0.1), 0.32692801104297, LN2)


def test_sigmoid_with_length_margin_gives_the_longer_chosen_part_of_its_margin():
    """z = 2 + 0.25 * (4 - 2) = 2.5 and 0 + 0.25 * (3 - 5) = -0.5."""
    losses = losses_of("sigmoid", two_pairs(), length_margin=0.25)
    assert_losses(losses, math.log1p(math.exp(-2.5)), math.log1p(math.exp(0.5)))


def test_sigmoid_with_score_margin_asks_for_more_where_the_gap_is_wide():
    """z = 2 - 0.4 * 1.5 = 1.4; no gap, no margin."""
    assert_losses(losses_of("sigmoid", two_pairs(), score_margin=0.4), math.log1p(math.exp(-1.4)), LN2)


def test_robust_subtracts_the_flipped_loss():
    """(0.9 * 0.126928011 - 0.1 * 2.126928011) / 0.8 = -0.123071989; at margin 0 it is ln 2 * (0.9 - 0.1) / 0.8 = ln 2."""
    assert_losses(losses_of("robust", two_pairs()), -0.12307198895703, LN2)


def test_robust_mean_over_flipped_labels_is_dpo_on_true_ones():
    """The property that it is made for: with the flip rate e, (1 - e) robust(z) + e robust(-z) = -log sigmoid(z)."""
    flipped_mean = 0.9 * losses_of("robust", two_pairs()) + 0.1 * losses_of("robust", swapped(two_pairs()))
    torch.testing.assert_close(flipped_mean, losses_of("sigmoid", two_pairs()), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("beta", "expected"), [(0.5, (0.0, 1.0)), (0.1, (0.6, 1.0))])
def test_hinge_stops_at_margin_one(beta, expected):
    """1 - 0.1 * 4 = 0.6."""
    assert_losses(losses_of("hinge", two_pairs(), beta), *expected)


def test_ipo_pulls_the_difference_per_token_to_half_of_one_over_beta():
    """2 / 4 - (-2) / 2 = 1.5; (1.5 - 1 / 0.5 / 2)^2 = 0.25; at policy = reference (0 - 1)^2 = 1."""
    assert_losses(losses_of("ipo", two_pairs()), 0.25, 1.0)


def test_sigmoid_norm_takes_log_ratios_per_token():
    """0.5 * 1.5 = 0.75: softplus(-0.75)."""
    assert_losses(losses_of("sigmoid_norm", two_pairs()), math.log1p(math.exp(-0.75)), LN2)


def test_exo_pair_is_the_kl_from_its_target():
    """KL((p, 1 - p) || (0.999, 0.001)) with p = sigmoid(2) and p = 1 / 2."""
    kl = lambda p: p * math.log(p / 0.999) + (1 - p) * math.log((1 - p) / 0.001)
    assert_losses(losses_of("exo_pair", two_pairs()), kl(1 / (1 + math.exp(-2))), kl(0.5))


def test_discopop_mixes_logistic_and_exponential():
    """m = sigmoid(2 / 0.05) is 1 but for e^-40: exp(-2). At 0: m = 1 / 2, (ln 2 + 1) / 2."""
    assert_losses(losses_of("discopop", two_pairs()), math.exp(-2), (LN2 + 1) / 2)


def test_discopop_far_on_the_wrong_side_stays_finite():
    """z = -100 in float32: exp(100) overflows and its weight is 0; what is left is the logistic 100."""
    logps = two_pairs(chosen_logps=torch.tensor([-212.0]).requires_grad_(), rejected_logps=torch.tensor([-18.0]))
    logps = logps._replace(**{n: getattr(logps, n)[:1].float() for n in ("ref_chosen_logps", "ref_rejected_logps")})
    losses = losses_of("discopop", logps)
    (gradient,) = torch.autograd.grad(losses.sum(), logps.chosen_logps)
    assert losses.tolist() == pytest.approx([100.0])
    assert gradient.tolist() == pytest.approx([-BETA])


@pytest.mark.parametrize("name", NAMES)
def test_gradient_raises_chosen_and_lowers_rejected(name):
    """At beta 0.1, so that no loss has reached its target: exo_pair at ln 999 = 6.9, ipo at 5 per token."""
    chosen, rejected = two_pairs().chosen_logps.requires_grad_(), two_pairs().rejected_logps.requires_grad_()
    losses = losses_of(name, two_pairs(chosen_logps=chosen, rejected_logps=rejected), beta=0.1)
    gradients = torch.autograd.grad(losses.sum(), (chosen, rejected))
    pairs = slice(0, 1) if name == "discopop" else slice(None)
    assert (gradients[0][pairs] < 0).all()
    assert (gradients[1][pairs] > 0).all()


@pytest.mark.parametrize(("discopop_tau", "slope"), [(0.05, 5 * (1 - LN2) - 0.75), (1.0, (1 - LN2) / 4 - 0.75)])
def test_discopop_slopes_the_wrong_way_at_policy_equal_reference_for_small_tau(discopop_tau, slope):
    """d loss / d z at 0 is (1 - ln 2) / (4 tau) - 3 / 4: positive at the paper's tau."""
    chosen = two_pairs().chosen_logps.requires_grad_()
    losses = losses_of("discopop", two_pairs(chosen_logps=chosen), discopop_tau=discopop_tau)
    assert torch.autograd.grad(losses[1], chosen)[0][1].item() == pytest.approx(BETA * slope, rel=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_loss_depends_on_the_margin_alone(name):
    """One more nat for all four log-probabilities of a side, or for policy and reference, changes nothing."""
    logps = two_pairs()
    moved = logps._replace(
        chosen_logps=logps.chosen_logps + 3,
        ref_chosen_logps=logps.ref_chosen_logps + 3,
        rejected_logps=logps.rejected_logps - 1,
        ref_rejected_logps=logps.ref_rejected_logps - 1,
    )
    torch.testing.assert_close(losses_of(name, moved), losses_of(name, logps), rtol=1e-12, atol=0)


def test_swapped_pair_has_the_negated_margin():
    """softplus(-z) - softplus(z) = -z, so that sigmoid tells the margin of both: -2 and 2."""
    difference = losses_of("sigmoid", two_pairs()) - losses_of("sigmoid", swapped(two_pairs()))
    assert difference.tolist() == pytest.approx([-2.0, 0.0], rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_loss_keeps_its_dtype(name, dtype):
    assert losses_of(name, type(two_pairs())(*(column.to(dtype) for column in two_pairs()[:7]))).dtype == dtype
