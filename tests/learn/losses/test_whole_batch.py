import math

import pytest
import torch

from dpo_ray.learn.losses import PairLogps, whole_batch
from dpo_ray.learn.losses.pairwise import sigmoid
from tests.learn.losses.batch import pair_logps, token_batch, two_pairs

BETA = 0.5


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_aot_compares_sorted_margins_of_policy_and_reference():
    """Policy 10, 3 and reference 6, 3: sorted 3, 10 against 3, 6, so 0 and 4 times beta."""
    losses = whole_batch.aot(two_pairs(), beta=BETA)
    assert losses.tolist() == pytest.approx([math.log(2), softplus(-2)], rel=1e-12)


def test_aot_unpaired_compares_sorted_sides():
    """Chosen 2, 0 and rejected -2, 0: sorted 0, 2 against -2, 0, so 2 and 2 times beta."""
    losses = whole_batch.aot_unpaired(two_pairs(), beta=BETA)
    assert losses.tolist() == pytest.approx([softplus(-1), softplus(-1)], rel=1e-12)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_label_smoothing_mixes_both_directions(name):
    loss = getattr(whole_batch, name)
    smoothed, plain = loss(two_pairs(), beta=BETA, label_smoothing=0.1), loss(two_pairs(), beta=BETA)
    logits = -torch.log(torch.expm1(plain))  # plain = softplus(-z)
    torch.testing.assert_close(smoothed, plain + 0.1 * logits, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_sorting_one_pair_is_sigmoid(name):
    logps = pair_logps(token_batch(slice(0, 1)))
    torch.testing.assert_close(getattr(whole_batch, name)(logps, beta=BETA), sigmoid(logps, beta=BETA), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("name", "whole", "halves"), [("aot", (0, 5), (-5, 10)), ("aot_unpaired", (-2, 7), (-8, 13))])
def test_cut_batch_is_another_loss(name, whole, halves):
    """Why a cut is refused. Margins of the policy 0, 10 and of the reference 5, 0; log-ratios -5, 10 and 3, -3."""
    columns = {"chosen_logps": [0, 10], "rejected_logps": [0, 0], "ref_chosen_logps": [5, 0], "ref_rejected_logps": [0, 0]}
    if name == "aot_unpaired":
        columns["rejected_logps"] = [3, -3]
    logps = two_pairs(**{column: torch.tensor(values, dtype=torch.float64) for column, values in columns.items()})
    parts = [PairLogps(*(column[i : i + 1] for column in logps[:6])) for i in range(2)]
    loss = getattr(whole_batch, name)
    assert loss(logps, beta=1.0).tolist() == pytest.approx([softplus(-z) for z in whole], rel=1e-12)
    assert [loss(part, beta=1.0).item() for part in parts] == pytest.approx([softplus(-z) for z in halves], rel=1e-12)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_gradient_raises_chosen_and_lowers_rejected(name):
    chosen, rejected = two_pairs().chosen_logps.requires_grad_(), two_pairs().rejected_logps.requires_grad_()
    losses = getattr(whole_batch, name)(two_pairs(chosen_logps=chosen, rejected_logps=rejected), beta=BETA)
    gradients = torch.autograd.grad(losses.sum(), (chosen, rejected))
    assert (gradients[0] < 0).all()
    assert (gradients[1] > 0).all()
