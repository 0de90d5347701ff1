"""What the papers prove, on a policy that is a table: one prompt, one logit per completion, a completion is one token."""

import math
from itertools import pairwise

import pytest
import torch

from dpo_ray.learn.losses import PairLogps
from dpo_ray.learn.losses.pairwise import ipo, sigmoid


def table_logps(logits: torch.Tensor, ref_logits: torch.Tensor, chosen: list[int], rejected: list[int]) -> PairLogps:
    logps, ref_logps = logits.log_softmax(0), ref_logits.log_softmax(0)
    tokens = torch.ones(len(chosen), dtype=logits.dtype)
    return PairLogps(logps[chosen], logps[rejected], ref_logps[chosen], ref_logps[rejected], tokens, tokens)


def test_sigmoid_on_bradley_terry_preferences_recovers_the_optimal_policy():
    """DPO's theorem, arXiv:2305.18290: the minimum under P(i beats j) = sigmoid(r_i - r_j) is pi_ref exp(r / beta) / Z."""
    beta = 0.4
    scores = torch.tensor([1.0, 0.2, -0.5, 0.6], dtype=torch.float64)
    ref_logits = torch.tensor([0.3, -1.0, 0.8, 0.0], dtype=torch.float64)
    pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
    chosen, rejected = [i for i, _ in pairs], [j for _, j in pairs]
    preferred = torch.sigmoid(scores[chosen] - scores[rejected])
    logits = ref_logits.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = (preferred * sigmoid(table_logps(logits, ref_logits, chosen, rejected), beta=beta)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    optimal = (ref_logits.log_softmax(0) + scores / beta).softmax(0)
    torch.testing.assert_close(logits.detach().softmax(0), optimal, rtol=0, atol=1e-3)
    assert (ref_logits.softmax(0) - optimal).abs().max() > 0.1  # it had to move


def log_ratio_margins(loss, *, beta: float, steps: list[int], learning_rate: float) -> list[float]:
    """h = log(pi(1) / pi(2)) - log(pi_ref(1) / pi_ref(2)) after each of `steps`, when 1 always beats 2."""
    ref_logits = torch.tensor([0.0, 0.5], dtype=torch.float64)
    logits, margins = ref_logits.clone().requires_grad_(), []
    for step in range(1, max(steps) + 1):
        (gradient,) = torch.autograd.grad(loss(table_logps(logits, ref_logits, [0], [1]), beta=beta).sum(), logits)
        with torch.no_grad():
            logits -= learning_rate * gradient
        if step in steps:
            difference = (logits - ref_logits).detach()
            margins.append((difference[0] - difference[1]).item())
    return margins


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_deterministic_preferences_send_dpo_to_infinity(beta):
    """Section 4.2 and the two-action example of arXiv:2310.12036: however large beta, nothing holds the policy back.

    On a gradient flow beta h = log(1 + 2 beta^2 t) but for lower order: every tenfold of the steps adds log 10 / beta.
    """
    steps = [20, 200, 2000]
    margins = log_ratio_margins(sigmoid, beta=beta, steps=steps, learning_rate=1 / beta**2)
    growth = [beta * (later - earlier) for earlier, later in pairwise(margins)]
    assert growth == pytest.approx([math.log(10)] * 2, rel=0.1)


@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_deterministic_preferences_leave_ipo_at_its_value(tau):
    """The same example: IPO settles at h = 1 / (2 tau), which from a uniform reference is pi(1) = sigmoid(1 / (2 tau))."""
    margins = log_ratio_margins(ipo, beta=tau, steps=[50, 500], learning_rate=0.1)
    assert margins == pytest.approx([1 / (2 * tau)] * 2, rel=1e-6)
