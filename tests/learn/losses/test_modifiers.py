import math

import pytest
import torch

from dpo_ray.learn.losses import desensitise, desensitised_sums, wpo_weights


def test_desensitised_sum_scales_what_lies_beyond_the_shared_length():
    """Three tokens with a shared length of 2: -1 - 2 - 0.25 * 4 = -4. The shorter one keeps its sum. Padding is never read."""
    nan = math.nan
    logps_ST = torch.tensor([[nan, -1.0, -2.0, -4.0], [-3.0, -5.0, nan, nan]])
    mask_ST = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]])
    sums = desensitised_sums(logps_ST, mask_ST, torch.tensor([2, 2]), ld_alpha=0.25)
    assert sums.tolist() == [-4.0, -8.0]


@pytest.mark.parametrize(("ld_alpha", "expected"), [(1.0, -7.0), (0.0, -3.0)])
def test_desensitised_sum_at_the_ends_is_the_whole_or_the_shared_part(ld_alpha, expected):
    logps_ST, mask_ST = torch.tensor([[-1.0, -2.0, -4.0]]), torch.ones(1, 3)
    assert desensitised_sums(logps_ST, mask_ST, torch.tensor([2]), ld_alpha=ld_alpha).tolist() == [expected]


def test_desensitise_takes_packed_tokens_as_well():
    """Two completions of 3 and 1 tokens in one row, shared length 1."""
    logps = torch.tensor([-1.0, -2.0, -4.0, -8.0])
    scaled = desensitise(logps, torch.tensor([0, 1, 2, 0]), torch.tensor([1, 1, 1, 1]), ld_alpha=0.5)
    assert scaled.tolist() == [-1.0, -1.0, -2.0, -8.0]


def test_wpo_weight_is_the_product_of_both_sides_and_detached():
    chosen = torch.tensor([math.log(0.5), 0.0], requires_grad=True)
    weights = wpo_weights(chosen, torch.tensor([math.log(0.25), 0.0]))
    assert weights.tolist() == pytest.approx([0.125, 1.0])
    assert not weights.requires_grad
