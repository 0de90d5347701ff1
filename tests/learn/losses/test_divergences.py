import math

import pytest
import torch

from dpo_ray.learn.losses.divergences import alpha_divergence, divergence_scores, forward_kl, js_divergence, reverse_kl
from tests.learn.losses.batch import two_pairs

LOG_RATIOS = torch.tensor([math.log(4), 0.0, math.log(0.25)], dtype=torch.float64)


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        (reverse_kl, [math.log(4), 0.0, math.log(0.25)]),
        (forward_kl, [0.75, 0.0, -3.0]),
        (js_divergence, [math.log(1.6), 0.0, math.log(0.4)]),
        (lambda x: alpha_divergence(x, coef=0.5), [1.0, 0.0, -2.0]),
        (lambda x: alpha_divergence(x, coef=2.0), [3.0, 0.0, -0.75]),
        (lambda x: alpha_divergence(x, coef=1.0), [math.log(4), 0.0, math.log(0.25)]),
    ],
    ids=["reverse_kl", "forward_kl", "js", "alpha=0.5", "alpha=2", "alpha=1"],
)
def test_divergence_is_f_prime_of_the_ratio(score, expected):
    """t = 4, 1, 1/4. E.g. 1 - 1/4 = 0.75; log(8/5); (4^-0.5 - 1) / -0.5 = 1; (4 - 1) / 1 = 3."""
    assert score(LOG_RATIOS).tolist() == pytest.approx(expected, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("score", [forward_kl, js_divergence, lambda x: alpha_divergence(x, coef=0.5)])
def test_divergence_of_extreme_ratios_has_finite_value_and_gradient(score):
    """Sums over long completions reach hundreds of nats, where exp overflows float32."""
    log_ratios = torch.tensor([-400.0, -100.0, 100.0, 400.0], requires_grad=True)
    scores = score(log_ratios)
    scores.sum().backward()
    assert scores.isfinite().all()
    assert log_ratios.grad is not None
    assert log_ratios.grad.isfinite().all()


def test_divergence_scores_are_taken_of_each_side():
    chosen, rejected = divergence_scores(two_pairs(), "forward_kl", None)
    assert chosen.tolist() == pytest.approx([1 - math.exp(-2), 0.0])
    assert rejected.tolist() == pytest.approx([1 - math.exp(2), 0.0])
