"""Values by hand on `two_pairs`: log-probabilities per token -10/4 = -2.5 and -20/2 = -10; -6/3 = -2 and -9/5 = -1.8."""

import math

import pytest
import torch

from dpo_ray.learn.losses import reference_free
from tests.learn.losses.batch import two_pairs

WITHOUT_REFERENCE = two_pairs(ref_chosen_logps=None, ref_rejected_logps=None)


def test_simpo_asks_for_its_margin_on_averages():
    """2 * (-2.5 + 10) - 1 = 14 and 2 * (-2 + 1.8) - 1 = -1.4."""
    losses = reference_free.simpo(WITHOUT_REFERENCE, beta=2.0, simpo_gamma=1.0)
    assert losses.tolist() == pytest.approx([math.log1p(math.exp(-14)), math.log1p(math.exp(1.4))], rel=1e-10)


def test_orpo_compares_odds_of_averages():
    """log odds(m) = m - log(1 - e^m), on both sides of the branch at ln 2; times lambda 0.25."""
    log_odds = lambda m: m - math.log(1 - math.exp(m))
    expected = [
        0.25 * math.log1p(math.exp(log_odds(-10) - log_odds(-2.5))),
        0.25 * math.log1p(math.exp(log_odds(-1.8) - log_odds(-2))),
    ]
    assert reference_free.orpo(WITHOUT_REFERENCE, beta=0.25).tolist() == pytest.approx(expected, rel=1e-10)


def test_orpo_above_one_half_takes_the_other_branch():
    """m = ln 0.8 and ln 0.75: odds 4 and 3, so -log sigmoid(log(4 / 3)) = log(1 + 3 / 4)."""
    ones = torch.ones(1, dtype=torch.float64)
    logps = WITHOUT_REFERENCE._replace(
        chosen_logps=math.log(0.8) * ones, rejected_logps=math.log(0.75) * ones, chosen_tokens=ones, rejected_tokens=ones
    )
    assert reference_free.orpo(logps, beta=1.0).tolist() == pytest.approx([math.log(1.75)], rel=1e-12)


def test_orpo_of_a_certain_completion_is_finite():
    """Probability one has infinite odds; a policy that has memorised chosen must not turn to NaN."""
    chosen = torch.zeros(2, requires_grad=True)
    losses = reference_free.orpo(WITHOUT_REFERENCE._replace(chosen_logps=chosen, rejected_logps=torch.ones(2) * -3), beta=1.0)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert chosen.grad is not None
    assert chosen.grad.isfinite().all()


def test_sft_is_the_mean_over_each_completions_tokens():
    assert reference_free.sft(WITHOUT_REFERENCE).tolist() == [2.5, 2.0]


def test_sft_over_global_tokens_has_the_mean_over_all_tokens_as_mean_over_pairs():
    """(10 + 6) nats over 7 tokens."""
    losses = reference_free.sft(WITHOUT_REFERENCE, mean_chosen_tokens=3.5)
    assert losses.mean().item() == pytest.approx(16 / 7, rel=1e-12)


def test_sft_beside_length_desensitising_is_of_the_plain_sums():
    full = torch.tensor([-12.0, -9.0], dtype=torch.float64)
    assert reference_free.sft(WITHOUT_REFERENCE._replace(full_chosen_logps=full)).tolist() == [3.0, 3.0]


def test_sft_of_an_empty_completion_is_zero():
    zeros = torch.zeros(2, dtype=torch.float64)
    assert reference_free.sft(WITHOUT_REFERENCE._replace(chosen_logps=zeros, chosen_tokens=zeros)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", ["simpo", "orpo"])
def test_gradient_raises_chosen_and_lowers_rejected(name):
    chosen, rejected = two_pairs().chosen_logps.requires_grad_(), two_pairs().rejected_logps.requires_grad_()
    logps = WITHOUT_REFERENCE._replace(chosen_logps=chosen, rejected_logps=rejected)
    gradients = torch.autograd.grad(getattr(reference_free, name)(logps, beta=0.1).sum(), (chosen, rejected))
    assert (gradients[0] < 0).all()
    assert (gradients[1] > 0).all()


def test_sft_gradient_raises_chosen_alone():
    chosen, rejected = two_pairs().chosen_logps.requires_grad_(), two_pairs().rejected_logps.requires_grad_()
    logps = WITHOUT_REFERENCE._replace(chosen_logps=chosen, rejected_logps=rejected)
    gradients = torch.autograd.grad(reference_free.sft(logps).sum(), (chosen, rejected), allow_unused=True)
    assert gradients[0].tolist() == pytest.approx([-1 / 4, -1 / 3])
    assert gradients[1] is None
